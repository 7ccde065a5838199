"""Training: its parts against their definitions, and whole runs on a few digits."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import report
import train_dhr_nn
from models import DHRNet, load_checkpoint
from open_set_data import ImageSet, KnownData, load_known
from train_dhr_nn import RECIPES, broken_step, build_network, complete_settings, parse_args
from training import (
    GREY,
    augment,
    batches,
    build_optimizers,
    gflop_per_image,
    one_cycle,
    one_vs_rest,
    orthogonalize,
)

ROOT = Path(__file__).parent.parent


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
    batch = augment(torch.from_numpy(images), index, mirrored, 0, generator).numpy()
    seen = set()
    for i in range(200):
        upright = batch[i][:, :, ::-1] if mirrored[i] else batch[i]
        (shift,) = shifts_of(images[index[i]], upright, farthest=2)
        seen.add(tuple(shift))
    assert seen == {(row, column) for row in range(-2, 3) for column in range(-2, 3)}


def test_cutout_makes_one_grey_square_in_each_image_anywhere():
    images = torch.full((1, 16, 16, 3), 255, dtype=torch.uint8)
    index, mirrored = torch.zeros(500, dtype=torch.long), torch.zeros(500, dtype=torch.bool)
    cut = augment(images, index, mirrored, 6, torch.Generator().manual_seed(0)) == GREY
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


@pytest.fixture
def unmoved(monkeypatch):
    """Images come out of `augment` as they are, and whether they were to be mirrored is kept."""
    seen = []

    def keep(images, index, mirrored, cutout, generator):
        seen.append(mirrored)
        return images[index].permute(0, 3, 1, 2)

    monkeypatch.setattr("training.augment", keep)
    return seen


def test_an_epoch_shows_every_image_with_its_label_once_in_an_order_of_its_own(unmoved):
    images = torch.arange(100, dtype=torch.uint8)[:, None, None, None].expand(100, 16, 16, 1)
    labels = torch.arange(100) % 7
    orders = []
    for epoch in (0, 1, 1):
        drawn = list(batches(images, labels, 20, False, 0, seed=3, epoch=epoch))
        assert len(drawn) == 5
        shown = torch.cat([batch[:, 0, 0, 0] for batch, _ in drawn])
        assert sorted(shown.tolist()) == [*range(100)]
        assert torch.equal(torch.cat([label for _, label in drawn]), shown.long() % 7)
        orders.append(shown)
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(orders[1], orders[2])  # what a resumed run draws


def test_every_image_is_mirrored_every_other_epoch_and_digits_never(unmoved):
    images = torch.arange(100, dtype=torch.uint8)[:, None, None, None].expand(100, 16, 16, 1)
    mirrored = []
    for epoch in (0, 1):
        unmoved.clear()
        drawn = list(batches(images, torch.arange(100), 20, True, 0, seed=0, epoch=epoch))
        order = torch.cat([label for _, label in drawn])
        mirrored.append(torch.cat(unmoved)[order.argsort()])
    assert torch.equal(mirrored[0], ~mirrored[1])
    assert 30 < mirrored[0].sum() < 70
    unmoved.clear()
    list(batches(images, torch.arange(100), 20, False, 0, seed=0, epoch=1))
    assert not torch.cat(unmoved).any()


@pytest.mark.parametrize(("dataset", "mirrored"), [("cifar10", True), ("digits", False)])
def test_digits_are_not_mirrored(dataset, mirrored):
    args = parse_args(["--dataset", dataset])
    network = build_network(args, make_data(make_images(20), np.arange(20) % 2))
    assert network.config["mirrored"] == mirrored


def test_normalisation_comes_from_images_of_every_class(monkeypatch):
    """Also where they lie class by class, as in folders, and are too many to look at all."""
    images = np.full((1000, 16, 16, 1), 10, np.uint8)
    images[500:] = 200
    monkeypatch.setattr(train_dhr_nn, "STATISTICS_IMAGES", 50)
    network = build_network(parse_args([]), make_data(images, np.arange(1000) // 500))
    assert 255 * network.mean.item() == pytest.approx(105, abs=5)


# Losses, optimisers, rate


def test_one_vs_rest_sums_the_cross_entropies_of_k_sigmoids():
    logits, labels = torch.randn(8, 5), torch.arange(8) % 5
    own, p = torch.eye(5, dtype=torch.bool)[labels], torch.sigmoid(logits)
    by_hand = -torch.where(own, p, 1 - p).log().sum() / 8
    assert one_vs_rest(logits, labels).item() == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
def test_orthogonalize_moves_singular_values_to_about_1(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    moved = orthogonalize(matrix)
    assert torch.allclose(u.T @ moved @ v.T, torch.diag(torch.diag(u.T @ moved @ v.T)), atol=1e-4)
    assert 0.6 < torch.linalg.svdvals(moved).min() <= torch.linalg.svdvals(moved).max() < 1.3


@pytest.mark.parametrize("arch", RECIPES)
def test_every_trained_weight_has_one_optimiser_and_muon_the_encoders_filters(arch):
    network = DHRNet(3, 1, 16, arch)
    optimizers = build_optimizers(network, 0.1)
    groups = [[id(p) for g in each.param_groups for p in g["params"]] for each in optimizers]
    trained = {id(p) for p in network.parameters() if p.requires_grad}
    assert sorted(groups[0] + groups[1]) == sorted(trained)
    assert set(groups[0]) == {id(p) for p in network.encoder.parameters() if p.ndim == 4}


def test_muon_keeps_filters_at_their_norm_and_moves_along_the_orthogonalised_gradient():
    weight = torch.nn.Parameter(torch.randn(8, 4, 3, 3))
    optimizer = train_dhr_nn.build_optimizers(DHRNet(2, 1, 16), 0.1)[0]
    optimizer.param_groups[0]["params"] = [weight]
    weight.grad = torch.randn(8, 4, 3, 3)
    unit = weight.detach() * 8**0.5 / weight.detach().norm()
    step = orthogonalize((1.6 * weight.grad).flatten(1)).view_as(weight)  # Nesterov's first
    optimizer.step()
    assert torch.allclose(weight, unit - 0.1 * step, atol=1e-5)


def test_rate_rises_over_a_tenth_of_the_steps_and_falls_to_nearly_0():
    shares = [one_cycle(step, 1000) for step in range(1000)]
    assert np.argmax(shares) in (99, 100)
    assert max(shares) == pytest.approx(1, abs=0.01)
    assert 0 < shares[0] < 0.02
    assert 0 < shares[-1] < 0.002


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
    data, recorder = make_data(make_images(20), np.arange(20) % 2), Recorder()
    network = build_network(args, data)
    train_dhr_nn.train(args, network, [recorder], data, {"epoch": 0}, Path("unused"))

    images, labels = map(torch.from_numpy, data.train)
    batch, target = next(batches(images, labels, 16, True, 3, args.seed, epoch=0))
    output = network.train()(batch)
    definition = {"softmax": F.cross_entropy, "one-vs-rest": one_vs_rest}[loss]
    mse = F.mse_loss(output.reconstruction, network.normalize(batch))
    (definition(output.logits, target) + weight * mse).backward()
    expected = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(recorder.gradients) == len(expected) > 10
    for got, wanted in zip(recorder.gradients, expected, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-5)


def test_broken_step_counts_from_1_and_sees_weights_that_the_last_step_broke():
    network, losses = DHRNet(2, 1, 16), torch.ones(4, 3)
    assert broken_step(losses, network) == 0
    losses[2, 1] = float("inf")
    assert broken_step(losses, network) == 3
    network.bottlenecks[0].bias.data[0] = float("nan")
    assert broken_step(torch.ones(4, 3), network) == 4


# Recipes and flags


def completed(*flags, count=45_000, size=32):
    args = parse_args([*flags])
    complete_settings(args, count, size)
    return args


@pytest.mark.parametrize("arch", RECIPES)
def test_arch_names_a_whole_recipe_and_flags_override_it(arch):
    args, recipe = completed("--arch", arch), RECIPES[arch]
    assert {name: getattr(args, name) for name in recipe._fields} == recipe._asdict()
    flags = ["--epochs", "3", "--batch-size", "100", "--lr", "0.3", "--loss", "softmax"]
    args = completed("--arch", arch, *flags, "--cutout", "4")
    settings = (args.epochs, args.batch_size, args.lr, args.loss, args.cutout)
    assert settings == (3, 100, 0.3, "softmax", 4)


def test_the_deep_recipe_is_that_of_the_shipped_network():
    stored = load_checkpoint(ROOT / "dhr_net.pt")[1]["train_args"]
    deep = RECIPES["deep"]._asdict()
    assert stored["arch"] == "deep"
    assert {name: stored[name] for name in deep} == deep


def test_a_checkpoint_stores_the_settings_it_was_trained_with(tiny_net):
    checkpoint = load_checkpoint(tiny_net)[1]
    assert checkpoint["train_args"] == {
        "dataset": "digits", "known_classes": "0,1", "image_size": None, "arch": "fast",
        "epochs": 2, "batch_size": 120, "lr": 0.1, "loss": "softmax", "cutout": 0,
        "reconstruction_weight": 1.0, "seed": 0,
    }  # fmt: skip
    assert checkpoint["known_classes"] == ["0", "1"]
    assert checkpoint["epoch"] == len(checkpoint["course"]) == 2
    assert checkpoint["images"]["count"] == 288
    assert checkpoint["pflop"] > 0
    assert {"python", "torch", "libmr"} <= checkpoint["versions"].keys()


def test_a_small_set_takes_smaller_batches_and_more_epochs():
    args = completed("--arch", "deep", count=90)
    assert (args.batch_size, args.epochs) == (16, 60)  # 300 steps
    args = completed("--arch", "deep", count=4000)
    assert (args.batch_size, args.epochs) == (400, 44)  # 10 steps in an epoch
    args = completed("--epochs", "2", "--batch-size", "50", count=90)
    assert (args.batch_size, args.epochs) == (50, 2)


@pytest.mark.parametrize(
    ("flags", "processes", "message"),
    [
        (["--batch-size", "101"], 1, "--batch-size is 101; expected at most 100"),
        (["--cutout", "33"], 1, "--cutout is 33; expected at most 32 pixels"),
        (["--batch-size", "51"], 2, "--batch-size is 51; expected a multiple of 2"),
    ],
)
def test_settings_that_do_not_fit_the_images_are_refused(monkeypatch, flags, processes, message):
    monkeypatch.setattr(train_dhr_nn, "world_size", lambda: processes)
    with pytest.raises(ValueError, match=message):
        completed(*flags, count=100)


@pytest.mark.parametrize(
    "flags", [["--epochs", "0"], ["--lr", "nan"], ["--epoch", "3"], ["--arch", "medium"]]
)
def test_bad_arguments_are_status_2(flags):
    with pytest.raises(SystemExit) as caught:
        train_dhr_nn.main(flags)
    assert caught.value.code == 2


def test_training_does_not_replace_the_shipped_network_unless_told_to():
    assert parse_args([]).out == Path("trained.pt")
    assert "/*.pt" in (ROOT / ".gitignore").read_text().splitlines()


def test_help_gives_defaults(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    assert capsys.readouterr().out.count("default") >= 9


# Whole runs


def weights(path):
    return load_checkpoint(path)[0].state_dict()


def same_weights(first, second):
    ours, theirs = weights(first), weights(second)
    return all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


def poisoned(images):
    """Other images, in another number, under other labels."""
    keep = slice(len(images.labels) // 2)
    return ImageSet(255 - images.images[keep], images.labels[::-1][keep].copy())


def assert_equal(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"seconds"}:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        for pair in zip(ours, theirs, strict=True):
            assert_equal(*pair)
    else:
        assert ours == theirs


def test_no_test_or_unknown_image_reaches_training(
    train, tiny_run, tiny_net, tmp_path, monkeypatch
):
    """The whole checkpoint, open-set rule included, is the same to the bit whatever they are."""

    def load_poisoned(*args):
        data = load_known(*args)
        test, unknown = poisoned(data.test_known), 255 - data.test_unknown[::2]
        return data._replace(test_known=test, test_unknown=unknown)

    monkeypatch.setattr(train_dhr_nn, "load_known", load_poisoned)
    assert train(tmp_path / "net.pt", *tiny_run) == 0
    assert_equal(load_checkpoint(tmp_path / "net.pt")[1], load_checkpoint(tiny_net)[1])


def test_a_stopped_run_resumes_to_the_same_weights_to_the_bit(
    train, stopped_run, tiny_run, tiny_net, tmp_path, error_line
):
    out, partial = tmp_path / "net.pt", shutil.copy(stopped_run, tmp_path / "net.pt.partial")
    assert train(out, *tiny_run) == 1
    assert f"{partial} holds an unfinished run: go on with --resume, or remove it" in error_line()
    assert train(out, "--resume") == 0
    assert same_weights(out, tiny_net)
    assert sorted(os.listdir(tmp_path)) == ["net.pt", "net.pt.png"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["deep", "vgg"])
def test_the_other_networks_resume_to_the_same_weights_too(
    train, tiny_run, tmp_path, monkeypatch, arch
):
    whole, stopped = tmp_path / "whole.pt", tmp_path / "stopped.pt"
    flags = [*tiny_run, "--arch", arch, "--cutout", "4"]
    assert train(whole, *flags) == 0
    save = train_dhr_nn.save_checkpoint

    def save_and_stop(*args, **entries):
        save(*args, **entries)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_dhr_nn, "save_checkpoint", save_and_stop)
        assert train(stopped, *flags) == 130
    assert train(stopped, "--resume") == 0
    assert same_weights(whole, stopped)


def test_nothing_to_resume_is_said(train, tiny_net, tmp_path, error_line):
    assert train(tmp_path / "net.pt", "--resume") == 1
    assert "net.pt.partial does not exist: nothing to resume" in error_line()
    shutil.copy(tiny_net, tmp_path / "net.pt.partial")
    assert train(tmp_path / "net.pt", "--resume") == 1
    assert "net.pt.partial is a finished network: nothing to resume" in error_line()


def test_unfinished_run_of_another_version_is_named(train, stopped_run, tmp_path, error_line):
    run = torch.load(stopped_run, weights_only=True)
    del run["train_args"]["cutout"]
    torch.save(run, tmp_path / "net.pt.partial")
    before = (tmp_path / "net.pt.partial").read_bytes()
    assert train(tmp_path / "net.pt", "--resume") == 1
    assert "was written by another version: remove it and start again" in error_line()
    assert (tmp_path / "net.pt.partial").read_bytes() == before


def move_run(photos_and_net, photos):
    """The stopped run of the pictures, as if it had been trained where they are now."""
    run = torch.load(photos_and_net / "stopped.pt.partial", weights_only=True)
    run["train_args"]["dataset"] = f"folder:{photos}"
    torch.save(run, photos.parent / "net.pt.partial")
    return photos.parent / "net.pt"


def test_resume_says_that_images_have_changed_and_goes_on(train, photos_and_net, photos, capsys):
    out = move_run(photos_and_net, photos)
    for file in sorted((photos / "one").iterdir())[:5]:
        file.unlink()
    assert train(out, "--resume") == 0
    assert "images have changed since" in capsys.readouterr().err
    assert out.exists()


def test_resume_names_both_lists_of_classes_when_they_differ(
    train, photos_and_net, photos, error_line
):
    out = move_run(photos_and_net, photos)
    (photos / "one").rename(photos / "two")
    assert train(out, "--resume") == 1
    line = error_line()
    assert "one, zero" in line
    assert "two, zero" in line


def test_infinite_loss_stops_and_keeps_the_last_epoch(
    train, tiny_run, tiny_net, tmp_path, monkeypatch, error_line
):
    out, partial = tmp_path / "net.pt", tmp_path / "net.pt.partial"
    with monkeypatch.context() as patch:
        patch.setattr(
            train_dhr_nn,
            "one_cycle",
            lambda step, total: one_cycle(step, total) if step < 2 else float("inf"),
        )
        assert train(out, *tiny_run) == 1
    line = error_line()
    assert "loss not finite at step 2 of epoch 2; try a smaller --lr" in line
    assert f"{partial} holds epoch 1" in line
    assert not out.exists()
    assert train(out, "--resume") == 0
    assert same_weights(out, tiny_net)


def test_out_of_memory_is_one_line(train, tiny_run, tmp_path, monkeypatch, error_line):
    def too_much(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore text")

    monkeypatch.setattr(train_dhr_nn, "batches", too_much)
    assert train(tmp_path / "net.pt", *tiny_run) == 1
    assert error_line().endswith("error: out of memory; try a smaller --batch-size")


def test_dry_run_writes_nothing(train, tiny_run, tmp_path, capsys):
    assert train(tmp_path / "net.pt", *tiny_run, "--dry-run") == 0
    assert not os.listdir(tmp_path)
    assert "took one step, wrote nothing" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_is_refused_before_training(train, tmp_path, error_line):
    assert train(tmp_path / "absent" / "net.pt") == 1
    assert "cannot write there (" in error_line()


@pytest.mark.parametrize("name", ["net.png", "cat.pt"])
def test_the_picture_of_a_run_replaces_no_other_file(train, stopped_run, tmp_path, name):
    photograph = tmp_path / "cat.png"
    photograph.write_bytes(b"a photograph")
    shutil.copy(stopped_run, tmp_path / f"{name}.partial")
    assert train(tmp_path / name, "--resume") == 0
    assert load_checkpoint(tmp_path / name)[1]["epoch"] == 2
    assert photograph.read_bytes() == b"a photograph"
    assert sorted(os.listdir(tmp_path)) == sorted(["cat.png", name, f"{name}.png"])


def test_a_picture_that_fails_does_not_undo_the_run(
    train, stopped_run, tmp_path, monkeypatch, capsys
):
    def fail(course):
        raise RuntimeError("no font")

    monkeypatch.setattr(report, "draw_training", fail)
    shutil.copy(stopped_run, tmp_path / "net.pt.partial")
    assert train(tmp_path / "net.pt", "--resume") == 0
    assert "could not be drawn: no font" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["net.pt"]


def test_training_runs_where_a_notebook_asks_for_a_picture_backend_that_is_absent(
    tiny_run, tmp_path
):
    environment = os.environ | {"MPLBACKEND": "module://absent", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "train_dhr_nn.py", *tiny_run, "--epochs", "1"]
    command += ["--device", "cpu", "--out", tmp_path / "net.pt"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert sorted(os.listdir(tmp_path)) == ["net.pt", "net.pt.png"]
