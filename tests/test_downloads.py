"""Downloads and archives: only the whole, right file counts, and nothing is written elsewhere."""

import gc
import gzip
import hashlib
import io
import pickle
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import open_set_data
from open_set_data import ImagesUnavailable, load_cifar100_test, load_known, load_unknown

SILENCE = b"..."
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def late_sockets():
    """Collect the sockets that HTTPErrors keep: here, not in the tests of other files."""
    yield
    gc.collect()


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


WRONG_KINDS = ["absent", *wrong_answers(b"x")]


def md5(content):
    return hashlib.md5(content).hexdigest()


def png(seed, size=32, kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def tar_of(*members):
    """Gzipped tar of (name, content) files and of TarInfo entries."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return stream.getvalue()


def assert_refused_and_nothing_kept(load, folder, whole=()):
    for _ in range(2):  # what the first call leaves must not look right to the second
        with pytest.raises(ImagesUnavailable, match="put the files there") as caught:
            load()
        assert "\n" not in str(caught.value)
        assert [path.name for path in folder.iterdir()] == list(whole)


@pytest.mark.parametrize("kind", WRONG_KINDS)
def test_only_the_right_and_whole_archive_counts(served, tmp_path, monkeypatch, kind):
    url, files = served
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for i in range(3):
            archive.writestr(f"tiny-imagenet-200/test/images/test_{i}.JPEG", png(i, 64, "JPEG"))
    content = stream.getvalue()
    monkeypatch.setattr(open_set_data, "TINY_IMAGENET", f"{url}/tiny.zip")
    monkeypatch.setattr(open_set_data, "TINY_IMAGENET_MD5", md5(content))

    def load():
        return load_unknown("tiny-imagenet-crop", tmp_path, 32)

    if kind != "absent":
        files["/tiny.zip"] = wrong_answers(content)[kind]
    assert_refused_and_nothing_kept(load, tmp_path)
    files["/tiny.zip"] = content, len(content)
    assert load().shape == (3, 32, 32, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny-imagenet-200.zip"]


@pytest.mark.parametrize("name", ["tiny-imagenet-crop", "lsun-crop", "lsun-resize", "isun"])
def test_published_archives_lose_their_frame(tmp_path, monkeypatch, name):
    archive, _, folder, frame, link = open_set_data.ODIN_ARCHIVES[name]
    size = 32 + 2 * frame
    content = tar_of(*((f"{folder}/{i}.png", png(i, size)) for i in range(3)))
    (tmp_path / archive).write_bytes(content)
    known = (archive, md5(content), folder, frame, link)
    monkeypatch.setitem(open_set_data.ODIN_ARCHIVES, name, known)
    whole = np.asarray(Image.open(io.BytesIO(png(1, size))))
    images = load_unknown(name, tmp_path, 32)
    assert np.array_equal(images[1], whole[frame : size - frame, frame : size - frame])


def test_published_archive_of_another_edition_is_named_and_kept(tmp_path):
    (tmp_path / "LSUN.tar.gz").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(ImagesUnavailable, match=r"LSUN\.tar\.gz is not the published file"):
        load_unknown("lsun-crop", tmp_path, 32)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"<!DOCTYPE html>"]


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


HOSTILE_MEMBERS = {
    "path outside": ("../evil", b"x"),
    "link outside": link("iSUN/link", "../../.."),
    "hard link outside": link("iSUN/link", "../../secret", tarfile.LNKTYPE),
    "pipe": link("iSUN/pipe.png", "", tarfile.FIFOTYPE),
}


def put_isun(folder, monkeypatch, *members):
    """Put iSUN.tar.gz with one image and some members in a folder, as if it were the right one."""
    content = tar_of(("iSUN/0.png", png(0)), *members)
    (folder / "iSUN.tar.gz").write_bytes(content)
    archive, _, *rest = open_set_data.ODIN_ARCHIVES["isun"]
    monkeypatch.setitem(open_set_data.ODIN_ARCHIVES, "isun", (archive, md5(content), *rest))


@pytest.mark.parametrize("kind", HOSTILE_MEMBERS)
def test_archive_that_reaches_outside_is_refused_and_leaves_nothing(tmp_path, monkeypatch, kind):
    (tmp_path / "secret").write_text("secret")
    data = tmp_path / "data"
    data.mkdir()
    put_isun(data, monkeypatch, HOSTILE_MEMBERS[kind])
    with pytest.raises(ImagesUnavailable, match="isun"):
        load_unknown("isun", data, 32)
    assert [path.name for path in data.iterdir()] == ["iSUN.tar.gz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "secret"]


def test_unpacking_cut_off_does_not_count_as_complete(tmp_path, monkeypatch):
    put_isun(tmp_path, monkeypatch)
    unpack = tarfile.TarFile.extractall

    def cut_off(*args, **kwargs):
        unpack(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", cut_off)
        with pytest.raises(KeyboardInterrupt):
            load_unknown("isun", tmp_path, 32)
    assert [path.name for path in tmp_path.iterdir()] == ["iSUN.tar.gz"]
    assert len(load_unknown("isun", tmp_path, 32)) == 1


# torchvision's data sets, in small editions


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


def mnist_edition(dataset, url, monkeypatch):
    images = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (20, 28, 28))
    images = gzip.compress(images + np.random.default_rng(0).bytes(20 * 28 * 28))
    labels = gzip.compress(b"\0\0\x08\x01" + (20).to_bytes(4, "big") + bytes([0, 1] * 10))
    files = {name: images if "images" in name else labels for name, _ in dataset.resources}
    monkeypatch.setattr(dataset, "mirrors", [f"{url}/", f"{url}/mirror/"])
    monkeypatch.setattr(dataset, "resources", [(name, md5(files[name])) for name in files])
    return files


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


def textures_edition(dataset, url, monkeypatch):
    members = [(f"dtd/images/dots/{i}.jpg", png(i, 64, "JPEG")) for i in range(3)]
    labels = ("dtd/labels/test1.txt", b"".join(b"dots/%d.jpg\n" % i for i in range(3)))
    content = tar_of(*members, labels)
    monkeypatch.setattr(dataset, "_URL", f"{url}/dtd.tar.gz")
    monkeypatch.setattr(dataset, "_MD5", md5(content))
    return {"dtd.tar.gz": content}


EDITIONS = {
    "cifar10": cifar_edition, "cifar100": cifar_edition, "mnist": mnist_edition,
    "svhn": svhn_edition, "textures": textures_edition,
}  # fmt: skip


def serve_edition(name, served, monkeypatch):
    from torchvision import datasets

    url, files = served
    dataset = getattr(datasets, open_set_data.TORCHVISION[name][0])
    right = EDITIONS[name](dataset, url, monkeypatch)
    files.update({f"/{file}": (content, len(content)) for file, content in right.items()})
    return right


def load(name, folder):
    if name == "textures":
        return load_unknown(name, folder, 32)
    return np.concatenate([split.images for split in load_known(name, folder)[1:4]])


@pytest.mark.parametrize("kind", WRONG_KINDS)
@pytest.mark.parametrize("name", ["cifar10", "mnist", "svhn"])
def test_only_right_and_whole_torchvision_downloads_count(
    served, tmp_path, monkeypatch, name, kind
):
    files = served[1]
    right = serve_edition(name, served, monkeypatch)
    last = list(right)[-1]  # the others are there
    del files[f"/{last}"]
    if kind != "absent":
        files[f"/{last}"] = wrong_answers(right[last])[kind]
    whole = list(right)[:-1] if name == "svhn" else ()
    assert_refused_and_nothing_kept(lambda: load(name, tmp_path), tmp_path, whole)
    files[f"/{last}"] = right[last], len(right[last])
    images = load(name, tmp_path)
    files.clear()  # from here on without the network
    assert np.array_equal(load(name, tmp_path), images)
    assert not list(tmp_path.glob("unfinished-*"))


@pytest.mark.parametrize("name", EDITIONS)
def test_damaged_torchvision_files_are_one_line_that_says_what_to_do(
    served, tmp_path, monkeypatch, name
):
    serve_edition(name, served, monkeypatch)
    load(name, tmp_path)
    parts = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    for path in [path for path in parts if path.suffix not in (".gz", ".jpg")]:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2 - 2])
        with pytest.raises(ImagesUnavailable, match="is damaged: remove it to download") as caught:
            load(name, tmp_path)
        assert "\n" not in str(caught.value)
        path.write_bytes(content)


def test_cifar100_test_images_come_from_torchvisions_files(served, tmp_path, monkeypatch):
    serve_edition("cifar100", served, monkeypatch)
    images, labels = load_cifar100_test(tmp_path)
    assert images.shape == (20, 32, 32, 3)
    assert labels.tolist() == [0, 1] * 10
    assert np.array_equal(load_unknown("cifar100", tmp_path, 32), images)


def test_svhn_images_stay_with_their_labels_and_ten_means_zero(served, tmp_path, monkeypatch):
    serve_edition("svhn", served, monkeypatch)
    test = load_known("svhn", tmp_path, "0,1").test_known
    assert (test.images == test.images[:, :1, :1, :1]).all()
    assert (test.images[:, 0, 0, 0] % 2 == 1 - test.labels).all()
