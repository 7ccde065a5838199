"""The parts of the training loop, each against its definition."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_models import make_images, make_model

import train_dhr_nn
from models import load_checkpoint
from open_set_data import ImageSet, load_known
from train_dhr_nn import GREY, MAX_SHIFT, augment, one_cycle, training_step

FLOAT32 = torch.autocast("cpu", torch.bfloat16, enabled=False)
DIGITS = ["--dataset", "digits", "--batch-size", "100", "--device", "cpu"]


def shifts_of(image, result):
    """(row, column) shifts at which a reflection-padded [H, W, C] image shows [C, H, W]."""
    padded = np.pad(image, [(MAX_SHIFT, MAX_SHIFT)] * 2 + [(0, 0)], mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, image.shape)[:, :, 0]
    return np.argwhere((windows == result.transpose(1, 2, 0)).all(axis=(2, 3, 4))) - MAX_SHIFT


def test_augment_shifts_with_reflection_and_mirrors_what_it_is_told_to():
    images = make_images(2, 3, 16).permute(0, 2, 3, 1)
    index, mirrored = torch.arange(400) % 2, torch.arange(400) % 3 == 0
    batch = augment(images, index, mirrored, 0, torch.Generator().manual_seed(0)).numpy()
    seen = set()
    for i in range(400):
        upright = batch[i][:, :, ::-1] if mirrored[i] else batch[i]
        shifts = shifts_of(images[index[i]].numpy(), upright)
        assert len(shifts) == 1
        seen.add(tuple(shifts[0]))
    assert {row for row, _ in seen} == {column for _, column in seen} == set(range(-4, 5))


class Recorder:
    """An optimiser that keeps the gradients it is given."""

    def __init__(self, model):
        self.model, self.gradients = model, None

    def step(self):
        self.gradients = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]

    def zero_grad(self):
        self.model.zero_grad()


def summed_binary_cross_entropies(logits, labels):
    """Written out: -log p of the label's sigmoid, -log(1 - p) of the others, mean over images."""
    own = torch.eye(logits.shape[1], dtype=torch.bool)[labels]
    p = torch.sigmoid(logits)
    return -(torch.where(own, p, 1 - p)).log().sum() / len(logits)


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("loss", ["one-vs-rest", "softmax"])
def test_training_step_descends_cross_entropy_plus_weighted_squared_error(loss, weight):
    model, images, labels = make_model().eval(), make_images(8), torch.arange(8) % 5
    recorder = Recorder(model)
    losses = training_step(model, [recorder], images, labels, loss, weight, FLOAT32)
    output = model(images)
    by_hand = {"softmax": F.cross_entropy, "one-vs-rest": summed_binary_cross_entropies}[loss]
    cross_entropy = by_hand(output.logits, labels)
    mse = F.mse_loss(output.reconstruction, model.normalize(images))
    (cross_entropy + weight * mse).backward()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(recorder.gradients) == len(expected)
    for got, wanted in zip(recorder.gradients, expected, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-5)
    assert losses[:2].tolist() == pytest.approx([cross_entropy.item(), mse.item()], rel=1e-4)
    assert losses[2] == (output.logits.argmax(dim=1) == labels).float().mean()


def test_cutout_makes_one_grey_square_in_each_image_anywhere():
    images = torch.full((1, 16, 16, 3), 255, dtype=torch.uint8)
    index, mirrored = torch.zeros(500, dtype=torch.long), torch.zeros(500, dtype=torch.bool)
    cut = augment(images, index, mirrored, 6, torch.Generator().manual_seed(0)) == GREY
    assert torch.equal(cut, cut[:, :1].expand_as(cut))
    rows, columns = cut[:, 0].any(dim=2), cut[:, 0].any(dim=1)
    assert torch.equal(cut[:, 0], rows[:, :, None] & columns[:, None, :])
    corners = set()
    for sides in zip(rows, columns, strict=True):
        first = [side.nonzero().flatten()[0].item() for side in sides]
        assert all(side.nonzero().flatten().tolist() == [*range(i, i + 6)]
                   for i, side in zip(first, sides, strict=True))  # fmt: skip
        corners.add(tuple(first))
    assert {row for row, _ in corners} == {column for _, column in corners} == {*range(11)}
    assert len(corners) > 90  # of 121


