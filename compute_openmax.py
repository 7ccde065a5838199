"""Turn a trained DHR network into an open-set recogniser and measure it.

    python compute_openmax.py                          # CIFAR-10 / TinyImageNet
    python compute_openmax.py --unknown svhn folder:my/images --report report
    python compute_openmax.py --images a.jpg holiday/  # a class, or unknown?
    torchrun --nproc-per-node 8 compute_openmax.py     # on eight GPUs

Five methods, OpenMax and CROSR among them, are fitted on training images, take
their threshold from validation images, and are compared on test images.
"""

import argparse
import sys
from pathlib import Path

from choices import DISTANCES, KNOWN_SPLITS, UNKNOWN_SETS, command_line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__)
    # fmt: off
    add = parser.add_argument
    add("--checkpoint", type=Path, default=Path("dhr_net.pt"), metavar="PATH",
        help="written by train_dhr_nn.py (default dhr_net.pt)")
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR",
        help="where images lie or are downloaded to (default data)")
    add("--unknown", nargs="+", metavar="NAME",
        help=f"{', '.join(UNKNOWN_SETS)}, or folder:PATH (default tiny-imagenet-crop, or the "
        "classes that --known-classes left out)")
    add("--images", nargs="+", type=Path, metavar="PATH",
        help="say of these files or folders what they show, instead of measuring")
    add("--latents", choices=("max", "avg", "none"), default="max",
        help="how crosr pools latents (default max, as published)")
    add("--distance", choices=DISTANCES, default="euclidean",
        help="of openmax and crosr to class means (default euclidean)")
    add("--tail-size", type=int, default=20, metavar="N",
        help="largest distances a Weibull is fitted to, 5 or more (default 20)")
    add("--alpha", type=int, default=0, metavar="N",
        help="top-ranked classes that openmax and crosr revise, as printed in the "
        "papers; 0 for the released code's form, all and unranked (default 0)")
    add("--json", type=Path, metavar="PATH", help="write the results there, too (default: no)")
    add("--csv", type=Path, metavar="PATH",
        help="with --images, write one row an image there (default: no)")
    add("--report", type=Path, metavar="DIR",
        help="write report.html with pictures there (default: no)")
    add("--no-cache", action="store_true",
        help="extract anew, and store nothing in DIR/cache (default: do)")
    add("--device", default="auto", metavar="NAME",
        help="auto, cpu, cuda, cuda:1, ... (default auto: a GPU if any)")
    add("--batch-size", type=int, default=500, metavar="N",
        help="images sent to the device at once; changes no result (default 500)")
    add("--seed", type=int, default=0, metavar="N",
        help="of the random crops and the noise images (default 0)")
    add("--dry-run", action="store_true", help="check the checkpoint and find the images, no more")
    # fmt: on
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"--batch-size is {args.batch_size}; expected at least 1")
    if (args.csv and not args.images) or (args.report and args.images):
        parser.error("--csv goes with --images, --report without")
    if set(args.unknown or ()) & set(KNOWN_SPLITS):
        parser.error(f"--unknown takes sets of unknown images, not {', '.join(KNOWN_SPLITS)}")
    return args


if __name__ == "__main__":  # bad arguments and --help end here, before the slow imports
    parse_args(None)

import csv
import hashlib
import io
import json
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import expit, softmax
from tqdm import tqdm

import models
from distributed import first_process_first, joined_processes, rank, shared_out
from metrics import Scores, open_set_metrics, threshold_accepting
from models import (
    ACCEPTED_SHARE,
    LATENT_CHANNELS,
    DHRNet,
    extract,
    fit_rule,
    keep_freed_memory,
    load_checkpoint,
    prepare_device,
    refuse_damaged,
    replace_file,
    software_versions,
    try_writing,
    unpack_rule,
)
from open_set_data import (
    HELD_OUT_CLASSES,
    ImageSet,
    ImagesUnavailable,
    fit_to,
    image_files,
    load_known,
    load_unknown,
    printable,
    read_images,
)
from openmax import (
    UNKNOWN,
    WEIBULL_ENGINE,
    Activations,
    DHROpenMax,
    OpenMax,
    activation_vectors,
)

