"""Image sets: splits of named sets and of folders, crops, classes, and what folders may hold."""

import hashlib
import shutil
import urllib.error
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

import open_set_data
import pictures
from open_set_data import (
    ImagesUnavailable,
    check_same_images,
    fingerprint,
    load_cifar100_test,
    load_known,
    load_unknown,
)
from pictures import ImageSet


def picture(seed, size=(64, 64)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def sides(data):
    return {
        image.tobytes(): name
        for name in ("train", "val", "test_known")
        for image in getattr(data, name).images
    }


def counts(data):
    return [len(split.labels) for split in data[1:4]]


def test_splits_share_no_image_and_keep_every_class(tmp_path):
    data = load_known("digits", tmp_path)
    assert sum(counts(data)) == len(sides(data)) == 1797
    for split in data[1:4]:
        assert set(split.labels) == set(range(10))
        assert split.images.shape[1:] == (16, 16, 1)
    assert len(data.test_unknown) == 0


def test_splits_are_the_same_every_time_and_at_every_size(tmp_path):
    first, second = load_known("digits", tmp_path), load_known("digits", tmp_path, image_size=32)
    assert fingerprint(first)["sha256"].startswith("36a8474d3488b6f6")
    assert np.array_equal(first.val.labels, second.val.labels)
    assert np.array_equal(second.val.images, pictures.fit_to(first.val.images, 32, 1))


def test_known_classes_follow_the_order_given_and_the_rest_is_unknown(tmp_path):
    test = load_known("digits", tmp_path, image_size=8).test_known
    data = load_known("digits", tmp_path, "7, 2 ,5", 8)
    assert data.classes == ("7", "2", "5")
    sevens = data.test_known.images[data.test_known.labels == 0]
    assert np.array_equal(sevens, test.images[test.labels == 7])
    assert np.array_equal(data.test_unknown, test.images[~np.isin(test.labels, [7, 2, 5])])
    assert set(data.train.labels) == set(data.val.labels) == {0, 1, 2}


def test_known_classes_that_cannot_be_are_refused_with_the_true_reason(tmp_path):
    with pytest.raises(ValueError, match="no class ten, 11; expected 0, 1, 2"):
        load_known("digits", tmp_path, "1,ten,11")
    with pytest.raises(ValueError, match="only 1; expected at least two classes"):
        load_known("digits", tmp_path, "1,1")


def test_unknown_name_is_refused_with_the_names_there_are(tmp_path):
    with pytest.raises(ValueError, match="'imagenet' is none of tiny-imagenet-crop, "):
        load_unknown("imagenet", tmp_path, 32)


@pytest.mark.parametrize("name", ["cifar100", "tiny-imagenet-crop", "isun", "textures"])
def test_missing_set_without_network_says_what_to_do(tmp_path, monkeypatch, name):
    refuse = Mock(side_effect=urllib.error.URLError("no network"))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(ImagesUnavailable, match="network, or put the unpacked files there"):
        load_unknown(name, tmp_path, 32)


@pytest.mark.parametrize("name", ["gaussian-noise", "uniform-noise"])
def test_noise_is_the_same_in_every_call(tmp_path, name):
    noise = load_unknown(name, tmp_path, 8)
    assert noise.shape == (10_000, 8, 8, 3)
    assert np.array_equal(noise, load_unknown(name, tmp_path, 8))
    assert len(np.unique(noise)) == 256


def test_cifar100_is_read_from_folders_where_torchvisions_files_are_not_there(tmp_path):
    for value, name in enumerate(["apple", "baby", "bear"]):
        folder = tmp_path / "cifar100" / "test" / name
        folder.mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (32, 32), (value, 0, 0)).save(folder / f"{i}.png")
    (tmp_path / "cifar100" / "test" / "apple" / "0.png").write_bytes(b"")
    images, labels = load_cifar100_test(tmp_path)
    assert images[:, 0, 0, 0].tolist() == labels.tolist() == [0, 1, 1, 2, 2]
    assert np.array_equal(load_unknown("cifar100", tmp_path, 32), images)


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
    for crop, file in zip(crops, sorted(folder.iterdir()), strict=True):
        whole = np.asarray(Image.open(file))
        windows = np.lib.stride_tricks.sliding_window_view(whole, (32, 32, 3))
        assert (windows[:, :, 0] == crop).all(axis=(2, 3, 4)).sum() == 1
    resized = load_unknown("tiny-imagenet-resize", tmp_path, 32)[4]
    assert np.array_equal(resized, Image.fromarray(whole).resize((32, 32), Image.BILINEAR))
    with pytest.raises(ValueError, match="patches of 96 pixels do not fit images of 64x64"):
        load_unknown("tiny-imagenet-crop", tmp_path, 96)


