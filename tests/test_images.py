"""Decoding picture files: kinds, depths, metadata, damage; finding them; printing their names."""

import io
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pictures
from pictures import fit_to, image_files, printable, read_images


def scene(mode="RGB", size=(32, 32)):
    """Smooth colours, so that a lossy format changes little."""
    rows, columns = np.mgrid[0 : size[1], 0 : size[0]]
    pixels = np.stack([6 * rows, 6 * columns, 90 + 2 * rows], axis=-1).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def encode(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def read_one(content, folder, size=32):
    (folder / "file").write_bytes(content)
    images, unread = read_images([folder / "file"], size)
    assert unread == {}
    assert images.dtype == np.uint8
    return images[0].astype(int)


def reason_of(content, folder):
    (folder / "file").write_bytes(content)
    images, unread = read_images([folder / "file"], 32)
    assert images.shape == (0, 32, 32, 3)
    return unread[0]


KINDS = [("RGB", "PNG"), ("RGB", "JPEG"), ("RGB", "WEBP"), ("RGB", "TIFF"), ("RGB", "BMP"),
         ("RGB", "PPM"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "JPEG"), ("P", "PNG"),
         ("P", "GIF"), ("L", "PNG"), ("1", "PNG"), ("RGB", "JPEG2000"), ("RGB", "MPO")]  # fmt: skip


@pytest.mark.parametrize(("mode", "kind"), KINDS)
def test_every_kind_shows_the_same_scene(tmp_path, mode, kind):
    image = scene(mode)
    options = {"quality": 95} if kind in ("JPEG", "WEBP", "MPO") else {}
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert abs(read_one(encode(image, kind, **options), tmp_path) - expected).mean() < 4


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_grey_pictures_are_scaled_by_the_bits_they_use(tmp_path, bits):
    ramp = np.linspace(0, 1, 1024).reshape(32, 32)
    pixels = (ramp * (2**bits - 1)).astype(np.uint16)
    read = read_one(encode(Image.fromarray(pixels), "PNG"), tmp_path)
    assert read[..., 0] == pytest.approx(ramp * 255, abs=1)


def floating(low, high):
    return encode(Image.fromarray(np.linspace(low, high, 1024, dtype="f").reshape(32, 32)), "TIFF")


def test_floating_point_pixels_are_read_from_zero_to_one(tmp_path):
    assert read_one(floating(0, 1), tmp_path)[..., 0].ravel()[::1023].tolist() == [0, 255]
    for low, high in ((0, 900), (-1, 1), (0, np.nan)):
        assert reason_of(floating(low, high), tmp_path) == "pixels outside 0..1"


def test_dark_sixteen_bit_colours_are_not_read_as_black(tmp_path):
    """Pillow keeps the high byte only, which is almost nothing of a 12-bit picture."""
    rows = (np.asarray(scene()).astype(int) * 16).astype(">u2").reshape(32, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = chunk(b"IHDR", (32).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0]))
    pixels = chunk(b"IDAT", zlib.compress(raw))
    png = b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")
    assert "12 bits" in reason_of(png, tmp_path)


def chunk(name, content, crc=None):
    crc = zlib.crc32(name + content) if crc is None else crc
    return len(content).to_bytes(4, "big") + name + content + crc.to_bytes(4, "big")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparent_pixels_are_white(tmp_path, mode):
    """The left half is transparent, with black hidden underneath; the right half is grey 90."""
    alpha = np.repeat([[0] * 16 + [255] * 16], 32, axis=0).astype(np.uint8)
    image, options = Image.fromarray(np.where(alpha, 90, 0).astype(np.uint8)).convert(mode), {}
    if mode.endswith("A"):
        image.putalpha(Image.fromarray(alpha))
    else:  # one colour counts as transparent
        options = {"transparency": (0, 0, 0) if mode == "RGB" else image.getpixel((0, 0))}
    expected = np.where(alpha, 90, 255)[..., None].repeat(3, axis=-1)
    assert np.array_equal(read_one(encode(image, "PNG", **options), tmp_path), expected)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_read(tmp_path, kind):
    first, *others = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "lime"))
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encode(first, kind, save_all=True, append_images=others, **options)
    assert read_one(content, tmp_path)[5, 5].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_every_exif_orientation_is_undone(tmp_path, kind):
    undo = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90,
    }  # fmt: skip
    for orientation, turn in undo.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        read = read_one(encode(scene(), kind, exif=exif), tmp_path)
        assert abs(read - turn(np.asarray(scene()).astype(int))).mean() < 3


