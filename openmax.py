"""OpenMax on plain arrays: mean activations, distances, Weibull tails, recalibrated probabilities.

OpenMax (Bendale and Boult 2016) asks of every class how far an image's activation vector lies from
the class's mean activation vector (MAV), and turns that distance into a probability w of not
belonging, with a Weibull fitted to the largest distances seen among correctly classified training
images. CROSR (Yoshihashi et al. 2019) is the same on [y, z]: logits y and pooled latents z in one
vector.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.spatial.distance import cdist
from scipy.special import expit, softmax
from sklearn.covariance import LedoitWolf

from choices import DISTANCES

try:
    import libmr

    WEIBULL_ENGINE = "libmr"
except ImportError:  # it needs a compiler to install
    libmr = None
    WEIBULL_ENGINE = "scipy"

UNKNOWN = -1  # label of the unknown class, and its column, the last, in an array of probabilities
MIN_TAIL_SIZE = 5  # three points or fewer give the same shape whatever they are
SMALLEST_SPREAD = 1e-10  # of a tail, relative to its values or 1: below, rounding decides
LARGEST_DISTANCE = 1e15  # of a tail: beyond, libMR's translation by 1 is lost in rounding
LARGEST_ACTIVATION = 1e100  # squares stay finite
LARGEST_LOG_HAZARD = 690  # sums of hazards up to e^690 stay finite
ROWS = 2000  # scored at a time: their intermediate results stay in the processor's cache
EUCOS_SCALE = 200  # eucos = euclidean / 200 + cosine, as in the OpenMax authors' code

Array = NDArray[np.float64]


class Activations(NamedTuple):
    """What the network says of N images.

    Attributes:
        labels: [N] int64 class indices, `UNKNOWN` for images of unknown classes.
        logits: [N, K] float32, y.
        latents_max: [N, 32 L] float32, the latents of L levels, shallow to deep, max-pooled over
            space.
        latents_avg: [N, 32 L] float32, the same averaged over space.
    """

    labels: np.ndarray
    logits: np.ndarray
    latents_max: np.ndarray
    latents_avg: np.ndarray


class Weibull(NamedTuple):
    """w(d) = 1 - exp(-(max(d - location, 0) / scale)^shape), the three parameters arrays alike."""

    scale: Array
    shape: Array
    location: Array

    def cdf(self, distances: ArrayLike) -> Array:
        """w in 0..1, the probability of not being a member; distances broadcast, e.g. [N, K]."""
        return -np.expm1(-self.hazard(distances))

    def hazard(self, distances: ArrayLike) -> Array:
        """-log(1 - w) in 0..e^690, which tells distances apart where w is 1 to the last digit."""
        reach = (np.asarray(distances, np.float64) - self.location) / self.scale
        # Three times as fast as a power; zeros and infinities would slow down log and exp.
        log_hazard = self.shape * np.log(np.maximum(reach, 1e-300))
        return np.exp(log_hazard.clip(-LARGEST_LOG_HAZARD, LARGEST_LOG_HAZARD)) * (reach > 0)


class OpenMax:
    """OpenMax in scikit-learn's conventions, on activation vectors that begin with the K logits.

    Args:
        tail_size: number of largest distances a class's Weibull is fitted to; CROSR's 20 by
            default.
        alpha: 0 for the form of the released CROSR code, p = softmax(y) (1 - w) and
            p_unknown = 1 - sum p. A number from 1 to K for the form printed in both papers: among
            the alpha top-ranked classes, the i-th (from 0) has w scaled by (alpha - i) / alpha, the
            others by 0; then y (1 - w), and sum y w for the unknown, pass through the softmax.
        distance: to the MAV, one of `DISTANCES`. `mahalanobis` uses one shrinkage covariance for
            all classes (Ledoit and Wolf 2004).

    Attributes:
        mean_activations_: [K, D], over correctly classified images.
        weibull_: the K tails.
    """

    def __init__(self, tail_size: int = 20, alpha: int = 0, distance: str = "euclidean") -> None:
        self.tail_size = tail_size
        self.alpha = alpha
        self.distance = distance

    def fit(self, X: ArrayLike, y: ArrayLike) -> "OpenMax":
        """Fit MAVs and tails.

        Args:
            X: [N, D] activation vectors, the first K columns the logits, finite.
            y: [N] int labels, 0..K-1, each class present.

        Raises:
            ValueError: shapes or values are off, a class has fewer correctly classified images than
                the tail, or its tail admits no Weibull.
        """
        activations = _checked_activations(X)
        labels, num_classes = _checked_labels(y, activations)
        if self.distance not in DISTANCES:
            raise ValueError(f"distance is {self.distance!r}; expected {', '.join(DISTANCES)}")
        if self.alpha not in range(num_classes + 1):
            raise ValueError(f"alpha is {self.alpha}; expected 0..{num_classes}, the classes")
        groups = correctly_classified(activations, labels, num_classes)
        self.mean_activations_ = np.stack([group.mean(axis=0) for group in groups])
        self.whitening_ = (
            whitening(groups, self.mean_activations_) if self.distance == "mahalanobis" else None
        )
        own = [
            class_distances(group, mean[None], self.distance, self.whitening_)[:, 0]
            for group, mean in zip(groups, self.mean_activations_, strict=True)
        ]
        self.weibull_ = fit_weibulls(own, self.tail_size)
        return self

    def distances(self, X: ArrayLike) -> Array:
        """Distances [N, K] of activation vectors [N, D] to the K MAVs."""
        return self._distances(_checked_activations(X, self.mean_activations_.shape[1]))

    def _distances(self, activations: Array) -> Array:
        return class_distances(activations, self.mean_activations_, self.distance, self.whitening_)

    def predict_proba(self, X: ArrayLike) -> Array:
        """Probabilities [N, K + 1] of the known classes and, last, the unknown; rows sum to 1.

        Args:
            X: [N, D] activation vectors as in `fit`.
        """
        return in_blocks(X, self._predict_block)

    def _predict_block(self, X: ArrayLike) -> Array:
        activations = _checked_activations(X, self.mean_activations_.shape[1])
        not_member = self.weibull_.cdf(self._distances(activations))
        return recalibrate(activations[:, : not_member.shape[1]], not_member, self.alpha)


class DHROpenMax:
    """This project's rule: OpenMax on the logits, corrected by what the latents of each level say.

    OpenMax runs on y with Mahalanobis distances and all classes ranked. Then, for each level l, the
    Mahalanobis distance of the average-pooled latent z_l to its mean over the predicted class gives
    w_l, from one Weibull a level fitted on held-out images of known classes. A known image lies
    that far out with probability 1 - w_l, so the odds of unknown are multiplied by 1 / (1 - w_l):

        log odds = log(p_unknown / (1 - p_unknown)) + sum over l of -log(1 - w_l) - offset.

    An image near its class at every level keeps its OpenMax odds; one with the wrong texture or
    colours is unknown however sure the logits are. The offset makes the odds even where the
    accepted share of held-out images is on the known side, so that p_unknown > 1/2 decides.

    Args:
        levels: number of levels L the latents split into.
        tail_size: number of largest distances each Weibull is fitted to.
        accepted_share: of held-out known images, in 0..1.
    """

    def __init__(self, levels: int = 3, tail_size: int = 20, accepted_share: float = 0.95) -> None:
        self.levels = levels
        self.tail_size = tail_size
        self.accepted_share = accepted_share

    def fit(self, X: ArrayLike, y: ArrayLike, held_out: ArrayLike) -> "DHROpenMax":
        """Fit on training images, and the levels' Weibulls on held-out ones.

        Args:
            X: [N, K + L C] logits and, level by level, average-pooled latents of training images.
            y: [N] int labels, 0..K-1, each class present.
            held_out: [M, K + L C], likewise, of images the network was not trained on.

        Raises:
            ValueError: as `OpenMax.fit`; or the columns do not split into K and L equal parts.
        """
        activations = _checked_activations(X)
        labels, num_classes = _checked_labels(y, activations)
        latent_columns = activations.shape[1] - num_classes
        if self.levels not in range(1, latent_columns + 1) or latent_columns % self.levels:
            raise ValueError(
                f"activations have {activations.shape[1]} columns; expected {num_classes} logits "
                f"and {self.levels} equal levels of latents"
            )
        logits = activations[:, :num_classes]
        self.openmax_ = OpenMax(self.tail_size, num_classes, "mahalanobis").fit(logits, labels)
        self.columns_ = activations.shape[1]
        groups = correctly_classified(activations, labels, num_classes)
        self.latent_means_, self.latent_whitening_ = [], []
        for latents in zip(*map(self._split, groups), strict=True):
            means = np.stack([z.mean(axis=0) for z in latents])
            self.latent_means_.append(means)
            self.latent_whitening_.append(whitening(latents, means))
        self.weibull_ = fit_weibulls(
            list(self.latent_distances(held_out).T), self.tail_size, "level"
        )
        self.offset_ = 0.0
        odds = self.decision_function(held_out)
        self.offset_ = np.quantile(odds, self.accepted_share, method="inverted_cdf")
        return self

    def _split(self, activations: Array) -> list[Array]:
        return np.split(activations[:, len(self.openmax_.mean_activations_) :], self.levels, axis=1)

    def latent_distances(self, X: ArrayLike) -> Array:
        """Distances [N, L] of each level's latents to their mean over the predicted class."""
        activations = _checked_activations(X, self.columns_)
        num_classes = len(self.openmax_.mean_activations_)
        predicted = activations[:, :num_classes].argmax(axis=1)
        columns = []
        for level, latents in enumerate(self._split(activations)):
            factor = self.latent_whitening_[level]
            offsets = (latents - self.latent_means_[level][predicted]) @ factor
            columns.append(np.linalg.norm(offsets, axis=1))
        return np.stack(columns, axis=1)

    def decide(self, X: ArrayLike) -> Array:
        """Log odds of being unknown, and all probabilities, in one pass.

        Args:
            X: [N, K + L C] activation vectors as in `fit`.

        Returns:
            [N, 1 + K + 1], `decision_function` and `predict_proba` side by side.
        """
        return in_blocks(X, self._decide_block)

    def _decide_block(self, X: ArrayLike) -> Array:
        activations = _checked_activations(X, self.columns_)
        logits = activations[:, : len(self.openmax_.mean_activations_)]
        not_member = self.openmax_.weibull_.cdf(self.openmax_._distances(logits))
        revised = revised_logits(logits, not_member, self.openmax_.alpha)
        known = softmax(revised[:, :UNKNOWN], axis=1)
        total = revised[:, :UNKNOWN].max(axis=1) - np.log(known.max(axis=1))  # log sum exp
        hazard = self.weibull_.hazard(self.latent_distances(activations)).sum(axis=1)
        log_odds = revised[:, UNKNOWN] - total + hazard - self.offset_
        unknown = expit(log_odds)
        return np.column_stack([log_odds, known * (1 - unknown)[:, None], unknown])

    def decision_function(self, X: ArrayLike) -> Array:
        """Log odds [N] of being unknown: above 0, more likely unknown than not."""
        return self.decide(X)[:, 0]

    def predict_proba(self, X: ArrayLike) -> Array:
        """Probabilities [N, K + 1] of the known classes and, last, the unknown; rows sum to 1."""
        return self.decide(X)[:, 1:]


