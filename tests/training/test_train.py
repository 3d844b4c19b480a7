"""The sequential trainer, end to end on tiny pipelines of every kind."""

import json
import re
import subprocess
import sys

import pytest
import tinypipes
import torch
from tinyruns import CHEAP, assert_same, is_embedding, is_text_kv, run, tensors

from stamina_fast.errors import InputError, StaminaError
from stamina_fast.io import progress
from stamina_fast.io.concepts import Concept, load_concepts
from stamina_fast.pipeline.load import load_pipeline
from stamina_fast.pipeline.sampling import sample
from stamina_fast.training import loop, train
from stamina_fast.training.backbone import Backbone
from stamina_fast.training.data import Feed
from stamina_fast.training.methods import METHODS


@pytest.mark.parametrize("kind", tinypipes.KINDS)
def test_learns_folds_and_leaves_a_plain_pipeline(kind, pictures, tmp_path):
    pipeline = tinypipes.KINDS[kind]()
    before, classes = tensors(pipeline), [type(m) for m in pipeline.unet.modules()]
    calls = []
    made = run(pipeline, pictures, tmp_path / "run", steps=3, on_task=lambda p, r, c: calls.append((c.name, len(r.tasks()))))
    after = tensors(pipeline)
    names = [task["name"] for task in made.tasks()]
    assert calls == [(name, i + 1) for i, name in enumerate(names)]
    assert names == ["cat", "cup", "face", "rocket"]
    assert [type(m) for m in pipeline.unet.modules()] == classes
    changed = [name for name in before if before[name].shape != after[name].shape or not torch.equal(before[name], after[name])]
    assert changed
    assert all(is_text_kv(name) or is_embedding(name) for name in changed)
    assert {name for name in before if is_text_kv(name)} <= set(changed)
    for name in filter(is_embedding, before):
        # the base's words keep their bits; each encoder has one more row for each concept
        assert torch.equal(after[name][: len(before[name])], before[name])
        assert len(after[name]) == len(before[name]) + 4
    for name in names:
        curve = made.load_task(name).curve
        assert [row["step"] for row in curve] == [0, 1, 2]
        assert all(row["loss"] > 0 for row in curve)
        assert 0 < curve[-1]["density"] < 1
    # RUN/model is the same pipeline and draws the same picture
    loaded = type(pipeline).from_pretrained(tmp_path / "run" / "model")
    assert_same(tensors(loaded), after)
    prompt = "a photo of <cat>"
    assert torch.equal(sample(loaded, prompt, 1, steps=2), sample(pipeline, prompt, 1, steps=2))
    with pytest.raises(InputError, match="<dog>"):
        sample(loaded, "a <dog>", 1)


