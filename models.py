"""The DHR network (deep hierarchical reconstruction, arXiv 1812.04246) and its checkpoint.

One encoder serves two heads. Level l of the encoder computes x_l = f_l(x_{l-1}); a bottleneck
squeezes it to a latent z_l = relu(h_l(x_l)); a ladder of decoders rebuilds the input from the
latents of every level. The logits y and the pooled latents z form the activation vector [y, z].
"""

import ctypes
import glob
import io
import math
import os
import pickle
import platform
import secrets
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from choices import ARCHITECTURES
from distributed import rank
from metrics import threshold_accepting
from openmax import (
    LARGEST_LOG_HAZARD,
    Activations,
    DHROpenMax,
    activation_vectors,
    pack,
    unpack,
)

if TYPE_CHECKING:
    from open_set_data import ImageSet

LATENT_CHANNELS = 32  # of every level; the paper's bottleneck width
MAX_IMAGE_SIZE = 1024
CHUNK_PIXELS = 2**18  # of 256 images with 32x32 pixels; how many `activations` runs at once
MAX_INFLATION = 20  # bytes that a .pt or .npz file may claim for each one it has; ours stay below 4
FOLDER = 0x10  # MS-DOS's mark of a folder in a zip archive
ACCEPTED_SHARE = 0.95  # of the validation images; sets each method's threshold
MODEL_KEYS = {"model_state_dict", "model_config", "mean", "std"}
RUN_KEYS = {
    "known_classes": list, "train_args": dict, "epoch": int, "val_accuracy": float, "seed": int,
    "versions": dict, "git_commit": str,
}  # fmt: skip


class DHROutput(NamedTuple):
    """What a `DHRNet` returns for a batch of N images.

    Attributes:
        logits: [N, num_classes], raw class scores y.
        reconstruction: [N, C, H, W] in units of the normalised image; None when decoding was
            skipped.
        latents: one [N, 32, h_l, w_l] tensor a level, shallow to deep, all >= 0.
    """

    logits: Tensor
    reconstruction: Tensor | None
    latents: tuple[Tensor, ...]


