"""The README's figures are those of the recorded run, and the shipped files belong together."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import compute_openmax
from models import load_checkpoint
from open_set_data import load_known

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RECORDED = json.loads((ROOT / "benchmarks" / "results" / "evaluate.json").read_text())
SETS = ("tiny-imagenet-crop", "tiny-imagenet-resize", "cifar100")
COLUMNS = ("auroc", "fpr_at_95_tpr", "macro_f1", "macro_f1_at_half")


def row_of(method, text):
    """Cells of the first table row of a method in a text."""
    row = re.search(rf"^\| \*{{0,2}}`{method}`\*{{0,2}} \|(.*)\|$", text, re.MULTILINE).group(1)
    return [cell.strip() for cell in row.split("|")]


@pytest.mark.parametrize("method", compute_openmax.METHODS)
def test_readme_table_holds_the_recorded_figures(method):
    figures = [float(cell.strip("*")) for cell in row_of(method, README)]
    expected = [100 * RECORDED["methods"][method][name][c] for name in SETS for c in COLUMNS]
    assert figures == [round(value, 1) for value in expected]


@pytest.mark.parametrize(
    ("title", "record"),
    [
        ("## The default training", "seeds.json"),
        ("## The shipped network's training", "seeds-deep.json"),
    ],
)
@pytest.mark.parametrize("method", compute_openmax.METHODS)
def test_table_of_seeds_holds_the_recorded_figures(method, title, record):
    text = (ROOT / "benchmarks" / "README.md").read_text().split(title)[1]
    runs = json.loads((ROOT / "benchmarks" / "results" / record).read_text())
    figures = [
        100 * np.array([run["methods"][method][name][column] for run in runs])
        for name in SETS
        for column in COLUMNS[:3]
    ]
    cells = [f"{each.mean():.1f} ± {each.std(ddof=1):.1f}" for each in figures]
    assert row_of(method, text) == cells


@pytest.mark.parametrize("method", compute_openmax.METHODS)
def test_table_of_the_papers_network_holds_the_recorded_figures(method):
    text = (ROOT / "benchmarks" / "README.md").read_text().split("## The paper's own table")[1]
    released, ranked = json.loads((ROOT / "benchmarks" / "results" / "vgg.json").read_text())
    columns = ("macro_f1_at_half", "macro_f1", "auroc")

    def cells(run):
        return [
            f"{100 * run['methods'][method][name][c]:.1f}" for name in SETS[:2] for c in columns
        ]

    row = row_of(method, text)
    assert row[1:4] + row[5:] == cells(released)
    if method in ("openmax", "crosr"):
        row = row_of(f"{method}`, `--alpha 10", text)
        assert row[1:4] + row[5:] == cells(ranked)


@pytest.mark.parametrize("method", compute_openmax.METHODS)
def test_table_of_splits_holds_the_recorded_figures(method):
    text = (ROOT / "benchmarks" / "README.md").read_text().split("standard splits")[1]
    recorded = json.loads((ROOT / "benchmarks" / "results" / "splits.json").read_text())
    expected = [
        [100 * value for value in recorded[protocol]["mean_and_std"][method]["auroc"]]
        for protocol in ("cifar10", "cifar+10", "cifar+50")
    ]
    cells = [f"{mean:.1f} ± {std:.1f}" for mean, std in expected]
    assert row_of(method, text) == cells
    if method == "dhr_openmax":
        assert all(cell in README for cell in cells)


def test_recorded_run_is_of_the_shipped_checkpoint():
    digest = hashlib.sha256((ROOT / "dhr_net.pt").read_bytes()).hexdigest()
    assert RECORDED["checkpoint"]["sha256"] == digest
    assert RECORDED["activations"] == "extracted"


def test_shipped_checkpoint_loads_and_says_how_it_was_made():
    model, checkpoint = load_checkpoint(ROOT / "dhr_net.pt")
    assert checkpoint["known_classes"][3] == "cat"
    assert checkpoint["git_commit"]
    assert not model.training
    assert (ROOT / "dhr_net.pt").stat().st_size < 25e6


@pytest.mark.skipif(not (ROOT / "data" / "cifar-10-batches-py").is_dir(), reason="no CIFAR-10")
def test_shipped_checkpoint_classifies_real_test_images():
    model, _ = load_checkpoint(ROOT / "dhr_net.pt")
    images, labels = load_known("cifar10", ROOT / "data").test_known
    logits, *_ = model.activations(torch.from_numpy(images[:1000]).permute(0, 3, 1, 2))
    assert (logits.argmax(dim=1).numpy() == labels[:1000]).mean() > 0.92


def test_shipped_activations_give_the_recorded_figures_without_images(tmp_path, monkeypatch):
    def no_images(*args):
        raise compute_openmax.ImagesUnavailable("no images in this test")

    monkeypatch.setattr(compute_openmax, "load_image_sets", no_images)
    path = tmp_path / "results.json"
    assert compute_openmax.main(["--unknown", *SETS, "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert results["activations"] == "shipped"
    for method, sets in RECORDED["methods"].items():
        for name, metrics in sets.items():
            ours = results["methods"][method][name]
            differences = [abs(ours[column] - value) for column, value in metrics.items()]
            assert np.max(differences) < 0.002, (method, name)
