"""The concept's token: in training an MLP on a fixed input makes its embedding, afterwards a row of the table holds it."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn

from ..errors import InputError, StaminaError
from ..seeds import derive_seed
from .config import StaminaConfig
from .words import single, words_in_use

PAIRS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
INITS = ("random", "mean")


def entries(token: str, vectors: int) -> list[str]:
    """The names of a token's vectors in tokenizers, as diffusers gives them: <cat>, <cat>_1, <cat>_2, …"""
    return [token, *(f"{token}_{i}" for i in range(1, vectors))]


class TokenMLP(nn.Module):
    """e = scale · MLP(code): a fixed code [width_in] to n embeddings [n, d], in fp32 even under autocast.

    Every linear map is W x / sqrt(fan-in) + b with normal W. scale is the size of one entry of a typical embedding. A step at
    a given learning rate then changes about the same share of an embedding, at any width and for any text encoder.
    """

    def __init__(self, width_in: int, width: int, depth: int, d: int, scale: float, vectors: int = 1):
        super().__init__()
        widths = [width_in, *[width] * depth, vectors * d]
        self.scale, self.shape = scale, (vectors, d)
        self.weights = nn.ParameterList(torch.zeros(n, k) for k, n in itertools.pairwise(widths))
        self.biases = nn.ParameterList(torch.zeros(n) for n in widths[1:])
        self.register_buffer("code", torch.zeros(width_in))

    def forward(self) -> Tensor:
        h = self.code
        last = len(self.weights) - 1
        with torch.autocast(h.device.type, enabled=False):
            for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
                h = F.linear(h, w) / math.sqrt(w.shape[1]) + b
                h = h if i == last else F.silu(h)
            return (h * self.scale).view(self.shape)

    @torch.no_grad()
    def reset_(self, start: Tensor, generator: torch.Generator) -> None:
        """Draw code and weights anew, in place, and set the last bias so that the output is `start` [n, d]."""
        for tensor in (self.code, *self.weights):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        for bias in self.biases:
            bias.zero_()
        self.biases[-1].copy_(((start.to(self.code) - self()) / self.scale).view(-1))


class TokenRow(nn.Module):
    """e = scale · row: the embeddings [n, d] themselves are the parameter, one behind the other, fp32.

    scale is the size of one entry of a typical embedding, so that a learning rate means the same for any text encoder.
    """

    def __init__(self, d: int, scale: float, vectors: int = 1):
        super().__init__()
        self.row = nn.Parameter(torch.zeros(vectors * d))
        self.shape, self.scale = (vectors, d), scale

    def forward(self) -> Tensor:
        return self.row.view(self.shape) * self.scale

    @torch.no_grad()
    def reset_(self, start: Tensor, generator: torch.Generator) -> None:
        self.row.copy_((start.expand(self.shape) / self.scale).flatten())


