"""The report and the picture of a training run, drawn from activations made here."""

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

import compute_openmax
import report
from activations import Activations
from methods import OpenMaxSettings, build_methods
from metrics import Scores, auroc
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
    arrays = (logits, latents, latents + 1, latents)
    labels = labels if known else np.full(count, UNKNOWN)
    return Activations(labels, *(array.astype(np.float32) for array in arrays))


def evaluation(classes=CLASSES, unknown_sets=("svhn",)):
    """The arguments of `write_report` after the folder."""
    rng = np.random.default_rng(0)
    sets = {"train": activations(rng, 120), "val": activations(rng, 60)}
    sets["test_known"] = activations(rng, 90)
    sets |= {name: activations(rng, 50, known=False) for name in unknown_sets}
    methods = build_methods(OpenMaxSettings())
    for method in methods.values():
        method.fit(sets["train"], sets["val"])
    scores, measured = compute_openmax.measure(methods, sets, unknown_sets)
    thresholds = {name: float(method.threshold_) for name, method in methods.items()}
    results = {
        "checkpoint": {"path": "net.pt", "sha256": "0123abcd"}, "known": "folder:photos",
        "images": {"val": 60}, "closed_set_accuracy": 0.99,
        "methods": measured, "openmax": {"tail_size": 20, "threshold": thresholds},
        "command": "python compute_openmax.py --report out",
    }  # fmt: skip
    pixels = {name: rng.integers(0, 256, (90, 16, 16, 1), np.uint8) for name in scores["msp"]}
    return [results, classes, sets, scores, methods, pixels, lambda images: images // 2]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder, arguments = tmp_path_factory.mktemp("report"), evaluation(unknown_sets=UNKNOWN_SETS)
    report.write_report(folder, *arguments)
    return folder, (folder / "report.html").read_text("utf-8"), arguments[0]


def findings(accuracy=0.99, validation_images=1000, count=500, **centres):
    """What the diagnosis says of scores around 0 for known images, around centres for unknown."""
    rng = np.random.default_rng(0)
    known = rng.normal(0, 1, count)
    names = ("msp", "max_logit", "openmax", "crosr", "dhr_openmax")
    unknown = {name: rng.normal(centres.get(name, 2), 1, count) for name in names}
    results = {
        "closed_set_accuracy": accuracy, "images": {"val": validation_images},
        "openmax": {"threshold": {"dhr_openmax": float(np.quantile(known, 0.95))}},
        "methods": {name: {"svhn": {"auroc": auroc(known, unknown[name])}} for name in names},
    }  # fmt: skip
    ours = {"test_known": Scores(known, None), "svhn": Scores(unknown["dhr_openmax"], None)}
    return report.diagnose(results, ours)


def test_page_holds_every_part_in_order(written):
    _, page, results = written
    assert re.findall("<h2[^>]*>(.*?)</h2>", page) == [
        "Results", "Which method to trust, and what to improve",
        *(f"Against {name}" for name in UNKNOWN_SETS), "Weibull tails",
        "Images closest to a mistake, and their reconstructions",
        "How the numbers were made",
    ]  # fmt: skip
    rejected = f"{1 - results['methods']['dhr_openmax']['svhn']['fpr_at_95_tpr']:.1%}"
    assert f"it rejects {rejected} of the svhn images" in re.search("<h1.*</h1>", page).group()
    for method, sets in results["methods"].items():
        row = re.search(rf"<th>{method}</th>(.*?)</tr>", page).group(1)
        assert f"<td>{100 * sets['svhn']['auroc']:.1f}</td>" in row
    assert all(fact in page for fact in ("0123abcd", "--report out", "tail_size"))
    assert "could not be drawn" not in page


def test_page_requests_nothing_from_elsewhere(written):
    page = written[1]
    assert "http" not in re.sub('data:image/png;base64,[^"]*', "", page)
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


def test_a_picture_that_fails_costs_one_line(tmp_path, capsys):
    *arguments, _ = evaluation()

    def broken(images):
        raise RuntimeError("no memory left")

    report.write_report(tmp_path, *arguments, broken)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.count("could not be drawn: no memory left") == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert page.count("<img") == 4


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
    code = "import json, report, sys; h = json.loads(sys.argv[1]); "
    code += "sys.stdout.buffer.write(report.draw_training(h))"
    environment = os.environ | {"MPLBACKEND": "nonsense", "MATPLOTLIBRC": str(tmp_path)}
    command = [sys.executable, "-c", code, json.dumps(HISTORY)]
    root = Path(report.__file__).parent
    drawn = subprocess.run(command, env=environment, cwd=root, capture_output=True, check=True)
    assert drawn.stdout == expected


def test_only_an_inaccurate_network_is_to_be_trained_longer():
    for accuracy, expected in ((0.988, True), (0.7, False)):
        fine, text, advice = findings(accuracy, dhr_openmax=0.5)[2]
        assert fine == expected
        assert f"{accuracy:.1%}" in text
        assert "train longer" in advice
    fine, _, advice = findings(dhr_openmax=0.5)[3]
    assert not fine
    assert "train some as one more class" in advice


def test_method_that_separates_best_is_recommended():
    fine, text, advice = findings(msp=4, dhr_openmax=2.5)[0]
    assert not fine
    assert re.match(r"`msp` separates better .* `dhr_openmax` \(AUROC 99.. against 9...\)", text)
    assert advice.startswith("Prefer it, and check on images of your own")
    assert findings(dhr_openmax=4)[0][1].startswith("`dhr_openmax` separates best here: use it")
    fine, text, _ = findings(count=20, msp=2.1)[0]
    assert fine
    assert "that may be chance: use `dhr_openmax`" in text


def test_diagnosis_says_how_well_the_validation_images_set_a_threshold():
    text = findings(validation_images=20)[1][1]
    assert "of 20 validation images, and so about 75% to 99% of new known images" in text
    assert "of 2,500 validation images, and so about 94% to 96%" in findings(0.9, 2500)[1][1]


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
    probe = """<script>onload = () => { document.title = JSON.stringify([
      document.documentElement.scrollWidth, [...document.images].filter(
        i => !i.naturalWidth || i.getBoundingClientRect().right > innerWidth).length,
    ]); }</script>"""
    frame = tmp_path / "frame.html"
    (tmp_path / "page.html").write_text(written[1] + probe, "utf-8")
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
    assert json.loads(re.search("<pre>(.*?)</pre>", dom).group(1)) == [width, 0]
