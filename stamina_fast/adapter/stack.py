"""All K and V projections of one width, dtype and device as one matrix; the U-Net's weights are views of it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..ops import functional
from ..ops.backend import Factors
from ..ops.noise import GateNoise
from ..ops.reference import compute_dtype
from .config import StaminaConfig
from .masks import MASKS, identity

# attribute of the text states that a TextHook hands on: {stack: the outputs of its projections, or None while disabled}
SEEN = "_stamina_seen"
FACTORS = Factors._fields


@dataclasses.dataclass
class Control:
    """What all stacks of a U-Net read at every call: noise and temperature of the gate, and whether the residual is added.

    penalties: None, or where each stack puts its (sparsity, forgetting) at its next `project_all`.
    """

    noise: GateNoise | None = None
    tau: float | Tensor = 1.0
    enabled: bool = True
    penalties: dict[Stack, tuple[Tensor, Tensor]] | None = None


class StackedLinear(nn.Linear):
    """A projection whose weight is rows of a `Stack`. `attach` gives a module this class, `detach` its own again."""

    def forward(self, x: Tensor) -> Tensor:
        stack, index = self.place
        y = stack.project(x, index)
        if y is None:
            return super().forward(x)
        return y if self.bias is None else y + self.bias

    def _apply(self, fn, recurse: bool = True):
        # .to(), .half() and the like give the weight memory of its own
        self.place[0].tied = False
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self.place[0].tied = False
        return super()._load_from_state_dict(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        raise RuntimeError(
            "a U-Net with adapters cannot be copied or pickled: its weights are views of one matrix; "
            "call adapters.detach() first, and attach again"
        )


def in_backward() -> bool:
    """Whether autograd is running on this thread, as it is while gradient checkpointing computes a block again."""
    return torch._C._current_graph_task_id() != -1


class Stack(nn.Module):
    """The matrix W [N, k] of G projections in order, its base W_0, its fp32 master, and the factors of the current task.

    weight [N, k] is the memory of the U-Net's own parameters, which are frozen before a stack is made.
    base is W_0, in the weight's dtype at attach. master is W_0 plus all folds in fp32 (fp64 for fp64), from the first
    fold on. sizes are the rows of each projection, summing to N.
    Parameters: a [N, r], b [G, r, k], and those of the mask, in fp32 (fp64 for fp64). These Parameter objects are never
    replaced, only their data. A full residual is a [N, k], and b is an identity for each projection and no parameter.
    """

    def __init__(self, slots: Mapping[str, nn.Linear], config: StaminaConfig, control: Control, number: int):
        super().__init__()
        self.config, self.control = config, control
        self.names, self.slots = tuple(slots), list(slots.values())
        self.sizes = tuple(slot.weight.shape[0] for slot in self.slots)
        self.base = torch.cat([slot.weight.detach() for slot in self.slots])
        self.master = self._past = None
        self._past_known = False
        self.folded: list[str] = []
        self.tied = False
        n, k = self.base.shape
        device, dtype = self.base.device, compute_dtype(self.base.dtype)
        rank = k if config.residual == "full" else config.rank
        self.a = nn.Parameter(torch.empty(n, rank, device=device, dtype=dtype))
        if config.residual == "full":
            self.register_buffer("b", identity(len(self.sizes), self.a.detach()), persistent=False)
        else:
            self.b = nn.Parameter(torch.empty(len(self.sizes), rank, k, device=device, dtype=dtype))
        self.mask = MASKS[config.mask](self.sizes, k, config, device, self.base.dtype, number)
        # whatever may run out of memory comes before the modules change
        weight = self.base.clone()
        for index, slot in enumerate(self.slots):
            slot.__class__ = StackedLinear
            slot.place = (self, index)
        self._tie(weight)

    def release(self) -> None:
        """Make the projections plain modules again, each weight in memory of its own, with the bits that it has now."""
        for slot in self.slots:
            slot.weight.data = slot.weight.data.clone()
            del slot.place
            slot.__class__ = nn.Linear

    # the views

    def _tie(self, weight: Tensor) -> None:
        self.weight = weight
        for slot, rows in zip(self.slots, weight.split(self.sizes), strict=True):
            slot.weight.data = rows
        self._marks, self.tied = self._look(), True

    def _look(self) -> list[tuple]:
        weights = [slot.weight for slot in self.slots]
        return [(w.data_ptr(), w.dtype, w._version, w.requires_grad) for w in weights]

    @torch.compiler.disable
    @torch.no_grad()
    def refresh(self, thorough: bool = False, rebuilding: bool = False) -> None:
        """Notice weights that were moved, cast or written from outside, and make them views of the stack again.

        After a move or cast, W_0, the master and the factors follow, and the weight is rounded anew from the master.
        Other values that were written become the new W_0 if nothing is folded. After a fold they raise RuntimeError,
        since the next fold would overwrite them.

        thorough    compare the values even if addresses and versions are as they were
        rebuilding  accept any values, since the weight is about to be computed anew
        """
        marks = self._look()
        if marks == self._marks and not thorough:
            self.tied = True
            return
        if any(slot.weight.requires_grad for slot in self.slots):
            raise RuntimeError(
                "K/V weights are frozen while adapters are attached, and would get no gradient; "
                "call unet.requires_grad_(False), or train them after adapters.detach()"
            )
        kinds = {(slot.weight.dtype, slot.weight.device) for slot in self.slots}
        if len(kinds) > 1:
            raise RuntimeError(
                f"the K/V weights of one stack are spread over {sorted(map(str, kinds))}; "
                "move the whole U-Net with .to(), or detach before offloading parts of it"
            )
        moved = [mark[:2] for mark in marks] != [mark[:2] for mark in self._marks]
        values = torch.cat([slot.weight.detach() for slot in self.slots]) if moved else self.weight
        if values.is_meta and not self.weight.is_meta:
            raise RuntimeError("the K/V weights were offloaded to the meta device; detach before offloading")
        expected = (self.base if self.master is None else self.master).to(values)
        if moved and torch.equal(values, self.weight.to(values)):
            values = expected.clone()
        elif not rebuilding and not torch.equal(values, expected):
            if self.folded:
                raise RuntimeError(
                    f"K/V weights were written from outside after folding {self.folded[-1]!r}; "
                    "call adapters.rewind([...]) to rebuild them, or adapters.detach() to keep them"
                )
            self.base = values.clone()
        if moved:
            self._follow(values)
            self._tie(values)
        self._marks, self.tied = self._look(), True

    def _follow(self, weight: Tensor) -> None:
        self.to(weight.device)
        self.mask.low = weight.dtype
        self.base = self.base.to(weight.device)
        self.master = None if self.master is None else self.master.to(weight.device, compute_dtype(weight.dtype))
        self._past, self._past_known = None, False

    # one step

    def arguments(self, sampled: bool = True) -> dict:
        """The keyword arguments of `masked_linear` in force, without x, and "names": the projections in order of their rows.

        A mask that the operator cannot make is in a already: then a is M ⊙ (A B) [N, k], b identities, and there is no gate.

        sampled: with the noise in force; False for the mask that a fold takes
        """
        noise, tau = self.control.noise if sampled and self.config.samples else None, self.control.tau
        a, b, p, q, gate_bias = self.a, self.b, None, None, None
        residual = self.mask.residual(a, b, noise, tau)
        if residual is None:
            p, q, gate_bias = self.mask.factors()
        else:
            a, b, noise = residual, identity(len(self.sizes), residual), None
        return {
            "weight": self.weight, "a": a, "b": b, "p": p, "q": q, "gate_bias": gate_bias, "sizes": self.sizes,
            "noise": noise, "tau": tau, "names": self.names,
        }

    def project_all(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """The output of every projection for x [..., k], by one operator call; None while disabled."""
        if not self.control.enabled:
            return None
        arguments = self.arguments()
        del arguments["names"]
        found = self.control.penalties
        if found is None or self in found:
            y = functional.masked_linear(x, **arguments)
        else:
            y, *both = functional.masked_linear_penalties(x, **arguments, past=self.past())
            found[self] = self._with_sparsity(*both)
        # one split, whose backward is one concatenation, where G slices would each fill N columns with zeros
        return y.split(self.sizes, dim=-1)

    def project(self, x: Tensor, index: int) -> Tensor | None:
        """Projection `index` of x, without bias; None while disabled, when the plain product is wanted.

        Text states that the U-Net's hook saw carry the outputs of that forward, made with its noise, however many
        forwards ago. For any other tensor the projection is computed here. With a sampled mask that takes the whole
        stack, since the noise is a function of the stack's rows. Within backward the noise in force may be that of a
        later step, so a projection is refused there.
        """
        seen = getattr(x, SEEN, None)
        if seen is not None and self in seen:
            return None if seen[self] is None else seen[self][index]
        if not torch.compiler.is_compiling():
            if in_backward():
                raise RuntimeError(
                    f"{self.names[index]} is computed again within backward, on text states that the U-Net's hook did not see; "
                    "use gradient checkpointing with use_reentrant=False, or none in models that change the states per layer"
                )
            self.refresh()
        if not self.control.enabled:
            return None
        arguments = self.arguments()
        if arguments["noise"] is not None:
            return self.project_all(x)[index]
        rows = self.rows(index)
        return functional.masked_linear(
            x, self.weight[rows], **one_projection(arguments, rows, index), tau=arguments["tau"],
        )

    def rows(self, index: int) -> slice:
        """The rows of projection `index`."""
        start = sum(self.sizes[:index])
        return slice(start, start + self.sizes[index])

    # from task to task

    def reset_(self, generator: torch.Generator) -> None:
        """Fresh factors in place, with A·B = 0."""
        with torch.no_grad():
            if self.config.residual == "full":
                self.a.zero_()
            else:
                zero, drawn = (self.a, self.b) if self.config.zero_factor == "a" else (self.b, self.a)
                zero.zero_()
                # fan-in of B [r, k] is k, of A [n, r] is r
                scale = self.config.factor_scale / drawn.shape[-1] ** 0.5
                drawn.copy_(torch.randn(drawn.shape, generator=generator) * scale)
        self.mask.reset_(generator)

    @property
    def unfolded(self) -> bool:
        """Whether the current factors may change the output: neither A nor B is all zero."""
        return bool(self.a.any()) and bool(self.b.any())

    @torch.no_grad()
    def snapshot(self) -> dict[str, Tensor]:
        """The factors on the CPU as a fold reads them: rounded to the weight's dtype, but c in fp32 (fp64 for fp64)."""
        arguments = self.arguments(sampled=False)
        kept = {name: arguments[name] for name in FACTORS if arguments[name] is not None}
        dtypes = {name: compute_dtype(self.weight.dtype) if name == "gate_bias" else self.weight.dtype for name in kept}
        return {name: tensor.detach().to("cpu", dtypes[name], copy=True) for name, tensor in kept.items()}

    @torch.no_grad()
    def fold_(self, task: str, factors: Mapping[str, Tensor]) -> None:
        """master += M ⊙ (A B) of these factors; weight = round(master), which the U-Net's weights are views of."""
        if self.master is None:
            self.master = self.base.to(compute_dtype(self.weight.dtype), copy=True)
        here = {name: tensor.to(self.weight.device) for name, tensor in factors.items()}
        functional.fold_(self.weight, **here, sizes=self.sizes, master=self.master)
        self.folded.append(task)
        self._past_known = False

    @torch.no_grad()
    def rewind(self, tasks: Iterable[tuple[str, Mapping[str, Tensor]]]) -> None:
        """Rebuild the weight from W_0 and the stored factors of these tasks, in this order."""
        self.refresh(rebuilding=True)
        self.master, self._past_known = None, False
        self.folded, kept = [], []
        for task, factors in tasks:
            kept.append({name: tensor.to(self.weight.device) for name, tensor in factors.items()})
            self.folded.append(task)
        if kept:
            self.master = torch.empty_like(self.base, dtype=compute_dtype(self.weight.dtype))
        functional.rebuild_(self.weight, self.base, kept, sizes=self.sizes, master=self.master)

    @torch.no_grad()
    def past(self) -> Tensor | None:
        """S = master - W_0 in fp32 [N, k], or None while nothing is folded. The next fold overwrites this tensor."""
        if self.master is None:
            return None
        if not self._past_known:
            if self._past is None:
                self._past = torch.empty_like(self.master)
            torch.sub(self.master, self.base, out=self._past)
            self._past_known = True
        return self._past

    def penalties(self) -> tuple[Tensor, Tensor]:
        """(sparsity, forgetting) of the factors in force."""
        arguments = self.arguments()
        kept = {name: arguments[name] for name in (*FACTORS, "sizes", "noise", "tau")}
        return self._with_sparsity(*functional.gate_penalties(**kept, past=self.past(), dtype=self.weight.dtype))

    def _with_sparsity(self, sparsity: Tensor, forgetting: Tensor) -> tuple[Tensor, Tensor]:
        """The penalties that an operator computed, with the mask's own sparsity where the operator knew no gate."""
        own = self.mask.sparsity()
        return sparsity if own is None else own, forgetting

    @torch.no_grad()
    def delta(self, index: int) -> Tensor:
        """M ⊙ AB of one projection [n, k] with the deterministic gate, in fp32 (fp64 for fp64)."""
        rows, low = self.rows(index), self.weight.dtype
        one = one_projection(self.arguments(sampled=False), rows, index)
        product = one["a"].to(low).to(self.a.dtype) @ one["b"][0].to(low).to(self.a.dtype)
        if one["p"] is None:
            return product
        mask = functional.gate_mask(one["p"], one["q"], one["gate_bias"], dtype=low)
        return torch.where(mask, product, torch.zeros_like(product))

    @torch.no_grad()
    def density(self) -> Tensor:
        """The share of open entries of the deterministic gate, 0-dim float64."""
        return self.mask.density(self.a, self.b)


def one_projection(arguments: Mapping, rows: slice, index: int) -> dict[str, Tensor | None]:
    """The factors of projection `index` alone."""
    parts = {"a": rows, "p": rows, "b": slice(index, index + 1)}
    parts["q"] = parts["gate_bias"] = parts["b"]
    return {name: None if arguments[name] is None else arguments[name][part] for name, part in parts.items()}


@contextlib.contextmanager
def disabled(control: Control) -> Iterator[None]:
    """The folded model without the unfolded residual, until the block ends."""
    before, control.enabled = control.enabled, False
    try:
        yield
    finally:
        control.enabled = before
