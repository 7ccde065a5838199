"""OpenMax against a literal loop with libMR, recorded values, and its own promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import make_activations
from peers import loop_openmax
from scipy.spatial import distance as spd
from scipy.special import softmax
from sklearn.covariance import LedoitWolf

import openmax
from openmax import DISTANCES, UNKNOWN, OpenMax, Weibull, fit_tail, fit_weibulls, recalibrate

libmr = openmax.libmr
needs_libmr = pytest.mark.skipif(libmr is None, reason="libMR is not installed")


def fitted(train, labels, **settings):
    return OpenMax(**{"num_logits": 6, **settings}).fit(train, labels)


def are_probabilities(rows):
    return (rows >= 0).all() and np.abs(rows.sum(axis=1) - 1).max() < 1e-12


@needs_libmr
@pytest.mark.parametrize("alpha", [0, 1, 3, 6])
@pytest.mark.parametrize("tail_size", [5, 20])
def test_equals_literal_loop_with_libmr(alpha, tail_size):
    train, labels = make_activations(0, per_class=120)  # so many that tails are not shortened
    images, _ = make_activations(1)
    images *= np.linspace(0.2, 2, len(images))[:, None]
    model = fitted(train, labels, tail_size=tail_size, alpha=alpha)
    expected = loop_openmax(train, labels, images, 6, tail_size, alpha)
    assert np.abs(model.predict_proba(images) - expected).max() < 1e-12


@needs_libmr
def test_weibull_equals_recorded_libmr_value():
    scale, shape, location = fit_tail(np.array([6.0, 8.0, 10.0]))
    assert (scale, shape) == (3.387857964985435, 1.9212484258227571)
    assert location == 5.0  # smallest - 1


def test_scipy_engine_equals_recorded_libmr_value():
    scale, shape = openmax.fit_tail_scipy(np.array([6.0, 8.0, 10.0]))
    assert scale == pytest.approx(3.387857964985435, rel=2e-5)
    assert shape == pytest.approx(1.9212484258227571, rel=2e-5)


@needs_libmr
def test_cdf_equals_live_libmr_w_score():
    tail = np.random.default_rng(0).gamma(2, 1, 20)
    model = libmr.MR()
    model.fit_high(tail.tolist(), 20)
    distances = np.linspace(-1, 30, 500)
    expected = [model.w_score(d) for d in distances]
    assert np.abs(Weibull(*fit_tail(tail)).cdf(distances) - expected).max() < 1e-15


def odd_tail(seed):
    """A tail of 5 to 500 values: smooth, tied, nearly equal, of any scale, or with an outlier."""
    rng = np.random.default_rng(seed)
    values = rng.gamma(rng.choice([0.05, 0.5, 2, 50]), 1, rng.choice([5, 6, 20, 500]))
    kind = seed % 6
    if kind == 1:
        values = np.round(values * 3) / 3
    elif kind == 2:
        values = 1 + values * 10.0 ** rng.uniform(-17, 0)
    elif kind == 3:
        values[0] += 10.0 ** rng.uniform(0, 17)
    elif kind == 4:
        values = 10.0 ** rng.uniform(-20, 14, len(values))
    elif kind == 5:
        values[1:] = values[0] + 1
    return values * (10.0 ** rng.uniform(-8, 8) if rng.random() < 0.5 else 1)


def fit_or_none(tail):
    try:
        return fit_tail(tail)
    except ValueError:
        return None


@needs_libmr
def test_both_engines_fit_the_same_weibull_or_refuse_the_same_tail(monkeypatch):
    tails = [odd_tail(seed) for seed in range(300)]
    with_libmr = [fit_or_none(tail) for tail in tails]
    monkeypatch.setattr(openmax, "libmr", None)
    with_scipy = [fit_or_none(tail) for tail in tails]
    assert sum(fit is None for fit in with_libmr) > 10
    for tail, one, other in zip(tails, with_libmr, with_scipy, strict=True):
        assert (one is None) == (other is None)
        if one:
            # libMR stops at 2e-6 of sigma = 1 / (shape * range of log t)
            sigma = 1 / (np.log1p(np.ptp(tail)) * np.array([one[1], other[1]]))
            assert sigma[0] == pytest.approx(sigma[1], abs=1e-5, rel=1e-5)


def test_scipy_engine_fits_the_likeliest_weibull():
    for seed in range(0, 60, 6):
        tail = odd_tail(seed)
        log_t = np.log1p(tail - tail.min())
        z, spread = log_t - log_t.max(), np.ptp(log_t)

        def log_likelihood(shape, z=z, spread=spread):  # with the best scale for that shape
            return np.log(shape * spread) - np.log(np.mean(np.exp(shape * z))) + shape * z.mean()

        _, shape = openmax.fit_tail_scipy(tail)
        for factor in (0.99, 1.01):
            assert log_likelihood(shape * factor) < log_likelihood(shape)


@pytest.mark.parametrize("engine", ["libmr", "scipy"])
@pytest.mark.parametrize(
    "tail",
    [
        np.full(20, 3.0),
        np.array([1, 2, 3, np.nan, 5]),
        np.array([1, np.inf, 2, 3, 4]),
        np.array([3.0] * 10 + [np.nextafter(3, 4)] * 10),
        1e-17 * np.arange(20),
        1e8 + 1e-6 * np.arange(20),
        1e17 * np.arange(20),
        np.append(np.arange(19), 1e300),
    ],
    ids=["equal", "nan", "inf", "one_ulp", "tiny", "digits_lost", "huge", "outlier"],
)
def test_tails_that_rounding_decides_are_refused(monkeypatch, engine, tail):
    if engine == "scipy":
        monkeypatch.setattr(openmax, "libmr", None)
    with pytest.raises(ValueError, match=f"no Weibull fits the {len(tail)} largest distances"):
        fit_tail(tail)


def test_a_fit_that_fails_in_libmr_is_refused(monkeypatch):
    class Failing:
        MR = type("MR", (), {"fit_high": lambda *_: None, "get_params": lambda _: (0.0,) * 5})

    monkeypatch.setattr(openmax, "libmr", Failing)
    with pytest.raises(ValueError, match="no Weibull fits"):
        fit_tail(np.arange(20.0))


@pytest.mark.parametrize(
    ("count", "tail"), [(5, 5), (20, 5), (24, 6), (79, 19), (80, 20), (5000, 20)]
)
def test_tail_is_at_most_the_far_quarter_and_20_from_80_images_on(count, tail):
    assert openmax.adapted_tail_size(20, count) == tail
    distances = np.random.default_rng(count).gamma(2, 1, count)
    expected = fit_tail(np.sort(distances)[-tail:])
    weibull = fit_weibulls([distances], 20, ["a"])
    assert np.ravel(weibull) == pytest.approx(expected, rel=1e-12)


def test_arrays_without_a_tail_are_named():
    good = np.arange(30.0)
    with pytest.raises(ValueError, match="level 2: 4 images; expected at least 5"):
        fit_weibulls([good, good[:4]], 20, ["level 1", "level 2"])
    with pytest.raises(ValueError, match="level 2: no Weibull fits"):
        fit_weibulls([good, np.ones(30)], 20, ["level 1", "level 2"])


def test_w_grows_with_distance_and_hazards_stay_finite():
    weibull = Weibull(*np.array([[1e-8, 1.0, 1e8], [0.01, 3.0, 1e9], [-1e8, 0.0, 1e8]]))
    distances = np.append(-1e300, np.geomspace(1e-8, 1e300, 99))[:, None]
    distances = np.vstack([distances, np.inf]) + np.zeros(3)
    for values in (weibull.cdf(distances), weibull.hazard(distances)):
        assert (np.diff(values, axis=0) >= 0).all()
        assert (values[0] == 0).all()
    assert (weibull.cdf(np.inf) == 1).all()
    assert np.isfinite(weibull.hazard(distances).sum(axis=1)).all()


def test_mean_activations_use_correctly_classified_images_only():
    train, labels = make_activations(0)
    correct = train[:, :6].argmax(axis=1) == labels
    assert not correct.all()
    spoilt = train.copy()
    spoilt[~correct, 6:] += 1e3
    a, b = fitted(train, labels), fitted(spoilt, labels)
    assert np.array_equal(a.mean_activations_, b.mean_activations_)
    assert np.array_equal(a.weibull_, b.weibull_)
    expected = [train[correct & (labels == c)].mean(axis=0) for c in range(6)]
    assert a.mean_activations_ == pytest.approx(np.array(expected), abs=1e-12)


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
    assert tuple(definitions) == DISTANCES
    for name, definition in definitions.items():
        expected = np.array([[definition(image, mean) for mean in means] for image in images])
        distances = fitted(train, labels, distance=name).distances(images)
        assert distances == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("distance", ["cosine", "eucos"])
def test_cosine_with_an_all_zero_vector_is_refused(distance):
    train, labels = make_activations(0)
    model = fitted(train, labels, distance=distance)
    with pytest.raises(ValueError, match="all-zero"):
        model.predict_proba(np.zeros_like(train))


def test_equal_images_of_a_class_have_no_covariance():
    train, labels = np.eye(6).repeat(10, axis=0), np.arange(6).repeat(10)
    with pytest.raises(ValueError, match="differ too little"):
        fitted(train, labels, distance="mahalanobis")


@pytest.mark.parametrize("num_logits", [0, 6])
@pytest.mark.parametrize("alpha", [0, 6])
@pytest.mark.parametrize("distance", DISTANCES)
def test_permuting_classes_permutes_probabilities(distance, alpha, num_logits):
    train, labels = make_activations(2)
    order = np.random.default_rng(0).permutation(6)
    permuted = np.hstack([train[:, :6][:, order], train[:, 6:]])
    model = OpenMax(20, alpha, distance, num_logits)
    a = model.fit(train, labels).predict_proba(train)
    b = model.fit(permuted, np.argsort(order)[labels]).predict_proba(permuted)
    assert np.abs(a[:, [*order, UNKNOWN]] - b).max() < 1e-9


@pytest.mark.parametrize("num_logits", [0, 6])
@pytest.mark.parametrize("distance", DISTANCES)
def test_batch_and_order_of_images_do_not_matter(distance, num_logits):
    train, labels = make_activations(3)
    images, _ = make_activations(4, per_class=400)  # more than one block of rows
    model = fitted(train, labels, distance=distance, num_logits=num_logits)
    together = model.predict_proba(images)
    one_by_one = np.vstack([model.predict_proba(row[None]) for row in images[::-60]])
    assert np.abs(together[::-60] - one_by_one).max() < 1e-12


@pytest.mark.parametrize("alpha", [0, 1, 4])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.floats(-8, 8))
def test_rows_are_probabilities_at_any_scale(alpha, seed, exponent):
    rng = np.random.default_rng(seed)
    logits = 10.0**exponent * rng.integers(-3, 4, size=(50, 4))  # with ties
    assert are_probabilities(recalibrate(logits, rng.choice([0, 0.3, 1], (50, 4)), alpha))


@pytest.mark.parametrize("alpha", [0, 6])
@pytest.mark.parametrize("num_logits", [0, 6])
def test_activations_of_1e4_give_probabilities(alpha, num_logits):
    train, labels = make_activations(0)
    model = fitted(train, labels, alpha=alpha, num_logits=num_logits)
    assert are_probabilities(model.predict_proba(1e4 * train))
    assert are_probabilities(model.predict_proba(-1e4 * train))


def test_no_tail_mass_reduces_to_softmax():
    logits = np.random.default_rng(0).normal(size=(30, 5))
    plain = softmax(logits, axis=1)
    assert recalibrate(logits, np.zeros_like(logits))[:, :UNKNOWN] == pytest.approx(plain)
    known = recalibrate(logits, np.zeros_like(logits), alpha=5)[:, :UNKNOWN]
    assert known / known.sum(axis=1, keepdims=True) == pytest.approx(plain)


@pytest.mark.parametrize("num_classes", [1, 2, 300])
def test_any_number_of_classes(num_classes):
    train, labels = make_activations(0, num_classes, per_class=8)
    train[np.arange(len(labels)), labels] += 10
    for alpha in (0, num_classes):
        model = OpenMax(5, alpha, num_logits=num_classes).fit(train, labels)
        probabilities = model.predict_proba(train)
        assert probabilities.shape == (len(train), num_classes + 1)
        assert are_probabilities(probabilities)
        assert np.isin(model.predict(train), [*range(num_classes), UNKNOWN]).all()
