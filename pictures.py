"""A person's picture files -> arrays: folders searched, files decoded, classes split by content."""

import hashlib
import io
import os
import re
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import Path as ZipPath

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from tqdm import tqdm

SPLIT_AT = (0.2, 0.4)  # a hash gives each image a place in 0..1: test, validation, training
MIN_PER_CLASS = 25  # different images; about 15 of them are for training
MIN_VAL = 10  # validation images, for the threshold of all classes together

Image.MAX_IMAGE_PIXELS = 100_000_000  # Pillow refuses twice as many; the largest phones have 200 M
Image.init()  # registers all formats of this Pillow
SAFE_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "QOI")
FORMATS = tuple(name for name in SAFE_FORMATS if name in Image.OPEN)  # EPS would run Ghostscript
IMAGE_SUFFIXES = {end for end, name in Image.registered_extensions().items() if name in FORMATS}
IMAGE_SUFFIXES |= {".mpo", ".heic", ".heif"}  # HEIC is listed to say why it is not read
HEIC = "HEIC is not supported here: convert it to JPEG"
HIDDEN = re.compile(
    r"\..*|__macosx|@eadir|[@#$]recycle(\.bin)?|#snapshot|thumbs\.db|desktop\.ini|lost\+found|"
    "system volume information",
    re.I,
)
SPLIT_NAME = re.compile(
    r"(.*[-_ .])?(train|valid|val|test|dev)(ing|ation)?([-_ .]?(set|data|images?|[0-9]+))?", re.I
)


class ImageSet(NamedTuple):
    """Images [N, H, W, C] uint8 with their class indices [N] int64."""

    images: np.ndarray
    labels: np.ndarray

    def where(self, mask: Any) -> "ImageSet":
        """The images chosen by a mask [N] or by indices."""
        return ImageSet(self.images[mask], self.labels[mask])


def image_files(paths: Iterable[Path]) -> list[Path]:
    """List image files: each path is a file, or a folder searched through for images, sorted.

    `~` is expanded, links are followed, hidden and system files are left out. One line on stderr
    counts the other files of a folder.

    Raises:
        ValueError: a path does not exist, or a folder holds no image.
    """
    files: list[Path] = []
    for path in (Path(os.path.expanduser(path)) for path in paths):
        found, other = find_images(path) if path.is_dir() else ([path] * path.is_file(), Counter())
        _report_unread(path.name, other)
        if not found:
            problem = "no image file in it" if path.is_dir() else "no such file or folder"
            raise ValueError(f"{path.absolute()}: {problem}; expected images")
        files += found
    return files


def find_images(
    folder: Path, above: frozenset[Path] = frozenset()
) -> tuple[list[Path], Counter[str]]:
    """List the image files in a folder and below it; count the other files by suffix.

    A link that leads back to one of the folders above is not followed.
    """
    files: list[Path] = []
    other: Counter[str] = Counter()
    above |= {folder.resolve()}
    for path in _visible(folder):
        suffix = path.suffix.lower()
        if path.is_dir():
            if path.resolve() not in above:
                found, kinds = find_images(path, above)
                files += found
                other += kinds
        elif suffix in IMAGE_SUFFIXES:
            files.append(path)
        else:
            other[suffix or "without a suffix"] += 1
    return files, other


def _visible(folder: Path) -> list[Path]:
    """What a folder holds, sorted, without hidden and system entries."""
    return sorted(path for path in folder.iterdir() if not HIDDEN.fullmatch(path.name))


def folder_of(name: str) -> Path:
    """The folder of `folder:PATH`, `~` expanded, as a whole path; ValueError if there is none."""
    folder = Path(os.path.expanduser(name.removeprefix("folder:"))).resolve()
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; if it moved, name its new place")
    return folder


def class_folders(root: Path) -> list[Path]:
    """List the sub-folders of a data set, one per class; ValueError if they are something else."""
    folders = [path for path in _visible(root) if path.is_dir()]
    names = [folder.name for folder in folders]
    inside = [[path.name for path in _visible(folder) if path.is_dir()] for folder in folders]
    splits = [match for name in names if (match := SPLIT_NAME.fullmatch(name))]
    holding = [name for name, below in zip(names, inside, strict=True) if len(below) > 1]
    holding.sort(key=lambda name: "train" not in name.lower())
    better = [f"try --dataset {shlex.quote(f'folder:{root / name}')}" for name in holding]
    if len({match[2].lower() for match in splits}) > 1:  # two kinds of train are classes
        problem = f"its sub-folders {some([match[0] for match in splits])} are splits, not classes"
    elif len(folders) < 2:
        problem = f"its only sub-folder is {names[0]}" if names else "it has no sub-folders"
    elif len(inside[0]) > 1 and all(each == inside[0] for each in inside):
        problem = f"each of its sub-folders {some(names)} holds {some(inside[0])}"
        better = ["move the images up into the sub-folders, or name one of these"]
    else:
        return folders
    problem += "; expected one sub-folder of images per class, two or more"
    raise ValueError("; ".join([f"{root}: {problem}", *better[:1]]))


