"""The fold, and the rebuild of many folds in one pass: what they write, what they leave, and what they refuse."""

import cases
import pytest
import torch
from cases import RANK, SIZES, K, N, case, relative

import stamina_fast as sf
from stamina_fast.ops import library

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_fold_adds_the_masked_product_and_leaves_the_rest(dtype):
    _, weight, factors = case(dtype)
    mask = sf.gate_mask(factors["p"], factors["q"], factors["gate_bias"], sizes=SIZES)
    folded = sf.fold_(weight.clone(), **factors, sizes=SIZES)
    assert torch.equal(folded[~mask], weight[~mask])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    delta = torch.cat([f.to(wide) @ factors["b"][g].to(wide) for g, f in enumerate(factors["a"].split(SIZES))])
    torch.testing.assert_close(folded[mask], (weight.to(wide) + delta).to(dtype)[mask])


def test_a_thousand_small_folds_into_a_master_lose_nothing():
    _, weight, factors = case(torch.bfloat16, scale=1e-3)
    master, start = weight.float(), weight.clone()
    for _ in range(1000):
        sf.fold_(weight, **factors, sizes=SIZES, master=master)
    assert torch.equal(weight, master.bfloat16())
    mask = sf.gate_mask(factors["p"], factors["q"], factors["gate_bias"], sizes=SIZES)
    a, b = factors["a"].double(), factors["b"].double()
    update = 1000 * mask * torch.cat([part @ b[g] for g, part in enumerate(a.split(SIZES))])
    assert relative(master.double() - start.double(), update) <= 1e-4
    assert torch.equal(weight[~mask], start[~mask])


def test_negative_zero_outside_the_mask_keeps_its_bits():
    weight = torch.full((2, 4), -0.0)
    sf.fold_(weight, torch.ones(2, 1), torch.ones(1, 1, 4), torch.ones(2, 1), -torch.ones(1, 1, 4))
    assert torch.signbit(weight).all()


def test_overlapping_memory_is_refused():
    _, weight, factors = case()
    with pytest.raises(ValueError, match="master overlaps weight"):
        sf.fold_(weight, **factors, sizes=SIZES, master=weight)
    with pytest.raises(ValueError, match="a overlaps weight"):
        sf.fold_(weight, **{**factors, "a": weight[:, :RANK]}, sizes=SIZES)
    with pytest.raises(ValueError, match="expanded"):
        sf.fold_(weight[:1].expand(N, K), **factors, sizes=SIZES)


# ---- rebuild -------------------------------------------------------------------------------------------------------


def tasks_of(dtype, count=4):
    """Tasks of different ranks; the second has no mask, the third no gate bias."""
    tasks = [case(dtype, seed=10 + i, rank=1 + i, gate=2 + i)[2] for i in range(count)]
    tasks[1] = {name: tasks[1][name] for name in ("a", "b")}
    tasks[2] = tasks[2] | {"gate_bias": None}
    return tasks


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
RUNS = [(name, dtype) for name in ("reference", "cpu") for dtype in DTYPES]
RUNS += [("triton", dtype) for dtype in (torch.float32, torch.float16)]


@pytest.mark.parametrize(("backend", "dtype"), RUNS)
def test_rebuild_has_the_bits_of_the_folds(backend, dtype):
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    cases.need(backend, device)
    base, where = case(dtype)[1].to(device), {"sizes": SIZES, "backend": backend}
    tasks = [{name: t if t is None else t.to(device) for name, t in task.items()} for task in tasks_of(dtype)]
    for chosen in ([], [0], [1], [3, 0, 2], [0, 0, 1]):
        weight, master = base.clone(), base.to(torch.promote_types(dtype, torch.float32), copy=True)
        for i in chosen:
            sf.fold_(weight, **tasks[i], master=master, **where)
        rebuilt, kept = torch.full_like(base, torch.nan), torch.full_like(master, torch.nan)
        assert sf.rebuild_(rebuilt, base, [tasks[i] for i in chosen], master=kept, **where) is rebuilt
        assert torch.equal(rebuilt, weight)
        assert torch.equal(kept, master)
        alone = torch.full_like(base, torch.nan)
        sf.rebuild_(alone, base, [tasks[i] for i in chosen], **where)
        assert torch.equal(alone, weight)


def test_rebuild_rounds_once():
    """Additions that each vanish beside a bf16 weight add up."""
    base = torch.ones(1, 8, dtype=torch.bfloat16)
    small = {"a": torch.full((1, 1), 2.0**-10, dtype=torch.bfloat16), "b": torch.ones(1, 1, 8, dtype=torch.bfloat16)}
    one_by_one = base.clone()
    for _ in range(16):
        sf.fold_(one_by_one, **small)
    assert torch.equal(one_by_one, base)
    assert torch.equal(sf.rebuild_(base.clone(), base, [small] * 16), base + 2.0**-6)


def test_rebuild_keeps_negative_zero_and_its_base():
    base = torch.full((2, 4), -0.0)
    closed = {"a": torch.ones(2, 1), "b": torch.ones(1, 1, 4), "p": torch.ones(2, 1), "q": -torch.ones(1, 1, 4)}
    weight = sf.rebuild_(torch.zeros(2, 4), base, [closed])
    assert torch.signbit(weight).all()
    assert torch.signbit(base).all()


def test_rebuild_keeps_torchs_contract():
    base, tasks = case()[1], tasks_of(torch.float32)
    columns = [[task.get(name) for task in tasks] for name in ("a", "b", "p", "q", "gate_bias")]
    rebuild = library.rebuild_
    torch.library.opcheck(rebuild, (base.clone(), base, *columns, list(SIZES), None, ""))
    torch.library.opcheck(rebuild, (base.clone(), base, *columns, list(SIZES), base.clone(), ""))


def test_rebuild_refuses_what_does_not_fit():
    base, (task, *_) = case()[1], tasks_of(torch.float32)
    weight = base.clone()
    for wrong, say in (
        ({"base": weight}, "base overlaps weight"),
        ({"base": base[:, :-1]}, "base must be"),
        ({"base": base.double()}, "base must be torch.float32"),
        ({"master": base}, "base overlaps master"),
        ({"tasks": [task, {"a": task["a"]}]}, "task 1 must have a and b"),
        ({"tasks": [task | {"c": task["a"]}]}, "task 0 must have"),
        ({"tasks": [task | {"b": weight.view(4, 4, K)[:, :1]}]}, "b overlaps weight"),
        ({"tasks": [task | {"a": task["a"][:-1]}]}, "a must be"),
        ({"sizes": (1, 2)}, "sizes must be"),
    ):
        with pytest.raises(ValueError, match=say):
            sf.rebuild_(**{"weight": weight, "base": base, "tasks": [task], "sizes": SIZES} | wrong)
    assert torch.equal(weight, base)
