"""What a network says of image sets: extraction, its cache, and the arrays shipped with dhr_net.pt.

Also the device and the number format that a network runs in.
"""

import ctypes
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from distributed import average, rank
from models import DHRNet, load_checkpoint, replace_file
from open_set_data import ImagesUnavailable
from pictures import ImageSet

CACHE_VERSION = 2  # raise it when the network computes something else from the same checkpoint
SHIPPED_STEPS = {"features": 7, "latents_max": 63, "latents_avg": 63}
SHIPPED_PATH = Path(__file__).resolve().parent / "data" / "dhr_net_activations.npz"


class Activations(NamedTuple):
    """What the network says of N images.

    Attributes:
        labels: [N] int64 class indices, `openmax.UNKNOWN` for images of unknown classes.
        logits: [N, K] float32, y.
        features: [N, C] float32, the encoder's last stage, max-pooled over space.
        latents_max: [N, 32 L] float32, the latents of L levels, shallow to deep, max-pooled over
            space.
        latents_avg: [N, 32 L] float32, the same averaged over space.
    """

    labels: np.ndarray
    logits: np.ndarray
    features: np.ndarray
    latents_max: np.ndarray
    latents_avg: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share in 0..1 of the images whose largest logit is their label's."""
        return float(np.mean(self.logits.argmax(axis=1) == self.labels))

    def vectors(self, latents: str) -> np.ndarray:
        """[y, z], [N, K + 32 L], with z pooled by `max` or `avg`; y alone for `none`."""
        if latents == "none":
            return self.logits
        return np.hstack([self.logits, self.latents_max if latents == "max" else self.latents_avg])


def prepare_device(name: str) -> torch.device:
    """Choose the device.

    Args:
        name: `auto` (a GPU where there is one), `cpu`, `cuda` (torchrun's processes take one each),
            `cuda:1`, …

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # of this process, under torchrun
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not available here; use --device cpu") from error


def load_network(path: Path, device: str = "auto") -> tuple[DHRNet, dict[str, Any]]:
    """The network of a checkpoint in evaluation mode on a device, and the checkpoint.

    Raises:
        ValueError, OSError: as `prepare_device` and `models.load_checkpoint`.
    """
    chosen = prepare_device(device)
    network, checkpoint = load_checkpoint(path)
    return network.to(chosen).to(memory_format=torch.channels_last), checkpoint


def autocast(device: torch.device) -> torch.autocast:
    """The context to run a network in: bfloat16 where the device has units for it."""
    if device.type == "cpu":
        has_bfloat16 = torch.cpu._is_avx512_bf16_supported()
    else:
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16)


def number_format(device: torch.device) -> str:
    """`bfloat16` or `float32`, what `autocast` computes in."""
    return "bfloat16" if autocast(device)._enabled else "float32"


def keep_freed_memory() -> None:
    """Ask glibc to keep memory freed from now on; otherwise every large allocation is mapped afresh
    and page-faults. Call it after loading the images."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(-4, 0)  # M_MMAP_MAX: never map a large block on its own
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: never hand the top of the heap back


@torch.no_grad()
def extract(
    network: DHRNet, images: ImageSet, batch_size: int, title: str | None = None
) -> Activations:
    """Run a network, decoder skipped, over an image set.

    Args:
        network: in evaluation mode, on its device.
        images: [N, H, W, C] uint8 and labels.
        batch_size: images sent to the device at once; may move a score by 1e-4, since another size
            takes other kernels, which round differently.
        title: of the progress bar; None shows none.
    """
    device, count = network.mean.device, len(images.labels)
    arrays = [np.empty((count, width), np.float32) for width in network.widths]
    starts = range(0, count, batch_size)
    hidden = True if title is None else None  # with None, tqdm decides
    for start in tqdm(starts, title, unit="batch", leave=False, disable=hidden):
        rows = slice(start, start + batch_size)
        batch = torch.from_numpy(images.images[rows]).to(device)
        with autocast(device):
            parts = network.activations(batch.permute(0, 3, 1, 2))
        for array, part in zip(arrays, parts, strict=True):
            array[rows] = part.cpu().numpy()
    return Activations(images.labels, *arrays)


