"""The DHR network (deep hierarchical reconstruction, arXiv 1812.04246) and its checkpoint.

The encoder computes x_l = f_l(x_{l-1}) stage by stage. A bottleneck squeezes each x_l into a small
code, the latent z_l = relu(h_l(x_l)). The head turns the last x_l into the logits y; the decoder
rebuilds the image from the latents alone. [y, z], with z pooled over space, is the activation
vector that OpenMax works on.
"""

import io
import os
import pickle
import secrets
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ARCHITECTURES = {"fast": (64, 256, 256), "deep": (128, 320, 320), "vgg": (64, 128, 256)}  # channels
LATENT_CHANNELS = 32  # of every level; the paper's bottleneck width
NETWORK_KEYS = {"model_state_dict", "model_config", "mean", "std"}
REQUIRED_KEYS = NETWORK_KEYS | {
    "known_classes", "train_args", "epoch", "val_accuracy", "seed", "versions", "git_commit",
}  # fmt: skip


class DHROutput(NamedTuple):
    """What a `DHRNet` returns for a batch of N images.

    Attributes:
        logits: [N, K], raw class scores y.
        reconstruction: [N, C, H, W] in units of the normalised image.
        latents: one [N, 32, h_l, w_l] tensor per level, shallow to deep, all >= 0.
    """

    logits: Tensor
    reconstruction: Tensor
    latents: tuple[Tensor, ...]


