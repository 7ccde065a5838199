"""OpenOOD v1.5's CIFAR-10 benchmark: near-OOD AUROC beside the board's best entries.

    python benchmarks/openood.py                       # the shipped network; minutes
    python benchmarks/openood.py NETWORK.pt --json results.json

Known are 9,000 of the CIFAR-10 test images, unknown CIFAR-100 and 7,793 TinyImageNet validation
images, resized with an antialiasing filter; near is the mean of both AUROCs. Other data sets (SVHN,
MNIST, Textures, Places365) are measured if they are in the data folder. `openood_cifar10.json`
holds the benchmark's lists as positions in the official files. With pytorch-ood installed, its
detectors are fitted to the same images and stand beside ours.

Source: OpenOOD v1.5 (Zhang et al. 2023, arXiv 2306.09301) and its leaderboard of July 2025.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from activations import Activations, extract, load_network
from command_line import make_parser
from methods import OpenMaxSettings, build_methods
from metrics import auroc, fpr_at_95_tpr
from models import DHRNet
from open_set_data import (
    TORCHVISION,
    ImagesUnavailable,
    as_unknown,
    load_cifar100_test,
    load_known,
    load_unknown,
    tiny_imagenet_files,
)
from pictures import ImageSet, read_and_report

NEAR = ("cifar100", "tiny-imagenet")
FAR = ("svhn", "mnist", "textures")
TIN_COUNT = 7793
BOARD = (  # training, score, near-OOD AUROC in %, closed-set accuracy in %
    ("RotPred + PixMix", "RotPred", 94.86, 95.91),
    ("LogitNorm + PixMix", "MSP", 94.25, 94.60),
    ("PixMix", "KNN", 93.10, 95.15),
    ("ASCOOD", "T2FNorm", 93.03, 95.00),
    ("T2FNorm", "T2FNorm", 92.79, 94.69),
    ("cross-entropy", "KNN", 90.64, 95.06),
    ("cross-entropy", "OpenMax", 87.62, 95.06),
)


def benchmark_sets(test: ImageSet, data_dir: Path) -> dict[str, ImageSet]:
    """Known images, of CIFAR-10's test images, and all unknown sets at hand, 32x32; says what is
    not the whole."""
    lists = json.loads((Path(__file__).parent / "openood_cifar10.json").read_text())
    sets = {"known": test.where(~np.isin(np.arange(10_000), lists["known_left_out"]))}
    cifar100 = load_cifar100_test(data_dir)
    if (data_dir / TORCHVISION["cifar100"][1]).exists():  # the folder of PNGs has another order
        classes = sorted(lists["cifar100_used"])
        used = [np.flatnonzero(cifar100.labels == label)[np.array(lists["cifar100_used"][c]) - 1]
                for label, c in enumerate(classes)]  # fmt: skip
        cifar100 = cifar100.where(np.concatenate(used))
    else:
        print("cifar100: all 10,000 test images, where the benchmark takes 9,000 (AUROC +-0.04)")
    unknown = {"cifar100": cifar100.images}
    left_out = {f"val_{number}.JPEG" for number in lists["tin_left_out"]}
    files = [file for file in tiny_imagenet_files(data_dir, "val") if file.name not in left_out]
    unknown["tiny-imagenet"], read = read_and_report("tiny-imagenet", files, 32)
    if len(read) != TIN_COUNT:
        print(f"tiny-imagenet: {len(read):,} images, where the benchmark takes {TIN_COUNT:,}")
    for name in FAR:
        if (data_dir / TORCHVISION[name][1].format(split="test")).exists():
            unknown[name] = load_unknown(name, data_dir, 32)
    if (places := data_dir / "places365").is_dir():
        unknown["places365"] = load_unknown(f"folder:{places}", data_dir, 32)
    return sets | {name: as_unknown(images) for name, images in unknown.items()}


def peer_scores(
    network: DHRNet, sets: dict[str, Activations], tested: list[str]
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """pytorch-ood's detectors, with their defaults, on the same logits and features."""
    from pytorch_ood.detector import GEN, KNN, RMD, EnergyBased, OpenMax, ViM

    last = network.head[-1]
    weight = last.weight.detach().cpu().float()
    bias = torch.zeros(len(weight)) if last.bias is None else last.bias.detach().cpu().float()
    labels = torch.from_numpy(sets["train"].labels)
    features, logits = (
        {name: torch.from_numpy(getattr(images, field)) for name, images in sets.items()}
        for field in ("features", "logits")
    )
    of_features = {"KNN": KNN(None), "RMD": RMD(None)}
    if weight.shape[1] == features["train"].shape[1]:  # not `vgg`, which has hidden layers
        of_features["ViM"] = ViM(None, 64, weight, bias)
    for name, detector in of_features.items():
        detector.fit_features(features["train"], labels)
        yield name, {each: detector.predict_features(features[each]).numpy() for each in tested}
    openmax = OpenMax(None).fit_logits(logits["train"], labels)
    of_logits = {"GEN": GEN(None), "energy": EnergyBased(None), "OpenMax": openmax}
    for name, detector in of_logits.items():
        yield name, {each: detector.predict_logits(logits[each]).numpy() for each in tested}


