"""Image sets for open-set recognition: train / val / test_known, and test_unknown.

Every set is one uint8 array in memory, [N, height, width, channels]. Named sets are read from a
data folder (default `data/`); what is missing there is downloaded with a progress bar and checked
by its MD5. data/README.md lists their sources, sizes and licences. `folder:PATH` is a folder of
your own pictures.
"""

import hashlib
import http.client
import os
import socket
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import pictures
from pictures import fit_to as fit_to
from pictures import image_files as image_files
from pictures import printable as printable
from pictures import read_images as read_images
from pictures import some

KNOWN_SETS = ("cifar10", "cifar100", "mnist", "fashion-mnist", "svhn", "tiny-imagenet", "digits")
KNOWN_SPLITS = ("train", "val", "test_known")
UNKNOWN_SETS = (
    "tiny-imagenet-crop", "tiny-imagenet-resize", "lsun-crop", "lsun-resize", "isun", "svhn",
    "cifar100", "mnist", "textures", "gaussian-noise", "uniform-noise",
)  # fmt: skip
HELD_OUT_CLASSES = "held-out-classes"  # test images of the data set's own classes left unknown

VAL_PER_CLASS = 250  # of a named set, val holds this many training images of each class,
VAL_SHARE = 0.1  # but at most this share of them
TEST_SHARE = 0.2  # of a named set that has no test split of its own
SPLIT_SEED = 0  # val is the same for every training seed
NOISE_COUNT = 10_000
FOLDER_IMAGE_SIZE = 64  # networks of 64 pixels were better than of 32 on small sets of photos
PATIENCE = 60  # seconds a server may be silent

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
    "tiny-imagenet-crop": ("Imagenet.tar.gz", "7c0827e4246c3718a5ee076e999e52e5", "Imagenet/test",
                           2, "avgm2u562itwpkl"),
    "lsun-crop": ("LSUN.tar.gz", "458a0a0ab8e5f1cb4516d7400568e460", "LSUN/test",
                  2, "fhtsw1m3qxlwj6h"),
    "lsun-resize": ("LSUN_resize.tar.gz", "278b7b31c8cb7e804a1465a8ce03a2dc",
                    "LSUN_resize/LSUN_resize", 0, "moqh2wh8696c3yl"),
    "isun": ("iSUN.tar.gz", "be77b0f2c26fda898afac5f99645ee70", "iSUN", 0, "ssz7qxfqae0cca5"),
}  # fmt: skip


class ImagesUnavailable(Exception):
    """An image set is not on disk and cannot be downloaded, or is damaged."""


class ImageSet(NamedTuple):
    """Images [N, H, W, C] uint8 with their class indices [N] int64."""

    images: np.ndarray
    labels: np.ndarray


class KnownData(NamedTuple):
    """A data set split for open-set recognition; labels index `classes`.

    Attributes:
        classes: names of the K known classes.
        train, val, test_known: images of known classes; the three share no image.
        test_unknown: test images [N, H, W, C] of the classes left out; none when all are known.
    """

    classes: tuple[str, ...]
    train: ImageSet
    val: ImageSet
    test_known: ImageSet
    test_unknown: np.ndarray


def load_known(
    name: str, data_dir: Path, known_classes: str = "", image_size: int | None = None
) -> KnownData:
    """Load a data set and split it; the same images always give the same split.

    Args:
        name: one of `KNOWN_SETS`, or `folder:PATH` with one sub-folder of images per class.
        data_dir: where named sets lie or are downloaded to.
        known_classes: names or indices of the classes to know, comma-separated, in label order;
            empty for all.
        image_size: pixels to bring the images to, as in `fit_to`; None for a named set's own size,
            or `FOLDER_IMAGE_SIZE`. The split of a folder depends on it.

    Raises:
        ImagesUnavailable: the images are not on disk and cannot be downloaded.
        ValueError: unknown name or class, or a folder that cannot be used, with the reason.
    """
    classes: Sequence[str]
    if name.startswith("folder:"):
        folders = pictures.class_folders(pictures.folder_of(name))
        classes = [folder.name.encode(errors="backslashreplace").decode() for folder in folders]
        known = _class_indices(known_classes, classes)
        parts = pictures.read_class_folders(folders, image_size or FOLDER_IMAGE_SIZE)
        train, val, test = (ImageSet(*part) for part in parts)
        train, val = _relabel(train, known), _relabel(val, known)
    elif name in KNOWN_SETS:
        classes, train, test = _read_known(name, data_dir)
        known = _class_indices(known_classes, classes)
        if image_size is not None:
            train, test = _resize(train, image_size), _resize(test, image_size)
        train, val = _split(
            _relabel(train, known), lambda count: min(VAL_PER_CLASS, max(1, int(VAL_SHARE * count)))
        )
    else:
        raise ValueError(f"data set {name!r} is none of {', '.join(KNOWN_SETS)}, folder:PATH")
    unknown = test.images[~np.isin(test.labels, known)]
    names = tuple(classes[index] for index in known)
    return KnownData(names, train, val, _relabel(test, known), unknown)