@torch.no_grad()
def reconstruct(network: DHRNet, images: np.ndarray) -> np.ndarray:
    """The network's reconstructions [N, H, W, C] uint8 of images [N, H, W, C] uint8."""
    device = network.mean.device
    rebuilt = network(torch.from_numpy(images).to(device).permute(0, 3, 1, 2)).reconstruction
    pixels = rebuilt * network.std[:, None, None] + network.mean[:, None, None]
    return (255 * pixels).clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, by which activations know their checkpoint."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cache_key(checkpoint_sha256: str, images: ImageSet, device: torch.device) -> str:
    """Hash of all that decides the activations: network, images, and arithmetic."""
    arithmetic = f"{device.type} {number_format(device)} torch {torch.__version__}"
    key = hashlib.sha256(f"{CACHE_VERSION} {checkpoint_sha256} {arithmetic}".encode())
    for array in images:
        key.update(f"{array.shape} {array.dtype}".encode())
        key.update(np.ascontiguousarray(array).data)
    return key.hexdigest()[:32]


def cached(path: Path, make: Callable[[], Activations]) -> Activations:
    """The activations stored at `path`. They are made, and stored, where there are none or the file
    is damaged."""
    try:
        if average(torch.tensor(float(path.exists()))) == 1:  # all processes read it, or none
            with open(path, "rb") as file, np.load(file) as stored:
                return Activations(*(stored[field] for field in Activations._fields))
    except Exception as error:  # a damaged file can fail in any way
        print(f"{path} cannot be read ({error}); extracting again", file=sys.stderr)
    activations = make()
    if rank() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, lambda file: np.savez(file, **activations._asdict()))
        except OSError as error:
            print(f"{path} could not be stored ({error}); going on without", file=sys.stderr)
    return activations


def write_shipped(checkpoint_sha256: str, sets: dict[str, Activations], path: Path) -> None:
    """Write the arrays that ship with a checkpoint, for machines without images or network.

    Logits are stored as float16. Features and latents are stored in a few steps from their smallest
    to their largest value over all sets, as square roots, for most are small. This moves no figure
    of the table by more than 0.002.
    """
    arrays = {"checkpoint": np.array(checkpoint_sha256)}
    for field, steps in SHIPPED_STEPS.items():
        values = np.concatenate([getattr(activations, field) for activations in sets.values()])
        low, high = arrays[f"range/{field}"] = np.stack([values.min(axis=0), values.max(axis=0)])
        for name, activations in sets.items():
            shares = (getattr(activations, field) - low) / np.maximum(high - low, 1e-12)
            arrays[f"{name}/{field}"] = np.rint(shares**0.5 * steps).astype(np.uint8)
    for name, activations in sets.items():
        arrays[f"{name}/labels"] = activations.labels.astype(np.int16)
        arrays[f"{name}/logits"] = activations.logits.astype(np.float16)
    replace_file(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))


def load_shipped(
    checkpoint_sha256: str, names: Sequence[str], path: Path = SHIPPED_PATH
) -> dict[str, Activations]:
    """The activations of the named sets that ship with a checkpoint, see `write_shipped`.

    Raises:
        ImagesUnavailable: there are none, or they belong to another checkpoint or lack a set.
    """
    if not path.exists():  # pip installs the modules alone
        raise ImagesUnavailable("no activations ship with the checkpoint")
    sets = {}
    with np.load(path) as stored:
        if str(stored["checkpoint"]) != checkpoint_sha256:
            raise ImagesUnavailable("no activations ship for this checkpoint")
        if absent := [name for name in names if f"{name}/labels" not in stored]:
            raise ImagesUnavailable(f"no activations ship for {', '.join(absent)}")
        for name in names:
            others = []
            for field, steps in SHIPPED_STEPS.items():
                low, high = stored[f"range/{field}"]
                roots = stored[f"{name}/{field}"] / np.float32(steps)
                others.append(low + roots**2 * (high - low))
            labels, logits = stored[f"{name}/labels"], stored[f"{name}/logits"]
            sets[name] = Activations(labels.astype(np.int64), logits.astype(np.float32), *others)
    return sets
