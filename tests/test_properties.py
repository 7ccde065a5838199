"""Properties of openmax.py and metrics.py over random inputs: either right, or refused."""

import os

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score
from test_openmax import loop_openmax, make_levels, needs_libmr

import metrics
import openmax
from metrics import Scores, aupr_known, aupr_unknown, auroc, detection_error, fpr_at_95_tpr, oscr
from openmax import DISTANCES, UNKNOWN, DHROpenMax, OpenMax, Weibull, fit_tail, recalibrate

CASES = int(os.environ.get("FUZZ_CASES", "100"))
cases = settings(max_examples=CASES, deadline=None, derandomize=CASES == 100)
few_cases = settings(cases, max_examples=max(30, CASES // 10))
seeds = st.integers(0, 2**32 - 1)
scales = st.floats(-8, 8).map(lambda exponent: 10.0**exponent)
PAIR_METRICS = [auroc, aupr_known, aupr_unknown, fpr_at_95_tpr, detection_error]
TAIL_SIZE = 5


def activations(seed, num_classes, scale, dtype=np.float64, extra=3, per_class=8):
    """Images of separated classes, `per_class` each, so that every class has its tail."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(num_classes), per_class))
    vectors = rng.normal(size=(len(labels), num_classes + extra))
    vectors[np.arange(len(labels)), labels] += 12
    return (scale * vectors).astype(dtype), labels


@st.composite
def problems(draw, max_classes=12):
    num_classes = draw(st.integers(1, max_classes))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    arguments = num_classes, draw(scales), dtype, draw(st.integers(0, 4))
    train, labels = activations(draw(seeds), *arguments)
    images, _ = activations(draw(seeds), *arguments)
    alpha = draw(st.integers(0, num_classes))
    return train, labels, images, alpha


def are_probabilities(rows):
    return (rows >= 0).all() and (rows <= 1).all() and np.abs(rows.sum(axis=1) - 1).max() < 1e-12


@few_cases
@given(problems(), st.sampled_from(DISTANCES))
def test_rows_are_probabilities_whatever_the_scale(problem, distance):
    train, labels, images, alpha = problem
    try:
        model = OpenMax(TAIL_SIZE, alpha, distance).fit(train, labels)
    except ValueError as refusal:  # one class has but one cosine, say
        assert any(reason in str(refusal) for reason in ("no Weibull", "all-zero"))  # noqa: PT017
        return
    for x in (images, 1e6 * images, np.float32(images)):
        assert are_probabilities(model.predict_proba(x))


@pytest.mark.parametrize("num_classes", [1, 2, 300, 1000])
@pytest.mark.parametrize("alpha", [0, 1])
def test_any_number_of_classes_from_one_to_a_thousand(num_classes, alpha):
    train, labels = activations(0, num_classes, 1.0, per_class=TAIL_SIZE)
    model = OpenMax(TAIL_SIZE, alpha * num_classes).fit(train, labels)
    probabilities, labels = model.predict_proba(train[:200]), labels[:200]
    assert probabilities.shape == (len(labels), num_classes + 1)
    assert are_probabilities(probabilities)
    if not alpha:
        known = probabilities[:, :UNKNOWN].argmax(axis=1)
        assert (known == labels)[probabilities[:, UNKNOWN] < 0.5].all()


@needs_libmr
@few_cases
@given(problems(max_classes=6))
def test_equals_the_loop_with_live_libmr(problem):
    train, labels, images, alpha = problem
    assume(np.abs(train).max() > 1e-3)  # libMR loses digits below
    if alpha:
        assume(np.abs(images).max() < 1e3)  # the loop's exponentials of ranked logits
    num_classes = labels.max() + 1
    expected = loop_openmax(
        train.astype(float), labels, images.astype(float), TAIL_SIZE, alpha, num_classes
    )
    got = OpenMax(TAIL_SIZE, alpha).fit(train, labels).predict_proba(images)
    assert np.abs(got - expected).max() < 1e-7  # 1e-12 at scale 1, in test_openmax.py


@few_cases
@given(problems(), st.sampled_from(DISTANCES), st.integers(1, 40), st.randoms())
def test_order_batches_and_row_count_change_nothing(problem, distance, batch_size, random):
    train, labels, images, alpha = problem
    assume(1e-3 < np.abs(train).max() < 1e4)
    assume(train.shape[1] > 1)  # one column has but one cosine
    model = OpenMax(TAIL_SIZE, alpha, distance).fit(train, labels)
    whole = model.predict_proba(images)
    order = random.sample(range(len(images)), len(images))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    split = np.vstack([model.predict_proba(images[batch]) for batch in batches])
    assert np.abs(split - whole[order]).max() < 1e-12


def test_scores_do_not_follow_the_batch_as_those_of_pytorch_ood_do():
    """pytorch-ood 0.4.0 leaves the distance to a class at 0 where no image of the batch is
    predicted as it: one at a time, unknown scores of these 200 images move by up to 0.89, with the
    package itself as with this imitation."""
    rng = np.random.default_rng(0)
    train, images = rng.normal(size=(1000, 10)), rng.normal(size=(200, 10))
    labels = np.arange(1000) // 100
    train[np.arange(1000), labels] += 6
    images[np.arange(200), np.arange(200) % 10] += 4
    model = OpenMax(20, 10).fit(train, labels)

    def as_pytorch_ood(batch):
        distances = model.distances(batch)
        distances[:, np.setdiff1d(np.arange(10), batch.argmax(axis=1))] = 0
        return recalibrate(batch, model.weibull_.cdf(distances), 10)

    def change(probabilities):
        alone = np.vstack([probabilities(image) for image in np.split(images, len(images))])
        return np.abs(alone - probabilities(images))[:, UNKNOWN].max()

    assert np.array_equal(as_pytorch_ood(images), model.predict_proba(images))
    assert change(as_pytorch_ood) > 0.8
    assert change(model.predict_proba) < 1e-12


@few_cases
@given(seeds, st.integers(1, 40), st.randoms())
def test_order_and_batches_do_not_change_dhr_openmax(seed, batch_size, random):
    (train, labels), (held_out, _), (images, _) = map(make_levels, (seed, seed + 1, seed + 2))
    model = DHROpenMax().fit(train, labels, held_out)
    whole = model.predict_proba(images)
    order = random.sample(range(len(images)), len(images))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    split = np.vstack([model.predict_proba(images[batch]) for batch in batches])
    assert np.abs(split - whole[order]).max() < 1e-12


@few_cases
@given(problems(), st.randoms())
def test_order_of_training_images_does_not_matter(problem, random):
    train, labels, images, alpha = problem
    assume(1e-3 < np.abs(train).max() < 1e4)
    order = random.sample(range(len(train)), len(train))
    a, b = (OpenMax(TAIL_SIZE, alpha).fit(train[i], labels[i]) for i in (slice(None), order))
    assert np.abs(a.predict_proba(images) - b.predict_proba(images)).max() < 1e-7


@few_cases
@given(problems(), st.sampled_from(DISTANCES), st.randoms())
def test_permuting_classes_permutes_probabilities(problem, distance, random):
    train, labels, images, alpha = problem
    assume(1e-3 < np.abs(train).max() < 1e4)
    assume(train.shape[1] > 1)  # one column has but one cosine
    num_classes = int(labels.max()) + 1
    order = np.array(random.sample(range(num_classes), num_classes))

    def permuted(x):
        return np.hstack([x[:, order], x[:, num_classes:]])

    a = OpenMax(TAIL_SIZE, alpha, distance).fit(train, labels)
    b = OpenMax(TAIL_SIZE, alpha, distance).fit(permuted(train), np.argsort(order)[labels])
    difference = a.predict_proba(images)[:, [*order, UNKNOWN]] - b.predict_proba(permuted(images))
    assert np.abs(difference).max() < 1e-5


@cases
@given(seeds, scales, st.sampled_from([0, 1, 3, 5]))
def test_recalibrated_rows_are_probabilities_and_lists_are_arrays(seed, scale, alpha):
    rng = np.random.default_rng(seed)
    logits, w = scale * rng.integers(-3, 4, (20, 5)), rng.choice([0, 0.3, 1], (20, 5))  # ties
    probabilities = recalibrate(logits, w, alpha)
    assert are_probabilities(probabilities)
    assert np.array_equal(recalibrate(logits.tolist(), w.tolist(), alpha), probabilities)


@cases
@given(st.floats(1e-8, 1e8), st.floats(0.01, 1e9), st.floats(-1e8, 1e8), seeds)
def test_a_larger_distance_never_lowers_w(scale, shape, location, seed):
    weibull = Weibull(np.float64(scale), np.float64(shape), np.float64(location))
    rng = np.random.default_rng(seed)
    distances = np.sort(location + rng.normal(size=100) * 10.0 ** rng.uniform(-8, 12, 100))
    for w in (weibull.cdf(distances), weibull.hazard(distances)):
        assert np.isfinite(w).all()
        assert (np.diff(w) >= 0).all()
    assert weibull.cdf(distances[0] - 1e13) == 0
    assert weibull.cdf(1e300) == pytest.approx(1) or shape < 1
    assert weibull.cdf(np.inf) == 1


def extreme_tails(seed):
    """A tail of 5 to 500 values: smooth, tied, nearly equal, of any scale, or with an outlier."""
    rng = np.random.default_rng(seed)
    values = rng.gamma(rng.choice([0.05, 0.5, 2, 50]), 1, rng.choice([5, 6, 20, 500]))
    kind = rng.integers(0, 6)
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


def fit_or_refuse(tail):
    """The fit, or None where it is refused with one clear line."""
    try:
        return fit_tail(tail)
    except ValueError as refusal:
        assert str(refusal).startswith("no Weibull fits")  # noqa: PT017
        return None


@needs_libmr
@cases
@given(seeds)
def test_both_engines_fit_the_same_weibull_or_refuse_the_same_tail(seed):
    tail = extreme_tails(seed)
    with_libmr = fit_or_refuse(tail)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openmax, "libmr", None)
        with_scipy = fit_or_refuse(tail)
    assert (with_libmr is None) == (with_scipy is None)
    if with_libmr is None:
        return
    # libMR stops at 2e-6 of sigma = 1 / (shape * range of log t), and loses digits of t near 1
    spread = np.log1p(np.ptp(tail))
    sigma = 1 / (spread * np.array([with_libmr[1], with_scipy[1]]))
    assert sigma[0] == pytest.approx(sigma[1], abs=1e-5, rel=1e-5)
    w = [Weibull(*map(np.float64, fit)).cdf(tail) for fit in (with_libmr, with_scipy)]
    assert np.abs(w[0] - w[1]).max() < 1e-3


@cases
@given(seeds)
def test_scipy_engine_fits_the_likeliest_weibull(seed):
    tail = extreme_tails(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openmax, "libmr", None)
        fit = fit_or_refuse(tail)
    if fit is None:
        return
    log_t = np.log1p(tail - tail.min())
    z, spread = log_t - log_t.max(), np.ptp(log_t)

    def log_likelihood(shape):  # with the best scale for that shape
        return np.log(shape * spread) - np.log(np.mean(np.exp(shape * z))) + shape * z.mean()

    best = log_likelihood(fit[1])
    for factor in (0.99, 1.01):
        assert log_likelihood(fit[1] * factor) <= best + 1e-12 * abs(best)


@pytest.mark.parametrize("engine", ["libmr", "scipy"])
@pytest.mark.parametrize(
    "tail",
    [
        np.array([3.0] * 10 + [np.nextafter(3, 4)] * 10),
        1e-17 * np.arange(20.0),
        1e8 + 1e-6 * np.arange(20),
        1e17 * np.arange(20.0),
        np.append(np.arange(19.0), 1e300),
        np.array([-1e308, 0, 1, 2, 1e308]),
    ],
    ids=["one_ulp", "scale_1e-17", "digits_lost", "scale_1e17", "outlier_1e300", "overflow"],
)
def test_tails_that_rounding_decides_are_refused(monkeypatch, engine, tail):
    if engine == "scipy":
        monkeypatch.setattr(openmax, "libmr", None)
    with pytest.raises(ValueError, match="no Weibull fits"):
        fit_tail(tail)


@st.composite
def scores(draw):
    """Known and unknown scores: ties, constants, any scale, infinities, float32 or a list."""
    rng = np.random.default_rng(draw(seeds))
    sizes = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    kind = draw(st.sampled_from(["normal", "ties", "constant", "infinite", "wide"]))
    arrays = []
    for size in sizes:
        values = rng.normal(size=size) + len(arrays)
        if kind == "ties":
            values = np.round(values)
        elif kind == "constant":
            values = np.ones(size)
        elif kind == "infinite":
            values[rng.random(size) < 0.3] = rng.choice([-np.inf, np.inf])
        elif kind == "wide":
            values = values * 10.0 ** rng.uniform(-307, 306, size)
        arrays.append(values)
    dtype = draw(st.sampled_from([np.float32, np.float64, list]))
    if dtype is list:
        return tuple(values.tolist() for values in arrays)
    with np.errstate(over="ignore"):
        return tuple(values.astype(dtype) for values in arrays)


@cases
@given(scores())
def test_metrics_equal_scikit_learn(pair):
    known, unknown = map(np.float64, pair)
    assume(np.isfinite(known).all() and np.isfinite(unknown).all())
    truth = np.repeat([0, 1], [len(known), len(unknown)])
    joined = np.concatenate([known, unknown])
    if np.abs(joined).max() < 1e300:
        assert auroc(*pair) == pytest.approx(roc_auc_score(truth, joined), abs=1e-12)
        expected = (
            average_precision_score(truth, joined),
            average_precision_score(1 - truth, -joined),
        )
        assert (aupr_unknown(*pair), aupr_known(*pair)) == pytest.approx(expected, abs=1e-12)


@cases
@given(scores(), st.sampled_from([np.cbrt, np.arctan, lambda x: np.log1p(np.exp(x))]))
def test_strictly_increasing_transforms_change_no_metric(pair, transform):
    values, ranks = np.unique(np.concatenate(list(map(np.float64, pair))), return_inverse=True)
    transformed = transform(np.linspace(-8, 8, len(values)))[ranks]
    new = transformed[: len(pair[0])], transformed[len(pair[0]) :]
    correct = np.random.default_rng(0).random(len(pair[0])) < 0.7
    for metric in PAIR_METRICS:
        assert 0 <= metric(*pair) <= 1
        assert metric(*new) == metric(*pair)
    assert oscr(new[0], correct, new[1]) == oscr(pair[0], correct, pair[1])


@cases
@given(scores(), st.randoms())
def test_order_of_images_changes_no_metric(pair, random):
    correct = np.random.default_rng(0).random(len(pair[0])) < 0.7
    orders = [random.sample(range(len(array)), len(array)) for array in pair]
    shuffled = [np.asarray(a)[order] for a, order in zip(pair, orders, strict=True)]
    for metric in PAIR_METRICS:
        assert metric(*shuffled) == pytest.approx(metric(*pair), abs=1e-12)
    assert oscr(shuffled[0], correct[orders[0]], shuffled[1]) == pytest.approx(
        oscr(pair[0], correct, pair[1]), abs=1e-12
    )


@cases
@given(scores())
def test_swapping_and_negating_follow_the_definitions(pair):
    known, unknown = map(np.float64, pair)
    assert auroc(known, unknown) == pytest.approx(1 - auroc(unknown, known), abs=1e-12)
    assert auroc(known, unknown) == pytest.approx(auroc(-unknown, -known), abs=1e-12)
    assert aupr_known(known, unknown) == pytest.approx(aupr_unknown(-unknown, -known), abs=1e-12)
    assert oscr(known, np.ones(len(known), bool), unknown) == pytest.approx(
        auroc(known, unknown), abs=1e-12
    )


def test_float32_and_float64_scores_are_compared_in_float64():
    """0.1 is below its float32 rounding: the unknown image is rejected, not accepted."""
    known, unknown = np.array([0.1]), np.array([0.1], np.float32)
    assert fpr_at_95_tpr(known, unknown) == 0
    assert auroc(known, unknown) == 1
    assert Scores(unknown, np.array([[0.9, 0.1]])).predict(0.1) == [UNKNOWN]


@cases
@given(seeds, st.integers(1, 1000), st.integers(1, 50))
def test_macro_f1_is_1_for_the_truth_and_ignores_the_order(seed, num_classes, count):
    rng = np.random.default_rng(seed)
    labels = np.append(np.arange(UNKNOWN, num_classes), rng.integers(UNKNOWN, num_classes, count))
    assert metrics.macro_f1(labels, labels, num_classes) == 1
    predictions, order = rng.permutation(labels), rng.permutation(len(labels))
    assert metrics.macro_f1(labels[order], predictions[order], num_classes) == pytest.approx(
        metrics.macro_f1(labels, predictions, num_classes), abs=1e-12
    )


def test_certain_openmax_leaves_dhr_openmax_rows_that_sum_to_1():
    """Logits of 1e4 leave the known classes no probability that float64 can hold."""
    (train, labels), (held_out, _) = make_levels(0), make_levels(1)
    scaled = np.where(np.arange(train.shape[1]) < 6, 1e4, 1.0)
    model = DHROpenMax().fit(train * scaled, labels, held_out * scaled)
    assert are_probabilities(model.predict_proba(held_out * scaled))
    assert are_probabilities(model.predict_proba(train * scaled * 10))
    assert np.isfinite(model.decision_function(1e30 * train)).all()
