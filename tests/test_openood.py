"""The OpenOOD benchmark: its lists, its sets, and what its figures mean."""

import json
from pathlib import Path

import numpy as np
import openood
import pytest
from PIL import Image

from pictures import ImageSet

LISTS = json.loads((Path(openood.__file__).parent / "openood_cifar10.json").read_text())


def test_lists_leave_9000_known_9000_and_7793_unknown_images():
    assert len({*range(10_000)} - {*LISTS["known_left_out"]}) == 9_000
    used = LISTS["cifar100_used"].values()
    assert sum(len({*ordinals} & {*range(1, 101)}) for ordinals in used) == 9_000
    assert len({*range(10_000)} - {*LISTS["tin_left_out"]}) == 7_793


@pytest.fixture
def small_sets(tmp_path, monkeypatch):
    """CIFAR-10 and CIFAR-100 with each image's position in its pixels, a few TinyImageNet files."""
    numbered = np.arange(10_000, dtype=np.uint16).view(np.uint8).reshape(-1, 1, 1, 2)
    known = ImageSet(numbered, np.zeros(10_000, np.int64))
    cifar100 = ImageSet(numbered, np.arange(10_000) % 100)
    monkeypatch.setattr(openood, "load_cifar100_test", lambda data_dir: cifar100)
    folder = tmp_path / "tiny-imagenet-200" / "val" / "images"
    folder.mkdir(parents=True)
    for number in (0, 1, LISTS["tin_left_out"][0]):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / f"val_{number}.JPEG", "PNG")
    return known, tmp_path


def positions(images):
    return images.images.reshape(len(images.labels), 2).copy().view(np.uint16)[:, 0]


def test_sets_are_those_of_the_lists(small_sets):
    known, folder = small_sets
    (folder / "cifar-100-python").mkdir()
    sets = openood.benchmark_sets(known, folder)
    assert list(sets) == ["known", "cifar100", "tiny-imagenet"]
    assert not {*positions(sets["known"])} & {*LISTS["known_left_out"]}
    first, used = next(iter(sorted(LISTS["cifar100_used"].items())))
    assert first == "apple"
    assert [p // 100 + 1 for p in positions(sets["cifar100"]) if p % 100 == 0] == used
    assert sorted(sets["tiny-imagenet"].images[:, 0, 0, 0]) == [0, 1]


def test_a_folder_of_cifar100_is_taken_whole_and_it_says_so(small_sets, capsys):
    assert len(openood.benchmark_sets(*small_sets)["cifar100"].labels) == 10_000
    assert "all 10,000 test images, where the benchmark takes 9,000" in capsys.readouterr().out


def test_each_fpr95_is_of_its_convention():
    known, unknown = np.arange(100.0), np.append(np.arange(95.0, 190), np.full(5, 3.5))
    figures = openood.measure({"known": known, "cifar100": unknown, "tiny-imagenet": known})
    of_cifar100 = figures["sets"]["cifar100"]
    assert of_cifar100["fpr95_known_positive"] == pytest.approx(5)  # 5 of 100 are at most 94
    assert of_cifar100["fpr95_unknown_positive"] == pytest.approx(5)  # 95..99 of 0..99 reach 95
    assert figures["sets"]["tiny-imagenet"]["auroc"] == 50
    assert figures["near_auroc"] == pytest.approx((of_cifar100["auroc"] + 50) / 2)
