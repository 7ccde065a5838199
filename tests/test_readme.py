"""What the texts say: figures equal their recorded runs, commands parse, and Python runs."""

import hashlib
import json
import re
import shlex
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from zoo import UNKNOWN_KINDS

import compute_openmax
import train_dhr_nn
from methods import OpenMaxSettings, build_methods
from metrics import TITLES
from models import ARCHITECTURES, DHRNet, load_checkpoint
from training import gflop_per_image

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text()
ZOO_TEXT = BENCHMARKS.split("## The zoo")[1].split("## ")[0]
RECORDED = json.loads((RESULTS / "evaluate.json").read_text())
ZOO = json.loads((RESULTS / "zoo.json").read_text())
SETS = ("tiny-imagenet-crop", "tiny-imagenet-resize", "cifar100")
COLUMNS = ("auroc", "fpr_at_95_tpr", "macro_f1", "macro_f1_at_half")
METHODS = tuple(build_methods(OpenMaxSettings()))


def row_of(method, text):
    """Cells of the first table row of a method in a text."""
    row = re.search(rf"^\| \*{{0,2}}`{method}`[^|]*\|(.*)\|$", text, re.MULTILINE).group(1)
    return [cell.strip() for cell in row.split("|")]


def percent(run, method, columns, sets=SETS):
    return [f"{100 * run['methods'][method][name][c]:.1f}" for name in sets for c in columns]


@pytest.mark.parametrize("method", ["msp", "openmax", "crosr", "dhr_openmax"])
def test_front_table_holds_the_recorded_auroc(method):
    assert row_of(method, README) == percent(RECORDED, method, ["auroc"])


def test_claim_is_the_recorded_run():
    crop, resize, cifar100 = percent(RECORDED, "dhr_openmax", ["auroc"])
    claim = " ".join(README.split("![")[0].split())
    assert f"{100 * RECORDED['closed_set_accuracy']:.1f} % closed-set accuracy" in claim
    assert f"AUROC {crop} against cropped TinyImageNet images, {resize} against resized" in claim
    assert f"{cifar100} against CIFAR-100" in claim


@pytest.mark.parametrize("method", METHODS)
def test_shipped_table_holds_the_recorded_figures(method):
    text = BENCHMARKS.split("## The shipped network")[1]
    assert row_of(method, text) == percent(RECORDED, method, COLUMNS)


def figures_of_seeds(record, method, columns):
    """Mean and standard deviation over a record's runs, as the texts print them."""
    runs = json.loads((RESULTS / record).read_text())
    figures = [
        100 * np.array([run["methods"][method][name][column] for run in runs])
        for name in SETS
        for column in columns
    ]
    return [f"{each.mean():.1f} ± {each.std(ddof=1):.1f}" for each in figures]


@pytest.mark.parametrize("method", METHODS[:-1])
def test_table_of_seeds_holds_the_recorded_figures(method):
    cells = figures_of_seeds("seeds.json", method, COLUMNS[:3])
    assert row_of(method, BENCHMARKS.split("## The default training")[1]) == cells


@pytest.mark.parametrize(
    ("record", "claim"), [("seeds.json", "accuracy {}."), ("seeds-deep.json", "accuracy is {}, ")]
)
def test_accuracy_of_seeds_is_the_recorded_one(record, claim):
    runs = json.loads((RESULTS / record).read_text())
    accuracy = 100 * np.array([run["closed_set_accuracy"] for run in runs])
    shown = claim.format(f"{accuracy.mean():.1f} ± {accuracy.std(ddof=1):.1f}")
    assert f"closed-set {shown}" in BENCHMARKS


def test_seeds_of_the_first_cycle_differ_as_the_text_says():
    crop, resize, cifar100 = figures_of_seeds("seeds-deep.json", "crosr", ["auroc"])
    claim = f"`crosr` {crop} on crops, {resize} resized and {cifar100} on CIFAR-100"
    assert claim in " ".join(BENCHMARKS.split())