class DHRNet(nn.Module):
    """Classifier with a decoder that rebuilds the image from a small code of each encoder stage.

    `vgg` is the published CIFAR-10 network: 3x3 convolutions 64x2, 128x2, 256x4 with BN and ReLU,
    each stage closed by 2x2 max pooling and dropout 0.25, two hidden layers of 1024 with dropout
    0.5. Unlike in the released code, the reconstruction is linear: half of a normalised image is
    negative. `fast` is made for accuracy per FLOP, after airbench (Jordan 2024, arXiv 2404.00498):
    a frozen patch-whitening layer, three GELU stages that pool early, and a decoder 32 channels
    wide. `deep` has more channels, and a residual pair of convolutions in each stage.

    Args:
        num_classes: number of known classes K, at least 2.
        in_channels: 1 or 3.
        image_size: height and width in pixels, 16..1024.
        arch: one of `ARCHITECTURES`.
        mirrored: a mirrored image shows the same class; `activations` then averages over both.

    Raises:
        ValueError: an argument is out of its range.

    Source: paper section 3; the layer list follows the authors' released Chainer code.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 32,
        arch: str = "fast",
        mirrored: bool = True,
    ) -> None:
        super().__init__()
        if arch not in ARCHITECTURES:
            raise ValueError(f"arch is {arch!r}; expected one of {', '.join(ARCHITECTURES)}")
        if num_classes < 2 or in_channels not in (1, 3) or not 16 <= image_size <= 1024:
            raise ValueError(
                f"num_classes {num_classes}, in_channels {in_channels}, image_size {image_size}; "
                "expected at least 2 classes, 1 or 3 channels and 16..1024 pixels"
            )
        self.config: dict[str, Any] = {
            "num_classes": num_classes, "in_channels": in_channels, "image_size": image_size,
            "arch": arch, "mirrored": mirrored,
        }  # fmt: skip
        self.register_buffer("mean", torch.zeros(in_channels))
        self.register_buffer("std", torch.ones(in_channels))

        first, second, third = widths = ARCHITECTURES[arch]
        if arch == "vgg":
            self.stem = nn.Sequential()
            self.encoder = nn.ModuleList(
                [_vgg_stage(in_channels, first, 2), _vgg_stage(first, second, 2),
                 _vgg_stage(second, third, 4)]
            )  # fmt: skip
            self.head = nn.Sequential(
                nn.Flatten(),
                *_hidden_layer(third * (image_size // 8) ** 2, 1024),
                *_hidden_layer(1024, 1024),
                nn.Linear(1024, num_classes),
            )
            decoder_widths, inner = widths, image_size
        else:
            whitened = 8 * in_channels  # eigenvectors of 2x2 patches, and their negatives
            whitening = nn.Conv2d(in_channels, whitened, 2, bias=False)
            whitening.weight.requires_grad = False
            self.stem = nn.Sequential(whitening, nn.GELU())
            residual = arch == "deep"
            self.encoder = nn.ModuleList(
                [_pooling_stage(whitened, first, residual), _pooling_stage(first, second, residual),
                 _pooling_stage(second, third, residual)]
            )  # fmt: skip
            self.head = nn.Sequential(
                nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(third, num_classes, bias=False)
            )
            decoder_widths = (LATENT_CHANNELS,) * 3
            inner = image_size - 1  # after the 2x2 whitening

        self.bottlenecks = nn.ModuleList(
            nn.Conv2d(width, LATENT_CHANNELS, 3, padding=1) for width in widths
        )
        self.expansions = nn.ModuleList(
            nn.Conv2d(LATENT_CHANNELS, width, 3, padding=1) for width in decoder_widths
        )
        outputs = (in_channels, *decoder_widths[:-1])
        sizes = [image_size, inner // 2, inner // 4, inner // 8]
        self.deconvs = nn.ModuleList(
            _deconv(decoder_widths[level], outputs[level], sizes[level + 1], sizes[level])
            for level in range(3)
        )

    def normalize(self, images: Tensor) -> Tensor:
        """Subtract the training set's mean from each channel and divide by its deviation.

        Args:
            images: [N, C, H, W], uint8 in 0..255 or float in 0..1.
        """
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        return (images - self.mean[:, None, None]) / self.std[:, None, None]

    def forward(self, images: Tensor) -> DHROutput:
        """Classify and reconstruct images.

        Args:
            images: [N, C, H, W], uint8 in 0..255 or float in 0..1; normalised inside.

        Raises:
            ValueError: the images have another shape, type or range than the network expects.
        """
        x, latents = self.encode(images)
        return DHROutput(self.head(x), self.decode(latents), tuple(latents))

    def encode(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The last stage's output x_L, [N, C, h, w], and the latents of all levels."""
        if not torch.compiler.is_compiling():
            self._check(images)
        x = self.stem(self.normalize(images))
        latents = []
        for stage, bottleneck in zip(self.encoder, self.bottlenecks, strict=True):
            x = stage(x)
            latents.append(F.relu(bottleneck(x)))
        return x, latents

    def decode(self, latents: list[Tensor]) -> Tensor:
        """Rebuild the image, deep to shallow: g_l = deconv_l(relu(g_{l+1}) + expand_l(z_l))."""
        x = self.deconvs[2](self.expansions[2](latents[2]))
        x = self.deconvs[1](self.expansions[1](latents[1]) + F.relu(x))
        return self.deconvs[0](self.expansions[0](latents[0]) + F.relu(x))

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Values per image in each of the four parts that `activations` returns."""
        latents = LATENT_CHANNELS * len(self.bottlenecks)
        features = ARCHITECTURES[self.config["arch"]][-1]
        return self.config["num_classes"], features, latents, latents

    def activations(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the open-set methods need of images, without the decoder.

        Where `mirrored`, everything is averaged over the image and its mirror image.

        Args:
            images: as for `forward`.

        Returns:
            logits [N, K]; features [N, C], the last stage's output max-pooled over space; and the
            latents of all levels, shallow to deep, max-pooled and average-pooled over space, each
            [N, 96]; float32.
        """
        views = [images, images.flip(-1)] if self.config["mirrored"] else [images]
        parts = []
        for view in views:
            x, latents = self.encode(view)
            largest = torch.cat([z.amax(dim=(2, 3)) for z in latents], dim=1)
            average = torch.cat([z.float().mean(dim=(2, 3)) for z in latents], dim=1)
            parts.append((self.head(x), x.amax(dim=(2, 3)), largest, average))
        logits, features, largest, average = (
            torch.stack(part).float().mean(dim=0) for part in zip(*parts, strict=True)
        )
        return logits, features, largest, average

    @torch.no_grad()
    def fit_input_statistics(self, images: Tensor) -> None:
        """Set the normalisation, and the whitening filters, from training images.

        The filters are the eigenvectors of the covariance of 2x2 patches, each over
        sqrt(eigenvalue + 5e-4), and their negatives. Source: airbench.

        Args:
            images: [N, C, H, W] uint8.
        """
        pixels = images.transpose(0, 1).flatten(1).double() / 255
        self.mean.copy_(pixels.mean(dim=1))
        self.std.copy_(pixels.std(dim=1).clamp_min(1e-3))  # a constant channel stays finite
        if len(self.stem):
            patches = F.unfold(self.normalize(images), 2)
            covariance = (patches @ patches.mT).mean(dim=0) / patches.shape[2]
            eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
            filters = (eigenvectors / (eigenvalues + 5e-4).sqrt()).T
            weight = self.get_parameter("stem.0.weight")
            weight.copy_(torch.cat([filters, -filters]).view_as(weight))

    def is_finite(self) -> bool:
        """Whether all weights and statistics are finite numbers."""
        return all(bool(value.isfinite().all()) for value in self.state_dict().values())

    def _check(self, images: Tensor) -> None:
        channels, size = self.config["in_channels"], self.config["image_size"]
        in_range = images.is_floating_point() and ((images >= 0) & (images <= 1)).all()
        if images.shape[1:] != (channels, size, size) or not (
            images.dtype == torch.uint8 or in_range
        ):
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}; expected [N, {channels}, {size}, "
                f"{size}], uint8 in 0..255 or float in 0..1"
            )


