"""Pictures: the evaluation as one self-contained HTML page, and the course of a training run.

The page needs no network, fits a phone and follows the reader's light or dark setting. Colours are
those of Okabe and Ito, which colour-blind readers tell apart.
"""

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.stats import kstest, weibull_min

from metrics import Scores, auroc, ccr_and_fpr
from openmax import UNKNOWN, Activations, OpenMax, activation_vectors

Images = NDArray[np.uint8]
Scorer = Callable[[Activations], Scores]
Tail = tuple[NDArray[np.float64], Any]  # the largest distances of a class, and SciPy's Weibull

OURS = "dhr_openmax"  # the method the page is about
TABLE = {
    "auroc": "AUROC", "fpr_at_95_tpr": "FPR95", "oscr": "OSCR", "macro_f1": "macro-F1",
    "macro_f1_at_half": "F1 at 0.5",
}  # fmt: skip
SHOWN = 6  # images a row
SHOWN_CLASSES = 12  # Weibulls drawn
TAIL_SIZES = (5, 10, 20, 50, 100, 200)
LINES = ("-", "--", "-.", ":", "-")
COMMON: dict[str, Any] = {
    "font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "figure.constrained_layout.use": True, "svg.hashsalt": "report", "savefig.dpi": 150,
    "image.interpolation": "nearest",
}  # fmt: skip
THEMES: Any = {
    theme: COMMON
    | dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), paper)
    | dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color",
                     "ytick.color", "hatch.color"), ink)
    | {"grid.color": grid}
    for theme, paper, ink, grid in (
        ("light", "#ffffff", "#1a1a1a", "#dddddd"),
        ("dark", "#16181c", "#e8e8e8", "#3a3d44"),
    )
}  # fmt: skip
KNOWN_COLOUR, UNKNOWN_COLOUR = "#56B4E9", "#D55E00"
METHOD_COLOURS = ("#999999", "#E69F00", "#56B4E9", "#009E73", "#D55E00")
STYLE = """
:root { color-scheme: light dark; }
body { margin: 0 auto; padding: 1rem; max-width: 46rem; font: 1rem/1.5 system-ui, sans-serif;
       background: #fff; color: #1a1a1a; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
figure { margin: 1rem 0; } img { display: block; width: 100%; height: auto; }
figcaption, caption { font-size: .9rem; opacity: .8; text-align: left; }
table { border-collapse: collapse; width: 100%; margin: .8rem 0; font-size: .9rem;
        font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .25rem .3rem; text-align: right; border-bottom: 1px solid #8885; }
th:first-child { text-align: left; } tr.ours { font-weight: 700; }
.warn { border-left: 4px solid #D55E00; padding-left: .6rem; }
.fine { border-left: 4px solid #009E73; padding-left: .6rem; }
pre { white-space: pre-wrap; font-size: .85rem; }
@media (max-width: 30rem) { table { font-size: .72rem; } th, td { padding: .25rem .1rem; } }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #e8e8e8; } }
"""


