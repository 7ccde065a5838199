"""Pictures of fractals, which training mixes into images. They are drawn from random numbers alone.

A fractal is where points end up that go through one random contracting map of the plane after
another, each map with a colour of its own (an iterated function system).
"""

from functools import cache

import numpy as np
from tqdm import tqdm

MAX_PIXELS, MAX_COUNT = 2**21, 2000  # of all pictures together
POINTS, SKIPPED_TURNS, DRAWN_TURNS = 1000, 10, 30  # of each picture


@cache
def fractals(size: int, channels: int) -> np.ndarray:
    """Pictures [P, size, size, channels] uint8, the same in every call: 2,000, or fewer of more
    than 32x32 pixels."""
    rng, count = np.random.default_rng(0), min(MAX_COUNT, MAX_PIXELS // size**2)
    bar = tqdm(range(count), "fractals", unit="img", leave=False, disable=None)
    return np.stack([fractal(size, channels, rng) for _ in bar])


def fractal(size: int, channels: int, rng: np.random.Generator) -> np.ndarray:
    """One picture [size, size, channels] uint8."""
    maps = rng.integers(2, 5)
    angle = rng.uniform(0, 2 * np.pi, (2, maps))
    cos, sin = np.cos(angle), np.sin(angle)
    left, right = np.array([[cos, -sin], [sin, cos]]).transpose(2, 3, 0, 1)
    stretch = np.sort(rng.uniform(0.2, 0.95, (maps, 2))) * rng.choice((-1, 1), (maps, 2))
    turn = left * stretch[:, None] @ right
    shift, colour = rng.uniform(-1, 1, (maps, 2)), rng.uniform(0, 1, (maps, channels))
    points, colours = np.zeros((POINTS, 2)), np.zeros((POINTS, channels))
    drawn = []
    for _ in range(SKIPPED_TURNS + DRAWN_TURNS):
        chosen = rng.integers(0, maps, POINTS)
        points = np.einsum("nij,nj->ni", turn[chosen], points) + shift[chosen]
        colours = (colours + colour[chosen]) / 2
        drawn.append(np.hstack([points, colours]))
    row, column, *shades = np.concatenate(drawn[SKIPPED_TURNS:]).T
    borders = (np.percentile(along, (1, 99)) for along in (row, column))
    edges = [np.linspace(low, high + 1e-6, size + 1) for low, high in borders]
    hits = np.histogram2d(row, column, edges)[0]
    sums = [np.histogram2d(row, column, edges, weights=values)[0] for values in shades]
    means = np.stack(sums, axis=-1) / np.maximum(hits, 1)[..., None]
    density = (np.log1p(hits) / np.log1p(hits.max()))[..., None] ** 0.5
    return (255 * (density * means + (1 - density) * rng.uniform(0, 1, channels))).astype(np.uint8)
