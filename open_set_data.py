"""Image sets for open-set recognition: train / val / test_known, and test_unknown.

Every set is one uint8 array in memory, [N, height, width, channels]. Sets are read from a data
folder (default `data/`); what is missing there is downloaded with a progress bar and checked by its
MD5. Sources, sizes and licences are listed in data/README.md.
"""

import http.client
import os
import socket
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, download_url
from tqdm import tqdm

from choices import KNOWN_SETS, UNKNOWN_SETS

HELD_OUT_CLASSES = "held-out-classes"  # test images of the data set's own classes left unknown

VAL_PER_CLASS = 250  # val holds this many training images a class,
VAL_SHARE = 0.1  # but at most this share of them
TEST_SHARE = 0.2  # of a data set that has no test split of its own
SPLIT_SEED = 0  # val is the same for every training seed
NOISE_COUNT = 10_000
FOLDER_IMAGE_SIZE = 32
MAX_NAMED = 10  # unreadable files named one by one; the rest are counted
PATIENCE = 60  # seconds a server may be silent
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # EPS would run Ghostscript
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}

TORCHVISION = {  # name: (torchvision's class, what it leaves in the data folder)
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "mnist": ("MNIST", "MNIST"),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST"),
    "svhn": ("SVHN", "{split}_32x32.mat"),
    "textures": ("DTD", "dtd"),
}
TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
TINY_IMAGENET_SIZE = 64
ODIN_ARCHIVES = {  # name: (archive, MD5, folder of images, pixels of frame around each, dropbox id)
    "tiny-imagenet-crop": (
        "Imagenet.tar.gz", "7c0827e4246c3718a5ee076e999e52e5", "Imagenet/test", 2,
        "avgm2u562itwpkl"),
    "lsun-crop": (
        "LSUN.tar.gz", "458a0a0ab8e5f1cb4516d7400568e460", "LSUN/test", 2, "fhtsw1m3qxlwj6h"),
    "lsun-resize": (
        "LSUN_resize.tar.gz", "278b7b31c8cb7e804a1465a8ce03a2dc", "LSUN_resize/LSUN_resize", 0,
        "moqh2wh8696c3yl"),
    "isun": ("iSUN.tar.gz", "be77b0f2c26fda898afac5f99645ee70", "iSUN", 0, "ssz7qxfqae0cca5"),
}  # fmt: skip


class ImagesUnavailable(Exception):
    """An image set is not on disk and cannot be downloaded."""


class ImageSet(NamedTuple):
    """Images [N, H, W, C] uint8 with their class indices [N] int64."""

    images: np.ndarray
    labels: np.ndarray


class KnownData(NamedTuple):
    """A data set split for open-set recognition; labels index `classes`.

    Attributes:
        classes: names of the K known classes.
        train, val, test_known: images of known classes. `val` is a fixed, stratified part of the
            training images (250 a class, at most a tenth); the three share no image.
        test_unknown: test images [N, H, W, C] of the classes left out; none when all are known.
    """

    classes: tuple[str, ...]
    train: ImageSet
    val: ImageSet
    test_known: ImageSet
    test_unknown: np.ndarray


def load_known(name: str, data_dir: Path, known_classes: str = "") -> KnownData:
    """Load a data set and split it.

    Args:
        name: one of `KNOWN_SETS`, or `folder:PATH` with one sub-folder of images a class.
        data_dir: where image sets lie or are downloaded to.
        known_classes: names or indices of the classes to know, comma-separated, in label order;
            empty for all.

    Raises:
        ImagesUnavailable: the images are neither on disk nor to be had from the network.
        ValueError: unknown name or class.
    """
    if name.startswith("folder:"):
        all_classes, train, test = _read_class_folders(Path(name.removeprefix("folder:")))
    elif name in KNOWN_SETS:
        with _what_to_do(name, data_dir):
            all_classes, train, test = _read_known(name, data_dir)
    else:
        raise ValueError(f"data set {name!r} is none of {', '.join(KNOWN_SETS)}, folder:PATH")
    if test is None:
        in_test = _stratified_mask(train.labels, lambda count: round(TEST_SHARE * count))
        train, test = _select(train, ~in_test), _select(train, in_test)

    wanted = [item for item in known_classes.split(",") if item]
    known = _class_indices(wanted, all_classes)
    train, test_known = _relabel(train, known), _relabel(test, known)
    in_val = _stratified_mask(
        train.labels, lambda count: min(VAL_PER_CLASS, max(1, int(VAL_SHARE * count)))
    )
    classes = tuple(all_classes[index] for index in known)
    unknown = test.images[~np.isin(test.labels, known)]
    return KnownData(classes, _select(train, ~in_val), _select(train, in_val), test_known, unknown)


