"""PyTorch Hub: `torch.hub.load("<owner>/<repository>", "dhr_net")`."""

from pathlib import Path

from models import DHRNet, load_checkpoint

dependencies = ["torch"]


def dhr_net() -> DHRNet:
    """The shipped CIFAR-10 network, in evaluation mode.

    It takes [N, 3, 32, 32] images, uint8 or float in 0..1, and returns a `models.DHROutput`.
    """
    return load_checkpoint(Path(__file__).resolve().parent / "dhr_net.pt")[0]
