"""joint: one training of all concepts and tokens, in a RUN folder like any other."""

import math
from collections import Counter

import pytest
import tinypipes
import torch
from tinyruns import SMALL, assert_same, is_text_kv, run, stacked, tensors

from stamina_fast.adapter.attach import Adapters
from stamina_fast.adapter.words import words_in_use
from stamina_fast.errors import InputError, StaminaError
from stamina_fast.evaluate import evaluate_run
from stamina_fast.io.concepts import Concept, load_concepts
from stamina_fast.training.data import Feed

NAMES = ("cat", "cup", "rocket")


@pytest.fixture(scope="module")
def learned(three, tmp_path_factory):
    """(run, pipeline, {task: pipeline's tensors after it})."""
    pipeline, after = tinypipes.sd15(), {}
    made = run(pipeline, three, tmp_path_factory.mktemp("joint") / "run", method="joint",
               on_task=lambda now, _, concept: after.update({concept.name: tensors(now)}))
    return made, pipeline, after


def test_the_first_task_holds_the_whole_residual(learned):
    made, pipeline, after = learned
    assert [len(made.load_task(name).curve) for name in NAMES] == [3 * SMALL["steps"], 0, 0]
    base = tinypipes.sd15()
    names = [name for name in after["cat"] if is_text_kv(name)]
    before = [tensors(base)[name].double() for name in names]
    sizes = [len(weight) for weight in before]
    total = torch.cat(before) + stacked(made.load_task("cat").factors, sizes)
    for name in NAMES:
        now = torch.cat([after[name][key].double() for key in names])
        assert (now - torch.cat(before)).abs().max() > 1e-3
        assert (now - total).abs().max() < 1e-6
        assert (stacked(made.load_task(name).factors, sizes).abs().max() > 0) == (name == "cat")
    # nothing of the method is left on the model
    assert not pipeline.text_encoder.get_input_embeddings()._forward_hooks


def test_tokens_are_where_a_sequential_run_has_them_and_are_as_trained(learned, three, tmp_path):
    made, pipeline, _ = learned
    other = tinypipes.sd15()
    run(other, three, tmp_path / "run", method="lora", steps=1)
    assert pipeline.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    frozen = run(tinypipes.sd15(), three, tmp_path / "frozen", method="frozen")
    table, kept = pipeline.text_encoder.get_input_embeddings().weight, made.load_task("cat").kept
    # the length that a word has in the base model
    fresh = tinypipes.sd15()
    words = fresh.text_encoder.get_input_embeddings().weight.detach()
    norm = words[words_in_use(words, fresh.tokenizer)].norm(dim=1).median().item()
    for i, name in enumerate(NAMES):
        stored = made.load_task(name).token["text_encoder"]
        assert torch.equal(table[pipeline.tokenizer.convert_tokens_to_ids(f"<{name}>")], stored)
        moved = (stored - frozen.load_task(name).token["text_encoder"]).norm()
        assert moved > 0.01 * stored.norm()
        if i:
            part = {key.split(".", 1)[1]: x.double() for key, x in kept.items() if key.startswith(f"{i - 1}.")}
            layers = [(part[f"text_encoder.weights.{j}"], part[f"text_encoder.biases.{j}"]) for j in (0, 1)]
            h = part["text_encoder.code"]
            for j, (weight, bias) in enumerate(layers):
                h = weight @ h / math.sqrt(weight.shape[1]) + bias
                h = h * torch.sigmoid(h) if j == 0 else h * norm / math.sqrt(len(stored))
            assert (h - stored).abs().max() < 1e-6


def test_batches_show_every_picture_of_every_concept_alike(three, tmp_path, monkeypatch):
    seen, banks, fill_ = Counter(), [], Feed.fill_

    def watch(self, to, step):
        fill_(self, to, step)
        banks.append(self.bank)
        seen.update(int(x) for ids in to.ids for x in ids.flatten())

    monkeypatch.setattr(Feed, "fill_", watch)
    cat, cup, rocket = load_concepts(three)
    uneven = Concept("cat", (*cat.images, *rocket.images[:1]), cat.prompt, cat.token)
    pipeline = tinypipes.sd15()
    run(pipeline, [uneven, cup, rocket], tmp_path / "run", method="joint", batch=16, steps=20, crops=3)
    # seven pictures, each with its crops
    assert torch.equal(banks[0].picture, torch.arange(7).repeat_interleave(3))
    shares = [seen[pipeline.tokenizer.convert_tokens_to_ids(f"<{name}>")] / (16 * 60) for name in NAMES]
    # 960 draws: four standard deviations are less than 0.065
    assert shares == pytest.approx([3 / 7, 2 / 7, 2 / 7], abs=0.065)
    assert sum(shares) == 1


def test_schedules_span_the_whole_training(three, tmp_path):
    rates = []
    run(tinypipes.sd15(), three, tmp_path / "run", method="joint", lr_schedule="linear", optimizer="adamw",
        on_step=lambda step, task, i: rates.append(step.optimizer.rates[0].item() / SMALL["learning_rate"]))
    assert rates == pytest.approx([1 - i / 12 for i in range(12)])


@pytest.mark.parametrize("where", ["step", "picture", "fold"])
def test_what_fails_leaves_the_base_model(where, three, tmp_path, monkeypatch):
    def poison(step, task, i):
        if where == "step" and i == 5:
            step.buffers.latents.fill_(math.nan)

    def fail(*args):
        raise InputError("a damaged picture")

    if where == "picture":
        monkeypatch.setattr("stamina_fast.training.data.load_image", fail)
    elif where == "fold":
        monkeypatch.setattr(Adapters, "fold_", fail)
    pipeline = tinypipes.sd15()
    before = tensors(pipeline)
    with pytest.raises(StaminaError, match=r"a damaged picture|the latents is not finite at step 5"):
        run(pipeline, three, tmp_path / "run", method="joint", on_step=poison)
    assert_same(tensors(pipeline), before)
    assert pipeline.tokenizer.get_vocab() == tinypipes.sd15().tokenizer.get_vocab()
    assert not pipeline.text_encoder.get_input_embeddings()._forward_hooks


def test_a_single_concept_is_lora(three, tmp_path):
    one = load_concepts(three)[:1]
    joint, lora = (run(tinypipes.sd15(), one, tmp_path / method, method=method) for method in ("joint", "lora"))
    assert joint.tasks()[0]["files"] == lora.tasks()[0]["files"] | {"task.json": joint.tasks()[0]["files"]["task.json"]}


def test_class_pictures_are_refused(three, tmp_path):
    cat = load_concepts(three)[0]
    given = [Concept("cat", cat.images, cat.prompt, cat.token, "a photo of a cat", None, cat.images)]
    with pytest.raises(InputError, match="leave prior_weight out"):
        run(tinypipes.sd15(), given, tmp_path / "run", method="joint", prior_weight=1.0)
    assert not (tmp_path / "run").exists()


def test_it_is_evaluated_as_any_run_and_forgets_nothing(learned):
    made, _, _ = learned
    metrics = evaluate_run(made.path, samples=4, guidance=(1.0,), steps=1, model=tinypipes.sd15(), progress=False)
    assert [task["forgetting"] for task in metrics["tasks"]] == [pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9), None]
    assert [task["step"] > 0 for task in metrics["tasks"]] == [True, False, False]
    assert (made.path / "plots" / "curves.png").is_file()
