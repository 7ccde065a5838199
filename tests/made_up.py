"""Activations made by hand."""

import numpy as np


def make_activations(seed, num_classes=6, per_class=60, latents=9):
    """Class-dependent [y, z] with some wrongly classified rows, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(num_classes), per_class)
    logits = rng.normal(size=(len(labels), num_classes)) + 3 * np.eye(num_classes)[labels]
    z = np.maximum(rng.normal(size=(len(labels), latents)) + labels[:, None] / 3, 0)
    return np.hstack([logits, z]), labels
