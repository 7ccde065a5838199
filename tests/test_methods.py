"""The five methods on made-up activations, and the rule that checkpoints store and exports run."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cosine
from scipy.special import expit, softmax

from activations import Activations, extract
from methods import (
    DHROpenMax,
    OpenMaxSettings,
    Recogniser,
    acceptance_interval,
    build_methods,
    check_classes,
    stored_rule,
)
from models import DHRNet, load_checkpoint
from openmax import UNKNOWN, OpenMax, Weibull, fit_tail
from pictures import ImageSet

ROOT = Path(__file__).parent.parent
CLASSES, LATENTS, FEATURES = 4, 96, 64  # three levels of 32
METHODS = tuple(build_methods(OpenMaxSettings()))


def make_set(seed, unknown=False):
    """Activations of 120 images: known ones have a class's latents and its logit on top."""
    rng = np.random.default_rng(seed)
    labels = np.arange(120) % CLASSES
    centres = np.random.default_rng(99).gamma(2, 1, (CLASSES, LATENTS))
    latents = (centres[labels] + rng.normal(0, 0.4, (120, LATENTS))).clip(0)
    logits = rng.normal(0, 1, (120, CLASSES)) + 9 * np.eye(CLASSES)[labels]
    if unknown:  # low logits without a winner, latents far from every class
        logits, latents = logits.mean(axis=1, keepdims=True) + 0.3 * logits - 4, latents + 3
        labels = np.full(120, UNKNOWN)
    logits, latents = logits.astype(np.float32), latents.astype(np.float32)
    return Activations(labels, logits, latents[:, :FEATURES], 2 * latents, latents)


def fitted(name, **settings):
    return build_methods(OpenMaxSettings(**settings))[name].fit(make_set(0), make_set(1))


@pytest.mark.parametrize("name", METHODS)
def test_unknown_images_score_above_known_ones(name):
    method = fitted(name)
    known, unknown = method.score(make_set(2)), method.score(make_set(3, unknown=True))
    assert np.median(unknown.unknownness) > np.quantile(known.unknownness, 0.9)
    for scores in (known, unknown):
        assert scores.probabilities.shape == (120, CLASSES + 1)
        assert ((scores.probabilities >= 0) & (scores.probabilities <= 1)).all()


@pytest.mark.parametrize("name", METHODS)
def test_unknown_probability_grows_with_unknownness(name):
    scores = fitted(name).score(make_set(2))
    order = np.argsort(scores.unknownness)
    assert (np.diff(scores.probabilities[order, UNKNOWN]) >= -1e-12).all()


@pytest.mark.parametrize("name", METHODS)
def test_threshold_accepts_95_percent_of_validation_images(name):
    method = fitted(name)
    accepted = method.score(make_set(1)).unknownness <= method.threshold_
    assert accepted.sum() == 114  # of 120


def test_msp_and_max_logit_equal_their_formulas():
    images = make_set(2)
    logits = images.logits.astype(np.float64)
    unknownness, probabilities = fitted("msp").score(images)
    assert unknownness == pytest.approx(1 - softmax(logits, axis=1).max(axis=1))
    assert probabilities[:, :UNKNOWN] == pytest.approx(softmax(logits, axis=1))
    unknownness, probabilities = fitted("max_logit").score(images)
    assert unknownness == pytest.approx(-logits.max(axis=1))
    assert probabilities[:, :UNKNOWN] == pytest.approx(expit(logits))


@pytest.mark.parametrize("name", ["max_logit", "openmax", "crosr"])
def test_the_nearest_class_is_told_where_probabilities_round(name):
    """Sigmoids of such logits are 1 to the last digit; so far from all means, 1 - w is 0."""
    far = make_set(2)._replace(logits=100 * make_set(2).logits)
    assert np.array_equal(fitted(name).score(far).nearest_class, far.logits.argmax(axis=1))


