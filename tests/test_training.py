"""The parts of training, each against its definition."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_dhr_nn
import training
from fractals import fractals
from models import DHRNet
from open_set_data import KnownData
from openmax import UNKNOWN
from pictures import ImageSet
from train_dhr_nn import build_network, complete_settings, parse_args
from training import (
    GREY,
    augment,
    batches,
    blend,
    build_optimizers,
    gflop_per_image,
    halving,
    mix,
    one_cycle,
    one_vs_rest,
    orthogonalize,
    two_cycles,
)


def make_images(count, size=16, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def make_data(images, labels, classes=("a", "b")):
    none = ImageSet(images[:0], labels[:0])
    return KnownData(classes, ImageSet(images, labels), none, none, images[:0])


# Batches


def shifts_of(image, result, farthest):
    """(row, column) shifts at which a reflection-padded [H, W, C] image shows [C, H, W]."""
    padded = np.pad(image, [(farthest, farthest)] * 2 + [(0, 0)], mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, image.shape)[:, :, 0]
    return np.argwhere((windows == result.transpose(1, 2, 0)).all(axis=(2, 3, 4))) - farthest


def test_augment_shifts_by_an_eighth_with_reflection_and_mirrors_what_it_is_told_to():
    images = make_images(2)
    index, mirrored = torch.arange(200) % 2, torch.arange(200) % 3 == 0
    generator = torch.Generator().manual_seed(0)
    batch = augment(torch.from_numpy(images), index, mirrored, "shift", 0, generator).numpy()
    seen = set()
    for i in range(200):
        upright = batch[i][:, :, ::-1] if mirrored[i] else batch[i]
        (shift,) = shifts_of(images[index[i]], upright, farthest=2)
        seen.add(tuple(shift))
    assert seen == {(row, column) for row in range(-2, 3) for column in range(-2, 3)}


def test_cutout_makes_one_grey_square_in_each_image_anywhere():
    images = torch.full((1, 16, 16, 3), 255, dtype=torch.uint8)
    index, mirrored = torch.zeros(500, dtype=torch.long), torch.zeros(500, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    cut = augment(images, index, mirrored, "shift", 6, generator) == GREY
    assert torch.equal(cut, cut[:, :1].expand_as(cut))
    rows, columns = cut[:, 0].any(dim=2), cut[:, 0].any(dim=1)
    assert torch.equal(cut[:, 0], rows[:, :, None] & columns[:, None, :])
    corners = set()
    for sides in zip(rows, columns, strict=True):
        places = [side.nonzero().flatten().tolist() for side in sides]
        assert all(place == [*range(place[0], place[0] + 6)] for place in places)
        corners.add((places[0][0], places[1][0]))
    assert {row for row, _ in corners} == {column for _, column in corners} == {*range(11)}
    assert len(corners) > 90  # of 121


def test_rotate_turns_by_up_to_15_degrees_and_moves_within_the_grey_canvas():
    """A ramp from left to right keeps its slope's length; its direction tells the angle."""
    ramp = (40 + 2 * torch.arange(64)).to(torch.uint8)[None, None, :, None].expand(1, 64, 64, 3)
    index, mirrored = torch.zeros(300, dtype=torch.long), torch.arange(300) % 2 == 0
    generator = torch.Generator().manual_seed(0)
    batch = augment(ramp, index, mirrored, "rotate", 0, generator)[:, 0].double()
    assert (batch == GREY).any()
    middle = batch[:, 24:40, 24:40]  # no border comes as far
    across = (middle[:, :, 15] - middle[:, :, 0]).mean(dim=1) / 15
    down = (middle[:, 15] - middle[:, 0]).mean(dim=1) / 15
    assert torch.equal(across < 0, mirrored)
    assert torch.allclose(across.hypot(down), torch.full((300,), 2.0).double(), atol=0.05)
    angle = torch.atan2(down, across.abs()).rad2deg()
    assert 14 < angle.abs().max() < 15.5
    shift = (middle.mean(dim=(1, 2)) - 103) / 2 / 64  # in shares of the side
    assert 0.15 < shift.abs().max() < 0.27


