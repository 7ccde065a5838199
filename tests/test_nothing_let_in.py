"""Files from elsewhere: hostile, damaged or odd ones are refused, or named and left out."""

import gzip
import hashlib
import http.client
import io
import os
import pickle
import shutil
import tarfile
import threading
import time
import warnings
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from test_nothing_lost import LABELS, WIDTHS, make_activations, zeros
from test_open_set_data import picture, picture_bytes

import compute_openmax
import open_set_data
from compute_openmax import cached
from models import RUN_KEYS, DHRNet, load_checkpoint, save_checkpoint
from open_set_data import ImagesUnavailable, image_files, load_known, load_unknown, read_images

# Checkpoints and caches


class Bomb:
    def __reduce__(self):
        return os.system, ("touch bomb_went_off",)


def assert_refused(path, reason):
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"is not a whole DHR checkpoint") as caught:
        load_checkpoint(path)
    assert time.perf_counter() - began < 1
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def save_net(path, **config):
    """A checkpoint that claims another configuration than its weights have."""
    model = DHRNet(3, 1)
    model.config |= config
    save_checkpoint(path, model, **{key: kind() for key, kind in RUN_KEYS.items()})


def rewrite(path, change, compression=zipfile.ZIP_STORED):
    """Replace each member of a zip archive by what change(name, content) makes of it."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))


def test_code_in_a_zip_checkpoint_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in ("model_state_dict", "extra"):
        save_net(tmp_path / "net.pt")
        checkpoint = torch.load("net.pt", weights_only=True)
        torch.save({**checkpoint, key: Bomb()}, "net.pt")
        assert_refused(tmp_path / "net.pt", "more than tensors and plain values")
    assert not (tmp_path / "bomb_went_off").exists()


@pytest.mark.parametrize(
    "config",
    [
        *({"image_size": 10**9}, {"num_classes": 10**9}, {"num_classes": 10**30}),
        *({"num_classes": 10**9, "arch": "vgg"}, {"image_size": 1024, "arch": "vgg"}),
        *({"num_classes": 2.5}, {"num_classes": -1}, {"image_size": "32"}, {"layers": 9}),
        *({"mirrored": torch.zeros(2)}, {"mirrored": 3}, {"in_channels": 2}, {"arch": ["fast"]}),
    ],
)
def test_checkpoint_of_an_impossible_network_is_refused_at_once(tmp_path, config):
    save_net(tmp_path / "net.pt", **config)
    assert_refused(tmp_path / "net.pt", "(")


def test_checkpoint_that_claims_terabytes_is_refused_at_once(tmp_path):
    path = tmp_path / "net.pt"
    torch.save({"model_state_dict": torch.zeros(77)}, path)
    huge = b"\x8a\x06" + (10**13).to_bytes(6, "little")  # the pickle of 77 is K M
    rewrite(path, lambda name, content: content.replace(b"KM", huge))
    assert path.stat().st_size < 2000
    assert_refused(path, "record size")


def test_checkpoint_with_less_than_it_claims_is_refused(tmp_path):
    path = tmp_path / "net.pt"
    save_net(path)
    rewrite(path, lambda name, content: content[:64] if len(content) > 10**5 else content)
    assert_refused(path, "record size")


def test_checkpoint_with_a_tensor_marked_as_a_folder_is_refused(tmp_path):
    """PyTorch reads nothing of it: its weights would be whatever is in memory."""
    path = tmp_path / "net.pt"
    save_net(path)
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = 0x10 * name.endswith("data/5")
            archive.writestr(member, content)
    assert_refused(path, "holds a folder")


def test_compressed_bombs_are_refused(tmp_path, capsys):
    path = tmp_path / "net.pt"
    torch.save({"model_state_dict": torch.zeros(10**7)}, path)
    rewrite(path, lambda name, content: content, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**5
    assert_refused(path, "claims to hold 40,0")

    cache = tmp_path / "key.npz"
    np.savez_compressed(cache, **make_activations(logits=zeros(10**7, 2))._asdict())
    assert cached(cache, LABELS, WIDTHS, make_activations).logits.shape == (5, 2)
    assert "claims to hold 80,0" in capsys.readouterr().err


def npy_header(shape):
    stream = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


def test_cache_that_claims_terabytes_is_made_anew_at_once(tmp_path, capsys):
    path = tmp_path / "key.npz"
    for shape in ((10**13,), (10**9, 10**9), (10**6, 10**6), (10**30,), (-1, 5)):
        np.savez(path, **make_activations()._asdict())
        claim = npy_header(shape)
        rewrite(path, lambda name, old, claim=claim: claim if name == "logits.npy" else old)
        assert path.stat().st_size < 2000
        began = time.perf_counter()
        assert cached(path, LABELS, WIDTHS, make_activations).logits.shape == (5, 2)
        assert time.perf_counter() - began < 1
    errors = capsys.readouterr().err
    assert errors.count("is damaged") == errors.count("\n") == 5


@pytest.mark.parametrize("kind", ["object array", "pickle", "npy", "page", "no arrays", "fewer"])
def test_cache_of_foreign_content_is_made_anew_and_no_code_runs(
    tmp_path, monkeypatch, capsys, kind
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "key.npz"
    arrays = make_activations()._asdict()
    if kind == "object array":
        np.savez(path, **{**arrays, "latents_avg": np.array([Bomb()], dtype=object)})
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif kind == "npy":
        with open(path, "wb") as file:
            np.save(file, arrays["logits"])
    elif kind == "page":
        path.write_text("<!DOCTYPE html>")
    elif kind == "no arrays":
        with zipfile.ZipFile(path, "w") as archive:
            for name in arrays:
                archive.writestr(name, "text")
    else:
        np.savez(path, labels=arrays["labels"])
    assert cached(path, LABELS, WIDTHS, make_activations).logits.shape == (5, 2)
    assert "is damaged" in capsys.readouterr().err
    assert cached(path, LABELS, WIDTHS, None).logits.shape == (5, 2)
    assert not (tmp_path / "bomb_went_off").exists()


@pytest.mark.parametrize("kind", ["cut", "page", "object array", "bomb"])
def test_damaged_shipped_activations_are_one_line(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "shipped.npz"
    monkeypatch.setattr(compute_openmax, "SHIPPED_ACTIVATIONS", path)
    hidden = np.array([Bomb()], dtype=object) if kind == "object array" else np.array("a")
    padding = zeros(10**7) if kind == "bomb" else zeros(1)
    np.savez_compressed(path, checkpoint=hidden, padding=padding)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif kind == "page":
        path.write_text("<!DOCTYPE html>")
    with pytest.raises(ImagesUnavailable, match="is damaged") as caught:
        compute_openmax.shipped_activations("a", ["train"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bomb_went_off").exists()


# Downloads and archives

SILENCE = b"..."


@pytest.fixture
def served():
    """Address of a local server, and what it serves: path -> (content, claimed length); where more
    is claimed than there is, it hangs up, or falls silent for content that ends in SILENCE."""
    files, over = {}, threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path not in files:
                return self.send_error(404)
            content, length = files[self.path]
            if content != SILENCE:
                self.send_response(200)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if self.headers.get("Method") == "HEAD":  # torchvision's search for redirections
                    return None
                self.wfile.write(content)
            if content.endswith(SILENCE):
                over.wait(20)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", files
        over.set()
        server.shutdown()


def tiny_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(3):
            name = f"tiny-imagenet-200/test/images/test_{i}.JPEG"
            archive.writestr(name, picture_bytes(i, kind="JPEG"))
    return path.read_bytes()


def wrong_answers(content):
    """What a server may send in place of `content`: kind -> (bytes, claimed length)."""
    return {
        "page": (b"<!DOCTYPE html>", 15),
        "cut": (content[: len(content) // 2], len(content)),
        "wrong": (content[:-1] + bytes([content[-1] ^ 1]), len(content)),
        "stalled": (SILENCE, 0),
        "stalled halfway": (content[: len(content) // 2] + SILENCE, len(content)),
    }


WRONG_KINDS = ["absent", *wrong_answers(b"x")]
late_sockets = pytest.mark.filterwarnings(  # an HTTPError keeps one until it is collected
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


def assert_refused_and_nothing_kept(load, data, whole=()):
    """Refused in one line at once and keeps whole files only, the second time as the first."""
    for _ in range(2):
        began = time.perf_counter()
        with pytest.raises(ImagesUnavailable, match="put the files there") as caught:
            load()
        assert time.perf_counter() - began < 3
        assert "\n" not in str(caught.value)
        assert [path.name for path in data.iterdir()] == list(whole)


@late_sockets
@pytest.mark.parametrize("kind", WRONG_KINDS)
def test_only_the_right_and_whole_download_counts(served, tmp_path, monkeypatch, kind):
    url, files = served
    content = tiny_zip(tmp_path / "source.zip")
    data = tmp_path / "data"
    data.mkdir()
    monkeypatch.setattr(open_set_data, "TINY_IMAGENET", f"{url}/tiny.zip")
    monkeypatch.setattr(open_set_data, "TINY_IMAGENET_MD5", hashlib.md5(content).hexdigest())
    monkeypatch.setattr(open_set_data, "PATIENCE", 0.3)

    def load():
        return load_unknown("tiny-imagenet-crop", data, 32)

    if kind != "absent":
        files["/tiny.zip"] = wrong_answers(content)[kind]
    assert_refused_and_nothing_kept(load, data)
    files["/tiny.zip"] = content, len(content)
    assert load().shape == (3, 32, 32, 3)
    assert [file.name for file in data.iterdir()] == ["tiny-imagenet-200.zip"]


def tar_of(members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in members.items():
            archive.addfile(member(name, content=content)[0], io.BytesIO(content))
    return stream.getvalue()


def small_edition(name, url, monkeypatch):
    """Let torchvision expect a small edition of a data set at `url`: its files, name -> content."""
    dataset = getattr(open_set_data.datasets, open_set_data.TORCHVISION[name][0])
    rng = np.random.default_rng(0)

    def md5(content):
        return hashlib.md5(content).hexdigest()

    if name.startswith("cifar"):
        key, parts = (
            dataset.meta["key"],
            [part for part, _ in dataset.train_list + dataset.test_list],
        )
        images = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        batch = {"data": images, "labels" if name == "cifar10" else "fine_labels": [0, 1] * 10}
        members = {part: pickle.dumps(batch) for part in parts}
        members[dataset.meta["filename"]] = pickle.dumps({key: ["cat", "dog"]})
        hashes = {part: md5(content) for part, content in members.items()}
        for attribute in ("train_list", "test_list"):
            changed = [[part, hashes[part]] for part, _ in getattr(dataset, attribute)]
            monkeypatch.setattr(dataset, attribute, changed)
        meta = {**dataset.meta, "md5": hashes[dataset.meta["filename"]]}
        monkeypatch.setattr(dataset, "meta", meta)
        content = tar_of({f"{dataset.base_folder}/{part}": data for part, data in members.items()})
        monkeypatch.setattr(dataset, "url", f"{url}/{dataset.filename}")
        monkeypatch.setattr(dataset, "tgz_md5", md5(content))
        return {dataset.filename: content}
    if "mnist" in name:
        files = {}
        for file, _ in dataset.resources:
            images = b"\0\0\x08\x03" + bytes([0, 0, 0, 20, 0, 0, 0, 28, 0, 0, 0, 28])
            labels = b"\0\0\x08\x01" + bytes([0, 0, 0, 20]) + bytes([0, 1] * 10)
            raw = images + rng.bytes(20 * 28 * 28) if "images" in file else labels
            files[file] = gzip.compress(raw)
        monkeypatch.setattr(dataset, "mirrors", [f"{url}/", f"{url}/mirror/"])
        resources = [(file, md5(content)) for file, content in files.items()]
        monkeypatch.setattr(dataset, "resources", resources)
        return files
    if name == "svhn":
        files, splits = {}, {}
        for split in ("train", "test"):
            stream, file = io.BytesIO(), f"{split}_32x32.mat"
            images = rng.integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
            savemat(stream, {"X": images, "y": np.array([[1], [10]] * 10, np.uint8)})
            files[file] = stream.getvalue()
            splits[split] = [f"{url}/{file}", file, md5(files[file])]
        monkeypatch.setattr(dataset, "split_list", splits)
        return files
    members = {f"dtd/images/dots/{i}.jpg": picture_bytes(i, kind="JPEG") for i in range(20)}
    members["dtd/labels/test1.txt"] = "".join(f"dots/{i}.jpg\n" for i in range(20)).encode()
    content = tar_of(members)
    monkeypatch.setattr(dataset, "_URL", f"{url}/dtd.tar.gz")
    monkeypatch.setattr(dataset, "_MD5", md5(content))
    return {"dtd.tar.gz": content}


@late_sockets
@pytest.mark.parametrize("kind", WRONG_KINDS)
@pytest.mark.parametrize("name", open_set_data.TORCHVISION)
def test_only_right_and_whole_torchvision_downloads_count(
    served, tmp_path, monkeypatch, name, kind
):
    url, files = served
    right = small_edition(name, url, monkeypatch)
    monkeypatch.setattr(open_set_data, "PATIENCE", 0.3)

    def load():
        if name == "textures":
            return load_unknown(name, tmp_path, 32)
        return np.concatenate([split.images for split in load_known(name, tmp_path)[1:4]])

    for file, content in right.items():
        files[f"/{file}"] = content, len(content)
    last = f"/{list(right)[-1]}"  # the others are there
    if kind == "absent":
        del files[last]
    else:
        files[last] = wrong_answers(right[last[1:]])[kind]
    assert_refused_and_nothing_kept(load, tmp_path, list(right)[:-1] if name == "svhn" else ())
    files[last] = right[last[1:]], len(right[last[1:]])
    images = load()
    files.clear()  # from here on without the network
    assert np.array_equal(load(), images)
    assert not list(tmp_path.glob("unfinished-*"))


@pytest.mark.parametrize("name", open_set_data.TORCHVISION)
def test_damaged_torchvision_sets_are_one_line_that_says_what_to_do(
    served, tmp_path, monkeypatch, name
):
    url, files = served
    for file, content in small_edition(name, url, monkeypatch).items():
        files[f"/{file}"] = content, len(content)

    def load():
        return (
            load_unknown(name, tmp_path, 32) if name == "textures" else load_known(name, tmp_path)
        )

    load()
    for path in sorted(tmp_path.rglob("*")):
        if path.is_file() and path.suffix not in (".gz", ".jpg"):
            content = path.read_bytes()
            for damaged in (content[: len(content) // 2 - 2], b"<!DOCTYPE html>"):
                path.write_bytes(damaged)
                with pytest.raises(ImagesUnavailable, match="remove it to have it") as caught:
                    load()
                assert "\n" not in str(caught.value)
            path.write_bytes(content)


def test_published_archive_of_another_edition_is_named_and_kept(tmp_path):
    (tmp_path / "LSUN.tar.gz").write_bytes(b"another edition")
    with pytest.raises(ImagesUnavailable, match=r"LSUN\.tar\.gz is not the published file"):
        load_unknown("lsun-crop", tmp_path, 32)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"another edition"]


def test_answer_that_is_no_http_is_one_line(tmp_path, monkeypatch):
    def refuse(*args):
        raise http.client.BadStatusLine("\x00")

    monkeypatch.setattr(open_set_data, "download_url", refuse)
    with pytest.raises(ImagesUnavailable, match="isun is not to be had"):
        load_unknown("isun", tmp_path, 32)


def member(name, kind=tarfile.REGTYPE, target="", content=b"outside"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, target, 0o644
    info.size = len(content) if kind == tarfile.REGTYPE else 0
    return info, content


HOSTILE_MEMBERS = {
    "parent": [member("../evil")],
    "deep parent": [member("iSUN/../../evil")],
    "link outside": [member("iSUN/link", tarfile.SYMTYPE, "../../..")],
    "through a link": [member("iSUN/l", tarfile.SYMTYPE, "../.."), member("iSUN/l/evil")],
    "absolute link": [member("iSUN/link", tarfile.SYMTYPE, "/etc/passwd")],
    "hard link": [member("iSUN/link", tarfile.LNKTYPE, "../../secret")],
    "character device": [member("iSUN/zero", tarfile.CHRTYPE)],
    "block device": [member("iSUN/disk", tarfile.BLKTYPE)],
    "pipe": [member("iSUN/pipe.png", tarfile.FIFOTYPE)],
}


def serve_tar(folder, monkeypatch, members):
    """Put iSUN.tar.gz in a folder, with one image and some members, as if it were the right one."""
    image = member("iSUN/0.png", content=picture_bytes(0, (32, 32)))
    with tarfile.open(folder / "iSUN.tar.gz", "w:gz") as archive:
        for info, content in [image, *members]:
            archive.addfile(info, io.BytesIO(content))
    md5 = hashlib.md5((folder / "iSUN.tar.gz").read_bytes()).hexdigest()
    archive, _, *rest = open_set_data.ODIN_ARCHIVES["isun"]
    monkeypatch.setitem(open_set_data.ODIN_ARCHIVES, "isun", (archive, md5, *rest))


@pytest.mark.parametrize("kind", HOSTILE_MEMBERS)
def test_hostile_tar_is_refused_and_leaves_nothing(tmp_path, monkeypatch, kind):
    (tmp_path / "secret").write_text("secret")
    data = tmp_path / "data"
    data.mkdir()
    serve_tar(data, monkeypatch, HOSTILE_MEMBERS[kind])
    with pytest.raises(ImagesUnavailable, match="isun is not to be had"):
        load_unknown("isun", data, 32)
    assert [path.name for path in data.iterdir()] == ["iSUN.tar.gz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "secret"]


def test_absolute_paths_in_a_tar_stay_inside(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    serve_tar(data, monkeypatch, [member(f"{tmp_path}/evil")])
    load_unknown("isun", data, 32)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert sorted(path.name for path in data.iterdir()) == ["iSUN", "iSUN.tar.gz"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_unpacking_cut_off_does_not_count_as_complete(tmp_path, monkeypatch, error):
    serve_tar(tmp_path, monkeypatch, [])
    unpack = tarfile.TarFile.extractall

    def cut_off(*args, **kwargs):
        unpack(*args, **kwargs)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", cut_off)
        with pytest.raises((KeyboardInterrupt, ImagesUnavailable)):
            load_unknown("isun", tmp_path, 32)
    assert [path.name for path in tmp_path.iterdir()] == ["iSUN.tar.gz"]
    assert len(load_unknown("isun", tmp_path, 32)) == 1


def make_tiny_classes(folder, bad=()):
    """TinyImageNet of two classes in its published layout; class i's images are all 100 + i."""
    root = folder / "tiny-imagenet-200"
    rows = []
    for label, name in enumerate(("n01", "n02")):
        pixels = np.full((64, 64, 3), 100 + label, np.uint8)
        (root / "train" / name / "images").mkdir(parents=True)
        (root / "val" / "images").mkdir(parents=True, exist_ok=True)
        for i in range(20):
            files = [root / "train" / name / "images" / f"{name}_{i}.JPEG"]
            files.append(root / "val" / "images" / f"val_{name}_{i}.JPEG")
            rows.append(f"{files[1].name}\t{name}\t0\t0\t62\t62")
            for file in files:
                Image.fromarray(pixels).save(file, "PNG")
                if i in bad:
                    file.write_bytes(file.read_bytes()[:50])
    (root / "val" / "val_annotations.txt").write_text("\n".join(rows))
    return root