SHIPPED_ACTIVATIONS = Path(__file__).resolve().parent / "data" / "dhr_net_activations.npz"
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


class Rule(NamedTuple):
    """Settings of the OpenMax methods, named as the flags; `openmax.OpenMax` explains them."""

    latents: str
    distance: str
    tail_size: int
    alpha: int


# A method learns from training and validation images of known classes and returns its scoring rule.
Scorer = Callable[[Activations], Scores]
Method = Callable[[Activations, Activations, Rule], Scorer]


def msp(train: Activations, val: Activations, rule: Rule) -> Scorer:
    """1 - the largest softmax probability (Hendrycks and Gimpel 2017)."""

    def score(images: Activations) -> Scores:
        known = softmax(images.logits.astype(np.float64), axis=1)
        unknownness = 1 - known.max(axis=1)
        return Scores(unknownness, np.column_stack([known, unknownness]))

    return score


def max_logit(train: Activations, val: Activations, rule: Rule) -> Scorer:
    """Minus the largest logit (Vaze et al. 2022); its probabilities are the logits' sigmoids."""

    def score(images: Activations) -> Scores:
        logits = images.logits.astype(np.float64)
        unknownness = -logits.max(axis=1)
        return Scores(unknownness, np.column_stack([expit(logits), expit(unknownness)]))

    return score


def openmax(train: Activations, val: Activations, rule: Rule) -> Scorer:
    """OpenMax on the logits y (Bendale and Boult 2016)."""
    return crosr(train, val, rule._replace(latents="none"))


def crosr(train: Activations, val: Activations, rule: Rule) -> Scorer:
    """OpenMax on [y, z] (Yoshihashi et al. 2019)."""
    model = OpenMax(rule.tail_size, rule.alpha, rule.distance)
    model.fit(activation_vectors(train, rule.latents), train.labels)

    def score(images: Activations) -> Scores:
        probabilities = model.predict_proba(activation_vectors(images, rule.latents))
        return Scores(probabilities[:, UNKNOWN], probabilities)

    return score


def dhr_openmax(train: Activations, val: Activations, rule: Rule) -> Scorer:
    """OpenMax on y, corrected by the latents of each level; takes only the rule's tail size."""
    return rule_scorer(fit_rule(train, val, rule.tail_size))


def rule_scorer(model: DHROpenMax) -> Scorer:
    """Score with a fitted `DHROpenMax`."""

    def score(images: Activations) -> Scores:
        decided = model.decide(activation_vectors(images, "avg"))
        return Scores(decided[:, 0], decided[:, 1:])

    return score


METHODS: dict[str, Method] = {
    "msp": msp,
    "max_logit": max_logit,
    "openmax": openmax,
    "crosr": crosr,
    "dhr_openmax": dhr_openmax,
}


def cached(
    path: Path, labels: np.ndarray, widths: Sequence[int], make: Callable[[], Activations]
) -> Activations:
    """The activations stored at `path`; made and stored where there are none, or damaged ones.

    Args:
        path: file in the cache.
        labels: [N], the labels of the images.
        widths: columns of the logits and of both latents.
        make: makes them.
    """
    try:
        refuse_damaged(path)
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            stored_labels, *arrays = (stored[field] for field in Activations._fields)
        shapes = [(len(labels), width) for width in widths]
        if not np.array_equal(stored_labels, labels) or [a.shape for a in arrays] != shapes:
            raise ValueError("arrays of other images or another network")
        if not all(a.dtype == np.float32 and np.isfinite(a).all() for a in arrays):
            raise ValueError("arrays are not finite float32")
        return Activations(labels, *arrays)
    except FileNotFoundError:
        pass
    except Exception as error:  # whatever is wrong with it, it can be made anew
        print(f"{path} is damaged ({error}); made anew", file=sys.stderr)
    activations = make()
    if rank():
        return activations
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda file: np.savez(file, **activations._asdict()))
    except OSError as error:
        print(f"{path} could not be stored ({error}); going on without", file=sys.stderr)
    return activations


