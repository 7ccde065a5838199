"""Both commands end to end on scikit-learn's digits: six known classes, four unknown."""

import csv
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import compute_openmax
import openmax
import train_dhr_nn
from compute_openmax import Rule
from metrics import open_set_metrics, threshold_accepting
from models import extract, load_checkpoint, prepare_device, unpack_rule
from open_set_data import ImageSet
from openmax import activation_vectors

ROOT = Path(__file__).parent.parent
TRAIN = ["--dataset", "digits", "--known-classes", "0,1,2,3,4,5", "--batch-size", "100"]


def train(out, *flags):
    return train_dhr_nn.main([*TRAIN, "--device", "cpu", "--out", str(out), *flags])


def evaluate(checkpoint, data_dir, *flags):
    return compute_openmax.main(
        ["--checkpoint", str(checkpoint), "--data-dir", str(data_dir), "--device", "cpu", *flags]
    )


@pytest.fixture(scope="module")
def digits_net(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits") / "digits.pt"
    assert train(path, "--epochs", "6") == 0
    return path


def test_train_then_evaluate(digits_net, tmp_path, capsys):
    assert evaluate(digits_net, tmp_path, "--json", str(tmp_path / "results.json")) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["closed_set_accuracy"] > 0.9
    assert results["activations"] == "extracted"
    assert set(results["methods"]) == {"msp", "max_logit", "openmax", "crosr", "dhr_openmax"}
    for method in results["methods"].values():
        assert set(method) == {"held-out-classes"}
        metrics = method["held-out-classes"]
        assert set(metrics) == {
            *("auroc", "aupr_known", "aupr_unknown", "fpr_at_95_tpr", "detection_error"),
            *("oscr", "macro_f1", "macro_f1_at_half"),
        }
        assert all(0 <= value <= 1 for value in metrics.values())
        assert metrics["auroc"] > 0.6
    assert {"load", "extract", "fit", "score"} == set(results["seconds"])
    assert "held-out-classes (unknown)" in capsys.readouterr().out


def test_same_command_twice_gives_the_same_table(digits_net, tmp_path):
    tables = []
    for run, flags in enumerate([[], [], ["--no-cache"], ["--batch-size", "97", "--no-cache"]]):
        path = tmp_path / f"{run}.json"
        assert evaluate(digits_net, tmp_path, "--json", str(path), *flags) == 0
        tables.append(json.loads(path.read_text())["methods"])
    assert tables[0] == tables[1] == tables[2] == tables[3]


@pytest.mark.parametrize("bfloat16", [False, True])
def test_scores_do_not_depend_on_batch_size_threads_or_order(digits_net, tmp_path, bfloat16):
    model, meta = load_checkpoint(digits_net)
    model.to(memory_format=torch.channels_last)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)
    sets = compute_openmax.load_image_sets(meta, ["train", "val", "test_known"], tmp_path, seed=0)

    def extracted(name, batch_size, step=1, stop=None):
        images = ImageSet(*(array[:stop:step].copy() for array in sets[name]))
        device = torch.device("cpu")
        got = extract(model, images, name, batch_size, device, autocast)
        return compute_openmax.Activations(*(array[::step] for array in got))

    train, val, whole = (extracted(name, 500) for name in sets)
    others = [extracted("test_known", 97), extracted("test_known", 500, -1)]
    for other in others:
        assert all(map(np.array_equal, other, whole))
    for one_by_one, array in zip(extracted("test_known", 1, stop=2), whole, strict=True):
        assert np.array_equal(one_by_one, array[:2])
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    others.append(extracted("test_known", 500))
    torch.set_num_threads(threads)
    rule = compute_openmax.Rule("max", "euclidean", 20, 0)
    for method in compute_openmax.METHODS.values():
        scorer = method(train, val, rule)
        for other in others:
            assert np.array_equal(other.labels, whole.labels)
            assert scorer(other).unknownness == pytest.approx(
                scorer(whole).unknownness, rel=1e-5, abs=1e-5
            )
            difference = scorer(other).probabilities - scorer(whole).probabilities
            assert np.abs(difference).max() < 1e-5


