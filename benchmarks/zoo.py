"""Compare the open-set methods on many small tasks, none of them a reported one.

    python benchmarks/zoo.py            # fit and compare all methods on stored activations; minutes
    python benchmarks/zoo.py --make     # first train what is missing, and store its activations
    python benchmarks/zoo.py --make "photos 4" "photos 4 tuned"    # some of the networks

Each network knows some classes of scikit-learn's digits, of the photographs in data/photos (one
folder per kind), or of CIFAR-10's training images. Its tasks: test images of these classes against
images of the classes left out and, for CIFAR-10, against photographs of other kinds: 32x32 patches,
and whole ones scaled down. No image of a reported table takes part. Figures of a task are means
over its networks, which know different classes. `cifar 500` has 500 training images of each class,
and a third as many each for validation and for testing.

Regret: how far a method's AUROC lies behind the best of the other methods, at worst over all tasks.
Training all networks takes hours on two cores with bfloat16 units.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from activations import Activations, extract, load_network, load_shipped, write_shipped
from command_line import make_parser
from methods import DHROpenMax, OpenMaxSettings, build_methods
from metrics import TITLES, Scores, open_set_metrics
from models import DHRNet, replace_file
from open_set_data import KNOWN_SPLITS, as_unknown, load_known, load_unknown, random_crops
from pictures import ImageSet, fit_to

DATA = ROOT / "data"
VEHICLES_AND_HOOFED = "airplane,automobile,deer,horse,ship,truck"  # unknown: bird, cat, dog, frog
ANIMALS = "bird,cat,deer,dog,frog,horse"  # unknown: airplane, automobile, ship, truck
PHOTOS_OF_VEHICLES = (
    "beach wagon", "convertible", "gondola", "lifeboat", "limousine", "moving van", "police van",
    "school bus", "sports car",
)  # fmt: skip
UNKNOWN_KINDS = ("classes", "crops", "resized")
METRICS = ("auroc", "fpr_at_95_tpr", "oscr", "macro_f1")
TESTED = ROOT / "tests" / "zoo"
TESTED_NETWORKS = ("digits 0", "digits ovr 0", "photos 12 0", "cifar 500 0", "cifar 500 ovr 0")
TESTED_IMAGES = 1000  # of each set, at most
TAIL_SIZES = (10, 20, 50, 100)
OVR, DEEP = "--loss one-vs-rest", "--arch deep --epochs 20"
VGG = "--arch vgg --epochs 12"
FRESH, TUNED = "--image-size 64", "--arch tuned"
Networks = dict[str, dict[str, Activations]]  # the sets of each network
Figures = dict[str, dict[str, dict[str, Any]]]  # of each task, method and metric


class Network(NamedTuple):
    """A network of the zoo; several of one name differ in their classes."""

    name: str
    dataset: str  # digits, photos, or cifar10-N: N training images a class
    known: str  # classes; for photos, their number
    flags: str = ""  # of train_dhr_nn.py
    seed: int = 0


NETWORKS = [
    Network("digits", "digits", "0,1,2,3,4,5"),
    Network("digits", "digits", "4,5,6,7,8,9", seed=1),
    Network("digits ovr", "digits", "0,2,4,6,8,9", OVR),
    Network("digits ovr", "digits", "1,3,5,7,8,9", OVR, seed=1),
    *(Network("photos 4", "photos", "4", FRESH, seed) for seed in range(6)),
    *(Network("photos 8", "photos", "8", FRESH, seed) for seed in range(6)),
    *(Network("photos 12", "photos", "12", FRESH, seed) for seed in range(6)),
    *(Network("photos 4 tuned", "photos", "4", TUNED, seed) for seed in range(6)),
    *(Network("photos 8 tuned", "photos", "8", TUNED, seed) for seed in range(6)),
    *(Network("photos 12 tuned", "photos", "12", TUNED, seed) for seed in range(6)),
    Network("cifar 100", "cifar10-100", VEHICLES_AND_HOOFED),
    Network("cifar 100 ovr", "cifar10-100", ANIMALS, OVR),
    Network("cifar 500", "cifar10-500", VEHICLES_AND_HOOFED),
    Network("cifar 500", "cifar10-500", ANIMALS, seed=1),
    Network("cifar 500 ovr", "cifar10-500", ANIMALS, OVR),
    Network("cifar 500 ovr", "cifar10-500", VEHICLES_AND_HOOFED, OVR, seed=1),
    Network("cifar 1500", "cifar10-1500", VEHICLES_AND_HOOFED),
    Network("cifar 1500 ovr", "cifar10-1500", ANIMALS, OVR),
    Network("vgg 1500", "cifar10-1500", VEHICLES_AND_HOOFED, VGG),
    Network("deep", "cifar10-3000", ANIMALS, DEEP, seed=1),
]
NAMES = list(dict.fromkeys(network.name for network in NETWORKS))


def photo_kinds() -> list[str]:
    return sorted(path.name for path in (DATA / "photos").iterdir())


def photographs(kinds: Iterable[str]) -> np.ndarray:
    """All photographs of some kinds, 64x64."""
    folders = (f"folder:{DATA / 'photos' / kind}" for kind in kinds)
    return np.concatenate([load_unknown(folder, DATA, 64) for folder in folders])


def known_photos(network: Network) -> tuple[list[str], list[str]]:
    """Known and unknown kinds of photographs, drawn by the network's seed and size."""
    count = int(network.known)
    draw = 3 * network.seed + {8: 0, 4: 1, 12: 2}[count]
    drawn = [str(kind) for kind in np.random.default_rng(draw).permutation(photo_kinds())]
    return drawn[:count], sorted(drawn[count:])


