"""lora-merge: tasks are learned from W_0, and their residuals are summed."""

import math

import pytest
import tinypipes
import torch
from tinyruns import assert_same, run, stacked, tensors

from stamina_fast.errors import StaminaError


def test_every_task_starts_from_the_base_and_ends_in_the_sum(three, tmp_path):
    learning, between, sizes = {}, [], []

    def watch(step, task, i):
        (stack,) = step.adapters.stacks
        sizes[:] = stack.sizes
        learning[task, i] = stack.weight.clone()

    def weight(pipeline):
        modules = [m for name, m in pipeline.unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
        return torch.cat([module.weight.detach() for module in modules])

    pipeline = tinypipes.sd15()
    base = weight(pipeline).clone()
    made = run(pipeline, three, tmp_path / "run", method="lora-merge", on_step=watch,
               on_task=lambda learned, *_: between.append(weight(learned).clone()))
    assert len(learning) == 3 * 4
    assert all(torch.equal(now, base) for now in learning.values())
    total = base.double()
    for task, now in zip(made.tasks(), between, strict=True):
        residual = stacked(made.load_task(task["name"]).factors, sizes)
        assert residual.abs().max() > 1e-3
        total = total + residual
        assert (now - total).abs().max() < 1e-6
    assert torch.equal(weight(pipeline), between[-1])


def test_a_task_that_fails_leaves_the_sum_before_it(three, tmp_path):
    pipeline, kept = tinypipes.sd15(), {}

    def poison(step, task, i):
        if task == 1:
            step.buffers.latents.fill_(math.nan)

    with pytest.raises(StaminaError, match="cup: the latents is not finite"):
        run(pipeline, three, tmp_path / "run", method="lora-merge", on_step=poison,
            on_task=lambda learned, *_: kept.update(tensors(learned)))
    assert_same(tensors(pipeline), kept)
