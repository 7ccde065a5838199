"""PyTorch Hub: `torch.hub.load("<owner>/<repository>", "dhr_net")`."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from torch import nn

dependencies = ["torch"]


def dhr_net() -> nn.Module:
    """The shipped CIFAR-10 network, in evaluation mode.

    It takes [N, 3, 32, 32] images, uint8 or float in 0..1, and returns a `models.DHROutput`.
    """
    folder = Path(__file__).resolve().parent
    spec = spec_from_file_location("crosr_models", folder / "models.py")
    assert spec
    assert spec.loader
    models = module_from_spec(spec)  # under a name of its own: many projects have a models.py
    spec.loader.exec_module(models)
    network: nn.Module = models.load_checkpoint(folder / "dhr_net.pt")[0]
    return network
