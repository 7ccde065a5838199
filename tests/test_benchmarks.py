"""The published splits, and that what the benchmarks compare computes the same on both sides."""

import argparse
import hashlib
import json
import shutil
from itertools import islice
from pathlib import Path

import bench
import numpy as np
import peers
import pytest
import ship
import splits
import torch
import zoo
from made_up import make_activations
from PIL import Image

import train_dhr_nn
from activations import load_shipped
from methods import OpenMaxSettings, build_methods, stored_rule
from models import DHRNet, load_checkpoint
from open_set_data import KNOWN_SPLITS, load_known


@pytest.mark.parametrize("protocol", splits.KNOWN)
def test_splits_are_five_of_the_published_size(protocol):
    known = [text.split() for text in splits.KNOWN[protocol]]
    size = {"cifar+10": 4, "cifar+50": 4, "tiny-imagenet": 20}.get(protocol, 6)
    total = 200 if protocol == "tiny-imagenet" else 10
    assert [len(set(classes)) for classes in known] == [size] * 5
    assert all(0 <= int(index) < total for classes in known for index in classes)
    assert protocol in splits.PUBLISHED["CROSR"]


@pytest.mark.parametrize(("protocol", "count"), [("cifar+10", 10), ("cifar+50", 50)])
def test_cifar_plus_n_takes_n_classes_of_cifar100(protocol, count, tmp_path):
    for index in range(100):
        folder = tmp_path / "cifar100" / "test" / f"class{index:02}"
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32), (index, 0, 0)).save(folder / "0.png")
    for split, classes in enumerate(splits.CIFAR100_UNKNOWN[protocol]):
        images = splits.cifar100_images(protocol, split, tmp_path)
        assert sorted(images[:, 0, 0, 0]) == sorted(map(int, classes.split()))
        assert len(images) == count


def test_stopped_training_of_a_split_is_resumed(tmp_path):
    args = argparse.Namespace(data_dir=tmp_path, device="cpu", training=["--epochs", "6"])
    network = tmp_path / "net.pt"
    flags = splits.training_flags(network, "digits", "0,1", args)
    assert flags[-2:] == ["--epochs", "6"]
    Path(f"{network}.partial").touch()
    assert splits.training_flags(network, "digits", "0,1", args) == [*flags, "--resume"]


def test_a_split_is_measured_on_the_classes_left_out(digits_net, tmp_path):
    figures = splits.measure(digits_net, tmp_path, "cpu")
    assert list(figures) == ["accuracy", "msp", "max_logit", "openmax", "crosr", "dhr_openmax"]
    assert figures["accuracy"]["closed_set"] > 0.8
    oscr, auroc = (figures["dhr_openmax"][metric] for metric in ("oscr", "auroc"))
    assert oscr <= auroc + 1e-9  # the same where all are named right
    assert auroc > 0.8


def test_unknown_images_of_a_split_are_brought_to_the_networks_channels(digits_net, tmp_path):
    left_out = load_known("digits", tmp_path, "0,1,2,3,4,5").test_unknown
    figures = splits.measure(digits_net, tmp_path, "cpu", left_out.repeat(3, axis=-1))
    assert figures == splits.measure(digits_net, tmp_path, "cpu")


@pytest.fixture
def measured_splits(tmp_path):
    """Flags of two splits of MNIST that are measured already."""
    for split, area in enumerate((0.6, 0.8)):
        figures = {"accuracy": {"closed_set": 0.9}, "crosr": {"auroc": area, "oscr": area}}
        (tmp_path / f"mnist-{split}.json").write_text(json.dumps(figures))
    return ["mnist", "--splits", "2", "--out", str(tmp_path), "--json", str(tmp_path / "all.json")]


def test_measured_splits_are_not_measured_again(measured_splits, tmp_path, capsys):
    splits.main(measured_splits)
    recorded = json.loads((tmp_path / "all.json").read_text())["mnist"]
    assert recorded["mean_and_std"]["crosr"]["auroc"] == pytest.approx([0.7, 0.2 / 2**0.5])
    printed = capsys.readouterr().out
    assert "CROSR (paper)       99.1" in printed
    assert "    70.0 +- 14.1" in printed


def test_splits_of_other_training_flags_are_refused(measured_splits, capsys):
    splits.main(measured_splits)
    with pytest.raises(SystemExit, match="2"):
        splits.main([*measured_splits, "--epochs", "3"])
    assert "other training flags" in capsys.readouterr().err


@pytest.mark.slow
def test_splits_train_and_measure(tmp_path, monkeypatch):
    monkeypatch.setitem(splits.KNOWN, "digits", ["0 1 2", "3 4 5"])
    flags = ["--splits", "2", "--out", str(tmp_path), "--json", str(tmp_path / "all.json")]
    flags += ["--epochs", "2", "--batch-size", "50", "--device", "cpu"]
    splits.main(["digits", *flags])
    recorded = json.loads((tmp_path / "all.json").read_text())["digits"]
    assert recorded["training"] == ["--epochs", "2", "--batch-size", "50"]
    assert [split["msp"]["auroc"] > 0.7 for split in recorded["splits"]] == [True, True]
    assert {path.name for path in tmp_path.glob("*.pt")} == {"digits-0,1,2.pt", "digits-3,4,5.pt"}


@pytest.fixture(scope="module")
def zoo_figures():
    return zoo.compare(zoo.load_for_tests(), lambda _: build_methods(OpenMaxSettings()))


