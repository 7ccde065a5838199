"""Pictures: the evaluation as one self-contained HTML page, and the course of a training run.

The page asks for nothing from elsewhere and fits a phone. Colours are those of Okabe and Ito, which
colour-blind readers tell apart. A person's matplotlib settings change no picture.
"""

import base64
import html
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata, weibull_min
from sklearn.metrics import confusion_matrix

from activations import Activations
from methods import ACCEPTED_SHARE, acceptance_interval
from metrics import Scores, ccr_and_fpr
from models import replace_file
from openmax import UNKNOWN, adapted_tail_size

with patch.dict(os.environ):
    os.environ.pop("MPLBACKEND", None)  # a notebook's; one that is missing here ends the import
    from matplotlib import rc_context, rcParamsDefault
    from matplotlib.figure import Figure
    from matplotlib.font_manager import fontManager

Array = NDArray[Any]
Results = dict[str, Any]
Draw = Callable[..., None]
AllScores = dict[str, dict[str, Scores]]  # of each method, on each set

OURS = "dhr_openmax"  # the method the page is about
TABLE = {"auroc": "AUROC", "fpr_at_95_tpr": "FPR95", "oscr": "OSCR", "macro_f1": "macro-F1",
         "macro_f1_at_half": "F1 at 0.5"}  # fmt: skip
SHOWN_IMAGES, SHOWN_CLASSES = 6, 12  # mistakes of each set; Weibulls
WIDTH = 6.4  # of a picture, in inches
FEW_IMAGES = 200  # for validation: with fewer, the page says how far off a threshold may be
COLOURS = ("#56B4E9", "#D55E00")  # known, unknown
LINES = (("#999999", "-"), ("#E69F00", "--"), ("#56B4E9", "-."), ("#009E73", ":"), ("#D55E00", "-"))
ASIAN_FONTS = "CJK|WenQuanYi|YaHei|PingFang|Hiragino|Malgun|Source Han|Droid Sans Fallback"
LOOK = {
    "font.size": 12, "axes.titlesize": 12, "figure.labelsize": 12, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True,
    "savefig.dpi": 150, "text.parse_math": False, "svg.hashsalt": "report",
}  # fmt: skip
HEAD = """<!DOCTYPE html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Open-set recognition report</title><style>
body { margin: auto; padding: 1rem; max-width: 46rem; font: 1rem/1.5 system-ui, sans-serif;
       background: #fff; color: #1a1a1a; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
img { width: 100%; margin-top: 1rem; } p.caption, caption { color: #555; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-size: min(.9rem, 2.9vw); }
td, th { padding: .25rem 0 .25rem .3rem; text-align: right; border-bottom: 1px solid #ddd; }
caption, th:first-child { padding-left: 0; text-align: left; } tr.ours { font-weight: bold; }
p.warn, p.fine { border-left: 4px solid #D55E00; padding-left: .6rem; }
p.fine { border-color: #009E73; } code { white-space: nowrap; }
pre { white-space: pre-wrap; font-size: .8rem; }
</style>"""


