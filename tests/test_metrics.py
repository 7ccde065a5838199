"""Metrics against their definitions, scikit-learn, and cases worked out by hand."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

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

PAIR_METRICS = [auroc, aupr_known, aupr_unknown, fpr_at_95_tpr, detection_error]
few_scores = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=30)  # with many ties
cases = settings(max_examples=30, deadline=None, derandomize=True)


def test_perfect_separation():
    known, unknown = [0.1, 0.2, 0.3], [0.7, 0.8]
    assert auroc(known, unknown) == 1
    assert aupr_known(known, unknown) == aupr_unknown(known, unknown) == 1
    assert fpr_at_95_tpr(known, unknown) == 0
    assert detection_error(known, unknown) == 0
    assert oscr(known, [True, True, False], unknown) == pytest.approx(2 / 3)


@cases
@given(few_scores, few_scores)
def test_auroc_counts_ties_half(known, unknown):
    pairs = [(u > k) + 0.5 * (u == k) for k in known for u in unknown]
    assert auroc(known, unknown) == pytest.approx(np.mean(pairs))


@cases
@given(few_scores, few_scores)
def test_swapping_the_arguments_gives_one_minus_auroc(known, unknown):
    assert auroc(known, unknown) == pytest.approx(1 - auroc(unknown, known))


@cases
@given(few_scores)
def test_threshold_is_the_smallest_score_accepting_95_percent(known):
    threshold = threshold_accepting(known)
    assert np.mean(np.array(known) <= threshold) >= 0.95
    smaller = [score for score in known if score < threshold]
    assert len(smaller) < 0.95 * len(known)


@cases
@given(few_scores, few_scores)
def test_fpr_is_the_share_of_unknown_images_at_that_threshold(known, unknown):
    expected = sum(score <= threshold_accepting(known) for score in unknown) / len(unknown)
    assert fpr_at_95_tpr(known, unknown) == expected


@cases
@given(few_scores, few_scores)
def test_detection_error_is_the_best_mean_of_both_errors(known, unknown):
    truth = [0] * len(known) + [1] * len(unknown)
    fpr, tpr, _ = roc_curve(truth, known + unknown, drop_intermediate=False)
    assert detection_error(known, unknown) == pytest.approx(((fpr + 1 - tpr) / 2).min())


@cases
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
    labels = [0, 1, 1, UNKNOWN, UNKNOWN]
    probabilities = [[0.6, 0.3, 0.1], [0.6, 0.7, 0.3], [0.4, 0.3, 0.5], [0, 0.2, 0.7], [0, 0.9, 0]]
    # yes to class 0: images 0 and 1; to class 1: images 1 and 4; to unknown: image 3
    assert macro_f1_at_half(labels, probabilities) == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)


def test_a_class_without_images_or_answers_counts_0_in_both_macro_f1():
    assert macro_f1([0, 1], [0, 1], 3) == 2 / 4
    assert macro_f1_at_half([0], [[0.9, 0.1, 0.0]]) == 1 / 3


def test_open_set_metrics_apply_the_given_threshold():
    """Three known images are right; one of class 1 is taken for class 0."""
    known = Scores(
        np.array([0.1, 0.6, 0.3, 0.2]),
        np.array([[0.9, 0.0, 0.1], [0.1, 0.3, 0.6], [0.2, 0.5, 0.3], [0.8, 0.0, 0.2]]),
    )
    unknown = Scores(np.array([0.7]), np.array([[0.2, 0.1, 0.7]]))
    labels = np.array([0, 1, 1, 1])
    metrics = open_set_metrics(known, labels, unknown, threshold=0.65)
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 4 / 5 + 1) / 3)
    assert metrics["oscr"] == 3 / 4
    assert metrics["auroc"] == metrics["aupr_known"] == metrics["aupr_unknown"] == 1
    assert metrics["fpr_at_95_tpr"] == metrics["detection_error"] == 0
    assert metrics["macro_f1_at_half"] == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)
    metrics = open_set_metrics(known, labels, unknown, threshold=0.5)
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)


def test_score_at_the_threshold_is_accepted_as_known():
    scores = Scores(np.array([0.4, 0.5, 0.6]), np.array([[0.2, 0.3, 0.5]] * 3))
    assert scores.predict(0.5).tolist() == [1, 1, UNKNOWN]


def test_threshold_and_predictions_take_infinite_scores():
    scores = Scores(np.array([-np.inf, 0.0, np.inf]), np.array([[0.9, 0.1]] * 3))
    assert scores.predict(0).tolist() == [0, 0, UNKNOWN]
    assert scores.predict(threshold_accepting(scores.unknownness)).tolist() == [0, 0, 0]
    assert scores.predict(-np.inf).tolist() == [UNKNOWN] * 3


def test_infinite_scores_are_the_most_and_least_unknown():
    known, unknown = np.array([-np.inf, 0, 1, np.inf]), np.array([0.5, np.inf, np.inf])
    finite = np.clip(known, -9, 9), np.clip(unknown, -9, 9)
    for metric in PAIR_METRICS:
        assert metric(known, unknown) == metric(*finite)
    correct = [True, True, False, True]
    assert oscr(known, correct, unknown) == oscr(finite[0], correct, finite[1])


def test_metrics_depend_on_the_order_of_scores_alone():
    rng = np.random.default_rng(0)
    known, unknown = rng.normal(size=300), rng.normal(1, 1, 200)
    correct = rng.random(300) < 0.8
    for transform in (np.exp, lambda x: 6e299 * np.arctan(x), lambda x: 1e-300 * x):
        for metric in PAIR_METRICS:
            assert metric(transform(known), transform(unknown)) == metric(known, unknown)
        expected = oscr(known, correct, unknown)
        assert oscr(transform(known), correct, transform(unknown)) == expected


def test_negated_scores_swap_known_and_unknown():
    rng = np.random.default_rng(1)
    known, unknown = rng.normal(size=300).round(1), rng.normal(1, 1, 200).round(1)
    assert aupr_known(known, unknown) == pytest.approx(aupr_unknown(-unknown, -known), abs=1e-12)
    truth, joined = np.repeat([0, 1], [300, 200]), np.append(known, unknown)
    expected = average_precision_score(truth, joined), average_precision_score(1 - truth, -joined)
    assert (aupr_unknown(known, unknown), aupr_known(known, unknown)) == pytest.approx(expected)


def test_average_precision_never_rounds_above_1():
    for seed in range(30):
        known = np.random.default_rng(seed).uniform(-2, -1, 50 + seed)
        assert aupr_known(known, -known) <= 1
        assert aupr_unknown(known, -known) <= 1


def test_float32_and_float64_scores_are_compared_in_float64():
    """0.1 is below its float32 rounding: the unknown image is rejected, not accepted."""
    known, unknown = np.array([0.1]), np.array([0.1], np.float32)
    assert fpr_at_95_tpr(known, unknown) == 0
    assert auroc(known, unknown) == 1
    assert Scores(unknown, np.array([[0.9, 0.1]])).predict(0.1) == [UNKNOWN]


@pytest.mark.parametrize("function", PAIR_METRICS)
@pytest.mark.parametrize("bad", [[], 0.1, [[0.1, 0.2]], [0.1, float("nan")]])
def test_scores_of_another_shape_or_nan_are_refused(function, bad):
    with pytest.raises(ValueError, match="scores of shape"):
        function(bad, [0.5])
    with pytest.raises(ValueError, match="scores of shape"):
        function([0.5], bad)


def test_oscr_takes_zeros_and_ones_as_bools():
    assert oscr([0.1, 0.2], [1, 0], [0.3]) == oscr([0.1, 0.2], [True, False], [0.3]) == 0.5


@pytest.mark.parametrize("stray", [2, -2])
def test_labels_beyond_the_classes_are_refused(stray):
    with pytest.raises(ValueError, match=f"hold {stray}; expected -1..1"):
        macro_f1([0, 1, UNKNOWN], [0, 1, stray], 2)
