"""Image sets: splits, archives made here in the published layout, folders, crops, bad files."""

import hashlib
import io
import tarfile
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import open_set_data
from open_set_data import (
    ImagesUnavailable,
    fit_to,
    image_files,
    load_known,
    load_unknown,
    read_images,
)

DATA = Path(__file__).parent.parent / "data"
with_cifar10 = pytest.mark.skipif(
    not (DATA / "cifar-10-batches-py").is_dir(), reason="CIFAR-10 is not under data/"
)
with_tiny_imagenet = pytest.mark.skipif(
    not (DATA / "tiny-imagenet-200").is_dir(), reason="TinyImageNet is not under data/"
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def picture(seed, size=(64, 64), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def picture_bytes(seed, size=(64, 64), kind="PNG"):
    stream = io.BytesIO()
    picture(seed, size).save(stream, kind)
    return stream.getvalue()


def rows(images):
    return {image.tobytes() for image in images}


def make_tar(path, names_and_bytes):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in names_and_bytes:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def make_tiny_imagenet(root, count=5):
    folder = root / "tiny-imagenet-200" / "test" / "images"
    folder.mkdir(parents=True)
    for i in range(count):
        picture(i).save(folder / f"test_{i}.JPEG", quality=95)
    return folder


def test_splits_share_no_image_and_keep_every_class(tmp_path):
    data = load_known("digits", tmp_path)
    splits = [data.train, data.val, data.test_known]
    assert sum(len(split.labels) for split in splits) == 1797
    for split in splits:
        assert set(split.labels) == set(range(10))
        assert split.images.shape[1:] == (32, 32, 1)
        assert split.images.dtype == np.uint8
    names = [rows(split.images) for split in splits]
    assert len(names[0] & names[1]) + len(names[1] & names[2]) + len(names[0] & names[2]) == 0
    assert len(data.test_unknown) == 0


def test_splits_are_the_same_every_time(tmp_path):
    first, second = load_known("digits", tmp_path), load_known("digits", tmp_path)
    assert np.array_equal(first.val.images, second.val.images)


def test_known_classes_follow_the_order_given_and_the_rest_is_unknown(tmp_path):
    everything = load_known("digits", tmp_path)
    data = load_known("digits", tmp_path, "7,2,5")
    assert data.classes == ("7", "2", "5")
    sevens = everything.test_known.images[everything.test_known.labels == 7]
    assert np.array_equal(data.test_known.images[data.test_known.labels == 0], sevens)
    unknown = everything.test_known.images[~np.isin(everything.test_known.labels, [7, 2, 5])]
    assert np.array_equal(data.test_unknown, unknown)
    assert set(data.train.labels) == set(data.val.labels) == {0, 1, 2}


@pytest.mark.parametrize("bad", ["ten", "11,1", "1", "1,1"])
def test_bad_known_classes_are_refused(tmp_path, bad):
    with pytest.raises(ValueError, match="known class"):
        load_known("digits", tmp_path, bad)


@pytest.mark.parametrize("load", [load_known, lambda *a: load_unknown(*a, 32)])
def test_unknown_name_is_refused_with_the_names_there_are(tmp_path, load):
    with pytest.raises(ValueError, match="svhn, "):
        load("imagenet-21k", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "svhn", "mnist", "tiny-imagenet"])
def test_missing_known_set_without_network_says_what_to_do(tmp_path, name):
    with pytest.raises(ImagesUnavailable, match="put the files there"):
        load_known(name, tmp_path)


@pytest.mark.parametrize(
    "name", ["tiny-imagenet-crop", "lsun-crop", "isun", "textures", "cifar100"]
)
def test_missing_unknown_set_without_network_says_what_to_do(tmp_path, name):
    with pytest.raises(ImagesUnavailable, match="put the files there"):
        load_unknown(name, tmp_path, 32)


def test_tiny_imagenet_crops_are_patches_from_a_fixed_seed(tmp_path):
    folder = make_tiny_imagenet(tmp_path)
    crops = load_unknown("tiny-imagenet-crop", tmp_path, 32)
    assert crops.shape == (5, 32, 32, 3)
    assert np.array_equal(crops, load_unknown("tiny-imagenet-crop", tmp_path, 32))
    assert not np.array_equal(crops, load_unknown("tiny-imagenet-crop", tmp_path, 32, seed=1))
    for crop, file in zip(crops, sorted(folder.iterdir()), strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(
            np.asarray(Image.open(file)), (32, 32, 3)
        )
        assert (windows[:, :, 0] == crop).all(axis=(2, 3, 4)).sum() == 1


def test_crop_offsets_cover_both_axes_evenly():
    rows_and_columns = np.stack(np.indices((40, 44)), axis=-1)
    images = np.broadcast_to(rows_and_columns, (9000, 40, 44, 2))
    crops = open_set_data._random_crops(images, 32, np.random.default_rng(0))
    for axis, offsets in enumerate((9, 13)):
        counts = np.bincount(crops[:, 0, 0, axis])
        assert len(counts) == offsets
        assert counts == pytest.approx(9000 / offsets, rel=0.15)
    assert abs(np.corrcoef(crops[:, 0, 0].T)[0, 1]) < 0.05


def test_tiny_imagenet_resize_is_antialiased(tmp_path):
    folder = make_tiny_imagenet(tmp_path)
    images = load_unknown("tiny-imagenet-resize", tmp_path, 32)
    first = Image.open(sorted(folder.iterdir())[0])
    assert np.array_equal(images[0], first.resize((32, 32), Image.Resampling.BILINEAR))
    assert (
        images.std() < 0.7 * np.asarray(first).std()
    )  # a filter averages noise, sampling keeps it


def test_tiny_imagenet_is_read_from_the_zip_too(tmp_path, monkeypatch):
    folder = make_tiny_imagenet(tmp_path / "unpacked")
    path = tmp_path / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"tiny-imagenet-200/test/images/{file.name}")
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(open_set_data, "TINY_IMAGENET_MD5", md5)
    from_folder = load_unknown("tiny-imagenet-crop", tmp_path / "unpacked", 32)
    assert np.array_equal(load_unknown("tiny-imagenet-crop", tmp_path, 32), from_folder)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ImagesUnavailable, match="is not the published file"):
        load_unknown("tiny-imagenet-crop", tmp_path, 32)


