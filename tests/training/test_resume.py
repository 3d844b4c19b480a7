"""Runs that are killed, resumed with changed options, or meet numbers that are not finite."""

import math
import multiprocessing

import pytest
import tinypipes
from tinyruns import SMALL, Killed, assert_same, run, tensors

from stamina_fast.adapter.attach import Adapters
from stamina_fast.errors import FileError, InputError, StaminaError
from stamina_fast.io.run import Run
from stamina_fast.training import loop


def stop_in_the_second_task(at, patch):
    """Kill the trainer at the fold or commit of the second task, before model/ is saved, or before its step `at`.

    Returns the on_step hook that kills before a step.
    """
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
    return lambda step, task, i: die() if (task, i) == (1, at) else None


@pytest.mark.parametrize("at", [0, 2, 3, "fold", "commit", "model"])
def test_resume_ends_in_the_same_bits(at, three, uninterrupted, tmp_path):
    whole, bits = uninterrupted
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        run(tinypipes.sd15(), three, tmp_path / "run", on_step=stop_in_the_second_task(at, patch))
    assert len(Run.open(tmp_path / "run").tasks()) == (3 if at == "model" else 1)
    pipeline = tinypipes.sd15()
    resumed = run(pipeline, three, tmp_path / "run", resume=True)
    assert_same(tensors(pipeline), bits)
    for mine, theirs in zip(resumed.tasks(), whole.tasks(), strict=True):
        assert mine["sha256"] == theirs["sha256"]
        assert resumed.load_task(mine["name"]).curve == whole.load_task(mine["name"]).curve
    files = sorted(p.name for p in (tmp_path / "run" / "model").rglob("*.safetensors"))
    assert files == sorted(p.name for p in (whole.path / "model").rglob("*.safetensors"))


def train_or_resume(folder, output):
    run(tinypipes.sd15(), folder, output, resume=output.exists())


def test_killed_processes_end_in_the_same_bits(three, uninterrupted, tmp_path):
    whole, _ = uninterrupted
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tinypipes", "tinyruns"])
    seconds, killed = 0.05, 0
    while True:
        process = processes.Process(target=train_or_resume, args=(three, tmp_path / "run"))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        # -9 is our kill; any other code is an error of the trainer, printed above
        assert process.exitcode == -9
        seconds, killed = seconds * 1.5, killed + 1
    assert killed
    run_ = Run.open(tmp_path / "run")
    assert [task["sha256"] for task in run_.tasks()] == [task["sha256"] for task in whole.tasks()]
    assert not [path for path in run_.path.rglob("*") if path.name not in {p.name for p in whole.path.rglob("*")}]


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


def poison_latents(step, value):
    step.buffers.latents[0, 0, 0, 0] = value


def poison_prediction(step, value):
    predict = step.backbone.predict
    step.backbone.predict = lambda *inputs: predict(*inputs) * value


def poison_gradient(step, value):
    norms = step.optimizer.norms

    def poisoned():
        step.optimizer.grads[3].view(-1)[0] = value
        return norms()

    step.optimizer.norms = poisoned


def poison_parameter(step, value):
    step.optimizer.values[0].view(-1)[0] = value


POISONS = {
    r"the parameter stacks\.0\.a is not finite": poison_parameter,
    "the latents is not finite": poison_latents,
    "the U-Net's prediction is not finite": poison_prediction,
    r"the gradient of stacks\.0\.mask\.\S+ is not finite": poison_gradient,
}


@pytest.mark.parametrize("named", POISONS)
@pytest.mark.parametrize("at", range(SMALL["steps"]))
def test_not_finite_rolls_the_task_back_and_names_the_tensor(named, at, three, uninterrupted, tmp_path):
    whole, _ = uninterrupted
    pipeline, kept = tinypipes.sd15(), {}

    def poison(step, task, i):
        if (task, i) == (1, at):
            POISONS[named](step, (math.nan, math.inf)[at % 2])

    with pytest.raises(StaminaError, match=f"cup: {named} at step {at};") as caught:
        run(pipeline, three, tmp_path / "run", on_step=poison, on_task=lambda learned, *_: kept.update(tensors(learned)))
    assert "\n" not in str(caught.value)
    # the model has the bits and the vocabulary that the first task left
    assert_same(tensors(pipeline), kept)
    assert "<cat>" in pipeline.tokenizer.get_vocab()
    assert "<cup>" not in pipeline.tokenizer.get_vocab()
    run_now = Run.open(tmp_path / "run")
    assert [task["sha256"] for task in run_now.tasks()] == [whole.tasks()[0]["sha256"]]
    assert [path.name for path in (tmp_path / "run" / "tasks").iterdir()] == ["01-cat"]


def test_what_the_last_step_breaks_is_not_folded(three, tmp_path):
    """No further step sees the last update: it is checked before the fold."""
    def run_away(step, task, i):
        if i == SMALL["steps"] - 1:
            step.optimizer.rates[0].fill_(math.inf)

    pipeline = tinypipes.sd15()
    before = tensors(pipeline)
    with pytest.raises(StaminaError, match=r"cat: stacks\.0\.a is not finite after the last step"):
        run(pipeline, three, tmp_path / "run", on_step=run_away)
    assert_same(tensors(pipeline), before)
    assert not Run.open(tmp_path / "run").tasks()
