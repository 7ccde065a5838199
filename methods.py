"""The five open-set methods behind one face.

    method.fit(train, val)      # activations of training and validation images
    method.score(images)        # metrics.Scores of any activations
    method.threshold_           # accepts 95 % of the validation images

`msp`, `max_logit`, `openmax` and `crosr` are published; `dhr_openmax` is this project's rule, which
training stores in the checkpoint.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit, softmax
from scipy.stats import beta
from torch import Tensor, nn

from activations import Activations
from metrics import ACCEPTED_SHARE, Scores, threshold_accepting
from models import DHRNet
from openmax import (
    LARGEST_HAZARD,
    UNKNOWN,
    OpenMax,
    correctly_classified,
    fit_tail,
    fit_weibulls,
    whitening,
)

LARGEST_LOGIT = 30  # the sigmoids of much larger ones round to 1
TAIL_SIZE = 20  # largest distances a Weibull is fitted to, as published; fewer of few images


class OpenMaxSettings(NamedTuple):
    """Settings of the published methods, named as the flags; `openmax.OpenMax` explains them."""

    latents: str = "max"
    distance: str = "euclidean"
    tail_size: int = TAIL_SIZE
    alpha: int = 0


class Method:
    """What the published methods share."""

    threshold_: float

    def fit(self, train: Activations, val: Activations) -> Self:
        """Learn from training images; choose the threshold from validation images."""
        self.threshold_ = threshold_accepting(self.score(val).unknownness)
        return self

    def score(self, images: Activations) -> Scores:
        """Unknownness and probabilities of N images."""
        raise NotImplementedError


class MSP(Method):
    """1 - the largest softmax probability (Hendrycks and Gimpel 2017)."""

    def score(self, images: Activations) -> Scores:
        known = softmax(images.logits.astype(np.float64), axis=1)
        unknownness = 1 - known.max(axis=1)
        return Scores(unknownness, np.column_stack([known, unknownness]))


class MaxLogit(Method):
    """Minus the largest logit (Vaze et al. 2022); its probabilities are the logits' sigmoids.

    Of logits above 30, whose sigmoids round to 1, the largest counts as 30, the others as less.
    """

    def score(self, images: Activations) -> Scores:
        logits = images.logits.astype(np.float64)
        unknownness = -logits.max(axis=1)
        excess = np.maximum(-unknownness - LARGEST_LOGIT, 0)[:, None]
        return Scores(unknownness, np.column_stack([expit(logits - excess), expit(unknownness)]))


class OpenMaxMethod(Method):
    """OpenMax as published: on the logits y (Bendale and Boult 2016) with `latents="none"`, on
    [y, z] (CROSR, Yoshihashi et al. 2019) with pooled latents.

    Attributes:
        openmax_: the fitted `openmax.OpenMax`.
    """

    def __init__(self, settings: OpenMaxSettings) -> None:
        self.settings = settings

    def fit(self, train: Activations, val: Activations) -> Self:
        latents, distance, tail_size, alpha = self.settings
        openmax = OpenMax(tail_size, alpha, distance, num_logits=train.logits.shape[1])
        self.openmax_ = openmax.fit(train.vectors(latents), train.labels)
        return super().fit(train, val)

    def score(self, images: Activations) -> Scores:
        probabilities = self.openmax_.predict_proba(images.vectors(self.settings.latents))
        return Scores(probabilities[:, UNKNOWN], probabilities)


class DHROpenMax(nn.Module):
    """This project's rule: three tests of an image, each against the held-out validation images.

    Evidence: -||y||. For something unknown, all logits are small, positive and negative ones.
    Direction: 1 - the cosine between the features and their mean over the predicted class. The
    features hold what the logits leave out.
    Membership: the Mahalanobis distance of [y, z], z max-pooled as in CROSR, to the mean over the
    predicted class. It finds wrong colours and textures however sure the logits are.

    Weibulls, fitted to the evidence of all validation images and to the tails of the other two,
    give the probability 1 - w that a known image lies that far out. Fisher's method adds all up:

        log odds = log(p_unknown / (1 - p_unknown)) = sum over all of -log(1 - w) - offset.

    Networks of small sets say little by ||y||. So with fewer than 500 validation images, the term
    of the evidence is multiplied by their number / 500.

    The offset puts the accepted share of validation images at odds below 1, so that the threshold
    is 0 and p_unknown > 1/2 decides. The other probabilities are softmax(y) (1 - p_unknown): the
    class named is always that of the largest logit.

    It is a PyTorch module of float64 buffers: the checkpoint stores its `state_dict`, and scoring
    and export run the same `forward`.

    Args:
        tail_size: number of largest values that the Weibull of a tail is fitted to; fewer of few
            images.

    Attributes:
        directions: [K, C], means of the features.
        means: [K, K + 32 L], of [y, z].
        whitening: [K + 32 L, K + 32 L], `openmax.whitening` of [y, z].
        tails: [3, 3], scale, shape and location of each Weibull.
        offset: scalar.
    """

    FULL_EVIDENCE = 500  # validation images, from which on the evidence counts in full
    BUFFERS = ("directions", "means", "whitening", "tails", "offset")
    threshold_ = 0.0
    directions: Tensor
    means: Tensor
    whitening: Tensor
    tails: Tensor
    offset: Tensor

    def __init__(self, tail_size: int = TAIL_SIZE) -> None:
        super().__init__()
        self.tail_size = tail_size
        for name in self.BUFFERS:
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def fit(self, train: Activations, val: Activations) -> "DHROpenMax":
        """Fit means and whitening to training images, the rest to validation images.

        Raises:
            ValueError: a class has fewer than 5 correctly classified training images, or their
                covariance or the validation images' tail cannot be fitted.
        """
        names = [f"class {label}" for label in range(train.logits.shape[1])]
        features, vectors = (
            correctly_classified(array.astype(np.float64), train.logits, train.labels, names)
            for array in (train.features, train.vectors("max"))
        )
        directions, means = ([group.mean(axis=0) for group in each] for each in (features, vectors))
        self._set(directions=directions, means=means, whitening=whitening(vectors))
        evidence, *others = self.statistics(*_tensors(val)).T.numpy()
        scale, shape, location = fit_tail(evidence)
        scale *= min(1, len(evidence) / self.FULL_EVIDENCE) ** (-1 / shape)
        tails = fit_weibulls(others, self.tail_size, ["validation"] * 2)
        self._set(tails=np.column_stack([(scale, shape, location), tails]), offset=0.0)
        self._set(offset=threshold_accepting(self.score(val).unknownness))
        return self

    def _set(self, **arrays: Any) -> None:
        for name, array in arrays.items():
            setattr(self, name, torch.from_numpy(np.array(array, np.float64)))

    def statistics(self, logits: Tensor, features: Tensor, latents_max: Tensor) -> Tensor:
        """Evidence, direction and membership [N, 3], in float64; larger is more unknown."""
        predicted = logits.argmax(dim=1)
        evidence = -torch.linalg.vector_norm(logits.double(), dim=1)
        cosine = F.cosine_similarity(features.double(), self.directions[predicted])
        offsets = torch.hstack([logits, latents_max]).double() - self.means[predicted]
        distances = torch.linalg.vector_norm(offsets @ self.whitening, dim=1)
        return torch.stack([evidence, 1 - cosine, distances], dim=1)

    def forward(
        self, logits: Tensor, features: Tensor, latents_max: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log odds [N] of being unknown, and probabilities [N, K + 1], the unknown class last.

        Args:
            logits: [N, K].
            features: [N, C].
            latents_max: [N, 32 L], max-pooled latents, level by level.
        """
        scale, shape, location = self.tails
        reach = self.statistics(logits, features, latents_max) - location
        hazards = (reach.clamp_min(0) / scale).pow(shape)
        log_odds = hazards.clamp_max(LARGEST_HAZARD).sum(dim=1) - self.offset
        known = (-log_odds).clamp_min(-600).sigmoid()[:, None]  # never 0, which would tie classes
        known = logits.double().softmax(dim=1) * known
        return log_odds, torch.hstack([known, log_odds.sigmoid()[:, None]])

    @torch.no_grad()
    def score(self, images: Activations) -> Scores:
        log_odds, probabilities = self(*_tensors(images))
        return Scores(log_odds.numpy(), probabilities.numpy())