@pytest.mark.parametrize("method", METHODS[:-1])
def test_table_of_the_papers_network_holds_the_recorded_figures(method):
    text = BENCHMARKS.split("## The paper's own table")[1]
    released, *others = json.loads((RESULTS / "vgg.json").read_text())
    columns = ("macro_f1_at_half", "macro_f1", "auroc")
    row = row_of(method, text)
    assert row[1:4] + row[5:] == percent(released, method, columns, SETS[:2])
    for run, flag in zip(others, ("alpha 10", "tail-size 100"), strict=True):
        if method in ("openmax", "crosr"):
            row = row_of(f"{method}`, `--{flag}", text)
            assert row[1:4] + row[5:] == percent(run, method, columns, SETS[:2])


@pytest.mark.parametrize("name", SETS[:2])
def test_the_papers_order_comes_out_as_the_text_says(name):
    (msp, openmax, crosr), _, of_100 = (
        [run["methods"][method][name] for method in ("msp", "openmax", "crosr")]
        for run in json.loads((RESULTS / "vgg.json").read_text())
    )
    for metric in ("auroc", "oscr", "macro_f1"):
        assert msp[metric] < openmax[metric] < crosr[metric]
    assert msp["fpr_at_95_tpr"] > openmax["fpr_at_95_tpr"] > crosr["fpr_at_95_tpr"]
    assert openmax["macro_f1_at_half"] < crosr["macro_f1_at_half"] < msp["macro_f1_at_half"]
    halves = [method["macro_f1_at_half"] for method in of_100]
    assert halves == sorted(halves)
    assert halves[2] - halves[1] < 0.01


def test_reproduction_of_the_paper_is_as_the_front_page_says():
    released = json.loads((RESULTS / "vgg.json").read_text())[0]
    crosr = percent(released, "crosr", ["macro_f1_at_half"], SETS[:1])[0]
    paper = re.search(r"\*Paper: CROSR\* .*?\*([\d.]+)\*", BENCHMARKS).group(1)
    claim = (
        f"`crosr` has {crosr} on the crops after 36 epochs, where the paper has {paper} after 500"
    )
    assert claim in " ".join(README.split())


@pytest.mark.parametrize("method", METHODS)
def test_table_of_splits_holds_the_recorded_figures(method):
    text = BENCHMARKS.split("standard splits")[1]
    recorded = json.loads((RESULTS / "splits.json").read_text())
    expected = [
        [100 * value for value in recorded[protocol]["mean_and_std"][method]["auroc"]]
        for protocol in ("cifar10", "cifar+10", "cifar+50")
    ]
    assert row_of(method, text) == [f"{mean:.1f} ± {std:.1f}" for mean, std in expected]


def test_table_of_the_zoo_holds_the_recorded_figures():
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in ZOO_TEXT.splitlines()
        if line.startswith("| ")
    ]
    shown = {row[0]: row[1:] for row in rows[2:]}
    expected = {
        task: [f"{100 * methods[name]['auroc']:.1f}" for name in METHODS]
        for task, methods in ZOO["tasks"].items()
    }
    means = {
        "**mean**": "auroc",
        "**mean FPR95**": "fpr_at_95_tpr",
        "**mean OSCR**": "oscr",
        "**mean macro-F1**": "macro_f1",
    }
    for row, metric in means.items():
        columns = [[task[name][metric] for task in ZOO["tasks"].values()] for name in METHODS]
        expected[row] = [f"{100 * np.mean(column):.1f}" for column in columns]
    expected["**regret**"] = [f"{100 * ZOO['regret'][name]:.1f}" for name in METHODS]
    assert shown == expected


def test_regret_is_where_the_text_says():
    behind = {
        task: max(of["auroc"] for of in methods.values()) - methods["dhr_openmax"]["auroc"]
        for task, methods in ZOO["tasks"].items()
    }
    task, text = "photos 12, classes", " ".join(ZOO_TEXT.split())
    crosr, ours = (ZOO["tasks"][task][name]["aurocs"] for name in ("crosr", "dhr_openmax"))
    gap = 100 * (np.array(crosr) - ours)
    error = gap.std(ddof=1) / len(gap) ** 0.5
    assert 100 * behind[task] == pytest.approx(gap.mean())
    assert behind.pop(task) == ZOO["regret"]["dhr_openmax"]
    assert f"{gap.mean():.1f} ± {error:.1f} behind `crosr` (standard error over the six" in text
    assert f"it is at most {100 * max(behind.values()):.1f} behind" in text