class Page:
    """The parts of `report.html`; its pictures also go to files beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.parts, self.pictures = folder, [HEAD], 0

    def add(self, tag: str, text: str, css: str = "") -> None:
        text = re.sub("`(.+?)`", r"<code>\1</code>", html.escape(text))
        self.parts.append(f'<{tag} class="{css}">{text}</{tag}>')

    def picture(self, kind: str, of: str, caption: str, draw: Draw, *args: Any) -> None:
        """Draw a picture; one that fails costs a line, not the page."""
        self.pictures += 1
        slug = re.sub("[^a-z0-9]+", "-", f"{kind}-{of.split('/')[-1].lower()}").strip("-")
        name = f"{self.pictures:02}-{slug[:32]}.png"
        try:
            png = render(draw, *args)
            replace_file(self.folder / name, lambda file: file.write(png))
        except Exception as error:
            print(f"{name} could not be drawn: {error}", file=sys.stderr)
            return self.add("p", f"{name} could not be drawn: {error}", "warn")
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        self.parts.append(f'<img src="{source}" alt="">')
        self.add("p", caption, "caption")


def write_report(
    folder: Path,
    results: Results,
    classes: Sequence[str],
    sets: dict[str, Activations],
    scores: AllScores,
    methods: dict[str, Any],
    pixels: dict[str, Array],
    reconstruct: Callable[[Array], Array],
) -> None:
    """Write `report.html`, and each of its pictures as a PNG, to a folder.

    Args:
        folder: to write to.
        results: as in the results file.
        classes: names of the K known classes.
        sets: activations of `train`, `test_known` and the unknown sets.
        scores: of each method, on `test_known` and the unknown sets.
        methods: the fitted methods.
        pixels: uint8 images [N, H, W, C] of the same sets, where at hand.
        reconstruct: such images to what the network rebuilds of them.

    Raises:
        OSError: the page cannot be written.
    """
    threshold, ours = results["openmax"]["threshold"][OURS], scores[OURS]
    labels, names = sets["test_known"].labels, [shown(name) for name in classes]
    unknown_sets = list(results["methods"][OURS])
    page = Page(folder)
    page.add("h1", sentence(results))
    page.add("h2", "Results")
    page.parts += [results_table(results, name) for name in unknown_sets]
    page.add("p", "In %; FPR95 is better when low. results.json has all eight metrics.")
    page.add("h2", "Which method to trust, and what to improve")
    for fine, text in diagnose(results, scores):
        page.add("p", text, "fine" if fine else "warn")
    for name in unknown_sets:
        page.add("h2", f"Against {name}")
        caption = "ROC and OSCR: known images accepted, and those of them named correctly."
        page.picture("roc", name, caption, draw_curves, scores, name, labels)
        caption = f"Scores of {OURS}: right of the threshold, an image is called unknown."
        page.picture("scores", name, caption, draw_histogram, ours, name, threshold)
        caption = f"Answers of {OURS} at its threshold. Rows add up to 100%."
        args: tuple[Any, ...] = (ours, name, labels, threshold, names)
        page.picture("confusion", name, caption, draw_confusion, *args)
    page.add("h2", "Weibull tails")
    caption = "crosr: each class's largest distances to its mean, and the Weibull fitted to them."
    args = methods["crosr"].openmax_, sets["train"], results["openmax"], names
    page.picture("weibull", "", caption, draw_weibulls, *args)
    page.add("h2", "Most confident mistakes, and what the network rebuilds of them")
    add_mistakes(page, pixels, ours, labels, names, reconstruct)
    page.add("h2", "How the numbers were made")
    made = {name: value for name, value in results.items() if name != "methods"}
    page.add("pre", json.dumps(made, indent=1, ensure_ascii=False))
    content = "\n".join(page.parts).encode(errors="backslashreplace")
    replace_file(folder / "report.html", lambda file: file.write(content))
    print(f"wrote {folder / 'report.html'}")


def add_mistakes(
    page: Page, pixels: dict[str, Array], ours: dict[str, Scores], labels: Array,
    names: Sequence[str], reconstruct: Callable[[Array], Array],
) -> None:  # fmt: skip
    for name, images in pixels.items():
        order, seen = np.argsort(ours[name].unknownness), ours[name].nearest_class
        caption = f"{name}, lowest unknownness; below each image, the class seen in it."
        if name == "test_known":
            order, seen = order[::-1], labels
            caption = "test_known, highest unknownness; below each image, its class."
        first = order[:SHOWN_IMAGES]
        args = images[first], reconstruct, [names[label] for label in seen[first]]
        page.picture("mistakes", name, caption, draw_images, *args)
    if not pixels:
        page.add("p", "Not shown: no images at hand, only the shipped activation vectors.")


def sentence(results: Results) -> str:
    name, measured = next(iter(results["methods"][OURS].items()))
    return (
        f"While {OURS} accepts 95% of the {results['known']} test images, it rejects "
        f"{1 - measured['fpr_at_95_tpr']:.1%} of the {name} images (AUROC {measured['auroc']:.1%})."
    )


def results_table(results: Results, unknown: str) -> str:
    title = html.escape(f"{results['known']} (known) against {unknown} (unknown)")
    cells = [f"<caption>{title}</caption><tr><th>method</th>"]
    cells += [f"<th>{column}</th>" for column in TABLE.values()]
    for method, sets in results["methods"].items():
        cells.append(f'<tr class="{"ours" if method == OURS else ""}"><th>{method}</th>')
        cells += [f"<td>{100 * sets[unknown][metric]:.1f}</td>" for metric in TABLE]
    return f"<table>{''.join(cells)}</table>"


def diagnose(results: Results, scores: AllScores) -> list[tuple[bool, str]]:
    """Which method to trust, what is well and what to change: pairs of (all is well, text)."""
    ours, threshold = scores[OURS], results["openmax"]["threshold"][OURS]
    measured = results["methods"]
    areas = {
        name: float(np.mean([of["auroc"] for of in measured[name].values()])) for name in scores
    }
    findings = [trust(areas, scores)]

    def judge(fine: bool, text: str, advice: str) -> None:
        findings.append((fine, text if fine else f"{text} {advice}"))

    count, accuracy = results["validation_images"], results["closed_set_accuracy"]
    low, high = acceptance_interval(count)
    basis = f"Each threshold accepts {ACCEPTED_SHARE:.0%} of {count:,} validation images"
    if count < FEW_IMAGES:
        basis += f", so few that it may accept from {low:.0%} to {high:.0%} of new known images"
    rejected = float(np.mean(ours["test_known"].unknownness > threshold))
    judge(
        rejected <= max(0.1, 1 - low),
        f"{basis}. {OURS} calls {rejected:.1%} of the known test images unknown.",
        "Prepare test and validation images alike.",
    )
    judge(
        accuracy >= 0.9,
        f"The network names {accuracy:.1%} of the known test images correctly.",
        "A better classifier is the surest way to better detection: train longer, on more images.",
    )
    remedy = "if you expect such images, train some as one more class"
    if accuracy < 0.9:
        remedy = "train a better network"
    for name in measured[OURS]:
        accepted = float(np.mean(ours[name].unknownness <= threshold))
        judge(
            accepted <= 0.25,
            f"{OURS} takes {accepted:.1%} of the {name} images for known.",
            "They look much like known classes to the network, and another threshold only trades "
            f"one error for the other: {remedy}.",
        )
    judge(
        areas["crosr"] >= areas["openmax"],
        f"AUROC is {100 * areas['crosr']:.1f} with the latents (`crosr`), "
        f"{100 * areas['openmax']:.1f} without (`openmax`).",
        "The latents do not help here: try another --reconstruction-weight in training.",
    )
    return findings


def trust(areas: dict[str, float], scores: AllScores) -> tuple[bool, str]:
    """Which method has the highest mean AUROC, and whether by more than chance."""
    best, second = sorted(areas, key=lambda method: (-areas[method], method != OURS))[:2]
    other = second if best == OURS else OURS
    text = f"`{best}` separates better here than `{other}` "
    text += f"(AUROC {100 * areas[best]:.1f} against {100 * areas[other]:.1f})"
    if areas[best] - areas[other] <= 2 * auroc_error(scores[best], scores[other]):
        return True, f"{text}, but that may be chance: use `{OURS}`, as `--images` does."
    if best == OURS:
        return True, f"{text}: use it, as `--images` does."
    return False, f"{text}: prefer it, and check on images of your own. `--images` uses `{OURS}`."


def auroc_error(first: dict[str, Scores], second: dict[str, Scores]) -> float:
    """Standard error of the difference of two methods' AUROCs on the same images.

    Source: DeLong, DeLong and Clarke-Pearson 1988; all unknown sets are taken as one.
    """
    wins = []  # for each known and each unknown image, how many of the others it is ranked above
    for sets in (first, second):
        known = sets["test_known"].unknownness
        unknown = np.concatenate([sets[name].unknownness for name in sets if name != "test_known"])
        ranks, count = rankdata(np.concatenate([known, unknown])), len(known)
        wins.append((ranks[:count] - rankdata(known), ranks[count:] - rankdata(unknown)))
    known, unknown = np.subtract(wins[0][0], wins[1][0]), np.subtract(wins[0][1], wins[1][1])
    variance = known.var() / len(unknown) + unknown.var() / len(known)
    return float(np.sqrt(variance / (len(known) * len(unknown))))


def render(draw: Draw, *args: Any, form: str = "png") -> bytes:
    """What `draw(figure, *args)` draws, in this page's look whatever a person's settings."""
    fonts = [name for name in fontManager.get_font_names() if re.search(ASIAN_FONTS, name)]
    look: dict[Any, Any] = {**rcParamsDefault, **LOOK, "font.family": ["DejaVu Sans", *fonts]}
    del look["backend"]
    file = io.BytesIO()
    with rc_context(look), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = Figure()
        draw(figure, *args)
        figure.savefig(file, format=form, metadata={"Date": None} if form == "svg" else None)
    return file.getvalue()


def shown(name: str) -> str:
    """A class name as a picture can show it."""
    name = "".join(letter if letter.isprintable() else "\ufffd" for letter in name)
    return name if len(name) <= 12 else f"{name[:11]}…"


def draw_curves(figure: Figure, scores: AllScores, unknown: str, labels: Array) -> None:
    figure.set_size_inches(WIDTH, 7.4)
    roc, oscr = figure.subplots(2, sharex=True)
    for (method, sets), (colour, line) in zip(scores.items(), LINES, strict=False):
        known = sets["test_known"]
        right = known.nearest_class == labels
        for axes, counted in ((roc, np.full_like(right, True)), (oscr, right)):
            ccr, fpr = ccr_and_fpr(known.unknownness, counted, sets[unknown].unknownness)
            axes.plot(100 * fpr, 100 * ccr, line, color=colour, label=method, linewidth=2)
    for axes, what in ((roc, "accepted"), (oscr, "named correctly")):
        axes.set(ylabel=f"known images {what} (%)", xscale="log", xlim=(0.1, 100), ylim=(0, 100))
        axes.grid(color="#dddddd")
    oscr.set_xticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    oscr.set_xlabel("unknown images accepted (%), log scale")
    figure.legend(*roc.get_legend_handles_labels(), loc="outside upper center", ncols=3)


def draw_histogram(figure: Figure, ours: dict[str, Scores], unknown: str, threshold: float) -> None:
    figure.set_size_inches(WIDTH, 4.2)
    axes = figure.subplots()
    both = [ours[name].unknownness for name in ("test_known", unknown)]
    low, high = np.percentile(np.concatenate(both), (0.5, 95))
    bins = np.linspace(low, max(high, threshold + (threshold - low) / 4), 50)
    for values, name, colour in zip(both, ("known", "unknown"), COLOURS, strict=True):
        shares = 100 * np.histogram(values.clip(bins[0], bins[-1]), bins)[0] / len(values)
        axes.stairs(shares, bins, fill=True, color=colour, alpha=0.6, label=name)
    axes.axvline(threshold, color="black", linestyle="--", label="threshold")
    axes.set(xlabel="unknownness (log odds); the outer bars hold all beyond", ylabel="images (%)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)


def draw_weibulls(
    figure: Figure, openmax: Any, train: Activations, settings: Results, names: Sequence[str]
) -> None:
    distances = openmax.distances(train.vectors(settings["latents"]))
    correct = train.logits.argmax(axis=1) == train.labels
    shown_classes = names[:SHOWN_CLASSES]
    rows = -(-len(shown_classes) // 3)
    figure.set_size_inches(WIDTH, 1.9 * rows + 0.4)
    panels = figure.subplots(rows, 3, squeeze=False).flat
    for label, name in enumerate(shown_classes):
        own = np.sort(distances[correct & (train.labels == label), label])
        tail = own[-adapted_tail_size(settings["tail_size"], len(own)) :]
        scale, shape, location = (parameter[label] for parameter in openmax.weibull_)
        weibull = weibull_min(shape, location, scale)
        x = np.linspace(tail[0], max(weibull.ppf(0.995), tail[-1]), 200)
        panels[label].hist(tail, bins=8, density=True, color=COLOURS[0])
        panels[label].plot(x, weibull.pdf(x), color=COLOURS[1], linewidth=2)
        panels[label].set(title=name, yticks=[])
        panels[label].locator_params(axis="x", nbins=4)
    for axes in panels[len(shown_classes) :]:
        axes.set_axis_off()
    figure.supxlabel("distance to the class mean")


def draw_confusion(
    figure: Figure, ours: dict[str, Scores], unknown: str, labels: Array, threshold: float,
    names: Sequence[str],
) -> None:  # fmt: skip
    order, names = [*range(len(names)), UNKNOWN], [*names, "unknown"]
    truth = np.concatenate([labels, np.full(len(ours[unknown].unknownness), UNKNOWN)])
    answer = np.concatenate([ours[name].predict(threshold) for name in ("test_known", unknown)])
    shares = 100 * confusion_matrix(truth, answer, labels=order, normalize="true")
    figure.set_size_inches(WIDTH, WIDTH)
    axes = figure.subplots()
    axes.imshow(shares, cmap="cividis", vmin=0, vmax=100)
    axes.set(xlabel="answer", ylabel="truth")
    if len(names) <= 25:
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
    for row, column in np.argwhere(shares > 0.5) if len(names) <= 12 else ():
        share, colour = shares[row, column], "black" if shares[row, column] > 55 else "white"
        axes.text(column, row, f"{share:.0f}", color=colour, ha="center", va="center")


def draw_images(
    figure: Figure, images: Array, reconstruct: Callable[[Array], Array], below: Sequence[str]
) -> None:
    """Images, what the network rebuilds of them, and where the two differ."""
    rebuilt = reconstruct(images)
    error = np.sqrt(np.square(images / 255.0 - rebuilt / 255.0).mean(axis=-1))
    figure.set_size_inches(WIDTH, 3.5)
    grid = figure.subplots(3, len(images), squeeze=False)
    rows = (("image", images), ("rebuilt", rebuilt), ("error", error))
    for (name, row), line in zip(rows, grid, strict=True):
        for axes, image in zip(line, row, strict=True):
            axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=row.max(), interpolation="none")
            axes.set(xticks=[], yticks=[], frame_on=False)
        line[0].set_ylabel(name)
    for axes, name in zip(grid[-1], below, strict=True):
        axes.set_xlabel(name, fontsize=9)


def draw_training(history: Sequence[dict[str, float]]) -> bytes:
    """The course of a training run as a PNG: losses, accuracies and rate by epoch.

    Args:
        history: for each epoch `epoch`, `cross_entropy`, `mse`, `train_accuracy`, `val_accuracy`
            (both in 0..1) and `rate`.
    """

    def draw(figure: Figure) -> None:
        figure.set_size_inches(WIDTH, 7)
        epochs = [row["epoch"] for row in history]
        lines = (("cross_entropy", "mse"), ("train_accuracy", "val_accuracy"), ("rate",))
        panels = figure.subplots(3, sharex=True)
        for axes, names in zip(panels, lines, strict=True):
            for name, colour in zip(names, COLOURS, strict=False):
                values = [row[name] for row in history]
                axes.plot(epochs, values, "o-", color=colour, label=name.replace("_", " "))
            axes.grid(color="#dddddd")
            axes.legend()
        panels[-1].set_xlabel("epoch")
        panels[-1].xaxis.get_major_locator().set_params(integer=True)

    return render(draw)