def test_tiny_imagenet_classes_are_read_from_the_zip_beside_what_is_there(tmp_path, monkeypatch):
    make_tiny_classes(tmp_path)
    archive = tmp_path / "data" / "tiny-imagenet-200.zip"
    (tmp_path / "data" / "tiny-imagenet-200" / "test").mkdir(parents=True)
    shutil.make_archive(str(archive.with_suffix("")), "zip", tmp_path, "tiny-imagenet-200")
    monkeypatch.setattr(
        open_set_data, "TINY_IMAGENET_MD5", hashlib.md5(archive.read_bytes()).hexdigest()
    )
    data = load_known("tiny-imagenet", tmp_path / "data")
    assert [len(split.labels) for split in data[1:4]] == [36, 4, 40]
    assert [path.name for path in (tmp_path / "data" / "tiny-imagenet-200").iterdir()] == ["test"]


# Images


def test_labels_of_tiny_imagenet_stay_with_their_images_when_files_are_skipped(tmp_path, capsys):
    make_tiny_classes(tmp_path, bad=(0, 3))
    data = load_known("tiny-imagenet", tmp_path)
    for split in data[1:4]:
        assert (split.images[:, 0, 0, 0] == 100 + split.labels).all()
    assert [len(split.labels) for split in data[1:4]] == [34, 2, 36]
    assert capsys.readouterr().err.count("skipped") == 8


