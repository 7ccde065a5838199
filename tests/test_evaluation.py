"""compute_openmax.py: the table, what it rests on, a person's own pictures, and its error lines."""

import csv
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import poisoned
from PIL import Image

import compute_openmax
import open_set_data
from activations import extract
from methods import DHROpenMax, build_methods, stored_rule
from models import load_checkpoint
from open_set_data import ImagesUnavailable, load_known
from pictures import ImageSet

ROOT = Path(__file__).parent.parent
RECORD = json.loads((ROOT / "benchmarks" / "results" / "evaluate.json").read_text())


def read(path):
    return json.loads(path.read_text())


def change(source, path, alter):
    """A copy of a checkpoint with something altered."""
    checkpoint = torch.load(source, weights_only=True)
    alter(checkpoint)
    torch.save(checkpoint, path)
    return path


@pytest.fixture
def no_images(monkeypatch):
    """A machine without images and without network."""

    def load_known(name, data_dir, *rest):
        raise ImagesUnavailable(f"{name}: not found in {data_dir}")

    monkeypatch.setattr(open_set_data, "load_known", load_known)


# The table


def test_evaluation_without_images_or_network_gives_the_recorded_figures(
    evaluate, no_images, tmp_path, capsys
):
    path = tmp_path / "results.json"
    unknown = RECORD["methods"]["msp"]
    assert evaluate(ROOT / "dhr_net.pt", "--unknown", *unknown, "--json", path) == 0
    assert "Using the activations that ship with the checkpoint" in capsys.readouterr().out
    results = read(path)
    assert results["activations"] == "shipped"
    assert results["closed_set_accuracy"] == pytest.approx(RECORD["closed_set_accuracy"], abs=0.002)
    assert results["methods"].keys() == RECORD["methods"].keys()
    for method, sets in RECORD["methods"].items():
        for name, recorded in sets.items():
            assert results["methods"][method][name] == pytest.approx(recorded, abs=0.002)


def test_without_images_another_network_is_refused_in_one_line(
    evaluate, no_images, digits_net, error_line
):
    assert evaluate(digits_net) == 1
    line = error_line()
    assert "digits: not found in" in line
    assert "no activations ship for this checkpoint" in line


def test_results_hold_five_methods_and_eight_metrics(evaluate, digits_net, tmp_path, capsys):
    path = tmp_path / "results.json"
    assert evaluate(digits_net, "--json", path) == 0
    results = read(path)
    assert results["known"] == "digits"
    assert results["activations"] == "extracted"
    assert results["closed_set_accuracy"] > 0.9
    assert list(results["methods"]) == ["msp", "max_logit", "openmax", "crosr", "dhr_openmax"]
    for method in results["methods"].values():
        (metrics,) = method.values()
        assert metrics.keys() == RECORD["methods"]["msp"]["cifar100"].keys()
        assert all(0 <= value <= 1 for value in metrics.values())
        assert metrics["auroc"] > 0.6
    assert results["seconds"].keys() == {"load", "extract", "fit", "score"}
    settings = {"latents": "max", "distance": "euclidean", "tail_size": 20, "alpha": 0}
    assert settings.items() <= results["openmax"].items()
    assert results["openmax"]["threshold"].keys() == results["methods"].keys()
    assert f"--json {path}" in results["command"]
    text = capsys.readouterr().out
    counts = results["images"]
    assert counts.keys() == {"train", "val", "test_known", "held-out-classes"}
    sets = f"digits ({counts['test_known']} known images) against held-out-classes"
    assert f"{sets} ({counts['held-out-classes']} unknown ones), in %" in text
    assert "accepts at least 95 % of 84 validation images" in text


def test_the_cache_and_the_batch_size_change_no_table(evaluate, digits_net, tmp_path):
    tables = []
    for run, flags in enumerate([[], [], ["--no-cache"], ["--no-cache", "--batch-size", 37]]):
        assert evaluate(digits_net, *flags, "--json", tmp_path / f"{run}.json") == 0
        tables.append(read(tmp_path / f"{run}.json")["methods"])
    assert tables[0] == tables[1] == tables[2]
    for method, sets in tables[0].items():
        expected = pytest.approx(sets["held-out-classes"], abs=0.02)  # a few images change place
        assert tables[3][method]["held-out-classes"] == expected


