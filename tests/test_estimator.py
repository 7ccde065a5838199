"""OpenMax as a scikit-learn estimator, and what it says to mistakes in X and y."""

import numpy as np
import pytest
from made_up import make_activations
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from metrics import auroc
from openmax import DISTANCES, UNKNOWN, UNKNOWN_NAME, OpenMax

FEATURES = OpenMax(num_logits=0)  # scikit-learn's checks pass features without logits
NAMES = np.array(["ant", "bee", "cat", "dog", "elk", "fox"])


def expected_failures(estimator):
    failures = {
        "check_classifiers_train": "predict_proba has one more column, of the unknown",
        "check_classifiers_classes": "it fits the label -1, which is reserved for the unknown",
        "check_fit2d_1feature": "its classes have three images; a tail needs five",
    }
    if estimator.distance == "euclidean":
        failures["check_classifiers_one_label"] = "images far from the only class are unknown"
    return failures


@parametrize_with_checks(
    [FEATURES, OpenMax(5, 1, "mahalanobis", num_logits=0)], expected_failed_checks=expected_failures
)
def test_follows_scikit_learn(estimator, check):
    check(estimator)


def test_predict_returns_the_label_of_the_largest_probability():
    train, labels = make_activations(0)
    model = OpenMax(num_logits=6).fit(train, labels)
    images = np.vstack([train, 30 * train])
    columns = model.predict_proba(images).argmax(axis=1)
    predicted = model.predict(images)
    assert np.array_equal(predicted == UNKNOWN, columns == 6)
    assert np.array_equal(predicted[columns < 6], columns[columns < 6])
    assert (predicted[len(train) :] == UNKNOWN).all()
    assert model.score(train, labels) == np.mean(predicted[: len(train)] == labels) > 0.7


@pytest.mark.parametrize(
    ("classes", "unknown"),
    [
        (np.arange(1, 7), UNKNOWN),
        (np.array([3, 10, 20, 30, 200, 255], np.uint8), UNKNOWN),
        (np.array([2.0, 3.0, 5.0, 7.0, 11.0, 13.0]), UNKNOWN),
        (NAMES, UNKNOWN_NAME),
        (NAMES.astype(object), UNKNOWN_NAME),
    ],
    ids=["from_1", "uint8", "floats", "text", "objects"],
)
def test_labels_of_any_kind_give_the_same_answers(classes, unknown):
    train, labels = make_activations(0)
    images = np.vstack([train, 30 * train])
    plain = OpenMax(num_logits=6).fit(train, labels)
    model = OpenMax(num_logits=6).fit(train, classes[labels])
    assert np.array_equal(model.classes_, classes)
    assert np.array_equal(model.predict_proba(images), plain.predict_proba(images))
    expected = [unknown if c == UNKNOWN else classes[c] for c in plain.predict(images)]
    assert unknown in expected
    assert model.predict(images).tolist() == expected


def test_lists_and_float32_are_taken():
    train, labels = make_activations(0)
    model = OpenMax(num_logits=6).fit(train.tolist(), labels.tolist())
    assert np.array_equal(model.predict(train.tolist()), model.predict(train))
    single = OpenMax(num_logits=6).fit(np.float32(train), labels)
    assert single.predict_proba(np.float32(train)).dtype == np.float64
    assert single.predict_proba(train) == pytest.approx(model.predict_proba(train), abs=1e-4)


def test_data_frames_are_taken_and_their_columns_compared():
    pandas = pytest.importorskip("pandas")
    train, labels = make_activations(0, latents=2)
    frame = pandas.DataFrame(train, columns=[*NAMES.tolist(), "z1", "z2"])
    model = OpenMax(num_logits=6).fit(frame, pandas.Series(NAMES[labels]))
    assert model.feature_names_in_.tolist() == [*NAMES, "z1", "z2"]
    assert set(model.predict(frame)) <= {*NAMES, UNKNOWN_NAME}
    with pytest.raises(ValueError, match="same order"):
        model.predict(frame[frame.columns[::-1]])