def test_labels_of_class_folders_stay_with_their_images_when_files_are_skipped(tmp_path, capsys):
    for label, name in enumerate(("cat", "dog", "cow.png")):
        (tmp_path / name).mkdir()
        for i in range(20):
            Image.new("RGB", (40, 40), (10 * label, 0, 0)).save(tmp_path / name / f"{i}.png")
    for name in ("cat/0.png", "dog/7.png", "dog/19.png"):
        (tmp_path / name).write_bytes(b"")
    data = load_known(f"folder:{tmp_path}", tmp_path)
    values = {"cat": 0, "dog": 10, "cow.png": 20}
    for split in data[1:4]:
        expected = [values[data.classes[label]] for label in split.labels]
        assert split.images[:, 0, 0, 0].tolist() == expected
    assert sum(len(split.labels) for split in data[1:4]) == 57
    assert capsys.readouterr().err.count("skipped") == 3


def read_one(path):
    images, read = read_images([path], 32)
    assert read == [0]
    assert images.shape == (1, 32, 32, 3)
    return images[0].astype(int)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32)
    if suffix == "pgm":  # older Pillows read it but do not write it
        (tmp_path / "ramp.pgm").write_bytes(b"P5 32 32 65535\n" + ramp.astype(">u2").tobytes())
    else:
        Image.fromarray(ramp).save(tmp_path / f"ramp.{suffix}")
    assert abs(read_one(tmp_path / f"ramp.{suffix}") - ramp[..., None] / 257).max() <= 0.5


