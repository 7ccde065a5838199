"""The five open-set methods behind one face.

    method.fit(train, val)      # activations of training and validation images
    method.score(images)        # metrics.Scores of any activations
    method.threshold_           # accepts 95 % of the validation images

`msp`, `max_logit`, `openmax` and `crosr` are published; `dhr_openmax` is this project's rule, which
training stores in the checkpoint.
"""

import math
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from scipy.special import expit, softmax
from scipy.stats import beta
from torch import Tensor, nn

from activations import Activations
from metrics import Scores, threshold_accepting
from models import LATENT_CHANNELS, DHRNet
from openmax import LARGEST_HAZARD, UNKNOWN, OpenMax, Weibull, fit_weibulls, whitening

ACCEPTED_SHARE = 0.95  # of the validation images; sets each method's threshold
TAIL_SIZE = 20  # largest distances a Weibull is fitted to, as published; fewer of few images


class OpenMaxSettings(NamedTuple):
    """Settings of the published methods, named as the flags; `openmax.OpenMax` explains them."""

    latents: str = "max"
    distance: str = "euclidean"
    tail_size: int = TAIL_SIZE
    alpha: int = 0


class Method(Protocol):
    """What the five methods have in common."""

    threshold_: float

    def fit(self, train: Activations, val: Activations) -> "Method":
        """Learn from training images; choose the threshold from validation images."""

    def score(self, images: Activations) -> Scores:
        """Unknownness and probabilities of N images."""


class MSP:
    """1 - the largest softmax probability (Hendrycks and Gimpel 2017)."""

    def fit(self, train: Activations, val: Activations) -> "MSP":
        self.threshold_ = threshold_accepting(self.score(val).unknownness, ACCEPTED_SHARE)
        return self

    def score(self, images: Activations) -> Scores:
        known = softmax(images.logits.astype(np.float64), axis=1)
        unknownness = 1 - known.max(axis=1)
        return Scores(unknownness, np.column_stack([known, unknownness]))


class MaxLogit:
    """Minus the largest logit (Vaze et al. 2022); its probabilities are the logits' sigmoids."""

    def fit(self, train: Activations, val: Activations) -> "MaxLogit":
        self.threshold_ = threshold_accepting(self.score(val).unknownness, ACCEPTED_SHARE)
        return self

    def score(self, images: Activations) -> Scores:
        logits = images.logits.astype(np.float64)
        unknownness = -logits.max(axis=1)
        return Scores(unknownness, np.column_stack([expit(logits), expit(unknownness)]))


class OpenMaxMethod:
    """OpenMax as published: on the logits y (Bendale and Boult 2016) with `latents="none"`, on
    [y, z] (CROSR, Yoshihashi et al. 2019) with pooled latents.

    Attributes:
        openmax_: the fitted `openmax.OpenMax`.
    """

    def __init__(self, settings: OpenMaxSettings) -> None:
        self.settings = settings

    def fit(self, train: Activations, val: Activations) -> "OpenMaxMethod":
        latents, distance, tail_size, alpha = self.settings
        openmax = OpenMax(tail_size, alpha, distance, num_logits=train.logits.shape[1])
        self.openmax_ = openmax.fit(train.vectors(latents), train.labels)
        self.threshold_ = threshold_accepting(self.score(val).unknownness, ACCEPTED_SHARE)
        return self

    def score(self, images: Activations) -> Scores:
        probabilities = self.openmax_.predict_proba(images.vectors(self.settings.latents))
        return Scores(probabilities[:, UNKNOWN], probabilities)


