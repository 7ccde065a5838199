"""How the scripts end."""

import pytest
import torch

from command_line import explain


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