def test_parts_of_the_rule_have_the_recorded_figures():
    text, variants, regrets = " ".join(ZOO_TEXT.split()), ZOO["variants"], ZOO["regret_of_variants"]
    parts = ("evidence", "direction", "membership")
    areas = [100 * variants[f"{part} alone"]["auroc"] for part in parts]
    claim = "Evidence alone has a mean of {:.1f}, direction alone {:.1f}, membership alone {:.1f}"
    assert claim.format(*areas) in text
    assert regrets["dhr_openmax"] == ZOO["regret"]["dhr_openmax"]
    variant = "evidence in full on small sets"
    claim = "counts in full, the mean AUROC is {:.1f}, too, but the regret {:.1f}."
    assert claim.format(100 * variants[variant]["auroc"], 100 * regrets[variant]) in text


@pytest.mark.parametrize("kinds", [4, 8, 12])
def test_gain_of_going_on_from_the_shipped_network_is_as_recorded(kinds):
    tasks = [f"photos {kinds}, classes", f"photos {kinds} tuned, classes"]
    both = [ZOO["tasks"][task]["dhr_openmax"] for task in tasks]
    cells = [f"{100 * of[metric]:.1f}" for metric in ("auroc", "oscr") for of in both]
    assert both[1]["auroc"] > both[0]["auroc"]
    assert both[1]["accuracy"] > both[0]["accuracy"]
    cells.append(f"{100 * both[1]['accuracy']:.1f}")
    assert f"| {kinds} kinds | {' | '.join(cells)} |" in BENCHMARKS


def test_larger_pictures_gain_what_the_text_says():
    block = (RESULTS / "tuned.txt").read_text().split("48 was taken.\n")[1].split("\n\n")[0]
    rows = np.array([line.split() for line in block.splitlines()[1:]], float)
    assert len(rows) == 18
    gains = rows[:, [3, 5, 7]] - rows[:, [2, 4, 6]]
    errors = gains.std(axis=0, ddof=1) / len(gains) ** 0.5
    accuracy, area, oscr = (
        f"{mean:.1f} ± {error:.1f}" for mean, error in zip(gains.mean(axis=0), errors, strict=True)
    )
    claim = f"name {accuracy} % more of the validation and test images correctly, "
    claim += f"AUROC of `dhr_openmax` is higher by {area} points and OSCR by {oscr}"
    text = " ".join(BENCHMARKS.split())
    assert claim in text
    large, small = (gflop_per_image(DHRNet(10, arch="deep", image_size=s)) for s in (48, 32))
    assert f"takes {large / small:.1f} times the operations" in text


def test_oscr_of_going_on_from_the_shipped_network_is_the_recorded_one():
    for claim, recipe in (("is {}, {} and {} % on 4", " tuned"), ("has {}, {} and {} % ([", "")):
        tasks = [f"photos {kinds}{recipe}, classes" for kinds in (4, 8, 12)]
        cells = [f"{100 * ZOO['tasks'][task]['dhr_openmax']['oscr']:.1f}" for task in tasks]
        assert claim.format(*cells) in " ".join(README.split())


def test_the_released_form_fails_on_deep_as_the_text_says():
    settings = json.loads((RESULTS / "zoo-deep.json").read_text())["settings"]
    means = {name: f"{100 * of['auroc']:.1f}" for name, of in settings.items()}
    twenty, ten, fifty = (means[f"openmax --alpha 0 --tail-size {size}"] for size in (20, 10, 50))
    printed = means["openmax --alpha all --tail-size 20"]
    claim = f"has a mean AUROC of {twenty}, and {ten} with 10, but {fifty} with 50; the printed"
    assert f"{claim} form has {printed} with 20." in " ".join(BENCHMARKS.split())
    claim = f"mean AUROC of {twenty} with tails of 20 distances, {fifty} with 50"
    assert claim in " ".join(README.split())


@pytest.mark.parametrize("method", METHODS)
def test_losses_compare_in_the_zoo_as_the_text_says(method):
    areas = [
        [100 * ZOO["tasks"][f"{name}, {kind}"][method]["auroc"] for kind in UNKNOWN_KINDS]
        for name in ("cifar 500", "cifar 500 ovr")
    ]
    cells = [f"{np.mean(three):.1f}" for three in areas]
    assert row_of(method, BENCHMARKS.split("### What the loss does")[1]) == cells
    assert (np.mean(areas[1]) > np.mean(areas[0])) == (method != "max_logit")


