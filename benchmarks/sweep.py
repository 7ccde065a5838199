"""Choose the tail size and alpha without unknown images: known classes are left out in turn.

    python benchmarks/sweep.py                             # CIFAR-10, five folds of two classes
    python benchmarks/sweep.py --dataset digits --batch-size 100 --epochs 8

For each fold a network is trained on the other classes; validation images of the classes left out
stand in for unknown images, those of the others are known. No test image is touched. Prints the
mean AUROC over the folds of every setting, a recommendation, and one JSON line. Networks are kept
in --out: call again to go on after a stop.
"""

import json
import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import splits

from compute_openmax import METHODS, Rule
from metrics import auroc
from models import extract, load_checkpoint, prepare_device
from open_set_data import load_known
from openmax import Activations

TAIL_SIZES = (5, 10, 20, 50, 100)
ALPHAS = (0, 1, 2, 3, 5)  # and all classes; dhr_openmax takes none


def fold_activations(
    checkpoint: Path, dataset: str, data_dir: Path, left_out: str, device_name: str
) -> tuple[Activations, Activations, Activations]:
    """Activations of train and val of the classes trained on, and val of those left out."""
    device, autocast = prepare_device(device_name)
    model, meta = load_checkpoint(checkpoint)
    model.to(device).to(memory_format=torch.channels_last)
    known = load_known(dataset, data_dir, meta["train_args"]["known_classes"])
    unknown = load_known(dataset, data_dir, left_out)
    train, val, other = (
        extract(model, images, title, 500, device, autocast)
        for title, images in (("train", known.train), ("val", known.val), ("left out", unknown.val))
    )
    return train, val, other


def sweep(
    folds: list[tuple[Activations, Activations, Activations]],
) -> dict[str, dict[tuple[int, int], float]]:
    """Mean AUROC over the folds for each method, tail size and alpha that can be fitted."""
    num_classes = min(train.logits.shape[1] for train, _, _ in folds)
    alphas = sorted({alpha for alpha in ALPHAS if alpha < num_classes} | {num_classes})
    means: dict[str, dict[tuple[int, int], float]] = {}
    for method in ("openmax", "crosr", "dhr_openmax"):
        means[method] = {}
        for tail_size in TAIL_SIZES:
            for alpha in alphas if method != "dhr_openmax" else [0]:
                rule = Rule("max", "euclidean", tail_size, alpha)
                areas = []
                for train, val, other in folds:
                    try:
                        scorer = METHODS[method](train, val, rule)
                    except ValueError:  # fewer images than the tail
                        break
                    areas.append(auroc(scorer(val).unknownness, scorer(other).unknownness))
                else:
                    means[method][tail_size, alpha] = statistics.fmean(areas)
    return means


def main(argv: list[str] | None = None) -> None:
    parser = splits.command_line(__doc__, "sweep", epochs=8)
    add = parser.add_argument
    add("--dataset", default="cifar10", help="as for train_dhr_nn.py (default cifar10)")
    add("--folds", type=int, default=5, help="networks to train, 2 or more (default 5)")
    args = parser.parse_args(argv)
    classes = load_known(args.dataset, args.data_dir).classes
    if not 2 <= args.folds <= len(classes) // 2:
        parser.error(f"--folds {args.folds}: expected 2..{len(classes) // 2}, two classes each")
    folds = []
    for fold in range(args.folds):
        left_out = ",".join(str(i) for i in range(len(classes)) if i % args.folds == fold)
        kept = ",".join(str(i) for i in range(len(classes)) if i % args.folds != fold)
        checkpoint = args.out / f"{args.dataset.replace('/', '_')}-{args.folds}-{fold}.pt"
        splits.train(checkpoint, args.dataset, kept, args)
        folds.append(
            fold_activations(checkpoint, args.dataset, args.data_dir, left_out, args.device)
        )
    means = sweep(folds)
    for method, areas in means.items():
        best = max(areas, key=lambda setting: areas[setting])
        print(f"\n{method}: AUROC in % of left-out classes, mean of {args.folds} folds")
        for (tail_size, alpha), area in areas.items():
            chosen = "  <- recommended" if (tail_size, alpha) == best else ""
            print(f"  --tail-size {tail_size:<4} --alpha {alpha:<3} {100 * area:6.2f}{chosen}")
    print(json.dumps({m: [[*s, a] for s, a in areas.items()] for m, areas in means.items()}))


if __name__ == "__main__":
    main()
