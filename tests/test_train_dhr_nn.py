"""train_dhr_nn.py: its flags and recipes, and whole runs on a few digits."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import poisoned, same_weights, stop_after, weights

import report
import train_dhr_nn
from models import load_checkpoint
from open_set_data import load_known
from train_dhr_nn import RECIPES, build_network, complete_settings, parse_args
from training import SCHEDULES, one_cycle

ROOT = Path(__file__).parent.parent


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
        "optimizer": "muon", "augmentation": "shift", "schedule": "one-cycle",
        "reconstruction_weight": 1.0, "seed": 0, "no_mirror": False,
    }  # fmt: skip
    assert checkpoint["known_classes"] == ["0", "1"]
    assert checkpoint["epoch"] == len(checkpoint["course"]) == 2
    assert checkpoint["images"]["count"] == 288
    assert checkpoint["pflop"] > 0
    assert {"python", "torch", "libmr"} <= checkpoint["versions"].keys()


def test_a_small_set_takes_smaller_batches_and_more_epochs(monkeypatch):
    args = completed("--arch", "fast", count=90)
    assert (args.batch_size, args.epochs) == (16, 60)  # 300 steps
    args = completed("--arch", "tuned", count=90)
    assert (args.batch_size, args.epochs) == (16, 20)  # 100 steps
    args = completed("--arch", "deep", count=4000)
    assert (args.batch_size, args.epochs) == (400, 64)  # 10 steps in an epoch
    monkeypatch.setattr(train_dhr_nn, "world_size", lambda: 32)
    assert completed(count=200).batch_size == 64  # two images for each process
    args = completed("--epochs", "2", "--batch-size", "64", count=90)
    assert (args.batch_size, args.epochs) == (64, 2)


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
    ("flag", "value", "message"),
    [
        ("--epochs", "0", "0; expected a whole number, 1 to 4,294,967,295"),
        ("--epochs", "1.5", "1.5; expected a whole number, 1 to 4,294,967,295"),
        ("--lr", "nan", "nan; expected a number, 1e-09 to 4,294,967,295"),
        ("--image-size", "15", "15; expected a whole number, 16 to 1,024"),
        ("--image-size", "1025", "1025; expected a whole number, 16 to 1,024"),
        ("--arch", "medium", "invalid choice"),
        ("--epoch", "3", "unrecognized arguments"),
    ],
)
def test_bad_arguments_are_status_2(capsys, flag, value, message):
    with pytest.raises(SystemExit) as caught:
        train_dhr_nn.main([flag, value])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_training_does_not_replace_the_shipped_network_unless_told_to():
    assert parse_args([]).out == Path("trained.pt")
    assert "/*.pt" in (ROOT / ".gitignore").read_text().splitlines()


def test_help_gives_defaults(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    options = capsys.readouterr().out.split("\n  --")[1:]
    of_recipe = {"epochs", "batch-size", "lr", "loss", "cutout"}
    without = {option.split()[0] for option in options if "default" not in option}
    assert without == of_recipe | {"resume", "dry-run"}


@pytest.mark.parametrize(("size", "new"), [(16, {"head"}), (20, {"head", "deconvs"})])
def test_training_on_a_folder_goes_on_from_the_shipped_weights(photos, size, new):
    args = completed("--dataset", f"folder:{photos}")
    assert (args.arch, completed().arch) == ("tuned", "fast")
    network = build_network(args, load_known(args.dataset, photos, "", size))
    shipped = weights(ROOT / "dhr_net.pt")
    differing = {
        name.split(".")[0]
        for name, weight in network.state_dict().items()
        if not torch.equal(weight, shipped[name])
    }
    assert differing == new


@pytest.mark.parametrize("flags", [[], ["--no-mirror"]])
def test_pictures_are_mirrored_unless_told_not_to(photos, flags):
    args = parse_args(["--dataset", f"folder:{photos}", "--arch", "fast", *flags])
    network = build_network(args, load_known(args.dataset, photos, "", 16))
    assert network.config["mirrored"] == (not flags)


def test_grey_images_cannot_go_on_from_colour_ones(capsys, tmp_path):
    out = str(tmp_path / "net.pt")
    assert train_dhr_nn.main(["--dataset", "digits", "--arch", "tuned", "--out", out]) == 1
    assert "--arch tuned needs colour images" in capsys.readouterr().err


# Whole runs


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
@pytest.mark.parametrize(("arch", "epochs", "stop"), [("deep", 16, 14), ("vgg", 2, 1)])
def test_the_other_networks_resume_to_the_same_weights_too(
    train, tiny_run, tmp_path, monkeypatch, few_fractals, arch, epochs, stop
):
    """The one that averages weights is stopped amid the epochs it averages over, 14 and 15."""
    whole, stopped = tmp_path / "whole.pt", tmp_path / "stopped.pt"
    flags = [*tiny_run, "--epochs", epochs, "--arch", arch, "--cutout", "4"]
    assert train(whole, *flags) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        assert train(stopped, *flags) == 130
    averaged = torch.load(f"{stopped}.partial", weights_only=True).get("averaged")
    assert averaged["n_averaged"] == 2 if arch == "deep" else averaged is None
    assert train(stopped, "--resume") == 0
    assert same_weights(whole, stopped)
    assert "averaged" not in load_checkpoint(whole)[1]


def test_the_last_steps_go_on_from_averaged_weights(
    train, tiny_run, tmp_path, monkeypatch, few_fractals
):
    monkeypatch.setitem(RECIPES, "fast", RECIPES["fast"]._replace(schedule="two-cycles"))
    averaged, before_step = [], []

    class Watched(train_dhr_nn.AveragedModel):
        def update_parameters(self, network):
            super().update_parameters(network)
            averaged.append(network.head[-1].weight.detach().clone())

    def watched(network):
        def forward(batch):
            before_step.append(network.head[-1].weight.detach().clone())
            return network(batch)

        return forward

    monkeypatch.setattr(train_dhr_nn, "AveragedModel", Watched)
    monkeypatch.setattr(train_dhr_nn, "replicated", watched)
    assert train(tmp_path / "net.pt", *tiny_run, "--epochs", 8) == 0
    assert (len(averaged), len(before_step)) == (2, 16)  # the swap is amid the last epoch
    assert torch.allclose(before_step[15], torch.stack(averaged).mean(dim=0))


def test_nothing_to_resume_is_said(train, tiny_net, tmp_path, error_line):
    assert train(tmp_path / "net.pt", "--resume") == 1
    assert "net.pt.partial does not exist: nothing to resume" in error_line()
    shutil.copy(tiny_net, tmp_path / "net.pt.partial")
    assert train(tmp_path / "net.pt", "--resume") == 1
    assert "net.pt.partial is a finished network: nothing to resume" in error_line()


def test_ctrl_c_says_where_it_saved_and_how_to_go_on(
    train, tiny_run, tmp_path, monkeypatch, error_line
):
    stop_after(monkeypatch, 1)
    assert train(tmp_path / "net.pt", *tiny_run) == 130
    assert error_line() == f"stopped; add --resume to go on ({tmp_path / 'net.pt.partial'})"


def test_settings_that_a_resumed_run_does_not_take_are_refused(
    train, stopped_run, tiny_run, tmp_path, error_line
):
    shutil.copy(stopped_run, tmp_path / "net.pt.partial")
    flags = ["--dataset", "mnist", "--arch", "vgg", "--epochs", "9", "--no-mirror", "--resume"]
    assert train(tmp_path / "net.pt", *flags) == 1
    assert "leave out --arch, --dataset, --epochs, --no-mirror, or remove the file" in error_line()


def test_unfinished_run_of_another_version_is_named(train, stopped_run, tmp_path, error_line):
    run = torch.load(stopped_run, weights_only=True)
    del run["train_args"]["cutout"]
    torch.save(run, tmp_path / "net.pt.partial")
    before = (tmp_path / "net.pt.partial").read_bytes()
    assert train(tmp_path / "net.pt", "--resume") == 1
    assert "was written by another version: remove it and start again" in error_line()
    assert (tmp_path / "net.pt.partial").read_bytes() == before


@pytest.fixture
def resume_photos(train, photos_and_net, photos):
    """Go on with the stopped run of the pictures, which have moved."""
    out = photos.parent / "net.pt"
    shutil.copy(photos_and_net / "stopped.pt.partial", f"{out}.partial")
    return lambda: train(out, "--resume", "--dataset", f"folder:{photos}")


def test_resume_says_that_images_have_changed_and_goes_on(resume_photos, photos, capsys):
    for file in sorted((photos / "one").iterdir())[:5]:
        file.unlink()
    assert resume_photos() == 0
    assert "images have changed since" in capsys.readouterr().err
    stored = load_checkpoint(photos.parent / "net.pt")[1]["train_args"]
    assert stored["dataset"] == f"folder:{photos}"


def test_resume_takes_pictures_of_the_size_that_the_network_knows(resume_photos, photos, capsys):
    partial = photos.parent / "net.pt.partial"
    run = torch.load(partial, weights_only=True)
    run["train_args"]["image_size"] = None  # the default, which was another one then
    torch.save(run, partial)
    assert resume_photos() == 0
    printed = capsys.readouterr()
    assert "test images of 16x16 pixels" in printed.out
    assert "images have changed" not in printed.err


def test_resume_names_the_classes_that_have_changed(resume_photos, photos, error_line):
    (photos / "one").rename(photos / "two")
    assert resume_photos() == 1
    assert "(one is missing, two is new); train again" in error_line()


@pytest.mark.parametrize("broken", [2, 3])  # a loss; only the weights, by the run's last step
def test_infinite_loss_stops_and_keeps_the_last_epoch(
    train, tiny_run, tiny_net, tmp_path, monkeypatch, error_line, broken
):
    out, partial = tmp_path / "net.pt", tmp_path / "net.pt.partial"
    with monkeypatch.context() as patch:
        patch.setitem(
            SCHEDULES,
            "one-cycle",
            lambda step, total: one_cycle(step, total) if step < broken else float("inf"),
        )
        assert train(out, *tiny_run) == 1
    line = error_line()
    assert f"loss not finite in epoch 2; remove {partial} and start again" in line
    assert not out.exists()
    assert train(out, "--resume") == 0
    assert same_weights(out, tiny_net)


def test_dry_run_writes_nothing(train, tiny_run, tmp_path, capsys):
    assert train(tmp_path / "net.pt", *tiny_run, "--dry-run") == 0
    assert not os.listdir(tmp_path)
    assert "took one step, wrote nothing" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_is_refused_before_training(train, tmp_path, error_line):
    assert train(tmp_path / "absent" / "net.pt") == 1
    assert "cannot write there (" in error_line()


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
