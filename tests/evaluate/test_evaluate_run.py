"""A whole run measured: every prefix, the base, held-out images, and what cannot be measured."""

from __future__ import annotations

import json
import shutil

import pytest
import tinypipes
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from stamina_fast import StaminaConfig, attach
from stamina_fast.demo.photographs import prepare_concepts
from stamina_fast.errors import InputError, StaminaError
from stamina_fast.evaluate import evaluate_run, features, keep_held_out, samples
from stamina_fast.evaluate.mmd import median_distance, mmd2
from stamina_fast.evaluate.real import real_images
from stamina_fast.evaluate.run import weight_change
from stamina_fast.io.run import Run
from stamina_fast.pipeline.sampling import sample, to_pil
from stamina_fast.seeds import derive_seed


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two concepts on a tiny pipeline with random weights, its base and its pictures."""
    from stamina_fast.training import train

    folder = tmp_path_factory.mktemp("trained")
    tinypipes.sd21().save_pretrained(folder / "base")
    concepts = prepare_concepts(folder / "photographs", subjects=("cat", "rocket"))
    train(str(folder / "base"), concepts, folder / "run", steps=3, batch=2, rank=2, gate_rank=2, progress=False)
    return folder


QUICKLY = {"samples": 3, "steps": 2, "progress": False}


def test_evaluate_run_measures_every_prefix(trained):
    run, real = trained / "run", trained / "photographs" / "held-out"
    got = evaluate_run(run, real=real, **QUICKLY)
    assert json.loads((run / "metrics.json").read_text()) == json.loads(json.dumps(got))
    assert {"A_mmd", "F_mmd", "tasks"} <= set(got)
    assert all({"name", "mmd_base", "mmd_after", "mmd_end", "seconds"} <= set(task) for task in got["tasks"])
    assert list(got["by_guidance"]) == ["1", "3"]
    assert got["A_mmd"] == got["by_guidance"]["1"]["A_mmd"] != got["by_guidance"]["3"]["A_mmd"]
    # what the numbers say can be had without any of this: the stored model is the one after the last task
    plain = DiffusionPipeline.from_pretrained(run / "model")
    phi = features.layout
    x = phi([Image.open(path) for path in sorted((real / "cat").glob("*.png"))])
    y = phi(to_pil(sample(plain, "a photo of <cat>", 3, seed=0, guidance=1.0, steps=2)))
    assert got["tasks"][0]["mmd_end"] == pytest.approx(mmd2(x, y, median_distance(x)), abs=1e-5)
    first, second = got["tasks"]
    assert first["distance"] == first["step"] > 0
    assert second["distance"] != second["step"] > 0
    assert first["overlap"] is None
    assert 0 < second["overlap"] <= 1
    again = evaluate_run(run, real=real, guidance=(1.0,), **QUICKLY)
    assert again["by_guidance"]["1"] == got["by_guidance"]["1"], "the same seed, the same numbers"


def test_the_base_is_the_model_without_what_was_learned(trained):
    got = evaluate_run(trained / "run", real=trained / "photographs" / "held-out", guidance=(2.0,), **QUICKLY)
    pipeline = DiffusionPipeline.from_pretrained(trained / "base")
    adapters = attach(pipeline, StaminaConfig(rank=2, gate_rank=2))
    adapters.tokens.begin("<cat>", derive_seed(derive_seed(0, "task", 0), "token"))
    y = features.layout(to_pil(sample(pipeline, "a photo of <cat>", 3, seed=0, guidance=2.0, steps=2)))
    real = trained / "photographs" / "held-out" / "cat"
    x = features.layout([Image.open(path) for path in sorted(real.glob("*.png"))])
    assert got["tasks"][0]["mmd_base"] == pytest.approx(mmd2(x, y, median_distance(x)), abs=1e-5)
    assert got["guidance"] == 2.0


def test_without_the_base_the_other_numbers_are_the_same_and_nothing_is_plotted(trained, tmp_path):
    real = trained / "photographs" / "held-out"
    whole = evaluate_run(trained / "run", real=real, guidance=(2.0,), **QUICKLY)
    shutil.copytree(trained / "run", tmp_path / "run", ignore=shutil.ignore_patterns("samples", "plots", "grid.png"))
    got = evaluate_run(tmp_path / "run", real=real, guidance=(2.0,), model=trained / "base", base=False, **QUICKLY)
    for task, with_base in zip(got["tasks"], whole["tasks"], strict=True):
        assert set(with_base) - set(task) == {"mmd_base", "ratio_after", "ratio_end"}
        assert task | {"intervals": None} == {key: with_base[key] for key in task} | {"intervals": None}
    assert sorted(path.name for path in (tmp_path / "run" / "samples" / "g2").iterdir()) == ["after-01", "after-02"]
    assert not list((tmp_path / "run").rglob("plots")) + list((tmp_path / "run").rglob("grid.png"))


def test_real_images_are_held_out_ones_kept_in_the_run(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    run = Run.open(tmp_path / "run")
    images, kind = real_images(run, 32)
    assert kind == "trained on"
    assert [len(x) for x in images] == [8, 8]
    for name in ("cat", "rocket"):
        keep_held_out(run.path, name, sorted((trained / "photographs" / "held-out" / name).glob("*.png")))
    images, kind = real_images(run, 16)
    assert kind == "held out"
    assert [len(x) for x in images] == [16, 16]
    assert {image.size for x in images for image in x} == {(16, 16)}
    with pytest.raises(InputError, match="at least two real pictures of 'cat'"):
        real_images(run, 32, tmp_path)


def test_evaluate_refuses_what_it_cannot_measure(trained, tmp_path):
    run, real = trained / "run", trained / "photographs" / "held-out"
    before = (run / "metrics.json").read_bytes() if (run / "metrics.json").exists() else None
    tinypipes.sd21(seed=1).save_pretrained(tmp_path / "other")
    refused = (({"samples": 1}, "at least 2 samples"), ({"guidance": ()}, "guidance"), ({"features": "nope"}, "not on this"),
               ({"model": str(tmp_path / "other")}, "not the one"), ({"real": tmp_path / "none"}, "at least two real"))
    for wrong, message in refused:
        with pytest.raises(StaminaError, match=message) as error:
            evaluate_run(run, **{"real": real, **QUICKLY, **wrong})
        assert "\n" not in str(error.value)
    with pytest.raises(StaminaError, match="not a run"):
        evaluate_run(tmp_path)
    after = (run / "metrics.json").read_bytes() if (run / "metrics.json").exists() else None
    assert after == before


def test_weight_change_counts_what_earlier_tasks_had_changed():
    first = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    second = first + torch.tensor([[1.0, 2.0], [0.0, 2.0]])
    assert weight_change([first], [None]) == {"distance": 5.0, "step": 5.0, "overlap": None}
    got = weight_change([second], [first])
    assert got["step"] == 3.0
    assert got["overlap"] == pytest.approx(1 / 3)


def test_samples_are_kept_and_not_drawn_again(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "run", tmp_path / "run", ignore=shutil.ignore_patterns("samples"))
    run, how = tmp_path / "run", {"real": trained / "photographs" / "held-out", "guidance": (1.0,), **QUICKLY}
    ends = evaluate_run(run, triangle=False, seed=5, **how)
    folders = sorted(str(path.parent.relative_to(run / "samples")) for path in (run / "samples").rglob("0000.png"))
    assert folders == ["g1/after-01/cat", "g1/after-02/cat", "g1/after-02/rocket", "g1/base/cat", "g1/base/rocket"]
    shutil.rmtree(run / "samples" / "g1" / "after-01" / "cat")
    asked = []
    monkeypatch.setattr(samples, "sample", lambda *args, **more: asked.append(args[1]) or sample(*args, **more))
    assert evaluate_run(run, triangle=False, seed=5, **how) == ends
    assert asked == ["a photo of <cat>"], "only what is missing"
    evaluate_run(run, triangle=False, seed=6, **how)
    assert len(asked) == 1 + 5, "another seed, other samples"


def test_a_persons_files_are_not_taken_for_samples(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "0000.png").write_text("mine")
    with pytest.raises(StaminaError, match="not samples of an evaluation; move them"):
        samples.Samples(tmp_path, count=2, seed=0, steps=2, size=8)
    assert (tmp_path / "samples" / "0000.png").read_text() == "mine"


def test_samples_that_were_not_drawn_say_so(tmp_path):
    made = samples.Samples(tmp_path, count=2, seed=0, steps=2, size=8)
    with pytest.raises(StaminaError, match="no samples of 'cat' at guidance 2, after-01; run the evaluation again"):
        made.read(2.0, samples.after(0), "cat")
