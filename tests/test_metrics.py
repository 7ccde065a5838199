"""Metrics against their definitions, scikit-learn, and cases worked out by hand."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from metrics import (
    Scores,
    aupr_known,
    aupr_unknown,
    auroc,
    detection_error,
    fpr_at_95_tpr,
    macro_f1,
    macro_f1_at_half,
    open_set_metrics,
    oscr,
    threshold_accepting,
)
from openmax import UNKNOWN

settings.register_profile("unhurried", deadline=None)  # the machine may be busy
settings.load_profile("unhurried")

few_scores = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=30)  # with many ties


def test_perfect_separation():
    known, unknown = [0.1, 0.2, 0.3], [0.7, 0.8]
    assert auroc(known, unknown) == 1
    assert aupr_known(known, unknown) == aupr_unknown(known, unknown) == 1
    assert fpr_at_95_tpr(known, unknown) == 0
    assert detection_error(known, unknown) == 0
    assert oscr(known, [True, True, False], unknown) == pytest.approx(2 / 3)


@given(few_scores, few_scores)
def test_auroc_counts_ties_half(known, unknown):
    pairs = [(u > k) + 0.5 * (u == k) for k in known for u in unknown]
    assert auroc(known, unknown) == pytest.approx(np.mean(pairs))


@given(few_scores, few_scores)
def test_swapping_the_arguments_gives_one_minus_auroc(known, unknown):
    assert auroc(known, unknown) == pytest.approx(1 - auroc(unknown, known))


@given(few_scores)
def test_threshold_is_the_smallest_score_accepting_95_percent(known):
    threshold = threshold_accepting(known)
    assert np.mean(np.array(known) <= threshold) >= 0.95
    smaller = [score for score in known if score < threshold]
    assert len(smaller) < 0.95 * len(known)


@given(few_scores, few_scores)
def test_fpr_is_the_share_of_unknown_images_at_that_threshold(known, unknown):
    expected = sum(score <= threshold_accepting(known) for score in unknown) / len(unknown)
    assert fpr_at_95_tpr(known, unknown) == expected


@given(few_scores, few_scores)
def test_detection_error_is_the_best_mean_of_both_errors(known, unknown):
    truth = [0] * len(known) + [1] * len(unknown)
    fpr, tpr, _ = roc_curve(truth, known + unknown, drop_intermediate=False)
    assert detection_error(known, unknown) == pytest.approx(((fpr + 1 - tpr) / 2).min())


@given(few_scores, few_scores, st.randoms())
def test_oscr_equals_a_sweep_over_thresholds_in_any_order(known, unknown, random):
    correct = [random.random() < 0.8 for _ in known]
    points = [(0.0, 0.0)]
    for t in sorted({*known, *unknown}):
        ccr = sum(s <= t and ok for s, ok in zip(known, correct, strict=True)) / len(known)
        points.append((sum(s <= t for s in unknown) / len(unknown), ccr))
    area = sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(points))
    assert oscr(known, correct, unknown) == pytest.approx(area)
    order = list(range(len(known)))
    random.shuffle(order)
    shuffled = oscr([known[i] for i in order], [correct[i] for i in order], unknown)
    assert shuffled == pytest.approx(area)


def test_oscr_of_tied_scores_is_half_the_closed_set_accuracy():
    assert oscr([1.0] * 10, [True] * 9 + [False], [1.0] * 10) == pytest.approx(0.45)


def test_oscr_of_a_right_classifier_is_auroc():
    rng = np.random.default_rng(0)
    known, unknown = rng.normal(size=500), rng.normal(1, 1, 400)
    truth = np.repeat([0, 1], [500, 400])
    expected = roc_auc_score(truth, np.concatenate([known, unknown]))
    assert oscr(known, np.ones(500, bool), unknown) == pytest.approx(expected)


def test_macro_f1_by_hand():
    labels = [0, 0, 1, 1, UNKNOWN, UNKNOWN]
    predictions = [0, 1, 1, 1, UNKNOWN, 0]
    f1 = [2 * 1 / (2 * 1 + 1 + 1), 2 * 2 / (2 * 2 + 1), 2 * 1 / (2 * 1 + 1)]
    assert macro_f1(labels, predictions, 2) == pytest.approx(np.mean(f1))


def test_macro_f1_at_half_by_hand():
    labels = [0, 1, UNKNOWN]
    probabilities = [[0.6, 0.3, 0.1], [0.6, 0.1, 0.3], [0.4, 0.3, 0.3]]
    # class 0: one right, one too many; class 1 and unknown: never above a half
    assert macro_f1_at_half(labels, probabilities) == pytest.approx((2 / 3 + 0 + 0) / 3)


def test_expected_macro_f1_of_a_random_rejector():
    """reference figures: at FPR95 25 %, unknown spread evenly, 93 % closed-set accuracy: 0.806."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 1000)
    predictions = np.where(
        rng.random(10_000) < 0.93, labels, (labels + rng.integers(1, 10, 10_000)) % 10
    )
    predictions[rng.random(10_000) < 0.05] = UNKNOWN
    on_unknown = np.where(rng.random(10_000) < 0.25, rng.integers(0, 10, 10_000), UNKNOWN)
    truth = np.concatenate([labels, np.full(10_000, UNKNOWN)])
    assert macro_f1(truth, np.concatenate([predictions, on_unknown]), 10) == pytest.approx(
        0.806, abs=0.005
    )


def test_open_set_metrics_apply_the_given_threshold():
    known = Scores(np.array([0.1, 0.6]), np.array([[0.9, 0.0, 0.1], [0.1, 0.3, 0.6]]))
    unknown = Scores(np.array([0.7]), np.array([[0.2, 0.1, 0.7]]))
    labels = np.array([0, 1])
    assert open_set_metrics(known, labels, unknown, threshold=0.65)["macro_f1"] == 1
    assert open_set_metrics(known, labels, unknown, threshold=0.65)["oscr"] == 1
    assert open_set_metrics(known, labels, unknown, threshold=0.5)["macro_f1"] == pytest.approx(
        (1 + 0 + 2 / 3) / 3
    )


def test_score_at_the_threshold_is_accepted_as_known():
    scores = Scores(np.array([0.4, 0.5, 0.6]), np.array([[0.2, 0.3, 0.5]] * 3))
    assert scores.predict(0.5).tolist() == [1, 1, UNKNOWN]


@pytest.mark.parametrize(
    "function", [auroc, aupr_known, aupr_unknown, fpr_at_95_tpr, detection_error]
)
@pytest.mark.parametrize("bad", [[], [[0.1, 0.2]], [0.1, float("nan")]])
def test_empty_nested_or_nan_scores_are_refused(function, bad):
    with pytest.raises(ValueError, match="scores"):
        function(bad, [0.5])
    with pytest.raises(ValueError, match="scores"):
        function([0.5], bad)