def cifar_folder(per_class: int, out: Path) -> Path:
    """CIFAR-10's training images as a folder of pictures: `per_class` for training in each class,
    two thirds as many again for validation and test."""
    folder = out / f"cifar10-{per_class}"
    if not folder.exists():
        cifar = load_known("cifar10", DATA)
        images = np.concatenate([cifar.train.images, cifar.val.images])
        labels = np.concatenate([cifar.train.labels, cifar.val.labels])
        unfinished = folder.with_suffix(".unfinished")
        for label, name in enumerate(cifar.classes):
            (unfinished / name).mkdir(parents=True, exist_ok=True)
            for index, image in enumerate(images[labels == label][: round(per_class / 0.6)]):
                Image.fromarray(image).save(unfinished / name / f"{index}.png", compress_level=1)
        unfinished.rename(folder)
    return folder


def photos_beside(known: str) -> dict[str, np.ndarray]:
    """Photographs of nothing that a network of CIFAR-10 classes knows: patches, and whole ones."""
    vehicles = known == ANIMALS
    whole = photographs(k for k in photo_kinds() if (k in PHOTOS_OF_VEHICLES) == vehicles)
    return {
        "crops": random_crops(whole, 32, np.random.default_rng(0)), "resized": fit_to(whole, 32)
    }  # fmt: skip


def make(network: Network, out: Path) -> None:
    """Train a network and store what it says of all image sets of its tasks."""
    path = out / f"{network.name} {network.seed}.npz"
    if path.exists():
        return
    dataset, known = network.dataset, network.known
    if dataset == "photos":
        dataset, kinds = f"folder:{DATA / 'photos'}", known_photos(network)
        known = ",".join(kinds[0])
    elif dataset != "digits":
        dataset = f"folder:{cifar_folder(int(dataset.split('-')[1]), out)}"
    checkpoint = path.with_suffix(".pt")
    if not checkpoint.exists():
        flags = ["--dataset", dataset, "--known-classes", known, "--arch", "fast"]
        flags += ["--image-size", "32"] * network.dataset.startswith("cifar10")
        flags += [*network.flags.split(), "--seed", str(network.seed), "--out", str(checkpoint)]
        flags += ["--resume"] * Path(f"{checkpoint}.partial").exists()
        subprocess.run([sys.executable, str(ROOT / "train_dhr_nn.py"), *flags], check=True)
    net, _ = load_network(checkpoint)
    data = load_known(dataset, DATA, known, net.config["image_size"])
    unknown = {"classes": data.test_unknown}
    if network.dataset == "photos":  # all images of the other kinds: it has seen none of them
        unknown["classes"] = fit_to(photographs(kinds[1]), net.config["image_size"])
    elif network.dataset != "digits":
        unknown |= photos_beside(known)
    sets = {name: getattr(data, name) for name in KNOWN_SPLITS}
    sets |= {name: as_unknown(images) for name, images in unknown.items()}
    store(net, sets, path)


