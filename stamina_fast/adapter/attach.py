"""`attach` puts masked low-rank residuals on the text K/V projections of a U-Net; `Adapters` trains, folds and removes them."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..ops.noise import GateNoise
from ..pipeline.load import freeze, modules_of, unfreeze
from ..pipeline.projections import STATES, find_projections
from ..seeds import derive_seed
from .checks import check_projections
from .config import StaminaConfig
from .hook import TextHook
from .stack import FACTORS, Control, Stack, disabled


def attach(unet_or_pipeline, config: StaminaConfig | None = None) -> Adapters:
    """Put masked low-rank residuals on every text K/V projection of a diffusers U-Net, or of a pipeline's.

    A pipeline also gets its concept token (`adapters.tokens`). A·B = 0 at first, so the model's function is unchanged.
    The projections stay modules of the same names and state-dict keys.

    Every parameter of the model is frozen: of the U-Net, and of the VAE and text encoders of a pipeline. Gradients still
    pass through the text encoders to the token. `adapters.detach()` makes the modules plain again, and trainable again
    what was trainable before.

    Raises InputError, a ValueError: no cross-attention, adapters or other layers already on the projections, a rank above
    the smallest width, an offloaded or fused model.

    >>> import torch, stamina_fast as sf
    >>> from stamina_fast.pipeline.load import load_pipeline
    >>> pipe = load_pipeline("tiny", device="cpu")
    >>> adapters = sf.attach(pipe, sf.StaminaConfig(rank=4, gate_rank=4))
    >>> adapters.tokens.begin("<cat>")
    >>> optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-3)    # train with it, then
    >>> embeddings = adapters.fold_("cat")
    >>> adapters.folded
    ['cat']
    >>> adapters.detach()
    """
    config = StaminaConfig() if config is None else config
    pipeline = None if isinstance(unet_or_pipeline, nn.Module) else unet_or_pipeline
    unet = unet_or_pipeline if pipeline is None else getattr(pipeline, "unet", None)
    # a compiled module wraps the one whose hooks and projections count
    unet = getattr(unet, "_orig_mod", unet)
    if not isinstance(unet, nn.Module) or STATES not in inspect.signature(type(unet).forward).parameters:
        got = type(unet_or_pipeline).__name__
        raise InputError(f"attach needs a diffusers U-Net with cross-attention, or a pipeline with one, got {got}")
    slots = find_projections(unet)
    check_projections(unet, slots, config)
    tokens = None
    if pipeline is not None:
        from .tokens import TokenBank

        tokens = TokenBank(pipeline, config, mlp=config.token_mlp, init=config.token_init)
    with torch.inference_mode(False):
        return Adapters(unet, slots, config, tokens, [unet] if pipeline is None else modules_of(pipeline))


class Adapters:
    """The residuals of one U-Net: the current task's trainable factors, and the tasks folded so far.

    `attach` makes them. frozen: the modules whose parameters get no gradient until `detach`.

    config  the options
    stacks  one `Stack` for each width, dtype and device
    tokens  the pipeline's token bank, or None
    tasks   the factors of each task as they were folded, by name, in order of registration. They are on the CPU, called
            "stacks.I.a", ".b", ".p", ".q", ".gate_bias"
    folded  the names of the tasks that are in the weights now, in order
    """

    def __init__(self, unet: nn.Module, slots: Mapping[str, nn.Linear], config: StaminaConfig, tokens, frozen: list[nn.Module]):
        self.config, self.unet, self.tokens = config, unet, tokens
        self.tasks: dict[str, dict[str, Tensor]] = {}
        self.folded: list[str] = []
        self._control = Control(tau=config.tau_start)
        self._flags = freeze(frozen)
        kinds: dict[tuple, dict[str, nn.Linear]] = {}
        for name, slot in slots.items():
            kinds.setdefault((slot.weight.shape[1], slot.weight.dtype, slot.weight.device), {})[name] = slot
        self.stacks = nn.ModuleList()
        try:
            for i, group in enumerate(kinds.values()):
                self.stacks.append(Stack(group, config, self._control, i))
        except BaseException:
            for stack in self.stacks:
                stack.release()
            unfreeze(self._flags)
            raise
        self._hook = TextHook(unet, self.stacks)
        if hasattr(unet, "save_pretrained"):
            unet.save_pretrained = self._guarded(unet.save_pretrained)
        self.reset_(derive_seed(config.seed, "factors", 0))

    # what is in force in a forward

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The folded model without the unfolded residual, until the block ends."""
        with disabled(self._control):
            yield

    @property
    def noise(self) -> GateNoise | None:
        """The noise of the mask. Set it before each training step; None, the default, is the deterministic gate.

        It has no effect where `config.samples` is false.
        """
        return self._control.noise

    @noise.setter
    def noise(self, noise: GateNoise | None) -> None:
        self._control.noise = noise

    @property
    def tau(self) -> float | Tensor:
        """The temperature of the slope, a positive float or a 0-dim tensor; it starts at config.tau_start."""
        return self._control.tau

    @tau.setter
    def tau(self, tau: float | Tensor) -> None:
        self._control.tau = tau

    def arguments(self) -> list[dict]:
        """For each stack, the keyword arguments of `masked_linear` in force but x, and "names", its projections in order."""
        return [stack.arguments() for stack in self._ready()]

    # parameters

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """A, B and what the mask trains, such as Q, c and its MLP, of every stack; then those of the tokens under "tokens.".

        These Parameter objects are never replaced, only their data.
        """
        yield from self.stacks.named_parameters(prefix="stacks")
        if self.tokens is not None:
            for name, parameter in self.tokens.named_parameters():
                yield f"tokens.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters; none of them is a parameter of the U-Net."""
        for _, parameter in self.named_parameters():
            yield parameter

    def state_dict(self) -> dict[str, Tensor]:
        """The current task's factors and token, by name. Folded tasks are in `tasks`, not here."""
        state = dict(self.stacks.state_dict(prefix="stacks."))
        if self.tokens is not None:
            state |= {f"tokens.{name}": tensor for name, tensor in self.tokens.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state into the parameters. A missing or unknown entry, or a wrong shape, raises before the stacks change."""
        parts = {"stacks": {}, "tokens": {}}
        for name, tensor in state.items():
            part, _, rest = name.partition(".")
            if part not in parts or (part == "tokens" and self.tokens is None):
                raise InputError(f"unknown entry {name!r} in the state of adapters; attach what it was saved from")
            parts[part][rest] = tensor
        wanted = self.stacks.state_dict()
        shapes = {name: list(tensor.shape) for name, tensor in wanted.items()}
        given = {name: list(tensor.shape) for name, tensor in parts["stacks"].items()}
        wrong = sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name))
        if wrong:
            first = wrong[0]
            raise InputError(
                f"state entry stacks.{first} must be {shapes.get(first, 'absent')}, got {given.get(first, 'none')}; "
                "attach with the config it was saved with"
            )
        self.stacks.load_state_dict(parts["stacks"])
        if self.tokens is not None and (parts["tokens"] or self.tokens.active):
            self.tokens.load_state_dict(parts["tokens"])

    def reset_(self, seed: int) -> None:
        """Fresh factors in place, with A·B = 0; the same seed gives the same factors on every device."""
        generator = torch.Generator().manual_seed(seed)
        for stack in self.stacks:
            stack.reset_(generator)

    # measures

    def penalties(self) -> tuple[Tensor, Tensor]:
        """(sparsity, forgetting), 0-dim and differentiable: a mean over the entries of all stacks, and a sum over them."""
        return self._penalties({})

    @contextlib.contextmanager
    def penalised(self) -> Iterator[Callable[[], tuple[Tensor, Tensor]]]:
        """Yields `penalties` for a block with a forward of the U-Net, whose operator calls then compute the penalties too.

        Mask and residual are made once in the forward and once in the backward, for the output and the penalties together.
        The penalties are those of the first forward in the block. A stack that no forward has used is computed as by
        `Adapters.penalties`.
        """
        before, self._control.penalties = self._control.penalties, {}
        found = self._control.penalties
        try:
            yield lambda: self._penalties(found)
        finally:
            self._control.penalties = before

    def _penalties(self, found: Mapping[Stack, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        both = [found[stack] if stack in found else stack.penalties() for stack in self._ready()]
        return self._mean([sparsity for sparsity, _ in both]), sum(forgetting.to(both[0][1]) for _, forgetting in both)

    def density(self) -> Tensor:
        """The share of open entries of the deterministic gate over all stacks, 0-dim float64; 1 without a mask.

        A soft mask is nowhere closed, and has the mean of its entries instead.
        """
        return self._mean([stack.density() for stack in self._ready()])

    def _mean(self, values: list[Tensor]) -> Tensor:
        """The mean over stacks, weighted by their entries."""
        entries = [stack.weight.numel() for stack in self.stacks]
        weighted = sum(value.to(values[0]) * count for value, count in zip(values, entries, strict=True))
        return weighted / sum(entries)

    def get_delta_weight(self, name: str) -> Tensor:
        """M ⊙ AB [n, k] of the projection with this module name, by the deterministic gate, in fp32 (fp64 for fp64)."""
        for stack in self._ready():
            if name in stack.names:
                return stack.delta(stack.names.index(name))
        known = [known for stack in self.stacks for known in stack.names]
        raise InputError(f"there is no projection {name!r}; there are {len(known)}, such as {known[0]!r}")

    # from task to task

    def fold_(self, task: str | None = None) -> dict[str, Tensor]:
        """End a task: W += M ⊙ (A B) by the deterministic gate in every stack, fold the active token, and start fresh factors.

        `task` is its name (default: "task-1", "task-2", …). Returns the token's embeddings, or {} without an active token.
        Raises InputError for a task folded before, RuntimeError for factors folded already or not finite.
        """
        stacks = self._ready(thorough=True)
        if task is None:
            if self.folded and not any(stack.unfolded for stack in stacks):
                raise RuntimeError(f"the factors were folded already, as {self.folded[-1]!r}; train before folding again")
            task = f"task-{len(self.tasks) + 1}"
        self._check_new(task)
        parts = [stack.snapshot() for stack in stacks]
        factors = {f"stacks.{i}.{name}": tensor for i, part in enumerate(parts) for name, tensor in part.items()}
        for name, tensor in factors.items():
            if not tensor.isfinite().all():
                raise RuntimeError(f"{name} is not finite, nothing was folded; load an earlier state or call reset_(seed)")
        embeddings = self.tokens.fold_() if self.tokens is not None and self.tokens.active else {}
        for stack, part in zip(stacks, parts, strict=True):
            stack.fold_(task, part)
        self.tasks[task] = factors
        self.folded.append(task)
        self.reset_(derive_seed(self.config.seed, "factors", len(self.tasks)))
        return embeddings

    def add_task(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Register the stored factors of a task, and start fresh ones as after a fold. `rewind` puts them into the weights.

        Raises InputError for a name that is taken, or factors that do not fit these stacks.
        """
        stacks = self._ready()
        self._check_new(name)
        unknown = sorted(set(tensors) - {f"stacks.{i}.{factor}" for i in range(len(stacks)) for factor in FACTORS})
        if unknown:
            raise InputError(f"unknown factor {unknown[0]!r} in task {name!r}; names are stacks.I.a, .b, .p, .q, .gate_bias")
        for i, stack in enumerate(stacks):
            (n, k), groups = stack.weight.shape, len(stack.sizes)
            part = {factor: tensors.get(f"stacks.{i}.{factor}") for factor in FACTORS}
            shapes = {factor: None if tensor is None else list(tensor.shape) for factor, tensor in part.items()}
            r, s = (shapes[factor][-1] if shapes[factor] else None for factor in ("a", "p"))
            wanted = {"a": [n, r], "b": [groups, r, k], "p": [n, s], "q": [groups, s, k], "gate_bias": [groups]}
            if all(shapes[factor] is None for factor in ("p", "q", "gate_bias")):
                wanted |= {"p": None, "q": None, "gate_bias": None}
            for factor, shape in wanted.items():
                if shapes[factor] != shape:
                    got = shapes[factor]
                    raise InputError(f"stacks.{i}.{factor} of task {name!r} must be {shape}, got {got}; attach its model")
        self.tasks[name] = {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}
        self.reset_(derive_seed(self.config.seed, "factors", len(self.tasks)))

    def rewind(self, tasks: Iterable[str]) -> None:
        """Rebuild the weights from W_0 and the stored factors of these tasks, in this order; the current factors stay.

        The bits are those of having folded just these tasks. Raises InputError for an unknown or repeated name.
        """
        names = list(tasks)
        unknown = [name for name in names if name not in self.tasks]
        if unknown or len(set(names)) < len(names):
            raise InputError(f"rewind takes each of {list(self.tasks)} at most once, got {names}")
        for i, stack in enumerate(self._live()):
            keys = {factor: f"stacks.{i}.{factor}" for factor in FACTORS}
            stack.rewind(
                (name, {factor: self.tasks[name][key] for factor, key in keys.items() if key in self.tasks[name]})
                for name in names
            )
        self.folded = names

    def detach(self) -> None:
        """Make the U-Net plain again. Folded tasks stay in weights and tokens; unfolded factors are dropped.

        Without a fold the weights have the bits that they had before attach. Every parameter of the model gets back the
        requires_grad that it had then. The adapters cannot be used afterwards.
        """
        if self.unet is None:
            return
        self._hook.remove()
        self.unet.__dict__.pop("save_pretrained", None)
        for stack in self.stacks:
            stack.release()
        if self.tokens is not None:
            self.tokens.detach()
        unfreeze(self._flags)
        self.unet = None

    def _check_new(self, task: str) -> None:
        if task in self.tasks:
            raise InputError(f"task {task!r} is folded or stored already, a second time would count twice; use another name")

    def _live(self) -> nn.ModuleList:
        if self.unet is None:
            raise RuntimeError("these adapters are detached; call attach again")
        return self.stacks

    def _ready(self, thorough: bool = False) -> nn.ModuleList:
        """The stacks, with the U-Net's weights tied to them."""
        stacks = self._live()
        for stack in stacks:
            stack.refresh(thorough)
        return stacks

    def _guarded(self, save):
        """save_pretrained that raises while factors are unfolded, since it would not save them."""

        @functools.wraps(save)
        def save_pretrained(*args, **kwargs):
            if any(stack.unfolded for stack in self._ready(thorough=True)):
                raise RuntimeError(
                    "unfolded factors are no part of the saved weights; call adapters.fold_() to keep them, "
                    "adapters.reset_(seed) or adapters.detach() to drop them"
                )
            return save(*args, **kwargs)

        return save_pretrained
