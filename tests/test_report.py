"""The report and the picture of a training run, drawn from activations made here."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import figures
import numpy as np
import pytest
from matplotlib import rc_context
from PIL import Image

import report
from activations import Activations
from methods import OpenMaxSettings, build_methods
from metrics import Scores, auroc, open_set_metrics
from openmax import UNKNOWN

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HISTORY = [
    {"epoch": epoch, "cross_entropy": 1 / epoch, "mse": 0.5 / epoch, "train_accuracy": 0.8,
     "val_accuracy": 0.7, "rate": 0.1} for epoch in (1, 2, 3)
]  # fmt: skip
UNKNOWN_SETS = ("svhn", "folder:my pictures/a b", "folder:other/a_b")
CLASSES = ("cat", "dog", "ship")


def activations(rng, count, known=True):
    """Of three classes whose logits and latents lie apart, or of images between them."""
    labels = np.arange(count) % len(CLASSES)
    logits = rng.normal(0, 1, (count, len(CLASSES)))
    latents = rng.gamma(2, 1, (count, 96))
    if known:
        logits[np.arange(count), labels] += 8
        latents[:, :3] += 5 * np.eye(3)[labels]
    arrays = (array.astype(np.float32) for array in (logits, latents + 1, latents))
    return Activations(labels if known else np.full(count, UNKNOWN), *arrays)


def evaluation(classes=CLASSES, unknown_sets=("svhn",)):
    """The arguments of `write_report` after the folder."""
    rng = np.random.default_rng(0)
    sets = {"train": activations(rng, 120), "val": activations(rng, 60)}
    sets["test_known"] = activations(rng, 90)
    sets |= {name: activations(rng, 50, known=False) for name in unknown_sets}
    settings = OpenMaxSettings()
    methods = build_methods(settings)
    labels, tested = sets["test_known"].labels, ("test_known", *unknown_sets)
    scores, measured = {}, {}
    for name, method in methods.items():
        method.fit(sets["train"], sets["val"])
        its = scores[name] = {key: method.score(sets[key]) for key in tested}
        measured[name] = {
            key: open_set_metrics(its["test_known"], labels, its[key], method.threshold_)
            for key in unknown_sets
        }
    thresholds = {name: float(method.threshold_) for name, method in methods.items()}
    results = {
        "checkpoint": {"path": "net.pt", "sha256": "0123abcd"}, "known": "folder:photos",
        "activations": "extracted", "validation_images": 60,
        "closed_set_accuracy": float(np.mean(sets["test_known"].logits.argmax(1) == labels)),
        "methods": measured, "openmax": {**settings._asdict(), "threshold": thresholds},
        "seconds": {"fit": 0.1}, "versions": {"numpy": np.__version__}, "device": "cpu",
        "command": "python compute_openmax.py --report out",
    }  # fmt: skip
    pixels = {key: rng.integers(0, 256, (90, 16, 16, 1), np.uint8) for key in tested}
    return [results, classes, sets, scores, methods, pixels, lambda images: images // 2]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder, arguments = tmp_path_factory.mktemp("report"), evaluation(unknown_sets=UNKNOWN_SETS)
    report.write_report(folder, *arguments)
    return folder, (folder / "report.html").read_text("utf-8"), arguments[0]


def findings(known, unknown, accuracy, validation_images=1000):
    """What the diagnosis says of methods whose scores are given: [N] and [M] a method."""
    scores = {
        name: {"test_known": Scores(known[name], None), "svhn": Scores(unknown[name], None)}
        for name in known
    }
    results = {
        "closed_set_accuracy": accuracy, "validation_images": validation_images,
        "openmax": {"threshold": {"dhr_openmax": float(np.quantile(known["dhr_openmax"], 0.95))}},
        "methods": {name: {"svhn": {"auroc": auroc(known[name], unknown[name])}} for name in known},
    }  # fmt: skip
    return report.diagnose(results, scores)


def normal_scores(count=500, **centres):
    """Scores of known images around 0, of unknown ones around a centre for each method."""
    rng = np.random.default_rng(0)
    names = ("msp", "max_logit", "openmax", "crosr", "dhr_openmax")
    known = {name: rng.normal(0, 1, count) for name in names}
    return known, {name: rng.normal(centres.get(name, 2), 1, count) for name in names}


def test_page_holds_every_part_in_order(written):
    _, page, results = written
    assert re.findall("<h2[^>]*>(.*?)</h2>", page) == [
        "Results", "Which method to trust, and what to improve",
        *(f"Against {name}" for name in UNKNOWN_SETS), "Weibull tails",
        "Most confident mistakes, and what the network rebuilds of them",
        "How the numbers were made",
    ]  # fmt: skip
    rejected = f"{1 - results['methods']['dhr_openmax']['svhn']['fpr_at_95_tpr']:.1%}"
    assert f"it rejects {rejected} of the svhn images" in re.search("<h1.*</h1>", page).group()
    for method, sets in results["methods"].items():
        row = re.search(rf"<th>{method}</th>(.*?)(<tr|</table)", page).group(1)
        assert f"<td>{100 * sets['svhn']['auroc']:.1f}</td>" in row
    assert all(fact in page for fact in ("0123abcd", "--report out", "tail_size"))
    assert "could not be drawn" not in page


def test_page_requests_nothing_from_elsewhere(written):
    _, page, _ = written
    assert "http" not in page.replace("http-equiv", "")
    assert set(re.findall('(?:src|srcset|href)="(.{5})', page)) == {"data:"}


def test_every_picture_is_a_file_of_its_own_with_a_short_name(written):
    folder, page, _ = written
    pictures = sorted(folder.glob("*.png"))
    assert len(pictures) == page.count("<img") == 3 * len(UNKNOWN_SETS) + 1 + 4
    assert "01-roc-svhn.png" in [path.name for path in pictures]
    assert all(len(path.name) < 40 and path.name.isascii() for path in pictures)
    for path in pictures:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (border == 255).mean() > 0.9, f"{path.name} is cut off"
        assert pixels.std() > 5


def test_names_are_shown_as_they_are(tmp_path, capsys):
    """Warnings are errors here: a missing font must not even warn."""
    names = ("$5 \\frac{ a_b $x", "猫 < & 犬", "caf\udce9\t" + "long" * 30)
    report.write_report(tmp_path, *evaluation(names))
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "could not be drawn" not in page + capsys.readouterr().err
    assert report.shown(names[0]) == "$5 \\frac{ a…"
    assert report.shown("caf\udce9\t") == "caf\ufffd\ufffd"


def test_a_picture_that_fails_costs_one_line(tmp_path, capsys):
    *arguments, _ = evaluation()

    def broken(images):
        raise RuntimeError("no memory left")

    report.write_report(tmp_path, *arguments, broken)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.count("could not be drawn: no memory left") == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert page.count("<img") == 4
    assert "How the numbers were made" in page


def test_without_images_one_line_says_so(tmp_path):
    *arguments, _, reconstruct = evaluation()
    report.write_report(tmp_path, *arguments, {}, reconstruct)
    assert (tmp_path / "report.html").read_text("utf-8").count("no images at hand") == 1
    assert not list(tmp_path.glob("*mistakes*"))


def test_matplotlib_settings_change_no_picture(tmp_path):
    expected = report.draw_training(HISTORY)
    style = {"axes.facecolor": "black", "font.size": 30, "savefig.dpi": 20, "text.usetex": True}
    with rc_context(style):
        assert report.draw_training(HISTORY) == expected
    (tmp_path / "matplotlibrc").write_text("backend: TkAgg\nlines.linewidth: 9\n")
    code = (
        "import json, sys, report\n"
        "sys.stdout.buffer.write(report.draw_training(json.loads(sys.argv[1])))"
    )
    environment = os.environ | {"MPLBACKEND": "nonsense", "MATPLOTLIBRC": str(tmp_path)}
    command = [sys.executable, "-c", code, json.dumps(HISTORY)]
    root = Path(report.__file__).parent
    drawn = subprocess.run(command, env=environment, cwd=root, capture_output=True, check=True)
    assert drawn.stdout == expected
    with Image.open(io.BytesIO(expected)) as image:
        assert image.width > 600


def test_accurate_network_is_not_called_inaccurate():
    told = findings(*normal_scores(msp=0.5, crosr=0.5, dhr_openmax=0.5), accuracy=0.988)
    text = " ".join(text for _, text in told)
    assert "98.8%" in text
    assert not re.search("better classifier|train a better", text)
    assert "train some as one more class" in text
    told = findings(*normal_scores(dhr_openmax=0.5), accuracy=0.7)
    assert "train longer" in " ".join(text for _, text in told)


def test_method_that_separates_best_is_recommended():
    fine, text = findings(*normal_scores(msp=4, dhr_openmax=2.5), accuracy=0.99)[0]
    assert not fine
    assert re.match(
        r"`msp` separates better here than `dhr_openmax` \(AUROC 99.. against 9...\): prefer it, "
        "and check on images of your own", text,
    )  # fmt: skip
    fine, text = findings(*normal_scores(dhr_openmax=4), accuracy=0.99)[0]
    assert fine
    assert text.startswith("`dhr_openmax` separates better here than")
    fine, text = findings(*normal_scores(20, msp=2.1), accuracy=0.99)[0]
    assert fine
    assert "that may be chance: use `dhr_openmax`" in text


def test_few_validation_images_leave_a_threshold_uncertain():
    text = findings(*normal_scores(), 0.99, validation_images=20)[1][1]
    low, high = re.search(
        r"of 20 validation images, so few .* from (\d+)% to (\d+)% of", text
    ).groups()
    accepted = np.sort(np.random.default_rng(0).random((20_000, 20)), axis=1)[:, 18]
    expected = 100 * np.quantile(accepted, (0.025, 0.975))
    assert np.allclose([float(low), float(high)], expected, atol=1)
    text = findings(*normal_scores(), 0.99, validation_images=2500)[1][1]
    assert "accepts 95% of 2,500 validation images. " in text


def test_error_of_an_auroc_difference_is_the_bootstraps():
    rng = np.random.default_rng(0)
    known, unknown = rng.normal(0, 1, 150), rng.normal(1.5, 1, 80)
    first, second = (
        (known + rng.normal(0, noise, 150), unknown + rng.normal(0, noise, 80))
        for noise in (0.2, 0.9)
    )
    draws = [(rng.integers(0, 150, 150), rng.integers(0, 80, 80)) for _ in range(400)]
    gaps = [auroc(first[0][i], first[1][j]) - auroc(second[0][i], second[1][j]) for i, j in draws]
    sets = [{"test_known": Scores(a, None), "svhn": Scores(b, None)} for a, b in (first, second)]
    assert report.auroc_error(*sets) == pytest.approx(np.std(gaps), rel=0.15)


def test_pictures_of_the_readme_are_small():
    rng = np.random.default_rng(0)
    scores = report.render(figures.draw_scores, *rng.normal(0, 20, (2, 500)), 0.0, form="svg")
    for svg in (scores, report.render(figures.draw_network, form="svg")):
        assert svg.startswith(b"<?xml")
        assert len(svg) < 60_000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [360, 1280])
def test_page_fits_its_window(written, tmp_path, width):
    page = written[1]
    probe = """<script>onload = () => { document.title = JSON.stringify([
      document.documentElement.scrollWidth, [...document.images].filter(
        i => !i.naturalWidth || i.getBoundingClientRect().right > innerWidth).length,
      performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length,
    ]); }</script>"""
    page = re.sub("<meta http-equiv[^>]*>", "", page)
    frame = tmp_path / "frame.html"
    (tmp_path / "page.html").write_text(page + probe, "utf-8")
    frame.write_text(
        f"""<iframe id=f src=page.html style="border:0;width:{width}px;height:800px"></iframe>
        <pre></pre><script>onload = () => document.querySelector("pre").textContent =
        document.getElementById("f").contentDocument.title</script>"""
    )
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        "--hide-scrollbars", "--virtual-time-budget=20000", f"--user-data-dir={tmp_path / 'user'}",
        "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert json.loads(re.search("<pre>(.*?)</pre>", dom).group(1)) == [width, 0, 0]