def store(net: DHRNet, sets: dict[str, ImageSet], path: Path) -> None:
    """Write what a network says of image sets."""
    arrays = {
        f"{name}/{field}": array
        for name, images in sets.items()
        for field, array in extract(net, images, 250, name)._asdict().items()
    }
    replace_file(path, lambda file: np.savez(file, **arrays))


def load(path: Path) -> dict[str, Activations]:
    """The stored sets of a network."""
    with np.load(path) as stored:
        return {
            name: Activations(*(stored[f"{name}/{field}"] for field in Activations._fields))
            for name in {key.split("/")[0] for key in stored}
        }


def store_for_tests(networks: Networks) -> None:
    """Write the part of the stored activations that the project's tests hold the rule to."""
    TESTED.mkdir(exist_ok=True)
    for name in TESTED_NETWORKS:
        sets = {}
        for kind in sorted(networks[name].keys() - {"resized"}):
            first = Activations(*(array[:TESTED_IMAGES] for array in networks[name][kind]))
            sets[kind] = first._replace(latents_avg=np.zeros_like(first.latents_avg))  # not needed
        write_shipped(name, sets, TESTED / f"{name}.npz")


def load_for_tests() -> Networks:
    """What `store_for_tests` has written."""
    networks = {}
    for name in TESTED_NETWORKS:
        path = TESTED / f"{name}.npz"
        with np.load(path) as stored:
            kinds = [key.split("/")[0] for key in stored if key.endswith("/labels")]
        networks[name] = load_shipped(name, kinds, path)
    return networks


def compare(networks: Networks, build: Callable[[int], dict[str, Any]]) -> Figures:
    """All metrics of every method on every task, averaged over the task's networks, and `aurocs`,
    that of each network.

    Args:
        networks: the stored sets of each.
        build: the number of classes to the methods to compare, by name.
    """
    runs: dict[str, dict[str, list[dict[str, float]]]] = {}
    for network, sets in networks.items():
        labels = sets["test_known"].labels
        for name, method in build(sets["train"].logits.shape[1]).items():
            method.fit(sets["train"], sets["val"])
            known = method.score(sets["test_known"])
            for kind in filter(sets.__contains__, UNKNOWN_KINDS):
                scores = known, labels, method.score(sets[kind])
                measured = open_set_metrics(*scores, method.threshold_)
                measured["accepted"] = float(np.mean(known.unknownness <= method.threshold_))
                measured["accuracy"] = float(np.mean(known.nearest_class == labels))
                task = runs.setdefault(f"{network.rsplit(' ', 1)[0]}, {kind}", {})
                task.setdefault(name, []).append(measured)
    return {
        task: {
            name: {key: statistics.fmean(run[key] for run in each) for key in each[0]}
            | {"aurocs": [run["auroc"] for run in each]}
            for name, each in methods.items()
        }
        for task, methods in runs.items()
    }


def means(figures: Figures) -> dict[str, dict[str, float]]:
    """Of each method, the mean of every metric over the tasks, and its lowest AUROC."""
    result: dict[str, dict[str, float]] = {}
    for name in next(iter(figures.values())):
        each = [methods[name] for methods in figures.values()]
        result[name] = {key: statistics.fmean(task[key] for task in each) for key in METRICS}
        result[name]["lowest"] = min(task["auroc"] for task in each)
    return result


def regret(figures: Figures) -> dict[str, float]:
    """How far each method's AUROC lies behind the best of the others, at worst over the tasks."""
    return {
        name: max(
            max(of["auroc"] for other, of in methods.items() if other != name)
            - methods[name]["auroc"]
            for methods in figures.values()
        )
        for name in next(iter(figures.values()))
    }


def regret_of_variants(variants: Figures, figures: Figures) -> dict[str, float]:
    """The regret that the rule would have, were it one of its variants."""
    return {
        name: regret({
            task: methods | {"dhr_openmax": variants[task][name]}
            for task, methods in figures.items()
        })["dhr_openmax"]
        for name in next(iter(variants.values()))
    }  # fmt: skip


def print_tasks(figures: Figures, metric: str, title: str) -> None:
    """One row per task, one column per method, in %."""
    names = list(next(iter(figures.values())))
    rows = {task: [methods[name][metric] for name in names] for task, methods in figures.items()}
    rows["mean"] = [row[metric] for row in means(figures).values()]
    if metric == "auroc":
        rows["regret"] = list(regret(figures).values())
    print(f"\n{title + ' in %':28}" + "".join(f"{name:>13}" for name in names))
    for row, values in rows.items():
        print(f"{row:28}" + "".join(f"{100 * value:13.1f}" for value in values))


