"""Killed at any moment: what was saved stays whole, and a run goes on from there."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import same_weights

from models import load_checkpoint

ROOT = Path(__file__).parent.parent
DIE_AT = """
import os, sys
import train_dhr_nn, compute_openmax
name, left = sys.argv[1], int(sys.argv[2])
function = getattr(os, name)
def counted(*args):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), 9)
    return function(*args)
setattr(os, name, counted)
script = sys.modules[sys.argv[3]]
raise SystemExit(script.main(sys.argv[4:]))
"""


def die_at(function, call, script, *flags):
    """Run a script that kills itself at the n-th call of a function of `os`."""
    command = [sys.executable, "-c", DIE_AT, function, call, script, *flags]
    process = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()


@pytest.mark.parametrize(
    ("function", "call", "epoch"),
    [
        ("fsync", 2, 1),  # while the second epoch is written
        pytest.param("replace", 1, 0, marks=pytest.mark.slow),  # before the first is in place
        pytest.param("replace", 3, 2, marks=pytest.mark.slow),  # before the result is in place
    ],
)
def test_a_killed_training_goes_on_to_the_same_weights(
    train, tiny_run, tiny_net, tmp_path, function, call, epoch
):
    out, partial = tmp_path / "net.pt", tmp_path / "net.pt.partial"
    die_at(function, call, "train_dhr_nn", *tiny_run, "--device", "cpu", "--out", out)
    assert not out.exists()
    assert (load_checkpoint(partial)[1]["epoch"] if epoch else partial.exists()) == epoch
    assert train(out, *tiny_run, *(["--resume"] if epoch else [])) == 0
    assert same_weights(out, tiny_net)
    assert not partial.exists()


@pytest.mark.slow
def test_a_killed_evaluation_keeps_finished_sets_and_the_old_results(
    evaluate, digits_net, tmp_path
):
    results = tmp_path / "results.json"
    results.write_text("old")
    flags = ["--checkpoint", digits_net, "--data-dir", tmp_path, "--json", results]
    die_at("replace", 3, "compute_openmax", *flags, "--device", "cpu")
    assert results.read_text() == "old"
    finished = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("*.npz")}
    assert len(finished) == 2
    assert evaluate(digits_net, "--json", results) == 0
    assert results.read_text() != "old"
    assert all(file.stat().st_mtime_ns == before for file, before in finished.items())
