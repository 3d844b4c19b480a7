"""The sequential trainer, end to end on tiny pipelines of every kind."""

import json
import subprocess
import sys

import pytest
import tinypipes
import torch
from tinyruns import SMALL, assert_same, is_embedding, is_text_kv, run, tensors, write_concepts
from torch.utils._python_dispatch import TorchDispatchMode

from stamina_fast.attach import Adapters
from stamina_fast.errors import FileError, InputError, StaminaError
from stamina_fast.io.concepts import Concept
from stamina_fast.io.run import Run
from stamina_fast.methods import METHODS
from stamina_fast.sampling import sample
from stamina_fast.train import loop, train
from stamina_fast.train.step import Step


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_concepts(tmp_path_factory.mktemp("concepts"), 4)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return write_concepts(tmp_path_factory.mktemp("three"), 3)


@pytest.fixture(scope="module")
def uninterrupted(three, tmp_path_factory):
    """Three tasks in one go: the run and the bits of the pipeline at its end."""
    pipeline = tinypipes.sd15()
    return run(pipeline, three, tmp_path_factory.mktemp("whole") / "run"), tensors(pipeline)


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
        # the words that the base knew keep their bits; each encoder has one row more a concept
        assert torch.equal(after[name][: len(before[name])], before[name])
        assert len(after[name]) == len(before[name]) + 4
    for name in names:
        curve = made.load_task(name).curve
        assert [row["step"] for row in curve] == [0, 1, 2]
        assert all(row["loss"] > 0 for row in curve)
        assert 0 < curve[-1]["density"] < 1
    # the folder holds the same pipeline, which draws the same picture
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


class Killed(BaseException):
    """Stands for a kill: nothing in the trainer may catch it."""


def stop_in_the_second_task(at):
    """Patch the trainer to be killed before step `at` of the second task, at its fold or commit, or before model/ is saved."""
    patch, steps = pytest.MonkeyPatch(), iter(range(1000))

    def die(*args, **kwargs):
        raise Killed

    def later(original, wanted):
        return lambda *args, **kwargs: die() if wanted(*args) else original(*args, **kwargs)

    if at == "model":
        patch.setattr(loop, "save_model", die)
    elif at == "fold":
        patch.setattr(Adapters, "fold_", later(Adapters.fold_, lambda adapters, name: adapters.folded))
    elif at == "commit":
        patch.setattr(Run, "commit_task", later(Run.commit_task, lambda run, *_: run.tasks()))
    else:
        patch.setattr(Step, "__call__", later(Step.__call__, lambda step: next(steps) == SMALL["steps"] + at))
    return patch


@pytest.mark.parametrize("at", [0, 2, 3, "fold", "commit", "model"])
def test_resume_ends_in_the_same_bits(at, three, uninterrupted, tmp_path):
    whole, bits = uninterrupted
    patch = stop_in_the_second_task(at)
    try:
        with pytest.raises(Killed):
            run(tinypipes.sd15(), three, tmp_path / "run")
    finally:
        patch.undo()
    assert len(Run.open(tmp_path / "run").tasks()) == (3 if at == "model" else 1)
    pipeline = tinypipes.sd15()
    resumed = run(pipeline, three, tmp_path / "run", resume=True)
    assert_same(tensors(pipeline), bits)
    for mine, theirs in zip(resumed.tasks(), whole.tasks(), strict=True):
        assert mine["sha256"] == theirs["sha256"]
        assert resumed.load_task(mine["name"]).curve == whole.load_task(mine["name"]).curve
    files = sorted(p.name for p in (tmp_path / "run" / "model").rglob("*.safetensors"))
    assert files == sorted(p.name for p in (whole.path / "model").rglob("*.safetensors"))


def test_resume_refuses_what_is_not_the_same_run(three, tmp_path, pictures):
    output = tmp_path / "run"
    run(tinypipes.sd15(), three, output, steps=1)
    for changes, named in (({"steps": 2}, "train.steps was 1, is 2"), ({"steps": 1, "rank": 3}, "stamina.rank was 2, is 3"),
                           ({"steps": 1, "method": "lora"}, "method was 'stamina'")):
        with pytest.raises(InputError, match=named):
            run(tinypipes.sd15(), three, output, resume=True, **changes)
    with pytest.raises(InputError, match="fingerprint"):
        run(tinypipes.sd15(seed=1), three, output, resume=True, steps=1)
    with pytest.raises(InputError, match=r"concepts.face was None"):
        run(tinypipes.sd15(), pictures, output, resume=True, steps=1)
    with pytest.raises(FileError, match="not empty"):
        run(tinypipes.sd15(), three, output, steps=1)
    lost = next((output / "tasks").glob("02-*")) / "factors.safetensors"
    lost.unlink()
    with pytest.raises(FileError, match=r"factors\.safetensors"):
        run(tinypipes.sd15(), three, output, resume=True, steps=1)


POISONS = {
    "the gradient of ": lambda step: step.optimizer.grads[3],
    "the U-Net's prediction": None,
    "the latents": lambda step: step.buffers.latents,
}