def pack(value: Any, array: Callable[[Array], Any]) -> Any:
    """Take a fitted estimator apart, to store it without code.

    Args:
        value: an instance of this module's classes, or what is in one.
        array: applied to every array, for example `torch.from_numpy`.

    Returns:
        a dict of attributes and, under `class`, the class's name; lists and primitives as they are.

    Raises:
        TypeError: an attribute is neither of these nor an array.
    """
    if type(value).__module__ == __name__:
        fields = value._asdict() if hasattr(value, "_asdict") else vars(value)
        packed = {name: pack(field, array) for name, field in fields.items()}
        return {"class": type(value).__name__, **packed}
    if isinstance(value, list | tuple):
        return [pack(item, array) for item in value]
    if isinstance(value, np.ndarray):
        return array(value)
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, bool | int | float | str | None):
        raise TypeError(f"{type(value).__name__} {value} cannot be packed")
    return value


def unpack(packed: Any) -> Any:
    """Put together again what `pack` took apart; anything array-like becomes an array.

    Raises:
        ValueError: a class is not one of this module's.
    """
    if isinstance(packed, list):
        return [unpack(item) for item in packed]
    if isinstance(packed, dict):
        fields = {name: unpack(field) for name, field in packed.items() if name != "class"}
        kind = globals().get(packed.get("class", ""))
        if not isinstance(kind, type) or kind.__module__ != __name__:
            raise ValueError(f"class {packed.get('class')!r} is not one of {__name__}")
        if issubclass(kind, tuple):
            return kind(**fields)
        estimator = kind.__new__(kind)
        vars(estimator).update(fields)
        return estimator
    if isinstance(packed, bool | int | float | str | None):
        return packed
    return np.asarray(packed)


