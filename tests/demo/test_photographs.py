"""The demo with photographs: its pictures and its whole way, on a tiny pipeline with random weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tinypipes
from PIL import Image

from stamina_fast.demo import photographs as demo
from stamina_fast.demo.photographs import (
    HELD_OUT_CROPS,
    SECOND_PHOTOGRAPHS,
    SUBJECTS,
    TRAINING_CROPS,
    Plan,
    prepare_concepts,
    run_photographs,
)
from stamina_fast.errors import InputError


def pictures(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


@pytest.mark.parametrize("size", [32, 48])
def test_concepts_are_prepared(tmp_path, size):
    concepts = prepare_concepts(tmp_path, size)
    assert concepts == tmp_path / "concepts"
    assert sorted(p.name for p in concepts.iterdir()) == sorted(SUBJECTS)
    assert len(demo.TAUGHT) >= 4
    assert set(demo.TAUGHT) <= set(SUBJECTS)
    for name in SUBJECTS:
        trained, held_out = pictures(concepts / name), pictures(tmp_path / "held-out" / name)
        assert (len(trained), len(held_out)) == (2 * len(TRAINING_CROPS), 2 * len(HELD_OUT_CROPS))
        assert {image.shape for image in trained + held_out} == {(size, size, 3)}
        assert len({image.tobytes() for image in trained + held_out}) == len(trained) + len(held_out), "a picture occurs twice"
        np.testing.assert_array_equal(trained[1], trained[0][:, ::-1])


def test_preparing_twice_writes_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        prepare_concepts(tmp_path / folder, subjects=("cat",))
    first = sorted(p for p in (tmp_path / "a").rglob("*.png"))
    assert len(first) == 24
    for path in first:
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_no_crop_is_trained_on_and_held_out():
    assert not set(TRAINING_CROPS) & set(HELD_OUT_CROPS)
    assert SECOND_PHOTOGRAPHS["motorcycle"].photograph != SUBJECTS["motorcycle"].photograph


@pytest.fixture
def little(monkeypatch):
    """Both plans at two steps, so that a whole demo takes seconds."""
    plan = Plan(demo.QUICK.train | {"steps": 2, "batch": 2, "rank": 2, "gate_rank": 2}, samples=3, sampler_steps=2)
    monkeypatch.setattr(demo, "QUICK", plan)
    monkeypatch.setattr(demo, "FULL", plan)


def test_the_demo_leaves_a_run_to_look_at_and_says_what_it_learned(tmp_path, little, capsys):
    tinypipes.sd15().save_pretrained(tmp_path / "base")
    run = tmp_path / "runs" / "demo"
    metrics = run_photographs(run, quick=True, model=str(tmp_path / "base"), subjects=("cat", "rocket"))
    assert json.loads((run / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert [task["name"] for task in metrics["tasks"]] == ["cat", "rocket"]
    assert list(metrics["by_guidance"]) == [f"{g:g}" for g in demo.GUIDANCE]
    assert metrics["settings"]["real_images"] == "held out"
    assert metrics["settings"]["real_counts"] == [16, 16]
    assert (run / "model" / "model_index.json").is_file()
    for picture in ("plots/overview.png", "plots/heat_map.png", "plots/curves.png", "plots/mmd.png", "tasks/01-cat/grid.png",
                    "tasks/02-rocket/grid.png"):
        assert Image.open(run / picture).size > (300, 100), picture
    said = capsys.readouterr().out
    guidance = (f"guidance {g:g}" for g in demo.GUIDANCE)
    for word in ("A_mmd", "F_mmd", "P_mmd", *guidance, "Learned 2 concepts", "plots/overview.png"):
        assert word in said, word
    for task in metrics["tasks"]:
        assert f"{task['name']} {task['seconds']:.0f} s" in said


def test_a_demo_that_was_stopped_goes_on(tmp_path, little, monkeypatch):
    tinypipes.sd15().save_pretrained(tmp_path / "base")
    run, model = tmp_path / "demo", str(tmp_path / "base")

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "evaluate_run", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_photographs(run, model=model, subjects=("cat", "rocket"), progress=False)
    kept = (run / "tasks" / "01-cat" / "factors.safetensors").stat().st_mtime_ns
    metrics = run_photographs(run, model=model, subjects=("cat", "rocket"), progress=False)
    assert (run / "tasks" / "01-cat" / "factors.safetensors").stat().st_mtime_ns == kept
    assert len(metrics["tasks"]) == 2
    with pytest.raises(InputError, match="cannot resume"):
        run_photographs(run, model=model, subjects=("cat", "coffee"), progress=False)


def test_the_plans_fit_their_time():
    # a whole demo on one core: 0.22 s a training step of 8 pictures, 0.011 s a picture and step of the sampler
    for plan, limit in ((demo.FULL, 720), (demo.QUICK, 90)):
        count = len(demo.TAUGHT)
        cells = count + count * (count + 1) // 2
        passes = sum(1 if g == 1 else 2 for g in demo.GUIDANCE)
        training = count * plan.train["steps"] * 0.0275 * plan.train["batch"]
        assert training + cells * passes * plan.samples * plan.sampler_steps * 0.011 < limit