EXIF = b"Exif\0\0II*\0\x08\0\0\0"
ROTATED = b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"  # the entry: orientation 6


@pytest.mark.parametrize(
    ("kind", "metadata", "rotated"),
    [
        ("JPEG", {"exif": b"Exif\0\0garbage"}, False),
        ("JPEG", {"exif": EXIF + b"\x03\0" + ROTATED}, True),
        ("JPEG", {"exif": EXIF + b"\1\0" + ROTATED + b"\xff\xff\0\0"}, True),
        ("PNG", {"exif": b"\0\x08\0\x02garbage"}, False),
        ("PNG", {"icc_profile": b"garbage"}, False),
        ("WEBP", {"xmp": b"<x:xmpmeta", "lossless": True}, False),
    ],
)
def test_damaged_metadata_costs_no_pixel(tmp_path, kind, metadata, rotated):
    expected = np.rot90(scene(), -1) if rotated else np.asarray(scene())
    assert abs(read_one(encode(scene(), kind, **metadata), tmp_path) - expected).mean() < 3


@pytest.mark.parametrize(
    "comment",
    [
        chunk(b"tEXt", b"Comment\0text", crc=1),
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7))),
    ],
)
def test_png_with_a_damaged_or_long_comment_is_read(tmp_path, comment):
    png = encode(scene(), "PNG")
    assert np.array_equal(read_one(png[:33] + comment + png[33:], tmp_path), scene())


def test_jpeg_that_lacks_only_its_end_marker_is_read(tmp_path):
    jpeg = encode(scene(), "JPEG")
    assert np.array_equal(read_one(jpeg[:-2], tmp_path), read_one(jpeg, tmp_path))


def huge_png():
    content = bytearray(encode(scene(), "PNG"))
    content[16:24] = (20_000).to_bytes(4, "big") + (15_000).to_bytes(4, "big")
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"\n<!DOCTYPE html>", "a web page or other text"),
        (b"noise" * 99, "not an image of a supported kind"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC is not supported here: convert it to JPEG"),
        (encode(scene(), "EPS"), "not an image of a supported kind"),  # Ghostscript would run it
        (huge_png(), "more than 200 megapixels"),
    ],
)
def test_what_cannot_be_read_has_a_plain_reason(tmp_path, content, reason):
    assert reason_of(content, tmp_path) == reason


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
def test_cut_pixels_are_damage(tmp_path, kind):
    content = encode(scene(size=(64, 64)), kind)
    expected = "damaged" if kind == "WEBP" else "truncated: its end is missing"
    assert expected in reason_of(content[: 3 * len(content) // 4], tmp_path)


def test_the_short_side_is_scaled_and_the_middle_cut_out(tmp_path):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = scene(size=(40, 40))
    for pixels in (wide, wide.swapaxes(0, 1)):
        middle = pixels[:, 40:80] if pixels is wide else pixels[40:80]
        expected = Image.fromarray(middle).resize((32, 32), Image.Resampling.BILINEAR)
        difference = read_one(encode(Image.fromarray(pixels), "PNG"), tmp_path) - expected
        assert abs(difference)[1:-1, 1:-1].max() <= 1
        assert np.array_equal(fit_to(pixels[None], 32, 3)[0], difference + expected)


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (1, 1)])
def test_extreme_shapes_are_read(tmp_path, size):
    content = encode(Image.new("RGB", size, (10, 20, 30)), "PNG")
    assert (read_one(content, tmp_path) == (10, 20, 30)).all()


