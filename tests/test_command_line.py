"""How the scripts end, and the check of where they write."""

import errno
import os
from pathlib import Path

import pytest
import torch

from command_line import check_writable, explain


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 4 GB"),
    ],
)
def test_out_of_memory_is_explained(error):
    assert explain(error) == "out of memory; try a smaller --batch-size"


def test_a_defect_is_raised_again():
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_an_error_of_the_system_names_its_file():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "net.pt")
    assert explain(full) == "net.pt: no space left on device"


@pytest.mark.parametrize("place", ["/proc/x", "file/x", "folder", "absent/x", "n" * 250, "."])
def test_place_that_cannot_be_written_is_named(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder").mkdir()
    with pytest.raises(ValueError, match=r"cannot write there \(") as caught:
        check_writable(Path(place))
    assert str(caught.value).startswith(place)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path):
    check_writable(tmp_path / "net.pt")
    assert not os.listdir(tmp_path)
