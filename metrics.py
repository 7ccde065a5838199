"""Open-set metrics on plain arrays.

A score is unknownness: larger means more unknown, in every function, and arguments come in the
order (known_scores, unknown_scores). Scores are 1-D float arrays of any range, without NaN; an
image is accepted as known when its score is at most the threshold.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score, roc_curve

from openmax import UNKNOWN

ACCEPTED_SHARE = 0.95  # of known images, where thresholds are set and FPR95 is measured
LARGEST_SCORE = 1e300  # infinite scores become this: scikit-learn accepts only finite ones

TITLES = {  # of `open_set_metrics`, in tables
    "auroc": "AUROC",
    "aupr_known": "AUPR-kno",
    "aupr_unknown": "AUPR-unk",
    "fpr_at_95_tpr": "FPR95",
    "detection_error": "det.err.",
    "oscr": "OSCR",
    "macro_f1": "macro-F1",
    "macro_f1_at_half": "F1@0.5",
}

Array = NDArray[np.float64]


class Scores(NamedTuple):
    """What a method says of N images.

    Attributes:
        unknownness: [N], larger is more unknown.
        probabilities: [N, K + 1] in 0..1, one-vs-rest, the unknown class last.
    """

    unknownness: Array
    probabilities: Array

    @property
    def nearest_class(self) -> NDArray[np.int64]:
        """[N] index of the most probable known class."""
        return self.probabilities[:, :UNKNOWN].argmax(axis=1)

    def predict(self, threshold: float) -> NDArray[np.int64]:
        """[N] class indices, `UNKNOWN` where unknownness exceeds the threshold."""
        return np.where(_checked(self.unknownness) > threshold, UNKNOWN, self.nearest_class)


def auroc(known_scores: ArrayLike, unknown_scores: ArrayLike) -> float:
    """Probability in 0..1 that an unknown image scores above a known one, ties counting half."""
    scores, is_unknown = _joined(known_scores, unknown_scores)
    return float(roc_auc_score(is_unknown, scores))


def aupr_known(known_scores: ArrayLike, unknown_scores: ArrayLike) -> float:
    """Average precision in 0..1 of finding the known images; chance is their share."""
    scores, is_unknown = _joined(known_scores, unknown_scores)
    return float(min(1, average_precision_score(~is_unknown, -scores)))  # it may round above 1


def aupr_unknown(known_scores: ArrayLike, unknown_scores: ArrayLike) -> float:
    """Average precision in 0..1 of finding the unknown images; chance is their share."""
    scores, is_unknown = _joined(known_scores, unknown_scores)
    return float(min(1, average_precision_score(is_unknown, scores)))


def threshold_accepting(known_scores: ArrayLike, share: float = ACCEPTED_SHARE) -> float:
    """Smallest of the scores that accepts at least this share (0..1) of the known images."""
    return float(np.quantile(_checked(known_scores), share, method="inverted_cdf"))


def fpr_at_95_tpr(known_scores: ArrayLike, unknown_scores: ArrayLike) -> float:
    """Share in 0..1 of unknown images accepted when 95 % of the known ones are.

    Known is the positive class here. Where unknown is, the figure of the same name is another one.
    """
    return float(np.mean(_checked(unknown_scores) <= threshold_accepting(known_scores)))


def detection_error(known_scores: ArrayLike, unknown_scores: ArrayLike) -> float:
    """Smallest mean of the two error rates over all thresholds, in 0..0.5.

    Source: ODIN (Liang et al. 2018), which takes known and unknown as equally likely.
    """
    scores, is_unknown = _joined(known_scores, unknown_scores)
    rejected_known, rejected_unknown, _ = roc_curve(is_unknown, scores)
    return float((rejected_known + 1 - rejected_unknown).min() / 2)


def oscr(known_scores: ArrayLike, known_correct: ArrayLike, unknown_scores: ArrayLike) -> float:
    """Area in 0..1 under `ccr_and_fpr`, exact under ties. Source: Dhamija et al. 2018."""
    ccr, fpr = ccr_and_fpr(known_scores, known_correct, unknown_scores)
    return float(np.trapezoid(ccr, fpr))


def ccr_and_fpr(
    known_scores: ArrayLike, known_correct: ArrayLike, unknown_scores: ArrayLike
) -> tuple[Array, Array]:
    """Correct classification rate and false positive rate, [T + 1] each, for T different scores.

    At a threshold t, CCR(t) in 0..1 is the share of known images that are accepted and correctly
    classified (`known_correct`, [N] bool), FPR(t) the share of unknown images accepted. The curve
    starts at (0, 0) and ends at (1, closed-set accuracy).
    """
    known, unknown = _checked(known_scores), _checked(unknown_scores)
    correct = np.sort(known[np.asarray(known_correct, np.bool_)])
    thresholds = np.unique(np.concatenate([known, unknown]))
    ccr = np.searchsorted(correct, thresholds, side="right") / len(known)
    fpr = np.searchsorted(np.sort(unknown), thresholds, side="right") / len(unknown)
    return np.append(0, ccr), np.append(0, fpr)


def macro_f1(labels: ArrayLike, predictions: ArrayLike, num_classes: int) -> float:
    """Mean F1 in 0..1 over the K known classes and `UNKNOWN`; a class never predicted counts 0.

    Raises:
        ValueError: labels [N] or predictions [N] are not all in 0..K-1 or `UNKNOWN`.
    """
    classes = [*range(num_classes), UNKNOWN]
    if strays := {*np.unique(labels), *np.unique(predictions)}.difference(classes):
        raise ValueError(f"labels or predictions hold {min(strays)}; expected -1..{classes[-2]}")
    return float(f1_score(labels, predictions, labels=classes, average="macro", zero_division=0))


def macro_f1_at_half(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean F1 in 0..1 of K + 1 one-vs-rest decisions, each yes above probability 0.5.

    Labels are [N] int, 0..K-1 or `UNKNOWN`; probabilities [N, K + 1], the unknown class last.
    Source: the evaluation of the released CROSR code.
    """
    yes = np.asarray(probabilities) > 0.5
    classes = np.arange(yes.shape[1])
    truth = (np.asarray(labels) % len(classes))[:, None] == classes  # UNKNOWN is the last column
    return float(f1_score(truth, yes, average="macro", zero_division=0))