def test_palette_grey_and_bilevel_keep_their_colours(tmp_path):
    original = picture(0, (32, 32))
    palette = original.quantize(64)
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(read_one(tmp_path / "palette.png"), palette.convert("RGB"))
    for mode in ("L", "1"):
        original.convert(mode).save(tmp_path / "grey.png")
        grey = np.asarray(original.convert(mode).convert("L"))
        assert np.array_equal(read_one(tmp_path / "grey.png"), np.dstack([grey] * 3))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "P bytes", "RGB key", "L key"])
def test_transparent_pixels_are_white(tmp_path, mode):
    """The left half is transparent, with black hidden underneath; the right half is grey 90."""
    alpha = np.repeat([[0] * 16 + [255] * 16], 32, axis=0).astype(np.uint8)
    values = np.where(alpha, 90, 0).astype(np.uint8)
    grey, path = Image.fromarray(values), tmp_path / "half.png"
    if mode in ("RGBA", "LA"):
        image = grey.convert(mode)
        image.putalpha(Image.fromarray(alpha))
        image.save(path)
    elif mode.startswith("P"):
        image = Image.fromarray((values > 0).astype(np.uint8)).convert("P")
        image.putpalette([0, 0, 0, 90, 90, 90])
        image.save(path, transparency=b"\x00\xff" if "bytes" in mode else 0)
    elif mode == "RGB key":
        grey.convert("RGB").save(path, transparency=(0, 0, 0))
    else:
        grey.save(path, transparency=0)
    expected = np.where(alpha, 90, 255)[..., None].repeat(3, axis=-1)
    assert np.array_equal(read_one(path), expected)


