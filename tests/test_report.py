"""The report and the picture of a training run, looked at in a real browser where there is one."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_scripts import digits_net, evaluate  # noqa: F401, a fixture

import compute_openmax
from open_set_data import ImagesUnavailable

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SECTIONS = [
    "Results", "Does it work, and if not, why?", "ROC and OSCR curves", "Scores", "Weibull tails",
    "Confusion", "Reconstructions and most confident mistakes", "Tail size and alpha",
    "How the numbers were made",
]  # fmt: skip


@pytest.fixture(scope="module")
def report(digits_net, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("report")
    flags = ["--unknown", "held-out-classes", "--report", str(folder), "--no-cache"]
    assert evaluate(digits_net, folder, *flags) == 0
    return folder


def test_report_tells_all_in_order_and_needs_no_other_file(report):
    page = (report / "report.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == SECTIONS
    assert re.search(
        r"<h1>dhr_openmax calls [0-9.]+\s% of the [0-9]+ held-out-classes images", page
    )
    assert "http" not in page.replace("http-equiv", "")
    assert set(re.findall('(?:src|srcset|href)="(.{5})', page)) == {"data:"}
    results = json.loads((report / "results.json").read_text())
    for method, sets in results["methods"].items():
        row = re.search(rf"<th>{method}</th>(.*?)</tr>", page).group(1)
        assert f"<td>{100 * sets['held-out-classes']['auroc']:.1f}</td>" in row
    assert results["checkpoint"]["sha256"] in page
    for setting in ("tail_size", "alpha"):
        assert f"{setting} {results['openmax'][setting]}" in page


def test_every_picture_is_in_the_page_and_beside_it_and_shows_something(report):
    page = (report / "report.html").read_text()
    pictures = sorted(report.glob("*.png"))
    assert len(pictures) == page.count("<img") == len(list(report.glob("*.svg"))) == 11
    for path in pictures:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
        assert min(pixels.shape) > 150
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (border == 255).all(), f"{path.name} is cut off"
        assert pixels.std() > 5


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [360, 1280])
def test_page_fits_and_asks_for_nothing(report, tmp_path, width):
    """Chromium measures the page in a frame of the width, and lists what it asked for."""
    probe = f"""<!DOCTYPE html><body style="margin:0"><iframe id="f" src="report.html"
    style="border:0;width:{width}px;height:800px"></iframe><pre id="out"></pre><script>
    document.getElementById("f").onload = function () {{
      const page = this.contentDocument, over = [];
      for (const e of page.body.querySelectorAll("*"))
        if (e.getBoundingClientRect().right > {width}) over.push(e.tagName);
      const broken = [...page.images].filter(i => !i.complete || !i.naturalWidth).length;
      document.getElementById("out").textContent = JSON.stringify(
        {{scroll: page.documentElement.scrollWidth, over, broken, images: page.images.length,
          requests: this.contentWindow.performance.getEntriesByType("resource")
            .map(e => e.name.slice(0, 5)).filter(name => name != "data:")}});
    }};</script>"""
    (report / "probe.html").write_text(probe)
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-quic", "--allow-file-access-from-files", "--virtual-time-budget=20000",
        "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1400,900",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom", (report / "probe.html").as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    found = json.loads(re.search('<pre id="out">(.*?)</pre>', dom).group(1))
    assert found == {"scroll": width, "over": [], "broken": 0, "images": 11, "requests": []}


def test_without_images_one_line_says_so(digits_net, tmp_path, monkeypatch):  # noqa: F811
    def no_images(*args):
        raise ImagesUnavailable("no images in this test")

    loaded = compute_openmax.load_image_sets
    sets = {}

    def remember(path, labels, widths, make):
        sets[len(sets)] = make()
        return sets[len(sets) - 1]

    monkeypatch.setattr(compute_openmax, "cached", remember)
    assert evaluate(digits_net, tmp_path) == 0
    names = ("train", "val", "test_known", "held-out-classes")
    shipped = dict(zip(names, sets.values(), strict=True))
    assert loaded is compute_openmax.load_image_sets
    monkeypatch.setattr(compute_openmax, "load_image_sets", no_images)
    monkeypatch.setattr(compute_openmax, "shipped_activations", lambda *args: shipped)
    assert evaluate(digits_net, tmp_path, "--report", str(tmp_path / "report")) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("no images at hand") == 1
    assert not list((tmp_path / "report").glob("reconstructions*"))


def test_training_leaves_a_picture_of_its_course(digits_net):  # noqa: F811
    with Image.open(Path(digits_net).with_suffix(".png")) as image:
        assert image.width > 600
        assert np.asarray(image.convert("L")).std() > 5
