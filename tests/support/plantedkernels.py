"""A copy of the Triton kernels with a bug in it, behind a backend."""

import importlib
import shutil
from pathlib import Path

import kernelchecks
import pytest

import stamina_fast.kernels
from stamina_fast.ops.triton import Triton

KERNELS = Path(next(iter(stamina_fast.kernels.__path__)))


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A function that replaces a text in a copy of the kernels, and gives the backend that runs the copy."""

    def plant(module, old, new):
        package = f"planted_{tmp_path.name}"
        folder = tmp_path / package
        shutil.copytree(KERNELS, folder, ignore=shutil.ignore_patterns("__pycache__"))
        for path in folder.glob("*.py"):
            text = path.read_text()
            if path.stem == module:
                assert text.count(old), f"{path.name} no longer says {old!r}"
                text = text.replace(old, new)
            path.write_text(text.replace("stamina_fast.kernels", package))
        monkeypatch.syspath_prepend(tmp_path)
        philox = importlib.import_module(f"{package}.philox")
        for name in ("gate_open", "gate_slope"):
            monkeypatch.setattr(kernelchecks, name, getattr(philox, name))
        return Triton(package)

    return plant
