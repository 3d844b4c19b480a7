"""Programs of tests/csrc/native from csrc by a plain compiler: nothing inlined, which compiles in a tenth of the time."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPU, NATIVE = ROOT / "csrc" / "cpu", ROOT / "tests" / "csrc" / "native"
GXX = shutil.which("g++")
CROSS = shutil.which("aarch64-linux-gnu-g++")

# as in CMakeLists.txt
FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    "avx512_bf16": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mavx512bf16"],
}
INLINE_NOTHING = ["-DSTAMINA_INLINE=inline", "-DSTAMINA_LAMBDA="]
COMMON = [
    "-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized",
    *INLINE_NOTHING,
]  # fmt: skip
SANITIZE = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def is_x86():
    return "x86_64" in subprocess.run([GXX, "-dumpmachine"], capture_output=True, text=True).stdout


def compiled(source, target, *flags, compiler=GXX):
    """An object, without a warning."""
    command = [compiler, *COMMON, *flags, "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr


def linked(target, objects, *flags, compiler=GXX):
    """A program; the instruction sets that it leaves out stay names without an address, which no run may ask for."""
    left_out = ["-no-pie", "-pthread", "-Wl,--unresolved-symbols=ignore-all"]
    subprocess.run([compiler, *flags, *map(str, objects), *left_out, "-o", str(target)], check=True, timeout=300)
    return target


def passed(*command):
    """Run a program of tests/csrc/native, which counts what it found wrong."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "0 failures\n"
