"""OpenMax against a literal loop with libMR, recorded values, and its own promises."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import distance as spd
from sklearn.covariance import LedoitWolf

import openmax
from openmax import DISTANCES, UNKNOWN, DHROpenMax, OpenMax, fit_tail, fit_tail_scipy, recalibrate

libmr = openmax.libmr
needs_libmr = pytest.mark.skipif(libmr is None, reason="libMR is not installed")


def make_activations(seed, num_classes=6, per_class=60, latents=9):
    """Class-dependent [y, z] with some wrongly classified rows, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(num_classes), per_class)
    logits = rng.normal(size=(len(labels), num_classes)) + 3 * np.eye(num_classes)[labels]
    z = np.maximum(rng.normal(size=(len(labels), latents)) + labels[:, None] / 3, 0)
    return np.hstack([logits, z]), labels


def loop_openmax(train, labels, images, tail_size, alpha, num_classes):
    """The ports' computation: one image, one class, one live libMR object at a time."""
    mavs, models = [], []
    for c in range(num_classes):
        rows = [
            x
            for x, y in zip(train, labels, strict=True)
            if y == c and np.argmax(x[:num_classes]) == c
        ]
        mavs.append(np.mean(rows, axis=0))
        distances = [spd.euclidean(mavs[c], row) for row in rows]
        models.append(libmr.MR())
        models[c].fit_high(sorted(distances)[-tail_size:], tail_size)
    probabilities = []
    for x in images:
        y = x[:num_classes]
        w = [models[c].w_score(spd.euclidean(mavs[c], x)) for c in range(num_classes)]
        if alpha == 0:
            exp = [math.exp(v - max(y)) for v in y]
            known = [e / sum(exp) * (1 - w[c]) for c, e in enumerate(exp)]
            probabilities.append([*known, 1 - sum(known)])
        else:
            weights = [0.0] * num_classes
            for rank, c in enumerate(np.argsort(y)[::-1][:alpha]):
                weights[c] = (alpha - rank) / alpha
            revised = [y[c] * (1 - w[c] * weights[c]) for c in range(num_classes)]
            revised.append(sum(y[c] * w[c] * weights[c] for c in range(num_classes)))
            exp = [math.exp(v - max(revised)) for v in revised]
            probabilities.append([e / sum(exp) for e in exp])
    return np.array(probabilities)


@needs_libmr
@pytest.mark.parametrize("alpha", [0, 1, 3, 6])
@pytest.mark.parametrize("tail_size", [5, 20])
def test_equals_literal_loop_with_libmr(alpha, tail_size):
    train, labels = make_activations(0)
    images, _ = make_activations(1)
    images *= np.linspace(0.2, 2, len(images))[:, None]
    model = OpenMax(tail_size, alpha).fit(train, labels)
    expected = loop_openmax(train, labels, images, tail_size, alpha, 6)
    assert np.abs(model.predict_proba(images) - expected).max() < 1e-12


@needs_libmr
def test_weibull_equals_recorded_libmr_value():
    scale, shape, location = fit_tail(np.array([6.0, 8.0, 10.0]))
    assert (scale, shape) == (3.387857964985435, 1.9212484258227571)
    assert location == 5.0  # smallest - 1


def test_scipy_engine_equals_recorded_libmr_value():
    scale, shape = fit_tail_scipy(np.array([6.0, 8.0, 10.0]))
    assert scale == pytest.approx(3.387857964985435, rel=2e-5)
    assert shape == pytest.approx(1.9212484258227571, rel=2e-5)


@needs_libmr
@pytest.mark.parametrize("scale", [0.1, 1, 30])
@pytest.mark.parametrize("tail_size", [5, 20, 200])
def test_scipy_engine_equals_live_libmr(tail_size, scale):
    for seed in range(20):
        tail = np.random.default_rng(seed).gamma(2, scale, tail_size)
        model = libmr.MR()
        model.fit_high(tail.tolist(), tail_size)
        assert fit_tail_scipy(tail) == pytest.approx(model.get_params()[:2], rel=2e-5)


@needs_libmr
def test_cdf_equals_live_libmr_w_score():
    tail = np.random.default_rng(0).gamma(2, 1, 20)
    model = libmr.MR()
    model.fit_high(tail.tolist(), 20)
    weibull = openmax.Weibull(*fit_tail(tail))
    distances = np.linspace(-1, 30, 500)
    expected = [model.w_score(d) for d in distances]
    assert np.abs(weibull.cdf(distances) - expected).max() < 1e-15