def print_means(figures: Figures, title: str) -> None:
    columns = [*map(TITLES.get, METRICS), "lowest AUROC"]
    print(f"\n{title + ', means in %':44}" + "".join(f"{column:>13}" for column in columns))
    for name, row in means(figures).items():
        print(f"{name:44}" + "".join(f"{100 * value:13.2f}" for value in row.values()))


def settings(num_classes: int) -> dict[str, Any]:
    """The published methods in both forms, with tails of several sizes."""
    chosen = product(("openmax", "crosr"), {"0": 0, "all": num_classes}.items(), TAIL_SIZES)
    return {
        f"{name} --alpha {form} --tail-size {tail_size}":
            build_methods(OpenMaxSettings(alpha=alpha, tail_size=tail_size))[name]
        for name, (form, alpha), tail_size in chosen
    }  # fmt: skip


class OneTest(DHROpenMax):
    """The rule with one of its three tests: a Weibull of infinite scale says nothing."""

    def __init__(self, test: int) -> None:
        super().__init__()
        self.dropped = [each for each in range(3) if each != test]

    def _set(self, **arrays: Any) -> None:
        if "tails" in arrays:
            arrays["tails"][0, self.dropped] = np.inf
        super()._set(**arrays)


class EvidenceInFull(DHROpenMax):
    """The rule whose evidence counts in full, however few validation images there are."""

    FULL_EVIDENCE = 1


class MeanPooled(DHROpenMax):
    """The rule on latents averaged over space, where CROSR takes their maximum."""

    def fit(self, train: Activations, val: Activations) -> DHROpenMax:
        return super().fit(*(each._replace(latents_max=each.latents_avg) for each in (train, val)))

    def score(self, images: Activations) -> Scores:
        return super().score(images._replace(latents_max=images.latents_avg))


def variants(_: int) -> dict[str, Any]:
    """The rule, and what it is without each of its parts."""
    return {
        "dhr_openmax": DHROpenMax(),
        "evidence alone": OneTest(0),
        "direction alone": OneTest(1),
        "membership alone": OneTest(2),
        "evidence in full on small sets": EvidenceInFull(),
        "latents pooled by their mean": MeanPooled(),
        "membership tail of 100": DHROpenMax(100),
    }


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("names", nargs="*", choices=[*NAMES, []], default=[], metavar="NAME",
        help=f"networks to compare, of {', '.join(NAMES)} (default: all)")  # fmt: skip
    add("--make", action="store_true", help="train and extract what is missing first")
    add("--zoo", type=Path, default=DATA / "zoo", metavar="DIR",
        help="networks and their activations (default data/zoo)")  # fmt: skip
    add("--store-for-tests", action="store_true", help="write some of them to tests/zoo again")
    add("--json", type=Path, metavar="PATH", help="write the figures there (default: no)")
    args = parser.parse_args(argv)
    chosen = [network for network in NETWORKS if network.name in (args.names or NAMES)]
    if args.make:
        args.zoo.mkdir(parents=True, exist_ok=True)
        for network in chosen:
            make(network, args.zoo)
    paths = [args.zoo / f"{network.name} {network.seed}.npz" for network in chosen]
    if missing := [path.stem for path in paths if not path.exists()]:
        print(f"not there, see --make: {', '.join(missing)}")
    networks = {path.stem: load(path) for path in paths if path.exists()}
    if not networks:
        parser.error(f"no activations in {args.zoo}: make them with --make")
    if args.store_for_tests:
        return store_for_tests(networks)
    figures = compare(networks, lambda _: build_methods(OpenMaxSettings()))
    for metric in METRICS:
        print_tasks(figures, metric, TITLES[metric])
    of_settings, of_variants = compare(networks, settings), compare(networks, variants)
    print_means(of_settings, "published methods, both forms")
    print_means(of_variants, "parts of dhr_openmax")
    regrets = regret_of_variants(of_variants, figures)
    print("regret in %:", ", ".join(f"{name} {100 * each:.1f}" for name, each in regrets.items()))
    if args.json:
        results = {
            "tasks": figures,
            "regret": regret(figures),
            "settings": means(of_settings),
            "variants": means(of_variants),
            "regret_of_variants": regrets,
        }
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
