"""How the kernels compute addresses, read from Triton's first intermediate language; no GPU is needed.

`python ttir.py PACKAGE [KERNEL...]` compiles the compile report's kernels, from PACKAGE, for sm_90 with strides that are known
only at run time, and prints as JSON, for each, the faults, how many addresses there are, and strides that make none of them.
The interpreter must be off.

An offset may be computed in 32 bits only as a piece's number (a program's index, a loop's) times the piece, at most a span of
columns, plus a place in the piece: that stays next to a size, which has 32 bits itself. Any other product, any sum of two that
grow, and any value cut down to 32 bits is a fault.
"""

import json
import re
import sys
from importlib import import_module
from unittest.mock import patch

SPAN = 256
# what is looked through on the way to a leaf of an offset
LEAVES = ("arith.constant", "tt.make_range", "tt.get_program_id", "tt.get_num_programs", "tt.load")
SHAPED = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "arith.extsi", "arith.extui")


class Offsets:
    """The definitions of one kernel's values, and what stands in its offsets."""

    def __init__(self, text):
        self.operation, self.operands, self.type, self.constants = {}, {}, {}, {}
        self.indices, self.offsets = set(), []
        self.strides = set()
        # of each region that is open: its names, since regions side by side may use one twice, and what its yield gives
        self.regions = [({}, [])]
        for line in text.splitlines():
            self.take(re.sub(r" loc\(.*\)$", "", line.strip()))
        if len(self.regions) != 1 or not self.offsets:
            raise ValueError("this is not read as it was; the language has changed")

    def value(self, name):
        """The value that a name stands for here; an argument is its own name."""
        return next((names[name] for names, _ in reversed(self.regions) if name in names), name)

    def define(self, region, name, operation, operands, kind=""):
        value = f"{name} ({len(self.operation)})"
        self.operation[value], self.operands[value], self.type[value] = operation, operands, kind
        region[0][name] = value
        return value

    def take(self, line):
        """One line of the text."""
        closed = self.regions.pop() if line.startswith("}") else None
        found = re.match(r'(%[\w.]+)(?::\d+)? = "?([\w.]+)"?(.*)', line)
        name, operation, rest = found.groups() if found else (None, line.split(" ")[0], line)
        operands = [self.value(o) for o in re.findall(r"%[\w.]+", rest)]
        self.strides.update(o for o in operands if o.startswith("%stride_") and name)
        made = [self.define(self.regions[-1], name, operation, operands, re.split(r" (?:to|->|:) ", rest)[-1])] if name else []
        if operation == "scf.yield":
            for value in self.regions[-1][1]:
                self.operands[value] += operands
        if operation == "arith.constant" and (number := re.search(r"(?:dense<)?(-?\d+)>? : ", rest)):
            self.constants[made[0]] = int(number[1])
        if operation == "tt.addptr":
            self.offsets.append(operands[1])
        if line.endswith("{"):
            # an else gives what its if gives
            inner = ({}, closed[1] if closed else made)
            if operation == "scf.for":
                self.indices.add(self.define(inner, re.search(r"%[\w.]+", rest)[0], operation, []))
                for carried, start in re.findall(r"(%[\w.]+) = (%[\w.]+)", rest.partition("iter_args")[2]):
                    inner[1].append(self.define(inner, carried, "carried", [self.value(start)]))
            self.regions.append(inner)

    def base(self, value):
        """What a value is before it is given a shape."""
        while self.operation.get(value) in SHAPED:
            value = self.operands[value][0]
        return value

    def constant(self, value):
        return self.constants.get(self.base(value))

    def piece(self, value):
        """The number of a piece: a program's index, a loop's, or a quotient of one."""
        value = self.base(value)
        if self.operation.get(value) == "arith.divsi":
            return self.piece(self.operands[value][0]) and self.constant(self.operands[value][1]) is not None
        return value in self.indices or self.operation.get(value) == "tt.get_program_id"

    def small(self, value):
        """Whether no size can make it grow: made of constants, places in a piece and remainders."""
        value = self.base(value)
        operation = self.operation.get(value)
        if operation == "arith.remsi":
            return self.constant(self.operands[value][1]) is not None
        if operation in ("arith.addi", "arith.muli"):
            return all(map(self.small, self.operands[value]))
        return operation in ("arith.constant", "tt.make_range")

    def fault(self, value):
        """Whether the operation that makes this value may lose bits of an address."""
        operation, operands = self.operation[value], self.operands[value]
        if operation == "arith.trunci":
            return True
        if not re.search(r"\bi32>?$|xi32>?$", self.type[value]) or self.small(value):
            return False
        if operation in ("arith.muli", "arith.shli"):
            factors = [self.constant(o) for o in operands]
            return not any(
                factor is not None and 0 <= factor <= SPAN and self.piece(other)
                for factor, other in zip(factors, reversed(operands), strict=True)
            )
        return operation in ("arith.addi", "arith.subi", "arith.ori") and not any(map(self.small, operands))

    def read(self):
        """The faults, how many addresses there are, and the strides that none of them is made of."""
        seen, todo = set(), list(self.offsets)
        while todo:
            value = todo.pop()
            if value not in seen:
                seen.add(value)
                todo += [] if self.operation.get(value) in LEAVES else self.operands.get(value, [])
        wrong = sorted(value for value in seen if value in self.operation and self.fault(value))
        faults = [f"{v} = {self.operation[v]} {', '.join(self.operands[v])} : {self.type[v]}" for v in wrong]
        return {"faults": faults, "addresses": len(self.offsets), "missing": sorted(self.strides - seen)}


class Compiled(Exception):
    """Carries the text out of the compiler once it is there."""


def first_language(compile_):
    """The first intermediate text of what `compile_` compiles, which goes no further."""
    from triton.backends.nvidia.compiler import CUDABackend

    whole = CUDABackend.add_stages

    def stages_until(self, stages, *rest):
        whole(self, stages, *rest)

        def stop(module, metadata):
            raise Compiled(str(module))

        stages["ttgir"] = stop

    with patch.object(CUDABackend, "add_stages", stages_until):
        try:
            compile_()
        except Compiled as compiled:
            return str(compiled)
    raise RuntimeError("Triton no longer has a stage ttgir")


def sum_kernel(factors):
    """The one kernel that the compile report leaves out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"out_ptr": "*fp32", "part_ptr": "*fp32", "ranges_ptr": "*i64", "BLOCK": "constexpr"}
    names = factors.sum_kernel.arg_names
    signature = {name: types.get(name, "i32") for name in names}
    source = ASTSource(factors.sum_kernel, signature, {(names.index("BLOCK"),): factors.BLOCK_SUM}, {})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))


def main(package, *kernels):
    from stamina_fast.bench import compile_report

    compile_report.UNIT_STRIDES = ()
    read = {}
    for kernel in kernels or (*compile_report.KERNELS, "sum"):
        plain = compile_report.KERNELS.get(kernel, compile_report.factors.sum_kernel)
        module = import_module(f"{package}.{plain.__module__.rpartition('.')[2]}")
        if kernel == "sum":
            text = first_language(lambda: sum_kernel(module))  # noqa: B023
        else:
            compile_report.KERNELS[kernel] = getattr(module, plain.__name__)
            text = first_language(compile_report.Case(kernel, 90).compile)
        read[kernel] = {"kernel": plain.__name__, **Offsets(text).read()}
    print(json.dumps(read))


if __name__ == "__main__":
    main(*sys.argv[1:])
