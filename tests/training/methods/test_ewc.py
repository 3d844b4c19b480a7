"""ewc: Fisher information and penalty against their definitions, by plain autograd in float64."""

import pytest
import tinypipes
import torch
from tinyruns import is_text_kv, run, stacked

from stamina_fast.training.data import Feed


@pytest.fixture
def batches(monkeypatch):
    """The batches that follow those of the steps: (latents, noise, t, ids)."""
    seen, fill_ = [], Feed.fill_

    def watch(self, to, step):
        fill_(self, to, step)
        if step >= 4:
            seen.append([x.clone() for x in (to.latents, to.noise, to.t, *to.ids)])

    monkeypatch.setattr(Feed, "fill_", watch)
    return seen


def squared_gradients(pipeline, batches):
    """The mean over rows of (∂ℓ/∂W)² [N, k], ℓ the mean square error of one row, all in float64."""
    unet, encoder = pipeline.unet.double(), pipeline.text_encoder.double()
    weights = [p for name, p in unet.named_parameters() if is_text_kv(f"unet.{name}")]
    total, rows = 0, 0
    for latents, noise, t, ids in batches:
        for i in range(len(t)):
            one = slice(i, i + 1)
            noisy = pipeline.scheduler.add_noise(latents[one].double(), noise[one].double(), t[one])
            states = encoder(ids[one])[0].detach()
            loss = (unet(noisy, t[one], encoder_hidden_states=states).sample - noise[one].double()).square().mean()
            gradients = torch.autograd.grad(loss, weights)
            total, rows = total + torch.cat(gradients).square(), rows + 1
    return total / rows


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fisher_is_that_of_the_folded_model_on_the_tasks_own_batches(accumulate, three, tmp_path, batches):
    pipelines, upto = [], []

    def keep(learned, made, concept):
        twin = tinypipes.sd15()
        # the folded weights and the token, in a model of its own
        twin.text_encoder.resize_token_embeddings(learned.text_encoder.get_input_embeddings().num_embeddings)
        for part in ("unet", "text_encoder"):
            getattr(twin, part).load_state_dict(getattr(learned, part).state_dict())
        pipelines.append(twin)
        upto.append(len(batches))

    made = run(tinypipes.sd15(), three, tmp_path / "run", method="ewc", fisher_batches=3, on_task=keep, accumulate=accumulate)
    assert upto == [3, 6, 9]
    total = 0
    for task, name in enumerate(("cat", "cup", "rocket")):
        total = total + squared_gradients(pipelines[task], batches[3 * task : 3 * task + 3])
        fisher = made.load_task(name).kept["fisher.0"]
        assert fisher.dtype == torch.float32
        assert fisher.max() > 1e-7
        torch.testing.assert_close(fisher.double(), total, rtol=1e-3, atol=1e-5 * float(total.max()))


def test_the_penalty_of_every_step_and_its_gradient(three, tmp_path):
    seen, weight, options = {}, 3e5, {"method": "ewc", "fisher_batches": 2}

    def watch(step, task, i):
        (stack,) = step.adapters.stacks
        seen[task, i] = {"stacks.0.a": stack.a.detach().clone(), "stacks.0.b": stack.b.detach().clone()}, stack.sizes
        if (task, i) == (2, 3):
            a, b = torch.autograd.grad(step.penalty(step.adapters), [stack.a, stack.b])
            seen["gradient"] = a.double(), b.double()

    made = run(tinypipes.sd15(), three, tmp_path / "run", forgetting_weight=weight, on_step=watch, **options)
    fisher = torch.zeros(())
    for task, name in enumerate(("cat", "cup", "rocket")):
        done = made.load_task(name)
        for i, row in enumerate(done.curve):
            value = float((fisher.double() * stacked(*seen[task, i]).square()).sum()) / 2
            assert row["forgetting"] == pytest.approx(value, rel=1e-4)
            assert row["loss"] == pytest.approx(row["denoising"] + weight * value, rel=1e-5)
        last, fisher = fisher, done.kept["fisher.0"]
    assert done.curve[-1]["forgetting"] > 0
    factors, sizes = seen[2, 3]
    slope = last.double() * stacked(factors, sizes)
    parts = zip(slope.split(sizes), factors["stacks.0.a"].double().split(sizes), factors["stacks.0.b"].double(), strict=True)
    wanted = [(rows @ b.T, a.T @ rows) for rows, a, b in parts]
    joined = torch.cat([a for a, _ in wanted]), torch.stack([b for _, b in wanted])
    for got, want in zip(seen["gradient"], joined, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_a_larger_weight_changes_the_weights_less(three, tmp_path):
    change = []
    for weight in (1e2, 1e8):
        made = run(tinypipes.sd15(), three, tmp_path / f"{weight}", method="ewc", forgetting_weight=weight, steps=12)
        factors, fisher = made.load_task("rocket").factors, made.load_task("cup").kept["fisher.0"].double()
        sizes = [len(fisher) // len(factors["stacks.0.b"])] * len(factors["stacks.0.b"])
        change.append(float((fisher * stacked(factors, sizes).square()).sum()))
    assert change[1] < 0.5 * change[0]