def test_damaged_cache_is_made_anew(digits_net, tmp_path, capsys):
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    assert evaluate(digits_net, tmp_path, "--json", str(first)) == 0
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert evaluate(digits_net, tmp_path, "--json", str(second)) == 0
    assert capsys.readouterr().err.count("is damaged") == 4
    assert json.loads(first.read_text())["methods"] == json.loads(second.read_text())["methods"]


def poisoned(images):
    """Other images, in another number, under other labels."""
    keep = slice(len(images.labels) // 2)
    return ImageSet(255 - images.images[keep], images.labels[::-1][keep].copy())


@pytest.mark.parametrize("poison", [("test_known", "held-out-classes"), ("val",)])
def test_no_test_or_unknown_image_reaches_fit_or_threshold(
    digits_net, tmp_path, monkeypatch, poison
):
    """Poisoned test and unknown images leave every fitted parameter and threshold as it was, bit
    for bit; poisoned validation images, for comparison, do not."""
    load = compute_openmax.load_image_sets

    def evaluate_recording(*names):
        """All that is fitted, the scores of an image by every fitted method, the thresholds."""
        fitted, scores, thresholds = [], [], []

        def load_poisoned(*args):
            sets = load(*args)
            return {k: poisoned(v) if k in names else v for k, v in sets.items()}

        def recording(fit):
            def record(self, *args):
                fit(self, *args)
                fitted.append(pickle.dumps(vars(self)))
                return self

            return record

        def scoring(method):
            def record(train, val, rule):
                scorer = method(train, val, rule)
                probe = compute_openmax.Activations(*(array[:1] * 0 + 1 for array in train))
                scores.append(np.column_stack(scorer(probe)).tobytes())
                return scorer

            return record

        def measured(known, labels, unknown, threshold):
            thresholds.append(threshold)
            return open_set_metrics(known, labels, unknown, threshold)

        methods = {name: scoring(method) for name, method in compute_openmax.METHODS.items()}
        with monkeypatch.context() as patch:
            patch.setattr(compute_openmax, "load_image_sets", load_poisoned)
            patch.setattr(compute_openmax, "METHODS", methods)
            patch.setattr(compute_openmax, "open_set_metrics", measured)
            for kind in (openmax.OpenMax, openmax.DHROpenMax):
                patch.setattr(kind, "fit", recording(kind.fit))
            assert evaluate(digits_net, tmp_path, "--tail-size", "5") == 0
        assert fitted
        assert len(scores) == len(thresholds) == len(methods)
        return fitted, scores, thresholds

    same = evaluate_recording() == evaluate_recording(*poison)
    assert same == ("test_known" in poison)


def test_no_test_or_unknown_image_reaches_training(tmp_path, monkeypatch):
    """The checkpoint is the same to the last bit whatever the test and unknown images are."""
    load = train_dhr_nn.load_known

    def load_poisoned(*args):
        data = load(*args)
        test = poisoned(data.test_known)
        return data._replace(test_known=test, test_unknown=255 - data.test_unknown[::2])

    flags = ["--epochs", "2", "--batch-size", "500"]
    assert train(tmp_path / "clean.pt", *flags) == 0
    monkeypatch.setattr(train_dhr_nn, "load_known", load_poisoned)
    assert train(tmp_path / "poisoned.pt", *flags) == 0
    clean, other = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("clean", "poisoned")
    )
    for row in clean["course"] + other["course"]:
        del row["seconds"]
    assert_equal(clean, other)


def assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        for pair in zip(a, b, strict=True):
            assert_equal(*pair)
    else:
        assert a == b


