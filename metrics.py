"""Open-set metrics on plain arrays.

A score is unknownness: larger means more unknown, in every function, and arguments come in the
order (known_scores, unknown_scores). Scores are 1-D float arrays of any range; an image is accepted
as known when its score is at most the threshold.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score, roc_curve

from openmax import UNKNOWN, as_floats, as_labels

Array = NDArray[np.float64]


class Scores(NamedTuple):
    """What a method says of N images.

    Attributes:
        unknownness: [N], larger is more unknown.
        probabilities: [N, K + 1] in 0..1, one-vs-rest, of the K known classes and, last, the
            unknown.
    """

    unknownness: Array
    probabilities: Array

    @property
    def nearest_class(self) -> NDArray[np.int64]:
        """[N] index of the most probable known class."""
        return _checked_probabilities(self.probabilities)[:, :UNKNOWN].argmax(axis=1)

    def predict(self, threshold: float) -> NDArray[np.int64]:
        """[N] class indices, `UNKNOWN` where unknownness exceeds the threshold."""
        scores = _checked(self.unknownness, "unknownness")
        return np.where(scores > _checked([threshold], "threshold"), UNKNOWN, self.nearest_class)


def auroc(known_scores: ArrayLike, unknown_scores: ArrayLike) -> float:
    """Probability in 0..1 that an unknown image scores above a known one, ties counting half."""
    ranks, is_unknown = _ranked(known_scores, unknown_scores)
    return float(roc_auc_score(is_unknown, ranks))


def aupr_known(known_scores: ArrayLike, unknown_scores: ArrayLike) -> float:
    """Average precision in 0..1 of finding the known images; chance is their share."""
    ranks, is_unknown = _ranked(known_scores, unknown_scores)
    return float(min(1, average_precision_score(~is_unknown, -ranks)))  # it may round above 1


def aupr_unknown(known_scores: ArrayLike, unknown_scores: ArrayLike) -> float:
    """Average precision in 0..1 of finding the unknown images; chance is their share."""
    ranks, is_unknown = _ranked(known_scores, unknown_scores)
    return float(min(1, average_precision_score(is_unknown, ranks)))


def threshold_accepting(known_scores: ArrayLike, share: float = 0.95) -> float:
    """Smallest of the scores that accepts at least this share (0..1) of the known images."""
    scores = _checked(known_scores, "known_scores")
    return float(np.quantile(scores, share, method="inverted_cdf"))


def fpr_at_95_tpr(known_scores: ArrayLike, unknown_scores: ArrayLike) -> float:
    """Share in 0..1 of unknown images accepted when 95 % of the known ones are."""
    threshold = threshold_accepting(known_scores)
    return float(np.mean(_checked(unknown_scores, "unknown_scores") <= threshold))


def detection_error(known_scores: ArrayLike, unknown_scores: ArrayLike) -> float:
    """Smallest mean of the two error rates over all thresholds, in 0..0.5.

    Source: ODIN (Liang et al. 2018), which takes known and unknown as equally likely.
    """
    ranks, is_unknown = _ranked(known_scores, unknown_scores)
    rejected_known, rejected_unknown, _ = roc_curve(is_unknown, ranks)
    return float((rejected_known + 1 - rejected_unknown).min() / 2)


def oscr(known_scores: ArrayLike, known_correct: ArrayLike, unknown_scores: ArrayLike) -> float:
    """Area in 0..1 under the curve of `ccr_and_fpr`, integrated with trapezoids, exact under ties.

    Source: Dhamija et al. 2018.
    """
    ccr, fpr = ccr_and_fpr(known_scores, known_correct, unknown_scores)
    return float(np.trapezoid(ccr, fpr))


def ccr_and_fpr(
    known_scores: ArrayLike, known_correct: ArrayLike, unknown_scores: ArrayLike
) -> tuple[Array, Array]:
    """Correct classification rate and false positive rate at every threshold.

    At a threshold t, CCR(t) is the share of known images that are accepted and correctly
    classified, FPR(t) the share of unknown images accepted. The curve starts at (0, 0) and ends at
    (1, closed-set accuracy).

    Args:
        known_scores: [N].
        known_correct: [N] bool, whether the closed-set prediction is right; all True gives the ROC
            curve.
        unknown_scores: [M].

    Returns:
        CCR and FPR in 0..1, [T + 1] for T different scores.
    """
    scores, is_unknown = _joined(known_scores, unknown_scores)
    known, correct = scores[~is_unknown], np.asarray(known_correct)
    if correct.shape != known.shape or correct.dtype != bool:
        raise ValueError(
            f"known_correct has shape {correct.shape} and type {correct.dtype}; "
            f"expected {len(known)} bools, one a score"
        )
    thresholds = np.unique(scores)
    ccr = np.searchsorted(np.sort(known[correct]), thresholds, side="right") / len(known)
    fpr = np.searchsorted(np.sort(scores[is_unknown]), thresholds, side="right") / is_unknown.sum()
    return np.append(0, ccr), np.append(0, fpr)


def macro_f1(labels: ArrayLike, predictions: ArrayLike, num_classes: int) -> float:
    """Mean F1 in 0..1 over the K known classes and `UNKNOWN`; a class never predicted counts 0.

    Args:
        labels: [N] int, 0..K-1 or `UNKNOWN`.
        predictions: [N] int, likewise.
        num_classes: K.
    """
    labels = as_labels(labels, "labels", UNKNOWN, num_classes - 1)
    predictions = as_labels(predictions, "predictions", UNKNOWN, num_classes - 1)
    classes = [*range(num_classes), UNKNOWN]
    return float(f1_score(labels, predictions, labels=classes, average="macro", zero_division=0))


def macro_f1_at_half(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean F1 in 0..1 of K + 1 one-vs-rest decisions, each yes above probability 0.5.

    Args:
        labels: [N] int, 0..K-1 or `UNKNOWN`.
        probabilities: [N, K + 1], the unknown class last.

    Source: the evaluation of the released CROSR code.
    """
    probabilities = _checked_probabilities(probabilities)
    columns = probabilities.shape[1]
    labels = as_labels(labels, "labels", UNKNOWN, columns - 2)
    truth = (labels % columns)[:, None] == np.arange(columns)  # UNKNOWN is the last column
    return float(f1_score(truth, probabilities > 0.5, average="macro", zero_division=0))


