"""Activations made by hand and the ports' OpenMax, one image and one class at a time."""

import math

import numpy as np
from scipy.spatial import distance as spd

from openmax import libmr


def make_activations(seed, num_classes=6, per_class=60, latents=9):
    """Class-dependent [y, z] with some wrongly classified rows, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(num_classes), per_class)
    logits = rng.normal(size=(len(labels), num_classes)) + 3 * np.eye(num_classes)[labels]
    z = np.maximum(rng.normal(size=(len(labels), latents)) + labels[:, None] / 3, 0)
    return np.hstack([logits, z]), labels


def loop_openmax(train, labels, images, tail_size, alpha, num_classes):
    """Probabilities [N, K + 1] of a literal loop with a live libMR object for each class."""
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
