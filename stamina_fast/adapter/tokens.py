"""The concept's token: in training an MLP on a fixed input makes its embedding, afterwards a row of the table holds it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn

from ..errors import InputError, StaminaError
from ..seeds import derive_seed
from .config import StaminaConfig
from .words import words_in_use

PAIRS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
INITS = ("random", "mean")


class TokenMLP(nn.Module):
    """e = scale · MLP(code): a fixed code [width_in] to an embedding [d], in fp32 even under autocast.

    Every linear map is W x / sqrt(fan-in) + b with normal W. scale is the size of one entry of a typical embedding. A step at
    a given learning rate then changes about the same share of an embedding, at any width and for any text encoder.
    """

    def __init__(self, width_in: int, width: int, depth: int, d: int, scale: float):
        super().__init__()
        widths = [width_in, *[width] * depth, d]
        self.scale = scale
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
            return h * self.scale

    @torch.no_grad()
    def reset_(self, start: Tensor, generator: torch.Generator) -> None:
        """Draw code and weights anew, in place, and set the last bias so that the output is `start` [d]."""
        for tensor in (self.code, *self.weights):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        for bias in self.biases:
            bias.zero_()
        self.biases[-1].copy_((start.to(self.code) - self()) / self.scale)


class TokenRow(nn.Module):
    """e = row: the embedding [d] itself is the parameter, fp32."""

    def __init__(self, d: int):
        super().__init__()
        self.row = nn.Parameter(torch.zeros(d))

    def forward(self) -> Tensor:
        return self.row

    @torch.no_grad()
    def reset_(self, start: Tensor, generator: torch.Generator) -> None:
        self.row.copy_(start)


class _Word:
    """One text encoder with its tokenizer, and the id of the token being learnt."""

    def __init__(self, encoder: nn.Module, tokenizer: Any):
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
        self.spare: Tensor | None = None
        # a tensor, so that torch.compile needs no new program for the next token; no token has the id -1
        self.id = torch.full((), -1, device=self.table.device)

    @property
    def table(self) -> Tensor:
        """The rows [V, d], detached: they are written, never trained."""
        return self.embedding.weight.detach()

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def check_new(self, token: str) -> None:
        """Raise InputError for a token that is not one word, or that this tokenizer has already."""
        if not isinstance(token, str) or not token or not token.isprintable() or " " in token:
            raise InputError(f"the token must be one word, got {token!r}; write it as '<cat>'")
        pieces = self.ids(token)
        known = len(pieces) == 1 and pieces[0] != self.tokenizer.unk_token_id
        if known or not pieces or token in self.tokenizer.get_vocab():
            raise InputError(f"the token {token!r} is a word that the tokenizer has; choose a new one, such as '<my-cat>'")

    def extend(self, token: str, row: Tensor) -> int:
        """Give the token an id and its row of the table; the rows before it keep their bits."""
        # a bare word counts only where it stands alone, or it would split longer words
        self.tokenizer.add_tokens(AddedToken(token, single_word=token.isalnum(), normalized=True))
        index = self.tokenizer.convert_tokens_to_ids(token)
        self.spare = None
        if index < len(self.table):
            self.spare = self.table[index].clone()
        else:
            self.resize(index + 1)
        self.table[index] = row.to(self.table)
        return index

    def resize(self, rows: int) -> None:
        # resizing draws the new row from the global generator: leave the caller's generators alone
        device = self.table.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self.encoder.resize_token_embeddings(rows, mean_resizing=False)

    def shrink(self, token: str, index: int) -> None:
        """Undo `extend` of the token added last."""
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        state["added_tokens"] = [added for added in state["added_tokens"] if added["content"] != token]
        # there is no public way to take a token back
        self.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
        if self.spare is None:
            self.resize(index)
        else:
            self.table[index] = self.spare

    def start(self, init: str, generator: torch.Generator) -> Tensor:
        """The embedding [d] that a token starts from, fp32: a direction of typical norm, or the embedding of a word."""
        if init in INITS:
            direction = torch.randn(self.mean.shape, generator=generator) if init == "random" else self.mean
            return direction * (self.norm / direction.norm())
        pieces = self.ids(init)
        if len(pieces) != 1 or pieces[0] == self.tokenizer.unk_token_id:
            raise InputError(f"token_init must be {', '.join(INITS)} or a word of one token, got {init!r} of {len(pieces)}; "
                             "choose another word")
        return self.table[pieces[0]].float().cpu()


class TokenBank(nn.Module):
    """The learnt tokens of a pipeline. One is learnt at a time, by an MLP for each text encoder that serves all of them.

    While a token is active, a hook on the embedding puts the MLP's output in the place of the token's row. Gradients reach
    the MLP, and the table stays as it is. Outside of `begin` … `fold_` the hook changes nothing.

    active  the token being learnt, or None
    tokens  the folded ones in order: token -> {"text_encoder": [d], "text_encoder_2": [d]}, fp32 on the CPU

    mlp     False: the row itself is the parameter (C-LoRA)
    init    where a token starts: "random" (a random direction) or "mean" (of words in use), as large as a word, or a word

    Parameters are fp32 and none of the text encoders' own. These objects are never replaced, only their data.
    """

    @torch.inference_mode(False)
    def __init__(self, pipeline, config: StaminaConfig, *, mlp: bool = True, init: str = "random"):
        super().__init__()
        self.active: str | None = None
        self.tokens: dict[str, dict[str, Tensor]] = {}
        self.init = init
        # a plain dict, so that the text encoders do not become submodules
        self._words = {
            encoder: _Word(getattr(pipeline, encoder), getattr(pipeline, tokenizer))
            for encoder, tokenizer in PAIRS if getattr(pipeline, encoder, None) is not None
        }
        if not self._words:
            raise InputError(f"{type(pipeline).__name__} has no text encoder to teach a word; give a Stable Diffusion pipeline")
        self.makers = nn.ModuleDict()
        self._hooks = []
        for name, word in self._words.items():
            d = word.embedding.embedding_dim
            if mlp:
                shape = config.token_input_width, config.token_width, config.token_depth, d
                maker = TokenMLP(*shape, scale=word.norm / math.sqrt(d))
            else:
                maker = TokenRow(d)
            self.makers[name] = maker.to(word.table.device)
            self._hooks.append(word.embedding.register_forward_hook(self._substitute(self.makers[name], word)))

    @staticmethod
    def _substitute(maker: nn.Module, word: _Word):
        def hook(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
            return torch.where((args[0] == word.id).unsqueeze(-1), maker().to(out.dtype), out)

        return hook

    def begin(self, token: str, seed: int = 0) -> None:
        """Add a token to every tokenizer and table, and start the MLPs anew, in place, as a function of `seed` alone.

        Raises InputError, and changes nothing, for a token that exists already, is not one word, or would be split.
        """
        starts = {}
        for name, word in self._words.items():
            generator = torch.Generator().manual_seed(derive_seed(seed, "token", name))
            starts[name] = word.start(self.init, generator), generator
        self._extend(token, {name: start for name, (start, _) in starts.items()})
        for name, (start, generator) in starts.items():
            word = self._words[name]
            self.makers[name].to(word.table.device).reset_(start, generator)
            word.id = word.id.to(word.table.device)
            word.id.fill_(self._index(name, token))
        self.active = token

    def add(self, token: str, embeddings: Mapping[str, Tensor]) -> None:
        """Register a token with the embeddings that `fold_` returned. Calls in the same order give the same ids."""
        for name, word in self._words.items():
            row = embeddings.get(name)
            fits = row is not None and row.shape == word.mean.shape and torch.isfinite(row).all()
            if not fits or len(embeddings) != len(self._words):
                got = {key: list(value.shape) for key, value in embeddings.items()}
                want = {key: list(value.mean.shape) for key, value in self._words.items()}
                raise InputError(f"the embeddings of {token!r} must be finite, of shapes {want}, got {got}; "
                                 "use those of the same kind of model")
        rows = {name: embeddings[name].detach().float().cpu().clone() for name in self._words}
        self._extend(token, rows)
        self.tokens[token] = rows

    @torch.no_grad()
    def fold_(self) -> dict[str, Tensor]:
        """Compute the active token's embedding once and write it into its row. Returns {encoder: [d] fp32 on the CPU}.

        Earlier tokens keep their bits. Raises StaminaError where no token is active or an embedding is not finite.
        """
        token = self._need_active("fold")
        rows = {name: maker().float() for name, maker in self.makers.items()}
        for name, row in rows.items():
            if not torch.isfinite(row).all():
                raise StaminaError(f"the embedding of {token!r} for {name} is not finite; discard() it and learn it again")
        for name, row in rows.items():
            word = self._words[name]
            word.table[self._index(name, token)] = row.to(word.table)
            word.id.fill_(-1)
        self.active = None
        self.tokens[token] = {name: row.cpu().clone() for name, row in rows.items()}
        return self.tokens[token]

    @torch.no_grad()
    def discard(self) -> None:
        """Take the active token out of tokenizers and tables again, as if it had not begun."""
        token = self._need_active("discard")
        for name, word in self._words.items():
            if (last := max(word.tokenizer.get_vocab().values())) != (index := self._index(name, token)):
                raise StaminaError(f"{token!r} has id {index}, but the last is {last}; remove the token added after it first")
        self._shrink(token)
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
        """Add a token everywhere, or nowhere and raise."""
        if self.active is not None:
            raise StaminaError(f"the token {self.active!r} is still active; call fold_() or discard() first")
        if not self._hooks:
            raise StaminaError("this token bank is detached; attach to the pipeline again")
        for name, word in self._words.items():
            if word.encoder.get_input_embeddings() is not word.embedding:
                raise StaminaError(f"the embedding of {name} was replaced since it was attached; detach and attach again")
            word.check_new(token)
        for name, word in self._words.items():
            word.extend(token, rows[name])
        for name, word in self._words.items():
            index = self._index(name, token)
            if word.ids(token) != [index] or word.ids(f"a photo of {token} on a table").count(index) != 1:
                self._shrink(token)
                raise InputError(f"the tokenizer would split {token!r}; choose another, such as '<my-cat>'")

    def _shrink(self, token: str) -> None:
        indices = {name: self._index(name, token) for name in self._words}
        for name, word in self._words.items():
            word.shrink(token, indices[name])
            word.id.fill_(-1)