HEAD = f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Open-set recognition report</title>
<style>{STYLE}</style>"""


def write_report(
    folder: Path,
    results: dict[str, Any],
    classes: Sequence[str],
    sets: dict[str, Activations],
    scores: dict[str, dict[str, Scores]],
    refit: Callable[[str, int, int], Scorer],
    pixels: dict[str, Images],
    reconstruct: Callable[[Images], Images],
) -> None:
    """Write `report.html` and every picture as PNG and SVG to a folder.

    Args:
        folder: to write to.
        results: as in the results file, with the threshold of each method.
        classes: names of the K known classes.
        sets: activations of `train`, `val`, `test_known` and the unknown sets.
        scores: of each method, on `test_known` and on the unknown sets.
        refit: fits a method with a tail size and an alpha.
        pixels: images [N, H, W, C] of `test_known` and the unknown sets; empty when they are not
            at hand.
        reconstruct: images to their reconstructions, likewise.

    Raises:
        OSError: the folder cannot be written.
    """
    unknown_sets = [name for name in scores[OURS] if name != "test_known"]
    test = sets["test_known"]
    tails = class_tails(results["openmax"], sets["train"], len(classes))
    threshold, ours = results["openmax"]["threshold"][OURS], scores[OURS]
    page = [f"<h1>{html.escape(sentence(results, ours, test.labels, unknown_sets[0]))}</h1>"]

    def section(title: str) -> None:
        page.append(f"<h2>{title}</h2>")

    def picture(name: str, caption: str, draw: Callable[..., Figure], *args: Any) -> None:
        page.append(embed(folder, name, caption, draw, *args))

    section("Results")
    page.extend(results_table(results, name) for name in unknown_sets)
    page.append(paragraph("In %; FPR95 is better when low. results.json has all eight metrics."))
    section("Does it work, and if not, why?")
    page.extend(diagnose(results, sets, ours, classes, tails))
    section("ROC and OSCR curves")
    for name in unknown_sets:
        caption = f"{name}: images found to be unknown, against known images lost."
        picture(f"roc-{name}", caption, draw_roc, scores, name)
        caption = f"{name}: known images given their class, against unknown images accepted."
        picture(f"oscr-{name}", caption, draw_oscr, scores, name, test.labels)
    section("Scores")
    for name in unknown_sets:
        caption = f"{OURS} on {name}: right of the threshold, an image is called unknown."
        picture(
            f"scores-{name}", caption, draw_histogram, ours["test_known"], ours[name], threshold
        )
    section("Weibull tails")
    caption = "crosr: each class's largest distances to its mean, and the Weibull fitted to them"
    caption += f"; the first {SHOWN_CLASSES} classes." if len(classes) > SHOWN_CLASSES else "."
    picture("weibull", caption, draw_weibulls, results["openmax"]["tail_size"], tails, classes)
    section("Confusion")
    for name in unknown_sets:
        caption = f"{OURS} at its threshold, unknown images from {name}. Rows add up to 100 %."
        args = (ours, name, test.labels, threshold, classes)
        picture(f"confusion-{name}", caption, draw_confusion, *args)
    section("Reconstructions and most confident mistakes")
    if not pixels:
        page.append(paragraph("Not shown: no images at hand, only the shipped activation vectors."))
    for name, images in pixels.items():
        caption = (
            f"{name}: images, what the network rebuilds of them, and the squared error (bright "
        )
        caption += "is large, its mean below)."
        picture(f"reconstructions-{name}", caption, draw_reconstructions, images, reconstruct)
    for name, images in pixels.items():
        if name == "test_known":
            caption = "Known images with the highest unknownness; below each, its class."
            named, direction = test.labels, -1
        else:
            caption = f"{name} images with the lowest unknownness; below, the class seen in them."
            named, direction = ours[name].nearest_class, 1
        first = np.argsort(direction * ours[name].unknownness, kind="stable")[:SHOWN]
        below = [classes[label] for label in named[first]]
        picture(f"mistakes-{name}", caption, draw_images, [images[first]], below, [""])
    section("Tail size and alpha")
    curves = sensitivity(results["openmax"], sets, unknown_sets[0], refit)
    for setting, curve in curves.items():
        caption = f"{unknown_sets[0]} with other settings, each fitted anew; dotted, the one used. "
        caption += "To read, not to choose by: these are test images."
        used = results["openmax"][setting]
        picture(f"sensitivity-{setting}", caption, draw_sensitivity, setting, curve, used)
    section("How the numbers were made")
    page.append(provenance(results))
    (folder / "report.html").write_text("\n".join([HEAD, *page, "</html>\n"]))
    print(f"wrote {folder / 'report.html'}")


def paragraph(text: str, css: str = "") -> str:
    return f'<p class="{css}">{html.escape(text)}</p>'


def percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"


def sentence(
    results: dict[str, Any], ours: dict[str, Scores], labels: NDArray[np.int64], name: str
) -> str:
    """The result of our method on an unknown set, in one sentence."""
    threshold = results["openmax"]["threshold"][OURS]
    found = np.mean(ours[name].predict(threshold) == UNKNOWN)
    right = np.mean(ours["test_known"].predict(threshold) == labels)
    return (
        f"{OURS} calls {percent(found)} of the {len(ours[name].unknownness):,} {name} images "
        f"unknown and gives {percent(right)} of the {len(labels):,} {results['known']} test images "
        f"their class: AUROC {percent(results['methods'][OURS][name]['auroc'])}."
    )


def results_table(results: dict[str, Any], unknown: str) -> str:
    head = "".join(f"<th>{title}</th>" for title in TABLE.values())
    rows = [f"<tr><th>method</th>{head}</tr>"]
    for method, sets in results["methods"].items():
        cells = "".join(f"<td>{100 * sets[unknown][column]:.1f}</td>" for column in TABLE)
        css = ' class="ours"' if method == OURS else ""
        rows.append(f"<tr{css}><th>{method}</th>{cells}</tr>")
    title = html.escape(f"{results['known']} (known) against {unknown} (unknown)")
    return f"<table><caption>{title}</caption>{''.join(rows)}</table>"


def diagnose(
    results: dict[str, Any],
    sets: dict[str, Activations],
    ours: dict[str, Scores],
    classes: Sequence[str],
    tails: Sequence[Tail],
) -> list[str]:
    """Say in plain words what is well and what is not, and what to change."""
    findings = []

    def judge(fine: bool, text: str, advice: str) -> None:
        findings.append(paragraph(text if fine else f"{text} {advice}", "fine" if fine else "warn"))

    train, test = sets["train"], sets["test_known"]
    threshold = results["openmax"]["threshold"][OURS]
    accuracy = results["closed_set_accuracy"]
    judge(
        accuracy >= 0.9,
        f"Closed-set accuracy is {percent(accuracy)} of {len(classes)} classes.",
        "A better classifier is the surest way to better detection: train longer, on more images.",
    )
    rejected = np.mean(ours["test_known"].unknownness > threshold)
    judge(
        rejected <= 0.1,
        f"{percent(rejected)} of the known test images are called unknown; the threshold was set "
        "for 5 % of the validation images.",
        "Too much comes out unknown: the test images differ from the validation images, or these "
        "are too few. Prepare both the same way, and keep more for validation.",
    )
    for name in ours:
        if name == "test_known":
            continue
        accepted = np.mean(ours[name].unknownness <= threshold)
        area = results["methods"][OURS][name]["auroc"]
        judge(
            accepted <= 0.25,
            f"{name}: {percent(accepted)} are taken for known. A random one of them scores above a "
            f"random known image in {percent(area)} of cases.",
            "Too little comes out unknown: the score distributions overlap. These images look much "
            "like a known class to this network; see the histogram and the mistakes below, and "
            "train a more accurate network. Another threshold only trades one error for the other.",
        )
    misfit = [
        classes[label]
        for label, (tail, frozen) in enumerate(tails)
        if kstest(tail, frozen.cdf).pvalue < 0.01
    ]
    judge(
        not misfit,
        f"The Weibull fits the tail of {len(classes) - len(misfit)} of {len(classes)} classes "
        "(Kolmogorov-Smirnov, 1 %).",
        f"Not so for {', '.join(misfit[:10])}: look for wrong labels or odd images among them, or "
        "try another --tail-size.",
    )
    spread = train.latents_avg.std(axis=0)
    scale = np.maximum(spread, 1e-6)
    means = [train.latents_avg[train.labels == label].mean(axis=0) for label in range(len(classes))]
    nearest = cdist(test.latents_avg / scale, np.stack(means) / scale).argmin(axis=1)
    right = np.mean(nearest == test.labels)
    dead = np.mean(spread < 1e-6)
    judge(
        right > 2 / len(classes) and dead < 0.5,
        f"The latents carry something: alone, by the nearest class mean, they give "
        f"{percent(right)} of the test images their class (chance {percent(1 / len(classes))}); "
        f"{percent(dead)} of their channels are dead.",
        "That is too little for crosr and dhr_openmax to gain from: train longer, or with a larger "
        "--reconstruction-weight.",
    )
    return findings


def class_tails(settings: dict[str, Any], train: Activations, num_classes: int) -> list[Tail]:
    """For each class, the tail of distances that crosr fits, and its Weibull as SciPy's."""
    vectors = activation_vectors(train, settings["latents"])
    model = OpenMax(settings["tail_size"], settings["alpha"], settings["distance"])
    model.fit(vectors, train.labels)
    correct = train.logits.argmax(axis=1) == train.labels
    distances = model.distances(vectors[correct])
    tails = []
    for label in range(num_classes):
        own = distances[train.labels[correct] == label, label]
        scale, shape, location = (float(field[label]) for field in model.weibull_)
        tails.append((np.sort(own)[-settings["tail_size"] :], weibull_min(shape, location, scale)))
    return tails


