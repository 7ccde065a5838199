"""PyTorch Hub: `torch.hub.load("<owner>/<repository>", "dhr_net")`."""

from pathlib import Path
from runpy import run_path

from torch import nn

dependencies = ["torch"]


def dhr_net() -> nn.Module:
    """The shipped CIFAR-10 network, in evaluation mode.

    It takes [N, 3, 32, 32] images, uint8 or float in 0..1, and returns a `models.DHROutput`.
    """
    folder = Path(__file__).resolve().parent
    models = run_path(str(folder / "models.py"))  # not imported: many projects have a models.py
    return models["load_checkpoint"](folder / "dhr_net.pt")[0]
