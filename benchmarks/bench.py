"""Measure speed and memory against what the hardware allows, and against how others do it.

    python benchmarks/bench.py                # everything; one JSON line last
    python benchmarks/bench.py openmax start  # some of it: functions below, by name

Both sides of a ratio are measured in this run, in turn: a warm-up, then the median of five. What
takes minutes runs once. Images are random where their content does not matter. README.md beside
this file says what each row means.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from peers import BATCH as TEXTBOOK_BATCH
from peers import PytorchOodOpenMax, one_by_one, textbook_steps
from test_openmax import loop_openmax

from models import DHRNet, keep_freed_memory, prepare_device
from openmax import OpenMax
from train_dhr_nn import augment, build_optimizers, parse_args, training_step

REPEATS = 5
BATCH = parse_args([]).batch_size  # as training has it by default
EXTRACTED = 1024  # images at once; a multiple of the network's chunk
TRAIN_IMAGES = 47_500  # of CIFAR-10, without the validation images
IMAGES, CLASSES, DIMENSIONS = 20_000, 10, 106
AIRBENCH_PFLOP = 0.36  # of airbench94, a classifier alone (Jordan 2024, arXiv 2404.00498)
IMAGENET = 1_281_167, 1000  # training images, classes
GPU_TFLOPS = 989  # one NVIDIA H100 SXM, bfloat16 without sparsity, by its data sheet
GPU_SHARE = 0.3  # of that rate assumed to be reached, not measured
RESULTS = ROOT / "benchmarks" / "results"


class Row(NamedTuple):
    """One line of the table: `ratio` is what `target` speaks of."""

    what: str
    ours: str
    peer: str
    ratio: float
    target: str


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


def gflop(function: Callable[[], object]) -> float:
    """Operations of a call, as PyTorch counts them: matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e9


def in_process(*command: object) -> tuple[float, float]:
    """Seconds and peak memory in GB of a fresh Python process; what it prints is dropped.

    The peak is read while it runs: what the system reports in the end is no less than what this
    process held when it started the other.
    """
    start, kilobytes = time.perf_counter(), 0
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        kilobytes = int((re.search(r"VmHWM:\s+(\d+)", status) or [0, kilobytes])[1])
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed")
    return time.perf_counter() - start, kilobytes / 1e6


@cache
def network_rates(arch: str) -> dict[str, float]:
    """Images per second of training and extraction, GFLOP an image, and the matrix rate."""
    _, autocast = prepare_device("cpu")
    keep_freed_memory()
    model = DHRNet(10, arch=arch).to(memory_format=torch.channels_last)
    optimizers = build_optimizers(model, lr=0.01)
    pool = torch.randint(0, 256, (5000, 32, 32, 3), dtype=torch.uint8)
    labels = torch.randint(0, 10, (5000,))
    generator = torch.Generator()

    def step() -> None:
        model.train()
        index = torch.randperm(5000, generator=generator)[:BATCH]
        batch = augment(pool, index, index % 2 == 0, 0, generator)
        training_step(model, optimizers, batch, labels[index], "softmax", 1.0, autocast)

    def extract() -> None:
        model.eval()
        with autocast:
            model.activations(pool[:EXTRACTED].permute(0, 3, 1, 2))

    side = 4096
    a, b = torch.randn(2, side, side).to(torch.bfloat16 if autocast._enabled else torch.float32)
    few = pool[:8].permute(0, 3, 1, 2), labels[:8]
    train_gflop = gflop(lambda: training_step(model, [], *few, "softmax", 1.0, autocast)) / 8
    extract_gflop = gflop(extract) / EXTRACTED
    matrix, train, extraction = median_seconds(lambda: a @ b, step, extract)
    return {
        "matrix_gflops": 2 * side**3 / matrix / 1e9,
        "train": BATCH / train,
        "train_gflop": train_gflop,
        "extract": EXTRACTED / extraction,
        "extract_gflop": extract_gflop,
    }


