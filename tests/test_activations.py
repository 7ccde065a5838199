"""Extraction, its cache, the arrays shipped with the checkpoint, and the device it all runs on."""

from pathlib import Path

import numpy as np
import pytest
import torch

import activations
from activations import (
    SHIPPED_STEPS,
    Activations,
    autocast,
    cache_key,
    cached,
    extract,
    load_shipped,
    number_format,
    prepare_device,
    write_shipped,
)
from models import DHRNet
from open_set_data import ImagesUnavailable
from pictures import ImageSet

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def make_images(count=7):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 16, 16, 1), dtype=np.uint8)
    return ImageSet(pixels, np.arange(count) % 3)


def make_activations(seed=0, count=5):
    rng = np.random.default_rng(seed)
    arrays = [rng.random((count, width), dtype=np.float32) for width in (3, 256, 96, 96)]
    return Activations(np.arange(count) % 3, *arrays)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = DHRNet(3, 1, 16)
    network.fit_input_statistics(torch.from_numpy(make_images(50).images).permute(0, 3, 1, 2))
    return network.eval()


def equal(first, second):
    return all(map(np.array_equal, first, second))


def test_vectors_are_logits_and_the_latents_asked_for():
    images = make_activations()
    assert np.array_equal(images.vectors("none"), images.logits)
    for latents, pooled in (("max", images.latents_max), ("avg", images.latents_avg)):
        assert np.array_equal(images.vectors(latents), np.hstack([images.logits, pooled]))


# Extraction


def test_extraction_is_what_the_network_says_of_each_image(network, monkeypatch):
    monkeypatch.setattr(activations, "autocast", lambda d: torch.autocast("cpu", enabled=False))
    images = make_images()
    got = extract(network, images, batch_size=3)
    for i, pixels in enumerate(images.images):
        alone = network.activations(torch.from_numpy(pixels[None]).permute(0, 3, 1, 2))
        for array, part in zip(got[1:], alone, strict=True):
            assert array.dtype == np.float32
            assert array[i] == pytest.approx(part[0].detach().numpy(), abs=1e-5)
    assert np.array_equal(got.labels, images.labels)


@pytest.mark.parametrize(
    ("count", "batch_size", "passes"), [(1, 250, [1]), (7, 3, [3, 3, 1]), (0, 250, [])]
)
def test_one_image_costs_one_image(network, count, batch_size, passes):
    seen = []
    hook = network.stem.register_forward_pre_hook(
        lambda module, inputs: seen.append(len(inputs[0]))
    )
    got = extract(network, make_images(count), batch_size)
    hook.remove()
    assert seen == [size for size in passes for _ in range(2)]  # the image and its mirror image
    assert [array.shape for array in got] == [
        (count,), (count, 3), (count, 256), (count, 96), (count, 96)
    ]  # fmt: skip


def test_device_that_is_not_there_is_named():
    assert prepare_device("cpu") == CPU
    assert prepare_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="device 'cuda:99' is not available here"):
        prepare_device("cuda:99")
    with pytest.raises(ValueError, match="device 'nonsense' is not available here"):
        prepare_device("nonsense")


@pytest.mark.parametrize("has_units", [True, False])
def test_bfloat16_is_used_where_the_processor_has_units_for_it(monkeypatch, has_units):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_units)
    with autocast(CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if has_units else torch.float32)
    assert number_format(CPU) == str(product.dtype).removeprefix("torch.")


# The cache


def test_cache_spares_the_second_extraction(tmp_path):
    path = tmp_path / "cache" / "key.npz"
    assert equal(cached(path, make_activations), make_activations())
    assert equal(cached(path, make=None), make_activations())


def test_damaged_cache_is_extracted_again(tmp_path, capsys):
    path = tmp_path / "key.npz"
    cached(path, make_activations)
    whole = path.read_bytes()
    for damaged in (b"", whole[:300] + bytes(9) + whole[309:]):
        path.write_bytes(damaged)
        assert equal(cached(path, lambda: make_activations(seed=1)), make_activations(seed=1))
        [line] = capsys.readouterr().err.splitlines()
        assert "cannot be read (" in line
    assert equal(cached(path, make=None), make_activations(seed=1))


def test_cache_that_cannot_be_stored_does_not_end_the_run(tmp_path, capsys):
    (tmp_path / "cache").touch()  # a file where the folder should be
    assert equal(cached(tmp_path / "cache" / "key.npz", make_activations), make_activations())
    assert "could not be stored" in capsys.readouterr().err


def test_cache_key_follows_network_pixels_labels_and_arithmetic(monkeypatch):
    images = make_images()
    others = [
        ImageSet(images.images + np.uint8(1), images.labels),
        ImageSet(images.images.reshape(7, 32, 8, 1), images.labels),
        ImageSet(images.images, images.labels[::-1]),
        ImageSet(images.images[:6], images.labels[:6]),
    ]
    keys = {cache_key("a", each, CPU) for each in (images, *others)}
    keys.add(cache_key("b", images, CPU))
    monkeypatch.setattr(activations, "number_format", lambda device: "another")
    keys.add(cache_key("a", images, CPU))
    assert len(keys) == 7
    assert cache_key("a", make_images(), CPU) in keys


# The arrays that ship


@pytest.fixture
def shipped(tmp_path):
    sets = {"train": make_activations(1, 300), "svhn": make_activations(2, 200)}
    write_shipped("abc", sets, tmp_path / "shipped.npz")
    return sets, tmp_path / "shipped.npz"


def test_shipped_arrays_come_back_to_within_their_rounding(shipped):
    sets, path = shipped
    for name, loaded in load_shipped("abc", ["train", "svhn"], path).items():
        assert np.array_equal(loaded.labels, sets[name].labels)
        assert loaded.labels.dtype == np.int64
        assert loaded.logits == pytest.approx(sets[name].logits, rel=1e-3)
        for field, steps in SHIPPED_STEPS.items():
            expected = pytest.approx(getattr(sets[name], field), abs=1.1 / steps)
            assert getattr(loaded, field) == expected


def test_shipped_arrays_of_another_checkpoint_or_set_are_refused(shipped):
    _, path = shipped
    with pytest.raises(ImagesUnavailable, match="no activations ship for this checkpoint"):
        load_shipped("another", ["train"], path)
    with pytest.raises(ImagesUnavailable, match="no activations ship for lsun"):
        load_shipped("abc", ["train", "lsun"], path)
    with pytest.raises(ImagesUnavailable, match="no activations ship with the checkpoint"):
        load_shipped("abc", ["train"], path.with_name("absent"))
