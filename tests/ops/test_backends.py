"""What every backend promises: the reference, the CPU on every instruction set, and Triton, in its interpreter or on a GPU.

The checks are tests/support/checks.py. What one backend alone has is tested in test_cpu.py and in tests/kernels; the CUDA
kernels, emulated, in tests/csrc.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import checks
from cases import DEVICE

from stamina_fast.ops import cpu
from stamina_fast.ops.reference import Reference
from stamina_fast.ops.triton import Triton, interpreted

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")
SETS = ("avx512_bf16", "avx512", "avx2", "generic")
BACKENDS = {"reference": Reference(), **{f"cpu {name}": cpu.Cpu(name) for name in SETS}, "triton": Triton()}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture(params=BACKENDS)
def backend(request):
    chosen = BACKENDS[request.param]
    if refusal := chosen.missing() or chosen.refusal(DEVICE, torch.float32):
        pytest.skip(refusal)
    if isinstance(chosen, cpu.Cpu) and chosen.instructions not in cpu.instruction_sets():
        pytest.skip(f"this machine has {' '.join(cpu.instruction_sets())}")
    return chosen


def dtypes(backend, *wanted):
    return [dtype for dtype in wanted or DTYPES if not backend.refusal(DEVICE, dtype)]


def measured(backend, *wanted):
    """The dtypes whose digits are compared: of the reference float64 alone, since it loses some in the others."""
    return [torch.float64] if isinstance(backend, Reference) else dtypes(backend, *wanted)


def few(backend, *found):
    """The last of these dtypes where the interpreter makes each take seconds, and else all."""
    return found[-1:] if isinstance(backend, Triton) and interpreted() else found


@pytest.mark.parametrize("penalised", [False, True], ids=["", "penalties"])
@pytest.mark.parametrize("shape", checks.SHAPES, ids=str)
def test_equals_the_specification(backend, shape, penalised):
    half = [torch.bfloat16, torch.float16]
    found = measured(backend, torch.float64, *((torch.float32, *half) if penalised else (*half, torch.float32)))
    for dtype in few(backend, *found):
        checks.equals_the_specification(backend, shape, dtype, penalised)


@pytest.mark.parametrize("shape", checks.EMPTY)
def test_empty(backend, shape):
    for dtype in measured(backend, torch.float32, torch.bfloat16, torch.float16):
        checks.equals_the_specification(backend, checks.EMPTY[shape], dtype, True)


@pytest.mark.parametrize("which", checks.VARIANTS)
def test_variants(backend, which):
    for dtype in few(backend, *measured(backend, torch.float64, torch.bfloat16, torch.float16, torch.float32)):
        checks.variant(backend, which, dtype, False)
    for dtype in few(backend, *measured(backend)):
        checks.variant(backend, which, dtype, True)


@pytest.mark.parametrize("which", checks.NOTHING)
def test_nothing_to_multiply(backend, which):
    if isinstance(backend, Reference) and which == "no projections":
        pytest.skip("the operators refuse it before")
    checks.nothing_to_multiply(backend, *checks.NOTHING[which])


def test_small_integers_are_exact(backend):
    for dtype in dtypes(backend, torch.float32, torch.float16, torch.bfloat16):
        checks.small_integers_are_exact(backend, dtype)


@pytest.mark.parametrize("kind", ["transposed", "gaps", "offset"])
def test_strides_change_no_bit(backend, kind):
    if isinstance(backend, Reference):
        pytest.skip("torch multiplies a transposed matrix in another order")
    for dtype in few(backend, *dtypes(backend, torch.float32, torch.bfloat16, torch.float16)):
        checks.strides(backend, kind, dtype)


def test_expanded_arguments(backend):
    checks.expanded_arguments(backend)


def test_masks_are_one(backend):
    for dtype in few(backend, *dtypes(backend, torch.float32, torch.bfloat16, torch.float16)):
        checks.masks_are_one(backend, dtype, 70 if isinstance(backend, Triton) else 270)


def test_stream_layout(backend):
    checks.stream_layout(backend)


def test_extreme_logits(backend):
    checks.extreme_logits(backend)
    checks.extreme_penalties(backend)


@pytest.mark.parametrize("with_master", [False, True], ids=["alone", "master"])
def test_fold(backend, with_master):
    for dtype in dtypes(backend):
        checks.fold(backend, dtype, with_master)


def test_fold_keeps_negative_zero(backend):
    checks.fold_keeps_negative_zero(backend)


def test_rebuild(backend):
    for dtype in few(backend, *dtypes(backend)):
        checks.rebuild(backend, dtype)


def test_every_element_is_written(backend):
    for dtype in dtypes(backend, torch.float16):
        checks.every_element_is_written(backend, dtype)


def test_nothing_of_the_weights_size_is_made(backend):
    if isinstance(backend, Reference):
        pytest.skip("the reference makes W + M ⊙ A B")
    checks.nothing_of_the_weights_size_is_made(backend)


@pytest.mark.parametrize("count", [10, pytest.param(1000, marks=pytest.mark.long)])
def test_repeats_are_bit_equal(backend, count):
    for dtype in dtypes(backend, torch.float16):
        checks.repeats_are_bit_equal(backend, dtype, count)


def test_results_share_no_memory(backend):
    checks.results_share_no_memory(backend)


@pytest.mark.parametrize("kind", ["sparsity", "forgetting"])
def test_one_penalty_without_the_other(backend, kind):
    if isinstance(backend, Reference):
        pytest.skip("it loses digits of the slope in float32")
    for tau in (0.7, 1.0):
        checks.one_penalty_without_the_other(backend, kind, tau)
