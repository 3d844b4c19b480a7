"""Which rows of a text encoder's table are words in use, so that a new word can be given the size of one.

A table may hold many rows that no caption ever trained, and rows that only pad. Their norms say nothing about a word's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# words of captions, which a text encoder for pictures has trained
_COMMON = """
photo picture drawing painting man woman child face hand person people cat dog horse bird fish animal bear house tree car boat
train bike tower flower grass forest mountain beach water sky snow night city street room wall table chair bed lamp cup bottle
plate apple cake food book clock phone shirt hat shoe ball toy robot rocket star heart ring red blue green yellow orange purple
pink brown black white gray small big old new wood
"""
COMMON = tuple(_COMMON.split())
# so many of them must be known before they stand for all words
ENOUGH = 8
# the least share of rows in each of two groups, and how far apart the medians of their norms must be
SHARE, APART = 0.05, 2.0


def single(tokenizer: Any, word: str) -> int | None:
    """The id of a word that is one token of this tokenizer; None for other text."""
    ids = tokenizer.encode(word, add_special_tokens=False)
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


@torch.no_grad()
def words_in_use(table: Tensor, tokenizer: Any) -> Tensor:
    """The ids of words in use, int64 [words], for a table [V, d] of embeddings.

    They are the common words that are one token each. Where fewer than ENOUGH are known, they are found by their norms.
    Zero rows, special tokens and rows that no token has are left out. The rest is split into two groups. If the groups are
    clearly apart, those with the larger norms are in use, since training makes embeddings grow. Otherwise all are.
    """
    known = [i for i in (single(tokenizer, word) for word in COMMON) if i is not None and table[i].any()]
    if len(known) >= ENOUGH:
        return torch.tensor(known)
    reached = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    ids = torch.tensor([i for i in reached if i < len(table)], dtype=torch.int64)
    norms = table[ids.to(table.device)].float().norm(dim=1).cpu()
    ids, norms = ids[norms > 0], norms[norms > 0]
    if len(ids) < 2:
        return ids
    norms, order = norms.sort()
    cut = _split(norms.log().double())
    apart = norms[cut:].median() >= APART * norms[:cut].median()
    return ids[order[cut:] if apart else order].sort().values


def _split(values: Tensor) -> int:
    """Where to cut sorted values [n], n >= 2, in two groups whose means are as far apart as they can be (Otsu's rule)."""
    n = len(values)
    least = max(1, int(SHARE * n))
    first = torch.arange(1, n, dtype=values.dtype) / n
    sums = values.cumsum(0)[:-1] / n
    between = (values.mean() * first - sums).square() / (first * (1 - first))
    return least + int(between[least - 1 : n - least].argmax())
