"""Killed, interrupted or out of disk: what was saved stays whole, and a run goes on from there."""

import copy
import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import compute_openmax
import models
import train_dhr_nn
from compute_openmax import Activations, cache_key, cached
from models import load_checkpoint, replace_file, try_writing
from open_set_data import ImageSet

ROOT = Path(__file__).parent.parent
TRAIN = ["--dataset", "digits", "--known-classes", "0,1,2", "--batch-size", "195"]
EPOCHS = 5  # of one step each
KILLS = 20


def train_flags(out, *flags):
    return [*TRAIN, "--epochs", str(EPOCHS), "--device", "cpu", "--out", str(out), *flags]


def heed_ctrl_c():
    """What a shell starts in the background ignores SIGINT, and so do its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


CTRL_C = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "preexec_fn": heed_ctrl_c}


def child(script, argv, log, file_limit=resource.RLIM_INFINITY, die_at=("", 0), by=signal.SIGKILL):
    """Run a script's main in a process of its own: one thread, stderr to `log`, and where asked a
    limit on the size of files, or a signal to itself at the n-th call of a function of `os`."""
    with open(log, "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    heed_ctrl_c()
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    name, calls = die_at
    function = getattr(os, name, None)

    def counted(*args):
        nonlocal calls
        calls -= 1
        if not calls:
            os.kill(os.getpid(), by)
        return function(*args)

    if function:
        setattr(os, name, counted)
    raise SystemExit(sys.modules[script].main(argv))


@pytest.fixture(scope="module")
def start():
    """Start `child` processes that need not import torch or matplotlib again."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        context.set_forkserver_preload(["test_nothing_lost", "report"])

        def start_child(script, argv, log=os.devnull, **kwargs):
            process = context.Process(target=child, args=(script, argv, log), kwargs=kwargs)
            process.start()
            return process

        yield start_child