def test_rotate_by_nothing_only_mirrors(monkeypatch):
    for part, value in {"ROTATION": 0, "EXPANSION": 0, "CROP_SHARE": 1}.items():
        monkeypatch.setattr(training, part, value)
    images, index = torch.from_numpy(make_images(6)), torch.arange(6)
    mirrored, generator = index % 2 == 0, torch.Generator().manual_seed(0)
    expected = images.where(~mirrored[:, None, None, None], images.flip(2)).permute(0, 3, 1, 2)
    batch = augment(images, index, mirrored, "rotate", 0, generator)
    assert torch.equal(batch, expected)


def test_about_half_of_the_images_are_mixed_with_a_picture():
    images = torch.from_numpy(make_images(400)).permute(0, 3, 1, 2)
    pictures = torch.from_numpy(make_images(5, seed=1))
    mixed = mix(images, pictures, torch.Generator().manual_seed(0))
    assert mixed.dtype == torch.uint8
    changed = (mixed != images).flatten(1).any(dim=1)
    assert 0.4 < changed.float().mean() < 0.6
    assert torch.equal(mixed, mix(images, pictures, torch.Generator().manual_seed(0)))


def test_blended_images_are_sums_or_products_with_weights_that_add_up_to_about_1():
    grey = torch.full((4000, 1, 1, 1), 0.25)
    generator = torch.Generator().manual_seed(0)
    both = blend(2 * grey, 2 * grey, generator)
    assert torch.allclose(both, torch.full_like(both, 0.5))  # grey by grey or and grey is grey
    dark = blend(grey, grey, generator)
    assert dark.median().item() == pytest.approx(0.25, abs=0.01)
    assert 0 <= dark.min() <= dark.max() <= 1
    pairs = (grey, 2 * grey), (2 * grey, grey)
    by_first, by_second = ((blend(*pair, generator) - 0.5).abs().mean() for pair in pairs)
    assert by_first > 3 * by_second


def test_fractals_have_several_colours_differ_and_are_always_the_same(few_fractals):
    drawn = fractals(16, 3)
    assert drawn.shape == (4, 16, 16, 3)
    assert np.array_equal(drawn, fractals.__wrapped__(16, 3))
    assert min(picture.std() for picture in drawn) > 3
    assert len({picture.tobytes() for picture in drawn}) == 4
    assert fractals(1024, 1).shape == (2, 1024, 1024, 1)


@pytest.fixture
def unmoved(monkeypatch):
    """Images come out of `augment` as they are, and whether they were to be mirrored is kept."""
    seen = []

    def keep(images, index, mirrored, augmentation, cutout, generator, pictures):
        seen.append(mirrored)
        return images[index].permute(0, 3, 1, 2)

    monkeypatch.setattr("training.augment", keep)
    return seen


def test_an_epoch_shows_every_image_with_its_label_once_in_an_order_of_its_own(unmoved):
    images = torch.arange(100, dtype=torch.uint8)[:, None, None, None].expand(100, 16, 16, 1)
    labels = torch.arange(100) % 7
    orders = []
    for epoch in (0, 1, 1):
        drawn = list(batches(images, labels, 20, False, "shift", 0, 3, epoch))
        assert len(drawn) == 5
        shown = torch.cat([batch[:, 0, 0, 0] for batch, _ in drawn])
        assert sorted(shown.tolist()) == [*range(100)]
        assert torch.equal(torch.cat([label for _, label in drawn]), shown.long() % 7)
        orders.append(shown)
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(orders[1], orders[2])  # what a resumed run draws


def test_the_shares_of_all_processes_make_up_the_batch(monkeypatch):
    images, labels = torch.from_numpy(make_images(40)), torch.arange(40)

    def share(rank, processes):
        monkeypatch.setattr("training.rank", lambda: rank)
        monkeypatch.setattr("training.world_size", lambda: processes)
        return list(batches(images, labels, 20, True, "shift", 4, 0, 0))

    for whole, *parts in zip(share(0, 1), share(0, 2), share(1, 2), strict=True):
        for tensor, halves in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(tensor, torch.cat(halves))


