"""Sampling: a picture is a function of its seed alone, and an unknown token is an error."""

import pytest
import tinypipes
import torch

from stamina_fast.errors import InputError
from stamina_fast.sampling import sample, to_pil


@pytest.mark.parametrize("kind", tinypipes.KINDS)
def test_batch_and_count_change_no_picture(kind):
    pipeline = tinypipes.KINDS[kind]()
    once = sample(pipeline, "a photo of a cat", 4, seed=3, guidance=2.0, steps=2, batch=4)
    split = sample(pipeline, "a photo of a cat", 3, seed=3, guidance=2.0, steps=2, batch=2)
    assert once.shape == (4, 3, 32, 32)
    assert once.dtype == torch.float32
    assert 0 <= once.min() <= once.max() <= 1
    torch.testing.assert_close(once[:3], split, rtol=0, atol=1e-4)
    assert not torch.allclose(once[0], once[1], atol=1e-2)
    assert not torch.equal(once, sample(pipeline, "a photo of a cat", 4, seed=4, guidance=2.0, steps=2))


def test_unknown_token_is_named():
    pipeline = tinypipes.sd15()
    pipeline.tokenizer.add_tokens(["<cat>"])
    with pytest.raises(InputError, match=r"<dog>.*it knows <cat>"):
        sample(pipeline, "<cat> and <dog>", 1)
    assert sample(pipeline, "a <cat>", 0).shape[0] == 0


def test_pictures_for_pil():
    pictures = to_pil(torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(2, 3, 4, 6))
    assert [p.size for p in pictures] == [(6, 4)] * 2
    assert pictures[0].getpixel((0, 0)) == (0, 128, 255)