def load_unknown(
    name: str, data_dir: Path, image_size: int, channels: int = 3, seed: int = 0
) -> np.ndarray:
    """Load an image set of unknown classes, [N, image_size, image_size, channels] uint8.

    `*-crop` sets are random patches of image_size pixels, all others are brought to size as in
    `fit_to`; data/README.md describes them.

    Args:
        name: one of `UNKNOWN_SETS`, or `folder:PATH` for any folder of images.
        data_dir: where named sets lie or are downloaded to.
        image_size: pixels the network expects.
        channels: 1 or 3, as the network expects.
        seed: of the crop offsets and the noise: the same seed gives the same bytes.

    Raises:
        ImagesUnavailable: the images are not on disk and cannot be downloaded.
        ValueError: unknown name, no image in the folder, or patches larger than the images.
    """
    if name.startswith("folder:"):
        files, other = pictures.find_images(folder := pictures.folder_of(name))
        images, _ = pictures.read_and_report(folder.name, files, image_size, other=other)
        if not len(images):
            raise ValueError(f"{printable(folder)}: no readable image; expected at least one")
    elif name in UNKNOWN_SETS:
        images = _read_unknown(name, data_dir, image_size, seed)
    else:
        raise ValueError(f"unknown set {name!r} is none of {', '.join(UNKNOWN_SETS)}, folder:PATH")
    return fit_to(images, image_size, channels)


def load_cifar100_test(data_dir: Path) -> ImageSet:
    """Load the 10,000 test images of CIFAR-100; labels 0..99 follow the sorted class names.

    They are read from torchvision's files, or from a folder `cifar100/test/<class>/*.png` where
    only that is in the data folder.

    Raises:
        ImagesUnavailable: the images are not on disk and cannot be downloaded.
    """
    folder = data_dir / "cifar100" / "test"
    if (data_dir / TORCHVISION["cifar100"][1]).exists() or not folder.is_dir():
        return _read_torchvision("cifar100", data_dir, "test")[1]
    files, _ = pictures.find_images(folder)
    images, read = pictures.read_and_report("cifar100", files, 32)
    labels = np.unique([file.parent.name for file in files], return_inverse=True)[1]
    return ImageSet(images, labels[read])


def fingerprint(data: KnownData) -> dict[str, Any]:
    """Identify the training and validation images and their classes, in any order.

    Returns:
        {"count": number of images, "sha256": of the sorted hashes of images with class names}
    """
    hashes = sorted(
        pictures.hash_of(image) + data.classes[label].encode()
        for images, labels in (data.train, data.val)
        for image, label in zip(images, labels, strict=True)
    )
    return {"count": len(hashes), "sha256": hashlib.sha256(b"\n".join(hashes)).hexdigest()}


def check_same_images(checkpoint: Mapping[str, Any], data: KnownData) -> None:
    """Compare a data set with that of a checkpoint; one line on stderr if the images have changed.

    Raises:
        ValueError: the classes have changed.
    """
    if (before := list(checkpoint["known_classes"])) != list(data.classes):
        raise ValueError(
            printable(f"the network was trained on the classes {some(before)}; the data set has "
                      f"{some(data.classes)}")
        )  # fmt: skip
    images = checkpoint.get("images")
    if images and images != fingerprint(data):
        count = len(data.train.labels) + len(data.val.labels)
        print(f"the training and validation images have changed since the network was trained: "
              f"{images['count']:,} then, {count:,} now", file=sys.stderr)  # fmt: skip


# Named sets


