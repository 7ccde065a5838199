"""benchmarks/recipe.py: each change of the recipe does what it says."""

import numpy as np
import pytest
import torch
from recipe import VARIANTS, Averaged, Lookahead, Spread, coloured_noise, train

from openmax import UNKNOWN
from pictures import ImageSet

CPU = torch.device("cpu")


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", ["turned", "turned-half", "turned-or-shuffled"])
def test_changed_copies_are_none_of_the_classes_and_keep_their_pixels(name, images):
    recipe = VARIANTS[name](2, CPU, seed=0)
    shown, labels = recipe.views(images, torch.arange(8) % 2)
    assert torch.equal(shown[:8], images)
    assert labels[8:].tolist() == [UNKNOWN, UNKNOWN]
    for copy, original in zip(shown[8:], images[::4], strict=True):
        assert not torch.equal(copy, original)
        assert torch.equal(copy.flatten().sort().values, original.flatten().sort().values)


def test_a_half_turned_copy_costs_least_with_all_logits_at_zero():
    recipe, label = VARIANTS["turned-half"](3, CPU, seed=0), torch.tensor([UNKNOWN])
    logits = torch.zeros(1, 3, requires_grad=True)
    recipe.classify(logits, label).backward()
    assert logits.grad.tolist() == [[0, 0, 0]]
    assert recipe.classify(torch.tensor([[5.0, -5, -5]]), torch.tensor([0])) < 0.03


@pytest.mark.parametrize("name", ["fractals", "one-fractal", "averaged-noise"])
def test_mixed_in_pictures_change_images_but_not_labels(name, images, few_fractals):
    labels = torch.arange(8) % 2
    shown, same = VARIANTS[name](2, CPU, seed=0).views(images, labels)
    assert shown.shape == images.shape
    assert shown.dtype == torch.uint8
    assert not torch.equal(shown, images)
    assert same is labels


def test_noise_has_several_colours_and_the_seed_decides():
    drawn = coloured_noise(5, 16, np.random.default_rng(0))
    assert np.array_equal(drawn, coloured_noise(5, 16, np.random.default_rng(0)))
    assert min(picture.std() for picture in drawn) > 3
    assert len({picture.tobytes() for picture in drawn}) == 5


def test_features_are_normalised_in_training_alone(images):
    recipe = VARIANTS["t2fnorm"](2, CPU, seed=0)
    seen = []
    recipe.network.head[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    small = torch.rand(4, 3, 32, 32)
    recipe.network.train()(small)
    recipe.network.eval()(small)
    assert torch.allclose(seen[0].norm(dim=1), torch.full((4,), 10.0))
    assert not torch.allclose(seen[1].norm(dim=1), torch.full((4,), 10.0))


def test_lookahead_draws_every_fifth_step_back_and_ends_at_its_slow_weights():
    recipe = Lookahead(2, CPU, seed=0)
    weight, seen = recipe.network.head[-1].weight, []
    for step in range(7):
        with torch.no_grad():
            weight.fill_(step)
        recipe.after(step, 7)
        seen.append(weight[0, 0].item())
    slow = 4 * (1 - 0.95**5 * (4 / 7) ** 3)  # it had been 0
    assert seen == pytest.approx([0, 1, 2, 3, slow, 5, slow])


def test_averaged_weights_are_the_mean_over_the_second_half(images):
    recipe = Averaged(2, CPU, seed=0)
    recipe.views(images, torch.arange(8) % 2)
    for step in range(6):
        with torch.no_grad():
            recipe.network.head[-1].weight.fill_(step)
        recipe.after(step, 6)
    assert recipe.network.head[-1].weight[0, 0].item() == pytest.approx((3 + 4 + 5) / 3)


def test_spread_ignores_what_all_logits_share():
    rule = Spread()
    rule.means, rule.whitening = torch.zeros(3, 5), torch.eye(5, dtype=torch.float64)
    rule.directions, zeros = torch.zeros(3, 2), torch.zeros(1, 2)
    logits = torch.tensor([[1.0, 2, 3]])
    evidence = [rule.statistics(logits + shift, zeros, zeros)[0, 0].item() for shift in (0, -100)]
    assert evidence == pytest.approx([-(2**0.5), -(2**0.5)])


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_change_trains_a_network(name, few_fractals, monkeypatch):
    monkeypatch.setattr("recipe.EPOCHS", 1)
    monkeypatch.setattr("recipe.BATCH_SIZE", 16)
    rng = np.random.default_rng(0)
    images = ImageSet(rng.integers(0, 256, (32, 32, 32, 3), dtype=np.uint8), np.arange(32) % 2)
    network, pflop = train(VARIANTS[name], {"train": images}, CPU, 0)
    assert pflop > 0
    assert all(weight.isfinite().all() for weight in network.state_dict().values())
