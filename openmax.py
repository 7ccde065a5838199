"""OpenMax on plain arrays: mean activations, distances, Weibull tails, recalibrated probabilities.

OpenMax (Bendale and Boult 2016) measures how far an image's activation vector lies from the mean
activation vector (MAV) of each class. A Weibull, fitted to the largest distances among correctly
classified training images, turns each distance into a probability w of not belonging to the class.
CROSR (Yoshihashi et al. 2019) is the same on [y, z]: logits y and pooled latents z in one vector.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.spatial.distance import cdist
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.covariance import LedoitWolf
from sklearn.utils import check_scalar, gen_batches
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

try:
    import libmr
except ImportError:  # it needs a compiler to install
    libmr = None

WEIBULL_ENGINE = "scipy" if libmr is None else "libmr"
UNKNOWN = -1  # label of the unknown class, and its column, the last, in an array of probabilities
UNKNOWN_NAME = "unknown"  # its label where labels are text
DISTANCES = ("euclidean", "cosine", "eucos", "mahalanobis")
MIN_TAIL_SIZE = 5  # three points or fewer give the same shape whatever they are
SMALLEST_SPREAD = 1e-10  # of a tail, relative to its values or 1: below, rounding decides
LARGEST_DISTANCE = 1e15  # of a tail: beyond, libMR's translation by 1 is lost in rounding
LARGEST_HAZARD = 1e300  # a few of them still have a finite sum
SMALLEST_REST = 1e-200  # of 1 - w
ROWS = 2000  # scored at a time: their intermediate results stay in the processor's cache
EUCOS_SCALE = 200  # eucos = euclidean / 200 + cosine, as in the OpenMax authors' code
Array = NDArray[np.float64]


class Weibull(NamedTuple):
    """w(d) = 1 - exp(-hazard(d)), hazard(d) = (max(d - location, 0) / scale)^shape; [K] each."""

    scale: Array
    shape: Array
    location: Array

    def cdf(self, distances: ArrayLike) -> Array:
        """w in 0..1, the probability of not being a member; distances broadcast, e.g. [N, K]."""
        return -np.expm1(-self.hazard(distances))

    def hazard(self, distances: ArrayLike) -> Array:
        """-log(1 - w) in 0..1e300. It tells distances apart where w is 1 to the last digit."""
        reach = (np.asarray(distances, np.float64) - self.location) / self.scale
        # exp(shape log(reach)) takes a quarter less scoring time than a power.
        log_hazard = self.shape * np.log(np.maximum(reach, 1e-300))
        return np.exp(np.minimum(log_hazard, np.log(LARGEST_HAZARD))) * (reach > 0)


class OpenMax(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """OpenMax as a scikit-learn classifier of activation vectors, which begin with the logits.

    Args:
        tail_size: how many of the largest distances the Weibull of a class is fitted to, at least
            5; CROSR's 20 by default. Of a small class, its far quarter (`adapted_tail_size`).
        alpha: 0 for the form of the released CROSR code, p = softmax(y) (1 - w) and
            p_unknown = 1 - sum p. A number from 1 to K for the form printed in both papers: among
            the alpha top-ranked classes, the i-th (from 0) has w scaled by (alpha - i) / alpha, the
            others by 0; then y (1 - w), and sum y w for the unknown, pass through the softmax.
        distance: to the MAV, one of `DISTANCES`; `mahalanobis` with one covariance for all classes.
        num_logits: how many of the first columns are logits, in the order of `classes_`: "all", or
            their number K, or 0 for features alone. With 0 every image counts as correctly
            classified, and a class at distance d has the logit -d^2 / (2 v) of a normal
            distribution around its MAV, plus what makes the image's smallest logit 0.

    Attributes:
        classes_: [K] sorted labels.
        unknown_label_: `UNKNOWN`, or `UNKNOWN_NAME` where labels are text.
        mean_activations_: [K, D], over correctly classified images.
        whitening_: [D, D] of `whitening` for `mahalanobis`, otherwise None.
        variance_: v, the mean of d^2 to the MAV of an image's own class, divided by D.
        weibull_: the K tails.
    """

    def __init__(
        self, tail_size: int = 20, alpha: int = 0, distance: str = "euclidean",
        num_logits: int | str = "all",
    ) -> None:  # fmt: skip
        self.tail_size = tail_size
        self.alpha = alpha
        self.distance = distance
        self.num_logits = num_logits

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit MAVs and tails to activation vectors X [N, D] and labels y [N], numbers or text.

        Raises:
            ValueError: an array or a parameter is invalid, logits and classes differ in number, or
                a class has fewer than 5 correctly classified images or no Weibull that fits.
        """
        vectors, y = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=MIN_TAIL_SIZE)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        self.unknown_label_ = UNKNOWN_NAME if isinstance(self.classes_[0], str) else UNKNOWN
        self._check_parameters()
        names = [f"class {label}" for label in self.classes_]
        logits = vectors[:, : len(names)] if self.num_logits else np.eye(len(names))[labels]
        groups = correctly_classified(vectors, logits, labels, names)
        self.mean_activations_ = means = np.stack([group.mean(axis=0) for group in groups])
        self.whitening_ = whitening(groups) if self.distance == "mahalanobis" else None
        own = [
            class_distances(group, mean[None], self.distance, self.whitening_)[:, 0]
            for group, mean in zip(groups, means, strict=True)
        ]
        self.variance_ = np.mean(np.concatenate(own) ** 2) / self.n_features_in_
        self.weibull_ = fit_weibulls(own, self.tail_size, names)
        return self

    def _check_parameters(self) -> None:
        num_classes, columns = len(self.classes_), self.n_features_in_
        if self.unknown_label_ in self.classes_:
            reserved = f"label {self.unknown_label_!r} is reserved for the unknown class"
            raise ValueError(f"{reserved}; in y, rename it or leave its images out")
        num_logits = columns if self.num_logits == "all" else self.num_logits
        check_scalar(num_logits, "num_logits", Integral, min_val=0, max_val=columns)
        if num_logits not in (0, num_classes):
            raise ValueError(
                f"X has {num_logits} logits and y has {num_classes} classes; every logit needs its "
                "class in y. If only the first columns of X are logits, set num_logits to their "
                "number; if X holds features without logits, set num_logits=0"
            )
        check_scalar(self.alpha, "alpha", Integral, min_val=0, max_val=num_classes)
        check_scalar(self.tail_size, "tail_size", Integral, min_val=MIN_TAIL_SIZE)
        if self.distance not in DISTANCES:
            raise ValueError(f"distance is {self.distance!r}; expected {', '.join(DISTANCES)}")

    def distances(self, X: ArrayLike) -> Array:
        """Distances [N, K] of activation vectors [N, D] to the K MAVs."""
        check_is_fitted(self)
        vectors = validate_data(self, X, dtype=np.float64, reset=False)
        return class_distances(vectors, self.mean_activations_, self.distance, self.whitening_)

    def predict_proba(self, X: ArrayLike) -> Array:
        """Probabilities [N, K + 1] of `classes_` and, last, the unknown; rows sum to 1."""
        check_is_fitted(self)
        vectors = validate_data(self, X, dtype=np.float64, reset=False)
        blocks = [vectors[rows] for rows in gen_batches(len(vectors), ROWS)]
        return np.vstack([self._probabilities(block) for block in blocks])

    def _probabilities(self, vectors: Array) -> Array:
        means, factor = self.mean_activations_, self.whitening_
        distances = class_distances(vectors, means, self.distance, factor)
        logits = vectors[:, : len(means)]
        if not self.num_logits:
            energies = distances**2 / (2 * self.variance_)
            logits = energies.max(axis=1, keepdims=True) - energies
        return recalibrate(logits, self.weibull_.cdf(distances), self.alpha)

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Most probable labels [N], of `classes_` or `unknown_label_`."""
        most_probable = self.predict_proba(X).argmax(axis=1)
        return np.append(self.classes_, self.unknown_label_)[most_probable]


def correctly_classified(
    vectors: Array, logits: Array, labels: NDArray[np.int64], names: Sequence[str]
) -> list[Array]:
    """Vectors [N, D] by class, where the largest logit [N, K] is the label's [N], 0..K-1.

    Raises:
        ValueError: a class keeps fewer than `MIN_TAIL_SIZE`.
    """
    correct = logits.argmax(axis=1) == labels
    groups = [vectors[correct & (labels == label)] for label in range(len(names))]
    for label, group in enumerate(groups):
        if len(group) < MIN_TAIL_SIZE:
            raise ValueError(
                f"{names[label]} has {np.sum(labels == label)} images, {len(group)} of them "
                f"classified correctly; expected at least {MIN_TAIL_SIZE}: train longer, or on "
                "more images"
            )
    return groups


def adapted_tail_size(tail_size: int, count: int) -> int:
    """How many of `count` distances make the tail: at most the far quarter, but at least 5."""
    return min(tail_size, max(MIN_TAIL_SIZE, count // 4))


def fit_weibulls(distances: Sequence[Array], tail_size: int, names: Sequence[str]) -> Weibull:
    """Fit one Weibull to the tail of each 1-D array of distances; names are for the error line.

    Raises:
        ValueError: an array has fewer than `MIN_TAIL_SIZE` values, or no Weibull fits its tail.
    """
    fits = []
    for name, values in zip(names, distances, strict=True):
        if len(values) < MIN_TAIL_SIZE:
            raise ValueError(f"{name}: {len(values)} images; expected at least {MIN_TAIL_SIZE}")
        size = adapted_tail_size(tail_size, len(values))
        try:
            fits.append(fit_tail(np.partition(values, -size)[-size:]))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return Weibull(*np.array(fits).T)


def fit_tail(tail: Array) -> tuple[float, float, float]:
    """Maximum-likelihood Weibull (scale, shape, location) of a tail of distances.

    The location is the smallest distance minus 1, libMR's translation, so the fit depends on the
    unit of distance. Without libMR, `fit_tail_scipy` fits; the two agree to 1e-5.

    Raises:
        ValueError: the distances are not finite, beyond 1e15 or equal to within rounding.
    """
    low, high, scale, shape = float(np.min(tail)), float(np.max(tail)), 0.0, 0.0
    if high < LARGEST_DISTANCE and high - low > SMALLEST_SPREAD * max(1, high, -low):
        if libmr is not None:
            model = libmr.MR()
            model.fit_high(tail.tolist(), len(tail))
            scale, shape, *_ = model.get_params()  # zeros where it fails
        else:
            scale, shape = fit_tail_scipy(tail)
    if not (0 < scale < np.inf and 0 < shape < np.inf):
        raise ValueError(
            f"no Weibull fits the {len(tail)} largest distances, {low:g} to {high:g}; they have "
            "to be finite and differ"
        )
    return scale, shape, low - 1


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

    highest = -z.mean()  # the slope grows with sigma, from below 0 to at least 0 here
    sigma = brentq(likelihood_slope, highest / (len(z) + 1), highest, xtol=1e-15, rtol=1e-14)
    log_scale = log_t.max() + spread * sigma * np.log(np.mean(np.exp(z / sigma)))
    return float(np.exp(log_scale)), 1 / (spread * sigma)


def recalibrate(logits: Array, w: Array, alpha: int = 0) -> Array:
    """OpenMax probabilities [N, K + 1], unknown last, of logits [N, K] and w [N, K] in 0..1."""
    if alpha == 0:
        rest = np.maximum(1 - w, SMALLEST_REST)  # never 0, which would tie classes
        known = softmax(np.asfortranarray(logits), axis=1) * rest  # 3 x as fast column by column
        return np.column_stack([known, np.maximum(1 - known.sum(axis=1), 0)])
    return softmax(revised_logits(logits, w, alpha), axis=1)


def revised_logits(logits: Array, w: Array, alpha: int) -> Array:
    """The papers' [N, K + 1] logits: y (1 - w), w scaled by rank, and sum y w for the unknown."""
    top = np.argsort(-logits, axis=1, kind="stable")[:, :alpha]
    weights = np.zeros_like(w)
    np.put_along_axis(weights, top, (alpha - np.arange(alpha)) / alpha, axis=1)
    w = w * weights
    return np.vstack([(logits * (1 - w)).T, (logits * w).sum(axis=1)]).T


