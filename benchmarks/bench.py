"""Measure speed against what the hardware allows, and against the loops of other implementations.

    python benchmarks/bench.py [--arch fast|vgg] [--threads N]     # a table, then one JSON line

Both sides of every ratio are measured in this run, in turn: a warm-up, then the median of five. The
networks see random images; the activation vectors have the shape of CIFAR-10's evaluation.
"""

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_openmax import loop_openmax

from models import ARCHITECTURES, DHRNet, prepare_device
from openmax import OpenMax
from train_dhr_nn import augment, build_optimizers, training_step

REPEATS = 5
IMAGES, CLASSES, DIMENSIONS, TRAIN_IMAGES = 20_000, 10, 106, 47_500
BATCH = 1000


def median_seconds(*functions: Callable[[], object]) -> list[float]:
    """Median seconds of each function, called in turn after a warm-up each."""
    seconds: list[list[float]] = [[] for _ in functions]
    for repeat in range(REPEATS + 1):
        for function, taken in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            if repeat:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def network_rates(arch: str) -> dict[str, float]:
    """Training and extraction as shares of the matrix rate, operations counted by PyTorch."""
    _, autocast = prepare_device("cpu")
    model = DHRNet(10, arch=arch).to(memory_format=torch.channels_last)
    optimizers = build_optimizers(model, lr=0.01)
    pool = torch.randint(0, 256, (5000, 32, 32, 3), dtype=torch.uint8)
    labels = torch.randint(0, 10, (5000,))
    generator = torch.Generator()

    def step() -> None:
        index = torch.randperm(5000, generator=generator)[:BATCH]
        batch = augment(pool, index, index % 2 == 0, generator)
        training_step(model, optimizers, batch, labels[index], 1.0, autocast)

    @torch.no_grad()
    def extract() -> None:
        with autocast:
            model(pool[:BATCH].permute(0, 3, 1, 2), decode=False)

    side = 4096
    dtype = torch.bfloat16 if autocast._enabled else torch.float32
    a, b = torch.randn(2, side, side).to(dtype)

    def operations(function: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops() / BATCH

    with FlopCounterMode(display=False) as counter:
        training_step(model, [], pool[:8].permute(0, 3, 1, 2), labels[:8], 1.0, autocast)
    train_operations = counter.get_total_flops() / 8
    extract_operations = operations(extract)
    matrix, train, extraction = median_seconds(lambda: a @ b, step, extract)
    rate = 2 * side**3 / matrix
    return {
        "matrix_tflops": rate / 1e12,
        "train_images_per_second": BATCH / train,
        "train_gflop_per_image": train_operations / 1e9,
        "train_share_of_matrix_rate": train_operations * BATCH / train / rate,
        "extract_images_per_second": BATCH / extraction,
        "extract_gflop_per_image": extract_operations / 1e9,
        "extract_share_of_matrix_rate": extract_operations * BATCH / extraction / rate,
    }


def openmax_ratios() -> dict[str, float]:
    """Fit and score against the literal loop with libMR, and against the distance kernel alone."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, TRAIN_IMAGES)
    train = rng.normal(size=(TRAIN_IMAGES, DIMENSIONS)) + 4 * np.eye(CLASSES, DIMENSIONS)[labels]
    images = rng.normal(size=(IMAGES, DIMENSIONS))
    model = OpenMax().fit(train, labels)

    def fit_and_score() -> None:
        OpenMax().fit(train, labels).predict_proba(images)

    def loop() -> None:  # a twentieth of the images; the fit, on all, comes on top
        loop_openmax(train[:2000], labels[:2000], images[: IMAGES // 20], 20, 0, CLASSES)

    ours, score, kernel, twentieth = median_seconds(
        fit_and_score,
        lambda: model.predict_proba(images),
        lambda: cdist(images, model.mean_activations_),
        loop,
    )
    return {
        "openmax_fit_and_score_seconds": ours,
        "openmax_score_over_distance_kernel": score / kernel,
        "loop_over_openmax_score": 20 * twentieth / score,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="fast")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {**network_rates(args.arch), **openmax_ratios()}
    results["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    for name, value in results.items():
        print(f"{name:36}{value:12.3f}")
    machine = {"arch": args.arch, "threads": args.threads, "machine": platform.machine()}
    print(json.dumps({**machine, "torch": torch.__version__, **results}))


if __name__ == "__main__":
    main()
