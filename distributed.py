"""Several processes as one: the few calls that let both scripts run under torchrun.

    torchrun --nproc-per-node 2 train_dhr_nn.py

Each process runs the whole script on its share of the images, on its own GPU where there are GPUs.
Process 0 alone prints, writes and saves. Without torchrun there is process 0 only, and these calls
do nothing. All processes see the same folders.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@contextmanager
def joined_processes() -> Iterator[None]:
    """Join the processes that torchrun started, and let only the first print, on stderr too.

    Raises:
        ConnectionError: a step that the processes take together failed, usually because one ended.
        KeyboardInterrupt: torchrun stops this process, because another one ended.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    try:
        dist.init_process_group()  # gloo for tensors on the CPU, nccl for those on GPUs
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with open(os.devnull, "w") as nowhere:
            out, err = (nowhere, nowhere) if rank() else (sys.stdout, sys.stderr)
            with redirect_stdout(out), redirect_stderr(err):
                yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise  # out of memory, or a defect
        reason = str(error).strip().split("\n")[0]
        raise ConnectionError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} stopped ({reason}); see "
            "what ended the others, then start all of them again"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first_process_first(read: Callable[[], T]) -> T:
    """Call `read`, which may download, in process 0 before the others."""
    if rank():
        average(torch.zeros(1))  # waits for process 0
    try:
        return read()
    finally:
        if not rank():
            average(torch.zeros(1))


def average(values: Tensor) -> Tensor:
    """Mean over the processes of a tensor on the CPU."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values / world_size()


def split_over_processes(function: Callable[[Any], Any], arrays: Any) -> Any:
    """Call `function` in each process on its share of the rows, and join what all return.

    Args:
        function: takes and returns named tuples of arrays with one row per image.
        arrays: its argument, whole.

    Returns:
        its result, whole, in the order of the rows, in every process.
    """
    if world_size() == 1:
        return function(arrays)
    mine = arrays._make(np.array_split(array, world_size())[rank()] for array in arrays)
    result = function(mine)
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, tuple(result))
    return result._make(map(np.concatenate, zip(*parts, strict=True)))


def replicated(model: nn.Module) -> nn.Module:
    """The model, its gradients averaged over the processes whenever they are computed."""
    return DistributedDataParallel(model) if world_size() > 1 else model