def open_set_metrics(
    known: Scores, known_labels: ArrayLike, unknown: Scores, threshold: float
) -> dict[str, float]:
    """All metrics of a method on one unknown set.

    Args:
        known: of the N test images of known classes.
        known_labels: [N] int, 0..K-1.
        unknown: of the M unknown images.
        threshold: on unknownness, chosen without either.

    Returns:
        `auroc`, `aupr_known`, `aupr_unknown`, `fpr_at_95_tpr`, `detection_error`, `oscr`,
        `macro_f1` (at the threshold) and `macro_f1_at_half`.
    """
    pair = known.unknownness, unknown.unknownness
    known_labels = np.asarray(known_labels)
    labels = np.concatenate([known_labels, np.full(len(unknown.unknownness), UNKNOWN)])
    predictions = np.concatenate([known.predict(threshold), unknown.predict(threshold)])
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
    known = _checked(known_scores, "known_scores")
    unknown = _checked(unknown_scores, "unknown_scores")
    is_unknown = np.repeat([False, True], [len(known), len(unknown)])
    return np.concatenate([known, unknown]), is_unknown


def _ranked(known_scores: ArrayLike, unknown_scores: ArrayLike) -> tuple[Array, NDArray[np.bool_]]:
    """As `_joined` with ranks for scores: scikit-learn takes no infinity, and differences of scores
    may overflow."""
    scores, is_unknown = _joined(known_scores, unknown_scores)
    return rankdata(scores, "dense"), is_unknown


def _checked(scores: ArrayLike, name: str) -> Array:
    array = as_floats(scores, name)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} has shape {array.shape}; expected one score an image")
    if np.isnan(array).any():
        raise ValueError(f"{name} holds NaN; expected a number for every image")
    return array


def _checked_probabilities(probabilities: ArrayLike) -> Array:
    array = as_floats(probabilities, "probabilities")
    if array.ndim != 2 or array.shape[1] < 2 or not ((array >= -1e-9) & (array <= 1 + 1e-9)).all():
        raise ValueError(f"probabilities of shape {array.shape}; expected [N, K + 1], all in 0..1")
    return array