class DHROpenMax(nn.Module):
    """This project's rule: OpenMax on the logits, corrected by the latents of each level.

    OpenMax runs on y with Mahalanobis distances and all classes ranked. Then, for each level l, the
    Mahalanobis distance of the average-pooled latent z_l to its mean over the predicted class gives
    w_l, from one Weibull per level fitted to validation images. A known image lies that far out
    with probability 1 - w_l, so the odds of unknown are multiplied by 1 / (1 - w_l):

        log odds = log(p_unknown / (1 - p_unknown)) + sum over l of -log(1 - w_l) - offset.

    An image near its class at every level keeps its OpenMax odds; one with the wrong texture or
    colours is unknown however sure the logits are. The offset puts the accepted share of validation
    images at odds below 1, so that the threshold is 0 and p_unknown > 1/2 decides.

    It is a PyTorch module of float64 buffers: the checkpoint stores its `state_dict`, and scoring
    and export run the same `forward`.

    Args:
        tail_size: number of largest distances each Weibull is fitted to; fewer of few images.

    Attributes:
        means, whitening: of the logits, [K, K] each.
        tails: [3, K], scale, shape and location of each class's Weibull.
        latent_means: [L, K, C]; latent_whitening: [L, C, C]; latent_tails: [3, L].
        offset: scalar.
    """

    BUFFERS = (
        "means", "whitening", "tails", "latent_means", "latent_whitening", "latent_tails", "offset",
    )  # fmt: skip
    threshold_ = 0.0
    means: Tensor
    whitening: Tensor
    tails: Tensor
    latent_means: Tensor
    latent_whitening: Tensor
    latent_tails: Tensor
    offset: Tensor

    def __init__(self, tail_size: int = TAIL_SIZE) -> None:
        super().__init__()
        self.tail_size = tail_size
        for name in self.BUFFERS:
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def fit(self, train: Activations, val: Activations) -> "DHROpenMax":
        """Fit to training images; the levels' Weibulls and the offset to validation images.

        Raises:
            ValueError: as `openmax.OpenMax.fit`.
        """
        num_classes = train.logits.shape[1]
        openmax = OpenMax(self.tail_size, num_classes, "mahalanobis", num_logits=num_classes)
        openmax.fit(train.logits, train.labels)
        correct = train.logits.argmax(axis=1) == train.labels
        latents = _levels(torch.from_numpy(train.latents_avg[correct])).numpy()
        labels = train.labels[correct]
        groups = [[z[labels == label] for label in range(num_classes)] for z in latents]
        means = [np.stack([group.mean(axis=0) for group in level]) for level in groups]
        self._set(
            means=openmax.mean_activations_,
            whitening=openmax.whitening_,
            tails=openmax.weibull_,
            latent_means=means,
            latent_whitening=[whitening(g, m) for g, m in zip(groups, means, strict=True)],
        )
        logits, latents_avg = torch.from_numpy(val.logits), torch.from_numpy(val.latents_avg)
        distances = self.latent_distances(logits.double(), latents_avg).T.numpy()
        names = [f"level {level}" for level in range(1, len(distances) + 1)]
        self._set(latent_tails=fit_weibulls(list(distances), self.tail_size, names), offset=0.0)
        self._set(offset=threshold_accepting(self.score(val).unknownness, ACCEPTED_SHARE))
        return self

    def _set(self, **arrays: Any) -> None:
        for name, array in arrays.items():
            setattr(self, name, torch.from_numpy(np.array(array, np.float64)))

    def latent_distances(self, logits: Tensor, latents_avg: Tensor) -> Tensor:
        """Distances [N, L] of each level's latents to their mean over the predicted class."""
        offsets = _levels(latents_avg) - self.latent_means[:, logits.argmax(dim=1)]  # [L, N, C]
        return torch.linalg.vector_norm(offsets @ self.latent_whitening, dim=2).T

    def forward(self, logits: Tensor, latents_avg: Tensor) -> tuple[Tensor, Tensor]:
        """Log odds [N] of being unknown, and probabilities [N, K + 1], the unknown class last.

        Args:
            logits: [N, K].
            latents_avg: [N, L C], average-pooled latents, level by level.
        """
        logits = logits.double()
        distances = torch.cdist(
            logits @ self.whitening,
            self.means @ self.whitening,
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        not_member = -torch.expm1(-_hazard(distances, self.tails))
        rank = logits.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        not_member = not_member * (1 - rank.double() / logits.shape[1])
        known = logits * (1 - not_member)
        latent_hazard = _hazard(self.latent_distances(logits, latents_avg), self.latent_tails)
        log_odds = (logits * not_member).sum(dim=1) - known.logsumexp(dim=1)
        log_odds = log_odds + latent_hazard.sum(dim=1) - self.offset
        unknown = log_odds.sigmoid()[:, None]
        return log_odds, torch.cat([known.softmax(dim=1) * (1 - unknown), unknown], dim=1)

    @torch.no_grad()
    def score(self, images: Activations) -> Scores:
        logits, latents_avg = torch.from_numpy(images.logits), torch.from_numpy(images.latents_avg)
        log_odds, probabilities = self(logits, latents_avg)
        return Scores(log_odds.numpy(), probabilities.numpy())


def acceptance_interval(count: int, share: float = ACCEPTED_SHARE) -> tuple[float, float]:
    """Where the share of new known images that a threshold accepts lies, with probability 95 %.

    The threshold is the k-th of `count` validation scores, k = ceil(share count); the accepted
    share then follows Beta(k, count + 1 - k). Source: order statistics, e.g. Wilks 1941.
    """
    k = math.ceil(share * count)
    low, high = beta.ppf((0.025, 0.975), k, count + 1 - k)
    return float(low), float(high)


def _levels(latents: Tensor) -> Tensor:
    """[N, L C] -> [L, N, C] in float64."""
    return latents.double().unflatten(1, (-1, LATENT_CHANNELS)).transpose(0, 1)


def _hazard(distances: Tensor, tails: Tensor) -> Tensor:
    """`Weibull.hazard` on tensors; tails [3, K] as its fields."""
    scale, shape, location = tails
    return ((distances - location).clamp_min(0) / scale).pow(shape).clamp_max(LARGEST_HAZARD)


def build_methods(settings: OpenMaxSettings) -> dict[str, Method]:
    """The five methods by the names they have in tables and results files, not yet fitted."""
    return {
        "msp": MSP(),
        "max_logit": MaxLogit(),
        "openmax": OpenMaxMethod(settings._replace(latents="none")),
        "crosr": OpenMaxMethod(settings),
        "dhr_openmax": DHROpenMax(settings.tail_size),
    }


def stored_rule(network: DHRNet, checkpoint: dict[str, Any]) -> DHROpenMax:
    """The fitted open-set rule in a network's checkpoint.

    Raises:
        ValueError: the rule is damaged or belongs to another network; it is tried on zeros.
    """
    rule = DHROpenMax()
    try:
        state = checkpoint["open_set_rule"]
        state = _from_first_form(state) if "estimator" in state else state
        for name in DHROpenMax.BUFFERS:
            setattr(rule, name, state[name].double())
        num_classes, levels = network.config["num_classes"], len(network.bottlenecks)
        zeros = torch.zeros(1, num_classes), torch.zeros(1, LATENT_CHANNELS * levels)
        log_odds, probabilities = rule(*zeros)
        if probabilities.shape != (1, num_classes + 1) or not log_odds.isfinite().all():
            raise ValueError(f"it does not have the network's {num_classes} classes")
    except Exception as error:  # a foreign file can fail in any way
        reason = str(error).split("\n")[0]
        raise ValueError(f"the open-set rule in it is damaged ({reason}); train again") from error
    return rule


def _from_first_form(state: dict[str, Any]) -> dict[str, Any]:
    """The buffers of a rule as checkpoints of version 0.1 store it."""
    estimator = state["estimator"]
    openmax = estimator["openmax_"]

    def tails(weibull: dict[str, Tensor]) -> Tensor:
        return torch.stack([weibull[field] for field in Weibull._fields])

    return {
        "means": openmax["mean_activations_"],
        "whitening": openmax["whitening_"],
        "tails": tails(openmax["weibull_"]),
        "latent_means": torch.stack(estimator["latent_means_"]),
        "latent_whitening": torch.stack(estimator["latent_whitening_"]),
        "latent_tails": tails(estimator["weibull_"]),
        "offset": torch.tensor(estimator["offset_"], dtype=torch.float64),
    }


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
        logits, _, latents_avg = self.network.logits_and_latents(images)
        return self.rule(logits, latents_avg)[1]