def test_whole_model_is_the_same_with_either_engine(monkeypatch):
    train, labels = make_activations(0)
    with_default = OpenMax().fit(train, labels).predict_proba(train)
    monkeypatch.setattr(openmax, "libmr", None)
    with_scipy = OpenMax().fit(train, labels).predict_proba(train)
    assert np.abs(with_default - with_scipy).max() < 1e-5


def test_mean_activations_use_correctly_classified_images_only():
    train, labels = make_activations(0)
    correct = train[:, :6].argmax(axis=1) == labels
    assert not correct.all()
    spoilt = train.copy()
    spoilt[~correct, 6:] += 1e3
    a, b = OpenMax().fit(train, labels), OpenMax().fit(spoilt, labels)
    assert np.array_equal(a.mean_activations_, b.mean_activations_)
    expected = [train[correct & (labels == c)].mean(axis=0) for c in range(6)]
    assert a.mean_activations_ == pytest.approx(np.array(expected), abs=1e-12)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("alpha", [0, 6])
def test_permuting_classes_permutes_probabilities(distance, alpha):
    train, labels = make_activations(2)
    order = np.random.default_rng(0).permutation(6)
    permuted = np.hstack([train[:, :6][:, order], train[:, 6:]])
    a = OpenMax(20, alpha, distance).fit(train, labels).predict_proba(train)
    b = (
        OpenMax(20, alpha, distance)
        .fit(permuted, np.argsort(order)[labels])
        .predict_proba(permuted)
    )
    assert np.abs(a[:, [*order, UNKNOWN]] - b).max() < 1e-9


@pytest.mark.parametrize("alpha", [0, 4])
@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e4))
def test_rows_are_probabilities_at_any_scale(alpha, seed, scale):
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=(50, 4))
    probabilities = recalibrate(logits, rng.uniform(size=(50, 4)), alpha)
    assert np.isfinite(probabilities).all()
    assert (probabilities >= -1e-12).all()
    assert probabilities.sum(axis=1) == pytest.approx(1, abs=1e-9)


def test_no_tail_mass_reduces_to_softmax():
    logits = np.random.default_rng(0).normal(size=(30, 5))
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert recalibrate(logits, np.zeros_like(logits))[:, :UNKNOWN] == pytest.approx(softmax)
    with_unknown = recalibrate(logits, np.zeros_like(logits), alpha=5)
    assert with_unknown[:, :UNKNOWN] / with_unknown[:, :UNKNOWN].sum(axis=1, keepdims=True) == (
        pytest.approx(softmax)
    )


def test_batch_and_order_of_images_do_not_matter():
    train, labels = make_activations(3)
    images, _ = make_activations(4)
    model = OpenMax().fit(train, labels)
    together = model.predict_proba(images)
    one_by_one = np.vstack([model.predict_proba(row[None]) for row in images[::-1]])[::-1]
    assert np.array_equal(together, one_by_one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, y, {"tail_size": 1000}), "tail_size is 1000; expected 5.."),
        (lambda x, y: (x, y, {"tail_size": 3}), "tail_size is 3; expected 5.."),
        (lambda x, y: (x, y, {"alpha": 7}), "alpha is 7; expected 0..6"),
        (lambda x, y: (x, y, {"distance": "manhattan"}), "distance is 'manhattan'"),
        (lambda x, y: (x, y[:-1], {}), "labels have shape"),
        (lambda x, y: (x, y.astype(float), {}), "type float64"),
        (lambda x, y: (x, y - 1, {}), r"labels lie in -1\.\.4"),
        (lambda x, y: (x, y * 9, {}), r"labels lie in 0\.\.45; expected 0\.\.14"),
        (lambda x, y: (np.where(x > 3, np.nan, x), y, {}), "NaN or infinity"),
        (lambda x, y: (x[:, 0], y, {}), "activations have shape"),
        (lambda x, y: (x, np.where(y == 2, 3, y), {}), "class 2 has no"),  # a class without images
        (lambda x, y: (np.where(y[:, None] == 1, x[60], x), y, {}), "class "),  # equal distances
    ],
)
def test_fit_refuses_what_it_cannot_fit(change, message):
    x, y, options = change(*make_activations(0))
    with pytest.raises(ValueError, match=message):
        OpenMax(**options).fit(x, y)


@pytest.mark.parametrize(
    "bad", [np.full(20, 3.0), np.array([1, 2, 3, np.nan, 5.0]), [1, np.inf, 2, 3, 4]]
)
def test_tail_without_a_weibull_is_refused(bad):
    with pytest.raises(ValueError, match="no Weibull fits"):
        fit_tail(np.asarray(bad, float))