def test_own_images_get_a_class_or_unknown(digits_net, tmp_path, capsys):
    noise_files(tmp_path, 3)
    path = tmp_path / "results.json"
    assert evaluate(digits_net, tmp_path, "--images", str(tmp_path), "--json", str(path)) == 0
    predictions = json.loads(path.read_text())["images"]
    assert [Path(row["path"]).name for row in predictions] == [f"noise_{i}.png" for i in range(3)]
    for row in predictions:
        assert row["prediction"] in {"unknown", "0", "1", "2", "3", "4", "5"}
        assert row["nearest_class"] in {"0", "1", "2", "3", "4", "5"}
        assert 0 <= row["probability"] <= 1
        assert row["probability"] >= 0.5 or row["prediction"] != "unknown"
    assert "noise_2.png" in capsys.readouterr().out


def noise_files(folder, count):
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"noise_{i}.png")
    return folder


def test_own_images_need_nothing_but_the_checkpoint(digits_net, tmp_path, capsys, monkeypatch):
    """The stored rule answers as one fitted to the data; unreadable files end no run."""
    noise_files(tmp_path, 7)
    (tmp_path / "noise_7.png").write_text("no image")
    without_rule = tmp_path / "without.pt"
    checkpoint = torch.load(digits_net, weights_only=True)
    del checkpoint["open_set_rule"]
    torch.save(checkpoint, without_rule)
    answers = []
    for net in (without_rule, digits_net):
        path = tmp_path / "images.csv"
        flags = ["--images", str(tmp_path), "--csv", str(path), "--batch-size", "3"]
        assert evaluate(net, tmp_path, *flags) == 0
        answers.append(list(csv.DictReader(path.read_text().splitlines())))
        monkeypatch.setattr(compute_openmax, "load_known", None)  # no data from here on
    fitted, stored = answers
    assert len(stored) == 7
    for a, b in zip(fitted, stored, strict=True):
        assert a == b
    assert "noise_7.png: not a readable image" in capsys.readouterr().err


def test_stored_rule_is_the_one_fitted_to_training_and_validation_images(digits_net, tmp_path):
    model, meta = load_checkpoint(digits_net)
    rule, threshold = unpack_rule(model, meta)
    device, autocast = prepare_device("cpu")
    sets = compute_openmax.load_image_sets(meta, ["train", "val"], tmp_path, seed=0)
    model.to(memory_format=torch.channels_last)
    train, val = (extract(model, s, None, 100, device, autocast) for s in sets.values())
    method = compute_openmax.dhr_openmax(train, val, Rule("max", "euclidean", 20, 0))
    assert np.array_equal(
        method(val).unknownness, rule.decision_function(activation_vectors(val, "avg"))
    )
    assert threshold == threshold_accepting(method(val).unknownness)


@pytest.mark.parametrize(
    "damage",
    [
        lambda rule: rule.pop("threshold"),
        lambda rule: rule["estimator"].pop("weibull_"),
        lambda rule: rule["estimator"].update({"class": "np"}),
        lambda rule: rule["estimator"].update({"class": "cdist"}),
        lambda rule: rule.update(estimator=[1.0]),
    ],
)
def test_damaged_rule_is_one_line(digits_net, tmp_path, capsys, damage):
    checkpoint = torch.load(digits_net, weights_only=True)
    damage(checkpoint["open_set_rule"])
    torch.save(checkpoint, tmp_path / "damaged.pt")
    assert evaluate(tmp_path / "damaged.pt", tmp_path, "--images", str(ROOT)) == 1
    assert "open-set rule in it is damaged" in capsys.readouterr().err


