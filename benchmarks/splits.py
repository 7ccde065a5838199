"""The field's standard splits: train on some classes, measure on the others; mean and std of five.

    python benchmarks/splits.py cifar10 cifar+10 cifar+50   # default: all whose images are on disk
    python benchmarks/splits.py cifar10 --splits 1 --arch deep --epochs 20

Flags that are not its own go to train_dhr_nn.py, which trains each network. Networks and figures
are kept in --out: call again to go on after a stop. Prints AUROC and OSCR beside published AUROCs;
writes benchmarks/results/splits.json.

The class lists are those of ARPL (Chen et al. 2021, github.com/iCGY96/ARPL, split.py) and of Vaze
et al. 2022 (github.com/sgvaze/osr_closed_set_all_you_need, osr_splits.py), which agree. In both,
the first two CIFAR-10 splits hold the same six classes; kept, to compare with published figures.
CIFAR+N: four CIFAR-10 classes known, N classes of CIFAR-100 unknown. Published figures come from
each paper's own networks and, often, from the best epoch on the test set.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from activations import extract, load_network
from command_line import make_parser
from methods import OpenMaxSettings, build_methods
from metrics import open_set_metrics
from open_set_data import TORCHVISION, ImagesUnavailable, as_unknown, load_cifar100_test, load_known
from pictures import fit_to

# Indices into the sorted class names.
KNOWN = {
    "mnist": ["2 4 5 9 8 3", "3 2 6 9 4 0", "5 8 3 2 4 6", "3 7 8 4 0 5", "6 3 4 9 8 2"],
    "svhn": ["5 3 7 2 8 6", "3 8 7 6 2 5", "8 9 4 7 2 1", "3 8 2 5 0 6", "4 9 2 7 1 0"],
    "cifar10": ["0 6 4 9 1 7", "7 6 4 9 0 1", "1 5 7 3 9 4", "8 6 1 9 0 7", "2 4 1 7 9 6"],
    "cifar+10": ["4 7 9 1", "6 7 1 9", "9 6 1 7", "6 4 9 1", "1 0 9 8"],
    "cifar+50": ["4 7 9 1", "6 7 1 9", "9 6 1 7", "6 4 9 1", "1 0 9 8"],
    "tiny-imagenet": [
        "108 147 17 58 193 123 72 144 75 167 134 14 81 171 44 197 152 66 1 133",
        "198 161 91 59 57 134 61 184 90 35 29 23 199 38 133 19 186 18 85 67",
        "177 0 119 26 78 80 191 46 134 92 31 152 27 60 114 50 51 133 162 93",
        "98 36 158 177 189 157 170 191 82 196 138 166 43 13 152 11 75 174 193 190",
        "95 6 145 153 0 143 31 23 189 81 20 21 89 26 36 170 102 177 108 169",
    ],
}
CIFAR100_UNKNOWN = {
    "cifar+10": [
        "30 25 1 9 8 0 46 52 49 71",
        "41 9 49 40 73 60 48 30 95 71",
        "8 9 49 40 73 60 48 95 30 71",
        "95 60 30 73 46 49 68 99 8 71",
        "33 2 3 97 46 21 64 63 88 43",
    ],
    "cifar+50": [
        "27 94 29 77 88 26 69 48 75 5 59 93 39 57 45 40 78 20 98 47 66 70 91 76 41 "
        "83 99 32 53 72 2 95 21 73 84 68 35 11 55 60 30 25 1 9 8 0 46 52 49 71",
        "65 97 86 24 45 67 2 3 91 98 79 29 62 82 33 76 0 35 5 16 54 11 99 52 85 "
        "1 25 66 28 84 23 56 75 46 21 72 55 68 8 69 41 9 49 40 73 60 48 30 95 71",
        "20 83 65 97 94 2 93 16 67 29 62 33 24 98 5 86 35 54 0 91 52 66 85 84 56 "
        "11 1 76 25 55 21 99 72 41 23 75 28 68 69 46 8 9 49 40 73 60 48 95 30 71",
        "92 82 77 64 5 33 62 56 70 0 20 28 67 14 84 53 91 29 85 2 52 83 75 35 11 "
        "21 72 98 55 1 41 76 25 66 69 9 48 54 40 23 95 60 30 73 46 49 68 99 8 71",
        "47 6 19 0 62 93 59 65 54 70 34 55 23 38 72 76 53 31 78 96 77 27 92 18 82 "
        "50 98 32 1 75 83 4 51 35 80 11 74 66 36 42 33 2 3 97 46 21 64 63 88 43",
    ],
}
PUBLISHED = {  # AUROC in %, as reprinted in later papers
    "Softmax": {"mnist": 97.8, "svhn": 88.6, "cifar10": 67.7, "cifar+10": 81.6, "cifar+50": 80.5,
                "tiny-imagenet": 57.7},
    "CROSR": {"mnist": 99.1, "svhn": 89.9, "cifar10": 88.3, "cifar+10": 91.2, "cifar+50": 90.5,
              "tiny-imagenet": 58.9},
    "CGDL": {"svhn": 93.5, "cifar10": 90.3, "cifar+10": 95.9, "cifar+50": 95.0,
             "tiny-imagenet": 76.2},
    "RCSSR": {"svhn": 97.8, "cifar10": 91.5, "cifar+10": 96.0, "cifar+50": 96.3,
              "tiny-imagenet": 81.9},
    "MLS": {"svhn": 97.1, "cifar10": 93.6, "cifar+10": 97.9, "cifar+50": 96.5,
            "tiny-imagenet": 83.0},
    "SpHOR": {"svhn": 99.1, "cifar10": 94.5, "cifar+10": 98.2, "cifar+50": 97.2,
              "tiny-imagenet": 84.1},
}  # fmt: skip


Figures = dict[str, dict[str, float]]  # of each method, and the closed-set accuracy


def on_disk(protocol: str, data_dir: Path) -> bool:
    """Whether a protocol's images are in the data folder."""
    paths = {name: path.format(split="train") for name, (_, path) in TORCHVISION.items()}
    paths["tiny-imagenet"] = "tiny-imagenet-200/train"
    cifar100 = any((data_dir / path).is_dir() for path in (paths["cifar100"], "cifar100/test"))
    there = (data_dir / paths.get(protocol, paths["cifar10"])).exists()
    return there and (cifar100 or protocol not in CIFAR100_UNKNOWN)


