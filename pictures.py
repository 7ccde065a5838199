"""A person's picture files -> arrays: folders searched, files decoded, classes split by content."""

import hashlib
import io
import os
import re
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO
from zipfile import Path as ZipPath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

TEST, VAL, TRAIN = 0, 1, 2
SPLIT_AT = (0.2, 0.4)  # a hash gives each image a place in 0..1: test, validation, training
MIN_PER_CLASS = 25  # different images; about 15 of them are for training,
MIN_TRAIN = 10  # and no fewer than this
MIN_VAL = 10  # of all classes together: fewer say too little about the threshold
MAX_MEGAPIXELS = 200  # the largest phone cameras have that many
DRAFT = 8  # large JPEG files are decoded at 1/2, 1/4 or 1/8, but to no less than 8 times the size

Image.init()  # registers all formats of this Pillow
SAFE_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "QOI")
FORMATS = tuple(name for name in SAFE_FORMATS if name in Image.OPEN)  # EPS would run Ghostscript
IMAGE_SUFFIXES = {
    suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")
} | {".heic", ".heif"}  # listed, so that a person is told why they are not read
HEIC = "HEIC is not supported here: convert it to JPEG"
SYSTEM_NAMES = {  # what computers put among a person's files
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found",
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__pycache__",
}  # fmt: skip
SPLIT_NAME = re.compile(r"(train|valid|val|test|dev)(ing|ation)?([-_ ]?set)?", re.IGNORECASE)

Pictures = Sequence[Path | ZipPath]
Arrays = tuple[np.ndarray, np.ndarray]  # images [N, size, size, 3] uint8, and labels [N] int64


def image_files(paths: Iterable[Path]) -> list[Path]:
    """List image files: each path is a file, or a folder searched through for images, sorted.

    `~` is expanded, links are followed, hidden and system files are left out.

    Raises:
        ValueError: a path does not exist, or a folder holds no image.
    """
    files: list[Path] = []
    for path in (Path(os.path.expanduser(path)) for path in paths):
        found = find_images(path)[0] if path.is_dir() else [path] * path.is_file()
        if not found:
            problem = "no image file in it" if path.is_dir() else "no such file or folder"
            raise ValueError(f"{printable(path.absolute())}: {problem}; expected images")
        files += found
    return files


def read_images(files: Pictures, size: int, frame: int = 0) -> tuple[np.ndarray, dict[int, str]]:
    """Decode image files to one array.

    All become RGB: transparent pixels white, Exif rotation applied, the first frame of animations.
    Grey integer pictures are scaled by the bits they use (8, 10, 12, 14, ...: the first that hold
    the largest value), floating-point ones from 0..1. Damaged metadata is ignored.

    Args:
        files: image files of any suffix; the content decides.
        size: pixels to bring them to, as in `fit_to`.
        frame: pixels to cut off each side first.

    Returns:
        images [n, size, size, 3] uint8 of the files that could be read, in their order, and
        {index into `files`: short reason} of the others.
    """
    images = np.empty((len(files), size, size, 3), np.uint8)
    unread: dict[int, str] = {}
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # MAX_MEGAPIXELS replaces it
    try:
        with warnings.catch_warnings(action="ignore"):  # about metadata
            bar = tqdm(files, "read images", unit="img", leave=False, delay=1, disable=None)
            for index, file in enumerate(bar):
                try:
                    with file.open("rb") as stream:
                        images[index] = _read_image(stream, size, frame)
                except Exception as error:  # Pillow raises almost anything on a damaged file
                    unread[index] = _plain_reason(error)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    return (np.delete(images, list(unread), axis=0) if unread else images), unread