def test_plain_diffusers_draws_our_picture_without_this_package(uninterrupted, tmp_path):
    made, _ = uninterrupted
    program = f"""
import sys, json
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "stamina_fast":
            raise ImportError("blocked")
sys.meta_path.insert(0, Blocked())
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({str(made.path / "model")!r})
pipeline.set_progress_bar_config(disable=True)
image = pipeline("a photo of <cup>", generator=torch.Generator().manual_seed(5), num_inference_steps=2, output_type="pt").images
assert not any(name.startswith("stamina_fast") for name in sys.modules)
print(json.dumps(image.flatten().tolist()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    from diffusers import DiffusionPipeline

    ours = tinypipes.sd15()
    learned = DiffusionPipeline.from_pretrained(made.path / "model")
    assert learned.unet.num_parameters() == ours.unet.num_parameters()
    extra = sum(p.numel() for p in learned.text_encoder.parameters()) - sum(p.numel() for p in ours.text_encoder.parameters())
    assert extra == 3 * tinypipes.WIDTH
    learned.set_progress_bar_config(disable=True)
    wanted = learned("a photo of <cup>", generator=torch.Generator().manual_seed(5), num_inference_steps=2,
                     output_type="pt").images
    assert torch.equal(torch.tensor(json.loads(done.stdout.splitlines()[-1])), wanted.flatten())


def test_the_fourth_task_leaves_everything_else_alone(pictures, tmp_path):
    pipeline, states, masks, adapters = tinypipes.sd15(), [], [], []
    original = loop.attach

    def attach(*args):
        adapters.append(original(*args))
        return adapters[0]

    def look(pipeline, run, concept):
        states.append(tensors(pipeline))
        factors = run.load_task(concept.name).factors
        stack = adapters[0].stacks[0]
        masks.append((stack.sizes, {name.rsplit(".", 1)[1]: tensor for name, tensor in factors.items()}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "attach", attach)
        run(pipeline, pictures, tmp_path / "run", on_task=look)
    third, fourth = states[2], states[3]
    (embedding,) = filter(is_embedding, third)
    base = len(tinypipes.sd15().tokenizer)
    assert torch.equal(third[embedding][: base + 3], fourth[embedding][: base + 3])
    assert not torch.equal(third[embedding][base : base + 1], third[embedding][base + 1 : base + 2])
    from stamina_fast import gate_mask

    sizes, factors = masks[3]
    closed = ~gate_mask(factors["p"], factors["q"], factors["gate_bias"], sizes=sizes)
    assert 0.05 < closed.float().mean() < 0.95
    names = adapters[0].stacks[0].names
    old, new = (torch.cat([state[f"unet.{name}.weight"] for name in names]) for state in (third, fourth))
    assert torch.equal(old[closed], new[closed])
    assert (old != new)[~closed].float().mean() > 0.9
    assert_same(*({k: v for k, v in state.items() if not is_text_kv(k) and k != embedding} for state in (third, fourth)))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(method, three, tmp_path):
    pipeline = tinypipes.sd21()
    before = tensors(pipeline)
    made = run(pipeline, three, tmp_path / "run", method=method, min_snr=5.0, **CHEAP.get(method, {}))
    after = tensors(pipeline)
    changed = {name for name in before if before[name].shape != after[name].shape or not torch.equal(before[name], after[name])}
    assert any(map(is_text_kv, changed)) == (method not in ("token-only", "frozen"))
    last = made.load_task("rocket")
    assert (last.info["density"] == 1) == (METHODS[method].config.get("mask") == "none")
    assert any(row["forgetting"] > 0 for row in last.curve) == (method in ("c-lora", "c-stamina", "o-lora", "ewc"))


def test_what_is_trained_is_counted_by_its_rate(three, tmp_path):
    found, factors = {}, 0
    for method in ("lora", "token-only", "frozen", "joint"):
        task = run(tinypipes.sd15(), three, tmp_path / method, method=method, rank=2).load_task("cat")
        found[method] = task.info["trained_parameters"]
        if method == "lora":
            factors = sum(factor.numel() for factor in task.factors.values())
    assert found["frozen"] == 0
    assert found["token-only"] == tinypipes.WIDTH
    of_token = found["lora"] - factors
    assert of_token > tinypipes.WIDTH, "a network makes it"
    assert found["joint"] == factors + 3 * of_token


def test_methods_that_differ_in_the_mask_alone_learn_other_weights(three, tmp_path):
    """A mask that the trainer did not reach would leave those of another method."""
    concept, found = load_concepts(three)[:1], {}
    for method, kind in METHODS.items():
        # of those without a mask, most learn the first concept as lora does
        masked = kind.config.keys() & {"mask", "noise"} and kind.config.get("mask") != "none"
        if masked or method in ("stamina", "lora", "custom-diffusion"):
            made = run(tinypipes.sd21(), concept, tmp_path / method, method=method, steps=2, sparsity_weight=0.1)
            found.setdefault(made.tasks()[0]["sha256"], []).append(method)
    assert [methods for methods in found.values() if len(methods) > 1] == []


@pytest.mark.parametrize("kind", tinypipes.KINDS)
def test_the_loss_falls(kind, three, tmp_path, monkeypatch):
    """Every step has the same pictures, noise and timesteps, so the loss can only fall by learning."""
    original = Feed.fill_
    monkeypatch.setattr(Feed, "fill_", lambda self, to, step: original(self, to, 0))
    concept = load_concepts(three)[1:2]
    made = run(tinypipes.KINDS[kind](), concept, tmp_path / "run", steps=30, read_every=30, learning_rate=3e-2)
    losses = [row["denoising"] for row in made.load_task("cup").curve]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3]), losses


def test_the_pooled_text_of_two_encoders_reads_past_the_token(three, tmp_path):
    pipeline = tinypipes.sdxl()
    run(pipeline, three, tmp_path / "run", steps=1)
    for model in (pipeline, type(pipeline).from_pretrained(tmp_path / "run" / "model")):
        pooled = [model.encode_prompt(prompt, do_classifier_free_guidance=False)[2] for prompt in ("a <cat> on", "a <cat> by")]
        assert not torch.allclose(*pooled, atol=1e-3)


def test_pooling_is_the_base_models_where_no_token_is():
    old, new = tinypipes.sdxl(), load_pipeline(tinypipes.sdxl())
    assert new.text_encoder_2.config.eos_token_id == new.tokenizer_2.eos_token_id
    ids = torch.cat([*Backbone(old).tokenise(["a cat on grass", "", "a"])[1:]])
    assert torch.equal(old.text_encoder_2(ids)[0], new.text_encoder_2(ids)[0])


def test_what_cannot_be_trained_is_one_clear_line(three, tmp_path):
    picture = next((three / "cat").iterdir())
    long = Concept("long", (picture,), "a photo of a red ball on grass " * 5 + "<long>", "<long>")
    wrong = tinypipes.sd15()
    wrong.unet = None
    cases = [
        (lambda o: train(tinypipes.sd15(), [], o), "no concepts"),
        (lambda o: run(tinypipes.sd15(), three, o, stesp=3), "no option 'stesp'"),
        (lambda o: run(tinypipes.sd15(), three, o, method="dora"), "no method 'dora'"),
        (lambda o: run(tinypipes.sd15(), three, o, dtype=torch.float16), "float16"),
        (lambda o: run(tinypipes.sd15(), three, o, resolution=30), "multiple of"),
        (lambda o: run(tinypipes.sd15(), three, o, rank=999), "999"),
        (lambda o: run(wrong, three, o), "without unet"),
        (lambda o: run(tmp_path / "nowhere", three, o), "no diffusers folder"),
        (lambda o: run("nobody/no-such-model", three, o), "hf download nobody/no-such-model"),
        (lambda o: run(tinypipes.sd15(), tmp_path / "nowhere", o), "nowhere"),
        (lambda o: train(tinypipes.sd15(), [long], o, progress=False), "the model reads 24"),
    ]
    for i, (call, message) in enumerate(cases):
        output = tmp_path / f"run{i}"
        with pytest.raises(StaminaError, match=message) as caught:
            call(output)
        assert "\n" not in str(caught.value)
        assert not (output / "tasks").exists()
        assert not (output / "model").exists()


def test_progress_shows_losses_and_density(three, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    run(tinypipes.sd15(), three, tmp_path / "run", progress=True)
    shown = capsys.readouterr().out.splitlines()
    assert "\x1b" not in "".join(shown)
    assert shown[0] == "cat: 0 of 4, encoding pictures"
    number = r"[0-9.e+-]+"
    assert re.fullmatch(
        rf"cat: 2 of 4, loss {number}, mask \d+%, forgetting {number}, \d:\d\d:\d\d left, all concepts \d:\d\d:\d\d", shown[1]
    ), shown[1]
    assert re.fullmatch(r"learned cat in [0-9.]+ s", shown[3])
    assert len(shown) == 3 * 4
