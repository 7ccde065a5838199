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
import hashlib
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

import numpy as np
from tqdm import tqdm

from activations import (
    Activations,
    cache_key,
    cached,
    extract,
    keep_freed_memory,
    load_network,
    load_shipped,
    reconstruct,
)
from command_line import make_parser, run
from distributed import first_process_first, rank, shared_out
from methods import DHROpenMax, OpenMaxSettings, acceptance_interval, build_methods, stored_rule
from metrics import ACCEPTED_SHARE, Scores, open_set_metrics
from models import DHRNet, check_writable, replace_file, software_versions
from open_set_data import (
    HELD_OUT_CLASSES,
    KNOWN_SPLITS,
    UNKNOWN_SETS,
    ImageSet,
    ImagesUnavailable,
    as_unknown,
    check_same_images,
    fit_to,
    image_files,
    load_known,
    load_unknown,
    printable,
    read_images,
)
from openmax import DISTANCES, MIN_TAIL_SIZE, UNKNOWN, WEIBULL_ENGINE

TABLE_COLUMNS = {
    "auroc": "AUROC",
    "aupr_known": "AUPR-kno",
    "aupr_unknown": "AUPR-unk",
    "fpr_at_95_tpr": "FPR95",
    "detection_error": "det.err.",
    "oscr": "OSCR",
    "macro_f1": "macro-F1",
    "macro_f1_at_half": "F1@0.5",
}


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
        help=f"{', '.join(UNKNOWN_SETS)}, or folder:PATH (default tiny-imagenet-crop, or the "
        "classes that --known-classes left out)")
    add("--images", nargs="+", type=Path, metavar="PATH",
        help="classify these image files or folders instead of running the evaluation")
    add("--latents", choices=("max", "avg", "none"), default="max",
        help="how crosr pools latents (default max, as published)")
    add("--distance", choices=DISTANCES, default="euclidean",
        help="of openmax and crosr to class means (default euclidean)")
    add("--tail-size", type=int, default=20, metavar="N",
        help="largest distances a Weibull is fitted to, 5 or more, at most a quarter of a class "
        "(default 20)")
    add("--alpha", type=int, default=0, metavar="N",
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
    add("--batch-size", type=int, default=250, metavar="N",
        help="images sent to the device at once (default 250)")
    add("--seed", type=int, default=0, metavar="N",
        help="of the random crops and the noise images (default 0)")
    add("--dry-run", action="store_true", help="check the checkpoint and find the images, no more")
    # fmt: on
    args = parser.parse_args(argv)
    for name, lowest in {"batch_size": 1, "tail_size": MIN_TAIL_SIZE, "alpha": 0}.items():
        if getattr(args, name) < lowest:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} is {getattr(args, name)}; expected at least {lowest}")
    if (args.csv and not args.images) or (args.report and args.images):
        parser.error("--csv needs --images; --report cannot go with it")
    if set(args.unknown or ()) & set(KNOWN_SPLITS):
        parser.error(f"--unknown takes sets of unknown images, not {', '.join(KNOWN_SPLITS)}")
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
        raise ValueError(f"{args.checkpoint} holds no open-set rule; train the network again")
    rule, classes = stored_rule(network, checkpoint), checkpoint["known_classes"]
    files = image_files(args.images)
    if args.dry_run:
        print(f"{len(files):,} files")
        return
    print(f"\n{'prediction':16}{'probability':>12}  {'nearest class':16}image")
    rows: list[dict[str, Any]] = []
    bar = tqdm(total=len(files), unit="img", leave=False, disable=len(files) <= args.batch_size)
    for start in range(0, len(files), args.batch_size):
        batch = files[start : start + args.batch_size]
        rows += classified(batch, network, rule, classes)
        tqdm.write("\n".join(map(line_of, rows[start:])))
        bar.update(len(batch))
    bar.close()
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
        names = ["train", "val", "test_known", *unknown_names(args, checkpoint)]
        image_sets, sets = find_sets(args, checkpoint, names, sha256)
        keep_freed_memory()
    if args.dry_run:
        for name, found in (sets or image_sets).items():
            print(f"{name}: {len(found.labels):,} images")
        return
    origin = "shipped" if sets else "extracted"
    with timed(seconds, "extract"):
        for name, images in image_sets.items():
            sets[name] = extract_or_load(args, network, sha256, name, images)
    if rank():
        return

    settings = OpenMaxSettings(args.latents, args.distance, args.tail_size, args.alpha)
    with timed(seconds, "fit"):
        methods = build_methods(settings)
        for method in methods.values():
            method.fit(sets["train"], sets["val"])
    thresholds = {name: method.threshold_ for name, method in methods.items()}
    with timed(seconds, "score"):
        scores = {
            name: {tested: method.score(sets[tested]) for tested in names[2:]}
            for name, method in methods.items()
        }
        results = measure(scores, thresholds, sets["test_known"])
    results = {
        "checkpoint": {"path": str(args.checkpoint), "sha256": sha256},
        "known": checkpoint["train_args"]["dataset"],
        "activations": origin,
        "validation_images": len(sets["val"].labels),
        **results,
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

        pixels = {name: image_sets[name].images for name in names[2:]} if image_sets else {}
        rebuild = partial(reconstruct, network)
        write_report(args.report, results, classes, sets, scores, methods, pixels, rebuild)


def extract_or_load(
    args: argparse.Namespace, network: DHRNet, sha256: str, name: str, images: ImageSet
) -> Activations:
    """Activations of an image set: from the cache, or each process extracts its share."""
    extract_share = partial(extract, network, batch_size=args.batch_size, title=name)
    extract_all = partial(shared_out, extract_share, images)
    if args.no_cache:
        return extract_all()
    key = cache_key(sha256, images, network.mean.device)
    return cached(args.data_dir / "cache" / f"{key}.npz", extract_all)


def unknown_names(args: argparse.Namespace, checkpoint: dict[str, Any]) -> list[str]:
    """The unknown sets to measure against, each once."""
    train_args = checkpoint["train_args"]
    if args.unknown:
        return list(dict.fromkeys(args.unknown))
    if train_args["known_classes"]:
        return [HELD_OUT_CLASSES]
    if train_args["dataset"].startswith("folder:"):
        raise ValueError(
            "this network knows all classes of its folder; name pictures of something else with "
            "--unknown folder:PATH, or train it with --known-classes to leave some out"
        )
    return ["tiny-imagenet-crop"]


def find_sets(
    args: argparse.Namespace, checkpoint: dict[str, Any], names: Sequence[str], sha256: str
) -> tuple[dict[str, ImageSet], dict[str, Activations]]:
    """The image sets; or, where one of them is neither on disk nor can be downloaded, the
    activations that ship with the checkpoint. One of the two dicts is empty."""
    load = partial(load_image_sets, checkpoint, names, args.data_dir, args.seed, args.dataset)
    try:
        return first_process_first(load), {}
    except ImagesUnavailable as error:
        try:
            sets = load_shipped(sha256, names)
        except ImagesUnavailable as also:
            raise ImagesUnavailable(f"{error}; and {also}") from error
        print(f"{error}.\nUsing the activations that ship with the checkpoint.")
        return {}, sets


def load_image_sets(
    checkpoint: dict[str, Any],
    names: Sequence[str],
    data_dir: Path,
    seed: int,
    dataset: str | None = None,
) -> dict[str, ImageSet]:
    """The named sets: `train`, `val`, `test_known` of the checkpoint's data, or unknown ones.

    The known images are looked for in `dataset`, by default where they were in training.
    """
    train_args, config = checkpoint["train_args"], checkpoint["model_config"]
    size, channels = config["image_size"], config["in_channels"]
    dataset = dataset or train_args["dataset"]
    data = load_known(dataset, data_dir, train_args["known_classes"], size)
    check_same_images(checkpoint, data)
    sets = {}
    for name in names:
        if name in KNOWN_SPLITS:
            sets[name] = getattr(data, name)
            continue
        if name == HELD_OUT_CLASSES:
            images = data.test_unknown
        else:
            images = load_unknown(name, data_dir, size, channels, seed)
        sets[name] = as_unknown(images)
    return sets


def measure(
    scores: dict[str, dict[str, Scores]], thresholds: dict[str, float], test: Activations
) -> dict[str, Any]:
    """Closed-set accuracy on `test_known`, and all metrics of every method on every unknown set."""
    accuracy = np.mean(test.logits.argmax(axis=1) == test.labels)
    methods = {
        name: {
            unknown: open_set_metrics(sets["test_known"], test.labels, its, thresholds[name])
            for unknown, its in sets.items()
            if unknown != "test_known"
        }
        for name, sets in scores.items()
    }
    return {"closed_set_accuracy": float(accuracy), "methods": methods}


def print_results(results: dict[str, Any]) -> None:
    """One block per unknown set, one row per method, all in percent."""
    count, methods = results["validation_images"], results["methods"]
    print(f"closed-set accuracy {100 * results['closed_set_accuracy']:.2f} %")
    low, high = acceptance_interval(count)
    print(
        f"each threshold accepts {100 * ACCEPTED_SHARE:.0f} % of {count:,} validation images; "
        f"of new known images, expect {100 * low:.0f} to {100 * high:.0f} %"
    )
    for unknown in methods["msp"]:
        print(f"\n{results['known']} (known) against {unknown} (unknown), in %")
        print(" " * 11 + "".join(f"{title:>10}" for title in TABLE_COLUMNS.values()))
        for method, sets in methods.items():
            row = (f"{100 * sets[unknown][column]:10.2f}" for column in TABLE_COLUMNS)
            print(f"{method:11}" + "".join(row))
    print("\n" + ", ".join(f"{stage} {value:.1f} s" for stage, value in results["seconds"].items()))


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
        if args.report and not rank():
            args.report.mkdir(parents=True, exist_ok=True)
        for path in (args.json, args.csv, args.report and args.report / "report.html"):
            if path and not rank():
                check_writable(path)
        (classify_images if args.images else evaluate)(args)

    return run(
        "compute_openmax.py", work, lambda: f"finished image sets are in {args.data_dir / 'cache'}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