def load_unknown(
    name: str, data_dir: Path, image_size: int, channels: int = 3, seed: int = 0
) -> np.ndarray:
    """Load an image set of unknown classes, [N, image_size, image_size, channels] uint8.

    `*-crop` sets are random patches of image_size pixels, `*-resize` and all other sets are scaled
    with Pillow's antialiased bilinear filter (the published resized archives are aliased; they are
    used as they are). TinyImageNet sets are its 10,000 test images; the published archive of crops,
    where that is what lies in the data folder, is used with its frame cut off.

    Args:
        name: one of `UNKNOWN_SETS`, or `folder:PATH` for any folder of images.
        data_dir: where image sets lie or are downloaded to.
        image_size: pixels the network expects.
        channels: 1 or 3, as the network expects.
        seed: of the crop offsets and the noise: the same seed gives the same bytes.

    Raises:
        ImagesUnavailable: the images are neither on disk nor to be had from the network.
        ValueError: unknown name.
    """
    if name.startswith("folder:"):
        images = read_images(image_files([Path(name.removeprefix("folder:"))]), image_size)[0]
    elif name in UNKNOWN_SETS:
        with _what_to_do(name, data_dir):
            images = _read_unknown(name, data_dir, image_size, seed)
    else:
        raise ValueError(f"unknown set {name!r} is none of {', '.join(UNKNOWN_SETS)}, folder:PATH")
    return fit_to(images, image_size, channels)


