"""o-lora: the penalty and its gradient against Σ ‖B_i B_tᵀ‖² in float64."""

from types import SimpleNamespace

import pytest
import tinypipes
import torch
from tinyruns import run

from stamina_fast.io.concepts import load_concepts
from stamina_fast.training.methods.o_lora import OLora


def closed_form(past, b):
    """The penalty, and its gradient 2 Σ_i (B_t B_iᵀ) B_i for each projection, in float64."""
    past, b = [other.double() for other in past], b.double()
    value = sum(float((other[g] @ b[g].T).square().sum()) for other in past for g in range(len(b)))
    gradient = torch.stack([sum(2 * b[g] @ other[g].T @ other[g] for other in past) for g in range(len(b))])
    return value, gradient


def test_the_penalty_of_every_step_and_its_part_of_the_loss(three, tmp_path):
    seen = {}

    def watch(step, task, i):
        seen[task, i] = step.adapters.stacks[0].b.detach().clone()

    made = run(tinypipes.sd15(), three, tmp_path / "run", method="o-lora", forgetting_weight=0.7, on_step=watch)
    names, past = [task["name"] for task in made.tasks()], []
    for task, name in enumerate(names):
        done = made.load_task(name)
        for i, row in enumerate(done.curve):
            value = closed_form(past, seen[task, i])[0] if past else 0.0
            assert row["forgetting"] == pytest.approx(value, rel=1e-5)
            assert row["loss"] == pytest.approx(row["denoising"] + 0.7 * value, rel=1e-5)
        past.append(done.factors["stacks.0.b"])
    assert done.curve[0]["forgetting"] > 2 * done.curve[-1]["forgetting"] > 0


def test_the_gradient(three):
    draw = torch.Generator().manual_seed(0)
    past, b = (torch.randn(count, 3, 2, 8, generator=draw) for count in (2, 1))
    stack = SimpleNamespace(b=b[0].requires_grad_())
    tasks = {name: {"stacks.0.b": other} for name, other in zip("xy", past, strict=True)}
    adapters = SimpleNamespace(stacks=[stack], tasks=tasks)
    trainer, method = SimpleNamespace(adapters=adapters, concepts=load_concepts(three)), OLora()
    method.start(trainer)
    with method.learning(trainer, 2):
        value = method.penalty(adapters)
        value.backward()
    wanted, gradient = closed_form(list(past), b[0].detach())
    assert value.item() == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(stack.b.grad.double(), gradient, rtol=1e-4, atol=1e-5)