def cache_key(checkpoint_hash: str, images: ImageSet, number_format: str) -> str:
    """Hash of all that decides the activations: network, pixels, arithmetic and this code."""
    key = hashlib.sha256(f"{checkpoint_hash} {number_format} {Activations._fields}".encode())
    key.update(Path(models.__file__).read_bytes())
    for array in images:
        key.update(f"{array.shape} {array.dtype}".encode())
        key.update(np.ascontiguousarray(array).data)
    return key.hexdigest()[:32]


def load_image_sets(
    meta: dict[str, Any], names: Sequence[str], data_dir: Path, seed: int
) -> dict[str, ImageSet]:
    """The named sets: `train`, `val`, `test_known` of the checkpoint's data, or unknown ones."""
    if not names:
        return {}
    train_args = meta["train_args"]
    data = load_known(train_args["dataset"], data_dir, train_args["known_classes"])
    sets = {}
    for name in names:
        if name in KNOWN_SPLITS:
            sets[name] = getattr(data, name)
            continue
        if name == HELD_OUT_CLASSES:
            images = data.test_unknown
        else:
            config = meta["model_config"]
            size, channels = config["image_size"], config["in_channels"]
            images = load_unknown(name, data_dir, size, channels, seed)
        sets[name] = ImageSet(images, np.full(len(images), UNKNOWN))
    return sets


def shipped_activations(checkpoint_hash: str, names: Sequence[str]) -> dict[str, Activations]:
    """Activations that ship with the checkpoint, tied to it by its hash; latents have 8 bits.

    Raises:
        ImagesUnavailable: they belong to another checkpoint, lack one of the sets, or are damaged.
    """

    def unpack(name: str, field: str) -> np.ndarray:
        array = stored[f"{name}/{field}"]
        if field == "labels":
            return array.astype(np.int64)
        if field == "logits":
            return array.astype(np.float32)
        low, high = stored[f"range/{field}"]
        return low + array * ((high - low) / 255)

    try:
        refuse_damaged(SHIPPED_ACTIVATIONS)
        with open(SHIPPED_ACTIVATIONS, "rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["checkpoint"]) != checkpoint_hash:
                raise ImagesUnavailable("the activation vectors here are of another checkpoint")
            missing = [name for name in names if f"{name}/labels" not in stored]
            if missing:
                raise ImagesUnavailable(f"no activation vectors ship for {', '.join(missing)}")
            return {
                name: Activations(*(unpack(name, field) for field in Activations._fields))
                for name in names
            }
    except ImagesUnavailable:
        raise
    except FileNotFoundError as error:
        raise ImagesUnavailable("no activation vectors ship with the checkpoint") from error
    except Exception as error:  # a damaged file can fail in any way
        raise ImagesUnavailable(f"{SHIPPED_ACTIVATIONS} is damaged ({error})") from error


def fitted(
    methods: Iterable[str], train: Activations, val: Activations, rule: Rule
) -> tuple[dict[str, Scorer], dict[str, float]]:
    """Scoring rules of the named methods, and thresholds that accept 95 % of validation images."""
    scorers = {name: METHODS[name](train, val, rule) for name in methods}
    thresholds = {
        name: threshold_accepting(scorer(val).unknownness, ACCEPTED_SHARE)
        for name, scorer in scorers.items()
    }
    return scorers, thresholds


def measure(
    scores: dict[str, dict[str, Scores]], thresholds: dict[str, float], test: Activations
) -> dict[str, Any]:
    """Closed-set accuracy, and all metrics of every method on every unknown set.

    Args:
        scores: of each method, those of `test_known` and of the unknown sets.
        thresholds: of each method.
        test: activations of `test_known`.
    """
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


def print_table(known: str, methods: dict[str, dict[str, dict[str, float]]]) -> None:
    """One block an unknown set, one row a method, all in percent."""
    for unknown in methods["msp"]:
        print(f"\n{known} (known) against {unknown} (unknown), in %")
        print(" " * 11 + "".join(f"{title:>10}" for title in TABLE_COLUMNS.values()))
        for method, sets in methods.items():
            row = (f"{100 * sets[unknown][column]:10.2f}" for column in TABLE_COLUMNS)
            print(f"{method:11}" + "".join(row))


def name_predictions(
    files: Sequence[Path], scores: Scores, threshold: float, classes: Sequence[str]
) -> list[dict[str, Any]]:
    """For each image the predicted class or `unknown`, its probability, and the nearest class."""
    predicted = scores.predict(threshold)
    return [
        {
            "path": str(file),
            "prediction": "unknown" if label == UNKNOWN else classes[label],
            "probability": float(probabilities[label]),
            "nearest_class": classes[nearest],
        }
        for file, label, nearest, probabilities in zip(
            files, predicted, scores.nearest_class, scores.probabilities, strict=True
        )
    ]


def print_predictions(predictions: list[dict[str, Any]]) -> None:
    for row in predictions:
        tqdm.write(
            f"{row['prediction']:16}{row['probability']:12.4f}  "
            f"{row['nearest_class']:16}{printable(row['path'])}"
        )


def score_images(
    paths: Sequence[Path],
    model: DHRNet,
    extract_set: Callable[[ImageSet], Activations],
    scorer: Scorer,
    threshold: float,
    classes: Sequence[str],
    batch_size: int,
) -> list[dict[str, Any]]:
    """Say of image files what they show, printing as it goes; see `name_predictions`."""
    files = image_files(paths)
    print(f"\n{'prediction':16}{'probability':>12}  {'nearest class':16}image")
    predictions = []
    size, channels = model.config["image_size"], model.config["in_channels"]
    bar = tqdm(total=len(files), unit="img", leave=False)
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        bar.update(len(batch))
        try:
            pixels, read = read_images(batch, size)
        except ValueError:  # none of them is an image; each was named
            continue
        images = ImageSet(fit_to(pixels, size, channels), np.full(len(read), UNKNOWN))
        scores = scorer(extract_set(images))
        rows = name_predictions([batch[i] for i in read], scores, threshold, classes)
        print_predictions(rows)
        predictions += rows
    bar.close()
    if not predictions:
        raise ValueError(f"none of the {len(files)} files is a readable image")
    return predictions


@torch.no_grad()
def reconstruct(model: DHRNet, device: torch.device, images: np.ndarray) -> np.ndarray:
    """What the network rebuilds of images [N, H, W, C] uint8, likewise."""
    rebuilt = model(torch.from_numpy(images).to(device).permute(0, 3, 1, 2)).reconstruction
    pixels = rebuilt * model.std[:, None, None] + model.mean[:, None, None]
    return (255 * pixels).clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, lambda file: file.write(text.getvalue().encode(errors="surrogateescape")))
    print(f"\nwrote {path}")


