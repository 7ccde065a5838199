"""Turn a trained DHR network into an open-set recogniser with OpenMax, and measure it.

    python compute_openmax.py                                 # dhr_net.pt on CIFAR-10 / TinyImageNet-crop
    python compute_openmax.py --unknown svhn folder:my/images --json results.json
    python compute_openmax.py --images photo.jpg holiday/     # known class, or unknown?

Activation vectors of all images are extracted once; five methods are fitted on correctly classified
training images, get their threshold from validation images, and are compared on the test images.
"""

import argparse
import hashlib
import json
import os
import platform
import shlex
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from scipy.special import expit, softmax
from torch import Tensor
from tqdm import tqdm

from metrics import Scores, open_set_metrics, threshold_accepting
from models import DHRNet, load_checkpoint, prepare_device
from open_set_data import (
    HELD_OUT_CLASSES, UNKNOWN_SETS, ImageSet, ImagesUnavailable, image_files, load_known,
    load_unknown, read_images,
)  # fmt: skip
from openmax import DISTANCES, UNKNOWN, WEIBULL_ENGINE, OpenMax

HERE = Path(__file__).resolve().parent
SHIPPED_ACTIVATIONS = HERE / "data" / "dhr_net_activations.npz"
ACCEPTED_SHARE = 0.95  # of validation images, sets the threshold
TABLE_COLUMNS = {
    "auroc": "AUROC", "aupr_known": "AUPR known", "aupr_unknown": "AUPR unknown",
    "fpr_at_95_tpr": "FPR95", "detection_error": "det. error", "oscr": "OSCR",
    "macro_f1": "macro-F1", "macro_f1_at_half": "F1 at 0.5",
}  # fmt: skip


class Activations(NamedTuple):
    """What the network says of N images.

    Attributes:
        labels: [N] int64 class indices, `UNKNOWN` for images of unknown classes.
        logits: [N, K] float32, y.
        latents_max: [N, 32 L] float32, the latents of the L levels, shallow to deep, max-pooled over space.
        latents_avg: [N, 32 L] float32, averaged over space.
    """

    labels: np.ndarray
    logits: np.ndarray
    latents_max: np.ndarray
    latents_avg: np.ndarray


class Rule(NamedTuple):
    """The settings of `openmax` and `crosr`; `OpenMax` explains them."""

    latents: str
    distance: str
    tail_size: int
    alpha: int


Method = Callable[[Activations, Rule], Callable[[Activations], Scores]]


def msp(train: Activations, rule: Rule) -> Callable[[Activations], Scores]:
    """1 - the largest softmax probability (Hendrycks and Gimpel 2017)."""

    def score(images: Activations) -> Scores:
        known = softmax(images.logits.astype(np.float64), axis=1)
        unknownness = 1 - known.max(axis=1)
        return Scores(unknownness, np.column_stack([known, unknownness]))

    return score


def max_logit(train: Activations, rule: Rule) -> Callable[[Activations], Scores]:
    """Minus the largest logit (Vaze et al. 2022); as one-vs-rest probabilities, the logits' sigmoids."""

    def score(images: Activations) -> Scores:
        logits = images.logits.astype(np.float64)
        unknownness = -logits.max(axis=1)
        return Scores(unknownness, np.column_stack([expit(logits), expit(unknownness)]))

    return score


def openmax(train: Activations, rule: Rule) -> Callable[[Activations], Scores]:
    """OpenMax on the logits y (Bendale and Boult 2016)."""
    return _fitted_openmax(rule, train.labels, train, lambda images: images.logits)


def crosr(train: Activations, rule: Rule) -> Callable[[Activations], Scores]:
    """OpenMax on [y, z] (Yoshihashi et al. 2019)."""

    def vectors(images: Activations) -> np.ndarray:
        latents = {"max": images.latents_max, "avg": images.latents_avg}.get(rule.latents)
        return images.logits if latents is None else np.hstack([images.logits, latents])

    return _fitted_openmax(rule, train.labels, train, vectors)


def _fitted_openmax(
    rule: Rule,
    labels: np.ndarray,
    train: Activations,
    vectors: Callable[[Activations], np.ndarray],
) -> Callable[[Activations], Scores]:
    model = OpenMax(rule.tail_size, rule.alpha, rule.distance).fit(vectors(train), labels)

    def score(images: Activations) -> Scores:
        probabilities = model.predict_proba(vectors(images))
        return Scores(probabilities[:, UNKNOWN], probabilities)

    return score


