"""`python compile_kernels.py CAPABILITY DTYPE`: compile every kernel for a GPU and print what it takes.

No GPU is needed, but Triton's interpreter must be off. CAPABILITY: 80, 90, 100, ...; DTYPE: fp16, bf16 or fp32. One line
a kernel: shared memory, registers, bytes of stack (spills), and the tensor-core instructions in the machine code.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stamina_fast.kernels import factors, fold, masked_linear
from stamina_fast.kernels.tiles import choose

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
KERNELS = {
    "forward": masked_linear.forward_kernel,
    "input": masked_linear.input_kernel,
    "factors": factors.factors_kernel,
    "fold": fold.fold_kernel,
    "sum": factors.sum_kernel,
}
IN_DTYPE = ("y_ptr", "x_ptr", "w_ptr", "g_ptr")
INT64 = ("seed_ptr", "step_ptr", "tiles_ptr", "chunks_ptr", "ranges_ptr")
# innermost strides of contiguous tensors, which the launch makes constants
UNIT_STRIDES = ("stride_xk", "stride_wk", "stride_gn", "stride_mk")
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")


def source(kernel, dtype: str, config) -> ASTSource:
    """The kernel as a launch on the stack of SD 1.5 specializes it: 77 tokens, ranks 16, contiguous, fp32 factors."""
    sizes = {"R": 16, "S": 16, "BLOCK_N": config.block_n, "BLOCK_T": config.block_t, "SUBTILES": 8}
    constants = sizes | {"PRECISION": config.precision, "PER_SPLIT": 10, "BLOCK": factors.BLOCK_SUM}
    constants |= dict.fromkeys(UNIT_STRIDES, 1)
    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
            continue
        pointer = "i64" if name in INT64 else dtype if name in IN_DTYPE else "fp32"
        signature[name] = f"*{pointer}" if name.endswith("_ptr") else "i32"
        if name not in ("T", "tiles"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, values, attributes)


def resources(binary: bytes) -> str:
    """Registers, stack, shared memory and tensor-core instructions of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True)
        code = subprocess.run([TOOLS / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups()
    count = Counter(re.findall(rf"\b({'|'.join(TENSOR_CORES)}|LDL|STL)\b", code))
    instructions = (f"{number} {name}" for name, number in sorted(count.items()))
    return ", ".join([f"{registers} registers", f"{stack} bytes of stack", *instructions])


def main(capability: str, dtype: str) -> None:
    target = GPUTarget("cuda", int(capability), 32)
    for name, kernel in KERNELS.items():
        config = choose(name, 77, DTYPES[dtype], int(capability))
        options = {} if name == "sum" else config.launch()
        compiled = triton.compile(source(kernel, dtype, config), target=target, options=options)
        # a kernel that asks for more tensor memory than there is compiles to a trap
        if (compiled.metadata.tmem_size or 0) > 512:
            raise SystemExit(f"{kernel.__name__} takes {compiled.metadata.tmem_size} columns of tensor memory, of 512")
        shared = f"{compiled.metadata.shared} bytes shared"
        print(f"sm_{capability} {dtype} {kernel.__name__}: {shared}, {resources(compiled.asm['cubin'])}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
