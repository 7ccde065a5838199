"""The network's shapes and promises; the checkpoint's round trip and what it refuses."""

import ast
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import models
from models import (
    ARCHITECTURES,
    NETWORK_KEYS,
    REQUIRED_KEYS,
    DHRNet,
    Residual,
    load_checkpoint,
    replace_file,
    save_checkpoint,
)

ROOT = Path(__file__).parent.parent


def make_images(count=4, channels=3, size=16):
    shape = (count, channels, size, size)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def make_network(arch="fast", channels=3, size=16, **config):
    torch.manual_seed(0)
    network = DHRNet(5, channels, size, arch, **config)
    network.fit_input_statistics(make_images(20, channels, size))
    return network.eval()


def save(path, network, **entries):
    save_checkpoint(path, network, **dict.fromkeys(REQUIRED_KEYS - NETWORK_KEYS, 0), **entries)


def test_models_imports_pytorch_and_the_standard_library_alone():
    imported = set()
    for node in ast.walk(ast.parse(Path(models.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch"}


# The network


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("channels", "size"), [(1, 16), (3, 16), (3, 32), (3, 45)])
def test_output_shapes(arch, channels, size):
    output = make_network(arch, channels, size)(make_images(2, channels, size))
    assert output.logits.shape == (2, 5)
    assert output.reconstruction.shape == (2, channels, size, size)
    assert [z.shape[:2] for z in output.latents] == [(2, 32)] * 3
    assert all(z.min() >= 0 for z in output.latents)
    heights = [z.shape[2] for z in output.latents]
    assert heights == sorted(heights, reverse=True)


def test_vgg_is_the_published_network():
    network = DHRNet(10, arch="vgg").eval()
    convs = [m for m in network.encoder.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [64] * 2 + [128] * 2 + [256] * 4
    linears = [m for m in network.head if isinstance(m, torch.nn.Linear)]
    assert [linear.out_features for linear in linears] == [1024, 1024, 10]
    dropouts = [m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts == [0.25] * 3 + [0.5] * 2
    latents = network(make_images(2, size=32)).latents
    assert [tuple(z.shape[1:]) for z in latents] == [(32, 16, 16), (32, 8, 8), (32, 4, 4)]


def test_deep_adds_a_pair_of_convolutions_to_its_input_in_each_stage():
    for stage in make_network("deep").encoder:
        (block,) = (layer for layer in stage if isinstance(layer, Residual))
        convs = [layer for layer in block if isinstance(layer, torch.nn.Conv2d)]
        assert len(convs) == 2
        x = torch.randn(2, convs[0].in_channels, 4, 4)
        assert torch.equal(block(x), x + torch.nn.Sequential(*block)(x))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_eval_forward_is_deterministic(arch):
    network = make_network(arch)
    first, second = network(make_images()), network(make_images())
    assert torch.equal(first.logits, second.logits)
    assert all(map(torch.equal, first.latents, second.latents))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("loss", ["cross-entropy", "mse"])
def test_both_losses_reach_the_encoder(arch, loss):
    network, images = make_network(arch).train(), make_images()
    output = network(images)
    if loss == "mse":
        F.mse_loss(output.reconstruction, network.normalize(images)).backward()
    else:
        F.cross_entropy(output.logits, torch.zeros(4, dtype=torch.long)).backward()
    first_filters = next(p for p in network.encoder.parameters() if p.ndim == 4)
    assert first_filters.grad.abs().sum() > 0


def test_reconstruction_and_logits_take_both_signs():
    output = make_network()(make_images())
    assert output.reconstruction.min() < 0 < output.reconstruction.max()
    assert output.logits.min() < 0 < output.logits.max()


def test_uint8_and_unit_range_images_are_the_same_to_the_network():
    network, images = make_network(), make_images()
    assert torch.equal(network(images).logits, network(images.float() / 255).logits)


@pytest.mark.parametrize("mirrored", [True, False])
def test_activations_average_over_the_mirror_image(mirrored):
    network, images = make_network(mirrored=mirrored), make_images()
    got = network.activations(images)
    views = [images, images.flip(-1)] if mirrored else [images]
    outputs = [network(view) for view in views]
    logits = sum(output.logits for output in outputs) / len(views)
    pooled = [
        sum(torch.cat([pool(z) for z in output.latents], dim=1) for output in outputs) / len(views)
        for pool in (lambda z: z.flatten(2).amax(dim=2), lambda z: z.flatten(2).mean(dim=2))
    ]
    features = sum(network.encode(view)[0].amax(dim=(2, 3)) for view in views) / len(views)
    for part, expected in zip(got, (logits, features, *pooled), strict=True):
        assert part.dtype == torch.float32
        assert torch.allclose(part, expected, atol=1e-6)
    assert torch.allclose(network.head[-1](got[1]), got[0], atol=1e-5)  # features make the logits


def test_normalised_training_images_have_zero_mean_and_unit_deviation():
    network = make_network()
    normalised = network.normalize(make_images(20)).transpose(0, 1).flatten(1)
    assert normalised.mean(dim=1) == pytest.approx(torch.zeros(3), abs=1e-4)
    assert normalised.std(dim=1) == pytest.approx(torch.ones(3), abs=1e-4)


def test_stem_whitens_patches():
    network = make_network()
    responses = network.stem[0](network.normalize(make_images(20))).transpose(0, 1).flatten(1)
    covariance = responses @ responses.T / responses.shape[1]
    assert torch.allclose(covariance[:12, :12], torch.eye(12), atol=0.02)
    assert torch.allclose(covariance[:12, 12:], -torch.eye(12), atol=0.02)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 16, 16),
        torch.zeros(2, 3, 28, 28),
        torch.zeros(3, 16, 16),
        make_images().long(),
        make_images().float(),
        torch.full((1, 3, 16, 16), -0.1),
        torch.full((1, 3, 16, 16), float("nan")),
    ],
    ids=["grey", "size", "no batch", "int64", "0..255", "negative", "NaN"],
)
def test_images_of_another_shape_type_or_range_are_refused(images):
    with pytest.raises(ValueError, match=r"images are .*expected"):
        make_network()(images)


@pytest.mark.parametrize(
    "bad", [{"arch": "resnet"}, {"num_classes": 1}, {"in_channels": 2}, {"image_size": 15}]
)
def test_bad_configuration_is_refused(bad):
    with pytest.raises(ValueError, match="expected"):
        DHRNet(**{"num_classes": 10, **bad})


# The checkpoint


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_checkpoint_round_trip(tmp_path, arch):
    network = make_network(arch, mirrored=False)
    save(tmp_path / "net.pt", network, course=[{"epoch": 1}])
    loaded, checkpoint = load_checkpoint(tmp_path / "net.pt")
    assert not loaded.training
    assert loaded.config == network.config == checkpoint["model_config"]
    assert checkpoint["course"] == [{"epoch": 1}]
    assert torch.equal(loaded(make_images()).logits, network(make_images()).logits)
    assert torch.equal(checkpoint["mean"], network.mean)
    assert os.listdir(tmp_path) == ["net.pt"]


class Code:
    def __reduce__(self):
        return os.system, ("touch executed",)


def change(path, **changes):
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


def weights_of(path):
    return torch.load(path, weights_only=True)["model_state_dict"]


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


NAN = {"bottlenecks.0.bias": torch.full((32,), float("nan"))}
DAMAGE = {
    "code": lambda path: path.write_bytes(pickle.dumps(Code(), protocol=2)),
    "code among tensors": lambda path: torch.save({"model_state_dict": Code()}, path),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5000]),
    "empty": lambda path: path.write_bytes(b""),
    "web page": lambda path: path.write_text("<!DOCTYPE html>"),
    "a bit": flip_a_byte,
    "foreign": lambda path: torch.save({"model_state_dict": {}}, path),
    "a list": lambda path: torch.save([1, 2], path),
    "NaN": lambda path: change(path, model_state_dict=weights_of(path) | NAN),
    "wrong shape": lambda path: change(path, model_config={"num_classes": 6}),
    "lacks a tensor": lambda path: change(
        path, model_state_dict={k: v for k, v in weights_of(path).items() if "head" not in k}
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint_is_refused_in_one_line(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.pt"
    save(path, make_network())
    DAMAGE[kind](path)
    with pytest.raises(ValueError, match=r"net\.pt is not a whole DHR") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["net.pt"]  # nothing was executed


def test_absent_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        load_checkpoint(tmp_path / "absent.pt")


def test_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "net.pt"
    save(path, make_network())
    before = path.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        save_checkpoint(path, make_network(), oops=lambda: None)

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left") as caught:
        save_checkpoint(path, make_network())
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["net.pt"]


def test_replace_file_writes_the_whole_file_or_none(tmp_path):
    path = tmp_path / "a.txt"
    replace_file(path, lambda file: file.write(b"old"))

    def half(file):
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(path, half)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_two_writers_of_a_file_do_not_spoil_each_other(tmp_path):
    path = tmp_path / "a.txt"

    def slow(file):
        replace_file(path, lambda other: other.write(b"first"))
        file.write(b"second")

    replace_file(path, slow)
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["a.txt"]
