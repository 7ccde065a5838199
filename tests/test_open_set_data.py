"""Image sets: splits of named sets and of folders, crops, classes, and what folders may hold."""

import hashlib
import shutil
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import open_set_data
import pictures
from open_set_data import (
    ImageSet,
    ImagesUnavailable,
    check_same_images,
    fingerprint,
    load_cifar100_test,
    load_known,
    load_unknown,
)

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def picture(seed, size=(64, 64)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def rows(images):
    return {image.tobytes() for image in images}


# Named sets


def test_splits_share_no_image_and_keep_every_class(tmp_path):
    data = load_known("digits", tmp_path)
    splits = [data.train, data.val, data.test_known]
    assert sum(len(split.labels) for split in splits) == 1797
    for split in splits:
        assert set(split.labels) == set(range(10))
        assert split.images.shape[1:] == (16, 16, 1)
        assert split.images.dtype == np.uint8
    names = [rows(split.images) for split in splits]
    assert len(names[0] & names[1]) + len(names[1] & names[2]) + len(names[0] & names[2]) == 0
    assert len(data.test_unknown) == 0


def test_splits_are_the_same_every_time_and_at_every_size(tmp_path):
    first, second = load_known("digits", tmp_path), load_known("digits", tmp_path, image_size=32)
    assert fingerprint(first) == fingerprint(load_known("digits", tmp_path))
    assert np.array_equal(first.val.labels, second.val.labels)
    assert np.array_equal(second.val.images, pictures.fit_to(first.val.images, 32, 1))


def test_known_classes_follow_the_order_given_and_the_rest_is_unknown(tmp_path):
    everything = load_known("digits", tmp_path)
    data = load_known("digits", tmp_path, "7, 2 ,5", 8)
    assert data.classes == ("7", "2", "5")
    test = everything.test_known
    small = pictures.fit_to(test.images, 8, 1)
    sevens = data.test_known.images[data.test_known.labels == 0]
    assert np.array_equal(sevens, small[test.labels == 7])
    assert np.array_equal(data.test_unknown, small[~np.isin(test.labels, [7, 2, 5])])
    assert set(data.train.labels) == set(data.val.labels) == {0, 1, 2}


@pytest.mark.parametrize(
    ("classes", "problem"),
    [
        ("1,ten,11", "no class ten, 11; expected 0, 1, 2"),
        ("1", "only 1; expected at least two classes"),
        ("1,2,1", "1 more than once"),
    ],
)
def test_known_classes_that_cannot_be_are_refused_with_the_true_reason(tmp_path, classes, problem):
    with pytest.raises(ValueError, match=problem):
        load_known("digits", tmp_path, classes)


@pytest.mark.parametrize("load", [load_known, lambda *a: load_unknown(*a, 32)])
def test_unknown_name_is_refused_with_the_names_there_are(tmp_path, load):
    with pytest.raises(ValueError, match="svhn, "):
        load("imagenet-21k", tmp_path)


@pytest.mark.parametrize(
    "name", ["cifar10", "tiny-imagenet", "tiny-imagenet-crop", "isun", "textures", "cifar100"]
)
def test_missing_set_without_network_says_what_to_do(tmp_path, name):
    load = load_known if name in open_set_data.KNOWN_SETS else lambda *a: load_unknown(*a, 32)
    with pytest.raises(ImagesUnavailable, match="; connect to the network or put the files there"):
        load(name, tmp_path)


@pytest.mark.parametrize("name", ["gaussian-noise", "uniform-noise"])
def test_noise_comes_from_the_seed(tmp_path, name):
    first = load_unknown(name, tmp_path, 8)
    assert first.shape == (10_000, 8, 8, 3)
    assert np.array_equal(first, load_unknown(name, tmp_path, 8))
    assert not np.array_equal(first, load_unknown(name, tmp_path, 8, seed=1))


def test_cifar100_is_read_from_folders_where_torchvisions_files_are_not_there(
    tmp_path, monkeypatch
):
    for value, name in enumerate(["apple", "baby", "bear"]):
        (tmp_path / "cifar100" / "test" / name).mkdir(parents=True)
        for i in range(2):
            file = tmp_path / "cifar100" / "test" / name / f"{i}.png"
            Image.new("RGB", (32, 32), (value, 0, 0)).save(file)
    (tmp_path / "cifar100" / "test" / "apple" / "0.png").write_bytes(b"")
    images, labels = load_cifar100_test(tmp_path)
    assert images[:, 0, 0, 0].tolist() == labels.tolist() == [0, 1, 1, 2, 2]
    assert np.array_equal(load_unknown("cifar100", tmp_path, 32), images)
    (tmp_path / "cifar-100-python").mkdir()
    theirs = ImageSet(images[:1], labels[:1])
    monkeypatch.setattr(open_set_data, "_read_torchvision", lambda *args: ([], theirs))
    assert load_cifar100_test(tmp_path) is theirs


def make_tiny_imagenet(root, count=5):
    folder = root / "tiny-imagenet-200" / "test" / "images"
    folder.mkdir(parents=True)
    for i in range(count):
        picture(i).save(folder / f"test_{i}.JPEG", quality=95)
    return folder


def test_tiny_imagenet_crops_are_patches_from_a_fixed_seed(tmp_path):
    folder = make_tiny_imagenet(tmp_path)
    crops = load_unknown("tiny-imagenet-crop", tmp_path, 32)
    assert crops.shape == (5, 32, 32, 3)
    assert np.array_equal(crops, load_unknown("tiny-imagenet-crop", tmp_path, 32))
    assert not np.array_equal(crops, load_unknown("tiny-imagenet-crop", tmp_path, 32, seed=1))
    for crop, file in zip(crops, sorted(folder.iterdir()), strict=True):
        whole = np.asarray(Image.open(file))
        windows = np.lib.stride_tricks.sliding_window_view(whole, (32, 32, 3))
        assert (windows[:, :, 0] == crop).all(axis=(2, 3, 4)).sum() == 1
    with pytest.raises(ValueError, match="patches of 96 pixels do not fit images of 64x64"):
        load_unknown("tiny-imagenet-crop", tmp_path, 96)


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
    assert images.std() < 0.7 * np.asarray(first).std()  # a filter averages noise


def make_tiny_classes(folder, bad=()):
    """TinyImageNet of two classes in its published layout; class i's images are all 100 + i."""
    root = folder / "tiny-imagenet-200"
    annotations = []
    for label, name in enumerate(("n01", "n02")):
        (root / "train" / name / "images").mkdir(parents=True)
        (root / "val" / "images").mkdir(parents=True, exist_ok=True)
        for i in range(20):
            files = [root / "train" / name / "images" / f"{name}_{i}.JPEG"]
            files.append(root / "val" / "images" / f"val_{name}_{i}.JPEG")
            annotations.append(f"{files[1].name}\t{name}\t0\t0\t62\t62")
            for file in files:
                Image.new("RGB", (64, 64), (100 + label,) * 3).save(file, "PNG")
                if i in bad:
                    file.write_bytes(file.read_bytes()[:50])
    (root / "val" / "val_annotations.txt").write_text("\n".join(annotations))


def test_labels_of_tiny_imagenet_stay_with_their_images(tmp_path, capsys):
    make_tiny_classes(tmp_path, bad=(0, 3))
    data = load_known("tiny-imagenet", tmp_path)
    for split in data[1:4]:
        assert (split.images[:, 0, 0, 0] == 100 + split.labels).all()
    assert [len(split.labels) for split in data[1:4]] == [34, 2, 36]
    assert capsys.readouterr().err.count("tiny-imagenet: files not read: 4 unreadable (") == 2


def test_tiny_imagenet_is_read_from_the_zip_beside_what_is_there(tmp_path, monkeypatch):
    make_tiny_classes(tmp_path / "whole")
    archive = tmp_path / "tiny-imagenet-200.zip"
    shutil.make_archive(str(archive.with_suffix("")), "zip", tmp_path / "whole")
    make_tiny_imagenet(tmp_path)
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(open_set_data, "TINY_IMAGENET_MD5", md5)
    from_zip = load_known("tiny-imagenet", tmp_path)
    assert fingerprint(from_zip) == fingerprint(load_known("tiny-imagenet", tmp_path / "whole"))
    with zipfile.ZipFile(archive, "a") as changed:
        changed.writestr("more", "")
    with pytest.raises(ImagesUnavailable, match="is not the published file"):
        load_known("tiny-imagenet", tmp_path)


# Folders


def make_classes(root, names=("cat", "dog"), count=60, first=0):
    """Class folders of different pictures, count of each."""
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(first, first + count):
            picture(1000 * label + i, (8, 8)).save(root / name / f"{i}.png")
    return f"folder:{root}"


def sides(data):
    return {
        image.tobytes(): name
        for name in ("train", "val", "test_known")
        for image in getattr(data, name).images
    }


def test_class_folders_become_classes_with_a_fifth_each_for_val_and_test(tmp_path):
    data = load_known(make_classes(tmp_path, count=500), tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.train.images.shape[1:] == (64, 64, 3)
    counts = [len(split.labels) for split in data[1:4]]
    assert sum(counts) == 1000
    assert counts == pytest.approx([600, 200, 200], abs=60)
    pixels = {
        pictures.fit_to(np.asarray(picture(1000 * label + i, (8, 8)))[None], 64, 3).tobytes(): label
        for label in range(2)
        for i in range(500)
    }
    for images, labels in data[1:4]:
        assert [pixels[image.tobytes()] for image in images] == labels.tolist()


def test_an_image_keeps_its_side_when_others_come_or_go_and_names_change(tmp_path):
    name = make_classes(tmp_path)
    before = sides(load_known(name, tmp_path))
    make_classes(tmp_path, count=20, first=100)
    for i in range(5):
        (tmp_path / "cat" / f"{i}.png").unlink()
        (tmp_path / "dog" / f"{i}.png").rename(tmp_path / "dog" / f"z{i}.png")
    (tmp_path / "dog").rename(tmp_path / "a dog")
    after = sides(load_known(name, tmp_path))
    assert len(before.keys() & after.keys()) == 115
    assert all(after[image] == before[image] for image in before.keys() & after.keys())


def test_fingerprint_tells_images_and_classes_in_any_order(tmp_path):
    name = make_classes(tmp_path)
    first = load_known(name, tmp_path)
    assert fingerprint(first)["count"] == len(first.train.labels) + len(first.val.labels)
    turned = first._replace(train=ImageSet(first.train.images[::-1], first.train.labels[::-1]))
    assert fingerprint(turned) == fingerprint(first)
    assert fingerprint(load_known(name, tmp_path, "dog,cat")) == fingerprint(first)
    swapped = first._replace(classes=("dog", "cat"))
    assert fingerprint(swapped) != fingerprint(first)
    changed = first.train.images.copy()
    changed[3, 0, 0, 0] ^= 1
    other = first._replace(train=ImageSet(changed, first.train.labels))
    assert fingerprint(other) != fingerprint(first)


def test_changed_classes_are_refused_and_changed_images_told(tmp_path, capsys):
    name = make_classes(tmp_path)
    data = load_known(name, tmp_path)
    checkpoint = {"known_classes": ["cat", "dog"], "images": fingerprint(data)}
    check_same_images(checkpoint, data)
    check_same_images({"known_classes": ["cat", "dog"]}, data)
    assert capsys.readouterr() == ("", "")
    make_classes(tmp_path, count=20, first=100)
    check_same_images(checkpoint, load_known(name, tmp_path))
    assert "images have changed since the network was trained" in capsys.readouterr().err
    (tmp_path / "dog").rename(tmp_path / "wolf")
    with pytest.raises(
        ValueError, match="trained on the classes cat, dog; the data set has cat, wolf"
    ):
        check_same_images(checkpoint, load_known(name, tmp_path))


def test_of_equal_images_one_is_kept_and_none_where_they_lie_in_two_classes(tmp_path, capsys):
    name = make_classes(tmp_path)
    whole = sides(load_known(name, tmp_path))
    for i in range(3):
        shutil.copy(tmp_path / "cat" / f"{i}.png", tmp_path / "cat" / f"{i} (1).png")
    shutil.copy(tmp_path / "cat" / "9.png", tmp_path / "dog" / "copy.png")
    data = load_known(name, tmp_path)
    assert sum(len(split.labels) for split in data[1:4]) == 119
    assert whole.items() > sides(data).items()
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path.name}: left out, as in two classes: 1 (cat/9.png and dog/copy.png)",
        f"{tmp_path.name}: duplicates left out: 3",
    ]


