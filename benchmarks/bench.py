"""Measure speed and memory against what the hardware allows, and against how others do it.

    python benchmarks/bench.py                     # everything; one JSON line last
    python benchmarks/bench.py openmax photo       # some of it: functions below, by name
    OMP_NUM_THREADS=1 python benchmarks/bench.py   # on one core

Both sides of a ratio are measured in this run: a warm-up, then the median of five, in turn. What
takes minutes runs once. README.md beside this file says what each row means.
"""

import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.spatial.distance import cdist
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from peers import TEXTBOOK_BATCH, PytorchOodOpenMax, loop_openmax, one_by_one, textbook_steps

from activations import extract, keep_freed_memory, number_format
from command_line import make_parser
from models import DHRNet
from openmax import OpenMax, libmr
from pictures import ImageSet
from training import gflop_per_image

AIRBENCH_PFLOP = 0.36  # of airbench94, a classifier alone (Jordan 2024, arXiv 2404.00498)
CIFAR10 = ROOT / "data" / "cifar-10-batches-py"
STREAM = "import sys; sys.path.insert(0, 'benchmarks'); import bench; bench.stream(10**6, 1000)"
Rows = Iterator[tuple[str, float, float | None, float, str]]  # what, ours, peer, ratio, its target


def median_seconds(repeats: int, *functions: Callable[[], object]) -> list[float]:
    """Median seconds of each function, called in turn after a warm-up each."""
    seconds = np.empty((repeats + 1, len(functions)))
    for repeat, column in np.ndindex(seconds.shape):
        start = time.perf_counter()
        functions[column]()
        seconds[repeat, column] = time.perf_counter() - start
    return np.median(seconds[1:], axis=0).tolist()


def run(*command: object) -> tuple[str, float, float]:
    """What a Python command printed, its seconds, and its peak memory in GB, read while it runs."""
    start, kilobytes = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=output)
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            kilobytes = int((re.search(r"VmHWM:\s+(\d+)", status) or [0, kilobytes])[1])
            time.sleep(0.02)
        if process.returncode:
            raise SystemExit(f"{command} failed")
        output.seek(0)
        return output.read(), time.perf_counter() - start, kilobytes / 1e6


def matrix_gflops(repeats: int) -> float:
    """The rate that the hardware allows: one large product in the networks' number format."""
    a, b = torch.randn(2, 4096, 4096).to(getattr(torch, number_format(torch.device("cpu"))))
    return 2e-9 * 4096**3 / median_seconds(repeats, lambda: a @ b)[0]


def random_images(n: int) -> ImageSet:
    rng = np.random.default_rng(0)
    return ImageSet(rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, n))


def one_epoch(arch: str) -> tuple[float, float]:
    """Images per second, and peak memory in GB, of train_dhr_nn.py."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--arch", arch, "--epochs", 1, "--batch-size", 500, "--device", "cpu")
        printed, _, peak = run("train_dhr_nn.py", *flags, "--out", f"{folder}/net.pt")
    return float(re.findall(r"^ +1 +[\d.]+ +(\d+) ", printed, re.MULTILINE)[0]), peak


def training(repeats: int) -> Rows:
    """One epoch against matrix rate and textbook loop; what the recorded default run took."""
    gflop = gflop_per_image(DHRNet(10, arch="fast"))
    if CIFAR10.is_dir():
        floor = matrix_gflops(repeats) / gflop
        rate, peak = one_epoch("fast")
        yield "train fast, images/s; matrix rate", rate, floor, rate / floor, ">= 0.70"
        yield "the same, peak GB", peak, None, peak, "<= 2"
        rate, _ = one_epoch("vgg")
        textbook = textbook_steps(DHRNet(10, arch="vgg"), *random_images(5000))
        peer = TEXTBOOK_BATCH / median_seconds(repeats, lambda: next(textbook))[0]
        yield "train vgg, images/s; textbook loop", rate, peer, rate / peer, ">= 4"
    text = (ROOT / "benchmarks" / "results" / "train.txt").read_text()
    epochs = len(re.findall(r"^ +\d+ +[\d.]+ ", text, re.MULTILINE))
    pflop = epochs * 47_500 * gflop / 1e6  # training images of CIFAR-10
    yield "recorded run, PFLOP; airbench94", pflop, AIRBENCH_PFLOP, pflop, "<= 0.40"


def extraction(repeats: int) -> Rows:
    """Images per second with the decoder skipped, over both views."""
    network, data = DHRNet(10, arch="fast").eval(), random_images(1000)
    network.to(memory_format=torch.channels_last)
    few = torch.from_numpy(data.images[:20]).permute(0, 3, 1, 2)
    with FlopCounterMode(display=False) as counter:
        network.activations(few[:1])
    floor = matrix_gflops(repeats) / counter.get_total_flops() * 1e9
    whole, loop = median_seconds(
        repeats, lambda: extract(network, data, 250), lambda: one_by_one(network, few)
    )
    rate, peer = len(data.labels) / whole, len(few) / loop
    yield "extract, images/s; matrix rate", rate, floor, rate / floor, ">= 0.75"
    yield "extract, images/s; image by image", rate, peer, rate / peer, ">= 8"


def made_up(images: int, classes: int, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """Activation vectors of images that are mostly classified right, with their labels."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(images) % classes)
    vectors = rng.normal(size=(images, dimensions))
    vectors[np.arange(images), labels] += 8
    return vectors, labels