def read_and_report(
    name: str, files: Pictures, size: int, frame: int = 0, other: Mapping[str, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read images; one line on stderr says what was not read, `other` kinds of files included.

    Returns:
        images [n, size, size, 3] uint8, and the indices [n] into `files` of those read.
    """
    images, unread = read_images(files, size, frame)
    kinds = Counter(other)
    bad = [f"{files[i].name}: {reason}" for i, reason in unread.items() if reason != HEIC]
    if len(unread) > len(bad):
        kinds[".heic (convert HEIC to JPEG)"] = len(unread) - len(bad)
    parts = [f"{len(bad):,} unreadable ({some(bad, 3)})"] if bad else []
    parts += [f"{count:,} {kind}" for kind, count in kinds.most_common()]
    if parts:
        print(printable(f"{name}: files not read: {', '.join(parts)}"), file=sys.stderr)
    return images, np.delete(np.arange(len(files)), list(unread))


def read_class_folders(folders: Sequence[Path], size: int) -> list[Arrays]:
    """Read the images of all classes as [training, validation, test] images with their labels.

    Split and order come from the pixels alone: an image keeps its side when others come or go, and
    when it is renamed. Of equal images in a class one is kept. An image in two classes has no true
    label and is left out. One line on stderr counts each.

    Raises:
        ValueError: too few images.
    """
    root = folders[0].parent
    files: list[Path] = []
    of_class: list[int] = []
    beside = (path for path in visible(root) if not path.is_dir())
    other = Counter(f"{path.suffix or 'file'} beside the class folders" for path in beside)
    for label, folder in enumerate(folders):
        found, kinds = find_images(folder)
        files += found
        of_class += [label] * len(found)
        other.update(kinds)
    images, read = read_and_report(root.name, files, size, other=other)
    labels = np.array(of_class, np.int64)[read]
    equal: dict[bytes, list[int]] = {}
    for index, image in enumerate(images):
        equal.setdefault(hash_of(image), []).append(index)
    # Files come class by class: the first and the last of equal images tell.
    clear = {key: each for key, each in equal.items() if labels[each[0]] == labels[each[-1]]}
    if doubtful := sorted(equal.keys() - clear.keys()):
        each = equal[doubtful[0]]
        pair = [str(files[read[index]].relative_to(root)) for index in (each[0], each[-1])]
        line = f"{root.name}: left out, as in two classes: {len(doubtful):,} ({' and '.join(pair)})"
        print(printable(line), file=sys.stderr)
    if copies := sum(len(each) - 1 for each in clear.values()):
        print(printable(f"{root.name}: duplicates left out: {copies:,}"), file=sys.stderr)
    kept = [clear[key][0] for key in sorted(clear)]
    place = np.array([int.from_bytes(key[:8], "big") / 2**64 for key in sorted(clear)])
    side = np.digitize(place, SPLIT_AT)
    _check_counts(folders, labels[kept], side)
    return [
        (images[kept][side == wanted], labels[kept][side == wanted])
        for wanted in (TRAIN, VAL, TEST)
    ]


def _check_counts(folders: Sequence[Path], labels: np.ndarray, side: np.ndarray) -> None:
    names = [folder.name for folder in folders]
    counts = [int((labels == label).sum()) for label in range(len(names))]
    training = [int((labels[side == TRAIN] == label).sum()) for label in range(len(names))]
    val = int((side == VAL).sum())
    if min(counts) < MIN_PER_CLASS:
        few = [
            f"{name} has {n}" for name, n in zip(names, counts, strict=True) if n < MIN_PER_CLASS
        ]
        problem = f"{', '.join(few)}; each class needs {MIN_PER_CLASS} different images or more"
    elif min(training) < MIN_TRAIN or val < MIN_VAL:
        least = training.index(min(training))
        problem = (
            f"the split leaves {training[least]} training images of {names[least]} and {val} "
            f"validation images in all; expected {MIN_TRAIN} and {MIN_VAL} or more: add images"
        )
    else:
        return
    raise ValueError(printable(f"{folders[0].parent}: {problem}"))


def folder_of(name: str) -> Path:
    """The folder of `folder:PATH`, `~` expanded, as a whole path.

    Raises:
        ValueError: there is no such folder.
    """
    folder = Path(os.path.expanduser(name.removeprefix("folder:"))).resolve()
    if not folder.is_dir():
        raise ValueError(f"{printable(folder)}: no such folder; expected a folder of images")
    return folder


def class_folders(root: Path) -> list[Path]:
    """List the sub-folders of a data set, one per class.

    Raises:
        ValueError: they are something else, such as splits; says what, and which folder to name.
    """
    folders = [path for path in visible(root) if path.is_dir()]
    names = [folder.name for folder in folders]
    inside = [[path.name for path in visible(folder) if path.is_dir()] for folder in folders]
    splits = [name for name in names if SPLIT_NAME.fullmatch(name)]
    better = ""
    if len(splits) > 1 or (splits and splits == names):
        problem = f"its sub-folders {some(splits)} are splits, not classes"
        better = next((name for name in splits if name.lower().startswith("train")), splits[0])
    elif len(folders) > 1 and len(inside[0]) > 1 and all(each == inside[0] for each in inside):
        problem = f"each of its sub-folders {some(names)} holds {some(inside[0])}"
        better = names[0]
    elif len(folders) == 1:
        problem = f"its only sub-folder is {names[0]}"
        better = names[0] if len(inside[0]) > 1 else ""
    elif not folders:
        problem = "it has no sub-folders"
    else:
        return folders
    hint = f"; try --dataset {shlex.quote(f'folder:{root / better}')}" if better else ""
    expected = "expected one sub-folder of images per class, two or more"
    raise ValueError(printable(f"{root}: {problem}; {expected}{hint}"))


def hash_of(image: np.ndarray) -> bytes:
    """Hash of an image's pixels, 16 bytes."""
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def some(names: Sequence[str], count: int = 10) -> str:
    """The names joined by commas, cut after `count`."""
    return ", ".join(names[:count]) + ", ..." * (len(names) > count)


def fit_to(images: np.ndarray, size: int, channels: int) -> np.ndarray:
    """Bring images [N, H, W, C] to size x size pixels, and repeat or average the colour channels.

    The short side is scaled (antialiased, bilinear) and the middle cut out.
    """
    if images.shape[1:3] != (size, size):
        scaled = [np.asarray(_fit(Image.fromarray(image.squeeze()), size)) for image in images]
        images = np.array(scaled, np.uint8).reshape(-1, size, size, images.shape[-1])
    if images.shape[-1] > channels:
        images = np.rint(images.mean(axis=-1, keepdims=True)).astype(np.uint8)
    return images if images.shape[-1] == channels else np.concatenate([images] * channels, axis=-1)


def find_images(folder: Path) -> tuple[list[Path], Counter[str]]:
    """List the image files in a folder and below it; count the other files by suffix."""
    files: list[Path] = []
    other: Counter[str] = Counter()
    for path in _files_below(folder, set()):
        if path.suffix.lower() in IMAGE_SUFFIXES and (path.is_file() or not path.exists()):
            files.append(path)
        else:  # a pipe named like an image too: opening it would wait for ever
            other[path.suffix.lower() or "without a suffix"] += 1
    return files, other


def _files_below(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """All files but hidden and system ones, sorted; `seen` are the folders searched before."""
    seen.add(folder.resolve())
    for path in visible(folder):
        if not path.is_dir():
            yield path
        elif path.resolve() not in seen:  # a link may lead back
            yield from _files_below(path, seen)


def visible(folder: Path) -> list[Path]:
    """What a folder holds, sorted, without hidden and system entries."""
    entries = (path for path in folder.iterdir() if path.name.lower() not in SYSTEM_NAMES)
    return sorted(path for path in entries if not path.name.startswith("."))


def printable(text: object) -> str:
    """Text that the terminal can show: what it cannot is escaped with backslashes."""
    escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def _read_image(stream: IO[bytes], size: int, frame: int) -> np.ndarray:
    try:
        return _decode(stream, size, frame)
    except Exception:
        stream.seek(0)
        head = stream.read(64)
        if not head:
            raise ValueError("the file is empty") from None
        if head[4:10] in (b"ftyphe", b"ftypmi", b"ftypms"):
            raise ValueError(HEIC) from None
        if head.lstrip().startswith(b"<"):
            raise ValueError("a web page or other text") from None
        if head.startswith(b"\x89PNG"):
            return _decode(io.BytesIO(_without_metadata(head + stream.read())), size, frame)
        if head.startswith(b"\xff\xd8"):  # JPEG
            data, end = head + stream.read(), b"\xff\xd9"
            image = _decode(io.BytesIO(data + end), size, frame)
            other = _decode(io.BytesIO(data + b"U" * 64 + end), size, frame)
            if np.array_equal(image, other):  # nothing but the end marker is missing
                return image
        raise


def _without_metadata(png: bytes) -> bytearray:
    """The chunks that make the picture; Pillow refuses a damaged comment, browsers do not."""
    kept, start = bytearray(png[:8]), 8
    while start < len(png):
        end = start + 12 + int.from_bytes(png[start : start + 4], "big")
        if png[start + 4 : start + 8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept += png[start:end]
        start = end
    return kept


def _decode(stream: IO[bytes], size: int, frame: int) -> np.ndarray:
    image: Image.Image = Image.open(stream, formats=FORMATS)
    if (megapixels := image.width * image.height / 1e6) > MAX_MEGAPIXELS:
        raise ValueError(f"{megapixels:,.0f} megapixels; expected at most {MAX_MEGAPIXELS}")
    image.draft(None, (DRAFT * size, DRAFT * size))
    sixteen_bits = ";16" in str(getattr(image, "tile", ""))
    image.load()
    with suppress(Exception):  # of damaged Exif
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    elif sixteen_bits and np.max(image.convert("RGB").getextrema()) < 16:
        raise ValueError("nearly black: 16-bit colours of which 12 bits are used; save 8 bits")
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if frame:
        image = image.crop((frame, frame, image.width - frame, image.height - frame))
    image = _fit(image, size)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _fit(image: Image.Image, size: int) -> Image.Image:
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Integers or 0..1 [H, W] -> uint8."""
    floating = pixels.dtype.kind == "f"
    if not (pixels.min() >= 0 and (pixels.max() <= 1 or not floating)):  # NaN compares false
        raise ValueError("floating-point pixels outside 0..1" if floating else "negative pixels")
    bits = max(8, int(pixels.max()).bit_length())
    white = 1 if floating else 2 ** (bits + bits % 2) - 1
    eight: np.ndarray = np.rint(pixels * np.float32(255 / white)).astype(np.uint8)
    return eight


def _plain_reason(error: Exception) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a supported kind"
    if "truncated" in message.lower():
        return "truncated: its end is missing"
    return message if type(error) is ValueError else f"damaged ({message or type(error).__name__})"