def embed(folder: Path, name: str, caption: str, draw: Callable[..., Figure], *args: Any) -> str:
    """Draw a figure in both themes, keep the light one as PNG and SVG; return it as HTML."""
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
    data = {}
    for theme, settings in THEMES.items():
        with rc_context(settings):
            figure = draw(*args)
            svg = io.BytesIO()
            figure.savefig(svg, format="svg", metadata={"Date": None})
            data[theme] = "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode()
            if theme == "light":
                (folder / f"{name}.svg").write_bytes(svg.getvalue())
                figure.savefig(folder / f"{name}.png")
    caption = html.escape(caption)
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{data["dark"]}">'
        f'<img src="{data["light"]}" alt="{caption}"></picture>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def one_axes(xlabel: str, ylabel: str, height: float = 4.2) -> Axes:
    axes = Figure(figsize=(6.4, height)).subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def draw_roc(scores: dict[str, dict[str, Scores]], unknown: str) -> Figure:
    axes = one_axes("known images called unknown (%)", "unknown images found (%)")
    for name, colour, line in zip(scores, METHOD_COLOURS, LINES, strict=False):
        known, other = scores[name]["test_known"].unknownness, scores[name][unknown].unknownness
        tpr, fpr = ccr_and_fpr(known, np.ones(len(known), bool), other)
        axes.plot(*thinned(100 - 100 * tpr, 100 - 100 * fpr), line, color=colour, label=name,
                  linewidth=2.5 if name == OURS else 1.8)  # fmt: skip
    axes.set(xlim=(0, 100), ylim=(0, 100))
    axes.legend(loc="lower right")
    return axes.figure  # type: ignore[return-value]


