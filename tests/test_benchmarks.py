"""The published splits, and what the benchmarks make of results; stand-ins play the networks."""

import json
from pathlib import Path

import ablation
import numpy as np
import pytest
import splits
import sweep
from test_scripts import digits_net  # noqa: F401

import compute_openmax
from metrics import auroc, oscr
from openmax import Activations

RULE = compute_openmax.Rule("max", "euclidean", 20, 0)


@pytest.mark.parametrize("protocol", splits.KNOWN)
def test_splits_are_five_of_the_published_size(protocol):
    known = [text.split() for text in splits.KNOWN[protocol]]
    size = {"cifar+10": 4, "cifar+50": 4, "tiny-imagenet": 20}.get(protocol, 6)
    total = 200 if protocol == "tiny-imagenet" else 10
    assert [len(set(classes)) for classes in known] == [size] * 5
    assert all(0 <= int(index) < total for classes in known for index in classes)
    assert set(splits.PUBLISHED["CROSR"]) == set(splits.KNOWN) == set(splits.ON_DISK)


@pytest.mark.parametrize(("protocol", "count"), [("cifar+10", 10), ("cifar+50", 50)])
def test_cifar_plus_n_takes_n_classes_of_cifar100(protocol, count, tmp_path):
    for index in range(100):
        (tmp_path / "cifar100" / "test" / f"{index:02}").mkdir(parents=True)
    for split in range(5):
        flag, *folders = splits.unknown_sets(protocol, split, tmp_path)
        assert flag == "--unknown"
        assert len(set(folders)) == count
        assert (
            f"{int(Path(folders[0]).name)}" == splits.CIFAR100_UNKNOWN[protocol][split].split()[0]
        )
    assert splits.unknown_sets("cifar10", 0, tmp_path) == []


def test_tiny_imagenet_indices_are_into_sorted_names(tmp_path):
    (tmp_path / "tiny-imagenet-200").mkdir()
    names = [f"n{999 - index}" for index in range(200)]
    (tmp_path / "tiny-imagenet-200" / "wnids.txt").write_text("\n".join(names))
    first = splits.known_classes("tiny-imagenet", 0, tmp_path).split(",")[0]
    assert first == sorted(names)[108]


def test_auroc_and_oscr_of_equal_sets_are_means_over_the_sets():
    rng = np.random.default_rng(0)
    known, correct = rng.integers(0, 9, 300).astype(float), rng.random(300) < 0.9
    unknown = rng.integers(3, 12, (10, 40)).astype(float)
    assert auroc(known, unknown.ravel()) == pytest.approx(
        np.mean([auroc(known, each) for each in unknown]), abs=1e-12
    )
    assert oscr(known, correct, unknown.ravel()) == pytest.approx(
        np.mean([oscr(known, correct, each) for each in unknown]), abs=1e-12
    )


def test_splits_go_on_where_they_stopped(tmp_path, monkeypatch, capsys):
    calls = []

    def trained(flags):
        out = Path(flags[flags.index("--out") + 1])
        calls.append(["train", flags[flags.index("--known-classes") + 1], "--resume" in flags])
        partial = Path(f"{out}.partial")
        if not calls[:-1]:
            partial.touch()
            return 130
        partial.unlink(missing_ok=True)
        out.touch()
        return 0

    def measured(flags):
        calls.append(["measure"])
        area = len(calls) / 10
        results = {
            "closed_set_accuracy": 0.9,
            "methods": {"crosr": {"held-out-classes": {"auroc": area, "oscr": area}}},
        }
        Path(flags[flags.index("--json") + 1]).write_text(json.dumps(results))
        return 0

    monkeypatch.setattr(splits.train_dhr_nn, "main", trained)
    monkeypatch.setattr(splits.compute_openmax, "main", measured)
    (tmp_path / "cifar-10-batches-py").mkdir()
    flags = ["--splits", "2", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]
    flags += ["--json", str(tmp_path / "splits.json")]
    with pytest.raises(SystemExit):
        splits.main(["cifar10", *flags])
    splits.main(["cifar10", *flags])
    first, second = ("0,6,4,9,1,7", "7,6,4,9,0,1")
    expected = [["train", first, False], ["train", first, True], ["measure"]]
    assert calls == [*expected, ["train", second, False], ["measure"]]
    recorded = json.loads((tmp_path / "splits.json").read_text())["cifar10"]
    assert recorded["mean_and_std"]["crosr"]["auroc"] == pytest.approx([0.4, 0.2 / 2**0.5])
    assert "CROSR (paper)" in capsys.readouterr().out
    splits.main(["cifar10", *flags])
    assert len(calls) == 5
    with pytest.raises(SystemExit):
        splits.main(["mnist", *flags])  # no images


def test_sweep_recommends_what_separates_left_out_classes():
    rng = np.random.default_rng(0)

    def activations(count, label_of):
        labels = label_of(np.arange(count))
        logits = rng.normal(size=(count, 4)) + 8 * np.eye(4)[labels]
        latents = rng.random((count, 96))
        return Activations(labels, logits, latents**2, latents)

    folds = [sweep.Fold(*(activations(240, lambda i: i % 4) for _ in range(3))) for _ in range(2)]
    means = sweep.mean_areas(folds)
    assert set(means) == {"openmax", "crosr", "dhr_openmax"}
    assert {tail for tail, _ in means["openmax"]} == {5, 10, 20, 50}  # of 60 images a class
    assert {alpha for _, alpha in means["openmax"]} == {0, 1, 2, 3, 4}
    assert all(0.4 < area < 0.6 for areas in means.values() for area in areas.values())
    choices = sweep.variant_areas(folds)
    assert choices["dhr_openmax"] == pytest.approx(
        [fold.area(compute_openmax.dhr_openmax(fold.train, fold.val, RULE)) for fold in folds]
    )
    assert len({tuple(areas) for areas in choices.values()}) == len(choices)  # each does something


def test_sweep_runs_on_networks_that_leave_classes_out(digits_net, tmp_path, capsys):  # noqa: F811
    sweep.main([str(digits_net), "--data-dir", str(tmp_path), "--device", "cpu"])
    out = capsys.readouterr().out
    assert out.count("<- recommended") == 3
    assert json.loads(out.splitlines()[-1])["choices"]["dhr_openmax"][0] > 0.5


def test_stand_ins_are_four_distortions_of_each_image():
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    enlarged, mixed, turned, exchanged = np.split(sweep.distorted(images), 4)
    assert abs(enlarged[:, 15:17, 15:17].mean() - images[:, 15:17, 15:17].mean()) < 30
    assert mixed.mean() == pytest.approx(images.mean(), abs=1)
    assert (turned[:, 0, 0] == images[:, 0, -1]).all()
    assert (exchanged[:, :16, :16] == images[:, 16:, 16:]).all()


def test_ablation_starts_from_the_recorded_figures(capsys):
    path = ablation.ROOT / "benchmarks" / "results" / "evaluate.json"
    recorded = json.loads(path.read_text())["methods"]["dhr_openmax"]
    ablation.main()
    rows = capsys.readouterr().out.splitlines()
    figures = [float(cell) for cell in rows[2].split()[1:]]
    expected = [
        100 * recorded[name][metric]
        for name in ablation.UNKNOWN_SETS
        for metric in ("auroc", "macro_f1")
    ]
    assert figures == pytest.approx(expected, abs=0.25)
    assert len(rows) >= 11
