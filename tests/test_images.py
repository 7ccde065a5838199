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
from open_set_data import fit_to, image_files, printable, read_images


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
         ("RGB", "PPM"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "JPEG"), ("LAB", "TIFF"),
         ("P", "PNG"), ("P", "GIF"), ("L", "PNG"), ("1", "PNG"), ("LA", "PNG"), ("RGB", "JPEG2000"),
         ("RGB", "MPO"), ("RGB", "AVIF")]  # fmt: skip


@pytest.mark.parametrize(("mode", "kind"), KINDS)
def test_every_kind_shows_the_same_scene(tmp_path, mode, kind):
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    image = scene("L").convert("LA") if mode == "LA" else scene()
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    image = image.convert(mode)
    options = {"quality": 95} if kind in ("JPEG", "WEBP", "AVIF", "MPO") else {}
    expected = np.asarray((scene("RGB") if mode == "LAB" else image).convert("RGB")).astype(int)
    assert abs(read_one(encode(image, kind, **options), tmp_path) - expected).mean() < 4


def png16(values):
    return encode(Image.fromarray(values.astype(np.uint16)), "PNG")


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_grey_pictures_are_scaled_by_the_bits_they_use(tmp_path, bits):
    ramp = np.linspace(0, 1, 1024).reshape(32, 32)
    read = read_one(png16(ramp * (2**bits - 1)), tmp_path)
    assert read[..., 0] == pytest.approx(ramp * 255, abs=1)


def test_sixteen_bit_pgm_keeps_its_range(tmp_path):
    ramp = np.linspace(0, 65535, 1024).astype(">u2")
    read = read_one(b"P5 32 32 65535\n" + ramp.tobytes(), tmp_path)
    assert read[..., 0].ravel() == pytest.approx(ramp / 257, abs=0.5)


def floating(low, high):
    return encode(Image.fromarray(np.linspace(low, high, 1024, dtype="f").reshape(32, 32)), "TIFF")


def test_floating_point_pixels_are_read_from_zero_to_one(tmp_path):
    assert read_one(floating(0, 1), tmp_path)[..., 0].ravel()[::1023].tolist() == [0, 255]
    for low, high in ((0, 900), (-1, 1), (0, np.nan)):
        assert reason_of(floating(low, high), tmp_path) in (
            "floating-point pixels outside 0..1", "negative pixels"
        )  # fmt: skip


def test_dark_sixteen_bit_colours_are_not_read_as_black(tmp_path):
    """Pillow keeps the high byte only, which is almost nothing of a 12-bit picture."""
    rows = (np.asarray(scene()).astype(int) * 16).astype(">u2").reshape(32, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = (32).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*part) for part in ((b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    )
    assert "12 bits" in reason_of(png, tmp_path)


def chunk(name, content, crc=None):
    crc = zlib.crc32(name + content) if crc is None else crc
    return len(content).to_bytes(4, "big") + name + content + crc.to_bytes(4, "big")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "P bytes", "RGB key", "L key"])
def test_transparent_pixels_are_white(tmp_path, mode):
    """The left half is transparent, with black hidden underneath; the right half is grey 90."""
    alpha = np.repeat([[0] * 16 + [255] * 16], 32, axis=0).astype(np.uint8)
    values = np.where(alpha, 90, 0).astype(np.uint8)
    image, options = Image.fromarray(values), {}
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(Image.fromarray(alpha))
    elif mode.startswith("P"):
        image = Image.fromarray((values > 0).astype(np.uint8)).convert("P")
        image.putpalette([0, 0, 0, 90, 90, 90])
        options = {"transparency": b"\x00\xff" if "bytes" in mode else 0}
    else:
        image = image.convert(mode.split()[0])
        options = {"transparency": 0 if mode == "L key" else (0, 0, 0)}
    expected = np.where(alpha, 90, 255)[..., None].repeat(3, axis=-1)
    assert np.array_equal(read_one(encode(image, "PNG", **options), tmp_path), expected)


def test_half_transparent_is_mixed_with_white(tmp_path):
    thin = Image.new("RGBA", (40, 40), (0, 100, 200, 51))
    assert read_one(encode(thin, "PNG"), tmp_path)[0, 0] == pytest.approx([204, 224, 244], abs=1)


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
BAD_METADATA = {
    "exif garbage": ("JPEG", {"exif": b"Exif\0\0garbage"}, False),
    "exif points outside": ("JPEG", {"exif": b"Exif\0\0II*\0\xff\xff\0\0"}, False),
    "exif cut": ("JPEG", {"exif": EXIF + b"\x03\0" + ROTATED}, True),
    "exif rotated, bad link": ("JPEG", {"exif": EXIF + b"\1\0" + ROTATED + b"\xff\xff\0\0"}, True),
    "exif in png": ("PNG", {"exif": b"\0\x08\0\x02garbage"}, False),
    "colour profile": ("PNG", {"icc_profile": b"garbage"}, False),
    "colour profile in jpeg": ("JPEG", {"icc_profile": b"garbage"}, False),
    "xmp": ("WEBP", {"xmp": b"<x:xmpmeta", "lossless": True}, False),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_damaged_metadata_costs_no_pixel_and_a_usable_rotation_is_applied(tmp_path, case):
    kind, options, rotated = BAD_METADATA[case]
    expected = np.rot90(scene(), -1) if rotated else np.asarray(scene())
    assert abs(read_one(encode(scene(), kind, **options), tmp_path) - expected).mean() < 3


def test_png_with_a_damaged_comment_is_read(tmp_path):
    png = encode(scene(), "PNG")
    bad = (
        chunk(b"tEXt", b"Comment\0text", crc=1),
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7))),
    )
    for comment in bad:
        assert np.array_equal(read_one(png[:33] + comment + png[33:], tmp_path), scene())


