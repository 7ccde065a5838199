"""Turn a trained DHR network into an open-set recogniser and measure it.

    python compute_openmax.py                          # CIFAR-10 against TinyImageNet
    python compute_openmax.py --unknown svhn folder:my/images --report report
    python compute_openmax.py --images a.jpg holiday/  # a class, or unknown?
    torchrun --nproc-per-node 8 compute_openmax.py     # on eight GPUs

Five methods, OpenMax and CROSR among them, are fitted to training images, take
their threshold from validation images, and are compared on test images.
"""

import argparse
import csv
import io
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from activations import (
    Activations,
    cache_key,
    cached,
    extract,
    file_sha256,
    keep_freed_memory,
    load_network,
    load_shipped,
    reconstruct,
)
from command_line import check_writable, make_parser, number, run, software_versions
from distributed import first_process_first, rank, split_over_processes
from methods import (
    DHROpenMax,
    Method,
    OpenMaxSettings,
    acceptance_interval,
    build_methods,
    check_classes,
    stored_rule,
)
from metrics import ACCEPTED_SHARE, TITLES, Scores, open_set_metrics
from models import DHRNet, replace_file
from open_set_data import (
    HELD_OUT_CLASSES,
    KNOWN_SPLITS,
    UNKNOWN_SETS,
    ImagesUnavailable,
    as_unknown,
    load_image_sets,
)
from openmax import DISTANCES, MIN_TAIL_SIZE, UNKNOWN, WEIBULL_ENGINE
from pictures import ImageSet, fit_to, image_files, printable, read_images


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "%(prog)s [option ...]")
    # fmt: off
    add = parser.add_argument
    add("--checkpoint", type=Path, default=Path("dhr_net.pt"), metavar="PATH",
        help="written by train_dhr_nn.py (default dhr_net.pt)")
    add("--dataset", metavar="NAME",
        help="where the known images are now, folder:PATH (default: as in training)")
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR",
        help="where images are found or downloaded to (default data)")
    add("--unknown", nargs="+", metavar="NAME",
        help=f"{', '.join(UNKNOWN_SETS)}, or folder:PATH (default held-out-classes, those that "
        "--known-classes left out, or tiny-imagenet-crop)")
    add("--images", nargs="+", type=Path, metavar="PATH",
        help="classify these image files or folders by the rule in the checkpoint; no evaluation")
    add("--latents", choices=("max", "avg", "none"), default="max",
        help="how crosr pools latents (default max, as published)")
    add("--distance", choices=DISTANCES, default="euclidean",
        help="of openmax and crosr to class means (default euclidean)")
    add("--tail-size", type=number(MIN_TAIL_SIZE), default=20, metavar="N",
        help="largest distances that openmax and crosr fit a Weibull to, 5 or more; a class with "
        "few images takes a quarter of them, but at least 5 (default 20)")
    add("--alpha", type=number(0), default=0, metavar="N",
        help="top-ranked classes that openmax and crosr revise, as printed in the papers; 0 for "
        "the released code's form, all and unranked (default 0)")
    add("--json", type=Path, metavar="PATH", help="write the results there (default: no)")
    add("--csv", type=Path, metavar="PATH",
        help="with --images, write one row per file there (default: no)")
    add("--report", type=Path, metavar="DIR",
        help="write report.html with pictures there (default: no)")
    add("--no-cache", action="store_true",
        help="neither read nor store activations in DATA_DIR/cache (default: do)")
    add("--device", default="auto", metavar="NAME",
        help="auto, cpu, cuda, cuda:1, ... (default auto: a GPU if there is one)")
    add("--batch-size", type=number(1), default=250, metavar="N",
        help="images sent to the device at once (default 250)")
    # fmt: on
    args = parser.parse_args(argv)
    if args.csv and not args.images:
        parser.error("--csv needs --images")
    if args.report and args.images:
        parser.error("--report is of an evaluation; leave out --images")
    flags = sys.argv[1:] if argv is None else argv
    args.command = shlex.join(["python", "compute_openmax.py", *flags])
    return args


def open_network(args: argparse.Namespace) -> tuple[DHRNet, dict[str, Any]]:
    """The network on its device, and its checkpoint; says what they are."""
    network, checkpoint = load_network(args.checkpoint, args.device)
    print(
        f"{args.checkpoint}: {network.config['arch']} DHR network, "
        f"{len(checkpoint['known_classes'])} classes, epoch {checkpoint['epoch']}, "
        f"validation accuracy {100 * checkpoint['val_accuracy']:.2f} %"
    )
    return network, checkpoint