@cache
def textbook_rate() -> float:
    """Images per second of the textbook training loop on `vgg`."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5000, 32, 32, 3), dtype=np.uint8)
    steps = textbook_steps(DHRNet(10, arch="vgg"), images, rng.integers(0, 10, 5000))
    (seconds,) = median_seconds(lambda: next(steps))
    steps.close()
    return TEXTBOOK_BATCH / seconds


def recorded_epochs(name: str) -> list[list[str]]:
    """The epoch lines, split into columns, of a recorded training run."""
    path = RESULTS / name
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split() for line in lines if line[:5].strip().isdigit()]


def seconds_to_90(name: str, rate: float) -> float:
    """Until a recorded run reached 90 % validation accuracy, at the rate measured now."""
    reached = [int(row[0]) for row in recorded_epochs(name) if float(row[-1]) >= 0.9]
    return min(reached, default=np.nan) * TRAIN_IMAGES / rate


def training() -> list[Row]:
    """Images per second, and what a recorded run needed for its accuracy."""
    fast, vgg, textbook = network_rates("fast"), network_rates("vgg"), textbook_rate()
    floor = fast["matrix_gflops"] / fast["train_gflop"]
    ours_90 = seconds_to_90("train.txt", fast["train"])
    textbook_90 = seconds_to_90("textbook.txt", textbook)
    epochs = recorded_epochs("train.txt")
    pflop = len(epochs) * TRAIN_IMAGES * fast["train_gflop"] / 1e6
    minutes = sum(float(row[1]) for row in epochs) / 60
    return [
        Row("train fast, images/s; matrix rate", f"{fast['train']:.0f}", f"{floor:.0f}",
            fast["train"] / floor, ">= 0.70"),
        Row("train vgg, images/s; textbook loop", f"{vgg['train']:.0f}", f"{textbook:.0f}",
            vgg["train"] / textbook, ">= 4"),
        Row("train to 90 %, s; textbook loop", f"{ours_90:.0f}", f"{textbook_90:.0f}",
            textbook_90 / ours_90, ">= 30"),
        Row("recorded run, PFLOP; airbench94", f"{pflop:.2f}", f"{AIRBENCH_PFLOP}",
            pflop, "<= 0.40"),
        Row("recorded run, minutes", f"{minutes:.1f}", "-", minutes, "<= 15"),
    ]  # fmt: skip


def extraction() -> list[Row]:
    """Images per second with the decoder skipped, over both views where there are two."""
    fast = network_rates("fast")
    model = DHRNet(10, arch="fast").eval()
    few = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    (loop,) = median_seconds(lambda: one_by_one(model, few))
    floor = fast["matrix_gflops"] / fast["extract_gflop"]
    return [
        Row("extract, images/s; matrix rate", f"{fast['extract']:.0f}", f"{floor:.0f}",
            fast["extract"] / floor, ">= 0.75"),
        Row("extract, images/s; image by image", f"{fast['extract']:.0f}", f"{20 / loop:.0f}",
            fast["extract"] * loop / 20, ">= 8"),
    ]  # fmt: skip


def made_up(images: int, classes: int, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """Activation vectors of images that are mostly classified right, with their labels."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(images) % classes)
    vectors = rng.normal(size=(images, dimensions))
    vectors[np.arange(images), labels] += 8
    return vectors, labels