def whitening(groups: Sequence[Array]) -> Array:
    """Factor W [D, D] with W W^T the inverse of the shrinkage covariance that K groups share.

    Groups are [N_k, D]. Source: Ledoit and Wolf 2004, as in scikit-learn.

    Raises:
        ValueError: the covariance cannot be inverted, for example because all deviations are 0.
    """
    deviations = np.vstack([group - group.mean(axis=0) for group in groups])
    precision = LedoitWolf(assume_centered=True).fit(deviations).precision_
    try:
        return np.linalg.cholesky(precision)
    except np.linalg.LinAlgError as error:
        raise ValueError("images of a class differ too little for a covariance") from error


def class_distances(vectors: Array, means: Array, distance: str, factor: Array | None) -> Array:
    """Distances [N, K] of vectors [N, D] to class means [K, D]; `mahalanobis` takes a `whitening`.

    Raises:
        ValueError: the cosine of an all-zero vector is asked for.
    """
    if factor is not None:
        vectors, means = vectors @ factor, means @ factor
    # Transposed: the result has a class's N distances side by side, which is faster to work on.
    if distance in ("euclidean", "mahalanobis"):
        return cdist(means, vectors).T
    cosine = cdist(means, vectors, "cosine").T
    if np.isnan(cosine).any():
        raise ValueError(f"distance {distance} is undefined for an all-zero activation vector")
    return cosine if distance == "cosine" else cdist(means, vectors).T / EUCOS_SCALE + cosine