class DHRNet(nn.Module):
    """Classifier with a second head that reconstructs its input through latents at every level.

    `vgg` is the published CIFAR-10 network: 3x3 convolutions 64x2, 128x2, 256x4 with BN and ReLU,
    each stage closed by 2x2 max pooling and dropout 0.25, two hidden layers of 1024 with dropout
    0.5. Mended from the released code and its ports: the reconstruction is linear (a
    normalised image is negative half of the time), logits have no ReLU, dropout is off in `eval()`.

    `fast` is made for accuracy per FLOP, after airbench (Jordan 2024, arXiv 2404.00498): a frozen
    patch-whitening layer, three GELU stages that pool early, and a ladder 32 channels wide.
    For longer training, `medium` has more channels, and `deep` as well a third convolution a stage,
    the last two inside a residual connection.

    Args:
        num_classes: number of known classes K.
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
        if not isinstance(mirrored, bool):
            raise ValueError(f"mirrored is {mirrored!r}; expected True or False")
        size_allowed = 16 <= image_size <= MAX_IMAGE_SIZE
        if num_classes < 2 or in_channels not in (1, 3) or not size_allowed:
            raise ValueError(
                f"num_classes {num_classes}, in_channels {in_channels}, image_size {image_size}; "
                f"expected at least 2 classes, 1 or 3 channels and 16..{MAX_IMAGE_SIZE} pixels"
            )
        self.config: dict[str, Any] = {
            "num_classes": num_classes,
            "in_channels": in_channels,
            "image_size": image_size,
            "arch": arch,
            "mirrored": mirrored,
        }
        self.register_buffer("mean", torch.zeros(in_channels))
        self.register_buffer("std", torch.ones(in_channels))

        widths = ARCHITECTURES[arch]
        if arch == "vgg":
            lateral = [*widths]
            sizes = [image_size // 2**level for level in range(4)]
            self.stem = nn.Sequential()
            inputs = [in_channels, *widths[:-1]]
            self.encoder = nn.ModuleList(map(_vgg_stage, inputs, widths, [2, 2, 4]))
            self.head = nn.Sequential(
                nn.Flatten(),
                *(nn.Linear(256 * sizes[-1] ** 2, 1024), nn.ReLU(), nn.Dropout(0.5)),
                *(nn.Linear(1024, 1024), nn.ReLU(), nn.Dropout(0.5)),
                nn.Linear(1024, num_classes),
            )
        else:
            lateral = [LATENT_CHANNELS] * 3
            sizes = [image_size] + [(image_size - 1) // 2**level for level in (1, 2, 3)]
            whitening = nn.Conv2d(in_channels, 8 * in_channels, 2, bias=False)
            whitening.weight.requires_grad = False
            self.stem = nn.Sequential(whitening, nn.GELU())
            inputs = [8 * in_channels, *widths[:-1]]
            stage = _deep_stage if arch == "deep" else _fast_stage
            self.encoder = nn.ModuleList(map(stage, inputs, widths))
            self.head = nn.Sequential(
                nn.AdaptiveMaxPool2d(1),
                nn.Flatten(),
                nn.Linear(widths[-1], num_classes, bias=False),
            )

        self.bottlenecks = nn.ModuleList(
            nn.Conv2d(width, LATENT_CHANNELS, 3, padding=1) for width in widths
        )
        self.expansions = nn.ModuleList(
            nn.Conv2d(LATENT_CHANNELS, width, 3, padding=1) for width in lateral
        )
        # Level l's deconvolution grows sizes[l + 1] to sizes[l]: kernel 2 where that is a doubling,
        # one or two more where pooling dropped odd pixels.
        self.deconvs = nn.ModuleList(
            nn.ConvTranspose2d(
                lateral[level], out, sizes[level] - 2 * sizes[level + 1] + 2, stride=2
            )
            for level, out in enumerate([in_channels, *lateral[:-1]])
        )

    def normalize(self, images: Tensor) -> Tensor:
        """Give each channel of [N, C, H, W] images, uint8 in 0..255 or float in 0..1, the training
        set's zero mean and unit deviation."""
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        return (images - self.mean[:, None, None]) / self.std[:, None, None]

    def forward(self, images: Tensor, decode: bool = True) -> DHROutput:
        """Classify and reconstruct images.

        Args:
            images: [N, C, H, W], uint8 in 0..255 or float in 0..1; normalised inside.
            decode: False skips the decoder, which logits and latents do not need.

        Raises:
            ValueError: the images have another shape than the network was built for.
        """
        size = self.config["image_size"]
        if tuple(images.shape[1:]) != (self.config["in_channels"], size, size):
            raise ValueError(
                f"images have shape {list(images.shape)}; expected "
                f"[N, {self.config['in_channels']}, {size}, {size}]: resize or convert them"
            )
        x = self.stem(self.normalize(images))
        latents = []
        for stage, bottleneck in zip(self.encoder, self.bottlenecks, strict=True):
            x = stage(x)
            latents.append(F.relu(bottleneck(x)))
        reconstruction = self.decode(latents) if decode else None
        return DHROutput(self.head(x), reconstruction, tuple(latents))

    @torch.no_grad()
    def activations(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What classification and OpenMax need of images, without the decoder.

        Where `mirrored`, everything is averaged over the image and its mirror image. The network
        always sees chunks of one size, the last filled up with black images: another size would
        take other kernels, which round differently, and scores would depend on the company.

        Args:
            images: as for `forward`.

        Returns:
            logits [N, K], and the latents of all levels, shallow to deep, max-pooled and
            average-pooled over space, each [N, 32 L]; float32.
        """
        count = max(1, CHUNK_PIXELS // self.config["image_size"] ** 2)
        parts = []
        for chunk in images.split(count):
            filled = chunk.new_zeros(count, *chunk.shape[1:]).to(memory_format=torch.channels_last)
            filled[: len(chunk)] = chunk
            parts.append([part[: len(chunk)] for part in self._chunk_activations(filled)])
        logits, largest, average = map(torch.cat, zip(*parts, strict=True))
        return logits, largest, average

    def _chunk_activations(self, images: Tensor) -> list[Tensor]:
        views = [images, images.flip(-1)] if self.config["mirrored"] else [images]
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for view in views:
            logits, _, latents = self(view, decode=False)
            largest = torch.cat([z.amax(dim=(2, 3)) for z in latents], dim=1)
            average = torch.cat([z.float().mean(dim=(2, 3)) for z in latents], dim=1)
            parts.append((logits.float(), largest.float(), average))
        return [torch.stack(part).mean(dim=0) for part in zip(*parts, strict=True)]

    def decode(self, latents: list[Tensor]) -> Tensor:
        """Rebuild the image, deep to shallow: g_l = deconv_l(relu(g_{l+1}) + expand_l(z_l))."""
        x = self.deconvs[-1](self.expansions[-1](latents[-1]))
        for level in range(len(latents) - 2, -1, -1):
            x = self.deconvs[level](F.relu(x) + self.expansions[level](latents[level]))
        return x

    @torch.no_grad()
    def fit_input_statistics(self, images: Tensor) -> None:
        """Set the normalisation, and `fast`'s whitening filters, from training images.

        The filters are the eigenvectors of the covariance of 2x2 patches, each over
        sqrt(eigenvalue + 5e-4), and their negatives. Source: airbench.

        Args:
            images: [N, C, H, W] uint8.
        """
        pixels = images.transpose(0, 1).flatten(1).double() / 255
        self.mean.copy_(pixels.mean(dim=1))
        self.std.copy_(pixels.std(dim=1).clamp_min(1e-3))  # a constant channel stays finite
        for layer in self.stem:
            if isinstance(layer, nn.Conv2d):
                patches = F.unfold(self.normalize(images), 2)
                covariance = (patches @ patches.mT).mean(dim=0) / patches.shape[2]
                eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
                filters = (eigenvectors / (eigenvalues + 5e-4).sqrt()).T
                layer.weight.copy_(torch.cat([filters, -filters]).view_as(layer.weight))


class MaxPool(nn.Module):
    """2x2 max pooling that saves memory in training: PyTorch's own keeps its input and eight bytes
    an output for the way back, half of what a step holds; this keeps two or four bytes an output.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _MaxPoolFunction.apply(x)


class _MaxPoolFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        pooled, index = F.max_pool2d(x, 2, return_indices=True)
        small = torch.int16 if x.shape[2] * x.shape[3] < 2**15 else torch.int32
        ctx.save_for_backward(index.to(small))
        ctx.size, ctx.stride = x.size(), x.stride()
        return pooled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (index,) = ctx.saved_tensors
        like_input = gradient.new_empty_strided(ctx.size, ctx.stride)  # its values are not read
        return torch.ops.aten.max_pool2d_with_indices_backward(
            gradient, like_input, [2, 2], [2, 2], [0, 0], [1, 1], False, index.long()
        )


def _vgg_stage(in_channels: int, width: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(depth):
        layers.append(nn.Conv2d(width if i else in_channels, width, 3, padding=1, bias=False))
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, MaxPool(), nn.Dropout(0.25))


def _fast_stage(in_channels: int, width: int) -> nn.Sequential:
    first, second = _conv(in_channels, width), _conv(width, width)
    norms = _norm(width), _norm(width)
    return nn.Sequential(first, MaxPool(), norms[0], nn.GELU(), second, norms[1], nn.GELU())


def _deep_stage(in_channels: int, width: int) -> nn.Sequential:
    first, block = _conv(in_channels, width), [_conv(width, width), _norm(width), nn.GELU()]
    block += [_conv(width, width), _norm(width)]
    return nn.Sequential(first, MaxPool(), _norm(width), nn.GELU(), Residual(*block), nn.GELU())


def _conv(in_channels: int, width: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[:in_channels])  # the first filters start as identity
    return conv


def _norm(width: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(width, momentum=0.4)
    norm.weight.requires_grad = False  # gain 1, as in airbench
    return norm


class Residual(nn.Sequential):
    """Its input added to what its layers make of it."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def prepare_device(name: str) -> tuple[torch.device, torch.autocast]:
    """Choose the device, and bfloat16 where it has units for it.

    Args:
        name: `auto` (a GPU where there is one), `cpu`, `cuda` (torchrun's processes take one each),
            `cuda:1`, …

    Returns:
        the device, and the autocast context to run the network in (disabled where there is no
        bfloat16 unit).

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # of this process, under torchrun
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not available here; use --device cpu") from error
    if device.type == "cpu":
        has_bfloat16 = torch.cpu._is_avx512_bf16_supported()
    else:
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    return device, torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16)


def extract(
    model: DHRNet,
    images: "ImageSet",
    title: str | None,
    batch_size: int,
    device: torch.device,
    autocast: torch.autocast,
) -> Activations:
    """Run the network, decoder skipped, over an image set; a title shows a progress bar."""
    parts = []
    bar = tqdm(
        total=len(images.labels), desc=title, unit="img", unit_scale=True, leave=False,
        disable=title is None or rank() > 0,
    )  # fmt: skip
    for start in range(0, max(1, len(images.labels)), batch_size):
        batch = torch.from_numpy(images.images[start : start + batch_size]).to(device)
        with autocast:
            parts.append(model.activations(batch.permute(0, 3, 1, 2)))
        bar.update(len(batch))
    bar.close()
    arrays = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    return Activations(images.labels, *arrays)


def fit_rule(train: Activations, val: Activations, tail_size: int = 20) -> DHROpenMax:
    """Fit this project's open-set rule to a network's activations.

    Raises:
        ValueError: as `DHROpenMax.fit`.
    """
    levels = train.latents_avg.shape[1] // LATENT_CHANNELS
    vectors, held_out = activation_vectors(train, "avg"), activation_vectors(val, "avg")
    return DHROpenMax(levels, tail_size).fit(vectors, train.labels, held_out)


def pack_rule(rule: DHROpenMax, val: Activations) -> dict[str, Any]:
    """The checkpoint's entry `open_set_rule`: the fitted estimator's attributes as tensors and
    primitives, and the threshold on its score, which accepts 95 % of the validation images."""
    scores = rule.decision_function(activation_vectors(val, "avg"))
    threshold = threshold_accepting(scores, ACCEPTED_SHARE)
    return {"estimator": pack(rule, torch.from_numpy), "threshold": threshold}


def unpack_rule(model: DHRNet, checkpoint: dict[str, Any]) -> tuple[DHROpenMax, float]:
    """The fitted open-set rule that travels in a network's checkpoint, and its threshold.

    Raises:
        ValueError: the rule is damaged or belongs to another network; it is tried on zeros.
    """
    try:
        entry, num_classes = checkpoint["open_set_rule"], model.config["num_classes"]
        rule, threshold = unpack(entry["estimator"]), float(entry["threshold"])
        columns = num_classes + LATENT_CHANNELS * len(model.bottlenecks)
        if rule.predict_proba(np.zeros((1, columns))).shape != (1, num_classes + 1):
            raise ValueError(f"it does not have the network's {num_classes} classes")
    except Exception as error:  # a foreign file can fail in any way
        raise ValueError(f"the open-set rule in it is damaged ({error}); train again") from error
    return rule, threshold


class Recogniser(nn.Module):
    """A network and its open-set rule in one module, which `torch.export` turns into one file.

    Args:
        model: in evaluation mode.
        rule: fitted to it; `forward` follows `DHROpenMax.decide` step by step, in float64.
    """

    means: Tensor
    whitening: Tensor
    latent_means: Tensor
    latent_whitening: Tensor
    tails: Tensor
    latent_tails: Tensor

    def __init__(self, model: DHRNet, rule: DHROpenMax) -> None:
        super().__init__()
        self.model, self.alpha, self.offset = model, rule.openmax_.alpha, float(rule.offset_)
        arrays = {
            "means": rule.openmax_.mean_activations_, "whitening": rule.openmax_.whitening_,
            "latent_means": np.stack(rule.latent_means_),
            "latent_whitening": np.stack(rule.latent_whitening_),
            "tails": np.stack(rule.openmax_.weibull_), "latent_tails": np.stack(rule.weibull_),
        }  # fmt: skip
        for name, array in arrays.items():
            self.register_buffer(name, torch.from_numpy(array))

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities [N, K + 1], the unknown class last, of images as for `DHRNet`."""
        logits, _, latents = (part.double() for part in self.model._chunk_activations(images))
        distances = torch.cdist(
            logits @ self.whitening,
            self.means @ self.whitening,
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        not_member = -torch.expm1(-_hazard(distances, self.tails))
        rank = logits.argsort(dim=1, descending=True).argsort(dim=1)
        not_member = not_member * (self.alpha - rank).clamp_min(0) / self.alpha
        known = logits * (1 - not_member)
        levels = latents.unflatten(1, (len(self.latent_means), -1)).transpose(0, 1)
        offsets = levels - self.latent_means[:, logits.argmax(dim=1)]  # [L, N, C]
        outlying = torch.linalg.vector_norm(offsets @ self.latent_whitening, dim=2).T
        log_odds = (logits * not_member).sum(dim=1) - known.logsumexp(dim=1) - self.offset
        unknown = torch.sigmoid(log_odds + _hazard(outlying, self.latent_tails).sum(dim=1))[:, None]
        return torch.cat([known.softmax(dim=1) * (1 - unknown), unknown], dim=1)


def _hazard(distances: Tensor, tails: Tensor) -> Tensor:
    """`Weibull.hazard` on tensors; tails [3, K] as its fields."""
    scale, shape, location = tails
    hazard = ((distances - location).clamp_min(0) / scale).pow(shape)
    return hazard.clamp_max(math.exp(LARGEST_LOG_HAZARD))


def keep_freed_memory() -> None:
    """Ask glibc to keep memory freed from now on: each layer's output else costs a page fault every
    4 KB. To be called when the images are loaded, which frees much that nothing needs again."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(-4, 0)  # M_MMAP_MAX: never map a large block on its own
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: never hand the top of the heap back


def software_versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "libmr"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def save_checkpoint(path: Path, model: DHRNet, **entries: Any) -> None:
    """Write a checkpoint, tensors and primitives only, to a temporary file and rename it.

    Args:
        path: file to make or replace.
        model: the network; its weights, configuration and normalisation are taken from it.
        entries: `RUN_KEYS`, which tell how it was trained, and what else should travel:
            `open_set_rule` of `pack_rule`; `course`, a row of losses, accuracies and rate an epoch.

    Raises:
        OSError: the file cannot be written; an older one is left as it was.
    """
    checkpoint = {
        "model_state_dict": model.state_dict(),
        "model_config": model.config,
        "mean": model.mean,
        "std": model.std,
        **entries,
    }
    buffer = io.BytesIO()  # torch would report a full disk as a RuntimeError about its format
    torch.save(checkpoint, buffer)
    replace_file(path, lambda file: file.write(buffer.getbuffer()))


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a temporary file, then rename it to `path`: killed at any moment, there is
    the old file or the new one. What killed processes left behind goes after ten minutes."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > 600:
                leftover.unlink()


def try_writing(path: Path, size: int) -> None:
    """Write and remove a file of `size` bytes beside `path`; os.access says yes to root, and where
    the disk is full.

    Raises:
        ValueError: `path` cannot be written, or there is no room.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        folder = path.resolve().parent
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{path.name}.", suffix=".tmp") as file:
            file.write(bytes(size))
    except OSError as error:
        raise ValueError(
            f"{path}: cannot write there ({error.strerror}); name a file in a writable folder "
            f"with {size / 1e6:.0f} MB to spare"
        ) from error


def refuse_damaged(path: Path) -> None:
    """Refuse a .pt or .npz file (both are zip archives) that is damaged or unpacks to far too much.

    Raises:
        ValueError: it claims more than `MAX_INFLATION` times its size, a checksum is wrong (which
            torch.load would not notice), or a member is marked as a folder (of which torch.load
            reads nothing, leaving the tensor as memory happens to be).
        zipfile.BadZipFile: it is no zip archive.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        claimed = sum(member.file_size for member in members)
        if claimed > MAX_INFLATION * path.stat().st_size:
            raise ValueError(f"it claims to hold {claimed:,} bytes")
        if any(member.is_dir() or member.external_attr & FOLDER for member in members):
            raise ValueError("it holds a folder")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged!a} in it is damaged")


def load_checkpoint(path: Path) -> tuple[DHRNet, dict[str, Any]]:
    """Rebuild a network from its checkpoint.

    Returns:
        the network in evaluation mode on the CPU, and the whole checkpoint.

    Raises:
        ValueError: the file is not a whole checkpoint of this project; nothing in it is executed.
        OSError: the file cannot be read.
    """
    try:
        refuse_damaged(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        missing = MODEL_KEYS - checkpoint.keys()
        missing |= {k for k, kind in RUN_KEYS.items() if type(checkpoint.get(k)) is not kind}
        if missing:
            raise ValueError(f"{', '.join(sorted(missing))}: missing or of another type")
        with torch.device("meta"):  # sizes without memory
            weights = DHRNet(**checkpoint["model_config"]).state_dict().values()
        if sum(weight.nbytes for weight in weights) > MAX_INFLATION * path.stat().st_size:
            raise ValueError("its model_config asks for more weights than it holds")
        model = DHRNet(**checkpoint["model_config"])
        model.load_state_dict(checkpoint["model_state_dict"])
    except Exception as error:  # a foreign file can fail in any way
        if isinstance(error, OSError) and error.filename:  # it cannot be opened
            raise
        reason = str(error).strip().split("\n")[0]
        if isinstance(error, pickle.UnpicklingError):  # torch's text would advise to run the code
            reason = "it holds more than tensors and plain values"
        raise ValueError(
            f"{path} is not a whole DHR checkpoint ({reason}); "
            "use a file written by train_dhr_nn.py, or train a new one"
        ) from error
    return model.eval(), checkpoint
