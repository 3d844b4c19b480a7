"""The Triton kernels compiled for GPUs that need not be present."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [("90", "fp16"), *(pytest.param(c, d, marks=pytest.mark.long) for c in ("80", "90", "100") for d in ("bf16", "fp32"))],
)
def test_compiles_without_a_gpu(capability, dtype):
    """Every kernel becomes machine code, in a process where the interpreter is off; half precision on tensor cores."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, script, capability, dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5, done.stdout
    instruction = {"80": "HMMA", "90": "HGMMA", "100": "UTCHMMA|HMMA"}[capability]
    for line in lines:
        assert "registers" in line, line
        if dtype != "fp32" and "sum_kernel" not in line:
            assert re.search(instruction, line), line