def as_array(value):
    """Tensors as arrays, since equal tensors do not pickle alike."""
    if isinstance(value, dict):
        return {name: as_array(each) for name, each in value.items()}
    return value.numpy() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("sets", [("test_known", "held-out-classes"), ("val",)])
def test_no_test_or_unknown_image_reaches_a_fit_or_a_threshold(
    evaluate, digits_net, monkeypatch, sets
):
    """Every fitted attribute is the same to the bit whatever they are; validation images count."""
    load = compute_openmax.load_image_sets

    def load_poisoned(*args):
        return {k: poisoned(v) if k in sets else v for k, v in load(*args).items()}

    def fitted():
        methods = {}
        with monkeypatch.context() as patch:
            patch.setattr(
                compute_openmax,
                "build_methods",
                lambda settings: methods.setdefault(0, build_methods(settings)),
            )
            assert evaluate(digits_net) == 0
        return {
            name: pickle.dumps([method.threshold_, *map(as_array, vars(method).values())])
            for name, method in methods[0].items()
        }

    clean = fitted()
    monkeypatch.setattr(compute_openmax, "load_image_sets", load_poisoned)
    changed = fitted()
    assert [changed[name] == clean[name] for name in clean] == [sets != ("val",)] * 5


def test_the_stored_rule_is_the_one_fitted_to_training_and_validation_images(digits_net, tmp_path):
    network, checkpoint = load_checkpoint(digits_net)
    data = load_known("digits", tmp_path, checkpoint["train_args"]["known_classes"])
    network.to(memory_format=torch.channels_last)
    train, val = (extract(network, images, 50) for images in (data.train, data.val))
    stored, rule = stored_rule(network, checkpoint), DHROpenMax().fit(train, val)
    for ours, theirs in zip(stored.score(val), rule.score(val), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-9)
    assert np.mean(stored.score(val).unknownness <= 0) == pytest.approx(0.95, abs=0.01)


# A person's own pictures


