"""The network's shapes and promises, and the checkpoint's round trip and refusals."""

import os
import pickle

import pytest
import torch
import torch.nn.functional as F

from models import (
    ARCHITECTURES,
    RUN_KEYS,
    DHRNet,
    MaxPool,
    Recogniser,
    Residual,
    fit_rule,
    load_checkpoint,
    save_checkpoint,
)
from openmax import Activations, activation_vectors


def make_model(arch="fast", channels=3, size=32, classes=5):
    torch.manual_seed(0)
    model = DHRNet(classes, channels, size, arch)
    model.fit_input_statistics(make_images(20, channels, size))
    return model


def make_images(count=4, channels=3, size=32):
    shape = (count, channels, size, size)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def save(path, model):
    save_checkpoint(path, model, **{key: kind() for key, kind in RUN_KEYS.items()})


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 28, 32, 33, 64])
def test_output_shapes(arch, channels, size):
    output = make_model(arch, channels, size).eval()(make_images(2, channels, size))
    assert output.logits.shape == (2, 5)
    assert output.reconstruction.shape == (2, channels, size, size)
    assert [z.shape[:2] for z in output.latents] == [(2, 32)] * 3
    heights = [z.shape[2] for z in output.latents]
    assert heights == sorted(heights, reverse=True)
    assert all(z.min() >= 0 for z in output.latents)


def test_vgg_is_the_published_network():
    model = DHRNet(10, arch="vgg")
    convs = [m for m in model.encoder.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [64] * 2 + [128] * 2 + [256] * 4
    linears = [m for m in model.head if isinstance(m, torch.nn.Linear)]
    assert [linear.out_features for linear in linears] == [1024, 1024, 10]
    dropouts = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts == [0.25] * 3 + [0.5] * 2
    output = model.eval()(make_images(2))
    assert 10 + sum(z.shape[1] for z in output.latents) == 106
    assert [tuple(z.shape[2:]) for z in output.latents] == [(16, 16), (8, 8), (4, 4)]


def test_deep_adds_to_a_stage_what_two_convolutions_make_of_it():
    for stage in DHRNet(10, arch="deep").encoder:
        convs = [m for m in stage.modules() if isinstance(m, torch.nn.Conv2d)]
        assert len(convs) == 3
        block = next(m for m in stage if isinstance(m, Residual)).eval()
        x = torch.randn(2, convs[-1].out_channels, 8, 8)
        made = x
        for layer in block:
            made = layer(made)
        assert torch.equal(block(x), x + made)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_eval_forward_is_deterministic(arch):
    model = make_model(arch).eval()
    first, second = model(make_images()), model(make_images())
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.reconstruction, second.reconstruction)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_skipping_the_decoder_changes_nothing_else(arch):
    model = make_model(arch).eval()
    full, short = model(make_images()), model(make_images(), decode=False)
    assert short.reconstruction is None
    assert torch.equal(full.logits, short.logits)
    assert all(map(torch.equal, full.latents, short.latents))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_both_losses_reach_the_encoder(arch, loss):
    model = make_model(arch)
    output = model(make_images())
    if loss == "mse":
        F.mse_loss(output.reconstruction, model.normalize(make_images())).backward()
    else:
        F.cross_entropy(output.logits, torch.zeros(4, dtype=torch.long)).backward()
    first_filters = next(p for p in model.encoder.parameters() if p.ndim == 4)
    assert first_filters.grad.abs().sum() > 0


def test_reconstruction_and_logits_take_both_signs():
    output = make_model().eval()(make_images())
    assert output.reconstruction.min() < 0 < output.reconstruction.max()
    assert output.logits.min() < 0 < output.logits.max()


def test_uint8_and_unit_range_images_are_the_same_to_the_network():
    model = make_model().eval()
    images = make_images()
    assert torch.equal(model(images).logits, model(images.float() / 255).logits)


def test_normalised_training_images_have_zero_mean_and_unit_deviation():
    model = make_model()
    normalised = model.normalize(make_images(20)).transpose(0, 1).flatten(1)
    assert normalised.mean(dim=1) == pytest.approx(torch.zeros(3), abs=1e-4)
    assert normalised.std(dim=1) == pytest.approx(torch.ones(3), abs=1e-4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_first_layer_sees_images_normalised_once(arch):
    model, seen = make_model(arch).eval(), []
    model.stem.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    model(make_images())
    assert torch.equal(seen[0], model.normalize(make_images()))


def test_stem_whitens_patches():
    model = make_model()
    responses = model.stem[0](model.normalize(make_images(20))).transpose(0, 1).flatten(1)[:12]
    assert torch.allclose(responses @ responses.T / responses.shape[1], torch.eye(12), atol=0.01)


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 3, 28, 28), (3, 32, 32)])
def test_foreign_image_shape_is_refused(shape):
    with pytest.raises(ValueError, match="expected"):
        make_model()(torch.zeros(shape))