def training_flags(
    checkpoint: Path, dataset: str, known_classes: str, args: argparse.Namespace
) -> list[str]:
    """The flags of train_dhr_nn.py that train a network, or go on where a stopped run was."""
    flags = ["--dataset", dataset, "--known-classes", known_classes, "--out", str(checkpoint)]
    flags += ["--data-dir", str(args.data_dir), "--device", args.device, *args.training]
    return flags + ["--resume"] * Path(f"{checkpoint}.partial").exists()


def train(flags: Sequence[str]) -> None:
    """Run train_dhr_nn.py; where it stops, this script stops too."""
    print(f"\n$ python train_dhr_nn.py {shlex.join(flags)}", flush=True)
    command = [sys.executable, str(ROOT / "train_dhr_nn.py"), *flags]
    if status := subprocess.run(command, check=False).returncode:
        raise SystemExit(status)


def cifar100_images(protocol: str, split: int, data_dir: Path) -> np.ndarray:
    """The test images of the CIFAR-100 classes that are unknown in a split."""
    images, labels = load_cifar100_test(data_dir)
    return images[np.isin(labels, [int(i) for i in CIFAR100_UNKNOWN[protocol][split].split()])]


def measure(
    checkpoint: Path, data_dir: Path, device: str, unknown: np.ndarray | None = None
) -> Figures:
    """AUROC and OSCR of every method, and the closed-set accuracy.

    Args:
        checkpoint: a network trained on some classes of a data set.
        data_dir: where images are found.
        device: as in the scripts.
        unknown: [N, H, W, C] uint8; None for the test images of the classes left out.
    """
    network, saved = load_network(checkpoint, device)
    trained, config = saved["train_args"], network.config
    size = config["image_size"]
    data = load_known(trained["dataset"], data_dir, trained["known_classes"], size)
    unknown = data.test_unknown if unknown is None else fit_to(unknown, size, config["in_channels"])
    image_sets = (data.train, data.val, data.test_known, as_unknown(unknown))
    train, val, known, others = (extract(network, images, 250) for images in image_sets)
    figures = {"accuracy": {"closed_set": known.accuracy}}
    for name, method in build_methods(OpenMaxSettings()).items():
        method.fit(train, val)
        scores = method.score(known), known.labels, method.score(others)
        measured = open_set_metrics(*scores, method.threshold_)
        figures[name] = {metric: measured[metric] for metric in ("auroc", "oscr")}
    return figures