def draw_oscr(scores: dict[str, dict[str, Scores]], unknown: str, labels: Any) -> Figure:
    axes = one_axes("unknown images accepted (%), log scale", "known, rightly classified (%)")
    for name, colour, line in zip(scores, METHOD_COLOURS, LINES, strict=False):
        known = scores[name]["test_known"]
        correct = known.nearest_class == labels
        ccr, fpr = ccr_and_fpr(known.unknownness, correct, scores[name][unknown].unknownness)
        axes.plot(*thinned(100 * fpr, 100 * ccr), line, color=colour, label=name,
                  linewidth=2.5 if name == OURS else 1.8)  # fmt: skip
    axes.set(xscale="log", xlim=(0.1, 100), ylim=(0, 100))
    axes.set_xticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    axes.legend(loc="lower right")
    return axes.figure  # type: ignore[return-value]


def thinned(x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Every n-th point of a curve, so that a picture has a thousand at most, and the last."""
    index = np.unique(np.linspace(0, len(x) - 1, 1000).round().astype(int))
    return x[index], y[index]


def draw_histogram(known: Scores, unknown: Scores, threshold: float) -> Figure:
    axes = one_axes("unknownness (log odds); the outer bars hold all beyond", "images (%)")
    low, high = np.percentile(np.concatenate([known.unknownness, unknown.unknownness]), (0.5, 90))
    bins = np.linspace(low, max(high, threshold + (threshold - low) / 4), 50)
    for scores, label, colour, hatch in (
        (known, "known", KNOWN_COLOUR, ""),
        (unknown, "unknown", UNKNOWN_COLOUR, "///"),
    ):
        shares = np.histogram(scores.unknownness.clip(bins[0], bins[-1]), bins)[0]
        axes.stairs(100 * shares / shares.sum(), bins, fill=True, color=colour, alpha=0.6,
                    hatch=hatch, label=label)  # fmt: skip
    axes.axvline(threshold, color="gray", linewidth=2, linestyle="--", label="threshold")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    return axes.figure  # type: ignore[return-value]


def draw_weibulls(tail_size: int, tails: Sequence[Tail], classes: Sequence[str]) -> Figure:
    tails = tails[:SHOWN_CLASSES]
    columns = min(3, len(tails))
    rows = -(-len(tails) // columns)
    figure = Figure(figsize=(6.4, 1.9 * rows + 0.4))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (tail, weibull), name in zip(grid.flat, tails, classes, strict=False):
        axes.hist(tail, bins=8, density=True, color=KNOWN_COLOUR, alpha=0.7)
        low, high = weibull.ppf((0.005, 0.995))
        x = np.linspace(max(low, tail[0] - 1), max(high, tail[-1]), 200)
        axes.plot(x, weibull.pdf(x), color=UNKNOWN_COLOUR, linewidth=2)
        axes.set_title(name, fontsize=12)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.locator_params(axis="x", nbins=4)
    for axes in grid.flat[len(tails) :]:
        axes.set_axis_off()
    figure.supxlabel(f"distance to the class mean, {tail_size} largest", fontsize=12)
    figure.supylabel("density", fontsize=12)
    return figure


def draw_confusion(
    ours: dict[str, Scores], unknown: str, labels: Any, threshold: float, classes: Sequence[str]
) -> Figure:
    size = len(classes) + 1
    truth = np.concatenate([labels, np.full(len(ours[unknown].unknownness), UNKNOWN)]) % size
    predicted = np.concatenate([ours[n].predict(threshold) for n in ("test_known", unknown)]) % size
    counts = np.zeros((size, size))
    np.add.at(counts, (truth, predicted), 1)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(6.4, 6))
    axes = figure.subplots()
    axes.imshow(shares, cmap="cividis", vmin=0, vmax=100)
    axes.set(xlabel="answer", ylabel="truth")
    if size <= 25:
        names = [*classes, "unknown"]
        axes.set_xticks(range(size), names, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(size), names)
        for row, column in np.argwhere(shares > 0.5) if size <= 12 else ():
            axes.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center",
                      color="black" if shares[row, column] > 55 else "white")  # fmt: skip
    axes.spines[:].set_visible(False)
    return figure


def draw_images(rows: Sequence[Images], below: Sequence[str], names: Sequence[str]) -> Figure:
    """Rows of images, named at the left, with a text below each column."""
    columns = len(rows[0])
    figure = Figure(figsize=(6.4, 1.05 * len(rows) + 0.3))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, images, name in zip(grid, rows, names, strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image.squeeze(), cmap="gray" if image.shape[-1] == 1 else None)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(name)
    for axes, text in zip(grid[-1], below, strict=True):
        axes.set_xlabel(text if len(text) < 12 else f"{text[:10]}…", fontsize=11)
    return figure


def draw_reconstructions(images: Images, reconstruct: Callable[[Images], Images]) -> Figure:
    chosen = images[np.linspace(0, len(images) - 1, SHOWN).astype(int)]
    rebuilt = reconstruct(chosen)
    error = np.square((chosen / 255.0) - (rebuilt / 255.0)).mean(axis=-1, keepdims=True)
    brightness = np.sqrt(error / max(error.max(), 1e-9)).repeat(3, axis=-1)
    below = [f"{value:.4f}" for value in error.mean(axis=(1, 2, 3))]
    return draw_images([chosen, rebuilt, brightness], below, ["image", "rebuilt", "error"])


def sensitivity(
    settings: dict[str, Any],
    sets: dict[str, Activations],
    unknown: str,
    refit: Callable[[str, int, int], Scorer],
) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """AUROC of the OpenMax methods for other tail sizes and alphas, fitted anew."""
    alphas = sorted({0, 1, 2, 3, 5, 10, sets["train"].logits.shape[1], settings["alpha"]})
    alphas = [alpha for alpha in alphas if alpha <= sets["train"].logits.shape[1]]
    tail_sizes = sorted({*TAIL_SIZES, settings["tail_size"]})

    def curve(method: str, pairs: Iterable[tuple[int, int]], at: int) -> list[tuple[int, float]]:
        points = []
        for pair in pairs:
            try:
                scorer = refit(method, *pair)
            except ValueError:  # too few images for this tail
                continue
            known, other = (scorer(sets[name]).unknownness for name in ("test_known", unknown))
            points.append((pair[at], auroc(known, other)))
        return points

    fixed_alpha, fixed_tail = settings["alpha"], settings["tail_size"]
    return {
        "tail_size": {
            method: curve(method, ((size, fixed_alpha) for size in tail_sizes), 0)
            for method in ("openmax", "crosr", OURS)
        },
        "alpha": {
            method: curve(method, ((fixed_tail, alpha) for alpha in alphas), 1)
            for method in ("openmax", "crosr")
        },
    }


def draw_sensitivity(setting: str, curves: dict[str, list[tuple[int, float]]], used: int) -> Figure:
    title = setting.replace("_", " ")
    unit = " (largest distances a Weibull is fitted to)" if setting == "tail_size" else (
        " (0: the released code's form; else classes revised)")  # fmt: skip
    axes = one_axes(title + unit, "AUROC (%)", 3.6)
    colours = dict(zip(("openmax", "crosr", OURS), METHOD_COLOURS[2:], strict=True))
    for (method, points), marker in zip(curves.items(), "os^", strict=False):
        values, areas = np.array(points).T
        axes.plot(values, 100 * areas, marker=marker, color=colours[method], label=method)
    if setting == "tail_size":
        axes.set_xscale("log")
    ticks = sorted({int(value) for points in curves.values() for value, _ in points})
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.axvline(used, color="gray", linestyle=":", linewidth=2)
    axes.legend()
    return axes.figure  # type: ignore[return-value]


def provenance(results: dict[str, Any]) -> str:
    settings = {k: v for k, v in results["openmax"].items() if k != "threshold"}
    lines = {
        "command": results["command"],
        "checkpoint": f"{results['checkpoint']['path']}, SHA-256 {results['checkpoint']['sha256']}",
        "activations": results["activations"],
        "settings": ", ".join(f"{name} {value}" for name, value in settings.items()),
        "versions": ", ".join(f"{name} {value}" for name, value in results["versions"].items()),
        "device": results["device"],
        "seconds": ", ".join(f"{k} {v:.1f}" for k, v in results["seconds"].items()),
    }
    return "<pre>" + html.escape("\n".join(f"{k}: {v}" for k, v in lines.items())) + "</pre>"


def draw_training(history: Sequence[dict[str, float]]) -> bytes:
    """The course of a training run as a PNG: losses, accuracies and rate by epoch.

    Args:
        history: for each epoch `epoch`, `cross_entropy`, `mse`, `train_accuracy`, `val_accuracy`
            (both in 0..1) and `rate`.
    """
    epochs = [row["epoch"] for row in history]
    with rc_context(THEMES["light"]):
        figure = Figure(figsize=(6.4, 7))
        losses, accuracies, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
        for axes, title, lines in (
            (losses, "loss", ("cross_entropy", "mse")),
            (accuracies, "accuracy (%)", ("train_accuracy", "val_accuracy")),
            (rate, "learning rate", ("rate",)),
        ):
            for name, colour, line in zip(
                lines, (UNKNOWN_COLOUR, KNOWN_COLOUR), "-s", strict=False
            ):
                values = np.array([row[name] for row in history])
                scale = 100 if axes is accuracies else 1
                axes.plot(epochs, scale * values, color=colour, marker="o" if line == "-" else "s",
                          label=name.replace("_", " "))  # fmt: skip
            axes.set_ylabel(title)
            axes.grid(linewidth=0.6)
            if len(lines) > 1:
                axes.legend()
        rate.set_xlabel("epoch")
        rate.xaxis.get_major_locator().set_params(integer=True)
        png = io.BytesIO()
        figure.savefig(png, format="png")
    return png.getvalue()
