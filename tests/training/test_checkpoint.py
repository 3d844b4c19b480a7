"""Resuming within a task gives the bits of an uninterrupted run; a lost checkpoint is an error."""

import json

import pytest
import tinypipes
import torch
from replay import Replay
from tinyruns import Killed, assert_same, run, tensors, write_concepts

from stamina_fast.errors import FileError
from stamina_fast.io.files import write_tensors
from stamina_fast.io.run import Run
from stamina_fast.training import loop

OPTIONS = {"steps": 7, "method": "c-stamina", "sparsity_weight": 0.1, "lr_schedule": "cosine", "read_every": 3}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return write_concepts(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def whole(two, tmp_path_factory):
    """An uninterrupted run without checkpoints, and the tensors of its pipeline."""
    pipeline = tinypipes.sd15()
    return run(pipeline, two, tmp_path_factory.mktemp("whole") / "run", **OPTIONS), tensors(pipeline)


def train_until(at, two, output, monkeypatch, **changes):
    """Train until killed: before step `at` of the second task, or for a negative `at` in its save number -`at`.

    A save is killed when its checkpoint is written and the manifest is not.
    """
    saves, write = iter(range(1, 100)), Run._write

    def kill(step, task, i):
        if (task, i) == (1, at):
            raise Killed

    def written(self, manifest):
        if manifest.checkpoint is not None and len(manifest.tasks) == 1 and next(saves) == -at:
            raise Killed
        write(self, manifest)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_write", written)
        with pytest.raises(Killed):
            run(tinypipes.sd15(), two, output, save_every=2, on_step=kill, **(OPTIONS | changes))


@pytest.mark.parametrize(("at", "left"), [(0, 7), (2, 5), (3, 5), (5, 3), (6, 1), (-2, 5)])
def test_a_resumed_task_ends_in_the_same_bits(at, left, two, whole, tmp_path, monkeypatch):
    train_until(at, two, tmp_path / "run", monkeypatch)
    pipeline, steps = tinypipes.sd15(), []
    options = OPTIONS | {"save_every": 3, "on_step": lambda step, task, i: steps.append((task, i))}
    made = run(pipeline, two, tmp_path / "run", resume=True, **options)
    assert steps == [(1, i) for i in range(7 - left, 7)]
    assert_same(tensors(pipeline), whole[1])
    for mine, theirs in zip(made.tasks(), whole[0].tasks(), strict=True):
        assert mine["sha256"] == theirs["sha256"]
        assert made.load_task(mine["name"]).curve == whole[0].load_task(mine["name"]).curve
        # seconds of the whole task, not of what was left of it
        assert made.load_task(mine["name"]).info["seconds"] > 0
    assert "checkpoint" not in json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert not list((tmp_path / "run").glob("checkpoint*"))


@pytest.mark.parametrize("method", ["dense-logits", "soft-mask", "hard-concrete", "two-four", "custom-diffusion"])
def test_so_does_a_task_of_another_mask(method, two, tmp_path, monkeypatch):
    plain, pipeline, options = tinypipes.sd15(), tinypipes.sd15(), OPTIONS | {"method": method, "tau_end": 0.5}
    whole = run(plain, two, tmp_path / "whole", **options)
    train_until(3, two, tmp_path / "run", monkeypatch, **options)
    made = run(pipeline, two, tmp_path / "run", resume=True, **options)
    assert_same(tensors(pipeline), tensors(plain))
    assert [task["sha256"] for task in made.tasks()] == [task["sha256"] for task in whole.tasks()]


def test_a_captured_run_goes_on_within_a_task(two, whole, tmp_path, monkeypatch):
    """With the stand-in for CUDA graphs: warm-up and recording happen in the rest of the task."""
    train_until(3, two, tmp_path / "run", monkeypatch)
    pipeline, stand_in = tinypipes.sd15(), Replay()
    monkeypatch.setattr(loop, "recorder", lambda wanted, device: stand_in)
    run(pipeline, two, tmp_path / "run", resume=True, **OPTIONS)
    assert_same(tensors(pipeline), whole[1])
    assert (stand_in.warmed, stand_in.replayed) == (3, 2)


def unlink(file):
    file.unlink()


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def cut(file):
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize(("harm", "say"), [(unlink, "cannot read"), (flip, "is damaged"), (cut, "is damaged")])
def test_a_missing_or_broken_state_is_an_error(harm, say, two, tmp_path, monkeypatch):
    train_until(3, two, tmp_path / "run", monkeypatch)
    (file,) = (tmp_path / "run").glob("checkpoint*")
    assert file.name == "checkpoint-02-000002.safetensors"
    harm(file)
    before = (tmp_path / "run" / "manifest.json").read_bytes()
    with pytest.raises(FileError, match=f"{say}.*{file.name}|{file.name}.*{say}") as caught:
        run(tinypipes.sd15(), two, tmp_path / "run", resume=True, **OPTIONS)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before


def test_a_state_of_something_else_is_refused_by_name(two, tmp_path, monkeypatch):
    train_until(3, two, tmp_path / "run", monkeypatch)
    there = Run.open(tmp_path / "run")
    tensors_ = there.load_checkpoint().tensors
    tensors_["value.stacks.0.a"] = torch.zeros(2, 2)
    there.save_checkpoint("cup", 2, tensors_)
    with pytest.raises(FileError, match=r"after step 2 does not fit: 'value\.stacks\.0\.a' is \(\[2, 2\]"):
        run(tinypipes.sd15(), two, tmp_path / "run", resume=True, **OPTIONS)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    made = Run.create(tmp_path / "run", {})
    made.save_checkpoint("cat", 2, {"x": torch.ones(2)})
    monkeypatch.setattr("stamina_fast.io.run.write_json", lambda *_: (_ for _ in ()).throw(FileError("No space left")))
    with pytest.raises(FileError, match="No space"):
        made.save_checkpoint("cat", 4, {"x": torch.zeros(2)})
    assert made.load_checkpoint().step == 2
    assert [file.name for file in made.path.glob("checkpoint*")] == ["checkpoint-01-000002.safetensors"]
    write_tensors(made.path / "checkpoint-01-000004.safetensors", {"x": torch.zeros(2)})
    Run.create(tmp_path / "run", {}, resume=True)
    assert [file.name for file in made.path.glob("checkpoint*")] == ["checkpoint-01-000002.safetensors"]