def test_table_of_changes_of_the_recipe_holds_the_recorded_figures():
    *recorded, second_cycle, one_cycle, _, _ = (RESULTS / "recipe.txt").read_text().split("\n$ ")
    rows = [
        f"| {seed} `{name}` | {' | '.join([*cells[:5], *cells[6:9]])} |"  # without their means
        for seed, block in enumerate(recorded)
        for name, *cells in map(str.split, filter(None, block.splitlines()[3:]))
    ]
    assert len(rows) == 7
    assert [row for row in rows if row not in BENCHMARKS] == []
    assert "--seeds 1 " in recorded[1].splitlines()[0]
    second, first = (
        [re.split(r"\s+(?=\d)", row)[:9] for row in block.splitlines()[3:]]
        for block in (second_cycle, one_cycle)
    )
    rows = [f"| `{name}` | {' | '.join(cells[:5])} |" for name, *cells in second + first]
    assert len(rows) == 7
    assert [row for row in rows if row not in BENCHMARKS] == []
    base, plain, fractal, averaged, noise = (np.array(row[2:6], float) for row in second)
    assert all(fractal[1:] > plain[1:])
    assert averaged[0] > plain[0] > noise[0]
    t2fnorm, nesterov = (np.array(row[2:6], float) for row in first)
    assert all(t2fnorm[1:] > base[1:])
    assert round(2 * (base[0] - t2fnorm[0])) == 1
    assert all(nesterov < base)


def test_turns_as_evidence_gain_what_the_text_says():
    *_, seed_0, seed_1 = (RESULTS / "recipe.txt").read_text().split("\n$ ")
    gains = []
    for block in (seed_0, seed_1):
        _, *cells = re.split(r"\s+(?=\d)", block.splitlines()[-1])
        gains += [float(cells[6]) - float(cells[2]), float(cells[8]) - float(cells[4])]
    text = " ".join(BENCHMARKS.split())
    claim = "gains {:.1f} and {:.1f} points on classes left out and resized pictures with seed 0, "
    assert (claim + "{:.1f} and {:.1f} with seed 1").format(*gains) in text


def test_turned_copies_lost_what_the_text_says():
    first, turned = (epochs_of(f"{record}.txt") for record in ("train-deep", "turned-cycle"))
    val = [100 * float(row[-1]) for row in (first[43], turned[-1])]
    text = " ".join(BENCHMARKS.split())
    assert "from {:.2f} to {:.2f} % of the validation".format(*val) in text
    near = near_of("openood-first-cycle"), near_of("turned-cycle")
    assert "and from {:.1f} to {:.1f} on OpenOOD's near sets".format(*near) in text


def test_a_head_for_turns_lost_at_full_length_what_the_text_says():
    plain, turns = (epochs_of(f"{record}.txt")[-1] for record in ("train-deep", "head-for-turns"))
    text = " ".join(BENCHMARKS.split())
    claim = "{:.2f} % of the validation images are named correctly (shipped: {:.2f}), and"
    assert claim.format(100 * float(turns[-1]), 100 * float(plain[-1])) in text
    near = [near_of(record, "crosr") for record in ("head-for-turns", "openood")]
    claim = "`crosr` has {:.1f} on OpenOOD's near sets (shipped: {:.1f}), `dhr_openmax` hardly more"
    assert claim.format(*near) in text
    assert near_of("head-for-turns") < near[0] + 0.1


def test_second_cycle_has_the_validation_accuracy_that_the_text_says():
    val = {row[0]: 100 * float(row[-1]) for row in epochs_of("train-deep.txt")}
    text = " ".join(BENCHMARKS.split())
    claim = "the mean named {:.2f} % of the validation images correctly, the first cycle {:.2f} %"
    assert claim.format(val["60"], val["44"]) in text
    assert f"take the rate to 0: {val['64']:.2f} %" in text


def near_of(record, method="dhr_openmax"):
    methods = json.loads((RESULTS / f"{record}.json").read_text())["methods"]
    return methods[method]["near_auroc"]