def open_set_metrics(
    known: Scores, known_labels: NDArray[np.int64], unknown: Scores, threshold: float
) -> dict[str, float]:
    """All metrics of a method on one unknown set; `macro_f1` is at the threshold."""
    pair = known.unknownness, unknown.unknownness
    labels = np.append(known_labels, np.full(len(unknown.unknownness), UNKNOWN))
    predictions = np.append(known.predict(threshold), unknown.predict(threshold))
    probabilities = np.concatenate([known.probabilities, unknown.probabilities])
    return {
        "auroc": auroc(*pair),
        "aupr_known": aupr_known(*pair),
        "aupr_unknown": aupr_unknown(*pair),
        "fpr_at_95_tpr": fpr_at_95_tpr(*pair),
        "detection_error": detection_error(*pair),
        "oscr": oscr(pair[0], known.nearest_class == known_labels, pair[1]),
        "macro_f1": macro_f1(labels, predictions, probabilities.shape[1] - 1),
        "macro_f1_at_half": macro_f1_at_half(labels, probabilities),
    }


def _joined(known_scores: ArrayLike, unknown_scores: ArrayLike) -> tuple[Array, NDArray[np.bool_]]:
    known, unknown = _checked(known_scores), _checked(unknown_scores)
    return np.append(known, unknown), np.repeat([False, True], [len(known), len(unknown)])


def _checked(scores: ArrayLike) -> Array:
    array = np.clip(np.asarray(scores, np.float64), -LARGEST_SCORE, LARGEST_SCORE)
    if array.ndim != 1 or not array.size or np.isnan(array).any():
        raise ValueError(f"scores of shape {array.shape}; expected [N], N > 0, and no NaN")
    return array
