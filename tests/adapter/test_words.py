"""The size of a word: that of words in use, whatever else a table holds."""

import pytest
import tinypipes
import torch
from tokenbanks import bank_of
from transformers import CLIPTokenizer

from stamina_fast.adapter.words import COMMON, ENOUGH, single, words_in_use
from stamina_fast.errors import InputError
from stamina_fast.pipeline.load import load_pipeline

ROWS, D = 400, 32


def strange_tokenizer(pad="<|endoftext|>"):
    """A tokenizer with ROWS tokens, none of them an English word; its first token may pad, as in SDXL's second one."""
    words = ["!", *(f"q{i}</w>" for i in range(ROWS - 3)), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], pad_token=pad)
    assert all(single(tokenizer, word) is None for word in COMMON)
    return tokenizer


def rows(count, norm, spread=0.1):
    """Random rows [count, D] whose norms are near `norm`."""
    draw = torch.Generator().manual_seed(count)
    directions = torch.nn.functional.normalize(torch.randn(count, D, generator=draw), dim=1)
    return directions * norm * torch.exp(spread * torch.randn(count, 1, generator=draw))


def size(table, tokenizer):
    return table[words_in_use(table, tokenizer)].norm(dim=1).median().item()


def test_in_clips_tables_all_rows_are_words():
    """Those of CLIP have norms near 0.39, and no row is far from that."""
    tokenizer, table = strange_tokenizer(), rows(ROWS, 0.39, 0.03)
    assert size(table, tokenizer) == pytest.approx(0.39, rel=0.02)
    assert len(words_in_use(table, tokenizer)) == ROWS - 2


@pytest.mark.parametrize("untrained", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("norm", [0.1, 0.45])
def test_small_rows_are_not_words(untrained, norm):
    """Also where nine of ten rows were never trained, and for norms that are less than half of a word's."""
    count = int(untrained * ROWS)
    table = rows(ROWS, 1.3)[torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))]
    table[torch.arange(count) * ROWS // max(count, 1)] = rows(count, norm)
    assert size(table, strange_tokenizer()) == pytest.approx(1.3, rel=0.05)


@pytest.mark.parametrize("untrained", [0.3, 0.6])
@pytest.mark.parametrize("norm", [0.1, 10.0])
def test_known_words_are_words_whatever_the_others_are(untrained, norm):
    """With an English vocabulary the untrained rows may even be larger than words."""
    tokenizer = tinypipes.tokenizer()
    known = [i for i in (single(tokenizer, word) for word in COMMON) if i is not None]
    others = sorted(set(range(len(tokenizer))) - set(known))
    assert len(known) >= ENOUGH
    assert len(others) > untrained * len(tokenizer)
    table = rows(len(tokenizer), 1.3)
    table[others[: int(untrained * len(tokenizer))]] = rows(int(untrained * len(tokenizer)), norm)
    assert sorted(words_in_use(table, tokenizer).tolist()) == sorted(known)
    assert size(table, tokenizer) == pytest.approx(1.3, rel=0.05)


@pytest.mark.parametrize("value", [0.0, 1e4, float("nan")])
def test_padding_rows_do_not_count(value):
    """The token that pads, and the rows that no token has, as in a table of a round number of rows."""
    tokenizer = strange_tokenizer(pad="!")
    assert tokenizer.pad_token_id == 0
    table = torch.cat([rows(ROWS, 0.39, 0.03), torch.full((64, D), value)])
    table[0] = value
    used = words_in_use(table, tokenizer)
    assert used.min() > 0
    assert used.max() < ROWS
    assert size(table, tokenizer) == pytest.approx(0.39, rel=0.02)


def test_a_few_huge_rows_are_not_all_words():
    table = rows(ROWS, 0.39, 0.03)
    table[:3] = 1e3
    assert size(table, strange_tokenizer()) == pytest.approx(0.39, rel=0.02)


def test_each_encoder_has_its_own_size():
    pipeline = tinypipes.sdxl()
    wanted = {"text_encoder": 0.39, "text_encoder_2": 1.1}
    for name, norm in wanted.items():
        table = getattr(pipeline, name).get_input_embeddings().weight.data
        table.copy_(rows(len(table), norm, 0.03))
    bank = bank_of(pipeline)
    for name, norm in wanted.items():
        assert bank.makers[name].scale * tinypipes.WIDTH**0.5 == pytest.approx(norm, rel=0.02)
    bank.begin("<one>")
    for name, row in bank.fold_().items():
        assert row.norm().item() == pytest.approx(wanted[name], rel=0.02)


def test_the_small_model_starts_a_token_as_large_as_its_words():
    bank = bank_of(load_pipeline("tiny", "cpu"))
    bank.begin("<one>")
    assert 1.0 < bank.fold_()["text_encoder"].norm() < 2.0


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_table_without_words_is_refused(value):
    pipeline = tinypipes.sd15()
    pipeline.text_encoder.get_input_embeddings().weight.data.fill_(value)
    with pytest.raises(InputError, match="load trained weights"):
        bank_of(pipeline)