def test_the_rule_is_the_best_method_of_the_zoo_and_never_far_behind_another(zoo_figures):
    rows = zoo.means(zoo_figures)
    ours = rows.pop("dhr_openmax")
    assert ours["auroc"] > max(row["auroc"] for row in rows.values()) + 0.005
    assert zoo.regret(zoo_figures)["dhr_openmax"] < 0.01


def test_the_rule_accepts_about_95_percent_where_200_images_set_the_threshold(zoo_figures):
    accepted = [task["dhr_openmax"]["accepted"] for name, task in zoo_figures.items()
                if name.startswith("cifar")]  # fmt: skip
    assert len(accepted) == 4
    assert all(0.93 <= share <= 0.97 for share in accepted)


def test_regret_is_the_distance_to_the_best_of_the_others():
    areas = {"one": {"a": 0.9, "b": 0.8, "c": 0.7}, "two": {"a": 0.6, "b": 0.65, "c": 0.5}}
    figures = {task: {m: {"auroc": area} for m, area in row.items()} for task, row in areas.items()}
    assert zoo.regret(figures) == pytest.approx({"a": 0.05, "b": 0.1, "c": 0.2})


def test_no_network_of_the_zoo_is_listed_twice_and_their_flags_parse():
    assert len({(network.name, network.seed) for network in zoo.NETWORKS}) == len(zoo.NETWORKS)
    for network in zoo.NETWORKS:
        assert train_dhr_nn.parse_args(network.flags.split())
        names = network.known.split(",")
        assert len(set(names)) == len(names)


def test_zoo_without_names_takes_all_networks(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        zoo.main(["--zoo", str(tmp_path)])
    printed = capsys.readouterr()
    assert f"no activations in {tmp_path}: make them with --make" in printed.err
    assert all(name in printed.out for name in zoo.NAMES)


def test_recorded_table_has_all_networks():
    record = json.loads((zoo.ROOT / "benchmarks" / "results" / "zoo.json").read_text())
    assert {task.split(", ")[0] for task in record["tasks"]} == {*zoo.NAMES}


def test_networks_of_one_name_know_different_classes(monkeypatch):
    monkeypatch.setattr(zoo, "photo_kinds", lambda: [f"kind {i:02}" for i in range(24)])
    known = []
    for network in zoo.NETWORKS:
        if network.dataset == "photos":
            kinds, others = zoo.known_photos(network)
            assert len(kinds) == int(network.known)
            assert sorted(kinds + others) == zoo.photo_kinds()
            known.append((network.name, *sorted(kinds)))
        else:
            known.append((network.name, network.known))
    assert len(set(known)) == len(known)


def test_shipped_activations_belong_to_the_refitted_checkpoint(digits_net, tmp_path):
    Image.new("L", (16, 16), 99).save(tmp_path / "grey.png")
    net, out = shutil.copy(digits_net, tmp_path / "net.pt"), tmp_path / "shipped.npz"
    ship.ship(net, out, refit=True, unknown_sets=[f"folder:{tmp_path}"])
    names = [*KNOWN_SPLITS, f"folder:{tmp_path}"]
    sets = load_shipped(hashlib.sha256(net.read_bytes()).hexdigest(), names, out)
    assert [len(each.labels) for each in sets.values()][3:] == [1]
    rule, before = (stored_rule(*load_checkpoint(path)) for path in (net, digits_net))
    threshold_scores = [each.score(sets["val"]).unknownness for each in (rule, before)]
    assert threshold_scores[0] == pytest.approx(threshold_scores[1], rel=0.01, abs=0.1)


def test_pytorch_oods_probabilities_sum_to_1():
    vectors, labels = make_activations(0, num_classes=5, per_class=80)
    logits = vectors[:, :5]
    probabilities = peers.PytorchOodOpenMax(alpha=5).fit(logits, labels).predict(logits)
    assert probabilities.shape == (400, 6)
    assert probabilities.sum(axis=1) == pytest.approx(1)


def test_image_by_image_gives_the_same_activations():
    network = DHRNet(3, image_size=16).eval()
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        logits, _, latents_max, _ = network.activations(images)
    views = [torch.cat(part, dim=1)[0] for part in peers.one_by_one(network, images)]
    means = torch.stack(views).unflatten(0, (2, 2)).mean(dim=1)
    assert torch.allclose(means, torch.cat([logits, latents_max], dim=1), atol=1e-5)


def test_textbook_loop_learns():
    labels = np.arange(256) % 2
    images = np.zeros((256, 16, 16, 3), np.uint8) + 200 * labels[:, None, None, None].astype(
        np.uint8
    )
    network = DHRNet(2, image_size=16)
    list(islice(peers.textbook_steps(network, images, labels, workers=0), 6))
    with torch.no_grad():
        logits = network(torch.from_numpy(images).permute(0, 3, 1, 2)).logits
    assert (logits.argmax(dim=1).numpy() == labels).all()


def test_last_line_of_the_benchmark_is_json(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "CIFAR10", tmp_path / "nothing")
    bench.main(["training"])
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["what"] == "recorded run, PFLOP; airbench94"
    assert row["ratio"] == pytest.approx(0.39, abs=0.01)


def test_output_and_memory_of_a_command_are_read():
    printed, seconds, peak = bench.run(
        "-c", "import time; x = b' ' * 10**8; time.sleep(0.5); print(5)"
    )
    assert printed == "5\n"
    assert seconds > 0.5
    assert 0.1 < peak < 0.2


def test_stream_scores_chunk_by_chunk():
    bench.stream(20_000, 10)


@pytest.mark.slow
def test_extraction_is_measured():
    assert [row[3] > 0 for row in bench.extraction(repeats=1)] == [True, True]