def test_every_image_is_mirrored_every_other_epoch_and_digits_never(unmoved):
    images = torch.arange(100, dtype=torch.uint8)[:, None, None, None].expand(100, 16, 16, 1)
    mirrored = []
    for epoch in (0, 1):
        unmoved.clear()
        drawn = list(batches(images, torch.arange(100), 20, True, "shift", 0, 0, epoch))
        order = torch.cat([label for _, label in drawn])
        mirrored.append(torch.cat(unmoved)[order.argsort()])
    assert torch.equal(mirrored[0], ~mirrored[1])
    assert 30 < mirrored[0].sum() < 70
    unmoved.clear()
    list(batches(images, torch.arange(100), 20, False, "shift", 0, 0, 1))
    assert not torch.cat(unmoved).any()


@pytest.mark.parametrize(("dataset", "mirrored"), [("cifar10", True), ("digits", False)])
def test_digits_are_not_mirrored(dataset, mirrored):
    args = parse_args(["--dataset", dataset, "--arch", "fast"])
    network = build_network(args, make_data(make_images(20), np.arange(20) % 2))
    assert network.config["mirrored"] == mirrored


def test_normalisation_comes_from_images_of_every_class(monkeypatch):
    """Also where they lie class by class, as in folders, and are too many to look at all."""
    images = np.full((1000, 16, 16, 1), 10, np.uint8)
    images[500:] = 200
    monkeypatch.setattr(train_dhr_nn, "STATISTICS_IMAGES", 50)
    network = build_network(
        parse_args(["--arch", "fast"]), make_data(images, np.arange(1000) // 500)
    )
    assert 255 * network.mean.item() == pytest.approx(105, abs=5)


# Losses, optimisers, rate


def test_one_vs_rest_sums_the_cross_entropies_of_k_sigmoids():
    logits, labels = torch.randn(8, 5), torch.arange(8) % 5
    own, p = torch.eye(5, dtype=torch.bool)[labels], torch.sigmoid(logits)
    by_hand = -torch.where(own, p, 1 - p).log().sum() / 8
    assert one_vs_rest(logits, labels).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_one_vs_rest_takes_an_unknown_label_for_none_of_the_classes():
    logits = torch.randn(8, 5)
    by_hand = -torch.sigmoid(-logits).log().sum() / 8
    unknown = torch.full((8,), UNKNOWN)
    assert one_vs_rest(logits, unknown).item() == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
def test_orthogonalize_is_three_quintics_of_the_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert torch.allclose(orthogonalize(matrix), u * values @ v, atol=1e-5)
    assert 0.6 < values.min() <= values.max() < 1.3


@pytest.mark.parametrize(
    ("arch", "name"), [("fast", "muon"), ("deep", "muon"), ("deep", "tuning"), ("vgg", "sgd")]
)
def test_every_trained_weight_has_one_optimiser_and_muon_the_encoders_filters(arch, name):
    network = DHRNet(3, 1, 16, arch)
    optimizers = build_optimizers(network, name, 0.1)
    groups = [[id(p) for g in each.param_groups for p in g["params"]] for each in optimizers]
    trained = {id(p) for p in network.parameters() if p.requires_grad}
    assert sorted(chain(*groups)) == sorted(trained)
    filters = {id(p) for p in network.encoder.parameters() if p.ndim == 4}
    assert set(groups[0]) == (trained if name == "sgd" else filters)


def test_tuning_gives_adamw_five_times_its_rate_beside_muon():
    network = DHRNet(2, 1, 16)
    (muon, *adam), (same, *faster) = (
        [
            group["peak_lr"]
            for each in build_optimizers(network, name, 0.1)
            for group in each.param_groups
        ]
        for name in ("muon", "tuning")
    )
    assert same == muon
    assert faster == pytest.approx([5 * rate for rate in adam])


def test_muon_keeps_filters_at_their_norm_and_moves_along_the_orthogonalised_gradient():
    weight = torch.nn.Parameter(torch.randn(8, 4, 3, 3))
    optimizer = build_optimizers(DHRNet(2, 1, 16), "muon", 0.1)[0]
    optimizer.param_groups[0]["params"] = [weight]
    weight.grad = torch.randn(8, 4, 3, 3)
    unit = weight.detach() * 8**0.5 / weight.detach().norm()
    step = orthogonalize((1.6 * weight.grad).flatten(1)).view_as(weight)  # Nesterov's first
    optimizer.step()
    assert torch.allclose(weight, unit - 0.1 * step, atol=1e-5)


def test_sgd_has_the_published_momentum_and_weight_decay():
    (optimizer,) = build_optimizers(DHRNet(2, 1, 16), "sgd", 0.05)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.05, 0.9, 5e-4)