def test_cosine_with_an_all_zero_vector_is_refused():
    train, labels = make_activations(0)
    model = OpenMax(distance="cosine").fit(train, labels)
    with pytest.raises(ValueError, match="all-zero"):
        model.predict_proba(np.zeros_like(train))


def test_distances_equal_their_definitions():
    train, labels = make_activations(0)
    images = make_activations(1)[0][::20]
    correct = train[:, :6].argmax(axis=1) == labels
    x, own = train[correct], labels[correct]
    means = np.array([x[own == c].mean(axis=0) for c in range(6)])
    inverse = LedoitWolf(assume_centered=True).fit(x - means[own]).precision_
    definitions = {
        "euclidean": spd.euclidean,
        "cosine": spd.cosine,
        "eucos": lambda a, b: spd.euclidean(a, b) / 200 + spd.cosine(a, b),
        "mahalanobis": lambda a, b: spd.mahalanobis(a, b, inverse),
    }
    assert set(definitions) == set(DISTANCES)
    for name, definition in definitions.items():
        expected = np.array([[definition(image, mean) for mean in means] for image in images])
        distances = OpenMax(distance=name).fit(train, labels).distances(images)
        assert distances == pytest.approx(expected, abs=1e-9)


def make_levels(seed):
    """Activation vectors of 6 logits and 3 levels of 4 latents."""
    return make_activations(seed, latents=12)


def test_dhr_openmax_equals_its_formula():
    """log odds = log(p_unknown / (1 - p_unknown)) + sum over l of -log(1 - w_l) - offset."""
    (train, labels), (held_out, _), (images, _) = map(make_levels, range(3))
    model = DHROpenMax().fit(train, labels, held_out)
    openmax_y = OpenMax(20, alpha=6, distance="mahalanobis").fit(train[:, :6], labels)
    correct = train[:, :6].argmax(axis=1) == labels

    def log_odds(rows):
        unknown = openmax_y.predict_proba(rows[:, :6])[:, UNKNOWN]
        total = np.log(unknown / (1 - unknown))
        for level in range(3):
            columns = slice(6 + 4 * level, 10 + 4 * level)
            z, own = train[correct, columns], labels[correct]
            means = np.array([z[own == c].mean(axis=0) for c in range(6)])
            inverse = LedoitWolf(assume_centered=True).fit(z - means[own]).precision_

            def distances(x, means=means, inverse=inverse, columns=columns):
                return [
                    spd.mahalanobis(row[columns], means[row[:6].argmax()], inverse) for row in x
                ]

            weibull = openmax.Weibull(*fit_tail(np.sort(distances(held_out))[-20:]))
            total -= np.log(1 - weibull.cdf(distances(rows)))
        return total

    offset = np.sort(log_odds(held_out))[int(np.ceil(0.95 * len(held_out))) - 1]
    expected = log_odds(images) - offset
    assert model.decision_function(images) == pytest.approx(expected, abs=1e-9)
    probabilities = model.predict_proba(images)
    assert probabilities[:, UNKNOWN] == pytest.approx(1 / (1 + np.exp(-expected)), abs=1e-12)
    assert probabilities.sum(axis=1) == pytest.approx(1, abs=1e-12)


def test_dhr_openmax_accepts_the_given_share_of_held_out_images():
    (train, labels), (held_out, _) = make_levels(0), make_levels(1)
    model = DHROpenMax(accepted_share=0.9).fit(train, labels, held_out)
    accepted = model.predict_proba(held_out)[:, UNKNOWN] <= 0.5
    assert accepted.mean() == pytest.approx(0.9, abs=1 / len(held_out))


def test_far_latents_make_an_image_unknown_whatever_the_logits():
    (train, labels), (held_out, _) = make_levels(0), make_levels(1)
    model = DHROpenMax().fit(train, labels, held_out)
    far = train.copy()
    far[:, 6:10] += 100
    assert (model.predict_proba(far)[:, UNKNOWN] > 0.999).all()
    extreme = np.hstack([1e4 * train[:, :6], train[:, 6:]])
    assert np.isfinite(model.predict_proba(extreme)).all()


def test_dhr_openmax_refuses_columns_that_do_not_split():
    train, labels = make_levels(0)
    with pytest.raises(ValueError, match="3 equal levels"):
        DHROpenMax().fit(train[:, :-1], labels, train[:, :-1])