def finish(process):
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A network trained without interruption, and the seconds that took."""
    path = tmp_path_factory.mktemp("whole") / "net.pt"
    assert finish(start("train_dhr_nn", train_flags(path, "--dry-run"))) == 0  # imports torch
    began = time.perf_counter()
    assert finish(start("train_dhr_nn", train_flags(path))) == 0
    return path, time.perf_counter() - began


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def same_weights(first, second):
    a, b = (load_checkpoint(path)[0].state_dict() for path in (first, second))
    return all(torch.equal(a[name], b[name]) for name in a)


def epoch_of(path):
    return load_checkpoint(path)[1]["epoch"]


# Training


def test_twenty_kills_lose_nothing(start, whole, tmp_path):
    """Kill and resume, again and again: always a whole checkpoint, in the end the same weights."""
    reference, seconds = whole
    rng = random.Random(0)
    out, partial = tmp_path / "net.pt", tmp_path / "net.pt.partial"
    kills, epoch = 0, 0
    while kills < KILLS:
        process = start(
            "train_dhr_nn", train_flags(out, *(["--resume"] if partial.exists() else []))
        )
        process.join(rng.uniform(0, 2 * seconds / EPOCHS))
        process.kill()
        status = finish(process)
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        if partial.exists():
            assert epoch <= epoch_of(partial) <= EPOCHS
            epoch = epoch_of(partial)
        if out.exists():
            assert same_weights(out, reference)
            if not partial.exists():
                out.unlink()
                epoch = 0
    assert finish(start("train_dhr_nn", train_flags(out, *["--resume"] * partial.exists()))) == 0
    assert same_weights(out, reference)
    assert not partial.exists()


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_killed_while_saving_leaves_the_old_checkpoint(start, whole, tmp_path, function):
    out, partial = tmp_path / "net.pt", tmp_path / "net.pt.partial"
    process = start("train_dhr_nn", train_flags(out), die_at=(function, 2))
    assert finish(process) == -signal.SIGKILL
    assert epoch_of(partial) == 1
    (leftover,) = tmp_path.glob("*.tmp")
    os.utime(leftover, (0, 0))
    assert finish(start("train_dhr_nn", train_flags(out, "--resume"))) == 0
    assert same_weights(out, whole[0])
    assert names(tmp_path) == ["net.png", "net.pt"]


def test_killed_between_the_result_and_the_end_resumes(start, whole, tmp_path):
    out = tmp_path / "net.pt"
    process = start("train_dhr_nn", train_flags(out), die_at=("replace", EPOCHS + 1))
    assert finish(process) == -signal.SIGKILL
    assert not out.exists()
    assert epoch_of(tmp_path / "net.pt.partial") == EPOCHS
    assert finish(start("train_dhr_nn", train_flags(out, "--resume"))) == 0
    assert same_weights(out, whole[0])


def test_temporary_file_of_a_killed_run_is_no_checkpoint(whole, tmp_path, capsys):
    (tmp_path / "net.pt.partial.0badcafe.tmp").write_bytes(whole[0].read_bytes())
    assert train_dhr_nn.main(train_flags(tmp_path / "net.pt", "--resume")) == 1
    assert "nothing to resume" in capsys.readouterr().err


def test_finished_network_in_place_of_an_unfinished_run_is_refused(whole, tmp_path, capsys):
    (tmp_path / "net.pt.partial").write_bytes(whole[0].read_bytes())
    assert train_dhr_nn.main(train_flags(tmp_path / "net.pt", "--resume")) == 1
    assert "is a finished network" in capsys.readouterr().err


@pytest.fixture(scope="module")
def unfinished(start, tmp_path_factory):
    """What a run killed after its first epoch left, on the CPU."""
    out = tmp_path_factory.mktemp("unfinished") / "net.pt"
    process = start("train_dhr_nn", train_flags(out), die_at=("replace", 2))
    assert finish(process) == -signal.SIGKILL
    return torch.load(f"{out}.partial", weights_only=True)


def first_state(partial, optimizer=1):
    return partial["optimizer_states"][optimizer]["state"][0]


def set_entry(where, key, value):
    def change(partial):
        where(partial)[key] = value

    return change


HOSTILE_RUNS = {
    "shape": set_entry(first_state, "exp_avg", torch.zeros(2, 2)),
    "type": set_entry(first_state, "exp_avg_sq", "text"),
    "dtype": set_entry(first_state, "step", torch.ones((), dtype=torch.int64)),
    "foreign key": set_entry(first_state, "extra", torch.zeros(1)),
    "missing key": lambda partial: first_state(partial, 0).clear(),
    "missing weight": lambda partial: partial["optimizer_states"][0]["state"].popitem(),
    "one optimiser": lambda partial: partial["optimizer_states"].pop(),
    "no list": lambda partial: partial.update(optimizer_states={"state": 3}),
    "of tensors": lambda partial: partial.update(optimizer_states=torch.zeros(2)),
    "epoch 0": lambda partial: partial.update(epoch=0),
    "epoch beyond the last": lambda partial: partial.update(epoch=EPOCHS + 1),
    "epoch in words": lambda partial: partial.update(epoch="one"),
    "no settings": lambda partial: partial.update(train_args={}),
    "settings of other types": set_entry(lambda p: p["train_args"], "batch_size", "195"),
    "settings out of range": set_entry(lambda p: p["train_args"], "lr", float("nan")),
    "other data": set_entry(lambda p: p["train_args"], "known_classes", "0,1,2,3"),
    "other classes": lambda partial: partial.update(known_classes=["0", "1", "9"]),
    "larger images": set_entry(lambda p: p["model_config"], "image_size", 64),
}


@pytest.mark.parametrize("kind", HOSTILE_RUNS)
def test_unfinished_run_that_does_not_fit_is_one_line(unfinished, tmp_path, capsys, kind):
    out, partial = tmp_path / "net.pt", tmp_path / "net.pt.partial"
    hostile = copy.deepcopy(unfinished)
    HOSTILE_RUNS[kind](hostile)
    torch.save(hostile, partial)
    before = partial.read_bytes()
    assert train_dhr_nn.main(train_flags(out, "--resume")) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert partial.read_bytes() == before
    assert names(tmp_path) == ["net.pt.partial"]


def test_only_old_leftovers_of_the_same_file_are_removed(tmp_path):
    for name in ("a.txt.1.tmp", "b.txt.1.tmp", "a.tmp"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / "a.txt.2.tmp").touch()  # another process may be writing it
    replace_file(tmp_path / "a.txt", lambda file: file.write(b"new"))
    assert names(tmp_path) == ["a.tmp", "a.txt", "a.txt.2.tmp", "b.txt.1.tmp"]


def test_ctrl_c_says_where_it_saved_and_how_to_go_on(tmp_path):
    out, partial = tmp_path / "net.pt", tmp_path / "net.pt.partial"
    command = [sys.executable, ROOT / "train_dhr_nn.py", *train_flags(out, "--epochs", "500")]
    with subprocess.Popen(command, **CTRL_C) as process:
        while not partial.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        error = process.communicate()[1].decode().splitlines()
    assert process.returncode == 130
    assert error[-1] == f"stopped; add --resume to go on ({partial})"
    assert not any("Traceback" in line for line in error)
    assert epoch_of(partial) >= 1
    assert names(tmp_path) == ["net.pt.partial"]


class Step:
    """A training_step that lets something happen at its n-th call."""

    def __init__(self, call, happen):
        self.left, self.happen, self.step = call, happen, train_dhr_nn.training_step

    def __call__(self, model, *args):
        losses = self.step(model, *args)
        self.left -= 1
        return losses if self.left else self.happen(model, losses)


def break_weights(model, losses):
    model.bottlenecks[0].bias.data[0] = float("inf")
    return losses


@pytest.mark.parametrize("bad", [float("nan"), break_weights])
def test_loss_or_weights_not_finite_keep_the_last_good_checkpoint(
    tmp_path, monkeypatch, capsys, bad
):
    out, partial = tmp_path / "net.pt", tmp_path / "net.pt.partial"
    happen = bad if callable(bad) else lambda model, losses: losses * bad
    with monkeypatch.context() as patch:
        patch.setattr(train_dhr_nn, "training_step", Step(2, happen))
        assert train_dhr_nn.main(train_flags(out, "--epochs", "2")) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not finite at step 1 of epoch 2" in error or callable(bad)
    assert f"{partial} holds epoch 1" in error
    model, _ = load_checkpoint(partial)
    assert all(weight.isfinite().all() for weight in model.state_dict().values())
    assert train_dhr_nn.main(train_flags(out, "--resume")) == 0
    assert names(tmp_path) == ["net.png", "net.pt"]


# Outputs


@pytest.mark.parametrize("place", ["/proc/x", "file/x", "folder", "absent/x", "n" * 250, "."])
def test_place_that_cannot_be_written_is_refused_at_start(tmp_path, monkeypatch, capsys, place):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder").mkdir()
    began = time.perf_counter()
    assert train_dhr_nn.main(train_flags(place)) == 1
    assert compute_openmax.main(["--json", place]) == 1
    assert time.perf_counter() - began < 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all("cannot write there (" in error for error in errors)
    assert names(tmp_path) == ["file", "folder"]


def test_disk_without_room_for_a_checkpoint_is_refused_at_start(start, tmp_path):
    log = tmp_path / "log"
    process = start("train_dhr_nn", train_flags(tmp_path / "net.pt"), log, file_limit=2**22)
    assert finish(process) == 1
    assert log.read_text().count("\n") == 1
    assert "cannot write there (File too large)" in log.read_text()
    assert names(tmp_path) == ["log"]


def no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_disk_full_during_training_keeps_the_last_epoch(tmp_path, monkeypatch, capsys, function):
    partial = tmp_path / "net.pt.partial"
    real, calls = getattr(os, function), []

    def full_at_the_second_call(*args):
        calls.append(args)
        return real(*args) if len(calls) == 1 else no_space()

    with monkeypatch.context() as patch:
        patch.setattr(models.os, function, full_at_the_second_call)
        assert train_dhr_nn.main(train_flags(tmp_path / "net.pt", "--epochs", "2")) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("train_dhr_nn.py: error: [Errno 28] No space left on device")
    assert names(tmp_path) == ["net.pt.partial"]
    assert epoch_of(partial) == 1


def test_write_cut_off_by_the_system_is_an_os_error(whole, tmp_path):
    """torch.save itself would raise a RuntimeError about its format."""
    path = tmp_path / "net.pt"
    path.write_text("old")
    model, _ = load_checkpoint(whole[0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            models.save_checkpoint(path, model)
        with pytest.raises(ValueError, match=r"cannot write there \(File too large\)"):
            try_writing(path, 2**21)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["net.pt"]


# Cache

LABELS, WIDTHS = np.arange(5) % 2, (2, 3, 3)


def make_activations(**changed):
    rng = np.random.default_rng(0)
    arrays = [rng.random((5, width), dtype=np.float32) for width in WIDTHS]
    return Activations(LABELS, *arrays)._replace(**changed)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


CHANGES = {
    "other labels": {"labels": 1 - LABELS},
    "fewer images": {"labels": LABELS[:4], "logits": zeros(4, 2)},
    "rows": {"logits": zeros(4, 2)},
    "columns": {"logits": zeros(5, 3)},
    "dimensions": {"logits": zeros(10)},
    "float64": {"logits": zeros(5, 2, dtype=np.float64)},
    "text": {"logits": np.full((5, 2), "a")},
    "nan": {"latents_max": np.full((5, 3), np.nan, np.float32)},
    "infinite": {"latents_avg": np.full((5, 3), np.inf, np.float32)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_cache_of_other_arrays_is_made_anew(tmp_path, capsys, change):
    path = tmp_path / "cache" / "key.npz"
    cached(path, LABELS, WIDTHS, lambda: make_activations(**CHANGES[change]))
    for line in ("is damaged", ""):
        found = cached(path, LABELS, WIDTHS, make_activations)
        assert all(map(np.array_equal, found, make_activations()))
        assert line in capsys.readouterr().err
    assert cached(path, LABELS, WIDTHS, None).logits.dtype == np.float32  # None: not made again


def test_cache_cut_short_anywhere_is_made_anew(tmp_path, capsys):
    path = tmp_path / "key.npz"
    cached(path, LABELS, WIDTHS, make_activations)
    content = path.read_bytes()
    cuts = range(0, len(content), 29)
    for cut in cuts:
        path.write_bytes(content[:cut])
        found = cached(path, LABELS, WIDTHS, make_activations)
        assert all(map(np.array_equal, found, make_activations()))
    errors = capsys.readouterr().err
    assert errors.count("is damaged") == errors.count("\n") == len(cuts)


def test_cache_with_a_flipped_byte_is_made_anew_or_means_the_same(tmp_path, capsys):
    path = tmp_path / "key.npz"
    cached(path, LABELS, WIDTHS, make_activations)
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        changed = bytearray(content)
        changed[position] ^= 0xFF
        path.write_bytes(changed)
        found = cached(path, LABELS, WIDTHS, make_activations)
        assert all(map(np.array_equal, found, make_activations()))
    assert "Traceback" not in capsys.readouterr().err


def test_cache_key_follows_network_pixels_labels_arithmetic_and_code(tmp_path, monkeypatch):
    images = ImageSet(np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 1]))
    others = [
        ImageSet(images.images + 1, images.labels),
        ImageSet(images.images.reshape(2, 2, 8, 1), images.labels),
        ImageSet(images.images, images.labels[::-1]),
    ]
    keys = {cache_key("a", images, "cpu"), cache_key("b", images, "cpu")}
    keys |= {cache_key("a", images, "cuda"), *(cache_key("a", other, "cpu") for other in others)}
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"another version of models.py")
    keys.add(cache_key("a", images, "cpu"))
    assert len(keys) == 7


def test_cache_that_cannot_be_stored_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "cache").touch()  # a file where the folder should be
    found = cached(tmp_path / "cache" / "key.npz", LABELS, WIDTHS, make_activations)
    assert len(found.labels) == 5
    monkeypatch.setattr(models.os, "fsync", no_space)
    cached(tmp_path / "key.npz", LABELS, WIDTHS, make_activations)
    assert capsys.readouterr().err.count("could not be stored") == 2
    assert names(tmp_path) == ["cache"]


def test_two_evaluations_at_once_do_not_spoil_each_other(start, whole, tmp_path):
    def evaluate(name, **kwargs):
        flags = ["--tail-size", "5", "--json", str(tmp_path / f"{name}.json")]
        argv = ["--checkpoint", str(whole[0]), "--data-dir", str(tmp_path), "--device", "cpu"]
        return start("compute_openmax", argv + flags, tmp_path / f"{name}.log", **kwargs)

    assert finish(evaluate("killed", die_at=("replace", 2))) == -signal.SIGKILL
    both = [evaluate("first"), evaluate("second")]
    assert [finish(process) for process in both] == [0, 0]
    assert finish(evaluate("third")) == 0  # from the cache
    results = [
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "second", "third")
    ]
    assert results[0]["methods"] == results[1]["methods"] == results[2]["methods"]
    assert "damaged" not in "".join(log.read_text() for log in tmp_path.glob("*.log"))
    assert len(list(tmp_path.glob("cache/*.npz"))) == 4


SETS = 4  # of an evaluation on digits, each with a file in the cache


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize(
    ("function", "call"), [("replace", 1), ("fsync", 2), ("fsync", SETS + 1), ("replace", SETS + 1)]
)  # the last one writes the results
def test_evaluation_stopped_while_writing_keeps_what_was_finished(
    start, whole, tmp_path, function, call, by
):
    path, cache = tmp_path / "results.json", tmp_path / "cache"
    path.write_text("old")
    argv = ["--checkpoint", str(whole[0]), "--data-dir", str(tmp_path), "--device", "cpu"]
    argv += ["--tail-size", "5", "--json", str(path)]
    log = tmp_path / "log"
    process = start("compute_openmax", argv, log, die_at=(function, call), by=by)
    assert finish(process) == (130 if by == signal.SIGINT else -signal.SIGKILL)
    assert path.read_text() == "old"
    finished = {file: file.stat().st_mtime_ns for file in cache.glob("*.npz")}
    assert len(finished) == call - 1
    if by == signal.SIGINT:
        last = f"stopped; finished image sets are in {cache}"
        assert log.read_text().splitlines()[-1] == last
        assert "Traceback" not in log.read_text()
        assert not list(tmp_path.rglob("*.tmp"))
    assert finish(start("compute_openmax", argv, log)) == 0
    assert "damaged" not in log.read_text()
    assert all(file.stat().st_mtime_ns == time for file, time in finished.items())
    assert len(list(cache.glob("*.npz"))) == SETS
    argv += ["--no-cache", "--json", str(tmp_path / "anew.json")]
    if call == 1:
        assert finish(start("compute_openmax", argv, log)) == 0
        first, anew = (json.loads((tmp_path / f).read_text()) for f in (path, "anew.json"))
        assert first["methods"] == anew["methods"]


def test_ctrl_c_ends_an_evaluation_and_finished_sets_are_not_extracted_again(whole, tmp_path):
    cache = tmp_path / "cache"
    command = [sys.executable, ROOT / "compute_openmax.py", "--checkpoint", whole[0], "--device"]
    command += ["cpu", "--data-dir", tmp_path, "--tail-size", "5"]
    long = ["--unknown", "uniform-noise", "held-out-classes"]  # 10,000 images
    with subprocess.Popen([*command, *long], **CTRL_C) as process:
        while not list(cache.glob("*.npz")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        error = process.communicate()[1].decode().splitlines()
    assert process.returncode == 130
    assert f"stopped; finished image sets are in {cache}" in error
    assert not any("Traceback" in line for line in error)
    finished = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert 1 <= len(finished) < SETS
    argv = [str(part) for part in command[2:]]
    assert compute_openmax.main(argv) == 0
    assert all(file.stat().st_mtime_ns == time for file, time in finished.items())