def test_halving_halves_the_rate_eight_times():
    shares = [halving(step, 900) for step in range(900)]
    assert shares == [0.5 ** (step // 100) for step in range(900)]


def test_rate_rises_over_a_tenth_of_the_steps_and_falls_to_nearly_0():
    shares = [one_cycle(step, 1000) for step in range(1000)]
    assert np.argmax(shares) in (99, 100)
    assert max(shares) == pytest.approx(1, abs=0.01)
    assert 0 < shares[0] < 0.02
    assert 0 < shares[-1] < 0.002


def test_a_second_cycle_is_half_as_high_and_falls_from_a_plateau():
    shares = [two_cycles(step, 1600) for step in range(1600)]
    assert shares[:1100] == [one_cycle(step, 1100) for step in range(1100)]
    assert max(shares[1100:]) == pytest.approx(0.5, abs=0.01)
    assert shares[1300:1500] == [0.2] * 200  # where weights are averaged
    assert shares[1500:] == pytest.approx([0.002 * (100 - step) for step in range(100)])


def test_the_shortest_runs_have_a_rate_too():
    for total in range(1, 40):
        assert all(0 < two_cycles(step, total) < 1.2 for step in range(total))


def test_the_shipped_network_takes_2_gflop_an_image_as_pytorch_counts_them():
    assert gflop_per_image(DHRNet(10, arch="deep")) == pytest.approx(2.018, abs=0.001)


@pytest.mark.parametrize("weight", [0.0, 3.0])
@pytest.mark.parametrize("loss", ["one-vs-rest", "softmax"])
def test_a_step_descends_cross_entropy_plus_weighted_squared_error(monkeypatch, loss, weight):
    class Recorder:
        param_groups = ()

        def step(self):
            self.gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]

        def zero_grad(self):
            network.zero_grad()

    autocast = torch.autocast("cpu", enabled=False)
    monkeypatch.setattr(train_dhr_nn, "autocast", lambda device: autocast)
    flags = ["--dry-run", "--batch-size", "16", "--loss", loss, "--reconstruction-weight", weight]
    args = parse_args([*map(str, flags), "--epochs", "1", "--cutout", "3"])
    complete_settings(args, 20, 16)
    data, recorder = make_data(make_images(20), np.arange(20) % 2), Recorder()
    network = build_network(args, data)
    train_dhr_nn.train(args, network, [recorder], data, {"epoch": 0}, Path("unused"))

    images, labels = map(torch.from_numpy, data.train)
    batch, target = next(batches(images, labels, 16, True, "shift", 3, args.seed, 0))
    output = network.train()(batch)
    definition = {"softmax": F.cross_entropy, "one-vs-rest": one_vs_rest}[loss]
    mse = F.mse_loss(output.reconstruction, network.normalize(batch))
    (definition(output.logits, target) + weight * mse).backward()
    expected = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(recorder.gradients) == len(expected) > 10
    for got, wanted in zip(recorder.gradients, expected, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-5)