def run_split(protocol: str, split: int, args: argparse.Namespace) -> Figures:
    """Train and measure one split, or read what an earlier call measured."""
    results = args.out / f"{protocol}-{split}.json"
    if not results.exists():
        unknown = None
        if protocol in CIFAR100_UNKNOWN:  # they may have to be downloaded: before training
            unknown = cifar100_images(protocol, split, args.data_dir)
        dataset = "cifar10" if protocol.startswith("cifar") else protocol
        known_classes = ",".join(KNOWN[protocol][split].split())
        checkpoint = args.out / f"{dataset}-{known_classes}.pt"
        if not checkpoint.exists():
            train(training_flags(checkpoint, dataset, known_classes, args))
        figures = measure(checkpoint, args.data_dir, args.device, unknown)
        results.write_text(json.dumps(figures))
    return json.loads(results.read_text())


def summarize(splits: list[Figures]) -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation of every figure over the splits."""
    return {
        method: {
            metric: [
                statistics.fmean(values := [split[method][metric] for split in splits]),
                statistics.stdev(values) if len(values) > 1 else 0.0,
            ]
            for metric in figures
        }
        for method, figures in splits[0].items()
    }


def print_protocol(protocol: str, summary: dict[str, dict[str, list[float]]], count: int) -> None:
    mean, std = (100 * value for value in summary["accuracy"]["closed_set"])
    print(f"\n{protocol}, {count} splits, in %; closed-set accuracy {mean:.1f} +- {std:.1f}")
    print(f"{'':14}{'AUROC':>16}{'OSCR':>16}")
    for method, figures in summary.items():
        if method != "accuracy":
            cells = (f"{100 * m:8.1f} +- {100 * s:4.1f}" for m, s in figures.values())
            print(f"{method:14}" + "".join(f"{cell:>16}" for cell in cells))
    for paper, figures in PUBLISHED.items():
        if protocol in figures:
            print(f"{paper + ' (paper)':20}{figures[protocol]:4.1f}")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("protocols", nargs="*", metavar="PROTOCOL", help=f"of {', '.join(KNOWN)}")
    add("--splits", type=int, default=5, choices=range(1, 6), help="the first N (default 5)")
    add("--data-dir", type=Path, default=ROOT / "data", help="images (default data)")
    help_of_out = "networks and their figures, of one set of training flags (default data/splits)"
    add("--out", type=Path, default=ROOT / "data" / "splits", help=help_of_out)
    add("--device", default="auto", help="as in the scripts (default auto)")
    add("--json", type=Path, default=ROOT / "benchmarks" / "results" / "splits.json")
    args, args.training = parser.parse_known_args(argv)
    if unheard_of := set(args.protocols) - set(KNOWN):
        parser.error(f"no protocol {', '.join(unheard_of)}; expected of {', '.join(KNOWN)}")
    args.out.mkdir(parents=True, exist_ok=True)
    trained_with = args.out / "training.json"
    if trained_with.exists() and json.loads(trained_with.read_text()) != args.training:
        parser.error(f"{args.out} holds networks of other training flags; choose another --out")
    trained_with.write_text(json.dumps(args.training))
    recorded = json.loads(args.json.read_text()) if args.json.exists() else {}
    try:
        for protocol in args.protocols or [each for each in KNOWN if on_disk(each, args.data_dir)]:
            splits = [run_split(protocol, split, args) for split in range(args.splits)]
            summary = summarize(splits)
            print_protocol(protocol, summary, len(splits))
            recorded[protocol] = {
                "training": args.training, "splits": splits, "mean_and_std": summary
            }  # fmt: skip
            args.json.write_text(json.dumps(recorded, indent=2) + "\n")
    except (ImagesUnavailable, ValueError) as error:
        raise SystemExit(f"splits.py: error: {error}") from error


if __name__ == "__main__":
    main()
