"""Image sets for open-set recognition: train / val / test_known, and test_unknown.

Every set is one uint8 array in memory, [N, height, width, channels]. Sets are read from a data
folder (default `data/`); what is missing there is downloaded with a progress bar and checked by its
MD5. Sources, sizes and licences are listed in data/README.md.
"""

import http.client
import os
import shutil
import sys
import tarfile
import tempfile
import urllib.error
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, download_url
from tqdm import tqdm

KNOWN_SETS = ("cifar10", "cifar100", "mnist", "fashion-mnist", "svhn", "tiny-imagenet", "digits")
UNKNOWN_SETS = (
    "tiny-imagenet-crop", "tiny-imagenet-resize", "lsun-crop", "lsun-resize", "isun", "svhn",
    "cifar100", "mnist", "textures", "gaussian-noise", "uniform-noise",
)  # fmt: skip
HELD_OUT_CLASSES = "held-out-classes"  # test images of the data set's own classes left unknown

VAL_PER_CLASS, VAL_SHARE = (
    250,
    0.1,
)  # val holds this many training images a class, at most this share
TEST_SHARE = 0.2  # of a data set that has no test split of its own
SPLIT_SEED = 0  # val is the same for every training seed
NOISE_COUNT = 10_000
FOLDER_IMAGE_SIZE = 32
MAX_NAMED = 10  # unreadable files named one by one; the rest are counted
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # EPS would run Ghostscript
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}

TINY_IMAGENET = (
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "90528d7ca1a48142e341f4ef8d21d0de",
)
TINY_IMAGENET_SIZE = 64
ODIN_ARCHIVES = {  # file name: (MD5, folder of images, pixels of frame around each, dropbox id)
    "Imagenet.tar.gz": ("7c0827e4246c3718a5ee076e999e52e5", "Imagenet/test", 2, "avgm2u562itwpkl"),
    "LSUN.tar.gz": ("458a0a0ab8e5f1cb4516d7400568e460", "LSUN/test", 2, "fhtsw1m3qxlwj6h"),
    "LSUN_resize.tar.gz": (
        "278b7b31c8cb7e804a1465a8ce03a2dc", "LSUN_resize/LSUN_resize", 0, "moqh2wh8696c3yl"),
    "iSUN.tar.gz": ("be77b0f2c26fda898afac5f99645ee70", "iSUN", 0, "ssz7qxfqae0cca5"),
}  # fmt: skip
ODIN_ARCHIVE_OF = {
    "tiny-imagenet-crop": "Imagenet.tar.gz",
    "lsun-crop": "LSUN.tar.gz",
    "lsun-resize": "LSUN_resize.tar.gz",
    "isun": "iSUN.tar.gz",
}


T = TypeVar("T")


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


