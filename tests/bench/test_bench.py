"""The bench: that it computes what it times, refuses what is wrong, and sees the memory that it reports."""

import json
import random
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from typer.testing import CliRunner

import stamina_fast as sf
from stamina_fast.bench import arms as bench_arms, clock, machine, plots, run as bench_run, suite
from stamina_fast.bench.problem import DTYPES, TOLERANCES, Case, build, judge, truth
from stamina_fast.bench.shapes import SHAPES, Shape
from stamina_fast.cli import app

MINI = Shape("mini", (40, 40, 72), 64, tokens=9)


@pytest.fixture
def mini(monkeypatch):
    monkeypatch.setitem(SHAPES, "mini", MINI)


def measured(**options):
    return bench_run.run(**{"shape": "mini", "device": "cpu", "rounds": 2, "rank": 4, "seconds": 0.0, **options})


def test_small_is_the_model_that_ships():
    folder = Path(sf.__file__).parent / "tiny" / "model" / "unet"
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))
    slots = {name: m for name, m in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))}
    assert sorted(m.out_features for m in slots.values()) == sorted(SHAPES["small"].sizes)
    assert {m.in_features for m in slots.values()} == {SHAPES["small"].k}


def test_shapes_are_the_stacks_of_their_models():
    assert {name: (len(s.sizes), s.rows, s.k) for name, s in SHAPES.items() if name != "small"} == {
        "sd15": (32, 24_960, 768), "sd21": (32, 24_960, 1024), "sdxl": (140, 166_400, 2048),
    }


def test_work_is_counted_as_the_floor_counts_it():
    case = Case(SHAPES["sd15"], dtype=torch.bfloat16)
    weights = 24_960 * 768
    assert case.flop("forward") == (2 * 77 + 2 * 32) * weights
    assert case.flop("backward") - case.flop("forward") == (4 * 77 + 6 * 32) * weights
    assert case.flop("forward", adapter=False) == 2 * 77 * weights
    assert 2 * weights < case.bytes("forward") < 2.6 * weights
    assert case.bytes("fold with master") - case.bytes("fold") == 6 * weights


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_arm_is_green_and_timed(mini, dtype, tmp_path):
    result = measured(dtype=dtype, output=tmp_path / "times.json")
    assert result["red"] == []
    assert json.loads((tmp_path / "times.json").read_text()) == result
    names = {"one product", "separate projections", "eager reference", "masked_linear/reference"}
    names |= {f"{name} +backward" for name in names} | {"copy of W", "fold_/reference", "fold_/reference +master"}
    assert names <= set(result["arms"])
    assert all(len(modes[clock.CPU_MODE]) == 2 for modes in result["arms"].values())
    assert result["machine"]["source"]
    weights = 2 * MINI.rows * MINI.k * DTYPES[dtype].itemsize
    assert result["facts"]["copy of W"]["bytes"] == weights


def test_peft_is_one_of_the_arms(mini):
    pytest.importorskip("peft")
    result = measured()
    assert len(result["arms"]["PEFT LoRA, no mask +backward"][clock.CPU_MODE]) == 2
    assert set(result["facts"]["PEFT LoRA, no mask +backward"]["verdicts"]) == {"y", "dx", "da", "db"}


def test_an_arm_that_cannot_be_imported_is_named(mini, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    result = measured()
    assert not [name for name in result["arms"] if "PEFT" in name]
    assert [note for note in result["notes"] if note.startswith("PEFT LoRA is left out")]


def test_a_wrong_result_gets_no_time_and_fails(mini, monkeypatch, capsys):
    """A mask of the next step, in our forward and backward alone."""
    right = sf.masked_linear

    def late(*arguments, noise, **options):
        return right(*arguments, noise=sf.GateNoise(noise.seed, noise.step + 1), **options)

    monkeypatch.setattr(sf, "masked_linear", late)
    result = measured(backends=["reference"])
    wrong = ["masked_linear/reference", "masked_linear/reference +backward"]
    assert [line.split(": ")[1] for line in result["red"]] == wrong
    assert not set(wrong) & set(result["arms"])
    assert result["arms"]["eager reference"][clock.CPU_MODE]
    assert "RED, not timed: masked_linear/reference" in capsys.readouterr().out
    done = CliRunner().invoke(app, ["bench", "--shape", "mini", "--device", "cpu", "--rounds", "1", "--rank", "4"])
    assert done.exit_code == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["masked", "lora", "plain", "fold"])