def test_what_is_not_read_is_counted_by_kind_in_one_line(tmp_path, capsys):
    name = make_classes(tmp_path)
    for file in ("cat/a.txt", "cat/b.txt", "dog/.hidden.png", "dog/Thumbs.db", "x.csv",
                 "cat/0.png", "dog/0.png", "dog/1.png", "dog/2.png"):  # fmt: skip
        (tmp_path / file).write_bytes(b"")
    for hidden in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        shutil.copytree(tmp_path / "cat", tmp_path / hidden)
    (tmp_path / "dog" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert load_known(name, tmp_path).classes == ("cat", "dog")
    empty = [f"{i}.png: the file is empty" for i in (0, 0, 1)]
    assert capsys.readouterr().err == (
        f"{tmp_path.name}: files not read: 4 unreadable ({', '.join(empty)}, ...), 2 .txt, "
        "1 .csv beside the class folders, 1 .heic (convert HEIC to JPEG)\n"
    )


def test_labels_stay_with_their_images_when_files_are_skipped(tmp_path, capsys):
    for label, name in enumerate(("cat", "cow.png", "dog")):
        (tmp_path / name).mkdir()
        for i in range(60):
            Image.new("RGB", (8, 8), (label, i, 0)).save(tmp_path / name / f"{i}.png")
    for name in ("cat/0.png", "dog/7.png", "dog/19.png"):
        (tmp_path / name).write_bytes(b"")
    data = load_known(f"folder:{tmp_path}", tmp_path)
    for split in data[1:4]:
        assert split.images[:, 0, 0, 0].tolist() == split.labels.tolist()
    assert sum(len(split.labels) for split in data[1:4]) == 177


def test_nested_and_linked_sub_folders_belong_to_their_class(tmp_path):
    make_classes(tmp_path / "photos")
    (tmp_path / "photos" / "cat" / "more").mkdir()
    (tmp_path / "photos" / "cat" / "0.png").rename(tmp_path / "photos" / "cat" / "more" / "0.png")
    make_classes(tmp_path / "elsewhere", ("wolf",), first=5000)
    (tmp_path / "photos" / "wolf").symlink_to(tmp_path / "elsewhere" / "wolf")
    data = load_known(f"folder:{tmp_path / 'photos'}", tmp_path)
    assert data.classes == ("cat", "dog", "wolf")
    assert sum(len(split.labels) for split in data[1:4]) == 180


def test_folder_is_expanded_scaled_and_its_classes_chosen(tmp_path, monkeypatch):
    make_classes(tmp_path / "photos", ("cat", "dog", "wolf"))
    monkeypatch.setenv("HOME", str(tmp_path))
    everything = load_known("folder:~/photos", tmp_path, image_size=16)
    data = load_known("folder:~/photos", tmp_path, "wolf, cat", image_size=16)
    assert data.classes == ("wolf", "cat")
    assert data.train.images.shape[1:] == (16, 16, 3)
    test = everything.test_known
    assert np.array_equal(data.test_unknown, test.images[test.labels == 1])
    wolves = data.test_known.images[data.test_known.labels == 0]
    assert np.array_equal(wolves, test.images[test.labels == 2])


LAYOUTS = [  # folders in a data set, what is wrong, the folder to name instead
    (["train/cat", "train/dog", "val/cat"], "its sub-folders train, val are splits", "train"),
    (["Test", "Training_set"], "are splits, not classes", "Training_set"),
    (["images/cat", "images/dog"], "its only sub-folder is images", "images"),
    (["day1/cat", "day1/dog", "day2/cat", "day2/dog"], "day1, day2 holds cat, dog", "day1"),
    (["cat"], "its only sub-folder is cat", None),
    ([], "it has no sub-folders", None),
    ([".cache", "__MACOSX"], "it has no sub-folders", None),
]


@pytest.mark.parametrize(("folders", "problem", "better"), LAYOUTS)
def test_folders_that_are_no_classes_are_refused_with_the_true_reason(
    tmp_path, folders, problem, better
):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        picture(0).save(tmp_path / folder / "1.png")
    with pytest.raises(ValueError, match=problem) as caught:
        load_known(f"folder:{tmp_path}", tmp_path)
    assert "expected one sub-folder of images per class" in str(caught.value)
    hint = f"; try --dataset folder:{tmp_path}/{better}" if better else "two or more"
    assert str(caught.value).endswith(hint)


def test_a_class_may_be_called_like_a_split(tmp_path):
    assert load_known(make_classes(tmp_path, ("bus", "train")), tmp_path).classes == (
        "bus",
        "train",
    )


def test_too_few_images_are_refused_by_class_name(tmp_path):
    name = make_classes(tmp_path)
    make_classes(tmp_path, ("wolf",), count=24, first=3000)
    shutil.copy(tmp_path / "wolf" / "3000.png", tmp_path / "wolf" / "again.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".DS_Store").touch()
    with pytest.raises(ValueError, match="empty has 0, wolf has 24; each class needs 25 different"):
        load_known(name, tmp_path)


def test_a_split_that_leaves_too_few_is_refused(tmp_path, monkeypatch):
    name = make_classes(tmp_path, count=30)
    monkeypatch.setattr(pictures, "SPLIT_AT", (0.1, 0.2))
    with pytest.raises(ValueError, match=r"\d validation images in all; expected 10 and 10"):
        load_known(name, tmp_path)
    monkeypatch.setattr(pictures, "SPLIT_AT", (0.1, 0.9))
    with pytest.raises(ValueError, match=r"leaves \d training images of (cat|dog) and"):
        load_known(name, tmp_path)


def test_missing_folder_is_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in (load_known, lambda *args: load_unknown(*args, 32)):
        with pytest.raises(ValueError, match="no such folder") as caught:
            load("folder:absent", tmp_path)
        assert str(tmp_path / "absent") in str(caught.value)


def test_folder_of_unknown_images_is_read_whole_and_tells_what_it_left_out(tmp_path, capsys):
    for i in range(3):
        (tmp_path / f"{i}").mkdir()
        picture(i, (50, 40)).save(tmp_path / f"{i}" / "1.png")
    (tmp_path / "0" / "cut.png").touch()
    (tmp_path / "0" / "notes.md").touch()
    assert load_unknown(f"folder:{tmp_path}", tmp_path, 16, channels=1).shape == (3, 16, 16, 1)
    line = "files not read: 1 unreadable (cut.png: the file is empty), 1 .md\n"
    assert capsys.readouterr().err == f"{tmp_path.name}: {line}"
    for i in range(3):
        (tmp_path / f"{i}" / "1.png").unlink()
    with pytest.raises(ValueError, match="no readable image"):
        load_unknown(f"folder:{tmp_path}", tmp_path, 16)


@pytest.mark.skipif(
    not (DATA / "cifar-10-batches-py").is_dir(), reason="CIFAR-10 is not under data/"
)
def test_cifar10_splits_are_the_recorded_ones():
    data = load_known("cifar10", DATA)
    assert [len(split.labels) for split in data[1:4]] == [47_500, 2_500, 10_000]
    assert np.bincount(data.val.labels).tolist() == [250] * 10
    assert data.classes[3] == "cat"
    assert pictures.hash_of(data.val.images).hex() == "7a337bcdb9e3682b8965302208560d3a"