def classify_images(args: argparse.Namespace) -> None:
    """Say of a user's own files which class they show, or that it is unknown."""
    network, checkpoint = open_network(args)
    if "open_set_rule" not in checkpoint:
        raise ValueError(
            f"{args.checkpoint} holds no open-set rule: finish its training with --resume, "
            "or train longer, or on more images"
        )
    rule, classes = stored_rule(network, checkpoint), checkpoint["known_classes"]
    files = image_files(args.images)
    if rank():
        return
    print(f"\n{'prediction':16}{'probability':>12}  {'nearest class':16}image")
    rows: list[dict[str, Any]] = []
    for start in range(0, len(files), args.batch_size):
        rows += classified(files[start : start + args.batch_size], network, rule, classes)
        print("\n".join(map(line_of, rows[start:])), flush=True)
    if args.json:
        results = {
            "checkpoint": {"path": str(args.checkpoint), "sha256": file_sha256(args.checkpoint)},
            "images": rows,
            "versions": software_versions(),
            "device": str(network.mean.device),
            "command": args.command,
        }
        write_json(args.json, results)
    if args.csv:
        write_csv(args.csv, rows)
    if unread := sum(bool(row["error"]) for row in rows):
        print(f"{unread:,} of {len(rows):,} files could not be read", file=sys.stderr)
    if unread == len(rows):
        raise ValueError("none of the files is a readable image")


def classified(
    files: Sequence[Path], network: DHRNet, rule: DHROpenMax, classes: Sequence[str]
) -> list[dict[str, Any]]:
    """One row per file: path, prediction, whether it is known, probability, nearest class, and the
    reason where the file could not be read."""
    pixels, unread = read_images(files, network.config["image_size"])
    nothing = dict.fromkeys(("prediction", "known", "probability", "nearest_class"))
    rows = [{"path": str(f), **nothing, "error": unread.get(i)} for i, f in enumerate(files)]
    if not len(pixels):
        return rows
    pixels = fit_to(pixels, network.config["image_size"], network.config["in_channels"])
    scores = rule.score(extract(network, as_unknown(pixels), len(pixels)))
    for row, label, nearest, probabilities in zip(
        [row for row in rows if not row["error"]],
        scores.predict(rule.threshold_),
        scores.nearest_class,
        scores.probabilities,
        strict=True,
    ):
        row["prediction"] = "unknown" if label == UNKNOWN else classes[label]
        row["known"] = bool(label != UNKNOWN)  # a class may be called "unknown"
        row["probability"] = float(probabilities[label])
        row["nearest_class"] = classes[nearest]
    return rows


def line_of(row: dict[str, Any]) -> str:
    """A row of `classified` as text."""
    path = printable(row["path"])
    if row["error"]:
        return f"{'(not read)':46}{path}: {row['error']}"
    return f"{row['prediction']:16}{row['probability']:12.4f}  {row['nearest_class']:16}{path}"


def evaluate(args: argparse.Namespace) -> None:
    """Fit the five methods, measure them side by side, and write the results."""
    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        network, checkpoint = open_network(args)
        classes, sha256 = checkpoint["known_classes"], file_sha256(args.checkpoint)
        if args.alpha > len(classes):
            raise ValueError(f"--alpha is {args.alpha}; expected 0..{len(classes)}, the classes")
        if WEIBULL_ENGINE != "libmr":
            print("libMR is not installed; SciPy fits the Weibulls, within 1e-5 of libMR")
        unknown = unknown_names(args, checkpoint)
        image_sets, sets = find_sets(args, checkpoint, unknown, sha256)
        keep_freed_memory()
    with timed(seconds, "extract"):
        for name, images in image_sets.items():
            sets[name] = extract_or_load(args, network, sha256, name, images)
    if rank():
        return

    check_classes(sets["train"], classes)
    settings = OpenMaxSettings(args.latents, args.distance, args.tail_size, args.alpha)
    methods = build_methods(settings)
    with timed(seconds, "fit"):
        for method in methods.values():
            method.fit(sets["train"], sets["val"])
    with timed(seconds, "score"):
        scores, measured = measure(methods, sets, unknown)
    thresholds = {name: method.threshold_ for name, method in methods.items()}
    results = {
        "checkpoint": {"path": str(args.checkpoint), "sha256": sha256},
        "known": args.dataset or checkpoint["train_args"]["dataset"],
        "activations": "extracted" if image_sets else "shipped",
        "images": {name: len(activations.labels) for name, activations in sets.items()},
        "closed_set_accuracy": sets["test_known"].accuracy,
        "methods": measured,
        "openmax": {**settings._asdict(), "threshold": thresholds},
        "seconds": seconds,
        "versions": software_versions(),
        "device": str(network.mean.device),
        "command": args.command,
    }
    print_results(results)
    if args.json:
        write_json(args.json, results)
    if args.report:
        write_json(args.report / "results.json", results)
        from report import write_report  # matplotlib, only now

        pixels = {name: image_sets[name].images for name in scores["msp"]} if image_sets else {}
        rebuild = partial(reconstruct, network)
        write_report(args.report, results, classes, sets, scores, methods, pixels, rebuild)