@pytest.mark.parametrize(("name", "latents"), [("openmax", "none"), ("crosr", "avg")])
def test_published_methods_are_openmax_on_logits_and_on_logits_with_latents(name, latents):
    settings = {"latents": "avg", "distance": "eucos", "tail_size": 10, "alpha": 2}
    train, images = make_set(0), make_set(2)
    openmax = OpenMax(tail_size=10, alpha=2, distance="eucos", num_logits=CLASSES)
    openmax.fit(train.vectors(latents), train.labels)
    expected = openmax.predict_proba(images.vectors(latents))
    unknownness, probabilities = fitted(name, **settings).score(images)
    assert np.array_equal(probabilities, expected)
    assert np.array_equal(unknownness, expected[:, UNKNOWN])


# This project's rule


@pytest.fixture
def rule():
    return fitted("dhr_openmax")


@pytest.mark.parametrize(("copies", "weight"), [(1, 120 / 500), (5, 1)])
def test_the_rule_adds_the_hazards_of_three_tests(copies, weight):
    """The docstring's formula, image by image."""
    train, images = make_set(0), make_set(2)
    val = Activations(*(np.concatenate([array] * copies) for array in make_set(1)))
    rule = DHROpenMax().fit(train, val)
    openmax = OpenMax(distance="mahalanobis", num_logits=CLASSES)
    openmax.fit(train.vectors("max"), train.labels)

    right = train.logits.argmax(axis=1) == train.labels
    members = [right & (train.labels == label) for label in range(CLASSES)]
    directions = [train.features[each].mean(axis=0, dtype=np.float64) for each in members]

    def tests_of(activations):
        distances = openmax.distances(activations.vectors("max"))
        predicted = activations.logits.argmax(axis=1)
        pairs = zip(activations.features.astype(np.float64), predicted, strict=True)
        return [
            -np.linalg.norm(activations.logits, axis=1),
            np.array([cosine(features, directions[label]) for features, label in pairs]),
            distances[np.arange(len(predicted)), predicted],
        ]

    log_odds, counts, weights = -rule.offset.item(), (120 * copies, 20, 20), (weight, 1, 1)
    for of_val, of_images, count, times in zip(
        tests_of(val), tests_of(images), counts, weights, strict=True
    ):
        weibull = Weibull(*fit_tail(np.sort(of_val)[-count:]))
        log_odds = log_odds - times * np.log1p(-weibull.cdf(of_images))
    assert rule.score(images).unknownness == pytest.approx(log_odds, abs=1e-5)


def test_the_rule_names_the_class_of_the_largest_logit(rule):
    for images in (make_set(2), make_set(3, unknown=True)):
        assert np.array_equal(rule.score(images).nearest_class, images.logits.argmax(axis=1))


@pytest.mark.parametrize("part", ["logits", "features", "latents_max"])
def test_each_test_alone_finds_an_unknown_image(rule, part):
    known, unknown = make_set(2), make_set(3, unknown=True)
    mixed = known._replace(**{part: getattr(unknown, part)})
    assert np.mean(rule.score(mixed).unknownness > 0) > 0.9


def test_the_rules_threshold_is_0_where_unknown_is_as_likely_as_not(rule):
    scores = rule.score(make_set(1))
    assert rule.threshold_ == 0
    assert np.array_equal(scores.unknownness > 0, scores.probabilities[:, UNKNOWN] > 0.5)
    assert scores.probabilities.sum(axis=1) == pytest.approx(np.ones(120), abs=1e-12)


@pytest.mark.parametrize("scale", [1e-4, 1e4, 1e12])
def test_the_rule_stays_finite_whatever_the_scale(rule, scale):
    images = make_set(2)
    far = images._replace(
        logits=images.logits * np.float32(scale), latents_max=images.latents_max * np.float32(scale)
    )
    unknownness, probabilities = rule.score(far)
    assert np.isfinite(unknownness).all()
    assert probabilities.sum(axis=1) == pytest.approx(np.ones(120))


def test_interval_of_accepted_images_holds_in_simulation():
    rng = np.random.default_rng(0)
    for count in (20, 200):
        low, high = acceptance_interval(count)
        assert low < 0.95 < high
        scores = np.sort(rng.random((20_000, count)), axis=1)
        accepted = scores[:, int(np.ceil(0.95 * count)) - 1]  # share of U(0, 1) below the threshold
        inside = np.mean((low <= accepted) & (accepted <= high))
        assert inside == pytest.approx(0.95, abs=0.01)