@pytest.mark.parametrize("bad", [{"arch": "resnet"}, {"num_classes": 1}, {"in_channels": 2}])
def test_bad_configuration_is_refused(bad):
    with pytest.raises(ValueError, match="expected"):
        DHRNet(**{"num_classes": 10, **bad})


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_checkpoint_round_trip(tmp_path, arch):
    model = make_model(arch).eval()
    save(tmp_path / "net.pt", model)
    loaded, checkpoint = load_checkpoint(tmp_path / "net.pt")
    assert torch.equal(loaded(make_images()).logits, model(make_images()).logits)
    assert checkpoint["model_config"]["arch"] == arch
    assert torch.equal(checkpoint["mean"], model.mean)
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt"]


class Bomb:
    def __reduce__(self):
        return os.system, ("touch bomb_went_off",)


@pytest.mark.parametrize(
    "content",
    ["cut", "empty", "text", "foreign", "code", "other_shape", "lacks_a_tensor"],
)
def test_bad_checkpoint_is_refused_with_one_line(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.pt"
    model = make_model()
    if content == "cut":
        save(path, model)
        path.write_bytes(path.read_bytes()[:-5000])
    elif content == "empty":
        path.touch()
    elif content == "text":
        path.write_text("<!DOCTYPE html>")
    elif content == "foreign":
        torch.save({"model_state_dict": {}}, path)
    elif content == "code":
        path.write_bytes(pickle.dumps(Bomb(), protocol=2))
    elif content == "other_shape":
        model.config = {**model.config, "num_classes": 6}
        save(path, model)
    elif content == "lacks_a_tensor":
        save(path, model)
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["model_state_dict"]["head.2.weight"]
        torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"net\.pt is not a whole DHR checkpoint") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bomb_went_off").exists()


def test_failed_save_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "net.pt"
    save(path, make_model())
    before = path.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        save_checkpoint(path, make_model(), oops=lambda: None)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt"]


@pytest.mark.parametrize("size", [31, 16, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_lean_max_pooling_equals_pytorchs(size, dtype, memory_format):
    results = []
    for pool in (MaxPool(), torch.nn.MaxPool2d(2)):
        x = torch.randn(2, 8, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
        x = x.to(memory_format=memory_format).requires_grad_()
        y = pool(x)
        (y * y.detach()).sum().backward()
        assert x.grad.stride() == x.stride()
        results.append((y, x.grad))
    assert all(map(torch.equal, *results))


@pytest.fixture(scope="module")
def recogniser():
    """A small network with a rule fitted to it; labels are its own answers, so all are right."""
    model = make_model("fast", 1, 16, classes=3).eval()
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(600, 1, 4, 4, generator=generator)
    images = (255 * F.interpolate(coarse, size=16, mode="bilinear")).byte()
    biased = torch.nn.Linear(model.head[-1].in_features, 3)  # all classes occur
    biased.weight.data = model.head[-1].weight.data
    biased.bias.data = -model.activations(images)[0].median(dim=0).values
    model.head[-1] = biased
    logits, largest, average = (part.numpy() for part in model.activations(images))
    activations = Activations(logits.argmax(axis=1), logits, largest, average)
    return model, fit_rule(activations, activations, tail_size=10), images[:50]


def test_recogniser_gives_the_rules_probabilities(recogniser):
    model, rule, images = recogniser
    parts = (part.detach().numpy() for part in model._chunk_activations(images))
    expected = rule.predict_proba(activation_vectors(Activations(None, *parts), "avg"))
    assert Recogniser(model, rule)(images).detach().numpy() == pytest.approx(expected, abs=1e-12)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # PyTorch 2.10's own
def test_exported_recogniser_gives_the_same_answers(recogniser, tmp_path):
    model, rule, images = recogniser
    module = Recogniser(model, rule)
    batch = {0: torch.export.Dim("images")}
    program = torch.export.export(module, (images[:2],), dynamic_shapes=[batch])
    torch.export.save(program, tmp_path / "recogniser.pt2")
    loaded = torch.export.load(tmp_path / "recogniser.pt2").module()
    assert torch.allclose(loaded(images), module(images), atol=1e-6)
