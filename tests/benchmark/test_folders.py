"""The benchmark of any model on folders of pictures: what is held out, what names pictures, and what is left out."""

import json

import numpy as np
import pytest
import tinyencoders
import torch
from PIL import Image

from stamina_fast.benchmark import Plan, run_benchmark
from stamina_fast.benchmark.subjects import Setup, prepare, split
from stamina_fast.errors import FileError, InputError
from stamina_fast.evaluate.features import encoder, text_encoder
from stamina_fast.evaluate.samples import Samples
from stamina_fast.io.concepts import load_concepts


def folders(root, count=8):
    """Two concepts of noisy pictures of one colour each."""
    draw = np.random.default_rng(0)
    for name, colour in (("red thing", (220, 40, 40)), ("blue", (40, 40, 220))):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(draw.normal(colour, 40, (40, 44, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def plan_of(**sizes):
    return Plan.model_validate({
        "identities": 2, "samples": 2, "sampler_steps": 1, "scenes": 3, "scene_samples": 1, "pairs": 2,
        "train": {"steps": 2, "batch": 1, "read_every": 1, "crops": 1, "rank": 2, "gate_rank": 2},
        "cells": [{"methods": ["lora"]}], **sizes})


def test_every_fourth_picture_is_held_out_with_its_caption(tmp_path):
    root = folders(tmp_path / "concepts")
    for i in range(8):
        (root / "blue" / f"{i}.txt").write_text(f"picture {i} of <blue>")
    blue, _ = load_concepts(root)
    learned, held_out = split(blue)
    assert [path.name for path in held_out] == ["3.png", "7.png"]
    assert [path.name for path in learned.images] == ["0.png", "1.png", "2.png", "4.png", "5.png", "6.png"]
    assert [text.split()[1] for text in learned.captions] == ["0", "1", "2", "4", "5", "6"]


def test_too_few_pictures_are_refused(model, tmp_path):
    root = folders(tmp_path / "concepts", 7)
    with pytest.raises(InputError, match="'blue' has 7 pictures"):
        prepare(tmp_path / "out", plan_of(), Setup(model=model, concepts=str(root)))


def test_without_an_encoder_identification_is_left_out_and_said_so(model, tmp_path):
    root = folders(tmp_path / "concepts")
    subjects = prepare(tmp_path / "out", plan_of(), Setup(model=model, concepts=str(root)))
    assert subjects.namer is None
    assert subjects.kinds is None
    (said,) = subjects.facts["left_out"]
    assert "--features clip" in said
    # other pictures are another set
    Image.new("RGB", (40, 40)).save(root / "blue" / "0.png")
    with pytest.raises(FileError, match="another concepts"):
        prepare(tmp_path / "out", plan_of(), Setup(model=model, concepts=str(root)))


def test_a_model_on_folders_of_pictures_is_measured_with_its_encoders(model, tmp_path):
    root, output = folders(tmp_path / "concepts"), tmp_path / "out"
    clip, dino = (str(kind(tmp_path / kind.__name__)) for kind in (tinyencoders.clip, tinyencoders.dino))
    assert run_benchmark(plan_of(), output, model=model, concepts=str(root), features=(clip, dino), progress=False) == []
    (path,) = (output / "cells").glob("*/result.json")
    result = json.loads(path.read_text())
    samples, stages = Samples.of(path.parent / "run"), {"after": None, "end": "after-02"}
    phi, texts, other = encoder(clip), text_encoder(clip), encoder(dino)
    held_out = {name: [Image.open(root / name / f"{i}.png").convert("RGB").crop((2, 0, 42, 40)).resize((32, 32), 3)
                       for i in (3, 7)] for name in result["concepts"]}
    centroids = {name: phi(images).mean(0) for name, images in held_out.items()}
    for t, task in enumerate(result["tasks"]):
        for when, stage in stages.items():
            drawn = samples.read(2.0, stage or f"after-{t + 1:02d}", task["name"])
            mean = {key: (x @ y.mT).mean().item() for key, x, y in (
                ("clip_i", phi(drawn), phi(held_out[task["name"]])), ("dino", other(drawn), other(held_out[task["name"]])),
                ("clip_t", phi(drawn), texts([f"a photo of {task['name']}"])))}
            for key, value in mean.items():
                assert task[f"{key}_{when}"] == pytest.approx(value, abs=0.02), key
            near = [min(centroids, key=lambda name, x=x: torch.dist(x, centroids[name])) for x in phi(drawn)]
            assert task[f"named_{when}"] == near.count(task["name"]) / 2
    assert {"mmd2", "drift_clip", "drift_dino"} == set(result["retention"])
    assert all(scene["kind"] is None for scene in result["scenes"])
    assert len(result["pairs"]) == 2
    assert result["accuracy"]["nearest"]["mean"] == 1.0
    text = (output / "report.md").read_text()
    assert "held-out pictures are nearest" in text
    assert "2 concepts from folders of pictures" in text
    for column in ("CLIP-I", "CLIP-T", "DINO", "drift (CLIP)"):
        assert column in text
    assert "kinds kept (" not in text
