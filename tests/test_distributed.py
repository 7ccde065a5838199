"""Both commands under torchrun, as two processes on the CPU that talk through gloo (slow)."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import distributed
from distributed import joined_processes

ROOT = Path(__file__).parent.parent
ALONE = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TRAIN = ["train_dhr_nn.py", "--dataset", "digits", "--known-classes", "0,1,2"]
TRAIN += ["--image-size", "32", "--batch-size", "100"]  # smaller maps are too few to normalise over
slow = pytest.mark.slow


def start(launcher, *command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*launcher, *map(str, command)], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(launcher, *command):
    process = start(launcher, *command)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return output


def losses(output):
    """Cross-entropy and squared error of each epoch, from the lines printed."""
    rows = [line.split() for line in output.splitlines() if re.match(r" +\d+ +\d+\.\d ", line)]
    return np.array([[float(row[4]), float(row[5])] for row in rows])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    alone = run(ALONE, *TRAIN, "--epochs", 4, "--out", folder / "alone.pt")
    together = run(TORCHRUN, *TRAIN, "--epochs", 4, "--out", folder / "together.pt")
    return folder, alone, together


@slow
def test_two_processes_follow_the_loss_of_one(trained):
    """Batches and augmentation are the same; batch normalisation is over half of a batch each."""
    folder, alone, together = trained
    assert losses(alone).shape == losses(together).shape == (4, 2)  # one process prints
    assert losses(together) == pytest.approx(losses(alone), rel=0.1, abs=0.02)
    assert "wrote" in together
    assert {path.name for path in folder.glob("*.pt")} == {"alone.pt", "together.pt"}


@slow
def test_two_processes_evaluate_as_one(trained):
    folder, *_ = trained
    command = ["compute_openmax.py", "--checkpoint", folder / "alone.pt", "--data-dir", folder]
    tables = []
    for name, launcher, flags in (
        ("alone", ALONE, ["--no-cache"]),
        ("together", TORCHRUN, []),
        ("cached", TORCHRUN, []),
    ):
        output = run(launcher, *command, *flags, "--json", folder / name)
        assert output.count("closed-set accuracy") == 1
        tables.append(json.loads((folder / name).read_text())["methods"])
    assert tables[1] == tables[2]
    for method, sets in tables[0].items():
        for name, metrics in sets.items():  # other batches, which round differently
            assert tables[1][method][name] == pytest.approx(metrics, abs=0.02)


@slow
def test_a_killed_process_ends_the_run_and_resume_goes_on(tmp_path):
    out = tmp_path / "net.pt"
    command = [*TRAIN, "--epochs", 300, "--out", out]
    process = start(TORCHRUN, *command)
    until = time.monotonic() + 300
    while not Path(f"{out}.partial").exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "add --resume to go on" in errors or "start all of them again" in errors
    assert not out.exists()
    saved = torch.load(f"{out}.partial", weights_only=True)
    saved["train_args"]["epochs"] = saved["epoch"] + 1
    torch.save(saved, f"{out}.partial")
    assert len(losses(run(TORCHRUN, *TRAIN, "--out", out, "--resume"))) == 1
    assert out.exists()


@pytest.fixture
def torchrun(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(dist, "init_process_group", lambda: None)
    monkeypatch.setattr("signal.signal", lambda *args: None)


@pytest.mark.parametrize(("rank", "printed"), [(0, ("result\n", "note\n")), (1, ("", ""))])
def test_only_the_first_process_prints(monkeypatch, torchrun, capsys, rank, printed):
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    with joined_processes():
        print("result")
        print("note", file=sys.stderr)
    assert capsys.readouterr() == printed


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (dist.DistBackendError("NCCL communicator was aborted"), ConnectionError),
        (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), ConnectionError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError),
    ],
)
def test_only_what_the_processes_do_together_is_blamed_on_another(torchrun, error, raised):
    with pytest.raises(raised) as caught, joined_processes():
        raise error
    assert caught.type is raised