METHODS: dict[str, Method] = {
    "msp": msp,
    "max_logit": max_logit,
    "openmax": openmax,
    "crosr": crosr,
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, default=HERE / "dhr_net.pt", metavar="PATH",
        help="written by train_dhr_nn.py (default: the shipped dhr_net.pt)")
    add("--data-dir", type=Path, default=HERE / "data", metavar="DIR",
        help="where image sets lie or are downloaded to (default data)")
    add("--unknown", nargs="+", metavar="NAME",
        help=f"{', '.join(UNKNOWN_SETS)}, or folder:PATH (default tiny-imagenet-crop; the classes "
        "left out, for a checkpoint trained with --known-classes)")
    add("--images", nargs="+", type=Path, metavar="PATH",
        help="classify these image files or folders instead of measuring")
    add("--latents", choices=("max", "avg", "none"), default="max",
        help="how crosr pools latents over space (default max, as published)")
    add("--distance", choices=DISTANCES, default="euclidean",
        help="of openmax and crosr to the MAV (default euclidean, as published)")
    add("--tail-size", type=int, default=20, metavar="N",
        help="largest distances a class's Weibull is fitted to, at least 5 (default 20, as published)")
    add("--alpha", type=int, default=0, metavar="N",
        help="top-ranked classes openmax and crosr revise, as in the papers' formula; 0 for the "
        "released code's, without ranks (default 0)")
    add("--json", type=Path, metavar="PATH", help="write the results there too")
    add("--no-cache", action="store_true", help="neither read nor write DIR/cache")
    add("--device", default="auto", metavar="NAME",
        help="auto, cpu, cuda, cuda:1, ... (default auto: a GPU where there is one)")
    add("--batch-size", type=int, default=500, metavar="N",
        help="images extracted at once (default 500)")
    add("--seed", type=int, default=0, metavar="N",
        help="of the random crops and the noise images (default 0)")
    add("--dry-run", action="store_true", help="check checkpoint and images, extract nothing")
    return parser.parse_args(argv)  # fmt: skip


