"""What each choice of dhr_openmax is worth: the same network and images, one choice changed a row.

    python benchmarks/ablation.py        # from the shipped activation vectors, seconds

To read, not to choose by: the figures are of test images and unknown ones. The choices were made
on known classes left out of a smaller network.
"""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from ship_activations import UNKNOWN_SETS

from compute_openmax import Scorer, rule_scorer, shipped_activations
from metrics import open_set_metrics, threshold_accepting
from models import ACCEPTED_SHARE, fit_rule
from openmax import Activations, DHROpenMax, OpenMax, Weibull


def variants(train: Activations, val: Activations) -> Iterator[tuple[str, Scorer]]:
    """Each variant's name and its scores; the first is the rule as it is."""

    def with_maxima(images: Activations) -> Activations:
        return images._replace(latents_avg=images.latents_max)

    def with_openmax(alpha: int, distance: str) -> DHROpenMax:
        rule = fit_rule(train, val)
        rule.openmax_ = OpenMax(20, alpha, distance).fit(train.logits, train.labels)
        return rule

    def with_levels(*levels: int) -> DHROpenMax:
        rule = fit_rule(train, val)
        scale, shape, location = rule.weibull_
        kept = np.isin(np.arange(rule.levels), levels)
        rule.weibull_ = Weibull(np.where(kept, scale, np.inf), shape, location)  # no hazard
        return rule

    classes = train.logits.shape[1]
    by_maxima = rule_scorer(fit_rule(with_maxima(train), with_maxima(val)))
    yield "dhr_openmax", rule_scorer(fit_rule(train, val))
    yield "OpenMax on y alone, without latents", rule_scorer(with_levels())
    for level in range(3):
        yield f"latents of level {level + 1} alone", rule_scorer(with_levels(level))
    yield "latents pooled by their maximum", lambda images: by_maxima(with_maxima(images))
    yield "tails of latents from training images", rule_scorer(fit_rule(train, train))
    yield "euclidean distances on y", rule_scorer(with_openmax(classes, "euclidean"))
    for alpha in (1, 3):
        yield f"{alpha} top-ranked classes revised", rule_scorer(with_openmax(alpha, "mahalanobis"))


def main() -> None:
    checkpoint_hash = hashlib.sha256((ROOT / "dhr_net.pt").read_bytes()).hexdigest()
    names = ("train", "val", "test_known", *UNKNOWN_SETS)
    sets = shipped_activations(checkpoint_hash, names)
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


if __name__ == "__main__":
    main()