def openmax() -> list[Row]:
    """Fit and score against other implementations; score against its distances alone."""
    vectors, labels = made_up(IMAGES, CLASSES, DIMENSIONS)
    logits = np.ascontiguousarray(vectors[:, :CLASSES])
    model = OpenMax().fit(vectors, labels)
    ours, ours_logits, score, kernel, loop, pytorch_ood = median_seconds(
        lambda: OpenMax().fit(vectors, labels).predict_proba(vectors),
        lambda: OpenMax(25, 10).fit(logits, labels).predict_proba(logits),
        lambda: model.predict_proba(vectors),
        lambda: cdist(vectors, model.mean_activations_),
        lambda: loop_openmax(vectors, labels, vectors, 20, 0, CLASSES),
        lambda: PytorchOodOpenMax().fit(logits, labels).predict(logits),
    )
    return [
        Row("OpenMax fit + score, ms; loop with libMR", f"{1e3 * ours:.1f}", f"{1e3 * loop:.0f}",
            loop / ours, ">= 60"),
        Row("the same, 10 dimensions, ms; pytorch-ood", f"{1e3 * ours_logits:.1f}",
            f"{1e3 * pytorch_ood:.0f}", pytorch_ood / ours_logits, ">= 350"),
        Row("OpenMax score, ms; distances alone", f"{1e3 * score:.1f}", f"{1e3 * kernel:.1f}",
            score / kernel, "<= 1.5"),
    ]  # fmt: skip


def growth() -> list[Row]:
    """Time an image for more images and more classes; memory of a stream of many."""

    def per_image(images: int, classes: int) -> float:
        vectors, labels = made_up(images, classes, classes + 96)
        (seconds,) = median_seconds(lambda: OpenMax(5).fit(vectors, labels).predict_proba(vectors))
        return 1e6 * seconds / images

    few, many = per_image(10_000, 10), per_image(1_000_000, 10)
    narrow, wide = per_image(10_000, 100), per_image(10_000, 1000)
    seconds, memory = in_process(__file__, "--stream", 1_000_000, 1000)
    return [
        Row("us an image, 10^6; 10^4 images", f"{many:.2f}", f"{few:.2f}", many / few, "about 1"),
        # per class and dimension: a distance is a sum over the dimensions, to every class
        Row("us an image, 1,000; 100 classes", f"{wide:.0f}", f"{narrow:.1f}",
            wide / narrow / (1000 * 1096) * (100 * 196), "about 1"),
        Row("10^6 x 1,000 classes, streamed, GB", f"{memory:.2f}", f"{seconds:.0f} s",
            memory, "<= 2"),
    ]  # fmt: skip


def stream(images: int, classes: int) -> None:
    """Fit on 50 images a class, then score chunk after chunk, keeping one number an image."""
    vectors, labels = made_up(50 * classes, classes, classes)
    model = OpenMax().fit(vectors, labels)
    rng = np.random.default_rng(1)
    for _ in range(0, images, 10_000):
        model.predict_proba(rng.normal(size=(10_000, classes)).astype(np.float32))[:, -1].copy()


def start() -> list[Row]:
    """Seconds until --help and bad arguments are answered."""
    scripts = ("train_dhr_nn.py", "compute_openmax.py")

    def call(*command: str) -> Callable[[], object]:
        return lambda: subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, check=False
        )

    commands = [[script, flag] for script in scripts for flag in ("--help", "--nonsense")]
    python, *ours = median_seconds(call("-c", ""), *(call(*command) for command in commands))
    return [
        Row(f"{' '.join(command)}, ms; Python start", f"{1e3 * seconds:.0f}",
            f"{1e3 * python:.0f}", seconds / python, "<= 3")
        for command, seconds in zip(commands, ours, strict=True)
    ]  # fmt: skip


def memory() -> list[Row]:
    """Peak of one epoch of the default training run, loading included."""
    _, floor = in_process("-c", "import torch")
    floor += 60_000 * 32 * 32 * 3 / 1e9
    with tempfile.TemporaryDirectory() as folder:
        _, peak = in_process(__file__, "--train-one-epoch", folder)
    return [Row("train, peak GB; images + import torch", f"{peak:.2f}", f"{floor:.2f}",
                peak, "<= 2")]  # fmt: skip