def test_jpeg_that_lacks_only_its_end_marker_is_read(tmp_path):
    jpeg = encode(scene(), "JPEG")
    assert np.array_equal(read_one(jpeg[:-2], tmp_path), read_one(jpeg, tmp_path))


def test_bytes_after_the_end_change_nothing(tmp_path):
    for kind in ("JPEG", "PNG", "GIF"):
        content = encode(scene(), kind)
        assert np.array_equal(
            read_one(content + b"tail" * 99, tmp_path), read_one(content, tmp_path)
        )


def png_claiming(width, height):
    content = bytearray(encode(scene(size=(8, 8)), "PNG"))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


UNREADABLE = {
    "empty": (lambda: b"", "the file is empty"),
    "web page": (lambda: b"\n<!DOCTYPE html>", "a web page"),
    "noise": (lambda: np.random.default_rng(0).bytes(2000), "not an image of a supported kind"),
    "heic": (lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "convert it to JPEG"),
    "eps": (lambda: encode(scene(), "EPS"), "not an image of a supported kind"),  # Ghostscript
    "bomb": (lambda: png_claiming(20_000, 15_000), "300 megapixels; expected at most 200"),
    "no pixels": (lambda: png_claiming(0, 0), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_has_a_plain_reason(tmp_path, case):
    content, expected = UNREADABLE[case]
    reason = reason_of(content(), tmp_path)
    assert expected in reason
    assert len(reason) < 80


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "AVIF"])
def test_cut_pixels_are_damage(tmp_path, kind):
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
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
    assert Image.MAX_IMAGE_PIXELS is not None


def test_large_jpeg_decoded_small_looks_like_decoded_whole(tmp_path, monkeypatch):
    blur = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    content = encode(blur.resize((1500, 2000), Image.Resampling.BICUBIC), "JPEG")
    small = read_one(content, tmp_path)
    monkeypatch.setattr(pictures, "DRAFT", 10**6)
    assert abs(small - read_one(content, tmp_path)).max() <= 2


def test_unread_files_have_their_index_and_nothing_is_printed(tmp_path, capfd):
    files = [tmp_path / f"{i}.png" for i in range(9)]
    for i, file in enumerate(files[:8]):
        file.write_bytes(b"" if i in (2, 5) else encode(Image.new("RGB", (8, 8), (i, 0, 0)), "PNG"))
    images, unread = read_images(files, 32)
    assert images[:, 0, 0, 0].tolist() == [0, 1, 3, 4, 6, 7]
    assert unread == {
        2: "the file is empty", 5: "the file is empty", 8: "no such file or directory"
    }  # fmt: skip
    assert capfd.readouterr() == ("", "")


def test_frame_is_cut_off(tmp_path):
    scene(size=(36, 36)).save(tmp_path / "framed.png")
    images, _ = read_images([tmp_path / "framed.png"], 32, frame=2)
    assert np.array_equal(images[0], np.asarray(scene(size=(36, 36)))[2:-2, 2:-2])


# Finding files


def test_folders_are_searched_for_images_and_files_taken_as_they_are(tmp_path, monkeypatch):
    images = ["a.jpg", "b/c.PNG", "b/d/e.jfif", "b/f.webp", "g.tif", "h.heic"]
    others = [".hidden.png", ".cache/x.png", "__MACOSX/x.png", "@eaDir/x.png", "Thumbs.db",
              "notes.txt", "vector.eps", "page.pdf", "without_suffix"]  # fmt: skip
    for name in images + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    expected = [tmp_path / name for name in images]
    assert image_files([tmp_path]) == expected
    lone = tmp_path / "without_suffix"
    assert image_files([lone, tmp_path]) == [lone, *expected]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert image_files([Path("~/a.jpg"), Path("~/b")]) == expected[:4]


def test_links_are_followed_without_end_and_pipes_left_alone(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for path in (folder, elsewhere):
        path.mkdir()
        scene().save(path / "1.png")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    (elsewhere / "back").symlink_to(folder)
    (folder / "broken.png").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.png")  # opening it would wait for ever
    files = image_files([folder])
    assert files == [folder / "1.png", folder / "broken.png", folder / "linked" / "1.png"]
    assert read_images(files, 32)[1] == {1: "no such file or directory"}


def test_missing_paths_and_empty_folders_are_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".x.png").touch()
    for name, problem in (("absent.png", "no such file or folder"), ("empty", "no image file")):
        with pytest.raises(ValueError, match=problem) as caught:
            image_files([Path(name)])
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"plain name.png", "plain name.png"),
        ("猫é.png".encode(), "猫é.png"),
        (b"caf\xe9.png", "caf\\udce9.png"),
        (b"two\nlines.png", "two\\nlines.png"),
        (b"\x1b[31mred.png", "\\x1b[31mred.png"),
    ],
)
def test_printable_escapes_what_a_terminal_cannot_show(tmp_path, monkeypatch, name, shown):
    path = tmp_path / os.fsdecode(name)
    scene().save(path)
    assert read_images(image_files([tmp_path]), 32)[1] == {}
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    assert printable(path.name) == shown
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert printable(path.name).isascii()


def test_reading_pictures_imports_no_torch(tmp_path):
    code = "import sys, open_set_data; sys.exit(bool({'torch', 'torchvision'} & set(sys.modules)))"
    root = Path(pictures.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
