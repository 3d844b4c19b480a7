"""The classifier that names samples."""

import pytest
import torch

from stamina_fast.errors import InputError
from stamina_fast.evaluate.classifier import disturb, train_classifier
from stamina_fast.evaluate.naming import named_in, tensor_of
from stamina_fast.tiny.identities import identity
from stamina_fast.tiny.renders import of_identities, views

SUBJECTS = {"ada": identity(13, "woman"), "keep": identity(2, "castle")}


@pytest.fixture(scope="module")
def classifier():
    return train_classifier(*of_identities(SUBJECTS, 40, 2000, 120, "other"), steps=120, batch=32)


def test_it_names_views_that_it_has_not_seen_and_knows_strangers(classifier):
    for name, subject in SUBJECTS.items():
        assert classifier.share(views(subject, range(24)).float() / 255, name) >= 0.9
    strangers = torch.cat([views(identity(seed, kind), range(1)) for kind in ("woman", "castle") for seed in range(200, 212)])
    assert classifier.share(strangers.float() / 255, "other") >= 0.7


def test_a_picture_of_nothing_is_nobody(classifier):
    noise = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    assert classifier.share(noise, "ada") < 0.5
    assert classifier.share(noise, "keep") < 0.5


def test_probabilities_are_those_of_its_classes_and_it_is_seeded(classifier):
    pictures = views(SUBJECTS["ada"], range(4)).float() / 255
    found = classifier.probabilities(pictures)
    assert found.shape == (4, 3)
    assert torch.allclose(found.sum(1), torch.ones(4, dtype=torch.float64))
    small = of_identities(SUBJECTS, 4, 2000, 4, "other")
    one, two, other = (train_classifier(*small, steps=3, batch=4, seed=seed).probabilities(pictures) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_training_leaves_the_callers_random_stream_alone():
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    train_classifier(*of_identities(SUBJECTS, 2, 2000, 2, "other"), steps=1, batch=2)
    assert torch.equal(torch.rand(1), wanted)


def test_a_name_without_pictures_is_refused():
    pictures, labels, names = of_identities(SUBJECTS, 2, 2000, 2, "other")
    with pytest.raises(InputError, match="pictures of every name, dome"):
        train_classifier(pictures, labels, [*names, "dome"])


def test_disturbed_pictures_stay_near():
    pictures = views(SUBJECTS["ada"], range(8)).float() / 255
    moved = disturb(pictures, torch.Generator().manual_seed(0))
    assert moved.shape == pictures.shape
    assert 0.01 < (moved - pictures).abs().mean() < 0.3


def test_named_in_counts_pictures(classifier):
    from PIL import Image

    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in views(SUBJECTS["keep"], range(6))]
    assert torch.equal(tensor_of(pictures), views(SUBJECTS["keep"], range(6)).float() / 255)
    names = classifier.name(tensor_of(pictures))
    assert named_in(pictures, "keep", classifier) == names.count("keep") / 6
    assert named_in(pictures, "ada", classifier) == names.count("ada") / 6
