"""Downloads and archives: only the whole, right file counts, and no other is left behind."""

import gc
import hashlib
import io
import pickle
import socket
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

import open_set_data
from open_set_data import ImagesUnavailable, load_known, load_unknown

SILENCE = b"..."
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def sockets_of_other_files_are_left_alone():
    yield
    gc.collect()  # HTTPErrors keep sockets
    socket.setdefaulttimeout(None)


@pytest.fixture
def served(monkeypatch):
    """Address of a local server, and what it serves: path -> (content, claimed length). Where more
    is claimed than there is, it hangs up; after content that ends in SILENCE it says no more."""
    files, over = {}, threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path not in files:
                return self.send_error(404)
            content, length = files[self.path]
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

    monkeypatch.setattr(open_set_data, "PATIENCE", 0.3)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", files
        over.set()
        server.shutdown()


def wrong_answers(content):
    """What a server may send in place of `content`: kind -> (bytes, claimed length)."""
    half = content[: len(content) // 2]
    return {
        "page": (b"<!DOCTYPE html>", 15),
        "cut": (half, len(content)),
        "wrong": (content[:-1] + bytes([content[-1] ^ 1]), len(content)),
        "stalled": (half + SILENCE, len(content)),
    }


def md5(content):
    return hashlib.md5(content).hexdigest()


def png(seed, size=32):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def tar_of(*members):
    """Gzipped tar of (name, content) files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def assert_refused_and_nothing_kept(load, folder, whole=()):
    for _ in range(2):  # what the first call leaves must not look right to the second
        with pytest.raises(ImagesUnavailable, match=r"^.*put the unpacked files there.*$"):
            load()
        assert [path.name for path in folder.iterdir()] == list(whole)


def put_archive(name, folder, monkeypatch):
    """Put a small edition of one of ODIN's archives in a folder; return its images."""
    archive, _, images, frame, link = open_set_data.ODIN_ARCHIVES[name]
    pictures = [png(i, 32 + 2 * frame) for i in range(3)]
    content = tar_of(*((f"{images}/{i}.png", picture) for i, picture in enumerate(pictures)))
    (folder / archive).write_bytes(content)
    edition = (archive, md5(content), images, frame, link)
    monkeypatch.setitem(open_set_data.ODIN_ARCHIVES, name, edition)
    return np.stack([np.asarray(Image.open(io.BytesIO(picture))) for picture in pictures])


@pytest.mark.parametrize("name", ["tiny-imagenet-crop-odin", "lsun-crop", "lsun-resize", "isun"])
def test_published_archives_lose_their_frame(tmp_path, monkeypatch, name):
    images = put_archive(name, tmp_path, monkeypatch)
    frame = (images.shape[1] - 32) // 2
    expected = images[:, frame : frame + 32, frame : frame + 32]
    assert np.array_equal(load_unknown(name, tmp_path, 32), expected)
    assert np.array_equal(load_unknown(name, tmp_path, 32), expected)  # unpacked


def test_published_archive_of_another_edition_is_named_and_kept(tmp_path):
    (tmp_path / "LSUN.tar.gz").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(ImagesUnavailable, match=r"LSUN\.tar\.gz is not the published file"):
        load_unknown("lsun-crop", tmp_path, 32)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"<!DOCTYPE html>"]