def _read_known(name: str, data_dir: Path) -> tuple[Sequence[str], ImageSet, ImageSet]:
    """Class names, training images and test images."""
    if name == "digits":
        from sklearn.datasets import load_digits  # only this set needs it

        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 8x8, in 0..16
        images = pixels.repeat(2, axis=1).repeat(2, axis=2)[..., None]
        train, test = _split(ImageSet(images, digits.target), lambda n: round(TEST_SHARE * n))
        return [str(digit) for digit in digits.target_names], train, test
    if name == "tiny-imagenet":
        return _read_tiny_imagenet_classes(data_dir)
    classes, train = _read_torchvision(name, data_dir, "train")
    return classes, train, _read_torchvision(name, data_dir, "test")[1]


def _read_torchvision(name: str, data_dir: Path, split: str) -> tuple[Sequence[str], ImageSet]:
    """Class names, and the images of one split."""
    dataset = _torchvision_dataset(name, data_dir, split)
    if name == "svhn":
        images = np.ascontiguousarray(dataset.data.transpose(0, 2, 3, 1))
        return [str(digit) for digit in range(10)], ImageSet(images, dataset.labels)
    images = np.asarray(dataset.data)
    images = images.reshape(*images.shape[:3], -1)
    return dataset.classes, ImageSet(images, np.asarray(dataset.targets, np.int64))


def _torchvision_dataset(name: str, data_dir: Path, split: str) -> Any:
    """One split as a torchvision data set. It is downloaded and unpacked aside, because torchvision
    keeps wrong files under their final names and takes half an unpacked MNIST for the whole."""
    from torchvision import datasets  # takes a second, which scoring a photograph can do without

    class_name, part = TORCHVISION[name]
    argument = split if name in ("svhn", "textures") else split == "train"
    path, make = data_dir / part.format(split=split), getattr(datasets, class_name)
    if not path.exists():
        with _downloading(name, data_dir) as folder:
            make(folder, argument, download=True)
            os.replace(folder / path.name, path)
    try:
        return make(data_dir, argument)
    except Exception as error:  # it may fail in any way on damaged files
        raise ImagesUnavailable(f"{path} is damaged: remove it to download it again") from error


def _read_tiny_imagenet_classes(data_dir: Path) -> tuple[Sequence[str], ImageSet, ImageSet]:
    """The 200 classes; the validation images, whose labels are public, serve as test images."""
    train, test = (_tiny_imagenet_files(data_dir, part) for part in ("train", "val"))
    train_names = [file.parent.parent.name for file in train]
    rows = (test[0].parent.parent / "val_annotations.txt").read_text().splitlines()
    name_of = dict(row.split("\t")[:2] for row in rows)
    test_names = [name_of[file.name] for file in test]
    classes = sorted(set(train_names))
    splits = []
    for files, names in ((train, train_names), (test, test_names)):
        images, read = pictures.read_and_report("tiny-imagenet", files, TINY_IMAGENET_SIZE)
        splits.append(ImageSet(images, np.searchsorted(classes, names)[read]))
    return classes, splits[0], splits[1]