def test_the_gate_sees_small_errors(kind, dtype):
    """NaN, an error of a few units everywhere, and a few rows left out are red; the rounding of the dtype is green."""
    problem = build(Case(MINI, rank=4, dtype=DTYPES[dtype]))
    wanted = truth(problem, kind)
    rounded = {name: t.to(problem.case.dtype) for name, t in wanted.items()}
    assert all(verdict["green"] for verdict in judge(rounded, wanted, problem.case.dtype).values())
    limit = TOLERANCES[problem.case.dtype]
    generator = torch.Generator().manual_seed(0)
    for name, exact in wanted.items():
        noisy = exact * (1 + 4 * limit.most * torch.randn(exact.shape, generator=generator, dtype=exact.dtype))
        dropped, broken = exact.clone(), exact.clone()
        dropped.view(-1)[: max(1, exact.numel() // 50)] = 0
        broken.view(-1)[-1] = float("nan")
        for wrong in (noisy, dropped, broken):
            assert not judge({name: wrong}, wanted, problem.case.dtype)[name]["green"], name


def test_arms_take_turns(monkeypatch):
    ran = []

    def arm(name):
        return lambda: ran.append(name) or float(len(ran))

    times = clock.take_turns({name: arm(name) for name in "abcd"}, rounds=6, seconds=60)
    turns = ["".join(ran[start : start + 4]) for start in range(4, len(ran), 4)]
    assert all(sorted(turn) == list("abcd") for turn in turns)
    assert len(turns) == 6
    assert len(set(turns)) > 2
    assert times["a"] == [float(index + 1) for index, name in enumerate(ran) if name == "a" and index >= 4]


def test_slow_arms_get_fewer_rounds():
    times = clock.take_turns({"slow": lambda: time.sleep(0.01) or 1.0}, rounds=100, seconds=0.001)
    assert len(times["slow"]) == clock.FEWEST_ROUNDS


def test_memory_is_read_off_the_allocator():
    """What a function hides in an attribute counts as kept; masked_linear keeps nothing, the reference several matrices."""
    problem = build(Case(MINI, rank=4))
    weight = problem.weight.nbytes
    hidden = []

    def hides(*arguments, **options):
        hidden.append(torch.empty_like(problem.weight))
        return sf.masked_linear(*arguments, **options)

    functions = {"ours": sf.masked_linear, "hides": hides, "eager": sf.reference.masked_linear}
    made = {name: bench_arms.masked(problem, function) for name, function in functions.items()}
    arms = [bench_arms.Arm(name, "backward", "masked", [p.backward], [p]) for name, p in made.items()]
    random.Random(0).shuffle(arms)
    found = clock.memory(arms, "cpu")
    assert found["ours"][0] < weight // 100
    assert weight <= found["hides"][0] < weight * 1.01
    assert found["eager"][0] > 3 * weight
    assert all(peak > kept for kept, peak in found.values())


def test_unknown_backend_says_why():
    with pytest.raises(sf.StaminaError, match="backend 'cuda' cannot run here"):
        measured(shape="small", backends=["cuda"])


def test_a_suite_measures_each_case_once_within_its_time(mini, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    steps = [suite.Step("mini", rank=rank, dtype="float32", rounds=1, seconds=0, expected=0) for rank in (2, 4)]
    late = suite.Step("mini", rank=8, dtype="float32", expected=1e9)
    monkeypatch.setitem(suite.PLANS, "mini", (*steps, late))
    measured_ranks = []
    plain = suite.run

    def run(**options):
        measured_ranks.append(options["rank"])
        return plain(**options)

    monkeypatch.setattr(suite, "run", run)
    assert not suite.suite("mini", tmp_path, "cpu", minutes=2, resume=True)
    assert "mini-b1-r8-float32: not run" in capsys.readouterr().out
    files = {"mini-b1-r2-float32.json", "mini-b1-r4-float32.json", "roofline-float32.png", "ratios-mini.png"}
    assert {path.name for path in tmp_path.iterdir()} == files
    monkeypatch.setitem(suite.PLANS, "mini", tuple(steps))
    assert suite.suite("mini", tmp_path, "cpu", minutes=2, resume=True)
    assert measured_ranks == [2, 4]
    monkeypatch.setattr(machine, "source_hash", lambda: "of other code")
    assert suite.suite("mini", tmp_path, "cpu", minutes=2, resume=True)
    assert measured_ranks == [2, 4, 2, 4]


def test_a_case_that_fails_does_not_cost_the_others(mini, monkeypatch, tmp_path, capsys):
    steps = [suite.Step("mini", rank=rank, dtype="float32", rounds=1, seconds=0, expected=0) for rank in (2, 4)]
    monkeypatch.setitem(suite.PLANS, "mini", tuple(steps))
    plain = suite.run

    def run(**options):
        if options["rank"] == 2:
            raise RuntimeError("out of memory")
        return plain(**options)

    monkeypatch.setattr(suite, "run", run)
    assert not suite.suite("mini", tmp_path, "cpu", minutes=2, resume=False)
    assert "mini-b1-r2-float32: failed" in capsys.readouterr().out
    assert (tmp_path / "mini-b1-r4-float32.json").is_file()


def test_figures_take_the_fuller_of_two_results_of_one_case(tmp_path):
    def result(batch, arms):
        machine = {"shape": "mini", "dtype": "float32", "rank": 4, "batch": batch}
        return {"machine": machine, "roofs": {}, "arms": {name: {} for name in arms}}

    both = {"b1": result(1, "ab"), "b1-compiled": result(1, "abc"), "b2": result(2, "ab"), "b0": result(0, "abc")}
    for name, value in {**both, "machine": {"device": "a GPU"}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    assert plots.load(tmp_path) == [both["b0"], both["b1-compiled"], both["b2"]]