def load_known(name: str, data_dir: Path, known_classes: Sequence[str] = ()) -> KnownData:
    """Load a data set and split it.

    Args:
        name: one of `KNOWN_SETS`, or `folder:PATH` with one sub-folder of images a class.
        data_dir: where image sets lie or are downloaded to.
        known_classes: names or indices of the classes to know, in label order; empty for all.

    Raises:
        ImagesUnavailable: the images are neither on disk nor to be had from the network.
        ValueError: unknown name or class.
    """
    if name.startswith("folder:"):
        all_classes, train, test = _read_class_folders(Path(name.removeprefix("folder:")))
    elif name in KNOWN_SETS:
        all_classes, train, test = _or_unavailable(
            name, data_dir, lambda: _read_known(name, data_dir)
        )
    else:
        raise ValueError(f"data set {name!r} is not one of {', '.join(KNOWN_SETS)} or folder:PATH")
    if test is None:
        in_test = _stratified_mask(train.labels, lambda count: round(TEST_SHARE * count))
        train, test = _select(train, ~in_test), _select(train, in_test)

    known = _class_indices(known_classes, all_classes)
    train, test_known = _relabel(train, known), _relabel(test, known)
    in_val = _stratified_mask(
        train.labels, lambda count: min(VAL_PER_CLASS, max(1, int(VAL_SHARE * count)))
    )
    return KnownData(
        tuple(all_classes[index] for index in known),
        _select(train, ~in_val),
        _select(train, in_val),
        test_known,
        test.images[~np.isin(test.labels, known)],
    )


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
        images = _or_unavailable(
            name, data_dir, lambda: _read_unknown(name, data_dir, image_size, seed)
        )
    else:
        raise ValueError(
            f"unknown set {name!r} is not one of {', '.join(UNKNOWN_SETS)} or folder:PATH"
        )
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
            raise ValueError(
                f"{path}: no such file or folder; expected an image or a folder of images"
            )
    if not files:
        raise ValueError(
            f"{', '.join(map(str, paths))}: no image file found; expected one at least"
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
        raise ValueError(
            f"{printable(files[0])} and {len(files) - 1} more files: none is a readable image"
        )
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


def _or_unavailable(name: str, data_dir: Path, read: Callable[[], T]) -> T:
    """Call `read`, which may download, and say in one line what to do when that fails."""
    try:
        return read()
    except (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException,
            tarfile.TarError, zipfile.BadZipFile, RuntimeError) as error:  # fmt: skip
        # RuntimeError is how torchvision reports a wrong checksum or a failed mirror
        reason = " ".join(str(error).split())
        raise ImagesUnavailable(
            f"{name} is not to be had from {data_dir} nor by download ({reason}); connect to the "
            f"network or put the files there, see data/README.md"
        ) from error


def _read_known(name: str, data_dir: Path) -> tuple[list[str], ImageSet, ImageSet | None]:
    """Class names, training images, and test images where the data set has a split of its own."""
    root = str(data_dir)
    if name == "digits":
        from sklearn.datasets import load_digits  # only this set needs it

        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 8x8, in 0..16
        images = pixels.repeat(4, axis=1).repeat(4, axis=2)[..., None]
        return [str(digit) for digit in digits.target_names], ImageSet(images, digits.target), None
    if name == "tiny-imagenet":
        return _read_tiny_imagenet_classes(data_dir)
    if name == "svhn":
        splits = [datasets.SVHN(root, split, download=True) for split in ("train", "test")]
        train, test = (ImageSet(s.data.transpose(0, 2, 3, 1), np.asarray(s.labels)) for s in splits)
        return [str(digit) for digit in range(10)], train, test
    dataset_class = {
        "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100,
        "mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST,
    }[name]  # fmt: skip
    splits = [dataset_class(root, train=is_train, download=True) for is_train in (True, False)]
    train, test = (
        ImageSet(
            np.asarray(s.data).reshape(len(s), *np.asarray(s.data).shape[1:3], -1),
            np.asarray(s.targets, np.int64),
        )
        for s in splits
    )
    return list(splits[0].classes), train, test


def _read_tiny_imagenet_classes(data_dir: Path) -> tuple[list[str], ImageSet, ImageSet]:
    """The 200 classes; the validation images, whose labels are public, serve as test images."""
    root = _tiny_imagenet_root(data_dir)
    classes = (root / "wnids.txt").read_text().split()
    train_files = [sorted((root / "train" / c / "images").iterdir(), key=str) for c in classes]
    labels = np.repeat(np.arange(len(classes)), [len(files) for files in train_files])
    images, read = read_images(list(chain(*train_files)), TINY_IMAGENET_SIZE)
    train = ImageSet(images, labels[read])
    rows = [
        line.split("\t") for line in (root / "val" / "val_annotations.txt").read_text().splitlines()
    ]
    labels = np.array([classes.index(row[1]) for row in rows])
    files = [root / "val" / "images" / row[0] for row in rows]
    images, read = read_images(files, TINY_IMAGENET_SIZE)
    return classes, train, ImageSet(images, labels[read])


def _read_class_folders(root: Path) -> tuple[list[str], ImageSet, None]:
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if not folders:
        raise ValueError(f"{root}: expected a folder with one sub-folder of images a class")
    images, labels = [], []
    for label, folder in enumerate(folders):
        images.append(read_images(image_files([folder]), FOLDER_IMAGE_SIZE)[0])
        labels.append(np.full(len(images[-1]), label))
    return [f.name for f in folders], ImageSet(np.concatenate(images), np.concatenate(labels)), None


def _read_unknown(name: str, data_dir: Path, image_size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = (NOISE_COUNT, image_size, image_size, 3)
    if name == "uniform-noise":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    if name == "gaussian-noise":  # mean 0.5, deviation 1, clipped to 0..1, as in the ODIN paper
        pixels = rng.standard_normal(shape, dtype=np.float32) + 0.5
        return (pixels.clip(0, 1) * 255).astype(np.uint8)
    if name == "tiny-imagenet-crop" and _tiny_imagenet_test(data_dir) is None:
        archive = ODIN_ARCHIVE_OF[name]
        if (data_dir / archive).exists() or (data_dir / ODIN_ARCHIVES[archive][1]).is_dir():
            return _read_odin_archive(archive, data_dir)
    if name.startswith("tiny-imagenet"):
        files = _tiny_imagenet_test(data_dir) or _tiny_imagenet_test(data_dir, download=True)
        assert files is not None
        if name == "tiny-imagenet-resize":
            return read_images(files, image_size)[0]
        return _random_crops(read_images(files, TINY_IMAGENET_SIZE)[0], image_size, rng)
    if name in ODIN_ARCHIVE_OF:
        return _read_odin_archive(ODIN_ARCHIVE_OF[name], data_dir)
    if name == "textures":
        textures = datasets.DTD(str(data_dir), "test", download=True)
        return read_images(textures._image_files, image_size)[0]
    if name == "cifar100" and (data_dir / "cifar100" / "test").is_dir():  # as image files
        return read_images(image_files([data_dir / "cifar100" / "test"]), 32)[0]
    _, _, test = _read_known(name, data_dir)
    assert test is not None
    return test.images


def _tiny_imagenet_test(data_dir: Path, download: bool = False) -> list[Path | zipfile.Path] | None:
    """The TinyImageNet test files in order of their names, from the folder or inside the zip."""
    folder = data_dir / "tiny-imagenet-200" / "test"
    if folder.is_dir():
        return list(image_files([folder]))
    archive = data_dir / "tiny-imagenet-200.zip"
    if download:
        _download(TINY_IMAGENET[0], archive, TINY_IMAGENET[1])
    if not archive.exists():
        return None
    if not check_integrity(str(archive), TINY_IMAGENET[1]):
        raise RuntimeError(f"{archive} is not the published file (MD5 {TINY_IMAGENET[1]})")
    inside = zipfile.Path(archive, "tiny-imagenet-200/test/images/")
    return sorted(inside.iterdir(), key=lambda file: file.name)


def _tiny_imagenet_root(data_dir: Path) -> Path:
    root = data_dir / "tiny-imagenet-200"
    if not (root / "wnids.txt").exists():
        archive = data_dir / "tiny-imagenet-200.zip"
        _download(TINY_IMAGENET[0], archive, TINY_IMAGENET[1])
        _unpack(archive, [f"{root.name}/{part}" for part in ("train", "val", "wnids.txt")])
    return root


def _download(url: str, path: Path, md5: str) -> None:
    """Download what is not there yet; the name is given to nothing but the whole, right file."""
    if check_integrity(str(path), md5):
        return
    part = path.with_name(f"{path.name}.part")
    try:
        download_url(url, str(path.parent), part.name, md5)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _unpack(archive: Path, parts: Sequence[str]) -> None:
    """Unpack an archive aside, then move its parts beside it in turn, so that each is whole."""
    with tempfile.TemporaryDirectory(prefix="unpacking-", dir=archive.parent) as aside:
        # "data" refuses paths outside, links to there and devices; zips lose all three anyway.
        shutil.unpack_archive(archive, aside, filter=None if archive.suffix == ".zip" else "data")
        for part in parts:
            target = archive.parent / part
            target.parent.mkdir(exist_ok=True)
            if not target.exists():
                os.replace(Path(aside) / part, target)


def _read_odin_archive(archive: str, data_dir: Path) -> np.ndarray:
    md5, folder, frame, dropbox_id = ODIN_ARCHIVES[archive]
    if not (data_dir / folder).is_dir():
        # A link without /raw/ would answer with an HTML page; the MD5 catches that too.
        url = f"https://www.dropbox.com/s/raw/{dropbox_id}/{archive}"
        _download(url, data_dir / archive, md5)
        _unpack(data_dir / archive, [folder])
    return read_images(image_files([data_dir / folder]), 32, frame)[0]


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
    indices = []
    for item in wanted or classes:
        if item in classes:
            indices.append(list(classes).index(item))
        elif item.isdigit() and int(item) < len(classes):
            indices.append(int(item))
        else:
            raise ValueError(
                f"known class {item!r}: expected a name of {', '.join(classes)}, "
                f"or an index in 0..{len(classes) - 1}"
            )
    if len(set(indices)) < max(2, len(indices)):
        raise ValueError(f"known classes {','.join(wanted)}: expected at least two, each once")
    return indices


def _relabel(images: ImageSet, known: Sequence[int]) -> ImageSet:
    """Keep the images of the known classes; class known[i] gets label i."""
    kept = _select(images, np.isin(images.labels, known))
    order = np.argsort(known)
    return ImageSet(kept.images, order[np.searchsorted(known, kept.labels, sorter=order)])


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