def image_files(paths: Iterable[Path]) -> list[Path]:
    """List image files: each path is a file, or a folder searched through for image files, sorted.

    Raises:
        ValueError: a path does not exist, or no image file is found.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = (p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            files += sorted(p for p in found if p.is_file() or p.is_symlink())
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"{path}: no such file or folder; expected images or folders of them")
    if not files:
        raise ValueError(
            f"{', '.join(map(str, paths))}: no image file found; expected at least one"
        )
    return files


def read_images(
    files: Sequence[Path | zipfile.Path], size: int, frame: int = 0
) -> tuple[np.ndarray, list[int]]:
    """Decode image files to one array, skipping unreadable ones with a line on stderr.

    Args:
        files: JPEG, PNG, … files; any mode becomes RGB, with transparent pixels on white, 16 bits
            scaled to 8, EXIF rotation applied, and of an animation the first frame.
        size: scale to size x size pixels, where needed, with Pillow's antialiased bilinear filter.
        frame: pixels to cut off each side first.

    Returns:
        images [N, H, W, 3] uint8, and the indices into `files` of the N that could be read.

    Raises:
        ValueError: none of the files can be read.
    """
    images, read, skipped = [], [], []
    with warnings.catch_warnings(action="ignore"):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for index, file in enumerate(tqdm(files, "read images", unit="img", leave=False, delay=1)):
            try:
                with file.open("rb") as stream:
                    images.append(_decode(stream, size, frame))
                read.append(index)
            except Exception as error:  # Pillow raises almost anything on a damaged file
                reason = printable(" ".join(str(error).split()))
                skipped.append(f"skipped {printable(file)}: not a readable image ({reason})")
    for line in skipped[:MAX_NAMED]:
        print(line, file=sys.stderr)
    if skipped:
        print(f"{len(skipped):,} of {len(files):,} files are not readable images", file=sys.stderr)
    if not images:
        first = "".join(map(printable, files[:1]))
        raise ValueError(f"{first}: none of {len(files)} files is a readable image")
    return np.stack(images), read


def _decode(stream: IO[bytes], size: int, frame: int) -> np.ndarray:
    image = ImageOps.exif_transpose(Image.open(stream, formats=IMAGE_FORMATS))
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to white
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if frame:
        image = image.crop((frame, frame, image.width - frame, image.height - frame))
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def printable(path: object) -> str:
    """A path as it is, or quoted and escaped where bytes outside UTF-8 or line breaks are in it."""
    return text if (text := str(path)).isprintable() else repr(text)


@contextmanager
def _what_to_do(name: str, data_dir: Path) -> Iterator[None]:
    """Say in one line what to do when reading or downloading fails."""
    try:
        yield
    except (OSError, http.client.HTTPException, tarfile.TarError, zipfile.BadZipFile,
            RuntimeError) as error:  # fmt: skip
        # RuntimeError is how torchvision reports a wrong checksum or a failed mirror
        reason = " ".join(str(error).split())
        raise ImagesUnavailable(
            f"{name} is not to be had from {data_dir} nor by download ({reason}); connect to the "
            f"network or put the files there, see data/README.md"
        ) from error


def _read_known(name: str, data_dir: Path) -> tuple[list[str], ImageSet, ImageSet | None]:
    """Class names, training images, and test images where the data set has a split of its own."""
    if name == "digits":
        from sklearn.datasets import load_digits  # only this set needs it

        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 8x8, in 0..16
        images = pixels.repeat(4, axis=1).repeat(4, axis=2)[..., None]
        return [str(digit) for digit in digits.target_names], ImageSet(images, digits.target), None
    if name == "tiny-imagenet":
        return _read_tiny_imagenet_classes(data_dir)
    classes, train = _read_torchvision(name, data_dir, "train")
    return classes, train, _read_torchvision(name, data_dir, "test")[1]


def _read_torchvision(name: str, data_dir: Path, split: str) -> tuple[list[str], ImageSet]:
    """Class names, and the images of one split."""
    dataset = _torchvision_dataset(name, data_dir, split)
    if name == "svhn":
        images = np.ascontiguousarray(dataset.data.transpose(0, 2, 3, 1))
        return [str(digit) for digit in range(10)], ImageSet(images, dataset.labels)
    images = np.asarray(dataset.data)
    images = images.reshape(*images.shape[:3], -1)
    return dataset.classes, ImageSet(images, np.asarray(dataset.targets, np.int64))


def _torchvision_dataset(name: str, data_dir: Path, split: str) -> Any:
    """One split as a torchvision data set, downloaded and unpacked aside: torchvision keeps wrong
    files under their final names, and of MNIST and DTD takes half an unpacking for the whole."""
    class_name, part = TORCHVISION[name]
    argument = split if name in ("svhn", "textures") else split == "train"
    path, make = data_dir / part.format(split=split), getattr(datasets, class_name)
    if not path.exists():
        with _aside(data_dir) as folder:
            make(folder, argument, download=True)
            os.replace(folder / path.name, path)
    try:
        return make(data_dir, argument)
    except Exception as error:  # it may fail in any way on damaged files
        raise RuntimeError(f"{path} is damaged: remove it to have it downloaded again") from error


def _read_tiny_imagenet_classes(data_dir: Path) -> tuple[list[str], ImageSet, ImageSet]:
    """The 200 classes; the validation images, whose labels are public, serve as test images."""
    train, test = (_tiny_imagenet_files(data_dir, part) for part in ("train", "val"))
    train_names = [file.parent.parent.name for file in train]
    rows = (test[0].parent.parent / "val_annotations.txt").read_text().splitlines()
    name_of = dict(row.split("\t")[:2] for row in rows)
    test_names = [name_of[file.name] for file in test]
    classes = sorted(set(train_names))
    splits = []
    for files, names in ((train, train_names), (test, test_names)):
        images, read = read_images(files, TINY_IMAGENET_SIZE)
        splits.append(ImageSet(images, np.searchsorted(classes, names)[read]))
    return classes, splits[0], splits[1]


def _read_class_folders(root: Path) -> tuple[list[str], ImageSet, None]:
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if not folders:
        raise ValueError(f"{root}: expected a folder with one sub-folder of images a class")
    parts = [read_images(image_files([folder]), FOLDER_IMAGE_SIZE)[0] for folder in folders]
    labels = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return [folder.name for folder in folders], ImageSet(np.concatenate(parts), labels), None


def _read_unknown(name: str, data_dir: Path, image_size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = (NOISE_COUNT, image_size, image_size, 3)
    if name == "uniform-noise":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    if name == "gaussian-noise":  # mean 0.5, deviation 1, clipped to 0..1, as in the ODIN paper
        pixels = rng.standard_normal(shape, dtype=np.float32) + 0.5
        return (pixels.clip(0, 1) * 255).astype(np.uint8)
    if name in ODIN_ARCHIVES and _prefers_archive(name, data_dir):
        return _read_odin_archive(name, data_dir)
    if name == "tiny-imagenet-resize":
        return read_images(_tiny_imagenet_files(data_dir, "test"), image_size)[0]
    if name == "tiny-imagenet-crop":
        whole, _ = read_images(_tiny_imagenet_files(data_dir, "test"), TINY_IMAGENET_SIZE)
        return _random_crops(whole, image_size, rng)
    if name == "textures":
        textures = _torchvision_dataset(name, data_dir, "test")
        return read_images(textures._image_files, image_size)[0]
    if name == "cifar100" and (data_dir / "cifar100" / "test").is_dir():  # as image files
        return read_images(image_files([data_dir / "cifar100" / "test"]), 32)[0]
    return _read_torchvision(name, data_dir, "test")[1].images


def _prefers_archive(name: str, data_dir: Path) -> bool:
    """Whether to read ODIN's archive; of TinyImageNet, only where that is all there is."""
    archive, _, folder, *_ = ODIN_ARCHIVES[name]
    original = ("tiny-imagenet-200/test", "tiny-imagenet-200.zip")
    return name != "tiny-imagenet-crop" or (
        any((data_dir / path).exists() for path in (archive, folder))
        and not any((data_dir / path).exists() for path in original)
    )


