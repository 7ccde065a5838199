"""Draw the README's two pictures, docs/scores.svg and docs/network.svg.

    python benchmarks/figures.py

The scores come from the shipped activation vectors; it takes seconds.
"""

import sys
from pathlib import Path

import numpy as np
from scipy.stats import weibull_min

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from activations import file_sha256, load_shipped
from methods import DHROpenMax
from report import Figure, render

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
GREY, INK = "#999999", "#333333"


def draw_scores(figure: Figure, known: np.ndarray, unknown: np.ndarray, threshold: float) -> None:
    """Two histograms of unknownness and the threshold; the last bar holds all beyond."""
    figure.set_size_inches(8, 3.2)
    axes = figure.subplots()
    bins = np.linspace(-3.2, 4.8, 51)
    for scores, colour in ((known, BLUE), (unknown, RED)):
        counts, _ = np.histogram(scores.clip(None, bins[-1]), bins)
        axes.stairs(100 * counts / len(scores), bins, fill=True, color=colour, alpha=0.55)
    axes.set(ylabel="images (%)", xlabel="unknownness (log odds of being unknown)", ylim=(0, 18))
    axes.axvline(threshold, color=INK, linestyle="--")
    for x, y, text, colour in (
        (-1.2, 10.5, f"known:\nCIFAR-10\n{np.mean(known <= threshold):.1%} accepted", BLUE),
        (3.7, 10.5, f"unknown:\nTinyImageNet\n{np.mean(unknown > threshold):.1%} rejected", RED),
        (-0.6, 16.6, "← accepted", INK), (0.6, 16.6, "rejected →", INK),
        (3.9, 16.6, f"{np.mean(unknown > bins[-1]):.0%} farther →", RED),
    ):  # fmt: skip
        axes.text(x, y, text, color=colour, ha="center")


def draw_network(figure: Figure) -> None:
    """The DHR network at the left; at the right, what OpenMax makes of its activation vector."""
    figure.set(size_inches=(8, 4.3), layout_engine="none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 100), ylim=(0, 53.75))
    axes.set_axis_off()

    def box(x: float, y: float, width: float, height: float, colour: str, text: str = "") -> None:
        xs, ys = width / 2 * np.array([-1, 1, 1, -1]), height / 2 * np.array([-1, -1, 1, 1])
        axes.fill(x + xs, y + ys, facecolor=f"{colour}38", edgecolor=colour, linewidth=1.2)
        axes.text(x, y, text, ha="center", va="center")

    for y, alpha in ((43, 0.9), (10, 0.5)):  # a landscape, and the network's memory of it
        box(6, y, 8, 8, GREY)
        axes.fill([2.2, 5, 8], [y - 3.7, y + 1.5, y - 3.7], color=GREEN, alpha=alpha)
        axes.fill([5.4, 7.7, 9.8], [y - 3.7, y, y - 3.7], color=BLUE, alpha=alpha)
        axes.plot(7.8, y + 2, "o", color=ORANGE, markersize=7, alpha=alpha, mew=0)
    for x, height, level in ((19, 14, "₁"), (29.5, 11, "₂"), (40, 8, "₃")):
        box(x, 43, 6, height, BLUE, f"f{level}")
        box(x, 27, 6, 4.5, ORANGE, f"z{level}")
        box(x, 10, 6, height, GREEN, f"g{level}")
        box(62.5, 33 - (x - 19) / 1.75, 5, 6, ORANGE, f"z{level}")
    box(62.5, 41.5, 5, 11, BLUE, "y")
    for y, height in ((43, 11), (27, 11), (10, 9)):
        box(86, y, 26, height, GREY)
    axes.plot([15, 44, 44, 15, 15], [23.5, 23.5, 30.5, 30.5, 23.5], ":", color=ORANGE)
    for x, y, to_x, to_y in (  # arrows
        (19, 36, 19, 29.3), (29.5, 37.5, 29.5, 29.3), (40, 39, 40, 29.3), (19, 24.7, 19, 17),
        (29.5, 24.7, 29.5, 15.5), (40, 24.7, 40, 14), (10, 43, 16, 43), (22, 43, 26.5, 43),
        (32.5, 43, 37, 43), (43, 43, 60, 43), (37, 10, 32.5, 10), (26.5, 10, 22, 10),
        (16, 10, 10, 10), (44, 27, 60, 27), (65, 43, 73, 43), (86, 37.5, 86, 32.5),
        (86, 21.5, 86, 14.5), (73, 10, 66, 10),
    ):  # fmt: skip
        style = {"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (to_x, to_y), (x, y), arrowprops=style)
    cloud = np.random.default_rng(1).normal((76.5, 42), (1.1, 1.5), (25, 2))
    axes.plot(*cloud.T, ".", color=BLUE, markersize=4, mew=0)
    axes.plot([76.5, 80.5], [42, 46.5], "-", color=INK, linewidth=1)
    axes.plot(76.5, 42, "+", color=INK, markersize=9, mew=2)
    axes.plot(80.5, 46.5, "o", color=RED, markersize=6)
    reach = np.linspace(0, 3, 50)
    density = 23.5 + 8 * weibull_min(1.7).pdf(reach)
    axes.fill_between(74.5 + 2.3 * reach, 23.5, density, color=RED, alpha=0.5, linewidth=0)
    for x, y, text in (
        (6, 49, "image"), (6, 4, "rebuilt"), (29.5, 51, "encoder"), (29.5, 2, "decoder"),
        (7, 27, "latents,\n32 channels\neach"), (51.5, 45, "classifier"), (51.5, 41, "logits y"),
        (52, 29, "pooled"), (62.5, 50.2, "activation\nvector"), (58, 11.5, "a known class"),
        (58, 8, "or unknown"), (91, 43, "distance to\nthe mean of\neach class"),
        (91, 27, "Weibull:\nhow far is\ntoo far?"),
        (86, 10, "OpenMax: probability of\neach class and of unknown"),
    ):  # fmt: skip
        colour = {"a known class": BLUE, "or unknown": RED}.get(text, INK)
        axes.text(x, y, text, color=colour, ha="center", va="center", fontsize=9.5)


def main() -> None:
    checkpoint = file_sha256(ROOT / "dhr_net.pt")
    sets = load_shipped(checkpoint, ["train", "val", "test_known", "tiny-imagenet-crop"])
    rule = DHROpenMax().fit(sets["train"], sets["val"])
    scores = [rule.score(sets[name]).unknownness for name in ("test_known", "tiny-imagenet-crop")]
    histograms = render(draw_scores, *scores, rule.threshold_, form="svg")
    (ROOT / "docs/scores.svg").write_bytes(histograms)
    (ROOT / "docs/network.svg").write_bytes(render(draw_network, form="svg"))


if __name__ == "__main__":
    main()