def test_half_transparent_is_mixed_with_white(tmp_path):
    Image.new("RGBA", (32, 32), (0, 100, 200, 51)).save(tmp_path / "thin.png")
    assert read_one(tmp_path / "thin.png")[0, 0] == pytest.approx([204, 224, 244], abs=1)


def test_cmyk_keeps_its_colours(tmp_path):
    Image.new("RGB", (32, 32), (200, 100, 50)).convert("CMYK").save(
        tmp_path / "print.jpg", quality=100
    )
    assert read_one(tmp_path / "print.jpg")[9, 9] == pytest.approx([200, 100, 50], abs=3)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_an_animation_the_first_frame_is_read(tmp_path, suffix):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"moving.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert read_one(path)[5, 5].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_undone(tmp_path, orientation):
    undo = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90,
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(0, (32, 32)).save(tmp_path / "turned.png", exif=exif)
    expected = undo[orientation](np.asarray(picture(0, (32, 32))))
    assert np.array_equal(read_one(tmp_path / "turned.png"), expected)


def png_claiming(width, height):
    content = bytearray(picture_bytes(0, (8, 8)))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


def eps():
    stream = io.BytesIO()
    picture(0).save(stream, "EPS")
    return stream.getvalue()


def floating_tiff():
    stream = io.BytesIO()
    Image.fromarray(np.zeros((32, 32), np.float32)).save(stream, "TIFF")
    return stream.getvalue()