@pytest.mark.parametrize("name", ["tiny-imagenet-crop", "lsun-crop", "lsun-resize", "isun"])
def test_odin_archives_are_checked_and_lose_their_frame(tmp_path, monkeypatch, name):
    archive, _, folder, frame, link = open_set_data.ODIN_ARCHIVES[name]
    size = 32 + 2 * frame
    contents = [(f"{folder}/{i}.png", picture_bytes(i, (size, size))) for i in range(3)]
    md5 = make_tar(tmp_path / archive, contents)
    known = (archive, md5, folder, frame, link)
    monkeypatch.setitem(open_set_data.ODIN_ARCHIVES, name, known)
    images = load_unknown(name, tmp_path, 32)
    whole = np.asarray(picture(1, (size, size)))
    assert np.array_equal(images[1], whole[frame : size - frame, frame : size - frame])


def test_web_page_in_place_of_an_archive_is_refused(tmp_path):
    (tmp_path / "LSUN.tar.gz").write_text("<!DOCTYPE html>")
    with pytest.raises(ImagesUnavailable):
        load_unknown("lsun-crop", tmp_path, 32)


@pytest.mark.parametrize("name", ["gaussian-noise", "uniform-noise"])
def test_noise_comes_from_the_seed(tmp_path, name):
    first = load_unknown(name, tmp_path, 16)
    assert first.shape == (10_000, 16, 16, 3)
    assert np.array_equal(first, load_unknown(name, tmp_path, 16))
    assert not np.array_equal(first, load_unknown(name, tmp_path, 16, seed=1))


def test_folder_of_any_images_is_scaled_and_bad_files_are_skipped(tmp_path, capsys):
    for i, mode in enumerate(["RGB", "L", "P", "CMYK"]):
        picture(i, (50, 40), mode).save(tmp_path / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}")
    picture(9).convert("RGBA").save(tmp_path / "alpha.png")
    (tmp_path / "zero.png").touch()
    (tmp_path / "cut.png").write_bytes(picture_bytes(1)[:200])
    (tmp_path / "notes.txt").write_text("not an image")
    images = load_unknown(f"folder:{tmp_path}", tmp_path, 32)
    assert images.shape == (5, 32, 32, 3)
    assert capsys.readouterr().err.count("skipped") == 2


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated a quarter turn clockwise
    picture(0, (32, 32)).save(tmp_path / "turned.png", exif=exif)
    images, _ = read_images([tmp_path / "turned.png"], 32)
    assert np.array_equal(images[0], np.rot90(np.asarray(picture(0, (32, 32))), -1))


def test_nothing_readable_is_one_clear_error(tmp_path):
    (tmp_path / "zero.png").touch()
    with pytest.raises(ValueError, match="none of 1 files is a readable image"):
        read_images([tmp_path / "zero.png"], 32)
    with pytest.raises(ValueError, match="no such file or folder"):
        image_files([tmp_path / "absent.png"])
    with pytest.raises(ValueError, match="no image file found"):
        image_files([DATA.parent / "tests"])


def test_class_folders_become_classes(tmp_path):
    for label, name in enumerate(["cat", "dog"]):
        (tmp_path / name).mkdir()
        for i in range(20):
            picture(100 * label + i).save(tmp_path / name / f"{i}.png")
    data = load_known(f"folder:{tmp_path}", tmp_path)
    assert data.classes == ("cat", "dog")
    assert [len(split.labels) for split in data[1:4]] == [30, 2, 8]
    with pytest.raises(ValueError, match="one sub-folder of images a class"):
        load_known(f"folder:{tmp_path / 'cat'}", tmp_path)


def test_fit_to_changes_size_and_channels():
    colour = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    grey = fit_to(colour, 64, 1)
    assert grey[..., 0] == pytest.approx(colour.mean(axis=-1), abs=0.5)
    assert fit_to(grey, 32, 3).shape == (2, 32, 32, 3)


@with_cifar10
def test_cifar10_splits():
    data = load_known("cifar10", DATA)
    assert [len(split.labels) for split in data[1:4]] == [47_500, 2_500, 10_000]
    assert np.bincount(data.val.labels).tolist() == [250] * 10
    assert data.classes[3] == "cat"
    assert not rows(data.val.images) & rows(data.train.images[:20_000])


@with_tiny_imagenet
def test_tiny_imagenet_is_ten_thousand_crops():
    assert load_unknown("tiny-imagenet-crop", DATA, 32).shape == (10_000, 32, 32, 3)
