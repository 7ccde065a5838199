"""What each choice of dhr_openmax is worth: the same network and images, one choice changed.

    python benchmarks/ablation.py                  # the shipped network; seconds
    python benchmarks/ablation.py NETWORK.pt ...   # networks that leave classes out, as splits.py's

The first is to read, not to choose by: its figures are of test images. For the choices there is
the second: the validation images of the classes that a network was not trained on are its unknown
images, and no test image is touched. It also measures tail sizes, alphas and all five methods.
"""

import argparse
import copy
import hashlib
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import torch
from scipy.special import logsumexp, softmax

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from ship import UNKNOWN_SETS

from activations import Activations, extract, load_shipped, prepare_device
from methods import ACCEPTED_SHARE, DHROpenMax, OpenMaxSettings, build_methods
from metrics import Scores, auroc, open_set_metrics, threshold_accepting
from models import load_checkpoint
from open_set_data import KNOWN_SPLITS, ImageSet, load_known
from openmax import UNKNOWN, OpenMax, Weibull, revised_logits

TAIL_SIZES = (5, 10, 20, 50, 100)
Scorer = Callable[[Activations], Scores]


def variants(train: Activations, val: Activations) -> Iterator[tuple[str, Scorer]]:
    """Each variant's name and scores; the first is the rule as it is."""
    rule = DHROpenMax().fit(train, val)
    yield "dhr_openmax", rule.score
    yield "OpenMax on y alone, without latents", with_levels(rule).score
    for level in range(len(rule.latent_means)):
        yield f"latents of level {level + 1} alone", with_levels(rule, level).score
    maxima = lambda images: images._replace(latents_avg=images.latents_max)  # noqa: E731
    by_maxima = DHROpenMax().fit(maxima(train), maxima(val))
    yield "latents pooled by their maximum", lambda images: by_maxima.score(maxima(images))
    yield "tails of latents from training images", DHROpenMax().fit(train, train).score
    classes = train.logits.shape[1]
    yield "euclidean distances on y", with_openmax(rule, train, classes, "euclidean")
    for alpha in range(1, min(4, classes), 2):
        yield f"{alpha} top-ranked classes revised", with_openmax(rule, train, alpha, "mahalanobis")


def with_levels(rule: DHROpenMax, *kept: int) -> DHROpenMax:
    """The rule without the latents of the other levels: Weibulls of infinite scale say nothing."""
    rule = copy.deepcopy(rule)
    dropped = [level for level in range(len(rule.latent_means)) if level not in kept]
    rule.latent_tails[0, dropped] = math.inf
    return rule


def with_openmax(rule: DHROpenMax, train: Activations, alpha: int, distance: str) -> Scorer:
    """The rule's latents together with another OpenMax on y."""
    openmax = OpenMax(rule.tail_size, alpha, distance).fit(train.logits, train.labels)
    tails = Weibull(*rule.latent_tails.numpy())

    def score(images: Activations) -> Scores:
        w = openmax.weibull_.cdf(openmax.distances(images.logits))
        revised = revised_logits(images.logits, w, alpha)
        log_odds = revised[:, UNKNOWN] - logsumexp(revised[:, :UNKNOWN], axis=1)
        tensors = torch.from_numpy(images.logits), torch.from_numpy(images.latents_avg)
        hazards = tails.hazard(rule.latent_distances(*tensors).numpy())
        return Scores(log_odds + hazards.sum(axis=1), softmax(revised, axis=1))

    return score


def print_shipped() -> None:
    """The variants on the activations that ship with dhr_net.pt."""
    sha256 = hashlib.sha256((ROOT / "dhr_net.pt").read_bytes()).hexdigest()
    sets = load_shipped(sha256, [*KNOWN_SPLITS, *UNKNOWN_SETS])
    known = sets["test_known"]
    print(f"{'':40}" + "".join(f"{name:>22}" for name in UNKNOWN_SETS))
    print(f"{'in %':40}" + f"{'AUROC':>12}{'macro-F1':>10}" * len(UNKNOWN_SETS))
    for name, score in variants(sets["train"], sets["val"]):
        threshold = threshold_accepting(score(sets["val"]).unknownness, ACCEPTED_SHARE)
        row = f"{name:40}"
        for unknown in UNKNOWN_SETS:
            its = open_set_metrics(score(known), known.labels, score(sets[unknown]), threshold)
            row += f"{100 * its['auroc']:12.1f}{100 * its['macro_f1']:10.1f}"
        print(row)


def load_fold(path: Path, data_dir: Path) -> list[Activations]:
    """Activations of the training and validation images of the classes that a network knows, and of
    the validation images of those it does not."""
    network, saved = load_checkpoint(path)
    network.to(prepare_device("auto")).to(memory_format=torch.channels_last)
    args, size = saved["train_args"], network.config["image_size"]
    if not args["known_classes"]:
        raise SystemExit(f"{path} leaves no class out: train it with --known-classes")
    known = load_known(args["dataset"], data_dir, args["known_classes"], size)
    whole = load_known(args["dataset"], data_dir, image_size=size)
    unknown = ~np.isin(np.array(whole.classes)[whole.val.labels], known.classes)
    left_out = ImageSet(whole.val.images[unknown], np.full(unknown.sum(), UNKNOWN))
    return [extract(network, images, 250) for images in (known.train, known.val, left_out)]


def all_scorers(train: Activations, val: Activations) -> Iterator[tuple[str, Scorer]]:
    """The methods, the variants of dhr_openmax, and every tail size and alpha."""
    for name, method in build_methods(OpenMaxSettings()).items():
        if name != "dhr_openmax":
            yield name, method.fit(train, val).score
    yield from variants(train, val)
    for tail_size in TAIL_SIZES:
        yield f"dhr_openmax, tails of {tail_size}", DHROpenMax(tail_size).fit(train, val).score
    classes = train.logits.shape[1]
    alphas = [*range(min(4, classes)), classes]
    for name, tail_size in product(("openmax", "crosr"), TAIL_SIZES):
        for alpha in alphas:
            settings = OpenMaxSettings(tail_size=tail_size, alpha=alpha)
            method = build_methods(settings)[name].fit(train, val)
            yield f"{name} --tail-size {tail_size} --alpha {alpha}", method.score


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("networks", nargs="*", type=Path, metavar="NETWORK", help="(default: the shipped one)")
    add("--data-dir", type=Path, default=ROOT / "data", help="images (default data)")
    args = parser.parse_args(argv)
    if not args.networks:
        return print_shipped()
    areas: dict[str, list[float]] = {}
    for path in args.networks:
        train, val, left_out = load_fold(path, args.data_dir)
        for name, score in all_scorers(train, val):
            area = auroc(score(val).unknownness, score(left_out).unknownness)
            areas.setdefault(name, []).append(area)
    print("AUROC in % against validation images of classes left out: mean, and each network")
    for name, each in areas.items():
        print(f"{name:40}" + "".join(f"{100 * a:8.2f}" for a in (statistics.fmean(each), *each)))


if __name__ == "__main__":
    main()
