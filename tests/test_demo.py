"""The demo's photographs: recognisable sizes, disjoint crops, one photograph each."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from stamina_fast.demo import HELD_OUT_CROPS, SECOND_PHOTOGRAPHS, SUBJECTS, TRAINING_CROPS, prepare_concepts


def pictures(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


@pytest.mark.parametrize("size", [32, 48])
def test_concepts_are_prepared(tmp_path, size):
    concepts = prepare_concepts(tmp_path, size)
    assert concepts == tmp_path / "concepts"
    assert sorted(p.name for p in concepts.iterdir()) == sorted(SUBJECTS)
    assert len(SUBJECTS) >= 4
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