def test_unpacking_cut_off_does_not_count_as_complete(tmp_path, monkeypatch):
    put_archive("isun", tmp_path, monkeypatch)
    unpack = tarfile.TarFile.extractall

    def cut_off(*args, **kwargs):
        unpack(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", cut_off)
        with pytest.raises(KeyboardInterrupt):
            load_unknown("isun", tmp_path, 32)
    assert [path.name for path in tmp_path.iterdir()] == ["iSUN.tar.gz"]
    assert len(load_unknown("isun", tmp_path, 32)) == 3


def cifar_edition(dataset, url, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    batch = pickle.dumps({"data": images, "labels": [0, 1] * 10, "fine_labels": [0, 1] * 10})
    meta = pickle.dumps({dataset.meta["key"]: ["cat", "dog"]})
    for attribute in ("train_list", "test_list"):
        parts = [[part, md5(batch)] for part, _ in getattr(dataset, attribute)]
        monkeypatch.setattr(dataset, attribute, parts)
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": md5(meta)})
    names = [part for part, _ in dataset.train_list + dataset.test_list]
    members = [(name, batch) for name in names] + [(dataset.meta["filename"], meta)]
    content = tar_of(*((f"{dataset.base_folder}/{part}", data) for part, data in members))
    monkeypatch.setattr(dataset, "url", f"{url}/{dataset.filename}")
    monkeypatch.setattr(dataset, "tgz_md5", md5(content))
    return {dataset.filename: content}


def svhn_edition(dataset, url, monkeypatch):
    files = {}
    for split in ("train", "test"):
        stream = io.BytesIO()
        images = np.broadcast_to(np.arange(20, dtype=np.uint8), (32, 32, 3, 20))
        savemat(stream, {"X": images, "y": np.array([[1], [10]] * 10, np.uint8)})
        files[f"{split}_32x32.mat"] = stream.getvalue()
    lists = {name.split("_")[0]: [f"{url}/{name}", name, md5(files[name])] for name in files}
    monkeypatch.setattr(dataset, "split_list", lists)
    return files


def tiny_edition(dataset, url, monkeypatch):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("tiny-imagenet-200/test/images/test_0.JPEG", png(0, 64))
    monkeypatch.setattr(open_set_data, "TINY_IMAGENET", f"{url}/tiny-imagenet-200.zip")
    monkeypatch.setattr(open_set_data, "TINY_IMAGENET_MD5", md5(stream.getvalue()))
    return {"tiny-imagenet-200.zip": stream.getvalue()}


EDITIONS = {
    "cifar10": (cifar_edition, datasets.CIFAR10),
    "svhn": (svhn_edition, datasets.SVHN),
    "tiny-imagenet-crop": (tiny_edition, None),
}


def serve_edition(name, served, monkeypatch):
    url, files = served
    edition, dataset = EDITIONS[name]
    right = edition(dataset, url, monkeypatch)
    files.update({f"/{file}": (content, len(content)) for file, content in right.items()})
    return right


def load(name, folder):
    if name not in open_set_data.KNOWN_SETS:
        return load_unknown(name, folder, 32)
    return np.concatenate([split.images for split in load_known(name, folder)[1:4]])


@pytest.mark.parametrize("kind", wrong_answers(b"x"))
@pytest.mark.parametrize("name", EDITIONS)
def test_only_right_and_whole_downloads_count(served, tmp_path, monkeypatch, name, kind):
    files = served[1]
    right = serve_edition(name, served, monkeypatch)
    last = list(right)[-1]  # the others are there
    files[f"/{last}"] = wrong_answers(right[last])[kind]
    whole = list(right)[:-1] if name == "svhn" else ()
    assert_refused_and_nothing_kept(lambda: load(name, tmp_path), tmp_path, whole)
    files[f"/{last}"] = right[last], len(right[last])
    images = load(name, tmp_path)
    files.clear()  # from here on without the network
    assert np.array_equal(load(name, tmp_path), images)


def test_an_archive_that_is_there_is_unpacked_without_the_network(served, tmp_path, monkeypatch):
    ((name, content),) = serve_edition("cifar10", served, monkeypatch).items()
    served[1].clear()
    (tmp_path / name).write_bytes(content)
    assert len(load("cifar10", tmp_path)) == 120
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar-10-batches-py", name]


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_damaged_torchvision_files_say_what_to_do(served, tmp_path, monkeypatch, name):
    serve_edition(name, served, monkeypatch)
    load(name, tmp_path)
    for path in sorted(tmp_path.rglob("*")):
        if path.is_file() and path.suffix != ".gz":
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2 - 2])
            with pytest.raises(ImagesUnavailable, match="is damaged: remove it to download"):
                load(name, tmp_path)
            path.write_bytes(content)


def test_svhn_images_stay_with_their_labels_and_ten_means_zero(served, tmp_path, monkeypatch):
    serve_edition("svhn", served, monkeypatch)
    test = load_known("svhn", tmp_path, "0,1").test_known
    assert (test.images == test.images[:, :1, :1, :1]).all()
    assert (test.images[:, 0, 0, 0] % 2 == 1 - test.labels).all()
