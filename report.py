"""The evaluation as one self-contained HTML page, and the course of a training run as a picture.

The page requests nothing from elsewhere and fits a phone. Its colours are those of Okabe and Ito,
which colour-blind readers tell apart. A person's matplotlib settings change no picture.
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
from sklearn.metrics import confusion_matrix

from activations import Activations
from methods import acceptance_interval
from metrics import ACCEPTED_SHARE, TITLES, Scores, ccr_and_fpr
from models import replace_file
from openmax import UNKNOWN, adapted_tail_size

with patch.dict(os.environ):
    os.environ.pop("MPLBACKEND", None)  # a notebook's; one that is missing here ends the import
    from matplotlib import rc_context, rcParamsDefault
    from matplotlib.figure import Figure
    from matplotlib.font_manager import fontManager

Array = np.ndarray
Draw = Callable[..., None]
Results = dict[str, Any]
SetScores = dict[str, Scores]  # of one method, on each set

OURS = "dhr_openmax"  # the method the page is about
SHOWN_METRICS = ("auroc", "fpr_at_95_tpr", "oscr", "macro_f1", "macro_f1_at_half")
SHOWN_IMAGES, SHOWN_CLASSES = 6, 12  # mistakes of each set; Weibulls
WIDTH = 6.4  # of a picture, in inches
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
<title>Open-set recognition report</title><style>
body { margin: auto; padding: 1rem; max-width: 46rem; font: 1rem/1.5 system-ui, sans-serif;
       background: #fff; color: #1a1a1a; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
img { width: 100%; margin-top: 1rem; } .caption, caption { color: #555; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-size: min(.9rem, 2.9vw); }
td, th { padding: .25rem 0 .25rem .3rem; text-align: right; border-bottom: 1px solid #ddd; }
caption, th:first-child { padding-left: 0; text-align: left; } .ours { font-weight: bold; }
.warn, .fine { border-left: 4px solid #D55E00; padding-left: .6rem; }
.fine { border-color: #009E73; } pre { white-space: pre-wrap; font-size: .8rem; }
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
    folder: Path, results: Results, classes: Sequence[str], sets: dict[str, Activations],
    scores: dict[str, SetScores], methods: dict[str, Any], pixels: dict[str, Array],
    reconstruct: Callable[[Array], Array],
) -> None:  # fmt: skip
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
    threshold, labels = results["openmax"]["threshold"][OURS], sets["test_known"].labels
    names = [name[:12].encode(errors="replace").decode() for name in classes]  # fit for a picture
    page = Page(folder)
    add_results(page, results)
    page.add("h2", "Which method to trust, and what to improve")
    for fine, text, advice in diagnose(results, scores[OURS]):
        page.add("p", text if fine else f"{text} {advice}", "fine" if fine else "warn")
    for name in results["methods"][OURS]:
        known, unknown = scores[OURS]["test_known"], scores[OURS][name]
        page.add("h2", f"Against {name}")
        caption = "ROC and OSCR: known images accepted, and those of them named correctly."
        page.picture("roc", name, caption, draw_curves, scores, name, labels)
        caption = f"Scores of {OURS}: right of the threshold, an image is called unknown."
        page.picture("scores", name, caption, draw_histogram, known, unknown, threshold)
        caption = f"Answers of {OURS} at its threshold. Rows add up to 100%."
        truth = np.append(labels, np.full(len(unknown.unknownness), UNKNOWN))
        answers = np.append(known.predict(threshold), unknown.predict(threshold))
        page.picture("confusion", name, caption, draw_confusion, truth, answers, names)
    page.add("h2", "Weibull tails")
    caption = "crosr: each class's farthest images (steps), the Weibull fitted to them (curve)."
    page.picture("weibull", "", caption, draw_weibulls, methods["crosr"], sets["train"], names)
    page.add("h2", "Images closest to a mistake, and their reconstructions")
    if not pixels:
        page.add("p", "Not shown: no images at hand, only the shipped activation vectors.")
    for name, images in pixels.items():
        which, step = ("highest", -1) if name == "test_known" else ("lowest", 1)
        caption = f"{name}, {which} unknownness; below each image, the known class nearest to it."
        first = np.argsort(scores[OURS][name].unknownness)[::step][:SHOWN_IMAGES]
        nearest = [names[label] for label in scores[OURS][name].nearest_class[first]]
        page.picture("mistakes", name, caption, draw_images, images[first], reconstruct, nearest)
    page.add("h2", "How the numbers were made")
    made = {name: value for name, value in results.items() if name != "methods"}
    page.add("pre", json.dumps(made, indent=1, ensure_ascii=False))
    content = "\n".join(page.parts).encode(errors="backslashreplace")
    replace_file(folder / "report.html", lambda file: file.write(content))
    print(f"wrote {folder / 'report.html'}")


def add_results(page: Page, results: Results) -> None:
    """The outcome in one sentence, and a table for each unknown set."""
    known = results["known"]
    name, measured = next(iter(results["methods"][OURS].items()))
    rejected = f"{1 - measured['fpr_at_95_tpr']:.1%} of the {name} images"
    accepted = f"{ACCEPTED_SHARE:.0%} of the {known} test images"
    page.add("h1", f"While {OURS} accepts {accepted}, it rejects {rejected}.")
    page.add("h2", "Results")
    for unknown in results["methods"][OURS]:
        page.parts.append("<table>")
        page.add("caption", f"{known} (known) against {unknown} (unknown)")
        titles = "".join(f"<th>{TITLES[metric]}</th>" for metric in SHOWN_METRICS)
        page.parts.append(f"<tr><th>method</th>{titles}</tr>")
        for method, sets in results["methods"].items():
            measured = sets[unknown]
            cells = "".join(f"<td>{100 * measured[metric]:.1f}</td>" for metric in SHOWN_METRICS)
            css = "ours" if method == OURS else ""
            page.parts.append(f'<tr class="{css}"><th>{method}</th>{cells}</tr>')
        page.parts.append("</table>")
    page.add("p", "In %; FPR95 is better when low. results.json has all eight metrics.")


def diagnose(results: Results, ours: SetScores) -> list[tuple[bool, str, str]]:
    """Which method to trust, and what to improve: (all is well, finding, advice if it is not)."""
    threshold, accuracy = results["openmax"]["threshold"][OURS], results["closed_set_accuracy"]
    rejected = {name: float(np.mean(of.unknownness > threshold)) for name, of in ours.items()}
    rejected_known = rejected.pop("test_known")
    count = results["images"]["val"]
    low, high = acceptance_interval(count)
    findings = [
        trust(results["methods"], min(len(of.unknownness) for of in ours.values())),
        (
            rejected_known <= max(0.1, 1 - low),
            f"Each threshold accepts at least {ACCEPTED_SHARE:.0%} of {count:,} validation images, "
            f"and so about {low:.0%} to {high:.0%} of new known images. "
            f"{OURS} calls {rejected_known:.1%} of the known test images unknown.",
            "Prepare test and validation images alike.",
        ),
        (
            accuracy >= 0.9,
            f"The network names {accuracy:.1%} of the known test images correctly.",
            "A better classifier also detects better: train longer, or on more images.",
        ),
    ]
    for name, share in rejected.items():
        text = f"{OURS} takes {1 - share:.1%} of the {name} images for known."
        advice = "If you expect such images, train some as one more class."
        findings.append((share >= 0.75, text, advice))
    return findings


def trust(methods: Results, count: int) -> tuple[bool, str, str]:
    """Which method has the highest mean AUROC, and whether by more than chance.

    An AUROC A has a variance of at most A (1 - A) / count, the images in the smallest set (van
    Dantzig 1951). So has the difference of two that correlate by 0.5 or more.
    """
    areas = {name: np.mean([of["auroc"] for of in sets.values()]) for name, sets in methods.items()}
    area, best = areas[OURS], max(areas, key=lambda name: (areas[name], name == OURS))
    if best == OURS:
        return True, f"`{OURS}` separates best here: use it, as `--images` does.", ""
    text = f"`{best}` separates better here than `{OURS}` "
    text += f"(AUROC {100 * areas[best]:.1f} against {100 * area:.1f})"
    if areas[best] - area <= 2 * np.sqrt(area * (1 - area) / count):
        return True, f"{text}, but that may be chance: use `{OURS}`, as `--images` does.", ""
    advice = f"Prefer it, and check on images of your own. `--images` uses `{OURS}`."
    return False, f"{text}.", advice


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


def draw_curves(figure: Figure, scores: dict[str, SetScores], unknown: str, labels: Array) -> None:
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


def draw_histogram(figure: Figure, known: Scores, unknown: Scores, threshold: float) -> None:
    figure.set_size_inches(WIDTH, 4.2)
    axes = figure.subplots()
    both = known.unknownness, unknown.unknownness
    low, high = np.percentile(np.concatenate(both), (0.5, 95))
    bins = np.linspace(low, max(high, threshold + (threshold - low) / 4), 50)
    for values, name, colour in zip(both, ("known", "unknown"), COLOURS, strict=True):
        shares = 100 * np.histogram(values.clip(bins[0], bins[-1]), bins)[0] / len(values)
        axes.stairs(shares, bins, fill=True, color=colour, alpha=0.6, label=name)
    axes.axvline(threshold, color="black", linestyle="--", label="threshold")
    axes.set(xlabel="unknownness (log odds); the outer bars hold all beyond", ylabel="images (%)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)


def draw_confusion(figure: Figure, truth: Array, answers: Array, names: Sequence[str]) -> None:
    order, names = [*range(len(names)), UNKNOWN], [*names, "unknown"]
    shares = 100 * confusion_matrix(truth, answers, labels=order, normalize="true")
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


def draw_weibulls(figure: Figure, crosr: Any, train: Activations, names: Sequence[str]) -> None:
    openmax, settings = crosr.openmax_, crosr.settings
    distances, answers = openmax.distances(train.vectors(settings.latents)), train.logits.argmax(1)
    names = names[:SHOWN_CLASSES]
    rows = -(-len(names) // 3)
    figure.set_size_inches(WIDTH, 1.9 * rows + 0.4)
    for label, name in enumerate(names):
        own = np.sort(distances[(train.labels == label) & (answers == label), label])
        tail = own[-adapted_tail_size(settings.tail_size, len(own)) :]
        x = np.linspace(tail[0], tail[-1], 200)
        axes = figure.add_subplot(rows, 3, label + 1, title=name, yticks=[0, 1])
        axes.ecdf(tail, color=COLOURS[0], linewidth=2)
        axes.plot(x, openmax.weibull_.cdf(x[:, None])[:, label], color=COLOURS[1], linewidth=2)
        axes.locator_params(axis="x", nbins=4)
    figure.supylabel("share nearer")
    figure.supxlabel("distance to the class mean")


def draw_images(
    figure: Figure, images: Array, reconstruct: Callable[[Array], Array], below: Sequence[str]
) -> None:
    """Images, what the network rebuilds of them, and where the two differ."""
    rebuilt = reconstruct(images)
    error = np.sqrt(np.square(images / 255.0 - rebuilt / 255.0).mean(axis=-1))
    figure.set_size_inches(WIDTH, 3.5)
    grid = figure.subplots(3, len(images), squeeze=False)
    rows = ("image", images), ("rebuilt", rebuilt), ("error", error)
    for (name, row), line in zip(rows, grid, strict=True):
        for axes, image in zip(line, row, strict=True):
            axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=row.max(), interpolation="none")
            axes.set(xticks=[], yticks=[], frame_on=False)
        line[0].set_ylabel(name)
    for axes, name in zip(grid[-1], below, strict=True):
        axes.set_xlabel(name, fontsize=9)


def draw_training(history: Sequence[dict[str, float]]) -> bytes:
    """Draw the rows that training records, one per epoch, and return a PNG."""

    def draw(figure: Figure) -> None:
        figure.set_size_inches(WIDTH, 7)
        panels = figure.subplots(3, sharex=True)
        lines = ("cross_entropy", "mse"), ("train_accuracy", "val_accuracy"), ("rate",)
        for axes, names in zip(panels, lines, strict=True):
            for name, colour in zip(names, COLOURS, strict=False):
                epochs, values = [row["epoch"] for row in history], [row[name] for row in history]
                axes.plot(epochs, values, "o-", color=colour, label=name.replace("_", " "))
            axes.grid(color="#dddddd")
            axes.legend()
        panels[-1].set_xlabel("epoch")
        panels[-1].xaxis.get_major_locator().set_params(integer=True)

    return render(draw)