def test_grid_search_pipeline_and_cross_validation():
    digits, labels = load_digits(n_class=4, return_X_y=True)
    pipeline = make_pipeline(StandardScaler(), OpenMax(distance="mahalanobis", num_logits=0))
    grid = {"openmax__tail_size": [5, 20], "openmax__distance": ["mahalanobis", "euclidean"]}
    search = GridSearchCV(pipeline, grid, cv=3, error_score="raise").fit(digits, labels)
    assert search.best_score_ > 0.85
    train, labels = make_activations(0)
    assert cross_val_score(OpenMax(num_logits=6), train, labels, error_score="raise").min() > 0.6


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("scale", [1 / 16, 1, 100])
def test_features_without_logits_tell_unknown_digits_at_any_scale(distance, scale):
    digits, labels = load_digits(return_X_y=True)
    known, unknown = scale * digits[labels < 6], scale * digits[labels > 5]
    model = OpenMax(distance=distance, num_logits=0).fit(known[::2], labels[labels < 6][::2])
    assert model.score(known[1::2], labels[labels < 6][1::2]) > 0.8
    scores = [model.predict_proba(images)[:, UNKNOWN] for images in (known[1::2], unknown)]
    assert auroc(*scores) > 0.78


def test_logits_of_features_are_those_of_a_normal_distribution():
    train, labels = make_activations(0)
    model = OpenMax(num_logits=0).fit(train, labels)
    means = np.array([train[labels == c].mean(axis=0) for c in range(6)])
    assert model.mean_activations_ == pytest.approx(means, abs=1e-12)  # every image counts
    variance = np.mean((train - means[labels]) ** 2)
    assert model.variance_ == pytest.approx(variance, rel=1e-12)
    squares = ((train[:, None] - means) ** 2).sum(axis=2)
    density = np.exp(-squares / (2 * variance))
    w = model.weibull_.cdf(np.sqrt(squares))
    expected = density / density.sum(axis=1, keepdims=True) * (1 - w)
    assert model.predict_proba(train)[:, :UNKNOWN] == pytest.approx(expected, abs=1e-9)


def test_a_missing_class_is_not_taken_for_a_feature():
    """Ten logits, images of nine classes: the tenth logit must not become a feature."""
    train, labels = make_activations(0, num_classes=10, latents=0)
    with pytest.raises(ValueError, match="X has 10 logits and y has 9 classes; every logit needs"):
        OpenMax().fit(train[labels < 9], labels[labels < 9])


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, r"X has 15 logits and y has 6 classes; .* set num_logits=0"),
        ({"num_logits": 5}, "X has 5 logits and y has 6 classes"),
        ({"num_logits": 16}, "num_logits == 16, must be <= 15"),
        ({"num_logits": -1}, "num_logits == -1, must be >= 0"),
        ({"num_logits": "some"}, "num_logits must be an instance of int"),
        ({"num_logits": 6, "alpha": 7}, "alpha == 7, must be <= 6"),
        ({"num_logits": 6, "alpha": -1}, "alpha == -1, must be >= 0"),
        ({"num_logits": 6, "alpha": 2.5}, "alpha must be an instance of int"),
        ({"num_logits": 6, "tail_size": 4}, "tail_size == 4, must be >= 5"),
        ({"num_logits": 6, "tail_size": None}, "tail_size must be an instance of int"),
        ({"num_logits": 6, "distance": "manhattan"}, "'manhattan'; expected euclidean, cosine"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(settings, line):
    with pytest.raises((ValueError, TypeError), match=line):
        OpenMax(**settings).fit(*make_activations(0))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda x, y: (x, np.where(y == 5, UNKNOWN, y)), "label -1 is reserved"),
        (lambda x, y: (x, np.append(NAMES[:5], UNKNOWN_NAME)[y]), "label 'unknown' is reserved"),
        (lambda x, y: (x, y[:-1]), "inconsistent numbers of samples"),
        (lambda x, y: (x[:4], y[:4]), r"4 sample\(s\) .* minimum of 5"),
        (lambda x, y: (x[56:], y[56:]), "class 0 has 4 images, . of them classified correctly"),
        (lambda x, y: (x[:, [1, 0, *range(2, 15)]], y), "class 0 has 60 images, [0-4] of them"),
        (lambda x, y: (x[:, [1, 0, *range(2, 15)]], NAMES[y]), "class ant has 60 images, [0-4] of"),
        (lambda x, y: (np.where(y[:, None] == 1, 9 * np.eye(15)[1], x), y), "class 1: no Weibull"),
    ],
    ids=[
        "unknown", "unknown_text", "one_label_short", "too_few", "small_class",
        "logits_in_another_order", "the_same_by_name", "equal_images",
    ],
)  # fmt: skip
def test_data_that_does_not_fit_is_refused(change, line):
    with pytest.raises(ValueError, match=line):
        OpenMax(num_logits=6).fit(*change(*make_activations(0)))
