"""What the scripts share: how they read flags, check where they write, tell versions, and end."""

import argparse
import io
import math
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from distributed import joined_processes
from open_set_data import ImagesUnavailable
from pictures import printable

LARGEST = 2**32 - 1  # number that a flag takes, unless it says otherwise


def make_parser(doc: str | None, usage: str | None = None) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring as it stands and accepts no abbreviated flags."""
    as_it_stands = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        description=doc, usage=usage, formatter_class=as_it_stands, allow_abbrev=False
    )


def number(lowest: float, highest: float = LARGEST, kind: type = int) -> Callable[[str], float]:
    """For the `type` of a flag: whole numbers, or floats, from `lowest` to `highest`."""

    def parse(text: str) -> float:
        try:
            value: float = kind(text)
        except ValueError:
            value = math.nan
        if not lowest <= value <= highest:
            what = "a whole number" if kind is int else "a number"
            limits = f"{lowest:g} to {highest:,}"
            raise argparse.ArgumentTypeError(f"{text}; expected {what}, {limits}")
        return value

    return parse


def run(script: str, work: Callable[[], None], kept: Callable[[], str]) -> int:
    """Do a script's work, in every process of torchrun, and return its exit status: 0; 1 with a
    line on stderr for what a person can mend; 130 after Ctrl-C, with a line that says what is
    `kept`. A defect is raised."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show a name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with joined_processes():
            work()
    except (ImagesUnavailable, ValueError, OSError, RuntimeError, MemoryError) as error:
        print(printable(f"{script}: error: {explain(error)}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped; {kept()}", file=sys.stderr)
        return 130
    return 0


def explain(error: Exception) -> str:
    """What a person can do about an error, in one line; a defect is raised again."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        return "out of memory; try a smaller --batch-size"
    if isinstance(error, RuntimeError):  # a defect
        raise error
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}"
    return str(error)


def check_writable(path: Path) -> None:
    """Check, before long work, that a file can be written to `path`.

    Raises:
        ValueError: it cannot.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        with tempfile.NamedTemporaryFile(dir=path.absolute().parent, prefix=f"{path.name}."):
            pass
    except OSError as error:
        raise ValueError(
            f"{path}: cannot write there ({error.strerror}); name a file in a writable folder"
        ) from error


def software_versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "libmr"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def git_commit() -> str:
    """This code's commit, `+` where files were changed since; empty outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40",
               "--exclude=*", "--dirty=+"]  # fmt: skip
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # git is not installed
        return ""
