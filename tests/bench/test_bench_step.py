"""The bench of a whole step: that every arm trains on the same draws, and that what it says of them is so."""

import dataclasses
import json
import statistics
import sys

import pytest
import torch
from replay import Replay
from torch import nn

from stamina_fast.bench import machine
from stamina_fast.bench.step import __main__ as bench_step, arms as step_arms, measure, models, phases, scripts
from stamina_fast.bench.step.arms import Case, Ours, lesson
from stamina_fast.bench.step.loops import CustomDiffusion, Lora
from stamina_fast.bench.step.models import MODELS, Model, build, networks, sharing
from stamina_fast.errors import InputError
from stamina_fast.ops import cpu

# our arm would run in the interpreter of Triton, which has no bf16 and takes minutes a step
pytestmark = pytest.mark.skipif(bool(cpu.load()), reason=cpu.load() or "-")

UNET = {
    "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": 4, "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
VAE = {
    "block_out_channels": (8, 16), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 8,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 32,
        "hidden_act": "gelu"}
SMALL = {"vae": VAE, "vocabulary": 256, "length": 24}
MINI = Model("a test", 16, {**UNET, "cross_attention_dim": 32}, (TEXT,), **SMALL)
VELOCITY = dataclasses.replace(MINI, scheduler={"prediction_type": "v_prediction"})
DOUBLE = Model("a test", 16, {
    **UNET, "cross_attention_dim": 64, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
}, (TEXT, TEXT), **SMALL)
NAMES = {"custom-diffusion", "lora", "reference", "ours", "frozen"}


def make(model=MINI, batch=2, **options):
    """(case, pipeline, lesson) on the CPU."""
    case = Case("mini", model, 16, batch, **options)
    pipeline = build(case.model, case.device, case.dtype)
    return case, pipeline, lesson(case, pipeline)


def arm_of(name, case, base, taught):
    kinds = {"custom-diffusion": CustomDiffusion, "lora": Lora}
    if name in kinds:
        return kinds[name](case, taught, sharing(base))
    backends = {"reference": "reference", "ours": bench_step.backends_of(case, None)[0], "frozen": None}
    return Ours(case, taught, sharing(base), name, backends[name])


def test_configurations_are_those_of_the_models():
    """The published counts of parameters: the whole of the U-Net, the VAE and the text encoders."""
    counts = {
        "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
        "sd21": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
        "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    }
    for name, model in MODELS.items():
        assert models.counted(build(model, "meta", torch.float32)) == counts[name]
        words = models.tokenizer(model.vocabulary, model.length)
        assert len(words) == 49_408
        assert len(words("a photo of sks").input_ids) < 77


@pytest.mark.parametrize(("model", "dtype"), [(MINI, torch.float32), (VELOCITY, torch.bfloat16), (DOUBLE, torch.float32)])
def test_every_arm_trains_on_the_same_draws(model, dtype):
    case, base, taught = make(model, dtype=dtype, steps=12)
    before = {name: tensor.clone() for part in networks(base) for name, tensor in part.state_dict().items()}
    names = NAMES - ({"custom-diffusion"} if model.double else set())
    arms = {name: arm_of(name, case, base, taught) for name in names}
    facts, draws = {}, {}
    for name, arm in arms.items():
        facts[name] = measure.begin(arm)
        buffers = arm.train.buffers if isinstance(arm, Ours) else arm.buffers
        draws[name] = [tensor.clone() for tensor in (buffers.latents, buffers.noise, buffers.t, buffers.frames)]
        if not isinstance(arm, Ours):
            # encoded by the loop itself, as often as it takes a step
            again = arm.encoded().float()
            scale = buffers.latents.abs().max()
            assert (again - buffers.latents).abs().max() < (1e-4 if dtype == torch.float32 else 5e-2) * scale
    assert measure.judge(list(arms.values()), facts) == []
    for name in names:
        assert all(torch.equal(a, b) for a, b in zip(draws[name], draws["ours"], strict=True)), name
        assert facts[name]["gradient"] > 0
        assert len(set(facts[name]["losses"])) == measure.CHECKED
    assert facts["frozen"]["operators"] == facts["lora"]["operators"] == {}
    assert set(facts["reference"]["operators"]) == {"masked_linear/reference", "masked_linear_backward/reference"}
    assert facts["frozen"]["losses"][0] == pytest.approx(facts["ours"]["losses"][0], rel=measure.AGREE[dtype][0])
    for arm in arms.values():
        arm.close()
    after = {name: tensor for part in networks(base) for name, tensor in part.state_dict().items()}
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_arm_learns(name, monkeypatch):
    """One draw again and again: its loss falls."""
    case, base, taught = make(steps=40)
    arm = arm_of(name, case, base, taught)
    rates = {"custom-diffusion": 1e-2, "lora": 1e-2}
    if name in rates:
        monkeypatch.setattr(type(arm), "learning_rate", rates[name])
    arm.start()
    fill = arm.feed.fill_
    monkeypatch.setattr(arm.feed, "fill_", lambda to, index: fill(to, 0))
    losses = []
    for _ in range(40):
        arm()
        losses.append(arm.loss.item())
    if name in ("ours", "reference"):
        # the mask is drawn anew each time
        assert statistics.mean(losses[-5:]) < statistics.mean(losses[:5])
    else:
        assert losses[-1] < losses[0]
    arm.close()


def test_a_concept_begins_again_after_its_last_step():
    case, base, taught = make(steps=3)
    arm = arm_of("ours", case, base, taught)
    arm.start()
    losses = []
    for _ in range(6):
        arm()
        losses.append(arm.loss.item())
    assert arm.train.buffers.clock.item() == 3
    # the optimizer and the noise are those of a first step again, the factors have moved
    assert len(set(losses)) == 6
    arm.close()


@pytest.mark.parametrize("name", ["ours", "frozen"])
def test_a_captured_arm_is_the_same_step(name, monkeypatch):
    case, base, taught = make(steps=7)
    backend = bench_step.backends_of(case, None)[0] if name == "ours" else None
    recorder = Replay()
    monkeypatch.setattr(step_arms, "recorder", lambda wanted, device: recorder if wanted else None)
    plain, captured = (Ours(case, taught, sharing(base), name, backend, wanted) for wanted in (False, True))
    facts = [measure.begin(arm) for arm in (plain, captured)]
    assert facts[0]["losses"] == facts[1]["losses"]
    assert recorder.replayed == 2
    assert measure.judge([captured], {name: facts[1]}) == []
    # marks, and then the second concept
    losses = []
    for arm in (plain, captured):
        assert arm.once()["U-Net forward"] > 0
        losses.append([])
        for _ in range(case.steps):
            arm()
            losses[-1].append(arm.loss.item())
    assert losses[0] == losses[1]
    assert recorder.replayed == 2 + case.steps
    for arm in (plain, captured):
        arm.close()


@pytest.mark.parametrize("choices", [{"channels_last": True}, {"attention": "math"}], ids=["channels_last", "attention"])
def test_options_of_the_trainer_reach_our_step(choices):
    case, base, taught = make(choices=choices)
    plain = dataclasses.replace(case, choices={})
    arms = [arm_of("ours", one, base, taught) for one in (plain, case)]
    losses = [measure.begin(arm)["losses"] for arm in arms]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    weight = arms[1].pipeline.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == ("channels_last" in choices)
    assert base.unet.conv_in.weight.is_contiguous()
    assert f"{next(iter(choices))}: " in arms[1].note
    for arm in arms:
        arm.close()


def test_an_arm_that_cannot_be_captured_is_red(monkeypatch):
    case, base, taught = make()

    class Broken(Replay):
        def record(self, step):
            raise RuntimeError("no graph")

    monkeypatch.setattr(step_arms, "recorder", lambda wanted, device: Broken())
    arm = Ours(case, taught, sharing(base), "frozen", None, captured=True)
    facts = {"frozen": measure.begin(arm)}
    assert measure.judge([arm], facts) == ["frozen was not captured, the log says why"]
    arm.close()


def test_frozen_is_the_same_step_with_the_token_alone():
    case, base, taught = make()
    arm = arm_of("frozen", case, base, taught)
    arm.start()
    assert all(type(module) is nn.Linear for module in phases.projections_of(arm.pipeline.unet))
    assert arm.train.optimizer.names
    assert all(name.startswith("tokens.") for name in arm.train.optimizer.names)
    arm.close()


def test_scripts_train_what_the_scripts_train():
    case, base, taught = make()
    custom, lora = (arm_of(name, case, base, taught) for name in ("custom-diffusion", "lora"))
    for arm in (custom, lora):
        arm.start()
    layers = [m for m in lora.pipeline.unet.modules() if getattr(m, "is_cross_attention", None) is not None]
    assert len(lora.trained) == 8 * len(layers)
    assert {min(parameter.shape) for parameter in lora.trained} == {4}
    crossed = [m for m in custom.pipeline.unet.modules() if getattr(m, "is_cross_attention", False)]
    shapes = [tuple(parameter.shape) for parameter in custom.trained]
    assert shapes[0] == (MINI.vocabulary + 1, 32)
    assert sorted(shapes[1:]) == sorted(2 * [tuple(m.to_k.weight.shape) for m in crossed])
    table = custom.trained[0].detach().clone()
    custom()
    moved = (custom.trained[0] != table).any(1)
    # the decay of AdamW moves every row, as it does in the script; the gradient moves one
    assert moved[MINI.vocabulary]
    assert (custom.trained[0][:-1] - table[:-1] * (1 - 1e-5 * 1e-2)).abs().max() < 1e-6
    for arm in (custom, lora):
        arm.close()


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """One whole run of the smallest model, with its files."""
    folder = tmp_path_factory.mktemp("step")
    MODELS["mini"] = MINI
    try:
        found = bench_step.run("mini", 16, device="cpu", rounds=2, seconds=0.0, checkpointing=True, output=folder / "mini.json")
    finally:
        del MODELS["mini"]
    return found, folder


def test_a_run_measures_every_arm(result):
    found, folder = result
    assert found["red"] == found["notes"] == []
    assert json.loads((folder / "mini.json").read_text()) == found
    assert set(found["arms"]) == NAMES
    for facts in found["arms"].values():
        assert len(facts["times_ms"]) >= 2
        assert set(facts["phases_ms"]) == set(phases.PHASES)
        assert facts["launches"]["dispatches"] > 100
        memory = facts["memory"]
        assert memory["peak"] == memory["networks"] + memory["own"] + memory["step"]
        assert min(memory.values()) > 0
        assert facts["concept_s"] > 500 * statistics.median(facts["times_ms"]) / 1e3
    assert {"ours / frozen", "reference / ours", "custom-diffusion / ours", "lora / ours"} == set(found["ratios"])
    assert set(found["profile"]) == {"ours", "frozen"}
    assert {"device", "torch", "commit", "dirty", "model", "pixels", "batch", "dtype"} <= set(found["machine"])
    assert found["machine"]["parameters"]["unet"] > 0


def test_a_run_leaves_pictures(result):
    _, folder = result
    pytest.importorskip("matplotlib")
    assert {path.name for path in folder.iterdir()} == {"mini.json", "mini.png", "mini-profile.png"}
    assert all(path.stat().st_size > 10_000 for path in folder.glob("*.png"))


def test_phases_are_the_whole_of_a_step(result):
    found, _ = result
    for name, facts in found["arms"].items():
        phases = facts["phases_ms"]
        scripted = name in ("custom-diffusion", "lora")
        assert (phases["encode latents"] > 0) == scripted, name
        assert (phases["text backward"] > 0) == (name != "lora"), name
        assert (phases["K/V backward"] > 0) == (name != "lora"), name
        assert min(phases[part] for part in ("draws", "text", "K/V", "U-Net forward", "U-Net backward", "optimizer")) > 0


def test_levers_are_listed_with_what_they_are_worth(result):
    levers = {row["lever"]: row for row in result[0]["levers"]}
    assert levers["--checkpointing"]["bytes"] > 0
    assert levers["peak with checkpointing"]["bytes"] < levers["peak without any lever"]["bytes"]
    assert levers["bfloat16 weights and activations"]["bytes"] > 0
    assert levers["left with checkpointing, bfloat16 and the VAE away"]["bytes"] < levers["peak with checkpointing"]["bytes"]
    assert all(row["text"].startswith(f"{row['bytes'] / 1e6:.0f} MB") for row in levers.values())


def test_memory_counts_shared_weights_once():
    case, base, taught = make()
    common = measure.storages(networks(base))
    arm = arm_of("lora", case, base, taught)
    held, _ = measure.grown(lambda: measure.begin(arm), "cpu")
    found = measure.memory(arm, held, common)
    assert found["networks"] == sum(common.values())
    trained = sum(parameter.nbytes for parameter in arm.trained)
    # factors and two moments, at least
    assert 3 * trained <= found["own"] < 6 * trained + 50_000
    arm.close()


def test_an_arm_that_does_not_train_or_strays_is_red():
    case, base, taught = make()
    arms = [arm_of(name, case, base, taught) for name in ("reference", "ours", "frozen")]
    good = {"losses": [1.0, 0.9, 0.8], "gradient": 1.0}
    ran = {"reference": {"masked_linear/reference": 3}, "ours": {f"masked_linear/{arms[1].backend}": 3}, "frozen": {}}
    facts = {name: good | {"operators": operators} for name, operators in ran.items()}
    assert measure.judge(arms, facts) == []
    for name, change in {
        "reference": {"losses": [1.0, float("nan"), 1.0]}, "ours": {"losses": [1.0, 0.9, 0.7]},
        "frozen": {"gradient": 0.0},
    }.items():
        lines = measure.judge(arms, facts | {name: facts[name] | change})
        assert any(line.startswith(f"{name} ") for line in lines)
    assert any("ran the operators" in line for line in measure.judge(arms, facts | {"frozen": facts["ours"]}))


def test_what_is_not_known_is_refused(capsys):
    for options in ({"model": "sd3"}, {"dtype": "float16"}, {"arms": ["dreambooth"]}, {"attention": "measured"}):
        with pytest.raises(InputError):
            bench_step.run(**options)
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["step", "--model", "sd3"])
        with pytest.raises(SystemExit):
            bench_step.main()
    assert "invalid choice" in capsys.readouterr().err


def test_no_script_for_two_text_encoders_and_no_peft_are_said(monkeypatch):
    case, base, taught = make(DOUBLE)
    monkeypatch.setattr(machine, "version", lambda package: None)
    arms, notes = bench_step.arms_of(case, base, taught, ["custom-diffusion", "lora", "frozen"], ["reference"])
    assert [arm.name for arm in arms] == ["frozen"]
    assert [note.split(" is left out")[0] for note in notes] == ["custom-diffusion", "lora"]


SCRIPT = """
import argparse, pathlib, time
parser = argparse.ArgumentParser()
parser.add_argument("--max_train_steps", type=int)
parser.add_argument("--instance_data_dir")
parser.add_argument("--pretrained_model_name_or_path")
given, _ = parser.parse_known_args()
assert len(list(pathlib.Path(given.instance_data_dir).glob("*.png"))) == 4
assert (pathlib.Path(given.pretrained_model_name_or_path) / "model_index.json").is_file()
{body}
"""


def test_diffusers_scripts_run_as_they_are(tmp_path, monkeypatch):
    """A script of the same name and options, since the real one needs more than this machine may have."""
    case, base, taught = make(DOUBLE)
    monkeypatch.setattr(scripts, "NEEDED", ("accelerate",))
    monkeypatch.setitem(scripts.LENGTHS, "cpu", (0, 4))
    script = tmp_path / "dreambooth" / "train_dreambooth_lora_sdxl.py"
    script.parent.mkdir()
    script.write_text(SCRIPT.format(body="time.sleep(2 * given.max_train_steps)"))
    (row,) = scripts.run_scripts(tmp_path, case, base, taught).values()
    assert 1000 < row["ms_a_step"] < 4000
    assert scripts.commands(tmp_path, case, *3 * [tmp_path]).keys() == {script.name}
    script.write_text("raise ValueError('no such thing')")
    with pytest.raises(InputError, match=r"script failed: ValueError: no such thing; run it yourself"):
        scripts.seconds_of([sys.executable, str(script)], 1)
    with pytest.raises(InputError, match="must be the examples folder of diffusers"):
        scripts.commands(tmp_path / "dreambooth", case, *3 * [tmp_path])
    monkeypatch.setattr(scripts, "NEEDED", ("nothing_of_that_name",))
    with pytest.raises(InputError, match="need nothing_of_that_name, not found here"):
        scripts.commands(tmp_path, case, *3 * [tmp_path])


def test_a_recorded_bank_tells_what_was_asked():
    _, _, taught = make()
    index, noise = torch.tensor([1, 0]), torch.randn(2, *taught.bank.mean.shape[1:])
    assert torch.equal(taught.bank.draw(index, noise), step_arms.LatentBank.draw(taught.bank, index, noise))
    assert taught.bank.asked == (index, noise)