def measure(scores: dict[str, np.ndarray]) -> dict[str, Any]:
    """In %, of one method: AUROC and FPR95 in both conventions on each set; mean AUROC of near."""
    known = scores["known"]
    sets = {
        name: {
            "auroc": 100 * auroc(known, unknown),
            "fpr95_known_positive": 100 * fpr_at_95_tpr(known, unknown),
            "fpr95_unknown_positive": 100 * fpr_at_95_tpr(-unknown, -known),
        }
        for name, unknown in scores.items()
        if name != "known"
    }
    return {"near_auroc": float(np.mean([sets[name]["auroc"] for name in NEAR])), "sets": sets}


def print_board(results: dict[str, Any]) -> None:
    print(f"\nclosed-set accuracy on the benchmark's 9,000 images: {results['accuracy']:.2f} %")
    print("FPR95 known+: unknown images accepted with 95 % of the known ones;")
    print("FPR95 unknown+, as on the board: known images lost with 95 % of the unknown ones found")
    names = list(results["methods"]["msp"]["sets"])
    print(f"\n{'AUROC / FPR95 known+ / unknown+, in %':38}{'near':>7}"
          + "".join(f"{name:>24}" for name in names))  # fmt: skip
    for method, figures in results["methods"].items():
        row = f"{method:38}{figures['near_auroc']:7.2f}"
        for name in names:
            row += "  {:8.2f} /{:5.1f} /{:5.1f}".format(*figures["sets"][name].values())
        print(row)
    print("\nthe board, networks trained on CIFAR-10 without outlier data, mean of three runs:")
    for training, score, near, closed in BOARD:
        print(f"{training + ', ' + score:38}{near:7.2f}   accuracy {closed:.2f}")


def run(path: Path, data_dir: Path, device: str) -> dict[str, Any]:
    """Measure all methods, and pytorch-ood's detectors where it is installed."""
    network, checkpoint = load_network(path, device)
    if checkpoint["train_args"]["dataset"] != "cifar10" or len(checkpoint["known_classes"]) < 10:
        raise ValueError(f"{path} does not know the ten classes of CIFAR-10")
    data = load_known("cifar10", data_dir)
    image_sets = benchmark_sets(data.test_known, data_dir)
    tested = list(image_sets)
    image_sets |= {"train": data.train, "val": data.val}
    sets = {name: extract(network, images, 250, name) for name, images in image_sets.items()}
    methods = {}
    for name, method in build_methods(OpenMaxSettings()).items():
        method.fit(sets["train"], sets["val"])
        scores = {each: method.score(sets[each]).unknownness for each in tested}
        methods[name] = measure(scores)
    try:
        for name, scores in peer_scores(network, sets, tested):
            methods[f"pytorch-ood {name}"] = measure(scores)
    except ModuleNotFoundError as error:
        print(f"{error}: pip install pytorch-ood, for its detectors")
    return {"accuracy": 100 * sets["known"].accuracy, "methods": methods}


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("network", nargs="?", type=Path, default=ROOT / "dhr_net.pt", metavar="NETWORK")
    add("--data-dir", type=Path, default=ROOT / "data", help="images (default data)")
    add("--device", default="auto", help="as in the scripts (default auto)")
    add("--json", type=Path, help="write the figures there (default: no)")
    args = parser.parse_args(argv)
    try:
        results = run(args.network, args.data_dir, args.device)
    except (ImagesUnavailable, ValueError, OSError) as error:
        raise SystemExit(f"openood.py: error: {error}") from error
    print_board(results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
