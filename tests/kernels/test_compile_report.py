"""What the kernels compile to, and the reading of machine code; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def report(*arguments: str) -> subprocess.CompletedProcess:
    """`python -m bench.compile_report` in a process where Triton's interpreter is off."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.compile_report", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)


def test_check_of_the_quick_kernels(tmp_path):
    done = report("--quick", "--check", "--arch", "90", "--dtype", "bf16", "--kernel", "fold", "--output", str(tmp_path / "r"))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "r.json").read_text())
    assert row["stack"] == row["spills"] == 0
    assert row["tensor"]["HGMMA"] > 0
    assert "| 90 | fold | bf16 |" in (tmp_path / "r.md").read_text()


@pytest.mark.long
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_check_of_every_kernel(arch):
    done = report("--quick", "--check", "--arch", arch)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_fp32_compiles(arch):
    done = report("--quick", "--arch", arch, "--dtype", "fp32")
    assert done.returncode == 0, done.stderr


READ = """
from bench.compile_report import Case, counted, faults, gate_loop, parse, widest_load
code = parse('''
        /*0000*/                   LDG.E.128 R4, [R2] ;
.L_x_1:
        /*0010*/                   MUFU.EX2 R5, R5 ;
        /*0020*/              @P0 BRA `(.L_x_2) ;
        /*0030*/                   MUFU.LG2 R6, R5 ;
        /*0040*/                   FMUL R6, R6, R5 ;
.L_x_2:
        /*0050*/                   NOP ;
        /*0060*/             @!P1 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
''')
assert [i.opcode for i in counted(gate_loop(code))] == ["MUFU.EX2", "BRA", "BRA"]
assert widest_load(code) == 16
row = dict(triton="3.9.0", kernel="fold", arch=90, dtype="bf16", r=16, s=16, tokens=77, stack=8, spills=1, tensor={"HMMA": 1},
           tensor_memory=600, slots=99.0, special=9.0)
print(*faults(row), sep="\\n")
"""


COMMITTED = """
import json
from bench.compile_report import ARCHITECTURES, KERNELS, OUTPUT, faults
rows = json.loads(OUTPUT.with_suffix(".json").read_text())
found = {(row["triton"].rpartition(".")[0], row["kernel"], row["arch"], row["dtype"]) for row in rows}
versions = {version for version, *_ in found}
assert "3.6" in versions and len(versions) > 1, versions
assert found == {(v, k, a, d) for v in versions for k in KERNELS for a in ARCHITECTURES for d in ("bf16", "fp16")}
print(*(fault for row in rows for fault in faults(row)), sep="\\n")
"""


def without_interpreter(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_faults_are_found():
    said = without_interpreter(READ)
    for fault in ("8 bytes of stack", "wanted HGMMA", "600 columns of tensor memory", "99.0 slots", "9.0 special functions"):
        assert fault in said


def test_the_committed_report_is_whole_and_without_a_fault():
    """Of the oldest Triton that is supported and of a newer one: every kernel and architecture, and no spill."""
    assert without_interpreter(COMMITTED).strip() == ""
