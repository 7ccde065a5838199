"""Image sets for open-set recognition: train / val / test_known, and test_unknown.

Every set is one uint8 array in memory. Named sets (see data/README.md) are read from a data folder,
or downloaded to it and checked by their MD5; `folder:PATH` is a folder of your own pictures.
"""

import hashlib
import http.client
import shutil
import socket
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import pictures
from openmax import UNKNOWN
from pictures import ImageSet, fit_to, hash_of, some

KNOWN_SETS = ("cifar10", "cifar100", "mnist", "fashion-mnist", "svhn", "tiny-imagenet", "digits")
KNOWN_SPLITS = ("train", "val", "test_known")
HELD_OUT_CLASSES = "held-out-classes"  # test images of the data set's own classes left unknown

VAL_PER_CLASS = 250  # of a named set, val holds this many training images of each class,
VAL_SHARE = 0.1  # but at most this share of them
TEST_SHARE = 0.2  # of a named set that has no test split of its own
SEED = 0  # of val, random patches and noise: each is the same in every run
NOISE_COUNT = 10_000
FOLDER_IMAGE_SIZE = 48  # more photographs are named right than at 32, the shipped network's size
PATIENCE = 60  # seconds a server may be silent

TORCHVISION = {  # name: (torchvision's class, what it leaves in the data folder)
    "cifar10": ("CIFAR10", "cifar-10-batches-py"), "cifar100": ("CIFAR100", "cifar-100-python"),
    "mnist": ("MNIST", "MNIST"), "fashion-mnist": ("FashionMNIST", "FashionMNIST"),
    "svhn": ("SVHN", "{split}_32x32.mat"), "textures": ("DTD", "dtd"),
}  # fmt: skip
TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
ODIN_ARCHIVES = {  # name: (archive, MD5, folder of images, pixels of frame around each, dropbox id)
    "tiny-imagenet-crop-odin": ("Imagenet.tar.gz", "7c0827e4246c3718a5ee076e999e52e5",
                                "Imagenet/test", 2, "avgm2u562itwpkl"),
    "lsun-crop": ("LSUN.tar.gz", "458a0a0ab8e5f1cb4516d7400568e460", "LSUN/test",
                  2, "fhtsw1m3qxlwj6h"),
    "lsun-resize": ("LSUN_resize.tar.gz", "278b7b31c8cb7e804a1465a8ce03a2dc",
                    "LSUN_resize/LSUN_resize", 0, "moqh2wh8696c3yl"),
    "isun": ("iSUN.tar.gz", "be77b0f2c26fda898afac5f99645ee70", "iSUN", 0, "ssz7qxfqae0cca5"),
}  # fmt: skip
UNKNOWN_SETS = (
    "tiny-imagenet-crop", "tiny-imagenet-resize", *ODIN_ARCHIVES, "svhn", "cifar100", "mnist",
    "textures", "gaussian-noise", "uniform-noise",
)  # fmt: skip


class ImagesUnavailable(Exception):
    """An image set is not on disk and cannot be downloaded, or is damaged."""


class KnownData(NamedTuple):
    """A data set split for open-set recognition; no two parts share an image."""

    classes: tuple[str, ...]  # names of the K known classes, indexed by the labels
    train: ImageSet
    val: ImageSet
    test_known: ImageSet
    test_unknown: np.ndarray  # test images [N, H, W, C] of the classes left out, if any


def load_known(
    name: str, data_dir: Path, known_classes: str = "", image_size: int | None = None
) -> KnownData:
    """Load a data set and split it; the same images always give the same split.

    Args:
        name: one of `KNOWN_SETS`, or `folder:PATH` with one sub-folder of images per class.
        data_dir: where named sets lie or are downloaded to.
        known_classes: names or indices of the known classes, comma-separated; empty for all.
        image_size: pixels to bring the images to, as in `fit_to`; None for a named set's own size,
            or 48 for a folder, whose split depends on it.

    Raises:
        ImagesUnavailable: the images are not on disk and cannot be downloaded.
        ValueError: unknown name or class, or a folder that cannot be used, with the reason.
    """
    if name.startswith("folder:"):
        folders = pictures.class_folders(pictures.folder_of(name))
        names = (unicodedata.normalize("NFC", folder.name) for folder in folders)
        classes = [name.encode(errors="backslashreplace").decode() for name in names]
        known = _class_indices(known_classes, classes)
        size = image_size or FOLDER_IMAGE_SIZE
        train, val, test = pictures.read_class_folders(folders, known, size)
        train, val = _relabel(train, known), _relabel(val, known)
    elif name in KNOWN_SETS:
        classes, train, test = _read_known(name, data_dir)
        known = _class_indices(known_classes, classes)
        if image_size is not None:
            train, test = (s._replace(images=fit_to(s.images, image_size)) for s in (train, test))
        train = _relabel(train, known)
        train, val = _split(train, lambda count: min(VAL_PER_CLASS, int(VAL_SHARE * count)))
    else:
        raise ValueError(f"data set {name!r} is none of {', '.join(KNOWN_SETS)}, folder:PATH")
    unknown = test.images[~np.isin(test.labels, known)]
    known_names = tuple(classes[index] for index in known)
    return KnownData(known_names, train, val, _relabel(test, known), unknown)


