"""OpenMax on plain arrays: mean activations, distances, Weibull tails, recalibrated probabilities.

OpenMax (Bendale and Boult 2016) asks of every class how far an image's activation vector lies from the
class's mean activation vector (MAV), and turns that distance into a probability w of not belonging, with
a Weibull fitted to the largest distances seen among correctly classified training images. CROSR
(Yoshihashi et al. 2019) is the same on [y, z]: logits y and pooled latents z in one vector.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.spatial.distance import cdist
from scipy.special import softmax
from sklearn.covariance import LedoitWolf

try:
    import libmr

    WEIBULL_ENGINE = "libmr"
except ImportError:  # it needs a compiler to install
    libmr = None
    WEIBULL_ENGINE = "scipy"

UNKNOWN = -1  # label of the unknown class, and its column, the last, in an array of probabilities
DISTANCES = ("euclidean", "cosine", "eucos", "mahalanobis")
MIN_TAIL_SIZE = 5  # three points or fewer give the same shape whatever they are
EUCOS_SCALE = 200  # eucos = euclidean / 200 + cosine, as in the OpenMax authors' code

Array = NDArray[np.float64]


class Weibull(NamedTuple):
    """w(d) = 1 - exp(-(max(d - location, 0) / scale)^shape), the three parameters arrays alike."""

    scale: Array
    shape: Array
    location: Array

    def cdf(self, distances: ArrayLike) -> Array:
        """Probability in 0..1 that a member of the class lies nearer; distances broadcast, e.g. [N, K]."""
        reach = np.maximum(np.asarray(distances, np.float64) - self.location, 0)
        return -np.expm1(-np.power(reach / self.scale, self.shape))


class OpenMax:
    """OpenMax with scikit-learn's conventions: X holds activation vectors whose first K columns are logits.

    Args:
        tail_size: number of largest distances a class's Weibull is fitted to; CROSR's 20 by default.
        alpha: 0 for the form of the released CROSR code, p = softmax(y) (1 - w), p_unknown = 1 - sum p.
            A number from 1 to K for the form printed in both papers: among the alpha top-ranked
            classes, the i-th (from 0) has w scaled by (alpha - i) / alpha; then y (1 - w) for
            the known, and sum y w for the unknown, pass through the softmax.
        distance: to the MAV, one of `DISTANCES`. `mahalanobis` uses one shrinkage covariance for all
            classes (Ledoit and Wolf 2004).

    Attributes:
        mean_activations_: [K, D], over correctly classified images.
        weibull_: the K tails.
    """

    def __init__(self, tail_size: int = 20, alpha: int = 0, distance: str = "euclidean") -> None:
        self.tail_size = tail_size
        self.alpha = alpha
        self.distance = distance

    def fit(self, X: ArrayLike, y: ArrayLike) -> "OpenMax":  # noqa: N803
        """Fit MAVs and tails.

        Args:
            X: [N, D] activation vectors, the first K columns the logits, finite.
            y: [N] int labels, 0..K-1, each class present.

        Raises:
            ValueError: shapes or values are off, a class has fewer correctly classified images than
                the tail, or its tail admits no Weibull.
        """
        activations, labels = _checked_activations(X), np.asarray(y)
        if labels.shape != (len(activations),) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"labels have shape {labels.shape} and type {labels.dtype}; "
                f"expected {len(activations)} integers, one a row of activations"
            )
        num_classes = int(labels.max()) + 1
        if labels.min() < 0 or num_classes > activations.shape[1]:
            raise ValueError(
                f"labels lie in {labels.min()}..{labels.max()}; expected 0..K-1, "
                f"with K at most the {activations.shape[1]} columns of the activations"
            )
        if not 0 <= self.alpha <= num_classes:
            raise ValueError(f"alpha is {self.alpha}; expected 0..{num_classes}, the number of classes")
        correct = activations[:, :num_classes].argmax(axis=1) == labels
        activations, labels = activations[correct], labels[correct]
        counts = np.bincount(labels, minlength=num_classes)
        if counts.min() < max(self.tail_size, MIN_TAIL_SIZE) or self.tail_size < MIN_TAIL_SIZE:
            raise ValueError(
                f"tail_size is {self.tail_size}; expected {MIN_TAIL_SIZE}..{counts.min()}, the number of "
                f"correctly classified images of class {counts.argmin()}"
            )
        self.mean_activations_ = mean_activations(activations, labels, num_classes)
        self._measure = _distance_function(
            self.distance, activations - self.mean_activations_[labels]
        )
        self.weibull_ = fit_weibulls(self.distances(activations), labels, self.tail_size)
        return self

    def distances(self, X: ArrayLike) -> Array:  # noqa: N803
        """Distances [N, K] of activation vectors [N, D] to the K MAVs."""
        return self._measure(_checked_activations(X), self.mean_activations_)

    def predict_proba(self, X: ArrayLike) -> Array:  # noqa: N803
        """Probabilities [N, K + 1] of the known classes and, last, the unknown; rows sum to 1.

        Args:
            X: [N, D] activation vectors as in `fit`.
        """
        activations = _checked_activations(X)
        not_member = self.weibull_.cdf(self.distances(activations))
        return recalibrate(activations[:, : not_member.shape[1]], not_member, self.alpha)


def mean_activations(activations: Array, labels: NDArray[np.int64], num_classes: int) -> Array:
    """Mean activation vector of each class, [K, D], from activations [N, D] and labels [N] in 0..K-1."""
    sums = np.zeros((num_classes, activations.shape[1]))
    np.add.at(sums, labels, activations)
    return sums / np.bincount(labels, minlength=num_classes)[:, None]


def fit_weibulls(distances: Array, labels: NDArray[np.int64], tail_size: int) -> Weibull:
    """Fit each class's Weibull to the largest distances of its own images.

    Args:
        distances: [N, K] to every MAV.
        labels: [N], each image's class.
        tail_size: how many of the largest.

    Raises:
        ValueError: a class's tail admits no Weibull, for example because its distances are all equal.
    """
    fits = []
    for label in range(distances.shape[1]):
        own = distances[labels == label, label]
        tail = np.partition(own, len(own) - tail_size)[-tail_size:]
        try:
            fits.append(fit_tail(tail))
        except ValueError as error:
            raise ValueError(f"class {label}: {error}") from error
    return Weibull(*np.array(fits).T)


def fit_tail(tail: Array) -> tuple[float, float, float]:
    """Maximum-likelihood Weibull (scale, shape, location) of a tail of distances.

    The location is the smallest distance minus 1, libMR's translation, so the fit depends on the unit of
    distance. libMR where it is installed, else `fit_tail_scipy`, which agrees to 1e-5.

    Raises:
        ValueError: the values are not finite, or no Weibull fits them.
    """
    if not np.isfinite(tail).all() or np.ptp(tail) == 0:
        raise ValueError(
            f"no Weibull fits the {len(tail)} largest distances, from {np.min(tail)} to {np.max(tail)}; "
            "expected finite and different ones: the activations carry too little, retrain or "
            "leave the class out"
        )
    scale, shape = (_fit_libmr if libmr is not None else fit_tail_scipy)(tail)
    if not (np.isfinite([scale, shape]).all() and scale > 0 and shape > 0):
        raise ValueError(
            f"the Weibull fit of the {len(tail)} largest distances did not converge; "
            "try another tail size"
        )
    return scale, shape, float(np.min(tail)) - 1


def _fit_libmr(tail: Array) -> tuple[float, float]:
    model = libmr.MR()
    model.fit_high(np.sort(tail).tolist(), len(tail))
    if not model.is_valid:
        return np.nan, np.nan
    scale, shape, *_ = model.get_params()
    return scale, shape


def fit_tail_scipy(tail: Array) -> tuple[float, float]:
    """Maximum-likelihood Weibull (scale, shape) of t = tail - min(tail) + 1, location fixed at 0.

    With z = log t scaled to [-1, 0], the shape is 1 / sigma for the root of
    sigma + mean(z) - sum(z e^(z/sigma)) / sum(e^(z/sigma)) = 0, and the scale
    (mean t^shape)^(1/shape). Source: the textbook likelihood equations.
    """
    log_t = np.log1p(tail - np.min(tail))
    spread = np.ptp(log_t)
    z = (log_t - log_t.max()) / spread

    def likelihood_slope(sigma: float) -> float:
        weights = np.exp(z / sigma)
        return float(sigma + z.mean() - (z * weights).sum() / weights.sum())

    sigma = brentq(likelihood_slope, 1e-6, 1e3, xtol=1e-15, rtol=1e-14)
    log_scale = log_t.max() + spread * sigma * np.log(np.mean(np.exp(z / sigma)))
    return float(np.exp(log_scale)), 1 / (spread * sigma)


def recalibrate(logits: ArrayLike, not_member: ArrayLike, alpha: int = 0) -> Array:
    """OpenMax probabilities [N, K + 1], the unknown class last, in the form `alpha` selects.

    Args:
        logits: [N, K], y.
        not_member: [N, K] in 0..1, the Weibull probabilities w.
        alpha: 0, or how many top-ranked classes are revised; see `OpenMax`.
    """
    y, w = np.asarray(logits, np.float64), np.asarray(not_member, np.float64)
    if alpha == 0:
        known = softmax(y, axis=1) * (1 - w)
        return np.column_stack([known, 1 - known.sum(axis=1)])
    rank = np.argsort(np.argsort(-y, axis=1, kind="stable"), axis=1)
    w = w * np.maximum(alpha - rank, 0) / alpha
    return softmax(np.column_stack([y * (1 - w), (y * w).sum(axis=1)]), axis=1)


def _distance_function(name: str, deviations: Array) -> Callable[[Array, Array], Array]:
    """The distance [N, D] x [K, D] -> [N, K]; mahalanobis takes its covariance from the deviations."""
    if name == "euclidean":
        return lambda a, b: cdist(a, b)
    if name == "cosine":
        return lambda a, b: cdist(a, b, "cosine")
    if name == "eucos":
        return lambda a, b: cdist(a, b) / EUCOS_SCALE + cdist(a, b, "cosine")
    if name == "mahalanobis":
        precision = LedoitWolf(assume_centered=True).fit(deviations).precision_
        whitening = np.linalg.cholesky(precision)
        return lambda a, b: cdist(a @ whitening, b @ whitening)
    raise ValueError(f"distance is {name!r}; expected one of {', '.join(DISTANCES)}")


def _checked_activations(activations: ArrayLike) -> Array:
    array = np.asarray(activations, np.float64)
    if array.ndim != 2 or not len(array):
        raise ValueError(f"activations have shape {array.shape}; expected [N, D] with N at least 1")
    if not np.isfinite(array).all():
        raise ValueError("activations hold NaN or infinity; expected finite numbers only")
    return array