def test_fit_to_changes_size_and_channels():
    colour = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    grey = fit_to(colour, 64, 1)
    assert grey[..., 0] == pytest.approx(colour.mean(axis=-1), abs=0.5)
    assert fit_to(grey, 32, 3).shape == (2, 32, 32, 3)
    assert fit_to(grey[:0], 32, 1).shape == (0, 32, 32, 1)


def test_jpeg_of_a_108_megapixel_camera_is_read(tmp_path):
    rows = Image.linear_gradient("L").resize((12_000, 9_000))
    read = read_one(encode(rows, "JPEG"), tmp_path)
    expected = np.asarray(Image.linear_gradient("L").resize((32, 32), Image.Resampling.BILINEAR))
    assert read[..., 0] == pytest.approx(expected, abs=3)


def test_unread_files_have_their_index_and_nothing_is_printed(tmp_path, capfd):
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for i, file in enumerate(files[:4]):
        file.write_bytes(b"" if i == 1 else encode(Image.new("RGB", (8, 8), (i, 0, 0)), "PNG"))
    images, unread = read_images(files, 32)
    assert images[:, 0, 0, 0].tolist() == [0, 2, 3]
    assert unread == {1: "the file is empty", 4: "no such file or directory"}
    assert capfd.readouterr() == ("", "")


def test_folders_are_searched_and_files_taken_as_they_are(tmp_path, monkeypatch, capsys):
    images = ["a.jpg", "b/c.PNG", "b/d/e.jfif", "b/f.webp", "g.tif", "h.heic"]
    others = [".x.png", ".cache/x.png", "__MACOSX/x.png", "@eaDir/x.png", "x.eps", "x.pdf", "x"]
    for name in images + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    expected = [tmp_path / name for name in images]
    assert image_files([tmp_path]) == expected
    line = f"{tmp_path.name}: files not read: 1 without a suffix, 1 .eps, 1 .pdf\n"
    assert capsys.readouterr().err == line
    assert image_files([tmp_path / "x", tmp_path]) == [tmp_path / "x", *expected]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert image_files([Path("~/a.jpg"), Path("~/b")]) == expected[:4]


def test_links_are_followed_but_not_back(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "elsewhere").mkdir()
    scene().save(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "folder" / "linked").symlink_to(tmp_path / "elsewhere")
    for name in ("back", "again"):
        (tmp_path / "folder" / name).symlink_to(tmp_path / "folder")
    assert image_files([tmp_path / "folder"]) == [tmp_path / "folder" / "linked" / "1.png"]


def test_missing_paths_and_empty_folders_are_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".x.png").touch()
    for name, problem in (("absent.png", "no such file or folder"), ("empty", "no image file")):
        with pytest.raises(ValueError, match=f"{tmp_path}/{name}: {problem}"):
            image_files([Path(name)])


def test_printable_escapes_what_a_terminal_cannot_show(tmp_path):
    names = {"猫é b.png".encode(): "猫é b.png", b"caf\xe9.png": "caf\\udce9.png",
             b"two\nlines.png": "two\\nlines.png", b"\x1b[31m.png": "\\x1b[31m.png",
             "9.41\u202fAM.png".encode(): "9.41\u202fAM.png"}  # fmt: skip
    for name, shown in names.items():
        path = tmp_path / os.fsdecode(name)
        scene().save(path)
        assert printable(path.name) == shown
    assert read_images(image_files([tmp_path]), 32)[1] == {}


def test_reading_pictures_imports_no_torch(tmp_path):
    code = "import sys, open_set_data; sys.exit(bool({'torch', 'torchvision'} & set(sys.modules)))"
    root = Path(pictures.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