@pytest.mark.parametrize("method", ["openmax", "crosr"])
def test_forms_of_the_published_methods_compare_as_the_text_says(method):
    settings = ZOO["settings"]
    released = settings[f"{method} --alpha 0 --tail-size 20"]
    printed = settings[f"{method} --alpha all --tail-size 20"]
    assert released["fpr_at_95_tpr"] < printed["fpr_at_95_tpr"]
    assert released["macro_f1"] > printed["macro_f1"]
    assert printed["auroc"] > released["auroc"]


def test_near_ood_figures_are_the_recorded_ones():
    text = " ".join(BENCHMARKS.split("## OpenOOD")[1].split("## ")[0].split())
    methods = json.loads((RESULTS / "openood.json").read_text())["methods"]
    near = {name: f"{of['near_auroc']:.1f}" for name, of in methods.items()}
    for name in ("dhr_openmax", "crosr", "openmax"):
        assert f"`{name}` {near[name]}" in text
    peers = {name: of["near_auroc"] for name, of in methods.items() if name.startswith("pytorch")}
    assert max(peers, key=peers.get) == "pytorch-ood GEN"
    assert f"(GEN) {near['pytorch-ood GEN']}, level with `dhr_openmax`" in text
    assert abs(methods["dhr_openmax"]["near_auroc"] - max(peers.values())) < 0.1
    assert f"`crosr` had {near_of('openood-first-cycle', 'crosr'):.1f}" in text


def epochs_of(record):
    """The epoch lines, split into columns, of a recorded training run."""
    lines = (RESULTS / record).read_text().splitlines()
    return [line.split() for line in lines if line[:5].strip().isdigit()]


@pytest.mark.parametrize(
    ("arch", "record", "line"),
    [
        ("fast", "train.txt", r"python train_dhr_nn.py +# CIFAR-10, (\d+) minutes"),
        ("deep", "train-deep.txt", r"--arch deep +# the shipped network again, (\d+) minutes"),
    ],
)
def test_minutes_are_those_of_the_recorded_training(arch, record, line):
    minutes = sum(float(row[1]) for row in epochs_of(record)) / 60
    assert int(re.search(line, README).group(1)) == pytest.approx(minutes, rel=0.05)


def test_evaluation_takes_the_minutes_that_the_text_says():
    recorded = (RESULTS / "evaluate.txt").read_text()
    seconds = sum(float(value) for value in re.findall(r" ([\d.]+) s\b", recorded))
    minutes = round(seconds / 60)
    assert f"`make evaluate` takes {minutes} minutes" in " ".join(README.split())
    assert f"# up to {minutes} minutes and" in README
    for name, method in product(SETS, METHODS):
        rows = recorded.split(f"against {name} ")[1]
        row = re.search(rf"^{method} +(.*)", rows, re.MULTILINE).group(1).split()
        figures = RECORDED["methods"][method][name]
        assert row == [f"{100 * figures[column]:.2f}" for column in TITLES]


def test_bfloat16_changes_the_published_methods_as_little_as_the_text_says():
    other = json.loads((RESULTS / "evaluate-bfloat16.json").read_text())["methods"]
    differences = [
        100 * abs(figures[column] - other[method][name][column])
        for method in METHODS[:-1]
        for name, figures in RECORDED["methods"][method].items()
        for column in TITLES
    ]
    assert len(differences) == 4 * 3 * 8
    claim = r"no figure of the published methods differs by more than ([\d.]+) points"
    assert max(differences) < float(re.search(claim, " ".join(README.split())).group(1))


def test_own_pictures_train_within_the_minutes_that_the_text_gives():
    minutes = sum(float(row[1]) for row in epochs_of("photos.txt")) / 60
    shown = int(re.search(r"# your own pictures: (\d+) minutes for 200", README).group(1))
    assert shown - 2 < minutes < shown


def test_mutants_are_those_of_the_recorded_run():
    recorded = (RESULTS / "mutants.txt").read_text().splitlines()[1]
    noticed, left = re.search(r"(\d+) noticed, (\d+) not", recorded).groups()
    text = (ROOT / "tests" / "README.md").read_text()
    assert f"noticed {noticed} of 1,041" in text
    assert f"lists the other {left}." in text


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_pflop_of_a_recipe_are_those_that_pytorch_counts(arch):
    recipe = train_dhr_nn.RECIPES[arch]
    gflop = gflop_per_image(DHRNet(10, arch=arch))
    pflop = 47_500 // recipe.batch_size * recipe.batch_size * recipe.epochs * gflop / 1e6
    assert f"| `{arch}` | {pflop:.2g} |" in BENCHMARKS