def load_unknown(name: str, data_dir: Path, image_size: int, channels: int = 3) -> np.ndarray:
    """Load an image set of unknown classes, [N, image_size, image_size, channels] uint8.

    `*-crop` sets are random patches, the same in every call. All others are brought to size as in
    `fit_to`.

    Args:
        name: one of `UNKNOWN_SETS`, or `folder:PATH` for any folder of images.
        data_dir: where named sets lie or are downloaded to.
        image_size: pixels the network expects, as it does `channels`, 1 or 3.

    Raises:
        ImagesUnavailable, ValueError: as in `load_known`, or patches larger than the images.
    """
    if name.startswith("folder:"):
        files, other = pictures.find_images(folder := pictures.folder_of(name))
        images, _ = pictures.read_and_report(folder.name, files, image_size, other)
        if not len(images):
            raise ValueError(f"{folder}: no readable image; expected at least one")
    elif name in UNKNOWN_SETS:
        images = _read_unknown(name, data_dir, image_size)
    else:
        raise ValueError(f"unknown set {name!r} is none of {', '.join(UNKNOWN_SETS)}, folder:PATH")
    return fit_to(images, image_size, channels)


def as_unknown(images: np.ndarray) -> ImageSet:
    """Images [N, H, W, C] of unknown classes, labelled so."""
    return ImageSet(images, np.full(len(images), UNKNOWN))


def load_image_sets(
    checkpoint: Mapping[str, Any], dataset: str, unknown: Sequence[str], data_dir: Path
) -> dict[str, ImageSet]:
    """Load `train`, `val` and `test_known` of a checkpoint's classes, and the named unknown sets.

    Args:
        checkpoint: of `models.load_checkpoint`.
        dataset: where its known images are, as for `load_known`.
        unknown: each as for `load_unknown`, or `HELD_OUT_CLASSES`.
        data_dir: as for `load_known`.

    Raises:
        ImagesUnavailable, ValueError: as in `load_known`; no classes are held out.
    """
    config = checkpoint["model_config"]
    size, channels = config["image_size"], config["in_channels"]
    data = load_known(dataset, data_dir, checkpoint["train_args"]["known_classes"], size)
    check_same_images(checkpoint, data)
    sets = {name: getattr(data, name) for name in KNOWN_SPLITS}
    for name in unknown:
        if name == HELD_OUT_CLASSES:
            images = data.test_unknown
            if not len(images):
                raise ValueError("no classes are held out; name unknown images with --unknown")
        else:
            images = load_unknown(name, data_dir, size, channels)
            if name.startswith("folder:"):
                _warn_of_known_images(name, images, data)
        sets[name] = as_unknown(images)
    return sets


def load_cifar100_test(data_dir: Path) -> ImageSet:
    """Load the 10,000 test images of CIFAR-100; labels 0..99 follow the sorted class names.

    They are read from torchvision's files, or from a folder `cifar100/test/<class>/*.png` where
    only that is in the data folder. ImagesUnavailable: neither is there, and no download succeeds.
    """
    folder = data_dir / "cifar100" / "test"
    if (data_dir / TORCHVISION["cifar100"][1]).exists() or not folder.is_dir():
        return _read_torchvision("cifar100", data_dir, "test")[1]
    files, _ = pictures.find_images(folder)
    images, read = pictures.read_and_report("cifar100", files, 32)
    labels = np.unique([file.parent.name for file in files], return_inverse=True)[1]
    return ImageSet(images, labels[read])


def fingerprint(data: KnownData) -> dict[str, Any]:
    """{"count", "sha256"} of the training and validation images and their classes, in any order."""
    hashes = sorted(
        hash_of(image) + data.classes[label].encode()
        for images, labels in (data.train, data.val)
        for image, label in zip(images, labels, strict=True)
    )
    return {"count": len(hashes), "sha256": hashlib.sha256(b"\n".join(hashes)).hexdigest()}


