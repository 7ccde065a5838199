"""Choose the open-set rule's settings without unknown images, on networks that leave classes out.

    python benchmarks/sweep.py data/splits/cifar10-?,?,?,?,?,?.pt  # the networks of splits.py
    python benchmarks/sweep.py first.pt second.pt         # or of train_dhr_nn.py --known-classes
    python benchmarks/sweep.py dhr_net.pt                 # or one that knows all classes

Validation images of the classes that a network was not trained on stand in for unknown images,
those of its own classes are known; no test image is touched. Where a network knows all classes, its
own validation images stand in, distorted until they show none. Prints the mean AUROC over the
networks of every tail size and alpha, a recommendation, all methods side by side, what each choice
of dhr_openmax is worth (the variants of ablation.py), and one JSON line.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from ablation import variants

from compute_openmax import METHODS, Rule, Scorer
from metrics import auroc
from models import extract, load_checkpoint, prepare_device
from open_set_data import ImageSet, fit_to, load_known
from openmax import UNKNOWN, Activations

TAIL_SIZES = (5, 10, 20, 50, 100)
ALPHAS = (0, 1, 2, 3, 5)  # and all classes; dhr_openmax takes none


class Fold(NamedTuple):
    """Activations of train and val of the classes a network knows, and of the stand-ins."""

    train: Activations
    val: Activations
    left_out: Activations

    def area(self, scorer: Scorer) -> float:
        return auroc(scorer(self.val).unknownness, scorer(self.left_out).unknownness)


def load_fold(checkpoint: Path, data_dir: Path, device_name: str) -> Fold:
    device, autocast = prepare_device(device_name)
    model, meta = load_checkpoint(checkpoint)
    model.to(device).to(memory_format=torch.channels_last)
    dataset, known_classes = meta["train_args"]["dataset"], meta["train_args"]["known_classes"]
    known, everything = (load_known(dataset, data_dir, c) for c in (known_classes, ""))
    left_out = [str(i) for i, name in enumerate(everything.classes) if name not in known.classes]
    if len(left_out) == 1:
        raise SystemExit(f"{checkpoint} leaves out one class; expected none or several")
    if left_out:
        stand_ins = load_known(dataset, data_dir, ",".join(left_out)).val.images
    else:
        stand_ins = distorted(known.val.images)
    others = ImageSet(stand_ins, np.full(len(stand_ins), UNKNOWN))
    return Fold(
        *(
            extract(model, images, f"{checkpoint.name} {title}", 500, device, autocast)
            for title, images in (
                ("train", known.train), ("val", known.val), ("stand-ins", others)
            )
        )
    )  # fmt: skip


def distorted(images: np.ndarray) -> np.ndarray:
    """Images [N, H, W, C] four times: their middle enlarged, mixed in pairs, turned by a right
    angle, and with quarters exchanged; [4 N, H, W, C]."""
    size, channels = images.shape[2:]
    middle = images[:, size // 4 : -size // 4, size // 4 : -size // 4]
    partners = np.random.default_rng(0).permutation(images)
    mixed = ((images.astype(np.uint16) + partners) // 2).astype(np.uint8)
    exchanged = np.roll(images, (size // 2, size // 2), axis=(1, 2))
    turned = np.rot90(images, axes=(1, 2))
    return np.concatenate([fit_to(middle, size, channels), mixed, turned, exchanged])


def mean_areas(folds: list[Fold]) -> dict[str, dict[tuple[int, int], float]]:
    """Mean AUROC over the folds for each method, tail size and alpha that can be fitted."""
    num_classes = min(fold.train.logits.shape[1] for fold in folds)
    alphas = sorted({alpha for alpha in ALPHAS if alpha < num_classes} | {num_classes})
    means: dict[str, dict[tuple[int, int], float]] = {}
    for method in ("openmax", "crosr", "dhr_openmax"):
        means[method] = {}
        for tail_size in TAIL_SIZES:
            for alpha in alphas if method != "dhr_openmax" else [0]:
                rule = Rule("max", "euclidean", tail_size, alpha)
                try:
                    areas = [
                        fold.area(METHODS[method](fold.train, fold.val, rule)) for fold in folds
                    ]
                except ValueError:  # fewer images than the tail
                    continue
                means[method][tail_size, alpha] = statistics.fmean(areas)
    return means


def variant_areas(folds: Iterable[Fold]) -> dict[str, list[float]]:
    """AUROC in each fold of all methods, and of the variants of dhr_openmax."""
    areas: dict[str, list[float]] = {}
    rule = Rule("max", "euclidean", 20, 0)
    for fold in folds:
        scorers = {name: method(fold.train, fold.val, rule) for name, method in METHODS.items()}
        for name, scorer in (scorers | dict(variants(fold.train, fold.val))).items():
            areas.setdefault(name, []).append(fold.area(scorer))
    return areas


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="networks")
    add("--data-dir", type=Path, default=ROOT / "data", help="images (default data)")
    add("--device", default="auto", help="as in the scripts (default auto)")
    args = parser.parse_args(argv)
    folds = [load_fold(path, args.data_dir, args.device) for path in args.checkpoints]
    means = mean_areas(folds)
    for method, areas in means.items():
        best = max(areas, key=lambda setting: areas[setting])
        print(f"\n{method}: AUROC in % of stand-ins, mean of {len(folds)} networks")
        for (tail_size, alpha), area in areas.items():
            chosen = "  <- recommended" if (tail_size, alpha) == best else ""
            print(f"  --tail-size {tail_size:<4} --alpha {alpha:<3} {100 * area:6.2f}{chosen}")
    choices = variant_areas(folds)
    print("\nmethods, and dhr_openmax with one choice changed: the same, mean and each network")
    for name, each in choices.items():
        print(f"  {name:38} {100 * statistics.fmean(each):6.2f}  "
              + " ".join(f"{100 * area:6.2f}" for area in each))  # fmt: skip
    settings = {m: [[*s, a] for s, a in areas.items()] for m, areas in means.items()}
    print(json.dumps({"settings": settings, "choices": choices}))


if __name__ == "__main__":
    main()
