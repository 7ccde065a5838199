"""Every command and every piece of Python in the README does what it says, on small data.

Digits in colour play CIFAR-10 and noise the unknown sets, so that the commands run as printed, but
for the length of training: a few epochs, and one step of a run on CIFAR-10, with --dry-run.
"""

import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_scripts import StopAfter

import compute_openmax
import train_dhr_nn
from open_set_data import ImageSet, KnownData, load_known, load_unknown
from openmax import UNKNOWN

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
    if line.startswith(("python ", "make "))
]
PYTHON = [block for language, block in BLOCKS if language == "python"]
MAINS = {"train_dhr_nn.py": train_dhr_nn.main, "compute_openmax.py": compute_openmax.main}


def small_known(name, data_dir, known_classes=""):
    data = load_known("digits" if name == "cifar10" else name, data_dir, known_classes)
    if name != "cifar10":
        return data
    train, val, test = (
        ImageSet(images.images.repeat(3, axis=-1), images.labels)
        for images in (data.train, data.val, data.test_known)
    )
    return KnownData(data.classes, train, val, test, data.test_unknown)


def small_unknown(name, data_dir, size, channels, seed):
    if name.startswith("folder:"):
        return load_unknown(name, data_dir, size, channels, seed)
    return np.random.default_rng(seed).integers(0, 256, (50, size, size, channels), np.uint8)


def write_images(folder, count):
    folder.mkdir(parents=True)
    for i, image in enumerate(small_known("cifar10", None).train.images[:count]):
        Image.fromarray(image).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with all that the README's commands name, and an unfinished training run."""
    folder = tmp_path_factory.mktemp("readme")
    write_images(folder / "holiday", 2)
    write_images(folder / "my" / "images", 30)
    digits = load_known("digits", folder).train
    for label in (0, 1):
        (folder / "my" / "photos" / str(label)).mkdir(parents=True)
        for i, image in enumerate(digits.images[digits.labels == label][:110]):
            Image.fromarray(image[..., 0]).save(folder / "my" / "photos" / str(label) / f"{i}.png")
    Image.fromarray(digits.images[0, ..., 0]).save(folder / "photo.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train_dhr_nn, "load_known", small_known)
        patch.setattr(train_dhr_nn, "save_checkpoint", StopAfter(1))
        assert train_dhr_nn.main(["--epochs", "2", "--batch-size", "100"]) == 130
    return folder


def test_readme_has_commands():
    assert len(COMMANDS) >= 12
    assert len(PYTHON) >= 2


def test_readme_commands_run_in_order_and_library_use_too(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(train_dhr_nn, "load_known", small_known)
    monkeypatch.setattr(compute_openmax, "load_known", small_known)
    monkeypatch.setattr(compute_openmax, "load_unknown", small_unknown)
    for _, script, *flags in [command for command in COMMANDS if command[0] == "python"]:
        if script == "train_dhr_nn.py" and not {"--dataset", "--resume"} & {*flags}:
            (folder / "dhr_net.pt.partial").rename(folder / "aside")
            assert train_dhr_nn.main([*flags, "--dry-run", "--batch-size", "100"]) == 0
            (folder / "aside").rename(folder / "dhr_net.pt.partial")
        else:
            if "--epochs" in flags:
                flags += ["--epochs", "10" if "folder:my/photos" in flags else "3"]
            assert MAINS[script](flags) == 0, (script, flags, capsys.readouterr())
    for written in ("results.json", "report/report.html", "digits.pt", "my.pt"):
        assert (folder / written).exists()
    assert not (folder / "dhr_net.pt.partial").exists()

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    vectors = rng.normal(size=(300, 5)) + 8 * np.eye(3, 5)[labels]
    names = {
        "images": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8),
        "train_activations": vectors, "train_labels": labels, "activations": vectors[:7],
    }  # fmt: skip
    for block in PYTHON:
        exec(block, names)
    assert names["logits"].shape == (2, 10)
    assert names["reconstruction"].shape == (2, 3, 32, 32)
    assert names["probabilities"].shape == (7, 4)
    assert names["probabilities"].sum(axis=1) == pytest.approx(1)
    assert (names["probabilities"][:, :UNKNOWN].argmax(axis=1) == labels[:7]).all()


def test_commands_in_the_text_parse():
    for script, flags in re.findall(r"`python (\w+\.py)([^`]*)`", README):
        module = {"train_dhr_nn.py": train_dhr_nn, "compute_openmax.py": compute_openmax}[script]
        module.parse_args(shlex.split(flags))


@pytest.mark.parametrize("target", [c[1] for c in COMMANDS if c[0] == "make"])
def test_make_knows_the_targets(target):
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)