def write_json(path: Path, results: dict[str, Any]) -> None:
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    replace_file(path, lambda file: file.write(text.encode()))
    print(f"\nwrote {path}")


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def run(args: argparse.Namespace) -> None:
    if args.report and not rank():
        args.report.mkdir(parents=True, exist_ok=True)
    for path in (args.json, args.csv, args.report and args.report / "report.html"):
        if path and not rank():
            try_writing(path, 2**20)
    seconds: dict[str, float] = {}

    # The network, and the images to fit, to choose thresholds and to score
    with timed(seconds, "load"):
        device, autocast = prepare_device(args.device)
        model, meta = load_checkpoint(args.checkpoint)
        stored_rule = unpack_rule(model, meta) if args.images and "open_set_rule" in meta else None
        model.to(device).to(memory_format=torch.channels_last)
        checkpoint_hash = hashlib.sha256(args.checkpoint.read_bytes()).hexdigest()
        classes, config = meta["known_classes"], meta["model_config"]
        print(
            f"{args.checkpoint}: {config['arch']} DHR network of {len(classes)} classes, "
            f"epoch {meta['epoch']}, validation accuracy {100 * meta['val_accuracy']:.2f} %"
        )
        if args.images and not stored_rule:
            print("no open-set rule is in it: fitting one to its training and validation images")
        if WEIBULL_ENGINE != "libmr":
            print("libMR is not installed; SciPy fits the Weibulls, within 1e-5 of libMR")
        names = [] if stored_rule else ["train", "val"]
        if not args.images:
            left_out = meta["train_args"]["known_classes"]
            default = HELD_OUT_CLASSES if left_out else "tiny-imagenet-crop"
            names += ["test_known", *dict.fromkeys(args.unknown or [default])]
        image_sets: dict[str, ImageSet] = {}
        sets: dict[str, Activations] = {}
        try:
            image_sets = first_process_first(
                lambda: load_image_sets(meta, names, args.data_dir, args.seed)
            )
        except ImagesUnavailable as error:
            try:
                sets = shipped_activations(checkpoint_hash, names)
            except ImagesUnavailable as also:
                raise ImagesUnavailable(f"{error}; and {also}") from error
            print(f"{error}.\nUsing the activation vectors that ship with the checkpoint.")
        keep_freed_memory()
    if args.dry_run:
        for name, found in (sets or image_sets).items():
            print(f"{name}: {len(found.labels):,} images")
        return

    # Activation vectors
    origin = "shipped" if sets else "extracted"
    extract_set = partial(
        extract, model, batch_size=args.batch_size, device=device, autocast=autocast
    )
    with timed(seconds, "extract"):
        number_format = f"{device.type} bfloat16={autocast._enabled} torch {torch.__version__}"
        widths = [config["num_classes"], *[LATENT_CHANNELS * len(model.bottlenecks)] * 2]
        for name, images in image_sets.items():
            make = partial(shared_out, partial(extract_set, title=name), images)
            key = cache_key(checkpoint_hash, images, number_format)
            path = args.data_dir / "cache" / f"{key}.npz"
            sets[name] = make() if args.no_cache else cached(path, images.labels, widths, make)
    if rank():
        return

    # Methods: fitted on training images, thresholds from validation images
    rule = Rule(args.latents, args.distance, args.tail_size, args.alpha)
    with timed(seconds, "fit"):
        if stored_rule:
            scorers = {"dhr_openmax": rule_scorer(stored_rule[0])}
            thresholds = {"dhr_openmax": stored_rule[1]}
        else:
            wanted = ["dhr_openmax"] if args.images else METHODS
            scorers, thresholds = fitted(wanted, sets["train"], sets["val"], rule)

    # Scores
    results: dict[str, Any] = {
        "checkpoint": {"path": str(args.checkpoint), "sha256": checkpoint_hash},
        "known": meta["train_args"]["dataset"],
        "activations": origin,
    }
    with timed(seconds, "score"):
        if args.images:
            results["images"] = score_images(
                args.images,
                model,
                partial(extract_set, title=None),
                scorers["dhr_openmax"],
                thresholds["dhr_openmax"],
                classes,
                args.batch_size,
            )
        else:
            tested = names[names.index("test_known") :]
            scores = {
                method: {name: scorer(sets[name]) for name in tested}
                for method, scorer in scorers.items()
            }
            results |= measure(scores, thresholds, sets["test_known"])
            print(f"closed-set accuracy {100 * results['closed_set_accuracy']:.2f} %")
            print_table(results["known"], results["methods"])
    print("\n" + ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items()))

    results |= {
        "openmax": {**rule._asdict(), "threshold": thresholds},
        "seconds": seconds,
        "versions": software_versions(),
        "device": str(device),
        "command": shlex.join(["python", "compute_openmax.py", *args.argv]),
    }
    if args.json:
        write_json(args.json, results)
    if args.report:
        write_json(args.report / "results.json", results)
        from report import write_report  # draws; nothing else needs matplotlib

        def refit(method: str, tail_size: int, alpha: int) -> Scorer:
            settings = rule._replace(tail_size=tail_size, alpha=alpha)
            return METHODS[method](sets["train"], sets["val"], settings)

        pixels = {name: image_sets[name].images for name in scores["msp"]} if image_sets else {}
        rebuild = partial(reconstruct, model, device)
        write_report(args.report, results, classes, sets, scores, refit, pixels, rebuild)
    if args.csv:
        write_csv(args.csv, results["images"])


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    try:
        with joined_processes():
            run(args)
    except (ImagesUnavailable, ValueError, OSError) as error:
        print(f"compute_openmax.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped; finished image sets are in {args.data_dir / 'cache'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
