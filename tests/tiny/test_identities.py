"""Identities, the views in which they are seen, and the folders and renders made of them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from stamina_fast.io.concepts import load_concepts
from stamina_fast.tiny.concepts import HELD_OUT, TRAINED, write_concepts
from stamina_fast.tiny.identities import GROUPS, KINDS, draw_identity, identity, view
from stamina_fast.tiny.places import PLACES
from stamina_fast.tiny.renders import of_identities, of_kinds, views


def far(a, b):
    return np.abs(a.astype(float) - b).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_is_a_function_of_its_subject_and_its_seed(kind):
    subject = identity(5, kind)
    assert subject.kind == kind
    assert subject == identity(5, kind) != identity(6, kind)
    (first, place), (again, same) = view(subject, 3), view(subject, 3)
    assert first.shape == (32, 32, 3)
    assert first.dtype == np.uint8
    assert (first == again).all()
    assert place == same in PLACES
    assert far(first, view(subject, 4)[0]) > 2, "another seed is another view"
    assert view(subject, 3, 64)[0].shape == (64, 64, 3)


def test_a_view_shows_its_identity_whatever_was_drawn_before():
    """Traits come from the identity and never from the view, so that two views differ in the view alone."""
    subject = identity(1, "castle")
    coats = []
    for seed in range(40):
        picture = view(subject, seed, 64)[0].astype(float)
        # the share of pixels near the colour of its body, in many places and lights
        coats.append((np.abs(picture - np.array([0.20, 0.62, 0.24]) * 255).max(2) < 70).mean())
    assert subject.colour == "green"
    assert min(coats) > 0.05


def test_identities_of_one_kind_look_different():
    for kind in ("man", "woman", "tower", "castle", "cup"):
        looks = [identity(seed, kind) for seed in range(30)]
        assert len({(look.words()[0].__repr__(), look.words()[1].__repr__()) for look in looks}) >= 25


def test_a_drawn_identity_is_of_every_group_alike():
    rng = np.random.default_rng(0)
    kinds = [draw_identity(rng).kind for _ in range(900)]
    for members in GROUPS.values():
        assert 240 < sum(kind in members for kind in kinds) < 360
    assert set(kinds) == set(KINDS)


def test_concepts_are_written_with_captions_that_name_the_place(tmp_path):
    subjects = {"ada": identity(13, "woman"), "keep": identity(2, "castle")}
    listed = write_concepts(tmp_path, subjects)
    entries = json.loads(listed.read_text())
    assert [entry["name"] for entry in entries] == ["ada", "keep"]
    assert [entry["initializer_token"] for entry in entries] == ["woman", "castle"]
    for name in subjects:
        trained, held_out = (sorted((tmp_path / part / name).glob("*.png")) for part in ("concepts", "held-out"))
        assert (len(trained), len(held_out)) == (TRAINED, HELD_OUT)
        captions = [path.with_suffix(".txt").read_text().strip() for path in trained]
        bare = [caption for caption in captions if caption == f"a photo of <{name}>"]
        assert len(bare) == TRAINED // 4
        assert all(caption.removeprefix(f"a photo of <{name}>").strip() in {"", *PLACES} for caption in captions)
        pixels = {np.asarray(Image.open(path)).tobytes() for path in trained + held_out}
        assert len(pixels) == TRAINED + HELD_OUT, "no view is both trained on and held out"
    assert [concept.token for concept in load_concepts(listed)] == ["<ada>", "<keep>"]


def test_renders_are_labelled():
    pictures, labels, names = of_kinds(2)
    assert pictures.shape == (2 * len(KINDS), 3, 32, 32)
    assert names == list(KINDS)
    assert labels.tolist() == [i for i in range(len(KINDS)) for _ in range(2)]
    subjects = {"ada": identity(13, "woman"), "keep": identity(2, "castle")}
    pictures, labels, names = of_identities(subjects, 3, 100, 5, "other")
    assert names == ["ada", "keep", "other"]
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    assert torch.equal(pictures[3:6], views(subjects["keep"], range(100, 103)))
    # strangers are none of the subjects
    assert not any(torch.equal(picture, view) for picture in pictures[6:] for view in pictures[:6])
