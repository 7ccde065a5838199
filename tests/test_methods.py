"""The five methods on made-up activations: their formulas, and which way their scores point."""

import numpy as np
import pytest
from scipy.special import softmax
from test_openmax import make_activations

from compute_openmax import METHODS, Activations, Rule, activation_vectors
from openmax import UNKNOWN

RULE = Rule("max", "euclidean", 20, 0)


def make_set(seed, unknown=False):
    vectors, labels = make_activations(seed, latents=96)
    if unknown:  # low logits without a winner, latents far from all classes
        vectors[:, :6] = vectors[:, :6].mean(axis=1, keepdims=True) - 4
        vectors[:, 6:] += 3
        labels = np.full(len(labels), UNKNOWN)
    latents = vectors[:, 6:].astype(np.float32)
    return Activations(labels, vectors[:, :6].astype(np.float32), 2 * latents, latents)


@pytest.mark.parametrize("name", METHODS)
def test_unknown_images_score_above_known_ones(name):
    scorer = METHODS[name](make_set(0), make_set(1), RULE)
    known, unknown = scorer(make_set(2)), scorer(make_set(3, unknown=True))
    assert np.median(unknown.unknownness) > np.quantile(known.unknownness, 0.9)
    for scores in (known, unknown):
        assert scores.probabilities.shape == (len(scores.unknownness), 7)
        assert ((scores.probabilities >= 0) & (scores.probabilities <= 1)).all()


@pytest.mark.parametrize("name", METHODS)
def test_unknown_probability_grows_with_unknownness(name):
    scores = METHODS[name](make_set(0), make_set(1), RULE)(make_set(2))
    order = np.argsort(scores.unknownness)
    assert (np.diff(scores.probabilities[order, UNKNOWN]) >= -1e-12).all()


def test_msp_and_max_logit_equal_their_formulas():
    images = make_set(2)
    logits = images.logits.astype(np.float64)
    msp = METHODS["msp"](make_set(0), make_set(1), RULE)(images)
    assert msp.unknownness == pytest.approx(1 - softmax(logits, axis=1).max(axis=1))
    max_logit = METHODS["max_logit"](make_set(0), make_set(1), RULE)(images)
    assert np.array_equal(max_logit.unknownness, -logits.max(axis=1))
    assert max_logit.probabilities[:, 2] == pytest.approx(1 / (1 + np.exp(-logits[:, 2])))


def test_activation_vectors_are_logits_and_the_latents_asked_for():
    images = make_set(0)
    assert np.array_equal(activation_vectors(images, "none"), images.logits)
    for pool, latents in (("max", images.latents_max), ("avg", images.latents_avg)):
        assert np.array_equal(activation_vectors(images, pool), np.hstack([images.logits, latents]))