def test_cutout_larger_than_the_images_is_refused(tmp_path, capsys):
    out = tmp_path / "net.pt"
    assert train_dhr_nn.main([*DIGITS, "--cutout", "33", "--out", str(out)]) != 0
    assert "expected at most 32" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_rate_rises_over_a_tenth_of_the_steps_and_falls_to_nearly_0():
    shares = [one_cycle(step, 1000) for step in range(1000)]
    assert np.argmax(shares) in (99, 100)
    assert max(shares) == pytest.approx(1, abs=0.01)
    assert 0 < shares[0] < 0.02
    assert 0 < shares[-1] < 0.002


@pytest.fixture
def seen(monkeypatch):
    """What the loop hands to augment, training_step and accuracy, none of which does its work."""
    seen = {"mirrored": [], "images": [], "labels": [], "measured": []}

    def keep_augment(images, index, mirrored, cutout, generator):
        seen["mirrored"].append(mirrored)
        return images[index].permute(0, 3, 1, 2)

    def keep_step(model, optimizers, images, labels, *terms):
        seen["images"].append(images.permute(0, 2, 3, 1).numpy())
        seen["labels"].append(labels.numpy())
        return torch.zeros(3)

    def keep_accuracy(model, images, *rest):
        seen["measured"].append(images)
        return 0.5

    monkeypatch.setattr(train_dhr_nn, "augment", keep_augment)
    monkeypatch.setattr(train_dhr_nn, "training_step", keep_step)
    monkeypatch.setattr(train_dhr_nn, "accuracy", keep_accuracy)
    return seen


def test_batches_are_training_images_with_their_labels_each_once_an_epoch(seen, tmp_path):
    assert train_dhr_nn.main([*DIGITS, "--epochs", "2", "--out", str(tmp_path / "net.pt")]) == 0
    data = load_known("digits", tmp_path)
    label_of = {}
    for image, label in zip(data.train.images, data.train.labels, strict=True):
        label_of.setdefault(image.tobytes(), set()).add(int(label))
    steps = len(data.train.labels) // 100
    assert len(seen["images"]) == 2 * steps
    epochs = []
    for epoch in (0, 1):
        images = np.concatenate(seen["images"][epoch * steps : (epoch + 1) * steps])
        labels = np.concatenate(seen["labels"][epoch * steps : (epoch + 1) * steps])
        assert all(
            label in label_of[image.tobytes()] for image, label in zip(images, labels, strict=True)
        )
        assert len({image.tobytes() for image in images}) > 0.95 * len(images)
        epochs.append(images)
    assert not np.array_equal(*epochs)


def test_digits_are_not_mirrored(seen, tmp_path):
    assert train_dhr_nn.main([*DIGITS, "--dry-run", "--out", str(tmp_path / "net.pt")]) == 0
    assert not torch.cat(seen["mirrored"]).any()


def test_half_of_other_images_are_mirrored(seen, tmp_path, monkeypatch):
    monkeypatch.setattr(train_dhr_nn, "NOT_MIRRORED", ())
    assert train_dhr_nn.main([*DIGITS, "--epochs", "1", "--out", str(tmp_path / "net.pt")]) == 0
    assert torch.cat(seen["mirrored"]).float().mean() == pytest.approx(0.5, abs=0.1)


def test_validation_is_on_validation_images_and_test_images_come_last(seen, tmp_path):
    assert train_dhr_nn.main([*DIGITS, "--epochs", "1", "--out", str(tmp_path / "net.pt")]) == 0
    data = load_known("digits", tmp_path)
    assert [len(images.labels) for images in seen["measured"]] == [
        len(data.val.labels),
        len(data.test_known.labels),
    ]
    assert np.array_equal(seen["measured"][0].images, data.val.images)


def test_normalisation_comes_from_images_of_every_class(seen, tmp_path, monkeypatch):
    """Also where they lie class by class, as in folders, and are too many to look at all."""
    digits = load_known("digits", tmp_path)
    order = np.argsort(digits.train.labels, kind="stable")
    grey = np.full_like(digits.train.images, 10)
    grey[digits.train.labels[order] >= 5] = 200
    ordered = digits._replace(train=ImageSet(grey, digits.train.labels[order]))
    monkeypatch.setattr(train_dhr_nn, "load_known", lambda *args: ordered)
    monkeypatch.setattr(train_dhr_nn, "STATISTICS_IMAGES", 50)
    out = tmp_path / "net.pt"
    assert train_dhr_nn.main([*DIGITS, "--epochs", "1", "--out", str(out)]) == 0
    mean = 255 * load_checkpoint(out)[1]["mean"].item()
    assert mean == pytest.approx(grey.mean(), abs=8)