UNREADABLE = {
    "zero.png": lambda: b"",
    "cut.png": lambda: picture_bytes(0)[:-100],
    "cut.jpg": lambda: picture_bytes(0, kind="JPEG")[:-100],
    "cut.gif": lambda: picture_bytes(0, kind="GIF")[:500],
    "cut.tif": lambda: picture_bytes(0, kind="TIFF")[:500],
    "cut.webp": lambda: picture_bytes(0, kind="WEBP")[:500],
    "cut.bmp": lambda: picture_bytes(0, kind="BMP")[:500],
    "text.png": lambda: b"<!DOCTYPE html>",
    "noise.jpg": lambda: np.random.default_rng(0).bytes(2000),
    "script.png": eps,  # Pillow would hand it to Ghostscript
    "floating.tif": floating_tiff,
    "bomb.png": lambda: png_claiming(50_000, 50_000),
    "big.png": lambda: png_claiming(10_000, 10_000),  # between once and twice Pillow's limit
    "header.png": lambda: png_claiming(0, 0),
}


def test_unreadable_files_are_named_one_line_each_and_left_out(tmp_path, capsys):
    for name, content in UNREADABLE.items():
        (tmp_path / name).write_bytes(content())
        picture(0).save(tmp_path / "good.png")
        with warnings.catch_warnings(action="error"):
            assert len(load_unknown(f"folder:{tmp_path}", tmp_path, 32)) == 1
        first, second = capsys.readouterr().err.splitlines()
        assert first.startswith(f"skipped {tmp_path / name}: not a readable image (")
        assert second == "1 of 2 files are not readable images"
        (tmp_path / name).unlink()