class Residual(nn.Sequential):
    """x + layers(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def _vgg_stage(in_channels: int, width: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in [in_channels] + [width] * (depth - 1):
        conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Dropout(0.25))


def _hidden_layer(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(0.5)]


def _pooling_stage(in_channels: int, width: int, residual: bool) -> nn.Sequential:
    """A convolution that pools early; then another, or a residual pair of them."""
    pooled = [_conv(in_channels, width), nn.MaxPool2d(2), _norm(width), nn.GELU()]
    second = [_conv(width, width), _norm(width)]
    if residual:
        pair = Residual(*second, nn.GELU(), _conv(width, width), _norm(width))
        return nn.Sequential(*pooled, pair, nn.GELU())
    return nn.Sequential(*pooled, *second, nn.GELU())


def _conv(in_channels: int, width: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[:in_channels])  # the first filters start as identity
    return conv


def _norm(width: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(width, momentum=0.4)
    norm.weight.requires_grad = False  # gain 1, as in airbench
    return norm


def _deconv(in_channels: int, out_channels: int, size: int, target: int) -> nn.ConvTranspose2d:
    """Grow size to target pixels: kernel 2 doubles, a larger one restores the pixels that pooling
    dropped."""
    return nn.ConvTranspose2d(in_channels, out_channels, target - 2 * size + 2, stride=2)


def save_checkpoint(path: Path, network: DHRNet, **entries: Any) -> None:
    """Write a checkpoint, tensors and primitives only. Atomic, see `replace_file`.

    Args:
        path: file to make or replace.
        network: its weights, configuration and normalisation are stored.
        entries: the other `REQUIRED_KEYS`, which tell how it was trained, and what else should be
            stored: the open-set rule, the course of the run.

    Raises:
        OSError: the file cannot be written.
    """
    checkpoint = {
        "model_state_dict": network.state_dict(),
        "model_config": network.config,
        "mean": network.mean,
        "std": network.std,
        **entries,
    }
    buffer = io.BytesIO()  # PyTorch reports a full disk as an error of its file format
    torch.save(checkpoint, buffer)
    replace_file(path, lambda file: file.write(buffer.getbuffer()))


def load_checkpoint(path: str | Path) -> tuple[DHRNet, dict[str, Any]]:
    """Rebuild a network from its checkpoint. Nothing in the file is executed.

    Returns:
        the network in evaluation mode on the CPU, and the whole checkpoint.

    Raises:
        ValueError: the file is damaged, holds NaN, or was not written by this project.
        OSError: the file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # PyTorch reads no checksum
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} in it is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if missing := REQUIRED_KEYS - checkpoint.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        network = DHRNet(**checkpoint["model_config"])
        network.load_state_dict(checkpoint["model_state_dict"])
        if not network.is_finite():
            raise ValueError("it holds weights that are not finite")
    except Exception as error:  # a foreign file can fail in any way
        if isinstance(error, OSError) and error.filename:  # it cannot be opened
            raise
        reason = str(error).strip().split("\n")[0]
        if isinstance(error, pickle.UnpicklingError):  # PyTorch's text would advise to run the code
            reason = "it holds more than tensors and plain values"
        raise ValueError(
            f"{path} is not a whole DHR checkpoint ({reason}); "
            "use a file written by train_dhr_nn.py, or train a new one"
        ) from error
    return network.eval(), checkpoint


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a temporary file, then rename it to `path`. Atomic: a crash leaves either
    the old or the new file."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # writing to a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)