def openmax(repeats: int) -> Rows:
    """Milliseconds to fit and score against other implementations; to score against distances."""
    vectors, labels = made_up(20_000, 10, 106)
    logits = np.ascontiguousarray(vectors[:, :10])
    fitted = OpenMax(num_logits=10).fit(vectors, labels)
    seconds = median_seconds(
        repeats,
        lambda: OpenMax(num_logits=10).fit(vectors, labels).predict_proba(vectors),
        lambda: loop_openmax(vectors, labels, vectors, 10) if libmr else None,
        lambda: OpenMax(25, 10).fit(logits, labels).predict_proba(logits),
        lambda: PytorchOodOpenMax().fit(logits, labels).predict(logits),
        lambda: fitted.predict_proba(vectors),
        lambda: cdist(vectors, fitted.mean_activations_),
    )
    ours, loop, small, peer, score, kernel = (1e3 * each for each in seconds)
    if libmr:
        yield "OpenMax fit + score, ms; loop with libMR", ours, loop, loop / ours, ">= 60"
    yield "OpenMax on 10 logits, ms; pytorch-ood", small, peer, peer / small, ">= 350"
    yield "OpenMax score, ms; distances alone", score, kernel, score / kernel, "<= 1.5"


def growth(repeats: int) -> Rows:
    """Microseconds per image for more images and more classes; memory of a stream of many."""

    def microseconds(images: int, classes: int) -> float:
        vectors, labels = made_up(images, classes, classes + 96)
        model = OpenMax(5, num_logits=classes)
        seconds = median_seconds(repeats, lambda: model.fit(vectors, labels).predict_proba(vectors))
        return 1e6 * seconds[0] / images

    few, many = microseconds(10_000, 10), microseconds(1_000_000, 10)
    yield "us per image, 10^6; 10^4 images", many, few, many / few, "about 1"
    narrow, wide = microseconds(10_000, 100), microseconds(10_000, 1000)
    growth = wide / narrow / (1000 * 1096) * (100 * 196)  # per class and dimension
    yield "us per image, 1,000; 100 classes", wide, narrow, growth, "about 1"
    _, seconds, peak = run("-c", STREAM)
    yield f"10^6 x 1,000 classes in {seconds:.0f} s, peak GB", peak, None, peak, "<= 2"


def stream(images: int, classes: int) -> None:
    """Fit to 50 images of each class, then score chunk by chunk, keeping one number per image."""
    fitted = OpenMax().fit(*made_up(50 * classes, classes, classes))
    rng = np.random.default_rng(1)
    for _ in range(0, images, 10_000):
        fitted.predict_proba(rng.normal(size=(10_000, classes)).astype(np.float32))[:, -1].copy()


def photo(repeats: int) -> Rows:
    """compute_openmax.py on one photograph of 12 megapixels, against its imports."""
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        Image.effect_noise((4000, 3000), 64).save(file)
        command = ("compute_openmax.py", "--device", "cpu", "--images", file.name)
        imports = ("-c", "import compute_openmax")
        whole, floor = median_seconds(repeats, lambda: run(*command), lambda: run(*imports))
    yield "one photograph, s; imports alone", whole, floor, whole - floor, "<= 0.5"


def evaluation(repeats: int) -> Rows:
    """The whole of compute_openmax.py, nothing cached, against its passes and PyTorch's import."""
    if CIFAR10.is_dir():
        printed, whole, peak = run("compute_openmax.py", "--no-cache", "--device", "cpu")
        floor = float(re.findall(r"extract ([\d.]+) s", printed)[0]) + run("-c", "import torch")[1]
        yield "compute_openmax.py, s; passes + torch", whole, floor, whole / floor, "<= 1.15"
        yield "the same, peak GB", peak, None, peak, "<= 2"


BENCHMARKS = {f.__name__: f for f in (training, extraction, openmax, growth, photo, evaluation)}


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--repeats", type=int, default=5, help="a median is taken of (default 5)")
    args = parser.parse_args(argv)
    keep_freed_memory()
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine}\n\n{'what; floor or peer':42}{'ours':>10}{'peer':>10}{'ratio':>10}  target")
    rows = []
    for name in args.names or BENCHMARKS:
        for what, *figures, target in BENCHMARKS[name](args.repeats):
            cells = ("-" if x is None else f"{x:,.{0 if x > 99 else 2}f}" for x in figures)
            print(f"{what:42}{'{:>10}{:>10}{:>10}'.format(*cells)}  {target}", flush=True)
            ours, peer, ratio = figures
            rows.append(dict(what=what, ours=ours, peer=peer, ratio=ratio, target=target))
    print(json.dumps({"machine": machine, "rows": rows}, allow_nan=False))


if __name__ == "__main__":
    main()
