"""Both commands as functions, and small networks, each trained once for all tests and workers."""

import os
import shutil

import pytest
import torch
from filelock import FileLock
from PIL import Image

import compute_openmax
import fractals
import train_dhr_nn
from models import load_checkpoint
from open_set_data import load_known
from pictures import ImageSet

SIX_OF_TEN = ["--dataset", "digits", "--known-classes", "0,1,2,3,4,5", "--batch-size", "50"]
SECONDS_TO_WAIT = 600  # for the worker that makes a fixture


def run_training(out, *flags):
    return train_dhr_nn.main([*map(str, flags), "--device", "cpu", "--out", str(out)])


@pytest.fixture(scope="session")
def train():
    """`train_dhr_nn.py` with `--out` and more flags, in this process; returns its exit status."""
    return run_training


@pytest.fixture
def evaluate(tmp_path):
    """`compute_openmax.py` with `--checkpoint` and more flags, in this process."""

    def run(checkpoint, *flags):
        where = ["--checkpoint", str(checkpoint), "--data-dir", str(tmp_path), "--device", "cpu"]
        return compute_openmax.main([*where, *map(str, flags)])

    return run


@pytest.fixture
def error_line(capsys):
    """Function that returns the last line a command has written to stderr."""
    return lambda: capsys.readouterr().err.splitlines()[-1]


def poisoned(images):
    """Other images, in another number, under other labels."""
    keep = slice(len(images.labels) // 2)
    return ImageSet(255 - images.images[keep], images.labels[::-1][keep].copy())


@pytest.fixture
def few_fractals(monkeypatch):
    """Four fractals, where there would be 2,000, which take half a minute."""
    monkeypatch.setattr(fractals, "MAX_COUNT", 4)
    fractals.fractals.cache_clear()
    yield
    fractals.fractals.cache_clear()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Function that lets `make` fill the folder `name`, in the first worker that asks for it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name, make):
        with FileLock(base / f"{name}.lock", timeout=SECONDS_TO_WAIT):
            if not (base / name).exists():
                unfinished = base / f"{name}.unfinished"
                unfinished.mkdir()
                make(unfinished)
                unfinished.rename(base / name)
        return base / name

    return folder


@pytest.fixture(scope="session")
def digits_net(made_once):
    """Checkpoint of a good network: six of the ten digits known, four left out."""

    def make(folder):
        assert run_training(folder / "net.pt", *SIX_OF_TEN, "--epochs", 2) == 0

    return made_once("digits", make) / "net.pt"


@pytest.fixture(scope="session")
def tiny_run():
    """Flags of a run of seconds: two digits, two epochs of two steps."""
    return ["--dataset", "digits", "--known-classes", "0,1", "--batch-size", "120", "--epochs", "2"]


@pytest.fixture(scope="session")
def tiny_net(made_once, tiny_run):
    """Checkpoint that `tiny_run` ends in when nothing stops it."""

    def make(folder):
        assert run_training(folder / "net.pt", *tiny_run) == 0

    return made_once("tiny", make) / "net.pt"


@pytest.fixture(scope="session")
def stopped_run(made_once, tiny_run):
    """The `.partial` file of `tiny_run`, stopped by Ctrl-C after its first epoch."""

    def make(folder):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, epoch=1)
            assert run_training(folder / "net.pt", *tiny_run) == 130

    return made_once("stopped", make) / "net.pt.partial"


def weights(path):
    return load_checkpoint(path)[0].state_dict()


def same_weights(first, second):
    ours, theirs = weights(first), weights(second)
    return all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


def stop_after(patch, epoch):
    """Let training end as by Ctrl-C once it has saved an epoch."""
    save = train_dhr_nn.save_checkpoint

    def save_and_stop(*args, **entries):
        save(*args, **entries)
        if entries["epoch"] == epoch:
            raise KeyboardInterrupt

    patch.setattr(train_dhr_nn, "save_checkpoint", save_and_stop)


@pytest.fixture(scope="session")
def photos_and_net(made_once):
    """A folder of pictures, one sub-folder a class, with a network and a stopped run of them."""

    def make(folder):
        digits = load_known("digits", folder).train
        for digit, name in enumerate(("zero", "one")):
            (folder / "photos" / name).mkdir(parents=True)
            for i, image in enumerate(digits.images[digits.labels == digit][:60]):
                Image.fromarray(image[..., 0]).save(folder / "photos" / name / f"{i}.png")
        flags = ["--dataset", f"folder:{folder / 'photos'}", "--image-size", 16]
        flags += ["--arch", "fast", "--epochs", 2]
        assert run_training(folder / "net.pt", *flags) == 0
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, epoch=1)
            assert run_training(folder / "stopped.pt", *flags) == 130

    return made_once("own-pictures", make)


@pytest.fixture
def photos(photos_and_net, tmp_path):
    """A copy of these pictures, to change; moved since the network was trained."""
    return shutil.copytree(photos_and_net / "photos", tmp_path / "photos")


@pytest.fixture
def photos_net(photos_and_net, photos):
    """Checkpoint of the network trained on them."""
    return shutil.copy(photos_and_net / "net.pt", photos.parent / "net.pt")
