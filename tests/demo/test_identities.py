"""The demo with identities: its whole way in two processes, on a tiny pipeline with random weights."""

from __future__ import annotations

import json

import pytest
import tinypipes
from PIL import Image

from stamina_fast.demo import identities, run_demo
from stamina_fast.demo.plan import Plan
from stamina_fast.errors import StaminaError
from stamina_fast.io.run import Run
from stamina_fast.tiny.identities import identity

SUBJECTS = {"ada": identity(13, "woman"), "keep": identity(2, "castle")}


@pytest.fixture
def little(monkeypatch, tmp_path):
    """Two steps a concept, on a tiny base: a whole demo takes seconds."""
    options = identities.QUICK.train | {"steps": 2, "batch": 2, "rank": 2, "gate_rank": 2}
    monkeypatch.setattr(identities, "QUICK", Plan(options, samples=3, sampler_steps=2))
    tinypipes.sd15().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_the_demo_leaves_a_picture_and_says_what_is_remembered(tmp_path, little, capsys):
    run = tmp_path / "runs" / "demo"
    result = run_demo(run, quick=True, model=little, subjects=SUBJECTS)
    assert json.loads((run / "demo.json").read_text()) == result
    for method, folder in (("stamina", run), ("lora", run.with_name("demo-lora"))):
        assert [task["name"] for task in Run.open(folder).tasks()] == ["ada", "keep"]
        assert Run.open(folder).config["method"] == method
        assert (folder / "model" / "model_index.json").is_file()
        assert set(result[method]["concepts"]) == set(SUBJECTS)
        named = sum(row["end"] >= 0.5 for row in result[method]["concepts"].values())
        assert result[method]["named_end"] == named
    assert Run.open(run).config["train"] == Run.open(run.with_name("demo-lora")).config["train"], "both do the same steps"
    for picture in ("demo.png", "pair.png"):
        assert Image.open(run / picture).size > (300, 100), picture
    said = capsys.readouterr().out
    for word in ("After learning all 2", "plain LoRA", "of 2", "demo.png", "pair.png"):
        assert word in said, word
    # again: nothing is learned twice
    kept = (run / "tasks" / "01-ada" / "factors.safetensors").stat().st_mtime_ns
    again = run_demo(run, quick=True, model=little, subjects=SUBJECTS, progress=False)
    assert (run / "tasks" / "01-ada" / "factors.safetensors").stat().st_mtime_ns == kept
    assert [again[method] for method in identities.METHODS] == [result[method] for method in identities.METHODS]


def test_an_error_in_the_second_process_is_an_error(tmp_path, little):
    (tmp_path / "demo-lora").mkdir()
    (tmp_path / "demo-lora" / "mine.txt").write_text("not a run")
    with pytest.raises(StaminaError, match="second process"):
        run_demo(tmp_path / "demo", quick=True, model=little, subjects=SUBJECTS, progress=False)


def test_six_identities_of_two_groups_are_taught():
    kinds = [subject.kind for subject in identities.IDENTITIES.values()]
    assert len(kinds) == 6
    assert sum(kind in ("man", "woman") for kind in kinds) == 3
    assert sum(kind in ("tower", "castle", "temple", "bridge", "dome") for kind in kinds) == 3
    assert set(identities.PAIR) <= set(identities.IDENTITIES)