@torch.no_grad()
def extract(
    model: DHRNet,
    images: np.ndarray,
    labels: np.ndarray,
    title: str,
    batch_size: int,
    device: torch.device,
    autocast: torch.autocast,
) -> Activations:
    """Run the network, decoder skipped, over images [N, H, W, C] uint8."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with tqdm(total=len(images), desc=title, unit="img", unit_scale=True, leave=False) as bar:
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(images[start : start + batch_size]).to(device)
            with autocast:
                logits, _, latents = model(batch.permute(0, 3, 1, 2), decode=False)
            latents_max = torch.cat([z.amax(dim=(2, 3)).float() for z in latents], dim=1)
            latents_avg = torch.cat([z.float().mean(dim=(2, 3)) for z in latents], dim=1)
            parts.append((logits.float(), latents_max, latents_avg))
            bar.update(len(batch))
    return Activations(labels, *(torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True)))


def activations_of(
    model: DHRNet,
    name: str,
    images: ImageSet,
    checkpoint_hash: str,
    args: argparse.Namespace,
    device: torch.device,
    autocast: torch.autocast,
) -> Activations:
    """Extract an image set, or take it from the cache when network and pixels are the same.

    The cache is one .npz a set; its name is a hash of checkpoint, images, labels and number format.
    """
    key = hashlib.sha256(checkpoint_hash.encode())
    for part in (images.images, images.labels):
        key.update(f"{part.shape} {part.dtype}".encode())
        key.update(np.ascontiguousarray(part))
    key.update(f"{device.type} {autocast._enabled} {torch.__version__} {Activations._fields}".encode())
    path = args.data_dir / "cache" / f"{key.hexdigest()[:32]}.npz"
    if not args.no_cache and path.exists():
        try:
            with np.load(path, allow_pickle=False) as stored:
                return Activations(*(stored[field] for field in Activations._fields))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            print(f"{path} is damaged: extracting anew", file=sys.stderr)
    result = extract(model, *images, name, args.batch_size, device, autocast)
    if not args.no_cache:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda file: np.savez(file, **result._asdict()))
    return result


def shipped_activations(checkpoint_hash: str, names: Sequence[str]) -> dict[str, Activations]:
    """The activation vectors of image sets that ship with the checkpoint, tied to it by its hash.

    Raises:
        ImagesUnavailable: they belong to another checkpoint, or a set is not among them.
    """
    if not SHIPPED_ACTIVATIONS.exists():
        raise ImagesUnavailable(f"no activation vectors ship in {SHIPPED_ACTIVATIONS}")
    with np.load(SHIPPED_ACTIVATIONS, allow_pickle=False) as stored:
        if str(stored["checkpoint"]) != checkpoint_hash:
            raise ImagesUnavailable("the shipped activation vectors belong to another checkpoint")
        missing = [name for name in names if f"{name}/labels" not in stored]
        if missing:
            raise ImagesUnavailable(f"no activation vectors ship for {', '.join(missing)}")
        return {
            name: Activations(*(stored[f"{name}/{field}"] for field in Activations._fields))
            for name in names
        }


def load_image_sets(
    meta: dict[str, Any], names: Sequence[str], data_dir: Path, seed: int
) -> dict[str, ImageSet]:
    """Images of `train`, `val`, `test_known` and of each unknown set among the names."""
    config = meta["model_config"]
    known_classes = [name for name in meta["train_args"]["known_classes"].split(",") if name]
    data = load_known(meta["train_args"]["dataset"], data_dir, known_classes)
    sets = {"train": data.train, "val": data.val, "test_known": data.test_known}
    for name in names:
        if name in sets:
            continue
        if name == HELD_OUT_CLASSES:
            images = data.test_unknown
        else:
            images = load_unknown(
                name, data_dir, config["image_size"], config["in_channels"], seed
            )
        sets[name] = ImageSet(images, np.full(len(images), UNKNOWN))
    return {name: sets[name] for name in names}


def print_table(results: dict[str, Any]) -> None:
    """One block an unknown set, one row a method, in percent."""
    for unknown in next(iter(results["methods"].values())):
        header = "  ".join(f"{title:>12}" for title in TABLE_COLUMNS.values())
        print(f"\n{results['known']} (known) against {unknown} (unknown), in %\n{'':12}{header}")
        for method, sets in results["methods"].items():
            row = "  ".join(f"{100 * sets[unknown][column]:12.2f}" for column in TABLE_COLUMNS)
            print(f"{method:12}{row}")


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a temporary file and rename it to `path`."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def evaluate(args: argparse.Namespace) -> None:
    seconds = {}
    clock = time.perf_counter()
    device, autocast = prepare_device(args.device)
    model, meta = load_checkpoint(args.checkpoint)
    model.to(device, memory_format=torch.channels_last)
    checkpoint_hash = hashlib.sha256(args.checkpoint.read_bytes()).hexdigest()
    print(
        f"{args.checkpoint}: {meta['model_config']['arch']} DHR network of {len(meta['known_classes'])} "
        f"classes, epoch {meta['epoch']}, validation accuracy {100 * meta['val_accuracy']:.2f} %"
    )
    if WEIBULL_ENGINE != "libmr":
        print("libMR is not installed: Weibulls are fitted with SciPy, equal to 1e-5")

    names = ["train", "val"]
    if not args.images:
        default = HELD_OUT_CLASSES if meta["train_args"]["known_classes"] else "tiny-imagenet-crop"
        names += ["test_known", *(args.unknown or [default])]
    try:
        image_sets = load_image_sets(meta, names, args.data_dir, args.seed)
        seconds["load"] = time.perf_counter() - clock
        if args.dry_run:
            for name, images in image_sets.items():
                print(f"{name}: {len(images.labels):,} images")
            print("dry run: nothing extracted")
            return
        clock = time.perf_counter()
        extractor = (checkpoint_hash, args, device, autocast)
        sets = {name: activations_of(model, name, images, *extractor) for name, images in image_sets.items()}
        origin = "extracted"
    except ImagesUnavailable as error:
        try:
            sets = shipped_activations(checkpoint_hash, names)
        except ImagesUnavailable as also:
            raise ImagesUnavailable(f"{error}; and {also}") from error
        origin = "shipped"
        seconds["load"] = time.perf_counter() - clock
        clock = time.perf_counter()
        print(f"{error}.\nUsing the activation vectors that ship with the checkpoint.")
