"""What every Triton kernel costs, read from its machine code, without a GPU: `python -m bench.compile_report`.

Each kernel and configuration that ships is compiled for each architecture, specialised as for a launch on the stack of Stable
Diffusion 1.5. Then its SASS instructions are counted. The table (Markdown and JSON under bench/results) is committed, so that a
change shows its cost in the diff. Rows of other Triton versions stay. `--check` fails on a spill, on a missing tensor-core
instruction, and on a budget exceeded by more than `EXCESSES` allows.

    slots   thread instructions a weight: those of the largest loop that makes a mask (of the whole kernel where it has no
            loop), times the threads of a program, over the weights that one turn of it handles. A nested loop (over
            tokens, or over further ranks) counts as one turn; the general branch for tau != 1 is left out.
    MUFU    of these, instructions of the special-function unit: exp2, reciprocal
    widest  bytes of the widest load from global memory into registers or shared memory, a thread
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stamina_fast.kernels import factors, fold, masked_linear, penalties, rebuild
from stamina_fast.kernels.tiles import choose

OUTPUT = Path(__file__).parent / "results" / "compile_report"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS = {
    "forward": masked_linear.forward_kernel,
    "input": masked_linear.input_kernel,
    "factors": factors.factors_kernel,
    "gate factors": factors.factors_kernel,
    "tau factors": factors.factors_kernel,
    "fold": fold.fold_kernel,
    "rebuild": rebuild.rebuild_kernel,
    "penalties": penalties.penalties_kernel,
    "penalty factors": factors.factors_kernel,
    "penalty gate factors": factors.factors_kernel,
    "tau penalty factors": factors.factors_kernel,
}
# the name of a kernel's configuration, where it differs from the kernel's
CONFIGURED = {"rebuild": "fold"}
# kernels without tokens
FOLDS = ("fold", "rebuild", "penalties")
ARCHITECTURES = (80, 89, 90, 100, 120)
RANKS = ((16, 16), (4, 64))
# the stack of SD 1.5 at batch 1 and 4
TOKENS = (77, 308)

# issue slots and special functions a weight
FORWARD, BACKWARD = (12.0, 1.0), (22.0, 2.0)
BUDGET = {kernel: FORWARD if kernel in ("forward", *FOLDS) else BACKWARD for kernel in KERNELS}
# Blackwell's data-centre parts have instructions of their own, which Triton uses for tiles that suit them
TENSOR_CORES = {90: ("HGMMA",), 100: ("UTCHMMA", "UTCQMMA", "HMMA")}
SPECIAL = re.compile(r"MUFU|I2F|F2I")
# columns of tensor memory of an SM: a kernel that asks for more compiles to a trap
TENSOR_MEMORY = 512


@dataclass(frozen=True)
class Excess:
    """A budget known to be exceeded: for a kernel on some architectures, up to these figures, for this reason."""

    kernel: str
    reason: str
    slots: float
    special: float = 2.0
    architectures: tuple[int, ...] = ARCHITECTURES
    ranks: tuple[tuple[int, int], ...] = RANKS
    # only with a Triton before this one
    before: tuple[int, int] = (99, 0)


GATE = "Philox is 3.5 slots and the gate with its select 7 before a load; bench/NOTES.md has the rest"
PIECES = "fp32 gradients go to tensor cores in pieces, and parts cut by words make noise again"
TWO_WARPS = "before Triton 3.8, four warps would ask for more tensor memory than there is"
WIDE = RANKS[1:]
EXCESSES = (
    Excess("forward", GATE, 27.0),
    Excess("forward", "the same, with four dots for a gate of rank 64", 42.0, ranks=WIDE),
    Excess("input", "four parts of a span where operands stand in registers: two make the same words", 34.0),
    Excess("input", "the same in eight parts, for a gate of rank 64", 67.0, ranks=WIDE),
    Excess("factors", PIECES, 72.0),
    Excess("factors", PIECES, 93.0, ranks=WIDE),
    Excess("gate factors", PIECES, 104.0),
    Excess("tau factors", "a logarithm without its own instruction; only where tau != 1", 140.0, 4.0),
    Excess("fold", "half of it is the load and the store of W", 26.0),
    Excess("rebuild", "as the fold, and the addresses of a task's factors", 34.0),
    Excess("rebuild", "the same, with four dots for a gate of rank 64", 57.0, ranks=WIDE),
    Excess("penalties", "the gate and A B before S is touched; a reciprocal for the density", 53.0),
    Excess("penalty factors", PIECES, 125.0),
    Excess("penalty gate factors", PIECES + "; one reciprocal more for the density", 140.0, 3.5),
    Excess("tau penalty factors", "as without penalties; only where tau != 1", 190.0, 6.5),
    Excess("forward", TWO_WARPS, 31.0, architectures=(100,), before=(3, 8)),
    Excess("input", TWO_WARPS, 42.0, architectures=(100,), before=(3, 8)),
    Excess("fold", TWO_WARPS, 43.0, architectures=(100,), before=(3, 8)),
    Excess("rebuild", TWO_WARPS, 63.0, architectures=(100,), before=(3, 8)),
)

IN_DTYPE = ("y_ptr", "x_ptr", "w_ptr", "g_ptr", "before_ptr")
INT64 = ("seed_ptr", "step_ptr", "tiles_ptr", "chunks_ptr", "table_ptr")
# innermost strides of contiguous tensors, which the launch makes constants
UNIT_STRIDES = ("stride_xk", "stride_wk", "stride_gn", "stride_mk", "stride_bk", "stride_sk")
# what only a launch with penalties gets
PENALTIES = ("past_ptr", "d_sparsity_ptr", "d_forgetting_ptr")
# arguments that a launch does not find divisible by 16
ODD = ("T", "tiles", "tasks")


@dataclass(frozen=True)
class Case:
    """One kernel, compiled as for a launch with N = 24,960, k = 768, contiguous arguments, fp32 factors and an fp32 master."""

    kernel: str
    arch: int
    dtype: str = "bf16"
    r: int = 16
    s: int = 16
    tokens: int = 77

    def compile(self):
        name = CONFIGURED.get(self.kernel, self.kernel)
        config = choose(name, self.tokens, max(self.r, self.s), DTYPES[self.dtype], self.arch)
        kernel = KERNELS[self.kernel]
        sizes = {"R": self.r, "S": self.s, "BLOCK_T": config.block_t, "ROW_STEP": 16, "BIAS": True, "ALIGNED": True}
        gate, tau = "gate" in self.kernel, self.kernel.startswith("tau")
        constants = sizes | config.constants(768) | {"PRECISION": config.precision, "PER_SPLIT": 10}
        constants |= {"OF_GATE": gate or tau, "UNIT_TAU": not tau}
        constants |= {"DTYPE": getattr(tl, str(DTYPES[self.dtype]).removeprefix("torch."))} | dict.fromkeys(UNIT_STRIDES, 1)
        if "penal" not in self.kernel:
            constants |= dict.fromkeys(("past_ptr", "d_sparsity_ptr", "d_forgetting_ptr"))
        elif not (gate or tau):
            constants |= {"d_sparsity_ptr": None}
        signature, values, attributes = {}, {}, {}
        for index, name in enumerate(kernel.arg_names):
            if name in constants:
                signature[name], values[(index,)] = "constexpr", constants[name]
                continue
            pointer = "i64" if name in INT64 else self.dtype if name in IN_DTYPE else "fp32"
            signature[name] = f"*{pointer}" if name.endswith("_ptr") else "i32"
            if name not in ODD:
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, values, attributes)
        return triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=config.launch()), config


@dataclass(frozen=True)
class Instruction:
    """One line of SASS: its labels, its predicate, its opcode, and the label it jumps to."""

    labels: tuple[str, ...]
    predicate: str
    opcode: str
    target: str | None


def disassemble(binary: bytes) -> tuple[list[Instruction], int, int]:
    """(instructions, registers, bytes of stack) of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True)
        code = subprocess.run([TOOLS / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups()
    return parse(code), int(registers), int(stack)


def parse(code: str) -> list[Instruction]:
    instructions, labels = [], []
    for line in code.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels.append(label[1])
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", line):
            target = re.search(r"`\((\.L_\w+)\)", found[3])
            jumps = target[1] if target and found[2].startswith("BRA") else None
            instructions.append(Instruction(tuple(labels), (found[1] or "").strip(), found[2], jumps))
            labels = []
    return instructions


def gate_loop(code: list[Instruction]) -> list[Instruction]:
    """The largest loop body with an exponential, or else the whole code up to its last exit."""
    at = {label: index for index, instruction in enumerate(code) for label in instruction.labels}
    bodies = [code[at[i.target] : n + 1] for n, i in enumerate(code) if i.target in at and at[i.target] < n]
    bodies = [body for body in bodies if any(i.opcode.startswith("MUFU.EX2") for i in body)]
    if bodies:
        return max(bodies, key=len)
    return code[: max(n for n, i in enumerate(code) if i.opcode == "EXIT") + 1]


def counted(body: list[Instruction]) -> list[Instruction]:
    """A body without padding, and without the blocks with a logarithm, which only tau != 1 needs."""
    blocks, block = [], []
    for instruction in body:
        if instruction.labels and block:
            blocks.append(block)
            block = []
        block.append(instruction)
        if instruction.target:
            blocks.append(block)
            block = []
    blocks.append(block)
    return [i for b in blocks if not any(i.opcode == "MUFU.LG2" for i in b) for i in b if i.opcode != "NOP"]


def widest_load(code: list[Instruction]) -> int:
    """Bytes a thread of the widest load from global memory."""
    widths = [4]
    for instruction in code:
        parts = instruction.opcode.split(".")
        if parts[0] in ("LDG", "LDGSTS"):
            widths += [int(part) // 8 for part in parts if part in ("64", "128", "256")]
    return max(widths)


def measure(case: Case) -> dict:
    """One row of the report."""
    compiled, config = case.compile()
    code, registers, stack = disassemble(compiled.asm["cubin"])
    body = counted(gate_loop(code))
    per_weight = 32 * config.num_warps / (config.block_n * config.columns)
    opcodes = Counter(i.opcode.split(".")[0] for i in code)
    tensor = {name: opcodes[name] for name in ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA") if opcodes[name]}
    return {
        "triton": triton.__version__,
        **asdict(case),
        "config": f"{config.block_n}x{config.block_t}x{config.columns}/{config.width}",
        "registers": registers,
        "stack": stack,
        "spills": opcodes["LDL"] + opcodes["STL"],
        "shared": compiled.metadata.shared,
        "tensor_memory": compiled.metadata.tmem_size or 0,
        "tensor": tensor,
        "widest": widest_load(code),
        "slots": round(len(body) * per_weight, 1),
        "special": round(sum(bool(SPECIAL.match(i.opcode)) for i in body) * per_weight, 2),
    }


def faults(row: dict) -> list[str]:
    """What is wrong with a row: any spill, no tensor cores, or a budget exceeded beyond what `EXCESSES` allows."""
    name = "{triton} sm_{arch} {dtype} {kernel} r={r} s={s} T={tokens}".format(**row)
    found = []
    wanted = TENSOR_CORES.get(row["arch"], ("HMMA",))
    if row["dtype"] != "fp32" and not any(row["tensor"].get(opcode) for opcode in wanted):
        found.append(f"tensor-core instructions {row['tensor'] or 'none'}, wanted {' or '.join(wanted)}")
    if row["tensor_memory"] > TENSOR_MEMORY:
        found.append(f"{row['tensor_memory']} columns of tensor memory, of {TENSOR_MEMORY}")
    if row["stack"] or row["spills"]:
        found.append(f"{row['stack']} bytes of stack, {row['spills']} loads and stores there")
    slots, special = BUDGET[row["kernel"]]
    version = tuple(int(part) for part in row["triton"].split(".")[:2])
    for excess in EXCESSES:
        case = row["arch"] in excess.architectures and (row["r"], row["s"]) in excess.ranks and version < excess.before
        if case and row["kernel"] == excess.kernel:
            slots, special = max(slots, excess.slots), max(special, excess.special)
    if row["slots"] > slots:
        found.append(f"{row['slots']} slots a weight, at most {slots}")
    if row["special"] > special:
        found.append(f"{row['special']} special functions a weight, at most {special}")
    return [f"{name}: {fault}" for fault in found]


def cases(kernels, architectures, dtypes, ranks, tokens) -> list[Case]:
    """Every case of a product. Folds have no tokens; only the main ranks have several batches."""
    every = (Case(k, a, d, r, s, t) for a, k, d, (r, s), t in product(architectures, kernels, dtypes, ranks, tokens))
    first = {k: tokens[:1] if k in FOLDS else tokens for k in kernels}
    return [c for c in every if c.tokens == tokens[0] or (c.tokens in first[c.kernel] and (c.r, c.s) == ranks[0])]


HEADINGS = ("Triton", "sm", "kernel", "dtype", "r, s", "tokens", "tile", "registers", "stack", "shared", "tensor", "widest")


def markdown(rows: list[dict]) -> str:
    lines = [
        "# What the Triton kernels cost",
        "",
        "Written by `python -m bench.compile_report`, which says what each column counts. Nothing here was run.",
        "",
        "| " + " | ".join((*HEADINGS, "slots", "MUFU")) + " |",
        "|" + "---|" * (len(HEADINGS) + 2),
    ]
    for row in rows:
        tensor = " ".join(f"{count} {name}" for name, count in row["tensor"].items())
        cells = (
            row["triton"], row["arch"], row["kernel"], row["dtype"], f"{row['r']}, {row['s']}", row["tokens"], row["config"],
            row["registers"], row["stack"], row["shared"], tensor, row["widest"], row["slots"], row["special"],
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def write(rows: list[dict], output: Path) -> None:
    """Put `rows` in place of those of the same Triton version and case, in JSON and Markdown."""

    def key(row: dict) -> tuple:
        return (tuple(map(int, row["triton"].split("."))), *(row[field] for field in asdict(Case("", 0))))

    path = output.with_suffix(".json")
    kept = json.loads(path.read_text()) if path.exists() else []
    merged = {key(row): row for row in (*kept, *rows)}
    rows = [merged[k] for k in sorted(merged)]
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    output.with_suffix(".md").write_text(markdown(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="default: all; may be repeated, as the next two")
    parser.add_argument("--arch", action="append", type=int, choices=ARCHITECTURES)
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: bf16 and fp16")
    parser.add_argument("--quick", action="store_true", help="only the main ranks and batch")
    parser.add_argument("--check", action="store_true", help="fail on a spill, missing tensor cores or a budget exceeded")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--output", type=Path, help=f"default where nothing is left out: {OUTPUT.relative_to(OUTPUT.parents[2])}"
    )
    arguments = parser.parse_args()
    whole = not (arguments.kernel or arguments.arch or arguments.dtype or arguments.quick)
    output = arguments.output or (OUTPUT if whole else None)
    chosen = cases(
        arguments.kernel or list(KERNELS), arguments.arch or ARCHITECTURES, arguments.dtype or ("bf16", "fp16"),
        RANKS[:1] if arguments.quick else RANKS, TOKENS[:1] if arguments.quick else TOKENS,
    )  # fmt: skip
    rows = []
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for row in pool.map(measure, chosen):
            print(json.dumps(row), flush=True)
            rows.append(row)
    if output:
        write(rows, output)
    problems = [fault for row in rows for fault in faults(row)]
    print("\n".join(problems), file=sys.stderr)
    if arguments.check and problems:
        raise SystemExit(f"{len(problems)} faults in {len(rows)} cases")


if __name__ == "__main__":
    main()