def check_same_images(checkpoint: Mapping[str, Any], data: KnownData) -> None:
    """Compare with what a checkpoint was trained on: one line on stderr if the images have changed.

    Raises:
        ValueError: the classes have changed.
    """
    if (before := list(checkpoint["known_classes"])) != list(data.classes):
        gone = [f"{name} is missing" for name in before if name not in data.classes]
        new = [f"{name} is new" for name in data.classes if name not in before]
        changes = some(gone + new) or "their order has changed"
        raise ValueError(f"the classes have changed since training ({changes}); train again")
    then = checkpoint.get("images")  # checkpoints of version 0.1 do not tell
    if then and then != (now := fingerprint(data)):
        print(f"the training and validation images have changed since the network was trained "
              f"({then['count']:,} then, {now['count']:,} now): it may have been trained on some "
              "that are test images now", file=sys.stderr)  # fmt: skip


def _warn_of_known_images(name: str, images: np.ndarray, data: KnownData) -> None:
    """One line on stderr if images of an unknown set are among the known ones."""
    known = {hash_of(image) for split in KNOWN_SPLITS for image in getattr(data, split).images}
    if both := sum(hash_of(image) in known for image in images):
        print(f"{name}: {both:,} of its images are among the known ones", file=sys.stderr)


def _read_known(name: str, data_dir: Path) -> tuple[list[str], ImageSet, ImageSet]:
    if name == "digits":
        from sklearn.datasets import load_digits  # only this set needs it

        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 8x8, in 0..16
        images = pixels.repeat(2, axis=1).repeat(2, axis=2)[..., None]
        train, test = _split(ImageSet(images, digits.target), lambda n: round(TEST_SHARE * n))
        return [str(digit) for digit in digits.target_names], train, test
    if name != "tiny-imagenet":
        classes, train = _read_torchvision(name, data_dir, "train")
        return classes, train, _read_torchvision(name, data_dir, "test")[1]
    # TinyImageNet's validation images, whose labels are public, serve as test images.
    files = [tiny_imagenet_files(data_dir, part) for part in ("train", "val")]
    class_of = {file.name: file.parent.parent.name for part in files for file in part}
    annotations = files[1][0].parent.parent / "val_annotations.txt"
    if annotations.exists():  # otherwise, val has been sorted into folders as train is
        rows = annotations.read_text().splitlines()
        class_of |= dict(row.split("\t")[:2] for row in rows)
    classes, sets = sorted(set(class_of.values())), []
    for part in files:
        images, read = pictures.read_and_report(name, part, 64)
        labels = np.searchsorted(classes, [class_of[file.name] for file in part])
        sets.append(ImageSet(images, labels[read]))
    return classes, sets[0], sets[1]


def _read_torchvision(name: str, data_dir: Path, split: str) -> tuple[list[str], ImageSet]:
    dataset = _torchvision_dataset(name, data_dir, split)
    if name == "svhn":
        images = np.ascontiguousarray(dataset.data.transpose(0, 2, 3, 1))
        return [str(digit) for digit in range(10)], ImageSet(images, dataset.labels)
    images = np.asarray(dataset.data)
    images = images.reshape(*images.shape[:3], -1)
    return dataset.classes, ImageSet(images, np.asarray(dataset.targets, np.int64))


def _torchvision_dataset(name: str, data_dir: Path, split: str) -> Any:
    """One split as a torchvision data set. Downloads go to a folder of their own first: torchvision
    keeps wrong files under their final names and takes half an unpacked MNIST for the whole."""
    from torchvision import datasets  # takes a second, which scoring a photograph can do without

    class_name, part = TORCHVISION[name]
    argument = split if name in ("svhn", "textures") else split == "train"
    path, make = data_dir / part.format(split=split), getattr(datasets, class_name)
    if not path.exists():
        with _downloading(name, path) as folder:
            archive = data_dir / getattr(make, "filename", "")  # CIFAR's may be there already
            if archive.is_file():
                shutil.copy(archive, folder)
            make(folder, argument, download=True)
    try:
        return make(data_dir, argument)
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # it may fail in any way on damaged files
        raise ImagesUnavailable(f"{path} is damaged: remove it to download it again") from error


def _read_unknown(name: str, data_dir: Path, image_size: int) -> np.ndarray:
    rng = np.random.default_rng(SEED)
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
    if name in ("mnist", "svhn"):
        return _read_torchvision(name, data_dir, "test")[1].images
    if name in ODIN_ARCHIVES:
        return _read_odin_archive(name, data_dir)
    files = tiny_imagenet_files(data_dir, "test")
    if name.endswith("resize"):
        return pictures.read_and_report(name, files, image_size)[0]
    images, _ = pictures.read_and_report(name, files, 64)
    return random_crops(images, image_size, rng)