def measure(
    methods: dict[str, Method | DHROpenMax], sets: dict[str, Activations], unknown: Sequence[str]
) -> tuple[dict[str, dict[str, Scores]], dict[str, Any]]:
    """Each method's scores on `test_known` and the unknown sets, and its metrics on the latter."""
    scores: dict[str, dict[str, Scores]] = {}
    measured: dict[str, Any] = {}
    for name, method in methods.items():
        scores[name] = {part: method.score(sets[part]) for part in ("test_known", *unknown)}
        known, labels = scores[name]["test_known"], sets["test_known"].labels
        measured[name] = {
            part: open_set_metrics(known, labels, scores[name][part], method.threshold_)
            for part in unknown
        }
    return scores, measured


def extract_or_load(
    args: argparse.Namespace, network: DHRNet, sha256: str, name: str, images: ImageSet
) -> Activations:
    """Activations of an image set: from the cache, or each process extracts its share."""
    extract_share = partial(extract, network, batch_size=args.batch_size, title=name)
    extract_all = partial(split_over_processes, extract_share, images)
    if args.no_cache:
        return extract_all()
    key = cache_key(sha256, images, network.mean.device)
    return cached(args.data_dir / "cache" / f"{key}.npz", extract_all)


def unknown_names(args: argparse.Namespace, checkpoint: dict[str, Any]) -> list[str]:
    """The unknown sets to measure against, each once."""
    train_args = checkpoint["train_args"]
    dataset = train_args["dataset"]
    if args.unknown:
        for name in args.unknown:
            variant = name in UNKNOWN_SETS and name.startswith(f"{dataset}-")
            if name == dataset or variant:
                raise ValueError(f"{name} shows what the network knows; see --help for other sets")
        return list(dict.fromkeys(args.unknown))
    if train_args["known_classes"]:
        return [HELD_OUT_CLASSES]
    if dataset.startswith("folder:"):
        raise ValueError(
            "this network knows all classes of its folder; name pictures of something else with "
            "--unknown folder:PATH, or train it with --known-classes to leave some out"
        )
    return ["textures" if dataset == "tiny-imagenet" else "tiny-imagenet-crop"]


def find_sets(
    args: argparse.Namespace, checkpoint: dict[str, Any], unknown: Sequence[str], sha256: str
) -> tuple[dict[str, ImageSet], dict[str, Activations]]:
    """The image sets; or, where one of them is neither on disk nor can be downloaded, the
    activations that ship with the checkpoint. One of the two dicts is empty."""
    dataset = args.dataset or checkpoint["train_args"]["dataset"]
    load = partial(load_image_sets, checkpoint, dataset, unknown, args.data_dir)
    try:
        return first_process_first(load), {}
    except ImagesUnavailable as error:
        try:
            sets = load_shipped(sha256, [*KNOWN_SPLITS, *unknown])
        except ImagesUnavailable as also:
            raise ImagesUnavailable(f"{error}; and {also}") from error
        print(f"{error}.\nUsing the activations that ship with the checkpoint.")
        return {}, sets


def print_results(results: dict[str, Any]) -> None:
    """One block per unknown set, one row per method, all in percent."""
    count, methods = results["images"], results["methods"]
    print(f"closed-set accuracy {100 * results['closed_set_accuracy']:.2f} %")
    low, high = acceptance_interval(count["val"])
    print(
        f"each threshold accepts at least {100 * ACCEPTED_SHARE:.0f} % of {count['val']:,} "
        f"validation images; of new known images, expect {100 * low:.0f} to {100 * high:.0f} %"
    )
    for unknown in methods["msp"]:
        print(
            f"\n{results['known']} ({count['test_known']:,} known images) against {unknown} "
            f"({count[unknown]:,} unknown ones), in %"
        )
        print(" " * 11 + "".join(f"{title:>10}" for title in TITLES.values()))
        for method, sets in methods.items():
            row = (f"{100 * sets[unknown][metric]:10.2f}" for metric in TITLES)
            print(f"{method:11}" + "".join(row))
    print("\n" + ", ".join(f"{stage} {value:.1f} s" for stage, value in results["seconds"].items()))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, lambda file: file.write(text.getvalue().encode(errors="surrogateescape")))
    print(f"wrote {path}")


def write_json(path: Path, results: dict[str, Any]) -> None:
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    replace_file(path, lambda file: file.write(text.encode()))
    print(f"wrote {path}")


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    def work() -> None:
        outputs = [args.json, args.csv]
        if args.report:
            args.report.mkdir(parents=True, exist_ok=True)
            outputs.append(args.report / "report.html")
        for path in filter(None, outputs):
            check_writable(path)
        (classify_images if args.images else evaluate)(args)

    kept = f"finished image sets are in {args.data_dir / 'cache'}"
    if args.images or args.no_cache:
        kept = "nothing was stored"
    return run("compute_openmax.py", work, lambda: kept)


if __name__ == "__main__":
    raise SystemExit(main())