def _read_unknown(name: str, data_dir: Path, image_size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = (NOISE_COUNT, image_size, image_size, 3)
    if name == "uniform-noise":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    if name == "gaussian-noise":  # mean 0.5, deviation 1, clipped to 0..1, as in the ODIN paper
        pixels = rng.standard_normal(shape, dtype=np.float32) + 0.5
        return (pixels.clip(0, 1) * 255).astype(np.uint8)
    if name == "cifar100":
        return load_cifar100_test(data_dir).images
    if name == "textures":
        textures = _torchvision_dataset(name, data_dir, "test")
        return pictures.read_and_report(name, textures._image_files, image_size)[0]
    if name in ODIN_ARCHIVES and _prefers_archive(name, data_dir):
        return _read_odin_archive(name, data_dir)
    if name.startswith("tiny-imagenet"):
        crop = name == "tiny-imagenet-crop"
        files = _tiny_imagenet_files(data_dir, "test")
        images, _ = pictures.read_and_report(
            name, files, TINY_IMAGENET_SIZE if crop else image_size
        )
        return _random_crops(images, image_size, rng) if crop else images
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
    _download("tiny-imagenet", TINY_IMAGENET, archive, TINY_IMAGENET_MD5)
    inside = zipfile.ZipFile(archive)
    names = (name for name in inside.namelist() if name.startswith(f"tiny-imagenet-200/{part}/"))
    return [zipfile.Path(inside, name) for name in sorted(names) if name.endswith(".JPEG")]


def _read_odin_archive(name: str, data_dir: Path) -> np.ndarray:
    archive, md5, folder, frame, dropbox_id = ODIN_ARCHIVES[name]
    images = data_dir / folder
    if not images.is_dir():
        # A link without /raw/ would answer with an HTML page; the MD5 catches that too.
        url = f"https://www.dropbox.com/s/raw/{dropbox_id}/{archive}"
        _download(name, url, data_dir / archive, md5)
        with _downloading(name, data_dir) as aside, tarfile.open(data_dir / archive) as tar:
            tar.extractall(aside, filter="data")  # no paths or links outside, no devices
            images.parent.mkdir(exist_ok=True)
            os.replace(aside / folder, images)
    return pictures.read_and_report(name, image_files([images]), 32, frame)[0]


def _download(name: str, url: str, path: Path, md5: str) -> None:
    """Download what is not there yet; only the whole, right file gets the name."""
    from torchvision.datasets.utils import check_integrity, download_url

    if not path.exists():
        with _downloading(name, path.parent) as folder:
            download_url(url, folder, path.name, md5)
            os.replace(folder / path.name, path)
    elif not check_integrity(path, md5):
        raise ImagesUnavailable(f"{path} is not the published file (MD5 {md5}): remove it")


@contextmanager
def _downloading(name: str, data_dir: Path) -> Iterator[Path]:
    """A folder to download and unpack in, removed at the end. Silent servers time out."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="unfinished-", dir=data_dir) as folder:
            yield Path(folder)
    except (OSError, http.client.HTTPException, tarfile.TarError, RuntimeError) as error:
        # RuntimeError is how torchvision reports a wrong checksum or a failed mirror
        reason = " ".join(str(error).split())
        raise ImagesUnavailable(
            f"{name}: not found in {data_dir}, and the download failed ({reason}); connect to the "
            f"network or put the files there (see data/README.md)"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _random_crops(images: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """One size x size patch of each image [N, H, W, C] at an offset drawn uniformly."""
    count, height, width, _ = images.shape
    if size > min(height, width):
        raise ValueError(f"patches of {size} pixels do not fit images of {height}x{width}")
    top, left = rng.integers(0, height - size + 1, count), rng.integers(0, width - size + 1, count)
    rows, columns = top[:, None] + np.arange(size), left[:, None] + np.arange(size)
    crops: np.ndarray = images[
        np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
    ]
    return crops


# Classes and splits


def _class_indices(known_classes: str, classes: Sequence[str]) -> list[int]:
    index_of = {str(index): index for index in range(len(classes))}
    index_of |= {name: index for index, name in enumerate(classes)}  # a name goes before an index
    wanted = [item for item in map(str.strip, known_classes.split(",")) if item] or classes
    absent = [item for item in wanted if item not in index_of]
    indices = [index_of[item] for item in wanted if item in index_of]
    twice = [classes[index] for index, count in Counter(indices).items() if count > 1]
    if absent:
        problem = f"no class {some(absent)}; expected {some(classes)}, or 0..{len(classes) - 1}"
    elif twice:
        problem = f"{some(twice)} more than once"
    elif len(indices) < 2:
        problem = f"only {classes[indices[0]]}; expected at least two classes"
    else:
        return indices
    raise ValueError(printable(f"known classes {known_classes}: {problem}"))


def _relabel(images: ImageSet, known: Sequence[int]) -> ImageSet:
    """Keep the images of the known classes; class known[i] gets label i."""
    is_class = images.labels[:, None] == np.array(known)  # [N, K]
    return _select(ImageSet(images.images, is_class.argmax(axis=1)), is_class.any(axis=1))


def _resize(images: ImageSet, size: int) -> ImageSet:
    return ImageSet(fit_to(images.images, size, images.images.shape[-1]), images.labels)


def _select(images: ImageSet, mask: np.ndarray) -> ImageSet:
    return ImageSet(images.images[mask], images.labels[mask])


def _split(images: ImageSet, count_of: Callable[[int], int]) -> tuple[ImageSet, ImageSet]:
    """Take count_of(n) random images of each class of n out, always the same ones."""
    rng = np.random.default_rng(SPLIT_SEED)
    mask = np.zeros(len(images.labels), bool)
    for label in np.unique(images.labels):
        members = np.flatnonzero(images.labels == label)
        mask[rng.choice(members, count_of(len(members)), replace=False)] = True
    return _select(images, ~mask), _select(images, mask)
