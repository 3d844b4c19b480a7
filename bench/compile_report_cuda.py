"""What every CUDA kernel costs, read from its machine code, without a GPU: `python -m bench.compile_report_cuda [LIBRARY]`.

The SASS instructions of a built _C_cuda, by default this package's, are counted for each architecture in it. The table
(Markdown and JSON under bench/results) is committed, so that a change shows its cost in the diff. `--check` fails on a spill,
on a missing tensor-core instruction or 16-byte access, and on sm_90a without HGMMA or bulk copies. No kernel is run.

    slots   thread instructions a weight: those of the largest loop that makes a mask (of the whole kernel where it has no
            loop), times the threads of a block, over the weights that one turn of it handles. Branches for other cases (no
            noise, strides that do not allow 16-byte accesses) are in it, and a nested loop counts as one turn: where the
            tokens are looped over, that is less than what runs.
    widest  bytes of the widest load from global memory, a thread
    bulk    bulk copies into shared memory (UBLKCP, UTMALDG)
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from .compile_report import TOOLS, counted, gate_loop, parse, widest_load

OUTPUT = Path(__file__).parent / "results" / "compile_report_cuda"
# {kernel: (threads of a block, weights of one turn of its loop)}. A turn takes a span of 256 columns and 64 rows; of dx, 32
# rows; of the factors, 16
TURNS = {
    "forward": (128, 64 * 256), "forward_hopper": (128, 64 * 256), "input": (256, 32 * 256), "factors": (128, 16 * 256),
    "fold": (128, 64 * 64), "penalties": (128, 64 * 64),
}  # fmt: skip
# a kernel with fewer instructions is a stub: this architecture runs another one
EMPTY = 40


def output_of(tool: str, *arguments: str, cwd: str | None = None) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True, cwd=cwd)
    return done.stdout + done.stderr


def named(mangled: str) -> tuple[str, str]:
    """("forward", "bf16, ranks to 16, noise") from a mangled name."""
    kernel = re.search(r"\d+([a-z_]+)_kernel", mangled)[1]
    dtype = "bf16" if "4Bf16" in mangled else "fp16" if "4Half" in mangled else "fp32"
    flags = re.search(r"_kernelI.*?E((?:Lb[01]E|Li\d+E)*)E", mangled)[1]
    words = [("ranks over 16", "ranks to 16"), ("", "noise" if kernel.startswith("forward") else "penalties")]
    chosen = [names[int(flag)] for names, flag in zip(words, re.findall(r"Lb([01])E", flags), strict=False)]
    tiles = [f"{8 * int(count)} tokens" for count in re.findall(r"Li(\d+)E", flags)]
    return kernel, ", ".join([dtype, *filter(None, chosen), *tiles])


def rows_of(library: Path) -> list[dict]:
    """One row for each kernel of a library on each architecture that it has machine code for."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        output_of("cuobjdump", "-xelf", "all", str(library.resolve()), cwd=folder)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            arch = re.search(r"sm_(\d+a?)", cubin.name)[1]
            usage, code = output_of("cuobjdump", "-res-usage", str(cubin)), output_of("nvdisasm", "-c", str(cubin))
            # a section of code begins with a line of dashes around its name
            sections = {text.split(maxsplit=1)[0]: text for text in code.split("//--------------------- .text.")[1:]}
            for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage):
                code = parse(sections[name])
                if len(code) >= EMPTY:
                    rows.append(measure(arch, name, int(registers), int(stack), code))
    return sorted(rows, key=lambda row: (len(row["arch"].strip("a")), row["arch"], row["kernel"], row["variant"]))


def measure(arch: str, mangled: str, registers: int, stack: int, code: list) -> dict:
    kernel, variant = named(mangled)
    opcodes = Counter(instruction.opcode.split(".")[0] for instruction in code)
    row = {
        "arch": arch, "kernel": kernel, "variant": variant, "registers": registers, "stack": stack,
        "spills": opcodes["LDL"] + opcodes["STL"],
        "tensor": {name: opcodes[name] for name in ("HMMA", "HGMMA") if opcodes[name]},
        "bulk": opcodes["UBLKCP"] + opcodes["UTMALDG"], "widest": widest_load(code), "slots": None,
    }  # fmt: skip
    if kernel in TURNS:
        threads, weights = TURNS[kernel]
        row["slots"] = round(len(counted(gate_loop(code))) * threads / weights, 1)
    return row


def faults(row: dict) -> list[str]:
    """What is wrong with a row."""
    name = "sm_{arch} {kernel}, {variant}".format(**row)
    found = []
    if row["stack"] or row["spills"]:
        found.append(f"{row['stack']} bytes of stack, {row['spills']} loads and stores there")
    if row["kernel"] in TURNS and not row["tensor"]:
        found.append("no tensor-core instruction")
    if row["kernel"] in TURNS and row["widest"] < 16:
        found.append(f"loads of at most {row['widest']} bytes")
    if row["kernel"] == "forward_hopper" and not (row["tensor"].get("HGMMA") and row["bulk"]):
        found.append("no product of four warps or no bulk copy")
    return [f"{name}: {fault}" for fault in found]


HEADINGS = ("sm", "kernel", "variant", "registers", "stack", "tensor", "bulk", "widest", "slots")


def markdown(rows: list[dict]) -> str:
    lines = [
        "# What the CUDA kernels cost", "",
        "Written by `python -m bench.compile_report_cuda`, which says what each column counts. Nothing here was run, and none",
        "of these kernels has been timed.", "",
        "| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS),
    ]  # fmt: skip
    for row in rows:
        tensor = " ".join(f"{count} {name}" for name, count in row["tensor"].items())
        cells = (row["arch"], row["kernel"], row["variant"], row["registers"], row["stack"], tensor, row["bulk"], row["widest"],
                 row["slots"] or "")
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    built = find_spec("stamina_fast._C_cuda")
    parser.add_argument("library", type=Path, nargs="?", default=built and built.origin)
    parser.add_argument("--check", action="store_true", help="fail on a fault, and write nothing")
    options = parser.parse_args()
    if options.library is None:
        print("there is no _C_cuda in this package; install where nvcc is found, or name a library", file=sys.stderr)
        sys.exit(2)
    rows = rows_of(options.library)
    text = markdown(rows)
    if not options.check:
        OUTPUT.with_suffix(".md").write_text(text)
        OUTPUT.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    print(text)
    wrong = [fault for row in rows for fault in faults(row)]
    print(*wrong, sep="\n", file=sys.stderr)
    sys.exit(1 if options.check and wrong else 0)


if __name__ == "__main__":
    main()