def _tiny_imagenet_files(data_dir: Path, part: str) -> Sequence[Any]:
    """The images of `train`, `val` or `test` by their names, in the folder or inside the zip."""
    folder = data_dir / "tiny-imagenet-200" / part
    if folder.is_dir():
        return image_files([folder])
    archive = data_dir / "tiny-imagenet-200.zip"
    _download(TINY_IMAGENET, archive, TINY_IMAGENET_MD5)
    inside = zipfile.ZipFile(archive)
    names = (name for name in inside.namelist() if name.startswith(f"tiny-imagenet-200/{part}/"))
    return [zipfile.Path(inside, name) for name in sorted(names) if name.endswith(".JPEG")]


def _read_odin_archive(name: str, data_dir: Path) -> np.ndarray:
    archive, md5, folder, frame, dropbox_id = ODIN_ARCHIVES[name]
    images = data_dir / folder
    if not images.is_dir():
        # A link without /raw/ would answer with an HTML page; the MD5 catches that too.
        url = f"https://www.dropbox.com/s/raw/{dropbox_id}/{archive}"
        _download(url, data_dir / archive, md5)
        with _aside(data_dir) as aside, tarfile.open(data_dir / archive) as tar:
            tar.extractall(aside, filter="data")  # no paths or links outside, no devices
            images.parent.mkdir(exist_ok=True)
            os.replace(aside / folder, images)
    return read_images(image_files([images]), 32, frame)[0]


def _download(url: str, path: Path, md5: str) -> None:
    """Download what is not there yet; the name is given to nothing but the whole, right file."""
    if not path.exists():
        with _aside(path.parent) as folder:
            download_url(url, folder, path.name, md5)
            os.replace(folder / path.name, path)
    elif not check_integrity(path, md5):
        raise RuntimeError(f"{path} is not the published file (MD5 {md5}): remove it")


@contextmanager
def _aside(data_dir: Path) -> Iterator[Path]:
    """A folder to download and unpack in, gone in the end; meanwhile silent servers time out."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="unfinished-", dir=data_dir) as folder:
            yield Path(folder)
    finally:
        socket.setdefaulttimeout(timeout)


def _random_crops(images: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """One size x size patch of each image [N, H, W, C] at an offset drawn uniformly."""
    count, height, width, _ = images.shape
    top, left = rng.integers(0, height - size + 1, count), rng.integers(0, width - size + 1, count)
    rows, columns = top[:, None] + np.arange(size), left[:, None] + np.arange(size)
    return images[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def fit_to(images: np.ndarray, size: int, channels: int) -> np.ndarray:
    """Scale to size x size pixels where needed, and repeat or average the colour channels."""
    if images.shape[1:3] != (size, size):
        scaled = [Image.fromarray(image.squeeze()).resize((size, size), Image.Resampling.BILINEAR)
                  for image in images]  # fmt: skip
        images = np.stack([np.asarray(image).reshape(size, size, -1) for image in scaled])
    if images.shape[-1] > channels:
        return np.rint(images.mean(axis=-1, keepdims=True)).astype(np.uint8)
    return images.repeat(channels // images.shape[-1], axis=-1)


def _class_indices(wanted: Sequence[str], classes: Sequence[str]) -> list[int]:
    index_of = {str(index): index for index in range(len(classes))}
    index_of |= {name: index for index, name in enumerate(classes)}  # a name goes before an index
    indices = [index_of.get(item, -1) for item in wanted or classes]
    if min(indices) < 0 or len(set(indices)) < max(2, len(indices)):
        raise ValueError(
            f"known classes {','.join(wanted)}: expected at least two, each once, of "
            f"{', '.join(classes)}, or their indices in 0..{len(classes) - 1}"
        )
    return indices


def _relabel(images: ImageSet, known: Sequence[int]) -> ImageSet:
    """Keep the images of the known classes; class known[i] gets label i."""
    is_class = images.labels[:, None] == np.array(known)  # [N, K]
    return _select(ImageSet(images.images, is_class.argmax(axis=1)), is_class.any(axis=1))


def _select(images: ImageSet, mask: np.ndarray) -> ImageSet:
    return ImageSet(images.images[mask], images.labels[mask])


def _stratified_mask(labels: np.ndarray, count_of: Callable[[int], int]) -> np.ndarray:
    """Mark count_of(n) random images of each class of n, always the same ones."""
    rng = np.random.default_rng(SPLIT_SEED)
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        mask[rng.choice(members, count_of(len(members)), replace=False)] = True
    return mask