def test_one_bad_file_among_thousands_is_counted_and_thousands_are_not_listed(tmp_path, capsys):
    content = picture_bytes(0, (8, 8))
    for i in range(3000):
        (tmp_path / f"{i:04}.png").write_bytes(b"" if i == 1234 else content)
    images, read = read_images(image_files([tmp_path]), 32)
    assert len(images) == 2999
    assert read == [i for i in range(3000) if i != 1234]
    assert "1 of 3,000 files are not readable images" in capsys.readouterr().err
    for i in range(2999):
        (tmp_path / f"{i:04}.png").write_bytes(b"")
    assert read_images(image_files([tmp_path]), 32)[1] == [2999]
    errors = capsys.readouterr().err.strip().splitlines()
    assert sum(line.startswith("skipped") for line in errors) == 10
    assert errors[-1] == "2,999 of 3,000 files are not readable images"


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"two\nlines.png", b"\x1b[31mred.png"])
def test_odd_file_names_are_read_and_named_in_one_line(tmp_path, capsys, name):
    good = tmp_path / os.fsdecode(name)
    picture(0, (32, 32)).save(good)
    assert np.array_equal(read_one(image_files([tmp_path])[0]), picture(0, (32, 32)))
    scores = compute_openmax.Scores(np.zeros(1), np.array([[0.9, 0.1, 0.0]]))
    rows = compute_openmax.name_predictions([good], scores, 0.5, ("a", "b"))
    compute_openmax.print_predictions(rows)
    assert len(capsys.readouterr().out.encode().splitlines()) == 1
    good.write_bytes(b"")
    with pytest.raises(ValueError, match="none of 1 files is a readable image"):
        read_images([good], 32)
    error = capsys.readouterr().err
    assert "\x1b" not in error
    assert error.encode().count(b"\n") == 2  # the file, and the count


