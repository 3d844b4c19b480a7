"""Tokens of several vectors, and words that tokens start from."""

import pytest
import tinypipes
import torch
from tokenbanks import KINDS, bank_of, parts, states, tables, train, vocabularies

from stamina_fast.errors import InputError


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("mlp", [True, False])
def test_a_token_of_several_vectors_is_trained_and_folded_into_as_many_rows(kind, mlp):
    pipeline = KINDS[kind]()
    before = tables(pipeline)
    bank = bank_of(pipeline, mlp=mlp, init="cat", vectors=3)
    bank.begin("<one>")
    start = [maker().detach() for maker in bank.makers.values()]
    assert all(torch.pdist(vectors).max() < 1e-6 for vectors in start)
    train(bank, pipeline, "a photo of <one> on grass")
    during = states(pipeline, "a photo of <one> on grass").detach()
    folded = bank.fold_()
    for name, encoder, tokenizer in parts(pipeline):
        ids = tokenizer.convert_tokens_to_ids(["<one>", "<one>_1", "<one>_2"])
        table = encoder.get_input_embeddings().weight
        assert ids == list(range(len(before[name]), len(before[name]) + 3))
        assert torch.equal(table[: len(before[name])], before[name])
        assert torch.equal(table[ids], folded[name])
        # they start alike and learn apart
        assert torch.pdist(folded[name]).min() > 1e-3 * folded[name].norm(dim=1).min()
    assert torch.equal(states(pipeline, "a photo of <one> on grass"), during)
    bank.begin("<two>")
    bank.discard()
    assert [len(table) for table in tables(pipeline).values()] == [len(table) + 3 for table in before.values()]
    other = KINDS[kind]()
    bank_of(other).add("<one>", folded)
    assert all(torch.equal(row, tables(pipeline)[name]) for name, row in tables(other).items())
    assert torch.equal(states(other, "a photo of <one> on grass"), during)


def test_several_vectors_leave_spare_rows_as_they_were():
    pipeline = tinypipes.sd15()
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer) + 2, mean_resizing=False)
    before, words = tables(pipeline)["text_encoder"], vocabularies(pipeline)
    bank = bank_of(pipeline, vectors=3)
    bank.begin("<one>")
    assert len(tables(pipeline)["text_encoder"]) == len(before) + 1
    bank.discard()
    assert torch.equal(tables(pipeline)["text_encoder"], before)
    assert vocabularies(pipeline) == words


@pytest.mark.parametrize(("first", "second", "vectors"), [
    ("<one>", "<one>_1", 1), ("v*_2", "v*", 2), ("<one>", "<one>s", 2), ("<one>s", "<one>", 2), ("<one>", "a<one>", 3),
])
def test_tokens_that_diffusers_would_mistake_are_refused(first, second, vectors):
    """It would write the vectors of one into the other, or take the other for a vector."""
    pipeline = tinypipes.sd15()
    bank = bank_of(pipeline, vectors=vectors)
    bank.begin(first)
    bank.fold_()
    words = vocabularies(pipeline)
    with pytest.raises(InputError, match="diffusers would mistake"):
        bank.begin(second)
    assert vocabularies(pipeline) == words
    bank.begin("<other>")


@pytest.mark.parametrize("mlp", [True, False])
def test_an_initializer_comes_before_the_banks_start(mlp):
    pipeline = tinypipes.sdxl()
    bank = bank_of(pipeline, mlp=mlp)
    bank.begin("<one>", seed=3, initializer="cat")
    for name, row in bank.fold_().items():
        torch.testing.assert_close(row, tables(pipeline)[name][pipeline.tokenizer.convert_tokens_to_ids("cat</w>")])


@pytest.mark.parametrize("word", ["photograph", "two words", "random", "<new>"])
def test_an_initializer_that_is_no_word_is_refused(word):
    pipeline = tinypipes.sdxl()
    bank = bank_of(pipeline)
    words = vocabularies(pipeline)
    for call in (bank.check_start, lambda word: bank.begin("<one>", initializer=word)):
        with pytest.raises(InputError, match=r"initializer_token must be a word of one token.*choose a more common word"):
            call(word)
    assert vocabularies(pipeline) == words
    bank.check_start("cat")
    assert bank.active is None


def test_tokens_that_would_clash_later_are_found_before_any_begins():
    pipeline = tinypipes.sdxl()
    bank = bank_of(pipeline, vectors=2)
    before, words = tables(pipeline), vocabularies(pipeline)
    bank.check_order(["<one>", "<two>", "V*"])
    for tokens in (["<one>", "<two>", "<one>s"], ["<two>", "<one>_1", "<one>"], ["<one>", "<one>"]):
        with pytest.raises(InputError, match="<one>"):
            bank.check_order(tokens)
    assert vocabularies(pipeline) == words
    assert all(torch.equal(row, before[name]) for name, row in tables(pipeline).items())
    bank.begin("<one>")