class _Word:
    """One text encoder with its tokenizer, and the id of the token being learnt, of `vectors` vectors."""

    def __init__(self, encoder: nn.Module, tokenizer: Any, vectors: int):
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(f"the tokenizer must be one of the tokenizers library, got {type(tokenizer).__name__}; "
                             "install transformers 5 or newer")
        self.encoder, self.tokenizer = encoder, tokenizer
        self.embedding = encoder.get_input_embeddings()
        self.used = words_in_use(self.table, tokenizer)
        words = self.table[self.used.to(self.table.device)].float().cpu()
        self.norm = words.norm(dim=1).median().item() if len(words) else 0.0
        if not 0 < self.norm < math.inf:
            raise InputError(f"the table of {type(encoder).__name__} has no word of finite size above 0; load trained weights")
        self.mean = words.mean(0)
        self.idle, self.instead = -vectors, None
        # a tensor, so that torch.compile needs no new program for the next token; no vector has a negative id
        self.id = torch.full((), self.idle, device=self.table.device)

    @property
    def table(self) -> Tensor:
        """The rows [V, d], detached: they are written, never trained."""
        return self.embedding.weight.detach()

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def check_new(self, token: str, vectors: int) -> None:
        """Raise InputError for a token that is not one word, or that this tokenizer has or would confuse with another."""
        if not isinstance(token, str) or not token or not token.isprintable() or " " in token:
            raise InputError(f"the token must be one word, got {token!r}; write it as '<cat>'")
        for entry in entries(token, vectors):
            pieces = self.ids(entry)
            known = len(pieces) == 1 and pieces[0] != self.tokenizer.unk_token_id
            if known or not pieces or entry in self.tokenizer.get_vocab():
                raise InputError(f"the token {entry!r} is a word that the tokenizer has; choose a new one, such as '<my-cat>'")
        if (other := self.mistaken(token, vectors)) is not None:
            raise InputError(f"diffusers would mistake {token!r} for {other!r} or a part of it; choose another, as '<my-cat>'")

    def mistaken(self, token: str, vectors: int) -> str | None:
        """An added token that diffusers would mix up with this one where it writes all vectors of a token into a prompt.

        It replaces a token by all its vectors wherever its letters are, and takes each name_1, name_2, … for a vector of name.
        """
        added = self.tokenizer.get_added_vocab()
        stem, _, number = token.rpartition("_")
        for other in added:
            within = (vectors > 1 and token in other) or (f"{other}_1" in added and other in entries(token, vectors)[-1])
            if within or other == f"{token}_{vectors}" or (other == stem and number.isdecimal()):
                return other
        return None

    def check_order(self, tokens: Sequence[str], vectors: int) -> None:
        """`check_new` of each token, as it will be when those before it are learned."""
        later = copy.copy(self)
        later.tokenizer = copy.deepcopy(self.tokenizer)
        for token in tokens:
            later.check_new(token, vectors)
            later.register(entries(token, vectors))

    def register(self, names: list[str]) -> None:
        """Give each name an id in the tokenizer."""
        # a bare word counts only where it stands alone, or it would split longer words
        alone = names[0].isalnum()
        self.tokenizer.add_tokens([AddedToken(name, single_word=alone, normalized=True) for name in names])

    def extend(self, names: list[str], rows: Tensor) -> None:
        """Give each name an id and its row of the table, of rows [n, d]; the rows before them keep their bits."""
        self.register(names)
        first = self.tokenizer.convert_tokens_to_ids(names[0])
        end = first + len(names)
        self.size, self.spare = len(self.table), self.table[first:end].clone()
        if end > self.size:
            self.resize(end)
        self.table[first:end] = rows.to(self.table)

    def resize(self, rows: int) -> None:
        # resizing draws the new rows from the global generator: leave the caller's generators alone
        device = self.table.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self.encoder.resize_token_embeddings(rows, mean_resizing=False)

    def shrink(self, names: list[str]) -> None:
        """Undo `extend` of the names added last."""
        first = self.tokenizer.convert_tokens_to_ids(names[0])
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        state["added_tokens"] = [added for added in state["added_tokens"] if added["content"] not in names]
        # there is no public way to take a token back
        self.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
        if len(self.table) > self.size:
            self.resize(self.size)
        self.table[first : first + len(self.spare)] = self.spare

    def start(self, init: str, initializer: str | None, vectors: int, generator: torch.Generator) -> Tensor:
        """The embeddings [vectors, d] that a token starts from, fp32: directions as large as a word, or those of a word."""
        if initializer is None and init in INITS:
            shape = vectors, len(self.mean)
            directions = torch.randn(shape, generator=generator) if init == "random" else self.mean.expand(shape)
            return directions * (self.norm / directions.norm(dim=1, keepdim=True))
        word, option = (init, f"token_init must be {', '.join(INITS)} or") if initializer is None else (
            initializer, "initializer_token must be")
        index = single(self.tokenizer, word)
        if index is None:
            raise InputError(f"{option} a word of one token, got {word!r}, which the tokenizer splits or does not know; "
                             "choose a more common word, such as 'cat'")
        return self.table[index].float().cpu().expand(vectors, -1)


