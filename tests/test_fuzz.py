"""Damaged files, random flags and hostile arrays: the right answer, or one clear line.

FUZZ_CASES sets how many cases each test tries.
"""

import io
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import make_model, save
from test_openmax import make_levels

import compute_openmax
import metrics
import openmax
import train_dhr_nn
from compute_openmax import Activations, cached, shipped_activations
from models import load_checkpoint, save_checkpoint
from open_set_data import ImagesUnavailable
from openmax import DISTANCES, DHROpenMax, OpenMax, Weibull

CASES = int(os.environ.get("FUZZ_CASES", "150"))


def damaged(rng, content):
    """The content with a few bits flipped, cut short, or with a piece moved, zeroed or random."""
    data = bytearray(content)
    kind = rng.integers(0, 5)
    if kind == 0:
        for position in rng.integers(0, len(data), rng.integers(1, 9)):
            data[position] ^= 1 << rng.integers(0, 8)
        return bytes(data)
    if kind == 1:
        return bytes(data[: rng.integers(0, len(data))])
    start, source = rng.integers(0, len(data), 2)
    length = int(rng.integers(1, 1 + len(data) // 4))
    piece = (rng.bytes(length), bytes(length), data[source : source + length])[kind - 2]
    data[start : start + len(piece)] = piece
    return bytes(data)


def damaged_at_a_structure(rng, content):
    """The content with bits flipped where a zip file keeps its structure: its last part."""
    data = bytearray(content)
    tail = min(len(data), 4000)
    for position in len(data) - rng.integers(1, tail + 1, rng.integers(1, 5)):
        data[position] ^= 1 << rng.integers(0, 8)
    return bytes(data)


def check_one_line(error, name=""):
    assert str(error).strip(), repr(error)
    assert "\n" not in str(error), repr(error)
    assert name in str(error), repr(error)


@pytest.fixture(scope="module")
def checkpoint_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "net.pt"
    model = make_model(size=16, channels=1)
    save(path, model)
    return path.read_bytes()


@pytest.mark.parametrize("damage", [damaged, damaged_at_a_structure])
def test_damaged_checkpoint_is_the_original_or_one_clear_line(tmp_path, checkpoint_bytes, damage):
    rng, path = np.random.default_rng(0), tmp_path / "net.pt"
    path.write_bytes(checkpoint_bytes)
    original = load_checkpoint(path)[1]["model_state_dict"]
    refused = 0
    for _ in range(CASES):
        path.write_bytes(damage(rng, checkpoint_bytes))
        try:
            model, checkpoint = load_checkpoint(path)
        except (ValueError, OSError) as error:
            check_one_line(error, "net.pt")
            refused += 1
            continue
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, original[name]), f"{name} differs: damage was not noticed"
        assert checkpoint.keys() >= {"known_classes", "train_args"}
    assert refused


def test_damaged_unfinished_run_is_the_original_or_one_clear_line(tmp_path, capsys):
    """Entries of OUT.partial deleted, swapped or replaced: a whole network comes out, or a line."""
    rng, out = np.random.default_rng(0), tmp_path / "net.pt"
    flags = ["--device", "cpu", "--out", str(out)]
    partial, saved = f"{out}.partial", []

    def stop(path, *args, **kwargs):
        save_checkpoint(path, *args, **kwargs)
        saved.append(path.read_bytes())
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_dhr_nn, "save_checkpoint", stop)
        digits = ["--dataset", "digits", "--known-classes", "0,1", "--batch-size", "250"]
        assert train_dhr_nn.main([*digits, "--epochs", "2", *flags]) == 130
    capsys.readouterr()
    went_on = 0
    for _ in range(max(6, CASES // 25)):
        checkpoint = torch.load(io.BytesIO(saved[0]), weights_only=True)
        for _ in range(rng.integers(0, 3)):
            damage_an_entry(rng, checkpoint)
        torch.save(checkpoint, partial)
        status = train_dhr_nn.main(["--resume", *flags])
        error = capsys.readouterr().err.strip().splitlines()
        if status == 0:
            model, _ = load_checkpoint(out)
            assert all(weight.isfinite().all() for weight in model.state_dict().values())
            went_on += 1
            continue
        assert status == 1
        assert error[-1].startswith("train_dhr_nn.py: error: ")
        assert "Traceback" not in "".join(error)
    assert went_on


def damage_an_entry(rng, value):
    """Somewhere inside nested dicts, lists and tensors, delete or replace one entry."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = keys[rng.integers(len(keys))]
        if isinstance(value[key], dict | list) and rng.random() < 0.8:
            value = value[key]
            continue
        if isinstance(value, tuple):
            return
        other = value[keys[rng.integers(len(keys))]]
        strange = [other, {}, [], None, 0, -1, 3, 1e9, float("nan"), "text", True, torch.zeros(2)]
        strange += [torch.zeros(2, 2), torch.tensor(float("inf"))]
        if rng.random() < 0.2 and isinstance(value, dict):
            del value[key]
        else:
            value[key] = strange[rng.integers(len(strange))]
        return


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=max(30, CASES // 10), deadline=None, derandomize=True)
@given(st.dictionaries(st.text(st.characters(exclude_categories=[])), anything))
def test_results_file_is_read_back_as_it_was(tmp_path_factory, results):
    path = tmp_path_factory.getbasetemp() / "results.json"
    compute_openmax.write_json(path, results)
    assert json.loads(path.read_bytes()) == results


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_results_file_holds_no_number_outside_json(tmp_path, number):
    (tmp_path / "results.json").write_text("old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        compute_openmax.write_json(tmp_path / "results.json", {"a": [{"auroc": number}]})
    assert (tmp_path / "results.json").read_text() == "old"


FLAGS = {
    compute_openmax: [
        *("--checkpoint", "--data-dir", "--unknown", "--images", "--latents", "--distance"),
        *("--tail-size", "--alpha", "--json", "--no-cache", "--device", "--batch-size", "--seed"),
        *("--dry-run", "--help"),
    ],
    train_dhr_nn: [
        *("--dataset", "--data-dir", "--known-classes", "--arch", "--epochs", "--batch-size"),
        *("--lr", "--reconstruction-weight", "--seed", "--device", "--out", "--resume"),
        *("--dry-run", "--help"),
    ],
}
VALUES = [
    *("0", "1", "-1", "20", "5.5", "nan", "inf", "-inf", "1e400", "0x10", "9" * 400, "", " ", "-"),
    *("--", "-x", "--nothing", "max", "avg", "none", "vgg", "fast", "euclidean", "cifar10", "cpu"),
    *(
        "cuda:99",
        "a,b",
        "%",
        "%s",
        "%(prog)s",
        "\0",
        "ü",
        "\n",
        "=",
        "@file",
        "folder:",
        "/",
        "--lr=",
    ),
]


@pytest.mark.parametrize("script", FLAGS)
def test_random_flags_parse_or_exit_with_0_or_2(script, capsys):
    rng = np.random.default_rng(0)
    parsed = 0
    for _ in range(CASES):
        argv = rng.choice([*FLAGS[script], *FLAGS[script], *VALUES], rng.integers(0, 7)).tolist()
        if rng.random() < 0.7:  # mostly flags with values
            argv = []
            for flag in rng.choice(FLAGS[script][:-1], rng.integers(0, 4)).tolist():
                alone = flag in ("--no-cache", "--dry-run", "--resume")
                argv += [flag] if alone else [flag, str(rng.choice(VALUES))]
        try:
            args = script.parse_args(argv)
        except SystemExit as stop:
            assert stop.code in (0, 2), argv  # noqa: PT017
            continue
        parsed += 1
        assert args.batch_size >= 1, argv
        if script is train_dhr_nn:
            assert args.epochs >= 1, argv
            assert 0 < args.lr < float("inf"), argv
    assert parsed > CASES // 20
    assert "Traceback" not in capsys.readouterr().err


def small_activations(rng, count=20):
    return Activations(
        rng.integers(0, 3, count),
        rng.normal(size=(count, 3)).astype(np.float32),
        rng.random((count, 96), np.float32),
        rng.random((count, 96), np.float32),
    )


def same(a, b):
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("damage", [damaged, damaged_at_a_structure])
def test_damaged_cache_is_the_original_or_made_anew(tmp_path, capsys, damage):
    rng, path = np.random.default_rng(0), tmp_path / "cache.npz"
    original = small_activations(rng)
    widths = (3, 96, 96)
    cached(path, original.labels, widths, lambda: original)
    content = path.read_bytes()
    remade = []

    def make():
        remade.append(1)
        return original

    for _ in range(CASES):
        path.write_bytes(damage(rng, content))
        assert same(cached(path, original.labels, widths, make), original)
    assert remade
    assert capsys.readouterr().err.count("; made anew") == len(remade)


def write_shipped(path, rng):
    fields = {"checkpoint": np.array("abc")}
    for name in ("latents_max", "latents_avg"):
        fields[f"range/{name}"] = np.array([0, 5], np.float32)
    for name in ("train", "val"):
        fields[f"{name}/labels"] = rng.integers(0, 3, 20).astype(np.int8)
        fields[f"{name}/logits"] = rng.normal(size=(20, 3)).astype(np.float16)
        for field in ("latents_max", "latents_avg"):
            fields[f"{name}/{field}"] = rng.integers(0, 256, (20, 96)).astype(np.uint8)
    np.savez_compressed(path, **fields)


@pytest.mark.parametrize("damage", [damaged, damaged_at_a_structure])
def test_damaged_shipped_activations_are_the_original_or_one_clear_line(
    tmp_path, monkeypatch, damage
):
    rng, path = np.random.default_rng(0), tmp_path / "shipped.npz"
    write_shipped(path, rng)
    monkeypatch.setattr(compute_openmax, "SHIPPED_ACTIVATIONS", path)
    original, content = shipped_activations("abc", ["train", "val"]), path.read_bytes()
    for _ in range(CASES):
        path.write_bytes(damage(rng, content))
        try:
            got = shipped_activations("abc", ["train", "val"])
        except (ImagesUnavailable, ValueError, OSError) as error:
            check_one_line(error)
            continue
        assert all(same(got[name], original[name]) for name in original)


def strange_array(rng, shape):
    """Numbers, mostly of this shape, in any type and layout, or what is no array of numbers."""
    if rng.random() < 0.3:
        shape = tuple(int(n) for n in rng.integers(0, 4, rng.integers(0, 4)))
    values = rng.normal(size=shape) * 10.0 ** rng.choice([-300, -20, -8, 0, 0, 0, 0, 8, 50, 120])
    if rng.random() < 0.2 and values.size:
        values.flat[rng.integers(values.size)] = rng.choice([np.nan, np.inf, -np.inf, 1e308, 0])
    kind = rng.integers(0, 16)
    with np.errstate(all="ignore"):
        if kind < 9:
            converted = {
                1: values.astype(np.float32), 2: values.astype(np.float16), 3: values > 0,
                4: np.clip(np.nan_to_num(values), -2, 9).astype(np.int64), 5: values.tolist(),
                6: np.clip(np.nan_to_num(values), 0, 9).astype(np.uint8), 7: np.zeros(shape),
                8: np.asfortranarray(values)[::-1] if values.ndim else values,
            }  # fmt: skip
            return converted.get(int(kind), values)
    return {
        9: values.astype(object), 10: values.astype(str), 11: values + 1j, 12: None,
        13: [[1.0, 2.0], [3.0]], 14: "text", 15: np.zeros(shape, "datetime64[s]"),
    }[int(kind)]  # fmt: skip


def strange_number(rng):
    return rng.choice(np.array([*range(-2, 8), 20, 2.5, np.nan, np.inf, 1e9, "a", None], object))


def fit_openmax(rng):
    x, y = make_levels(int(rng.integers(99)))
    tail_size, alpha, distance = 20, 0, str(rng.choice(DISTANCES))
    target = rng.integers(0, 6)
    if target == 0:
        x = strange_array(rng, x.shape)
    elif target == 1:
        y = strange_array(rng, y.shape)
    elif target == 2:
        tail_size = strange_number(rng)
    elif target == 3:
        alpha = strange_number(rng)
    elif target == 4:
        distance = strange_number(rng)
    images = strange_array(rng, np.shape(make_levels(1)[0])) if target == 5 else make_levels(1)[0]
    probabilities = OpenMax(tail_size, alpha, distance).fit(x, y).predict_proba(images)
    assert_probabilities(probabilities)


def fit_dhr_openmax(rng):
    (x, y), (held_out, _), (images, _) = map(make_levels, rng.integers(0, 99, 3))
    options = {}
    target = rng.integers(0, 5)
    if target == 0:
        x = strange_array(rng, x.shape)
    elif target == 1:
        y = strange_array(rng, y.shape)
    elif target == 2:
        held_out = strange_array(rng, held_out.shape)
    elif target == 3:
        images = strange_array(rng, images.shape)
    else:
        options[str(rng.choice(["levels", "tail_size", "accepted_share"]))] = strange_number(rng)
    model = DHROpenMax(**options).fit(x, y, held_out)
    assert_probabilities(model.predict_proba(images))
    assert np.isfinite(model.decision_function(images)).all()


def assert_probabilities(rows):
    assert rows.dtype == np.float64
    assert (rows >= 0).all()
    assert rows.sum(axis=1) == pytest.approx(1, abs=1e-9)


def call_recalibrate(rng):
    logits, w = strange_array(rng, (7, 4)), rng.random((7, 4))
    if rng.random() < 0.5:
        logits, w = w, strange_array(rng, (7, 4))
    assert_probabilities(openmax.recalibrate(logits, w, strange_number(rng)))


def call_fit_tail(rng):
    tails, tail_size = [rng.gamma(2, 1, 30), strange_array(rng, (30,))], 20
    if rng.random() < 0.3:
        tails, tail_size = tails[:1], strange_number(rng)
    weibull = openmax.fit_weibulls(tails, tail_size)
    assert np.isfinite(weibull).all()
    assert np.isfinite(weibull.hazard(np.float64(1e300))).all()
    assert isinstance(weibull, Weibull)


def call_metrics(rng):
    known, unknown = strange_array(rng, (9,)), np.arange(9.0)
    if rng.random() < 0.5:
        known, unknown = unknown, known
    metric = [
        metrics.auroc, metrics.aupr_known, metrics.aupr_unknown, metrics.fpr_at_95_tpr,
        metrics.detection_error,
        lambda a, b: metrics.oscr(a, np.arange(9) > 2, b),
        lambda a, b: metrics.oscr(np.arange(9.0), a, b),
        lambda a, b: metrics.oscr(np.arange(9.0), a, b),
        lambda a, b: metrics.macro_f1(a, b, strange_number(rng)),
        lambda a, b: metrics.macro_f1(np.arange(9) % 3, a, 10),
        lambda a, b: metrics.macro_f1_at_half(a, rng.random((9, 4))),
        lambda a, b: metrics.macro_f1_at_half(np.arange(9) % 3, strange_array(rng, (9, 4))),
    ][rng.integers(12)]  # fmt: skip
    assert 0 <= metric(known, unknown) <= 1


def call_open_set_metrics(rng):
    def scores(count):
        probabilities = rng.dirichlet(np.ones(5), count)
        return metrics.Scores(probabilities[:, -1], probabilities)

    known, labels, unknown, threshold = scores(9), np.arange(9) % 4, scores(6), 0.5
    target = rng.integers(0, 5)
    if target == 0:
        known = known._replace(unknownness=strange_array(rng, (9,)))
    elif target == 1:
        unknown = unknown._replace(probabilities=strange_array(rng, (6, 5)))
    elif target == 2:
        labels = strange_array(rng, (9,))
    elif target == 3:
        threshold = strange_number(rng)
    elif target == 4:
        metrics.threshold_accepting(known.unknownness, strange_number(rng))
    result = metrics.open_set_metrics(known, labels, unknown, threshold)
    assert all(0 <= value <= 1 for value in result.values())


@pytest.mark.parametrize(
    "call",
    [
        fit_openmax, fit_dhr_openmax, call_recalibrate, call_fit_tail, call_metrics,
        call_open_set_metrics,
    ],
)  # fmt: skip
def test_strange_arrays_give_the_right_answer_or_one_clear_line(call):
    answered = 0
    for seed in range(CASES):
        try:
            call(np.random.default_rng(seed))
            answered += 1
        except (ValueError, TypeError) as error:
            check_one_line(error)
    assert answered > CASES // 50