def tiny_imagenet_files(data_dir: Path, part: str) -> Sequence[Any]:
    """The images of `train`, `val` or `test` by their names, in the folder or inside the zip."""
    folder = data_dir / "tiny-imagenet-200" / part
    if files := sorted(folder.rglob("*.JPEG")):
        return files
    archive = data_dir / "tiny-imagenet-200.zip"
    _download("tiny-imagenet", TINY_IMAGENET, archive, TINY_IMAGENET_MD5)
    inside = zipfile.ZipFile(archive)
    names = (name for name in inside.namelist() if name.startswith(f"tiny-imagenet-200/{part}/"))
    return [zipfile.Path(inside, name) for name in sorted(names) if name.endswith(".JPEG")]


def _read_odin_archive(name: str, data_dir: Path) -> np.ndarray:
    archive, md5, folder, frame, dropbox_id = ODIN_ARCHIVES[name]
    top = data_dir / Path(folder).parts[0]
    if not top.is_dir():
        url = f"https://www.dropbox.com/s/raw/{dropbox_id}/{archive}"  # without /raw/, a web page
        _download(name, url, data_dir / archive, md5)
        with _downloading(name, top) as aside, tarfile.open(data_dir / archive) as tar:
            tar.extractall(aside, filter="data")
    files = pictures.image_files([data_dir / folder])
    images, _ = pictures.read_and_report(name, files, 32 + 2 * frame)
    return images[:, frame : frame + 32, frame : frame + 32]


def _download(name: str, url: str, path: Path, md5: str) -> None:
    """Download what is not there yet; only the whole, right file gets the name."""
    from torchvision.datasets.utils import check_integrity, download_url

    if not path.exists():
        with _downloading(name, path) as folder:
            download_url(url, folder, path.name, md5)
    elif not check_integrity(path, md5):
        raise ImagesUnavailable(f"{path} is not the published file (MD5 {md5}): remove it")


@contextmanager
def _downloading(name: str, path: Path) -> Iterator[Path]:
    """A folder to download or unpack `path` in: only what is whole gets its place."""
    socket.setdefaulttimeout(PATIENCE)  # torchvision sets none
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="unfinished-", dir=path.parent) as folder:
            yield Path(folder)
            Path(folder, path.name).replace(path)
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        # RuntimeError is how torchvision reports a wrong checksum or a failed mirror
        reason = " ".join(str(error).split())
        raise ImagesUnavailable(
            f"{name}: not found in {path.parent}, and could not be downloaded ({reason}); "
            "connect to the network, or put the unpacked files there (see data/README.md)"
        ) from error


def random_crops(images: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """One size x size patch of each image [N, H, W, C] at an offset drawn uniformly."""
    count, height, width, _ = images.shape
    if size > min(height, width):
        raise ValueError(f"patches of {size} pixels do not fit images of {height}x{width}")
    top, left = rng.integers(0, height - size + 1, count), rng.integers(0, width - size + 1, count)
    patches = np.lib.stride_tricks.sliding_window_view(images, (size, size), (1, 2))
    return np.moveaxis(patches[np.arange(count), top, left], 1, -1)  # from [N, C, size, size]


def _class_indices(known_classes: str, classes: Sequence[str]) -> list[int]:
    index_of = {str(index): index for index in range(len(classes))}
    index_of |= {name: index for index, name in enumerate(classes)}  # a name goes before an index
    known_classes = unicodedata.normalize("NFC", known_classes)
    wanted = [item for item in map(str.strip, known_classes.split(",")) if item] or classes
    if absent := [item for item in wanted if item not in index_of]:
        problem = f"no class {some(absent)}; expected {some(classes)}, or 0..{len(classes) - 1}"
    elif len(indices := list(dict.fromkeys(index_of[item] for item in wanted))) < 2:
        problem = f"only {classes[indices[0]]}; expected at least two classes"
    else:
        return indices
    raise ValueError(f"known classes {known_classes}: {problem}")


def _relabel(images: ImageSet, known: Sequence[int]) -> ImageSet:
    """Keep the images of the known classes; class known[i] gets label i."""
    is_class = images.labels[:, None] == np.array(known)  # [N, K]
    return ImageSet(images.images, is_class.argmax(axis=1)).where(is_class.any(axis=1))


def _split(images: ImageSet, count_of: Callable[[int], int]) -> tuple[ImageSet, ImageSet]:
    """Take count_of(n) random images of each class of n out, always the same ones."""
    rng = np.random.default_rng(SEED)
    mask = np.zeros(len(images.labels), bool)
    for label in np.unique(images.labels):
        members = np.flatnonzero(images.labels == label)
        mask[rng.choice(members, count_of(len(members)), replace=False)] = True
    return images.where(~mask), images.where(mask)
