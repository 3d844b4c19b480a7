"""csrc/cuda compiled by a plain compiler: its kernels, launches and bindings run on the CPU, thread by thread."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
EMULATION = ROOT / "tests" / "csrc" / "cuda"
COMPILER = shutil.which("g++") or shutil.which("c++")


def build(folder: Path, *more: str) -> Path:
    """The operators of stamina_fast/ops/cuda.py for tensors of the CPU, as a library in `folder`, with `more` flags."""
    torch_folder = Path(torch.__file__).parent
    flags = [
        "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror",
        "-Wno-unknown-pragmas", f'-DSTAMINA_EMULATED="{EMULATION}/emulated.h"', "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-isystem", str(torch_folder / "include"), *more,
    ]  # fmt: skip
    sources = [*sorted(SOURCES.glob("*.cu")), SOURCES / "bindings.cpp", EMULATION / "choices.cpp"]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = [COMPILER, *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return target

    with ThreadPoolExecutor(2) as workers:
        objects = list(workers.map(compiled, sources))
    library = folder / "emulated_cuda.so"
    link = [COMPILER, "-shared", *more, "-o", str(library), *map(str, objects), f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    subprocess.run(link, check=True)
    return library