def test_recorded_run_is_of_the_shipped_checkpoint():
    digest = hashlib.sha256((ROOT / "dhr_net.pt").read_bytes()).hexdigest()
    assert RECORDED["checkpoint"]["sha256"] == digest
    assert RECORDED["activations"] == "extracted"


def test_shipped_checkpoint_says_how_it_was_made():
    network, checkpoint = load_checkpoint(ROOT / "dhr_net.pt")
    assert checkpoint["known_classes"][3] == "cat"
    assert checkpoint["git_commit"]
    assert not network.training
    assert (ROOT / "dhr_net.pt").stat().st_size < 25e6


def test_transcript_of_own_pictures_is_the_recorded_one():
    section = README.split("## Your own pictures")[1].split("## ")[0]
    shown = section.split("```")[1].strip().splitlines()
    recorded = (RESULTS / "photos.txt").read_text().splitlines()
    assert [line for line in shown if line != "..." and line not in recorded] == []
    answers = [line.split()[0] for line in recorded if "my/other/gondola/IMG_" in line]
    claim = f"It calls {answers.count('unknown')} of {len(answers)} gondolas unknown"
    assert claim in " ".join(section.split())


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("train fast, images/s; matrix rate", r"training at (\d+) % of"),
        ("extract, images/s; image by image", r"extraction ([\d.]+) times"),
        ("OpenMax fit + score, ms; loop with libMR", r"OpenMax (\d+) times"),
        ("OpenMax on 10 logits, ms; pytorch-ood", r"and (\d+) times as pytorch"),
        ("one photograph, s; imports alone", r"one photograph takes ([\d.]+) s"),
        ("train vgg, images/s; textbook loop", r"`vgg` trains ([\d.]+) times"),
        ("OpenMax score, ms; distances alone", r"their distances \(([\d.]+)\)"),
        ("the same, peak GB", r"`fast` trains in ([\d.]+) GB"),
    ],
)
def test_speeds_are_the_recorded_ones(row, text):
    recorded = (RESULTS / "bench.txt").read_text()
    ratio = float(recorded.split(row)[1].split("\n")[0].split()[2].replace(",", ""))
    shown = re.search(text, BENCHMARKS.split("## Speed")[1]).group(1)
    ratio *= 100 if "% of" in text else 1
    assert float(shown) == round(ratio, len(shown.partition(".")[2]))


SCRIPTS = {"train_dhr_nn.py": train_dhr_nn, "compute_openmax.py": compute_openmax}
COMMANDS = sorted(
    set(re.findall(r"^\s*\$?\s*python (\w+\.py.*?)(?:\s+#.*)?$", README + BENCHMARKS, re.MULTILINE))
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_in_the_texts_parses(command):
    script, *flags = shlex.split(command)
    assert SCRIPTS[script].parse_args(flags)


def test_python_in_the_readme_runs(tmp_path, monkeypatch):
    names = {
        "images": torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8),
        "train_images": torch.rand(60, 3, 32, 32),
        "torch": torch,
    }
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dhr_net.pt").symlink_to(ROOT / "dhr_net.pt")
    exec(blocks[0], names)
    assert names["logits"].shape == (4, 10)
    exec(blocks[2], names)
    assert (tmp_path / "recogniser.pt2").exists()
    setup, use = blocks[1].split("openmax = ")
    exec(setup, names)
    vectors = names["vectors"]
    names["train_labels"] = vectors(names["train_images"])[:, :3].argmax(axis=1)
    names["images"] = torch.rand(5, 3, 32, 32)
    names["train_labels"][:] = np.arange(60) % 3  # a network with random weights has one answer
    biased = names["head"]
    with torch.no_grad():
        features = torch.from_numpy(vectors(names["train_images"])[:, 3:])
        target = torch.eye(3)[torch.from_numpy(names["train_labels"])]
        biased.weight.copy_(torch.linalg.lstsq(features, target).solution.T)
        biased.bias.zero_()
    exec("openmax = " + use, names)
    assert set(names["openmax"].predict(vectors(names["images"]))) <= {-1, 0, 1, 2}