@pytest.fixture
def pictures(tmp_path):
    """Noise in three files, and two files that are no pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        pixels = rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "page.png").write_text("<!DOCTYPE html>")
    (folder / "empty.jpg").touch()
    return folder


def test_images_need_nothing_but_the_checkpoint_and_every_file_has_a_row(
    evaluate, digits_net, no_images, pictures, tmp_path, capsys
):
    outputs = ["--json", tmp_path / "images.json", "--csv", tmp_path / "images.csv"]
    assert evaluate(digits_net, "--images", pictures, *outputs, "--batch-size", 2) == 0
    rows = read(tmp_path / "images.json")["images"]
    assert [Path(row["path"]).name for row in rows] == [
        *("0.png", "1.png", "2.png", "empty.jpg", "page.png")
    ]
    for row in rows[:3]:
        assert row["known"] == (row["prediction"] != "unknown")
        assert row["nearest_class"] in {"0", "1", "2", "3", "4", "5"}
        assert 0 <= row["probability"] <= 1
        assert row["error"] is None
    for row in rows[3:]:
        assert row["error"]
        assert row["prediction"] is row["known"] is row["probability"] is None
    text = (tmp_path / "images.csv").read_text(encoding="utf-8")
    for row, written in zip(rows, csv.DictReader(text.splitlines()), strict=True):
        assert written == {key: "" if value is None else str(value) for key, value in row.items()}
    table = capsys.readouterr().out
    assert "1.png" in table
    assert "(not read)" in table


def test_images_answer_as_the_stored_rule(evaluate, digits_net, pictures, tmp_path):
    assert evaluate(digits_net, "--images", pictures / "1.png", "--json", tmp_path / "a.json") == 0
    (row,) = read(tmp_path / "a.json")["images"]
    network, checkpoint = load_checkpoint(digits_net)
    pixels, _ = compute_openmax.read_images([pictures / "1.png"], 16)
    images = ImageSet(compute_openmax.fit_to(pixels, 16, 1), np.zeros(1, np.int64))
    scores = stored_rule(network, checkpoint).score(extract(network, images, 1))
    assert row["known"] == (scores.unknownness[0] <= 0)
    assert row["nearest_class"] == str(scores.nearest_class[0])
    column = scores.nearest_class[0] if row["known"] else -1
    assert row["probability"] == pytest.approx(scores.probabilities[0, column], abs=1e-3)


def test_a_class_called_unknown_can_be_told_from_the_rejection(
    evaluate, digits_net, pictures, tmp_path, monkeypatch
):
    def call_all_unknown(checkpoint):
        checkpoint["known_classes"] = ["unknown"] * 6

    net = change(digits_net, tmp_path / "net.pt", call_all_unknown)
    digits = load_known("digits", tmp_path, "0,1,2,3,4,5").test_known.images
    Image.fromarray(digits[0, ..., 0]).save(tmp_path / "digit.png")
    outputs = ["--json", tmp_path / "images.json", "--csv", tmp_path / "images.csv"]
    for threshold, known in ((np.inf, True), (-np.inf, False)):
        monkeypatch.setattr(DHROpenMax, "threshold_", threshold)
        assert evaluate(net, "--images", tmp_path / "digit.png", *outputs) == 0
        (row,) = read(tmp_path / "images.json")["images"]
        assert (row["prediction"], row["known"]) == ("unknown", known)
        (written,) = csv.DictReader((tmp_path / "images.csv").read_text().splitlines())
        assert (written["prediction"], written["known"]) == ("unknown", str(known))


def test_a_checkpoint_without_a_rule_or_with_a_damaged_one_is_one_line(
    evaluate, digits_net, pictures, tmp_path, error_line
):
    net = change(digits_net, tmp_path / "a.pt", lambda c: c.pop("open_set_rule"))
    assert evaluate(net, "--images", pictures) == 1
    assert "a.pt holds no open-set rule: finish its training with --resume" in error_line()
    net = change(digits_net, tmp_path / "b.pt", lambda c: c["open_set_rule"].pop("means"))
    assert evaluate(net, "--images", pictures) == 1
    assert "the open-set rule in it is damaged" in error_line()


# Folders of pictures that moved or changed since training


def folder(photos):
    return ["--dataset", f"folder:{photos}", "--unknown", "uniform-noise"]


@pytest.fixture(autouse=True)
def few_noise_images(monkeypatch):
    monkeypatch.setattr("open_set_data.NOISE_COUNT", 50)


def test_a_folder_that_moved_is_named_whole_and_can_be_given_again(
    evaluate, photos_net, photos, capsys, monkeypatch
):
    trained_on = load_checkpoint(Path(photos_net))[1]["train_args"]["dataset"]
    assert evaluate(photos_net, "--unknown", "uniform-noise") == 1
    assert trained_on.removeprefix("folder:") in capsys.readouterr().err
    monkeypatch.chdir(photos.parent)
    assert evaluate(photos_net, *folder("photos")) == 0
    assert "images have changed" not in capsys.readouterr().err


def test_changed_images_are_said(evaluate, photos_net, photos, capsys):
    for file in sorted((photos / "one").iterdir())[:5]:
        file.unlink()
    assert evaluate(photos_net, *folder(photos)) == 0
    assert "images have changed since" in capsys.readouterr().err


def test_classes_that_have_changed_are_named_in_one_line(evaluate, photos_net, photos, error_line):
    (photos / "one").rename(photos / "two")
    assert evaluate(photos_net, *folder(photos)) == 1
    assert "(one is missing, two is new); train again" in error_line()


def test_a_network_that_knows_its_whole_folder_asks_for_unknown_pictures(
    evaluate, photos_net, photos, error_line
):
    assert evaluate(photos_net, "--dataset", f"folder:{photos}") == 1
    assert "name pictures of something else with --unknown folder:PATH" in error_line()


def test_known_pictures_among_the_unknown_ones_are_said(evaluate, photos_net, photos, capsys):
    flags = ["--dataset", f"folder:{photos}", "--unknown", f"folder:{photos}"]
    assert evaluate(photos_net, *flags) == 0
    assert f"folder:{photos}: 120 of its images are among the known ones" in capsys.readouterr().err


# What can go wrong


def test_what_a_network_knows_is_refused_as_unknown(
    evaluate, digits_net, photos_net, photos, tmp_path, error_line
):
    def know(dataset):
        return lambda checkpoint: checkpoint["train_args"].update(dataset=dataset)

    for dataset, unknown in (("svhn", "svhn"), ("tiny-imagenet", "tiny-imagenet-crop")):
        net = change(digits_net, tmp_path / f"{dataset}.pt", know(dataset))
        assert evaluate(net, "--unknown", unknown) == 1
        assert f"{unknown} shows what the network knows" in error_line()
    assert evaluate(photos_net, *folder(photos)[:2], "--unknown", "held-out-classes") == 1
    assert "no classes are held out; name unknown images with --unknown" in error_line()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alpha", 7], "--alpha is 7; expected 0..6, the classes"),
        (["--device", "cuda:99"], "device 'cuda:99' is not available"),
        (["--unknown", "folder:/nowhere"], "/nowhere: no such"),
        (["--unknown", "nothing"], "unknown set 'nothing' is none of"),
        (["--images", "/nowhere.png"], "/nowhere.png: no such file or folder"),
        (["--json", "/nowhere/results.json"], "/nowhere/results.json: cannot write there ("),
    ],
)
def test_what_a_person_can_mend_is_one_line_before_any_extraction(
    evaluate, digits_net, monkeypatch, error_line, flags, message
):
    monkeypatch.setattr(compute_openmax, "extract", None)
    assert evaluate(digits_net, *flags) == 1
    line = error_line()
    assert line.startswith("compute_openmax.py: error: ")
    assert message in line


@pytest.mark.parametrize(
    "flags",
    [
        ["--tail-size", "0"],
        ["--tail-size", "4"],
        ["--alpha", "-1"],
        ["--batch-size", "0"],
        ["--images", "a.jpg", "--report", "page"],
        ["--latents", "median"],
        ["--csv", "rows.csv"],
        ["--checkpoin", "net.pt"],
    ],
)
def test_bad_arguments_are_status_2(flags):
    with pytest.raises(SystemExit) as caught:
        compute_openmax.main(flags)
    assert caught.value.code == 2


def test_absent_and_foreign_checkpoints_are_one_line(evaluate, tmp_path, error_line):
    assert evaluate(tmp_path / "absent.pt") == 1
    assert "absent.pt" in error_line()
    (tmp_path / "page.pt").write_text("<!DOCTYPE html>")
    assert evaluate(tmp_path / "page.pt") == 1
    assert "page.pt is not a whole DHR checkpoint" in error_line()


def raising(error):
    def function(*args, **kwargs):
        raise error

    return function


def test_ctrl_c_says_where_the_finished_sets_are(
    evaluate, digits_net, tmp_path, monkeypatch, error_line
):
    monkeypatch.setattr(compute_openmax, "extract", raising(KeyboardInterrupt))
    assert evaluate(digits_net) == 130
    assert error_line() == f"stopped; finished image sets are in {tmp_path / 'cache'}"
    assert evaluate(digits_net, "--no-cache") == 130
    assert error_line() == "stopped; nothing was stored"


def test_a_folder_named_like_the_known_one_is_another_set():
    args = compute_openmax.parse_args(["--unknown", "folder:pets-other"])
    checkpoint = {"train_args": {"dataset": "folder:pets", "known_classes": ""}}
    assert compute_openmax.unknown_names(args, checkpoint) == ["folder:pets-other"]


def test_each_unknown_set_is_measured_once(evaluate, digits_net, tmp_path):
    unknown = ["--unknown", "uniform-noise", "uniform-noise", "held-out-classes"]
    assert evaluate(digits_net, *unknown, "--json", tmp_path / "results.json") == 0
    measured = read(tmp_path / "results.json")["methods"]["msp"]
    assert list(measured) == ["uniform-noise", "held-out-classes"]