def read_class_folders(
    folders: Sequence[Path], known: Sequence[int], size: int
) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Read the images of all classes as training, validation and test images.

    Split and order come from the pixels alone: an image keeps its side when others come or go, and
    when it is renamed. Of equal images in a class one is kept. An image in two classes has no true
    label and is left out. One line on stderr counts each. ValueError: a `known` class has too few.
    """
    root, names = folders[0].parent, [folder.name for folder in folders]
    found = [find_images(folder) for folder in folders]
    files = [file for inside, _ in found for file in inside]
    beside = (path for path in _visible(root) if not path.is_dir())
    other = Counter(f"{path.suffix or 'file'} beside the class folders" for path in beside)
    other = sum((kinds for _, kinds in found), other)
    images, read = read_and_report(root.name, files, size, other)
    labels = np.repeat(np.arange(len(folders)), [len(inside) for inside, _ in found])[read]
    hashes = np.array([hash_of(image) for image in images], object)
    _, first, copy_of = np.unique(hashes, return_index=True, return_inverse=True)
    in_two = np.isin(copy_of, copy_of[labels != labels[first[copy_of]]])
    if in_two.any():
        line = f"left out, as their images are in two classes: {in_two.sum():,} files"
        same = read[copy_of == copy_of[in_two.argmax()]]
        shown = some([str(files[i].relative_to(root)) for i in same])
        print(printable(f"{root.name}: {line} ({shown})"), file=sys.stderr)
    kept = first[~in_two[first]]  # the first copy of each image, in the order of the hashes
    if copies := len(images) - in_two.sum() - len(kept):
        print(printable(f"{root.name}: duplicates left out: {copies:,}"), file=sys.stderr)
    data = ImageSet(images, labels).where(kept)
    side = np.digitize([int.from_bytes(key[:8], "big") / 2**64 for key in hashes[kept]], SPLIT_AT)
    test, val, train = (data.where(side == part) for part in range(3))
    counts = np.bincount(data.labels, minlength=len(names))
    if few := [f"{names[i]} has {counts[i]}" for i in known if counts[i] < MIN_PER_CLASS]:
        problem = f"{', '.join(few)}; each class needs {MIN_PER_CLASS} different images or more"
    elif (left := np.isin(val.labels, known).sum()) < MIN_VAL:
        problem = f"validation images are too few: {left}; add images until {MIN_VAL} are drawn"
    else:
        return train, val, test
    raise ValueError(f"{root}: {problem}")


def read_and_report(
    name: str, files: Sequence[Path | ZipPath], size: int, other: Counter[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """As `read_images`, but returns the images and the indices [n] into `files` of those read.

    One line on stderr says what was not read, `other` kinds of files included.
    """
    images, unread = read_images(files, size)
    ends = {i: "/".join(Path(str(files[i])).parts[-2:]) for i in unread}  # class and file
    bad = [f"{ends[i]}: {reason}" for i, reason in unread.items() if reason != HEIC]
    kinds = Counter(other) + Counter({".heic (convert HEIC to JPEG)": len(unread) - len(bad)})
    _report_unread(name, kinds, bad)
    return images, np.delete(np.arange(len(files)), list(unread))


def _report_unread(name: str, kinds: Counter[str], bad: Sequence[str] = ()) -> None:
    parts = [f"{len(bad):,} unreadable ({some(bad, 3)})"] if bad else []
    parts += [f"{count:,} {kind}" for kind, count in kinds.most_common()]
    if parts:
        print(printable(f"{name}: files not read: {', '.join(parts)}"), file=sys.stderr)


def read_images(files: Sequence[Path | ZipPath], size: int) -> tuple[np.ndarray, dict[int, str]]:
    """Decode image files of any suffix to one array, brought to size as in `fit_to`.

    All become RGB: transparent pixels white, Exif rotation applied, the first frame of animations.
    Grey integer pictures are scaled by the bits they use (8, 10, 12, 14, ...: the first that hold
    the largest value), floating-point ones from 0..1. Damaged metadata is ignored.

    Returns:
        images [n, size, size, 3] uint8 of the files that could be read, in their order, and
        {index into `files`: short reason} of the others.
    """
    images = np.empty((len(files), size, size, 3), np.uint8)
    unread: dict[int, str] = {}
    with warnings.catch_warnings(action="ignore"):  # about metadata, and more than 100 megapixels
        bar = tqdm(files, "read images", unit="img", leave=False, delay=1, disable=None)
        for index, file in enumerate(bar):
            try:
                images[index] = _read_image(file.read_bytes(), size)
            except Exception as error:  # Pillow raises almost anything on a damaged file
                unread[index] = _plain_reason(error)
    return (np.delete(images, list(unread), axis=0) if unread else images), unread


def _read_image(data: bytes, size: int) -> np.ndarray:
    """Decode a file; where that fails, say why in plain words or do without the end marker."""
    try:
        return _decode(data, size)
    except Exception:
        if not data:
            raise ValueError("the file is empty") from None
        if data[4:10] in (b"ftyphe", b"ftypmi", b"ftypms"):
            raise ValueError(HEIC) from None
        if data[:64].lstrip().startswith(b"<"):
            raise ValueError("a web page or other text") from None
        if data.startswith(b"\xff\xd8"):  # JPEG
            image, other = (_decode(data + b"U" * n + b"\xff\xd9", size) for n in (0, 64))
            if np.array_equal(image, other):  # nothing but the end marker is missing
                return image
        raise


def _decode(data: bytes, size: int) -> np.ndarray:
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # to open it: damaged metadata is passed over
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # to decode it: missing pixels are an error
    image.draft(None, (8 * size, 8 * size))  # decodes a large JPEG at 1/2, 1/4 or 1/8
    sixteen_bits = ";16" in str(getattr(image, "tile", ""))
    image.load()
    with suppress(Exception):  # of damaged Exif
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode.startswith("I"):
        pixels = np.asarray(image)
        ranges = (1,) if image.mode == "F" else (2**bits - 1 for bits in range(8, 33, 2))
        white = next((top for top in ranges if pixels.max() <= top), 1)
        if not 0 <= pixels.min() <= pixels.max() <= white:  # NaN compares false
            raise ValueError(f"pixels outside 0..{white}")
        image = Image.fromarray(np.rint(pixels * np.float32(255 / white)).astype(np.uint8))
    elif sixteen_bits and np.max(image.convert("RGB").getextrema()) < 16:
        raise ValueError("nearly black: 16-bit colours of which 12 bits are used; save 8 bits")
    image = _fit(image.convert("RGBA" if image.has_transparency_data else "RGB"), size)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _plain_reason(error: Exception) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a supported kind"
    if isinstance(error, Image.DecompressionBombError):
        return "more than 200 megapixels"
    if "truncated" in message.lower():
        return "truncated: its end is missing"
    return message if type(error) is ValueError else f"damaged ({message or type(error).__name__})"


def fit_to(images: np.ndarray, size: int, channels: int | None = None) -> np.ndarray:
    """Bring images [N, H, W, C] to size x size pixels; average or repeat the colour channels.

    The short side is scaled (antialiased, bilinear) and the middle cut out.
    """
    channels = channels or images.shape[-1]
    if images.shape[1:3] != (size, size):
        scaled = [np.asarray(_fit(Image.fromarray(image.squeeze()), size)) for image in images]
        images = np.array(scaled, np.uint8).reshape(-1, size, size, images.shape[-1])
    if images.shape[-1] > channels:
        images = np.rint(images.mean(axis=-1, keepdims=True)).astype(np.uint8)
    return images if images.shape[-1] == channels else np.concatenate([images] * channels, axis=-1)


def _fit(image: Image.Image, size: int) -> Image.Image:
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)


def hash_of(image: np.ndarray) -> bytes:
    """Hash of an image's pixels, 16 bytes."""
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def some(names: Sequence[str], count: int = 10) -> str:
    """The names joined by commas, cut after `count`."""
    return ", ".join(names[:count]) + ", ..." * (len(names) > count)


def printable(text: object) -> str:
    """Text with control characters, line breaks and undecodable bytes escaped by backslashes."""
    harmful = r"[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return re.sub(harmful, lambda match: ascii(match[0])[1:-1], str(text))