def activation_vectors(images: Activations, latents: str) -> np.ndarray:
    """[y, z] of N images, [N, K + 32 L], z pooled by `max` or `avg`; y alone for `none`."""
    if latents == "none":
        return images.logits
    pooled = images.latents_max if latents == "max" else images.latents_avg
    return np.hstack([images.logits, pooled])


def in_blocks(X: ArrayLike, score: Callable[[Array], Array]) -> Array:
    """What `score` gives for the rows of X [N, D], found `ROWS` rows at a time."""
    rows = np.atleast_1d(X)
    starts = range(0, max(len(rows), 1), ROWS)
    return np.concatenate([score(rows[start : start + ROWS]) for start in starts])


def correctly_classified(
    activations: Array, labels: NDArray[np.int64], num_classes: int
) -> list[Array]:
    """Split activations [N, D] by class, keeping those whose largest logit is their label's.

    Raises:
        ValueError: nothing is left of a class.
    """
    correct = activations[:, :num_classes].argmax(axis=1) == labels
    groups = [activations[correct & (labels == label)] for label in range(num_classes)]
    for label, group in enumerate(groups):
        if not len(group):
            raise ValueError(f"class {label} has no correctly classified image; train longer")
    return groups


def fit_weibulls(distances: Sequence[Array], tail_size: int, names: str = "class") -> Weibull:
    """Fit one Weibull to the largest values of each array of distances.

    Args:
        distances: one 1-D array a class (or level).
        tail_size: how many of the largest.
        names: what the arrays stand for, for the error line.

    Raises:
        ValueError: an array has fewer values than the tail, or its tail admits no Weibull, for
            example because all its distances are equal.
    """
    fits = []
    for index, values in enumerate(distances):
        if not MIN_TAIL_SIZE <= tail_size <= len(values):
            raise ValueError(
                f"tail_size is {tail_size}; expected {MIN_TAIL_SIZE}..{len(values)}, the number of "
                f"images there are for {names} {index}"
            )
        try:
            fits.append(fit_tail(np.partition(values, len(values) - tail_size)[-tail_size:]))
        except ValueError as error:
            raise ValueError(f"{names} {index}: {error}") from error
    return Weibull(*np.array(fits).T)


