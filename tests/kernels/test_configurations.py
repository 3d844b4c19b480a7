"""Every configuration that a launcher can choose, each run alone into buffers of NaN, against the specification."""

import os
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from unittest.mock import patch

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
from cases import DEVICE, NAMES, NOISE, PULL, assert_close, everything, problem, specified
from checked import Guards, watched

from stamina_fast.kernels import factors, fold, masked_linear, penalties, rebuild, tiles
from stamina_fast.ops import reference
from stamina_fast.ops.backend import Factors
from stamina_fast.ops.triton import Triton

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="through the interpreter; a GPU runs its own configuration")

MODULES = (masked_linear, factors, penalties, fold, rebuild)
# what one launcher chooses together, and the results that show it
GROUPS = {
    ("forward",): ("y",),
    ("input",): ("dx",),
    ("factors", "gate factors", "tau factors"): NAMES[2:7],
    ("penalty factors", "penalty gate factors", "tau penalty factors"): NAMES[2:7],
    ("penalties",): NAMES[7:],
    ("fold",): (),
}
KERNELS = {
    "forward": masked_linear.forward_kernel,
    "input": masked_linear.input_kernel,
    "factors": factors.factors_kernel,
    "penalty factors": factors.factors_kernel,
    "penalties": penalties.penalties_kernel,
    "fold": fold.fold_kernel,
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
TOKENS = (0, *(2**n + more for n in range(9) for more in (0, 1)), 10_000)
RANKS = (0, 1, 16, 17, 32, 33, 64, 65, 1000)
GPUS = (0, 60, 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121, 130)


def choices(group):
    """{(configurations, dtype): whether a GPU has them} of all that the kernels of a group get for the same arguments."""
    found = {}
    for interpreted, shares in ((False, False), (False, True), (True, True)):
        with patch.object(tiles, "interpreted", lambda: interpreted), patch.object(tiles, "SHARES_TENSOR_MEMORY", shares):  # noqa: B023
            for dtype, tokens, rank, gpu in product(DTYPES, TOKENS, RANKS, GPUS):
                configs = tuple(tiles.choose(kernel, tokens, rank, dtype, gpu) for kernel in group)
                found.setdefault((configs, dtype), not interpreted)
    return found


def seen(group, configs):
    """What a kernel sees of its configurations: not how many warps run it, and the rest only where it takes it."""
    ignored = {"num_warps": 4, "num_stages": 1}
    for field, ignoring in (("precision", "ieee"), ("block_t", 16)):
        if field.upper() not in KERNELS[group[0]].arg_names:
            ignored[field] = ignoring
    return group, tuple(replace(config, **ignored) for config in configs)


CHOICES = [(group, configs, dtype, gpu) for group in GROUPS for (configs, dtype), gpu in choices(group).items()]
# one dtype for each, and whether a GPU has it; the interpreter has no bf16
CASES = {}
for group, configs, dtype, gpu in CHOICES:
    CASES.setdefault(seen(group, configs), (torch.float16 if dtype == torch.bfloat16 else dtype, gpu))


def name(case):
    group, (config, *_) = case
    return f"{group[0]}: {config.block_n}x{config.block_t}, {config.parts} parts of {config.width}, {config.precision}"


def launch(group, arguments, sizes, tau, past):
    """The results of the launcher that chooses for this group."""
    grad, x, weight, *rest = arguments
    residual = Factors(*rest), sizes, NOISE.on(DEVICE)
    wide = reference.compute_dtype(x.dtype)
    scalars = [torch.tensor(value, dtype=wide) for value in (tau, *PULL)]
    if group == ("forward",):
        return (masked_linear.forward(x, weight, *residual),)
    if group == ("input",):
        return (masked_linear.backward_input(grad, weight, *residual),)
    if group == ("penalties",):
        return penalties.forward(weight.dtype, *residual, past)
    if group == ("fold",):
        alone, through, rebuilt = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
        master = weight.to(wide, copy=True)
        fold.fold_(alone, residual[0], sizes, None)
        fold.fold_(through, residual[0], sizes, master)
        rebuild.rebuild_(rebuilt, weight, residual[:1], sizes, None)
        return alone, through, rebuilt, master
    return factors.backward_factors(grad, x, *residual, scalars[0], *(() if past is None else (past, *scalars[1:])))


def wanted(group, arguments, sizes, tau, past):
    """The same of the specification."""
    if group == ("fold",):
        folded, master = arguments[2].clone(), arguments[2].to(reference.compute_dtype(arguments[2].dtype), copy=True)
        reference.fold_(folded, *arguments[3:], sizes=sizes, master=master)
        return folded, folded, folded, master
    everything = dict(zip(NAMES, specified(*arguments, sizes, tau=tau, past=past), strict=False))
    return [everything[name] for name in GROUPS[group]]


# the other tests run what the interpreter alone has
@pytest.mark.parametrize("case", [pytest.param(c, id=name(c), marks=[] if CASES[c][1] else [pytest.mark.long]) for c in CASES])
def test_alone_into_poisoned_buffers(case, monkeypatch):
    """Two blocks of tokens, two parts where a span has parts, two row tiles where they are small."""
    (group, configs), (dtype, _) = case, CASES[case]
    config, sizes = configs[0], (17,)
    chosen = []

    def choose(kernel, *_):
        chosen.append(kernel)
        return configs[group.index(kernel)]

    for module in MODULES:
        monkeypatch.setattr(module, "choose", choose)
    k = 67 if config.parts == 1 else config.columns + 3
    arguments = problem(config.block_t + 1, k, sizes, 2, 3, dtype)
    past = arguments[2] if "penal" in group[0] else None
    for tau in (0.7, 1.0) if len(group) > 1 else (0.7,):
        with Guards() as guards:
            got = launch(group, arguments, sizes, tau, past)
        guards.assert_intact()
        expected, shown = wanted(group, arguments, sizes, tau, past), GROUPS[group]
        if "dc" in shown:
            # c is no factor of a product: its gradient is a sum of both signs, which loses digits in any order
            torch.testing.assert_close(got[-1].double(), expected[-1], rtol=1e-4, atol=1e-4)
            got, expected = got[:-1], expected[:-1]
        if shown:
            assert_close(got, expected, dtype, shown)
        for one, other in zip(got, expected, strict=True) if not shown else ():
            torch.testing.assert_close(one, other, rtol=torch.finfo(one.dtype).eps, atol=1e-6)
    assert set(chosen) == set(group)


def test_no_configuration_is_left_out():
    """Every kernel name, every entry of every table, and the sweep itself reaches each of its bounds."""
    covered = {(kernel, config) for group, configs, *_ in CHOICES for kernel, config in zip(group, configs, strict=True)}
    tables = {name: table for name, table in vars(tiles).items() if name.isupper() and isinstance(table, dict)}
    assert len(tables) >= 2
    for table in tables.values():
        assert {kernel for group in GROUPS for kernel in group} == table.keys()
        for kernel, (block_t, parts, width) in table.items():
            assert any(k == kernel and (c.block_t, c.parts, c.width) == (block_t, parts, width) for k, c in covered), kernel
    # what the tests of the operators get by their own arguments is among them
    used = []

    def choose(kernel, *arguments):
        used.append((kernel, tiles.choose(kernel, *arguments)))
        return used[-1][1]

    with ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(patch.object(module, "choose", choose))
        for penalised in (False, True):
            everything(Triton(), problem(3, 9, (7,), 3, 5, torch.float16), (7,), penalised)
    assert {kernel for kernel, _ in used} == {kernel for group in GROUPS for kernel in group}
    assert set(used) <= covered


def test_no_kernel_is_tuned_by_running():
    """A second run of the fold would fold twice: each kernel is a plain one, the fold has one configuration and one launch."""
    kernels = [value for module in MODULES for name, value in vars(module).items() if name.endswith("_kernel")]
    assert len(kernels) >= len(MODULES)
    assert {type(kernel) for kernel in kernels} == {type(fold.fold_kernel)}
    assert not isinstance(fold.fold_kernel, (triton.runtime.Autotuner, triton.runtime.Heuristics))
    for dtype, gpu in product(DTYPES, GPUS):
        assert len({tiles.choose("fold", 0, rank, dtype, gpu) for rank in RANKS}) == 1
    launched = []
    arguments = problem(1, 40, (7, 3), 3, 5, torch.float32)
    with watched(lambda name, *_: launched.append(name)):
        fold.fold_(arguments[2], arguments[3:], (7, 3), None)
        rebuild.rebuild_(arguments[2].clone(), arguments[2], [arguments[3:]] * 2, (7, 3), None)
    assert launched == ["fold_kernel", "rebuild_kernel"]