def train_one_epoch(folder: str) -> None:
    """Train on real images, or on random ones of the same number where there are none."""
    import open_set_data
    import train_dhr_nn

    if not (ROOT / "data" / "cifar-10-batches-py").is_dir():
        rng = np.random.default_rng(0)

        def random_set(count: int) -> open_set_data.ImageSet:
            images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            return open_set_data.ImageSet(images, rng.integers(0, 10, count))

        def read_random(*_: object) -> tuple[list[str], Any, Any]:
            return list("abcdefghij"), random_set(50_000), random_set(10_000)

        open_set_data._read_known = read_random
    command = ["--epochs", "1", "--device", "cpu", "--out", f"{folder}/net.pt"]
    raise SystemExit(train_dhr_nn.main(command))


def evaluation() -> list[Row]:
    """The whole of compute_openmax.py on real images, nothing cached, against its forward passes
    and the import of PyTorch."""
    if not (ROOT / "data" / "cifar-10-batches-py").is_dir():
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        whole, peak = in_process("compute_openmax.py", "--no-cache", "--json", path)
        extract = json.loads(path.read_text())["seconds"]["extract"]
    importing, _ = in_process("-c", "import torch")
    return [
        Row("compute_openmax.py, s; passes + import", f"{whole:.1f}", f"{extract + importing:.1f}",
            whole / (extract + importing), "<= 1.15"),
        Row("compute_openmax.py, peak GB", f"{peak:.2f}", "-", peak, "-"),
    ]  # fmt: skip


def plan() -> None:
    """What ImageNet-1k at 32x32 pixels would take, by arithmetic from what was measured here."""
    fast = network_rates("fast")
    images, classes = IMAGENET
    epochs = len(recorded_epochs("train.txt"))
    vectors, labels = made_up(10_000, 100, 196)
    begin = time.perf_counter()
    OpenMax().fit(vectors, labels).predict_proba(vectors)
    nanoseconds = 1e9 * (time.perf_counter() - begin) / (10_000 * 100 * 196)
    minutes = images * classes * (classes + 96) * nanoseconds / 6e10
    train = images * epochs * fast["train_gflop"] / 1e6
    passes = images * fast["extract_gflop"] / 1e6
    print(
        f"\nImageNet-1k, {images:,} images of 32x32 pixels, {classes:,} classes\n"
        f"training: {train:.1f} PFLOP, {epochs} epochs, {fast['train_gflop']:.3f} GFLOP an image\n"
        f"extraction: {passes:.2f} PFLOP, {fast['extract_gflop']:.3f} GFLOP an image\n"
        f"OpenMax: {minutes:.0f} core minutes, {nanoseconds:.2f} ns a class and dimension"
    )
    for name, tflops in (
        ("this machine", fast["train"] * fast["train_gflop"] / 1e3),
        ("one GPU", GPU_SHARE * GPU_TFLOPS),
        ("eight GPUs", 8 * GPU_SHARE * GPU_TFLOPS),
    ):
        print(
            f"{name}, {tflops:.2f} TFLOP/s: {train * 1e3 / tflops / 60:.1f} min training, "
            f"{passes * 1e3 / tflops / 60:.1f} min extraction"
        )


BENCHMARKS = {
    function.__name__: function
    for function in (training, extraction, openmax, growth, start, memory, evaluation)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--stream", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--train-one-epoch", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stream:
        return stream(*args.stream)
    if args.train_one_epoch:
        return train_one_epoch(args.train_one_epoch)
    torch.set_num_threads(args.threads)
    threads = f"{args.threads} of {os.cpu_count()} CPUs"
    print(f"{platform.processor() or platform.machine()}, {threads}, torch {torch.__version__}\n")
    print(f"{'what; floor or peer':43}{'ours':>9}{'peer':>9}{'ratio':>10}  target")
    rows = []
    for name in args.names or BENCHMARKS:
        for row in BENCHMARKS[name]():
            print(
                f"{row.what:43}{row.ours:>9}{row.peer:>9}{row.ratio:10.2f}  {row.target}",
                flush=True,
            )
            rows.append(row._asdict())
    if not args.names:
        plan()
    machine = {"machine": platform.machine(), "threads": args.threads, "torch": torch.__version__}
    print(json.dumps({**machine, "rows": rows}))


if __name__ == "__main__":
    main()