def test_folders_and_pipes_named_like_images_are_no_images(tmp_path, capsys):
    (tmp_path / "folder.png").mkdir()
    picture(0).save(tmp_path / "folder.png" / "inside.png")
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    (tmp_path / "broken.png").symlink_to("nowhere")
    (tmp_path / "link.png").symlink_to(tmp_path / "folder.png" / "inside.png")
    assert len(load_unknown(f"folder:{tmp_path}", tmp_path, 32)) == 2
    assert capsys.readouterr().err.count("skipped") == 1


def test_file_that_may_not_be_read_is_skipped(tmp_path, monkeypatch, capsys):
    for name in ("good.png", "locked.png"):
        picture(0).save(tmp_path / name)
    opened = Path.open

    def locked(path, *args):  # root may read everything, so pretend
        if path.name == "locked.png":
            raise PermissionError(13, "Permission denied")
        return opened(path, *args)

    monkeypatch.setattr(Path, "open", locked)
    assert len(load_unknown(f"folder:{tmp_path}", tmp_path, 32)) == 1
    assert "locked.png: not a readable image ([Errno 13]" in capsys.readouterr().err


def test_bad_file_inside_the_zip_is_skipped(tmp_path, monkeypatch, capsys):
    content = bytearray(tiny_zip(tmp_path / "tiny-imagenet-200.zip"))
    content[200] ^= 0xFF  # inside the first image: a wrong CRC
    (tmp_path / "tiny-imagenet-200.zip").write_bytes(content)
    monkeypatch.setattr(open_set_data, "TINY_IMAGENET_MD5", hashlib.md5(content).hexdigest())
    assert len(load_unknown("tiny-imagenet-crop", tmp_path, 32)) == 2
    assert "test_0.JPEG: not a readable image" in capsys.readouterr().err
