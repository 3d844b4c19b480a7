"""The kernels' tests have teeth: each of these bugs, planted in a copy of the kernels, makes one of them fail.

A bug is a file, what stands there, and what is planted instead. The tests are those of tests/support/checks.py and
kernelchecks.py, which test_backends.py and test_kernels.py call with the kernels as they are.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import checks
import kernelchecks
from plantedkernels import KERNELS, copy  # noqa: F401

PLANTED = {
    # the stream
    "the halves of a word change places": ("philox", "half = (word >> 16) if J % 2", "half = (word >> 16) if J % 2 == 0"),
    "every span draws the noise of the first": ("philox", "+ part // PARTS * LANES + part", "+ part"),
    "rows repeat their noise": ("philox", "rows.to(tl.uint32)[:, None], step", "(rows % 64).to(tl.uint32)[:, None], step"),
    "the upper half of the step is lost": ("philox", "(step >> 32).to", "(step >> 63).to"),
    "another number of rounds": ("philox", "ROUNDS = tl.constexpr(7)", "ROUNDS = tl.constexpr(8)"),
    "u can be 0": ("philox", "(128 - 2**-17)", "128.0"),
    # the gate
    "the deterministic gate is upside down": ("philox", "is_open = product > -bias", "is_open = product < -bias"),
    "the deterministic gate forgets c": ("philox", "is_open = product > -bias", "is_open = product > 0 * bias"),
    "c has the wrong sign": ("philox", "bias * -LOG2E", "bias * LOG2E"),
    "the odds are taken for their inverse": ("philox", "is_open = u > odds_against", "is_open = u < odds_against"),
    "exp2 without its factor": ("philox", "scale = tl.full(product.shape, -LOG2E", "scale = tl.full(product.shape, -1.0"),
    "what is masked is kept": ("philox", "delta = tl.where(gate_open(product, bias, words, J), delta, 0.0)",
                               "delta = tl.where(gate_open(product, bias, words, J), 0.0, delta)"),
    "the slope is s squared": ("philox", "slope = (u * inverse) * (v * inverse)", "slope = (u * inverse) * (u * inverse)"),
    "the slope forgets 1 / tau": ("philox", "(inverse * (1 / tau))", "inverse"),
    "the slope forgets the noise": ("philox", "tl.log2((u * inverse) * inverse) - minus_logit", "-minus_logit"),
    "only the first ranks count": ("philox", "for r0 in tl.static_range(0, RANK, STEP)",
                                   "for r0 in tl.static_range(0, STEP, STEP)"),
    # tiles
    "a tile runs into the next projection": ("tables", "min(row + block, stop)", "min(row + block, sum(sizes))"),
    "the last columns belong to nobody": ("tiles", "subtiles = -(-min(k, self.columns * self.groups) // LANES.value)",
                                          "subtiles = max(1, min(k, self.columns * self.groups) // LANES.value)"),
    # the forward and dx
    "the forward leaves the residual out": ("masked_linear", "tl.dot(delta.to(DTYPE), x, acc,",
                                            "tl.dot(delta.to(DTYPE), 0 * x, acc,"),
    "the forward draws one part's noise for all": ("masked_linear", "rows, part, PARTS, WIDTH)\n        for j in",
                                                   "rows, 0 * part, PARTS, WIDTH)\n        for j in"),
    "y is written with the wrong stride": ("masked_linear", "y_ptr + offs_t[None, :] * N", "y_ptr + offs_t[None, :] * (N - 1)"),
    "dx skips a row tile": ("masked_linear", "range(split * PER_SPLIT, tl.minimum", "range(split * PER_SPLIT + 1, tl.minimum"),
    "dx leaves the residual out": ("masked_linear", "tl.dot(g, delta.to(DTYPE), acc,", "tl.dot(g, 0 * delta.to(DTYPE), acc,"),
    "the splits of dx overwrite each other": ("masked_linear", "dx_ptr + split * T * k", "dx_ptr + 0 * split"),
    # the gradients of the factors
    "the last token is not counted": ("factors", "mask_t = offs_t < T", "mask_t = offs_t < T - 1"),
    "dA and dB take every entry of dW": ("factors", "ddelta = tl.where(gate_open(product, bias, words, j), dw, 0.0)",
                                         "ddelta = dw"),
    "dL takes only the open entries": ("factors", "dl = dw * ab",
                                       "dl = tl.where(gate_open(product, bias, words, j), dw, 0.0) * ab"),
    "dL forgets A B": ("factors", "dl = dw * ab", "dl = dw + 0 * ab"),
    "dL forgets the slope": ("factors", "dl *= gate_slope", "dl += 0 * gate_slope"),
    "dc keeps the last sub-tile alone": ("factors", "dc += tl.sum(dl, 1)", "dc = tl.sum(dl, 1)"),
    "dB and dQ keep the last rows alone": ("factors", "add_right(factor_t, cut, rights[j], PRECISION)",
                                           "add_right(factor_t, cut, 0 * rights[j], PRECISION)"),
    "the parts of dA overwrite each other": ("factors", "(part.to(tl.int64) * N + rows", "(0 * part.to(tl.int64) + rows"),
    "the sum leaves the last chunk out": ("factors", "tl.load(ranges_ptr + 2 * group + 1))",
                                          "tl.load(ranges_ptr + 2 * group + 1) - 1)"),
    "the rest of a split tile is dropped": ("factors", "parts = (head, rest)", "parts = (head, 0 * rest)"),
    # the fold and the rebuild
    "the fold makes 0.0 of -0.0": ("fold", "tl.where(delta != 0, before + delta, before)", "before + delta"),
    "the fold rounds before it adds": ("fold", "before + delta, before)", "before + delta.to(DTYPE), before)"),
    "the fold leaves the master as it was": ("fold", "tl.store(master, total, mask)", "tl.store(master, before, mask)"),
    "the rebuild leaves the first task out": ("rebuild", "for task in range(tasks)", "for task in range(1, tasks)"),
    "the rebuild rounds after each task": ("rebuild", "tl.where(delta != 0, total + delta, total)",
                                           "tl.where(delta != 0, total + delta, total).to(DTYPE).to(WIDE)"),
}
# of the penalties and their gradients
PENALTIES = {
    "the density counts entries that are not there": (
        "penalties", "tl.where(mask, soft_gate(product, bias), 0.0)", "soft_gate(product, bias)"),
    "forgetting sees closed entries": ("penalties", "tl.where(gate_open(product, bias, words, j), delta, 0.0)", "delta + 0.0"),
    "forgetting is not squared": ("penalties", "overlap += delta * delta", "overlap += delta"),
    "all tiles leave their sums in one place": ("penalties", "2 * (tl.program_id(0)", "2 * (0 * tl.program_id(0)"),
    "forgetting pulls at half its strength": ("factors", "(2 * tl.load(d_forgetting_ptr)", "(1 * tl.load(d_forgetting_ptr)"),
    "S pulls with its sign": ("factors", "(past * past)", "past"),
    "forgetting pulls at P and Q of closed entries": (
        "factors", "pull = tl.where(gate_open(product, bias, words, j), pull, 0.0)", "pull += 0.0"),
    "the density's gradient is that of a sum over columns": ("factors", "tl.load(d_sparsity_ptr).to(WIDE) / N / k",
                                                             "tl.load(d_sparsity_ptr).to(WIDE) / N"),
    "c is pulled by entries that are not there": (
        "factors", "tl.where(mask_n[:, None] & mask_k[None, :], share * soft_slope(product, bias), 0.0)",
        "share * soft_slope(product, bias)"),
    "the slope of the density is the density": ("philox", "return (e * inverse) * inverse", "return inverse"),
}
PLANTED |= PENALTIES
# every run plants these, in each file at least one; the long run plants all
QUICK = {
    "the upper half of the step is lost", "a tile runs into the next projection",
    "the last columns belong to nobody", "dx leaves the residual out", "dL forgets A B",
    "the fold leaves the master as it was", "the rebuild leaves the first task out", "forgetting is not squared",
}  # fmt: skip

HALF, SINGLE = torch.float16, torch.float32
# cheap ones that see much come first
CHECKS = (
    lambda backend: checks.fold(backend, HALF, True),
    lambda backend: checks.fold(backend, SINGLE, False),
    lambda backend: checks.equals_the_specification(backend, checks.SHAPES[1], SINGLE, False),
    lambda backend: checks.equals_the_specification(backend, checks.SHAPES[2], SINGLE, False),
    lambda backend: checks.variant(backend, "no noise", SINGLE, False),
    lambda _: [kernelchecks.gate_at_extremes(tau) for tau in (0.1, 1.0, 10.0)],
    checks.fold_keeps_negative_zero,
    lambda backend: checks.rebuild(backend, HALF),
    lambda backend: checks.equals_the_specification(backend, checks.SHAPES[3], SINGLE, False),
    lambda backend: kernelchecks.products_in_pieces(backend, 80, "tf32"),
)
CHECKS_OF_PENALTIES = (
    lambda backend: checks.one_penalty_without_the_other(backend, "sparsity", 1.0),
    lambda backend: checks.equals_the_specification(backend, checks.SHAPES[1], HALF, True),
)


def test_an_unchanged_copy_passes(copy):  # noqa: F811
    backend = copy("philox", "SPAN", "SPAN")
    for check in (*CHECKS, *CHECKS_OF_PENALTIES):
        check(backend)


@pytest.mark.parametrize("bug", [pytest.param(bug, marks=() if bug in QUICK else pytest.mark.long) for bug in PLANTED])
def test_is_caught(bug, copy):  # noqa: F811
    backend = copy(*PLANTED[bug])
    for check in CHECKS_OF_PENALTIES if bug in PENALTIES else CHECKS:
        try:
            check(backend)
        except AssertionError:
            return
    pytest.fail(f"no test sees that {bug}")


def test_the_quick_ones_touch_every_kernel():
    assert {PLANTED[bug][0] for bug in QUICK} == {path.stem for path in KERNELS.glob("*.py")}
