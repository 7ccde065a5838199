"""What others import: PyTorch Hub, an installed package, and requirements that agree."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_hub_loads_the_shipped_network_beside_another_module_called_models(monkeypatch):
    monkeypatch.setitem(sys.modules, "models", sys)
    network = torch.hub.load(str(ROOT), "dhr_net", source="local")
    assert network(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 10)
    assert not network.training


def test_package_requires_what_requirements_txt_lists_but_libmr():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = {line.split("#")[0].strip() for line in lines}
    assert set(PROJECT["project"]["dependencies"]) == {x for x in listed if "libmr" not in x}


def test_every_module_is_in_the_package():
    modules = {path.stem for path in ROOT.glob("*.py")} - {"hubconf"}
    assert set(PROJECT["tool"]["setuptools"]["py-modules"]) == modules


@pytest.mark.slow
def test_installed_package_can_be_imported_from_anywhere(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"]:
        (source / path.name).write_bytes(path.read_bytes())
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", target, source], check=True)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); import openmax; print(openmax.__file__)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == str(target / "openmax.py")