def test_crop_offsets_cover_both_axes_evenly():
    images = np.broadcast_to(np.stack(np.indices((40, 44)), axis=-1), (9000, 40, 44, 2))
    crops = open_set_data.random_crops(images, 32, np.random.default_rng(0))
    for axis, offsets in enumerate((9, 13)):
        drawn = np.bincount(crops[:, 0, 0, axis], minlength=offsets)
        assert drawn == pytest.approx([9000 / offsets] * offsets, rel=0.15)


def make_tiny_classes(folder):
    """TinyImageNet of two classes in its published layout; class i's images are all 100 + i."""
    root, annotations = folder / "tiny-imagenet-200", ""
    (root / "val" / "images").mkdir(parents=True)
    for label, name in enumerate(("n01", "n02")):
        (root / "train" / name / "images").mkdir(parents=True)
        for i in range(20):
            annotations += f"val_{name}_{i}.JPEG\t{name}\t0\t0\t62\t62\n"
            for file in (f"train/{name}/images/{name}_{i}", f"val/images/val_{name}_{i}"):
                Image.new("RGB", (64, 64), (100 + label,) * 3).save(root / f"{file}.JPEG", "PNG")
    (root / "val" / "val_annotations.txt").write_text(annotations)


def test_labels_of_tiny_imagenet_stay_with_their_images(tmp_path, capsys):
    make_tiny_classes(tmp_path)
    for file in ("train/n01/images/n01_0", "val/images/val_n01_3", "val/images/val_n02_0"):
        (tmp_path / "tiny-imagenet-200" / f"{file}.JPEG").write_bytes(b"")
    data = load_known("tiny-imagenet", tmp_path)
    for split in data[1:4]:
        assert (split.images[:, 0, 0, 0] == 100 + split.labels).all()
    assert counts(data) == [36, 3, 38]
    val = tmp_path / "tiny-imagenet-200" / "val"  # sorted as train is
    for file in list((val / "images").iterdir()):
        (folder := val / file.name.split("_")[1] / "images").mkdir(parents=True, exist_ok=True)
        file.rename(folder / file.name)
    (val / "val_annotations.txt").unlink()
    (val / "images").rmdir()
    assert fingerprint(load_known("tiny-imagenet", tmp_path)) == fingerprint(data)
    assert "tiny-imagenet: files not read: 2 unreadable (" in capsys.readouterr().err


def test_tiny_imagenet_is_read_from_the_zip_beside_what_is_there(tmp_path, monkeypatch):
    make_tiny_classes(tmp_path / "whole")
    archive = tmp_path / "tiny-imagenet-200.zip"
    shutil.make_archive(str(archive.with_suffix("")), "zip", tmp_path / "whole")
    make_tiny_imagenet(tmp_path)
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(open_set_data, "TINY_IMAGENET_MD5", md5)
    from_zip = load_known("tiny-imagenet", tmp_path)
    assert fingerprint(from_zip) == fingerprint(load_known("tiny-imagenet", tmp_path / "whole"))


def make_classes(root, names=("cat", "dog"), count=60, first=0):
    """Class folders of different pictures, count of each."""
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(first, first + count):
            picture(1000 * label + i, (8, 8)).save(root / name / f"{i}.png")
    return f"folder:{root}"


