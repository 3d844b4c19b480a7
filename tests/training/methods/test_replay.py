"""replay: earlier concepts are drawn with the model as it is, and come into the batches with their prompts."""

import pytest
import tinypipes
import torch
from tinyruns import CHEAP, run

from stamina_fast.pipeline.sampling import sample
from stamina_fast.training import loop
from stamina_fast.training.data import Feed
from stamina_fast.training.latents import LatentBank
from stamina_fast.training.methods import replay
from stamina_fast.training.step import Buffers

# variants 0-2 are of the concept, 3-6 drawn, 7-8 of its class; the prompt of variant i is i
BANK = LatentBank(torch.arange(9.0).view(9, 1, 1, 1), torch.zeros(9, 1, 1, 1), torch.arange(9), torch.zeros(9, 4), 1.0, 0.0)


def shown(share, step, batch=8, drawn=4, prior=0):
    """The variants in the rows of a batch."""
    bank = LatentBank(*(x[: 3 + drawn + prior] for x in (BANK.mean, BANK.deviation, BANK.picture, BANK.frames)), 1.0, 0.0)
    buffers = Buffers.empty(batch, (1, 1, 1), [1], torch.device("cpu"))
    Feed(bank, [torch.arange(len(bank))[:, None]], 8, 1000, 5, None, prior, drawn, share).fill_(buffers, step)
    assert torch.equal(buffers.ids[0][:, 0].float(), buffers.latents[:, 0, 0, 0])
    return buffers.ids[0][:, 0]


def test_a_share_of_the_rows_shows_drawn_pictures():
    assert all((shown(0.0, step) < 3).all() for step in range(20))
    assert all((shown(1.0, step) >= 3).all() for step in range(20))
    rows = torch.stack([shown(0.25, step) for step in range(500)])
    # 4000 draws: four standard deviations of a share are less than 0.028
    assert (rows >= 3).float().mean().item() == pytest.approx(0.25, abs=0.028)
    # in every row, since each row has its own part of the noise schedule
    assert ((rows >= 3).float().mean(0) - 0.25).abs().max() < 0.08
    assert set(rows.unique().tolist()) == set(range(7))
    assert torch.equal(shown(0.25, 3), shown(0.25, 3))


def test_class_pictures_keep_their_rows():
    rows = torch.stack([shown(0.5, step, prior=2) for step in range(200)])
    assert set(rows[:, 1::2].unique().tolist()) == {7, 8}
    assert set(rows[:, 0::2].unique().tolist()) == set(range(7))


def test_pictures_are_of_every_earlier_concept_by_the_model_so_far(three, tmp_path, monkeypatch):
    asked, models, batches = [], [], [set(), set(), set()]

    def look(pipeline, prompt, count, **how):
        images = sample(pipeline, prompt, count, **how)
        asked.append((prompt, count, how, images))
        return images

    def read(step, task, i):
        known, ids = step.backbone.tokenizers[0].get_vocab(), set(step.buffers.ids[0].flatten().tolist())
        batches[task] |= {token for token in ("<cat>", "<cup>", "<rocket>") if known.get(token) in ids}

    def redraw(pipeline, made, concept):
        """What the next task must draw: by the folded model, before it begins."""
        models.append([sample(pipeline, f"a photo of <{task['name']}>", 2, seed=0, steps=1) for task in made.tasks()])

    monkeypatch.setattr(replay, "sample", look)
    monkeypatch.setattr(replay, "derive_seed", lambda seed, *what: 0)
    options = {"replay_count": 2, "replay_steps": 1, "replay_guidance": 7.5, "replay_share": 0.7, "batch": 8}
    run(tinypipes.sd15(), three, tmp_path / "run", method="replay", on_step=read, on_task=redraw, **options)
    assert [(prompt, count, how["steps"], how["guidance"]) for prompt, count, how, _ in asked] == [
        ("a photo of <cat>", 2, 1, 7.5), ("a photo of <cat>", 2, 1, 7.5), ("a photo of <cup>", 2, 1, 7.5),
    ]
    wanted = [*models[0], *models[1]]
    assert all(torch.equal(images, want) for (*_, images), want in zip(asked, wanted, strict=True))
    assert not torch.equal(asked[0][3], asked[1][3])
    assert batches == [{"<cat>"}, {"<cat>", "<cup>"}, {"<cat>", "<cup>", "<rocket>"}]


def test_each_task_and_concept_draws_from_other_noise(three, tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(replay, "sample", lambda *args, seed, **how: seeds.append(seed) or sample(*args, seed=seed, **how))
    for seed in (0, 0, 1):
        run(tinypipes.sd15(), three, tmp_path / f"{len(seeds)}", method="replay", steps=1, seed=seed, **CHEAP["replay"])
    assert seeds[:3] == seeds[3:6]
    assert len(set(seeds)) == 6


def test_drawn_pictures_are_in_the_bank_as_they_were_drawn(three, tmp_path, monkeypatch):
    banks, samples, load = [], [], loop.Loader.load

    def watch(loader, concept, seed, drawn=None):
        data = load(loader, concept, seed, drawn)
        banks.append((data, drawn, loader.vae))
        return data

    monkeypatch.setattr(replay, "sample", lambda *args, **how: samples.append(sample(*args, **how)) or samples[-1])
    monkeypatch.setattr(loop.Loader, "load", watch)
    run(tinypipes.sd15(), three, tmp_path / "run", method="replay", steps=1, **CHEAP["replay"])
    assert [None if drawn is None else drawn.texts for _, drawn, _ in banks] == [
        None, ["a photo of <cat>"], ["a photo of <cat>", "a photo of <cup>"],
    ]
    images = [image for _, drawn, _ in banks[1:] for image in drawn.images]
    # samples are in [0, 1], pictures in [-1, 1]
    assert all(torch.equal((image + 1) / 2, one[0]) for image, one in zip(images, samples, strict=True))
    for data, drawn, vae in banks[1:]:
        (feed,) = data.feeds.values()
        with torch.no_grad():
            wanted = vae.encode(torch.stack(drawn.images)).latent_dist.mean
        torch.testing.assert_close(feed.bank.mean[feed.learned :], wanted, rtol=1e-4, atol=1e-5)
        assert feed.drawn == len(drawn.images) == len(feed.bank) - feed.learned