def test_a_class_that_is_hardly_classified_correctly_is_named():
    images = make_set(0)
    wrong = images._replace(labels=np.where(images.labels == 2, 3, images.labels))
    with pytest.raises(ValueError, match="dog has 0 images, 0 of them classified correctly"):
        check_classes(wrong, ["bird", "cat", "dog", "frog"])


# Stored and exported


@pytest.fixture(scope="module")
def parts():
    """A small network, its images, and a rule fitted to it: labels are its own answers."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(400, 1, 4, 4, generator=generator)
    pixels = (255 * F.interpolate(coarse, size=16, mode="bilinear")).byte()
    network = DHRNet(3, 1, 16)
    network.fit_input_statistics(pixels)
    network.eval()
    head = torch.nn.Linear(256, 3)  # with biases, so that all classes occur
    head.weight.data = network.head[-1].weight.data
    head.bias.data.zero_()
    network.head[-1] = head
    with torch.no_grad():
        head.bias.data = -network.activations(pixels)[0].median(dim=0).values
    images = ImageSet(pixels.permute(0, 2, 3, 1).numpy(), np.zeros(400, np.int64))
    activations = extract(network, images, 100)
    activations = activations._replace(labels=activations.logits.argmax(axis=1))
    return network, pixels[:50], DHROpenMax().fit(activations, activations)


def test_a_stored_rule_answers_as_the_fitted_one_to_the_bit(parts):
    network, pixels, rule = parts
    stored = stored_rule(network, {"open_set_rule": rule.state_dict()})
    *vectors, _ = network.activations(pixels)
    assert all(map(torch.equal, stored(*vectors), rule(*vectors)))


def test_a_rule_fitted_again_forgets_its_first_images():
    rule = DHROpenMax().fit(make_set(4), make_set(5)).fit(make_set(0), make_set(1))
    assert torch.equal(rule.offset, fitted("dhr_openmax").offset)


def test_the_shipped_rule_loads():
    rule = stored_rule(*load_checkpoint(ROOT / "dhr_net.pt"))
    assert rule.means.shape == (10, 10 + 96)


NAN = torch.tensor([1.0, float("nan"), 1.0])[:, None]
DAMAGE = {
    "no rule": (lambda state: None, "'NoneType' object"),
    "no offset": (lambda state: {k: v for k, v in state.items() if k != "offset"}, "'offset'"),
    "NaN of another class": (lambda state: state | {"means": state["means"] * NAN}, "not finite"),
    "four classes": (lambda state: fitted("dhr_openmax").state_dict(), ""),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_rule_is_refused_in_one_line(parts, kind):
    network, _, rule = parts
    damage, reason = DAMAGE[kind]
    state = damage(copy.deepcopy(rule.state_dict()))
    expected = rf"the open-set rule in it is damaged or of an earlier version \(.*{reason}"
    with pytest.raises(ValueError, match=expected) as caught:
        stored_rule(network, {"open_set_rule": state})
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # PyTorch 2.10's own
def test_recogniser_and_its_export_give_the_rules_probabilities(parts, tmp_path):
    network, pixels, rule = parts
    recogniser = Recogniser(network, rule)
    with torch.no_grad():
        vectors = [part.numpy() for part in network.activations(pixels)]
        answers = recogniser(pixels)
    expected = rule.score(Activations(np.zeros(50), *vectors)).probabilities
    assert answers.numpy() == pytest.approx(expected, abs=1e-12)
    batch = {0: torch.export.Dim("images")}
    program = torch.export.export(recogniser, (pixels[:2],), dynamic_shapes=[batch])
    torch.export.save(program, tmp_path / "recogniser.pt2")
    loaded = torch.export.load(tmp_path / "recogniser.pt2").module()
    assert torch.allclose(loaded(pixels), answers, atol=1e-6)