def test_class_folders_become_classes_with_a_fifth_each_for_val_and_test(tmp_path):
    data = load_known(make_classes(tmp_path, ("bus", "train"), count=500), tmp_path)
    assert data.classes == ("bus", "train")  # a class may be called like a split
    assert data.train.images.shape[1:] == (48, 48, 3)
    assert sum(counts(data)) == 1000
    assert counts(data) == pytest.approx([600, 200, 200], abs=60)


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
    assert fingerprint(first)["count"] == sum(counts(first)[:2])
    assert fingerprint(load_known(name, tmp_path, "dog,cat")) == fingerprint(first)
    turned = first._replace(train=ImageSet(first.train.images[::-1], first.train.labels[::-1]))
    assert fingerprint(turned) == (before := fingerprint(first))
    assert fingerprint(first._replace(classes=("dog", "cat"))) != before
    first.train.images[3, 0, 0, 0] ^= 1
    assert fingerprint(first) != before


def test_changed_classes_are_refused_and_changed_images_told(tmp_path, capsys):
    name = make_classes(tmp_path)
    data = load_known(name, tmp_path)
    checkpoint = {"known_classes": ["cat", "dog"], "images": fingerprint(data)}
    check_same_images(checkpoint, data)
    assert capsys.readouterr() == ("", "")
    make_classes(tmp_path, count=20, first=100)
    check_same_images(checkpoint, load_known(name, tmp_path))
    assert "images have changed since the network was trained" in capsys.readouterr().err
    (tmp_path / "dog").rename(tmp_path / "wolf")
    with pytest.raises(ValueError, match=r"\(dog is missing, wolf is new\); train again"):
        check_same_images(checkpoint, load_known(name, tmp_path))
    with pytest.raises(ValueError, match=r"\(their order has changed\)"):
        check_same_images({"known_classes": ["dog", "cat"]}, data)


def test_of_equal_images_one_is_kept_and_none_where_they_lie_in_two_classes(tmp_path, capsys):
    name = make_classes(tmp_path)
    whole = sides(load_known(name, tmp_path))
    for copy in ("0 (1).png", "0 (2).png"):
        shutil.copy(tmp_path / "cat" / "0.png", tmp_path / "cat" / copy)
    shutil.copy(tmp_path / "cat" / "9.png", tmp_path / "dog" / "copy.png")
    data = load_known(name, tmp_path)
    assert sum(counts(data)) == 119
    assert whole.items() > sides(data).items()
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path.name}: left out, as their images are in two classes: 2 files "
        "(cat/9.png, dog/copy.png)",
        f"{tmp_path.name}: duplicates left out: 2",
    ]


