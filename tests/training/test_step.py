"""The step reads nothing from the device, moves no tensor, and is the same on every backend."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tinypipes
import torch
from tinyruns import SMALL, run, tensors, write_concepts
from torch.utils._python_dispatch import TorchDispatchMode

from stamina_fast.training.step import Step


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
            # the optimizer allocates its state in the very first step
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


TRITON = """
import json, sys
sys.path[:0] = [{tests!r}]
import torch, tinypipes, tinyruns
import stamina_fast as sf
made = tinyruns.run(tinypipes.narrow(), {folder!r}, {output!r}, **{options!r})
print(json.dumps([[row["loss"] for row in made.load_task(t["name"]).curve] for t in made.tasks()]))
print(json.dumps(sf.launches()))
"""


def test_32_steps_with_triton_are_those_of_the_reference(tmp_path, monkeypatch):
    """Two tasks of 16 steps, with noise, both penalties and a fold between them; launches() says which kernels ran."""
    folder = write_concepts(tmp_path / "two", 2)
    options = {"steps": 16, "sparsity_weight": 0.1, "forgetting_weight": 100.0}
    monkeypatch.setenv("STAMINA_BACKEND", "reference")
    made = run(tinypipes.narrow(), folder, tmp_path / "reference", **options)
    wanted = torch.tensor([[row["loss"] for row in made.load_task(task["name"]).curve] for task in made.tasks()])
    program = TRITON.format(tests=str(Path(tinypipes.__file__).parent), folder=str(folder), output=str(tmp_path / "triton"),
                            options=options)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=280,
        env={**os.environ, "STAMINA_BACKEND": "triton", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    losses, launches = map(json.loads, done.stdout.splitlines()[-2:])
    assert launches["masked_linear/triton"] >= 32
    assert launches["fold_/triton"] == 2
    assert not {"masked_linear/reference", "masked_linear_backward/reference", "fold_/reference"} & launches.keys()
    assert wanted.shape == (2, 16)
    assert wanted.std() > 0.01
    assert (torch.tensor(losses) - wanted).abs().max() <= 2e-5