class TokenBank(nn.Module):
    """The learnt tokens of a pipeline. One is learnt at a time, by an MLP for each text encoder that serves all of them.

    While a token is active, a hook on the embedding puts the MLP's output in the place of the token's row. Gradients reach
    the MLP, and the table stays as it is. Outside of `begin` … `fold_` the hook changes nothing.

    active   the token being learnt, or None
    tokens   the folded ones in order: token -> {"text_encoder": [d], "text_encoder_2": [d]}, fp32 on the CPU. They are [n, d]
             for a token of n vectors, n > 1
    vectors  of a token that begins. Its vectors are <cat>, <cat>_1, <cat>_2, … in tokenizers, as in diffusers

    mlp      False: the row itself is the parameter (C-LoRA)
    init     where a token starts: "random" (random directions) or "mean" (of words in use), as large as a word, or a word

    Parameters are fp32 and none of the text encoders' own. These objects are never replaced, only their data.
    """

    @torch.inference_mode(False)
    def __init__(self, pipeline, config: StaminaConfig, *, mlp: bool = True, init: str = "random"):
        super().__init__()
        self.active: str | None = None
        self.tokens: dict[str, dict[str, Tensor]] = {}
        self.init, self.vectors = init, config.token_vectors
        # a plain dict, so that the text encoders do not become submodules
        self._words = {
            encoder: _Word(getattr(pipeline, encoder), getattr(pipeline, tokenizer), self.vectors)
            for encoder, tokenizer in PAIRS if getattr(pipeline, encoder, None) is not None
        }
        if not self._words:
            raise InputError(f"{type(pipeline).__name__} has no text encoder to teach a word; give a Stable Diffusion pipeline")
        self.makers = nn.ModuleDict()
        self._hooks = []
        for name, word in self._words.items():
            d = word.embedding.embedding_dim
            scale = word.norm / math.sqrt(d)
            if mlp:
                shape = config.token_input_width, config.token_width, config.token_depth, d
                maker = TokenMLP(*shape, scale=scale, vectors=self.vectors)
            else:
                maker = TokenRow(d, scale, self.vectors)
            self.makers[name] = maker.to(word.table.device)
            self._hooks.append(word.embedding.register_forward_hook(self._substitute(self.makers[name], word)))

    @staticmethod
    def _substitute(maker: nn.Module, word: _Word):
        def hook(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
            vectors = maker() if word.instead is None else word.instead
            place = (args[0] - word.id).unsqueeze(-1)
            for i, vector in enumerate(vectors.to(out.dtype).unbind()):
                out = torch.where(place == i, vector, out)
            return out

        return hook

    def begin(self, token: str, seed: int = 0, initializer: str | None = None) -> None:
        """Add a token to every tokenizer and table, and start the MLPs anew, in place, as a function of seed and word alone.

        initializer: the word whose embedding all vectors start from; None: as `init` says. Raises InputError, and changes
        nothing, for an initializer that is not one token, and for a token that exists already, is not one word, or would be
        split.
        """
        starts = self._starts(initializer, seed)
        self._extend(token, {name: start for name, (start, _) in starts.items()})
        for name, (start, generator) in starts.items():
            word = self._words[name]
            self.makers[name].to(word.table.device).reset_(start, generator)
            word.id = word.id.to(word.table.device)
            word.id.fill_(self._index(name, token))
        self.active = token

    def check_order(self, tokens: Sequence[str]) -> None:
        """Raise InputError unless `begin` would take these tokens one after another. Nothing is changed."""
        for word in self._words.values():
            word.check_order(tokens, self.vectors)

    def check_start(self, initializer: str | None = None) -> None:
        """Raise InputError unless a token can begin from this word, or as `init` says without one."""
        self._starts(initializer, 0)

    def _starts(self, initializer: str | None, seed: int) -> dict[str, tuple[Tensor, torch.Generator]]:
        """For each text encoder the start [n, d] of a token, and the generator that goes on with the MLP's values."""
        found = {}
        for name, word in self._words.items():
            generator = torch.Generator().manual_seed(derive_seed(seed, "token", name))
            found[name] = word.start(self.init, initializer, self.vectors, generator), generator
        return found

    def words(self, count: int) -> list[dict[str, Tensor]]:
        """The embeddings {encoder: [d]}, fp32 on the CPU, of up to `count` words in use, spread evenly over all of them."""
        count = min(count, *(len(word.used) for word in self._words.values()))
        rows = {}
        for name, word in self._words.items():
            chosen = word.used[torch.linspace(0, len(word.used) - 1, count).long()]
            rows[name] = word.table[chosen.to(word.table.device)].float().cpu()
        return [{name: part[i] for name, part in rows.items()} for i in range(count)]

    @contextlib.contextmanager
    def standing_in(self, rows: Mapping[str, Tensor]) -> Iterator[None]:
        """Until the block ends, all vectors of the active token are these embeddings {encoder: [d]}."""
        self._need_active("replace")
        for name, word in self._words.items():
            word.instead = rows[name].to(word.table.device).expand(self.vectors, -1)
        try:
            yield
        finally:
            for word in self._words.values():
                word.instead = None

    def add(self, token: str, embeddings: Mapping[str, Tensor]) -> None:
        """Register a token with the embeddings [d] or [n, d] that `fold_` returned. Calls in the same order give the same ids.

        Raises InputError, and changes nothing, for embeddings that do not fit, or a token that `begin` would refuse.
        """
        rows = {name: torch.atleast_2d(row.detach().float().cpu()).clone() for name, row in embeddings.items()}
        known = rows.keys() == self._words.keys() and len({len(row) for row in rows.values()}) == 1
        if not known or not all(
            len(row) and row.shape[1:] == self._words[name].mean.shape and row.isfinite().all() for name, row in rows.items()
        ):
            got = {name: list(row.shape) for name, row in embeddings.items()}
            want = {name: ["n", len(word.mean)] for name, word in self._words.items()}
            raise InputError(f"the embeddings of {token!r} must be finite, of shapes {want}, got {got}; "
                             "use those of the same kind of model")
        self._extend(token, rows)
        self.tokens[token] = _plain(rows)

    @torch.no_grad()
    def fold_(self) -> dict[str, Tensor]:
        """Compute the active token's embeddings once and write them into their rows. Returns them as they are in `tokens`.

        Earlier tokens keep their bits. Raises StaminaError where no token is active or an embedding is not finite.
        """
        token = self._need_active("fold")
        rows = {name: maker().float() for name, maker in self.makers.items()}
        for name, row in rows.items():
            if not torch.isfinite(row).all():
                raise StaminaError(f"the embedding of {token!r} for {name} is not finite; discard() it and learn it again")
        for name, row in rows.items():
            word = self._words[name]
            first = self._index(name, token)
            word.table[first : first + self.vectors] = row.to(word.table)
            word.id.fill_(word.idle)
        self.active = None
        self.tokens[token] = _plain({name: row.cpu().clone() for name, row in rows.items()})
        return self.tokens[token]

    @torch.no_grad()
    def discard(self) -> None:
        """Take the active token out of tokenizers and tables again, as if it had not begun."""
        token = self._need_active("discard")
        for name, word in self._words.items():
            index, last = self._index(name, token) + self.vectors - 1, max(word.tokenizer.get_vocab().values())
            if index != last:
                raise StaminaError(f"{token!r} has id {index}, but the last is {last}; remove the token added after it first")
        self._shrink(token, self.vectors)
        self.active = None

    def detach(self) -> None:
        """Remove the hooks and discard an active token; folded tokens stay, as rows of a plain text encoder."""
        if self.active is not None:
            self.discard()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _need_active(self, doing: str) -> str:
        if self.active is None:
            raise StaminaError(f"no token is active to {doing}; call begin(token) first")
        return self.active

    def _index(self, name: str, token: str) -> int:
        return self._words[name].tokenizer.convert_tokens_to_ids(token)

    @torch.no_grad()
    def _extend(self, token: str, rows: Mapping[str, Tensor]) -> None:
        """Add a token with its rows [n, d] everywhere, or nowhere and raise."""
        if self.active is not None:
            raise StaminaError(f"the token {self.active!r} is still active; call fold_() or discard() first")
        if not self._hooks:
            raise StaminaError("this token bank is detached; attach to the pipeline again")
        for name, word in self._words.items():
            if word.encoder.get_input_embeddings() is not word.embedding:
                raise StaminaError(f"the embedding of {name} was replaced since it was attached; detach and attach again")
            word.check_new(token, len(rows[name]))
            names = entries(token, len(rows[name]))
        for name, word in self._words.items():
            word.extend(names, rows[name])
        for name, word in self._words.items():
            for entry in names:
                index = self._index(name, entry)
                if word.ids(entry) != [index] or word.ids(f"a photo of {entry} on a table").count(index) != 1:
                    self._shrink(token, len(names))
                    raise InputError(f"the tokenizer would split {entry!r}; choose another, such as '<my-cat>'")

    def _shrink(self, token: str, vectors: int) -> None:
        for word in self._words.values():
            word.shrink(entries(token, vectors))
            word.id.fill_(word.idle)


def _plain(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Embeddings [n, d] as they are stored: [d] for a single vector."""
    return {name: row[0] if len(row) == 1 else row for name, row in rows.items()}