def _tensors(images: Activations) -> list[Tensor]:
    return [torch.from_numpy(a) for a in (images.logits, images.features, images.latents_max)]


def acceptance_interval(count: int) -> tuple[float, float]:
    """Where the share of new known images that a threshold accepts lies, with probability 95 %.

    The threshold is the k-th of `count` validation scores, k = ceil(0.95 count); the accepted
    share then follows Beta(k, count + 1 - k). Source: order statistics, e.g. Wilks 1941.
    """
    k = math.ceil(ACCEPTED_SHARE * count)
    low, high = beta.ppf((0.025, 0.975), k, count + 1 - k)
    return float(low), float(high)


def check_classes(train: Activations, classes: Sequence[str]) -> None:
    """Raise a ValueError that names a class with too few correctly classified training images."""
    correctly_classified(train.logits, train.logits, train.labels, classes)


def build_methods(settings: OpenMaxSettings) -> dict[str, Method | DHROpenMax]:
    """The five methods by the names they have in tables and results files, not yet fitted."""
    return {
        "msp": MSP(),
        "max_logit": MaxLogit(),
        "openmax": OpenMaxMethod(settings._replace(latents="none")),
        "crosr": OpenMaxMethod(settings),
        "dhr_openmax": DHROpenMax(),
    }


def stored_rule(network: DHRNet, checkpoint: dict[str, Any]) -> DHROpenMax:
    """The fitted open-set rule in a network's checkpoint.

    Raises:
        ValueError: the rule is damaged or belongs to another network; it is tried on zeros.
    """
    rule = DHROpenMax()
    try:
        for name in DHROpenMax.BUFFERS:
            setattr(rule, name, checkpoint["open_set_rule"][name].double())
        if not all(buffer.isfinite().all() for buffer in rule.buffers()):
            raise ValueError("it holds values that are not finite")
        rule(*(torch.zeros(1, width) for width in network.widths[:3]))
    except Exception as error:  # a foreign file can fail in any way
        reason = str(error).split("\n")[0]
        what = f"the open-set rule in it is damaged or of an earlier version ({reason})"
        raise ValueError(f"{what}; train again") from error
    return rule


class Recogniser(nn.Module):
    """A network and its open-set rule in one module, which `torch.export` turns into one file.

    Args:
        network: in evaluation mode.
        rule: fitted to it.
    """

    def __init__(self, network: DHRNet, rule: DHROpenMax) -> None:
        super().__init__()
        self.network, self.rule = network, rule

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities [N, K + 1], the unknown class last, of images as for `DHRNet`."""
        logits, features, latents_max, _ = self.network.activations(images)
        return self.rule(logits, features, latents_max)[1]