@pytest.mark.parametrize("named", POISONS)
@pytest.mark.parametrize("at", range(SMALL["steps"]))
def test_not_finite_rolls_the_task_back_and_names_the_tensor(named, at, three, uninterrupted, tmp_path, monkeypatch):
    whole, _ = uninterrupted
    value = (float("nan"), float("inf"))[at % 2]
    steps, original, kept = [0], Step.__call__, {}

    def call(self):
        poisoned = steps[0] == SMALL["steps"] + at
        steps[0] += 1
        if not poisoned:
            return original(self)
        with pytest.MonkeyPatch.context() as patch:
            if named == "the U-Net's prediction":
                predict = self.backbone.predict
                patch.setattr(self.backbone, "predict", lambda *a: predict(*a) * value)
            elif named == "the latents":
                self.buffers.latents[0, 0, 0, 0] = value
            else:
                norms = self.optimizer.norms
                patch.setattr(self.optimizer, "norms", lambda: (self.optimizer.grads[3].view(-1)[0].fill_(value), norms())[1])
            return original(self)

    monkeypatch.setattr(Step, "__call__", call)
    pipeline = tinypipes.sd15()
    with pytest.raises(StaminaError, match=named) as caught:
        run(pipeline, three, tmp_path / "run", on_task=lambda p, r, c: kept.update(tensors(p)))
    assert f"at step {at};" in str(caught.value)
    assert "\n" not in str(caught.value)
    after = tensors(pipeline)
    assert_same({k: v for k, v in after.items() if not is_embedding(k)}, {k: v for k, v in kept.items() if not is_embedding(k)})
    (embedding,) = filter(is_embedding, after)
    assert torch.equal(after[embedding][: len(pipeline.tokenizer)], kept[embedding][: len(pipeline.tokenizer)])
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [task["sha256"] for task in manifest["tasks"]] == [whole.tasks()[0]["sha256"]]
    assert [p.name for p in (tmp_path / "run" / "tasks").iterdir()] == ["01-cat"]


class NoHostRead(TorchDispatchMode):
    """Raises where Python asks for a value of a tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "equal", "is_nonzero", "nonzero"):
            raise AssertionError(f"the step reads the device: {name}")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", tinypipes.KINDS)
@pytest.mark.parametrize("method", ["stamina", "c-stamina"])
def test_the_step_reads_nothing_and_moves_nothing(kind, method, three, tmp_path, monkeypatch):
    original, seen = Step.__call__, []

    def call(self):
        state = [t for s in self.optimizer.adamw.state.values() for t in s.values()]
        parameters = [p for f in self.optimizer.flats for p in f.parameters]
        buffers = [x for x in vars(self.buffers).values() if isinstance(x, torch.Tensor)] + self.buffers.ids
        if seen:
            # the optimizer makes its state in the very first step
            seen.append([t.data_ptr() for t in [*state, *parameters, *(p.grad for p in parameters), *buffers, self.losses]])
            with NoHostRead():
                original(self)
        else:
            original(self)
            seen.append(None)

    monkeypatch.setattr(Step, "__call__", call)
    run(tinypipes.KINDS[kind](), three, tmp_path / "run", method=method, sparsity_weight=0.1)
    assert len(seen) == 3 * SMALL["steps"]
    assert all(pointers == seen[1] for pointers in seen[2:])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(method, three, tmp_path):
    pipeline = tinypipes.sd21()
    before = tensors(pipeline)
    made = run(pipeline, three, tmp_path / "run", method=method, min_snr=5.0)
    after = tensors(pipeline)
    changed = {name for name in before if before[name].shape != after[name].shape or not torch.equal(before[name], after[name])}
    assert any(map(is_text_kv, changed)) == (method != "token-only")
    last = made.load_task("rocket")
    assert (last.info["density"] == 1) == (METHODS[method].config.get("mask") == "none")
    assert (last.curve[-1]["forgetting"] > 0) == (method in ("c-lora", "c-stamina"))


def test_the_loss_falls(three, tmp_path):
    made = run(tinypipes.sd21(), three, tmp_path / "run", steps=60, batch=4, read_every=20, learning_rate=2e-2)
    for task in made.tasks():
        losses = [row["denoising"] for row in made.load_task(task["name"]).curve]
        assert sum(losses[-20:]) < 0.9 * sum(losses[:20])


def test_gradient_checkpointing_changes_no_loss(three, uninterrupted, tmp_path):
    _, bits = uninterrupted
    pipeline = tinypipes.sd15()
    run(pipeline, three, tmp_path / "run", gradient_checkpointing=True)
    for name, tensor in tensors(pipeline).items():
        torch.testing.assert_close(tensor, bits[name], rtol=1e-5, atol=1e-6)
    assert not pipeline.unet.is_gradient_checkpointing


def test_bfloat16_trains_and_keeps_fp32_factors(three, tmp_path):
    pipeline = tinypipes.sd15().to(torch.bfloat16)
    made = run(pipeline, three, tmp_path / "run")
    assert pipeline.unet.dtype == pipeline.vae.dtype == torch.bfloat16
    assert all(row["loss"] > 0 for row in made.load_task("cup").curve)


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


def test_progress_shows_losses_and_density(three, tmp_path, capsys):
    run(tinypipes.sd15(), three, tmp_path / "run", progress=True)
    shown = capsys.readouterr().out
    assert "learned cat in" in shown
