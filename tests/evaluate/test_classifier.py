"""The classifier that names samples, as a file too, and texts in CLIP's features."""

import pytest
import tinyencoders
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPTokenizer

from stamina_fast.errors import FileError, InputError
from stamina_fast.evaluate.classifier import Classifier, disturb, train_classifier
from stamina_fast.evaluate.features import encoder, text_encoder
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
    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in views(SUBJECTS["keep"], range(6))]
    assert torch.equal(tensor_of(pictures), views(SUBJECTS["keep"], range(6)).float() / 255)
    names = classifier.name(tensor_of(pictures))
    assert named_in(pictures, "keep", classifier) == names.count("keep") / 6
    assert named_in(pictures, "ada", classifier) == names.count("ada") / 6


def test_a_classifier_is_the_same_from_its_file(tmp_path):
    pictures = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = train_classifier(pictures, torch.arange(3).repeat(4), ["cät", "cup", "other"], steps=3, batch=4)
    made.save(tmp_path / "classifier.safetensors")
    read = Classifier.load(tmp_path / "classifier.safetensors")
    assert read.names == ["cät", "cup", "other"]
    assert torch.equal(read.probabilities(pictures / 255), made.probabilities(pictures / 255))


def test_a_name_with_a_larger_share_is_given_more_often():
    # pictures that say nothing: what is left is how often each name was seen
    pictures, labels = torch.full((40, 3, 16, 16), 128, dtype=torch.uint8), torch.arange(2).repeat(20)
    made = (train_classifier(pictures, labels, ["a", "b"], steps=60, shares=shares) for shares in (None, [1.0, 9.0]))
    even, much = (classifier.probabilities(pictures[:1] / 255)[0, 1] for classifier in made)
    assert 0.35 < even < 0.65
    assert much > 0.75


@pytest.mark.parametrize("tensors", [
    {"weights": torch.ones(2)}, {"names": torch.ones(2)}, {"names": torch.tensor(list(b'["a"]'), dtype=torch.uint8)},
])
def test_another_file_is_refused_in_one_line(tmp_path, tensors):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(FileError, match="no classifier") as error:
        Classifier.load(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


def test_texts_lie_in_the_same_space_as_pictures(tmp_path):
    folder = tinyencoders.clip(tmp_path / "clip")
    texts = ["a photo of a cat", "a red ball on grass"]
    got = text_encoder(str(folder))(texts)
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    with torch.no_grad():
        for row, text in zip(got, texts, strict=True):
            ids = tokenizer(text, return_tensors="pt")
            wanted = model.text_projection(model.text_model(**ids).pooler_output)[0].double()
            torch.testing.assert_close(row, wanted / wanted.norm(), rtol=1e-4, atol=1e-5)
    assert got.shape == (2, 16)


def test_encoders_without_texts_have_none(tmp_path):
    folder = tinyencoders.dino(tmp_path / "dino")
    assert text_encoder(str(folder)) is None
    assert text_encoder("layout") is None
    assert callable(encoder(str(folder)))