class StopAfter:
    """A save_checkpoint that interrupts training after some epochs, as Ctrl-C would."""

    def __init__(self, epochs):
        self.left, self.save = epochs, train_dhr_nn.save_checkpoint

    def __call__(self, *args, **kwargs):
        self.save(*args, **kwargs)
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("arch", ["fast", "vgg"])
def test_resumed_run_ends_in_the_same_weights(tmp_path, monkeypatch, capsys, arch):
    whole, stopped = tmp_path / "whole.pt", tmp_path / "stopped.pt"
    flags = ["--arch", arch, "--epochs", "2", "--batch-size", "200"]
    assert train(whole, *flags) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train_dhr_nn, "save_checkpoint", StopAfter(1))
        assert train(stopped, *flags) == 130
    assert "add --resume" in capsys.readouterr().err
    assert not stopped.exists()
    assert train(stopped, *flags) == 1  # would lose the unfinished run
    assert "go on with --resume" in capsys.readouterr().err
    assert train(stopped, "--resume") == 0
    a, b = (torch.load(path, weights_only=True)["model_state_dict"] for path in (whole, stopped))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("stopped.png", "stopped.pt", "whole.png", "whole.pt")
    ]


def test_infinite_loss_stops_and_names_the_step(tmp_path, capsys):
    assert train(tmp_path / "net.pt", "--epochs", "2", "--lr", "1e30") == 1
    assert "loss not finite at step" in capsys.readouterr().err
    assert not (tmp_path / "net.pt").exists()


def test_dry_runs_write_nothing(digits_net, tmp_path, capsys):
    assert train(tmp_path / "net.pt", "--dry-run") == 0
    assert evaluate(digits_net, tmp_path, "--dry-run") == 0
    assert list(tmp_path.iterdir()) == []
    assert "held-out-classes: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tail-size", "100000"], "tail_size is 100000; expected 5.."),
        (["--alpha", "7"], "alpha is 7; expected 0..6"),
        (["--device", "cuda:99"], "device 'cuda:99' is not available"),
        (["--unknown", "folder:/nowhere"], "/nowhere: no such file or folder"),
        (["--unknown", "nothing"], "unknown set 'nothing' is none of"),
        (["--images", "/nowhere.png"], "/nowhere.png: no such file or folder"),
        (["--json", "/nowhere/results.json"], "/nowhere"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_1(
    digits_net, tmp_path, capsys, flags, message
):
    assert evaluate(digits_net, tmp_path, *flags) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("compute_openmax.py: error: ")
    assert message in error


def test_missing_and_foreign_checkpoints_are_one_line(tmp_path, capsys):
    assert evaluate(tmp_path / "absent.pt", tmp_path) == 1
    assert "absent.pt" in capsys.readouterr().err
    (tmp_path / "page.pt").write_text("<!DOCTYPE html>")
    assert evaluate(tmp_path / "page.pt", tmp_path) == 1
    assert "is not a whole DHR checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (train_dhr_nn.main, ["--epochs", "0"]),
        (train_dhr_nn.main, ["--lr", "nan"]),
        (train_dhr_nn.main, ["--epoch", "3"]),  # no abbreviations
        (compute_openmax.main, ["--batch-size", "0"]),
        (compute_openmax.main, ["--unknown", "val"]),
        (compute_openmax.main, ["--latents", "median"]),
    ],
)
def test_bad_arguments_are_status_2(main, flags):
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == 2


def test_training_refuses_an_unwritable_place(tmp_path, capsys):
    assert train(tmp_path / "absent" / "net.pt") == 1
    assert "cannot write there" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["train_dhr_nn.py", "compute_openmax.py"])
def test_help_fits_a_screen_and_names_the_defaults(script):
    lines = subprocess.run(
        [sys.executable, ROOT / script, "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 80
    assert sum("default" in line for line in lines) >= 9


@pytest.mark.parametrize("script", ["train_dhr_nn.py", "compute_openmax.py"])
@pytest.mark.parametrize("flag", ["--help", "--epoch=3"])
def test_help_and_argument_errors_import_no_numpy_or_pytorch(script, flag):
    command = [sys.executable, "-X", "importtime", ROOT / script, flag]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == (0 if flag == "--help" else 2)
    imported = {line.rsplit("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"numpy", "torch", "scipy", "sklearn", "PIL", "tqdm"}
