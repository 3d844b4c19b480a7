"""Sizes over 32 bits: every offset has 64 bits, read from the compiled kernels and shown on memory that far apart."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from cases import DEVICE, everything, problem, run
from checked import Checked, kernel_names
from plantedkernels import KERNELS, copy  # noqa: F401
from triton.runtime.errors import InterpreterError

from stamina_fast.ops.backend import Factors
from stamina_fast.ops.triton import Triton

# what shows a change in a module
SHOWS = {
    "philox": ["fold"], "masked_linear": ["forward", "input"], "factors": ["gate factors", "sum"], "penalties": ["penalties"],
    "fold": ["fold"], "rebuild": ["rebuild"],
}  # fmt: skip


def offsets(package, *kernels, path="."):
    """What tests/support/ttir.py reads, in a process where Triton's interpreter is off."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(path), environment.get("PYTHONPATH"))))
    command = [sys.executable, Path(__file__).parents[1] / "support" / "ttir.py", package, *kernels]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_offsets_have_64_bits():
    read = offsets("stamina_fast.kernels")
    assert {found["kernel"] for found in read.values()} == kernel_names()
    for kernel, found in read.items():
        assert found["faults"] == [], kernel
        assert found["missing"] == [], kernel
        assert found["addresses"] >= 5, kernel


def narrowed():
    """(module, line, the line with 32 bits where it has 64) for every such line in the kernels."""
    for path in sorted(Path(KERNELS).glob("*.py")):
        body = ast.parse(path.read_text()).body
        jitted = [node for node in body if isinstance(node, ast.FunctionDef) and node.decorator_list]
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if "tl.int64" in line and any(node.lineno <= number <= node.end_lineno for node in jitted):
                yield path.stem, line, line.replace("tl.int64", "tl.int32")


NARROWED = [
    pytest.param(*case, id=f"{case[0]}: {case[1].strip()}", marks=[pytest.mark.long] if i % 4 else [])
    for i, case in enumerate(narrowed())
]


@pytest.mark.parametrize(("module", "line", "planted"), NARROWED)
def test_32_bits_are_caught(module, line, planted, copy, tmp_path):  # noqa: F811
    read = offsets(copy(module, line, planted).package, *SHOWS[module], path=tmp_path)
    assert any(found["faults"] for found in read.values())


# ---- memory so far apart -------------------------------------------------------------------------------------------

interpreted = pytest.mark.skipif(DEVICE.type == "cuda", reason="through the interpreter; tests/gpu has a GPU's")
# elements between two rows: fits 32 bits, twice as much does not
FAR = (1 << 30) + 16


@pytest.fixture
def far(tmp_path):
    """A function that moves the rows of a matrix FAR elements apart, in a file of which only the pages touched exist."""
    rows = 5
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=4 * rows * FAR, dtype=torch.uint8)
    used = 0

    def move(tensor):
        nonlocal used
        room = memory.view(tensor.dtype).as_strided(tensor.shape, (FAR, 1), used // tensor.element_size())
        used += 4096
        return room.copy_(tensor)

    yield move
    assert (tmp_path / "sparse").stat().st_blocks * 512 < 1 << 24


@interpreted
def test_rows_past_32_bits(far):
    """Every matrix whose strides are the caller's, with its rows so far apart: the bits of the same rows side by side."""
    sizes = (3, 1)
    plain = problem(3, 40, sizes, 2, 1, torch.float16)
    backend, factors = Triton(), Factors(*plain[3:])
    expected = everything(backend, plain, sizes)
    grad, x, weight, past = map(far, (*plain[:3], plain[2]))
    master, rebuilt, kept = far(plain[2].float()), far(plain[2]), far(plain[2].float())
    tasks = [factors, Factors(*factors[:2])]
    with Checked():
        made = run(backend, grad, x, weight, *plain[3:], sizes, past=past)
        backend.fold_(weight, factors, sizes, None)
        alone = weight.clone()
        weight.copy_(plain[2])
        backend.fold_(weight, factors, sizes, master)
    backend.rebuild_(rebuilt, far(plain[2]), tasks, sizes, kept)
    for one, other in zip((*made, alone, weight, master, rebuilt, kept), expected, strict=True):
        assert torch.equal(one, other)


@interpreted
def test_rows_past_32_bits_are_lost_with_32(far, copy):  # noqa: F811
    """The memory is far enough apart: an offset in 32 bits comes out somewhere else."""
    backend = copy("masked_linear", "program_id(1).to(tl.int64)", "program_id(1)")
    grad, x, *rest = problem(3, 40, (3, 1), 2, 1, torch.float16)
    with pytest.raises(InterpreterError, match=r"outside|overflow"), Checked():
        run(backend, grad, far(x), *rest, (3, 1))