def test_what_is_not_read_is_counted_by_kind_in_one_line(tmp_path, capsys):
    name = make_classes(tmp_path)
    for file in ("cat/a.txt", "cat/b.txt", "dog/.hidden.png", "dog/Thumbs.db", "x.csv",
                 "cat/0.png", "dog/0.png", "dog/1.png", "dog/2.png"):  # fmt: skip
        (tmp_path / file).write_bytes(b"")
    shutil.copytree(tmp_path / "cat", tmp_path / ".ipynb_checkpoints")
    (tmp_path / "dog" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert load_known(name, tmp_path).classes == ("cat", "dog")
    empty = [f"{file}.png: the file is empty" for file in ("cat/0", "dog/0", "dog/1")]
    assert capsys.readouterr().err == (
        f"{tmp_path.name}: files not read: 4 unreadable ({', '.join(empty)}, ...), 2 .txt, "
        "1 .csv beside the class folders, 1 .heic (convert HEIC to JPEG)\n"
    )


def test_labels_stay_with_their_images_when_files_are_skipped(tmp_path, capsys):
    for label, name in enumerate(("cat", "cow.png", "dog")):
        (tmp_path / name).mkdir()
        for i in range(60):
            Image.new("RGB", (8, 8), (label, i, 0)).save(tmp_path / name / f"{i}.png")
        (tmp_path / name / f"{label}.png").write_bytes(b"")
    data = load_known(f"folder:{tmp_path}", tmp_path)
    for split in data[1:4]:
        assert split.images[:, 0, 0, 0].tolist() == split.labels.tolist()
    assert sum(counts(data)) == 177


def test_folder_is_expanded_scaled_and_its_classes_chosen(tmp_path, monkeypatch):
    make_classes(tmp_path / "photos", ("cat", "dog", "wolf"))
    monkeypatch.setenv("HOME", str(tmp_path))
    test = load_known("folder:~/photos", tmp_path, image_size=16).test_known
    data = load_known("folder:~/photos", tmp_path, "wolf, cat", image_size=16)
    assert data.classes == ("wolf", "cat")
    assert np.array_equal(data.test_unknown, test.images[test.labels == 1])


LAYOUTS = [  # folders in a data set, what is wrong, the folder to name instead
    (["train/cat", "train/dog", "val/cat"], "its sub-folders train, val are splits", "train"),
    (["Test/a", "Test/b", "Training_set/a", "Training_set/b"], "are splits", "Training_set"),
    (["images/cat", "images/dog"], "its only sub-folder is images", "images"),
    (["seg_train/a", "seg_train/b", "seg_test/a"], "seg_test, seg_train are splits", "seg_train"),
    (["train2017/a", "train2017/b", "test_images"], "test_images, train2017 are", "train2017"),
    (["cat"], "its only sub-folder is cat", None),
    ([".cache", "__MACOSX"], "it has no sub-folders", None),
]


@pytest.mark.parametrize(("folders", "problem", "better"), LAYOUTS)
def test_folders_that_are_no_classes_are_refused(tmp_path, folders, problem, better):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        picture(0).save(tmp_path / folder / "1.png")
    hint = f"; try --dataset folder:{tmp_path}/{better}" if better else ""
    with pytest.raises(ValueError, match=f"{problem}.*; expected .*, two or more{hint}$"):
        load_known(f"folder:{tmp_path}", tmp_path)


def test_classes_that_all_hold_the_same_folders_are_refused(tmp_path):
    for folder in ("cat/indoor", "cat/outdoor", "dog/indoor", "dog/outdoor"):
        (tmp_path / folder).mkdir(parents=True)
    problem = "cat, dog holds indoor, outdoor; expected .*; move the images up into the sub-folders"
    with pytest.raises(ValueError, match=problem):
        load_known(f"folder:{tmp_path}", tmp_path)


def test_two_kinds_of_train_are_classes(tmp_path):
    name = make_classes(tmp_path, ("freight train", "passenger train"))
    assert len(load_known(name, tmp_path).classes) == 2


def test_class_names_are_the_same_however_their_accents_are_stored(tmp_path):
    name = make_classes(tmp_path, ("Cafe\u0301", "dog"))
    assert load_known(name, tmp_path, "dog,Caf\u00e9").classes == ("dog", "Caf\u00e9")


def test_too_few_images_are_refused_by_class_name(tmp_path):
    name = make_classes(tmp_path)
    make_classes(tmp_path, ("wolf",), count=24, first=3000)
    shutil.copy(tmp_path / "wolf" / "3000.png", tmp_path / "wolf" / "again.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has 0, wolf has 24; each class needs 25 different"):
        load_known(name, tmp_path)
    data = load_known(name, tmp_path, "cat,dog")  # what stays unknown is only tested
    assert 0 < len(data.test_unknown) <= 24


def test_a_split_that_leaves_too_few_for_a_threshold_is_refused(tmp_path, monkeypatch):
    name = make_classes(tmp_path, count=30)
    monkeypatch.setattr(pictures, "SPLIT_AT", (0.1, 0.11))
    with pytest.raises(ValueError, match=r"validation images are too few: \d; add images until 10"):
        load_known(name, tmp_path)


def test_missing_folder_is_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}/absent: no such folder"):
        load_known("folder:absent", tmp_path)


def test_folder_of_unknown_images_is_read_whole_and_tells_what_it_left_out(tmp_path, capsys):
    name = f"folder:{tmp_path}"
    (tmp_path / "below").mkdir()
    (tmp_path / "cut.png").touch()
    (tmp_path / "notes.md").touch()
    with pytest.raises(ValueError, match="no readable image"):
        load_unknown(name, tmp_path, 16)
    line = f"files not read: 1 unreadable ({tmp_path.name}/cut.png: the file is empty), 1 .md\n"
    assert capsys.readouterr().err == f"{tmp_path.name}: {line}"
    picture(0, (50, 40)).save(tmp_path / "below" / "1.png")
    assert load_unknown(name, tmp_path, 16, channels=1).shape == (1, 16, 16, 1)