def fit_tail(tail: Array) -> tuple[float, float, float]:
    """Maximum-likelihood Weibull (scale, shape, location) of a tail of distances.

    The location is the smallest distance minus 1, libMR's translation, so the fit depends on the
    unit of distance. libMR where it is installed, else `fit_tail_scipy`, which agrees to 1e-5.

    Raises:
        ValueError: the values are not finite, are beyond 1e15 or equal to within rounding, or no
            Weibull fits them.
    """
    tail = as_floats(tail, "distances")
    low, high, most = np.min(tail), np.max(tail), LARGEST_DISTANCE
    if not (-most < low <= high < most and high - low > SMALLEST_SPREAD * max(1, -low, high)):
        raise ValueError(
            f"no Weibull fits the {len(tail)} largest distances, which go from {low} to {high}; "
            f"expected different ones below {most:g}: the activations carry too little, train "
            "longer or leave the class out"
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

    highest = -z.mean()  # the slope grows with sigma, from below 0 to at least 0 here
    sigma = brentq(likelihood_slope, highest / (len(z) + 1), highest, xtol=1e-15, rtol=1e-14)
    log_scale = log_t.max() + spread * sigma * np.log(np.mean(np.exp(z / sigma)))
    return float(np.exp(log_scale)), 1 / (spread * sigma)


def recalibrate(logits: ArrayLike, not_member: ArrayLike, alpha: int = 0) -> Array:
    """OpenMax probabilities [N, K + 1], the unknown class last, in the form `alpha` selects.

    Args:
        logits: [N, K], y.
        not_member: [N, K] in 0..1, the Weibull probabilities w.
        alpha: 0, or how many top-ranked classes are revised; see `OpenMax`.

    Raises:
        ValueError: shapes or values are off.
    """
    y, w = _checked_activations(logits), as_floats(not_member, "probabilities w")
    if w.shape != y.shape or not 0 <= w.min() <= w.max() <= 1:
        raise ValueError(f"probabilities w, of shape {w.shape}; expected {y.shape}, all in 0..1")
    if alpha not in range(y.shape[1] + 1):
        raise ValueError(f"alpha is {alpha}; expected 0..{y.shape[1]}, the number of classes")
    if alpha == 0:
        known = softmax(np.asfortranarray(y), axis=1) * (1 - w)
        return np.column_stack([known, np.maximum(1 - known.sum(axis=1), 0)])
    return softmax(revised_logits(y, w, alpha), axis=1)


def revised_logits(y: Array, w: Array, alpha: int) -> Array:
    """The papers' [N, K + 1] logits: y (1 - w), w scaled by rank, and sum y w for the unknown."""
    top = np.argsort(-y, axis=1, kind="stable")[:, :alpha]
    weights = np.zeros_like(w)
    np.put_along_axis(weights, top, (alpha - np.arange(alpha)) / alpha, axis=1)
    w = w * weights
    return np.vstack([(y * (1 - w)).T, (y * w).sum(axis=1)]).T


def whitening(groups: Sequence[Array], means: Array) -> Array:
    """Factor W [D, D] with W W^T the inverse of the shrinkage covariance that K groups share.

    Args:
        groups: K arrays [N_k, D].
        means: [K, D], of the groups.

    Raises:
        ValueError: the covariance cannot be inverted, for example because all deviations are 0.

    Source: Ledoit and Wolf 2004, scikit-learn's implementation.
    """
    deviations = np.concatenate([group - mean for group, mean in zip(groups, means, strict=True)])
    precision = LedoitWolf(assume_centered=True).fit(deviations).precision_
    try:
        return np.linalg.cholesky(precision)
    except np.linalg.LinAlgError as error:
        raise ValueError(
            "the covariance of the activations cannot be inverted; "
            "they carry too little, train longer or take another distance"
        ) from error


def class_distances(
    activations: Array, means: Array, distance: str, factor: Array | None = None
) -> Array:
    """Distances [N, K] of activations [N, D] to class means [K, D].

    Args:
        activations: [N, D].
        means: [K, D].
        distance: one of `DISTANCES`.
        factor: [D, D] of `whitening`, for `mahalanobis`.

    Raises:
        ValueError: a cosine with an all-zero vector is asked for.
    """
    if factor is not None:
        activations, means = activations @ factor, means @ factor
    # Transposed: the result has a class's N distances side by side, which is faster to work on.
    if distance in ("euclidean", "mahalanobis"):
        return cdist(means, activations).T
    cosine = cdist(means, activations, "cosine").T
    if np.isnan(cosine).any():
        raise ValueError(f"distance {distance} is undefined for an all-zero activation vector")
    return cosine if distance == "cosine" else cdist(means, activations).T / EUCOS_SCALE + cosine


def as_floats(values: ArrayLike, name: str) -> Array:
    """Numbers as float64; text, objects, dates and complex numbers are refused, not converted."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} have type {array.dtype}; expected numbers")
    return array.astype(np.float64, copy=False)


def _checked_activations(activations: ArrayLike, columns: int | None = None) -> Array:
    array = as_floats(activations, "activations")
    if array.ndim != 2 or not array.size or columns not in (None, array.shape[1]):
        raise ValueError(f"activations have shape {array.shape}; expected [N, {columns or 'D'}]")
    if not -LARGEST_ACTIVATION <= array.min() <= array.max() <= LARGEST_ACTIVATION:
        raise ValueError(f"activations hold NaN or infinity, or exceed {LARGEST_ACTIVATION:g}")
    return array


def as_labels(values: ArrayLike, name: str, lowest: int, highest: int) -> NDArray[np.int64]:
    """Integers [N], at least one; anything else is refused, not converted."""
    array = np.asarray(values)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} have shape {array.shape} and type {array.dtype}; expected one integer an image"
        )
    if array.min() < lowest or array.max() > highest:
        raise ValueError(
            f"{name} lie in {array.min()}..{array.max()}; expected {lowest}..{highest}"
        )
    return array.astype(np.int64)


def _checked_labels(y: ArrayLike, activations: Array) -> tuple[NDArray[np.int64], int]:
    """Labels and the number of classes K."""
    labels = as_labels(y, "labels", 0, activations.shape[1] - 1)
    if len(labels) != len(activations):
        raise ValueError(f"labels have shape {labels.shape}; expected ({len(activations)},)")
    return labels, int(labels.max()) + 1
