"""What both command lines share: their parser, and the names that flags choose from. With these
alone, bad arguments and --help are answered without the seconds that importing PyTorch takes."""

import argparse

ARCHITECTURES = {  # name: channels of the three stages
    "fast": (64, 256, 256),
    "medium": (96, 320, 320),
    "deep": (128, 320, 320),
    "vgg": (64, 128, 256),
}
DISTANCES = ("euclidean", "cosine", "eucos", "mahalanobis")
LOSSES = ("softmax", "one-vs-rest")
KNOWN_SETS = ("cifar10", "cifar100", "mnist", "fashion-mnist", "svhn", "tiny-imagenet", "digits")
KNOWN_SPLITS = ("train", "val", "test_known")
UNKNOWN_SETS = (
    "tiny-imagenet-crop", "tiny-imagenet-resize", "lsun-crop", "lsun-resize", "isun", "svhn",
    "cifar100", "mnist", "textures", "gaussian-noise", "uniform-noise",
)  # fmt: skip


def command_line(description: str | None) -> argparse.ArgumentParser:
    """The parser that both scripts add their flags to."""
    return argparse.ArgumentParser(
        description=description,
        # Asking the terminal for its width would import more modules.
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 20, 80),
        usage="%(prog)s [option ...]",
        allow_abbrev=False,
    )
