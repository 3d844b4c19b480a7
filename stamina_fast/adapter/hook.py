"""At the start of a U-Net's forward, one operator call computes all projections of the text states."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from ..pipeline.projections import STATES, check_offload, check_processors, text_projection
from .stack import SEEN


class TextHook:
    """Projects the text states of a forward, and hands them on with the outputs of all projections attached.

    It runs before the U-Net's forward. Some U-Nets first send the text states through a module of their own
    (`text_projection`): there it runs after that module.
    """

    def __init__(self, unet: nn.Module, stacks: nn.ModuleList):
        self.stacks = stacks
        self.attentions = [module for module in unet.modules() if hasattr(module, "processor")]
        # the place of the states among positional arguments, self not counted
        self.position = list(inspect.signature(type(unet).forward).parameters).index(STATES) - 1
        self.handles = [unet.register_forward_pre_hook(self.before, with_kwargs=True)]
        inner = text_projection(unet)
        self.after_inner = inner is not None
        if self.after_inner:
            self.handles.append(inner.register_forward_hook(lambda module, args, states: self.hand_on(states)))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def before(self, unet: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Check that nothing in this U-Net would drop the residuals; return the arguments of its forward."""
        check_processors(self.attentions)
        compiling = torch.compiler.is_compiling()
        if not compiling:
            check_offload(unet)
        for stack in self.stacks:
            # a compiled forward cannot look at addresses; the projections lower the flag when they are moved or loaded
            if not (compiling and stack.tied):
                stack.refresh()
        if not self.after_inner:
            if STATES in kwargs:
                kwargs = kwargs | {STATES: self.hand_on(kwargs[STATES])}
            elif len(args) > self.position:
                args = (*args[: self.position], self.hand_on(args[self.position]), *args[self.position + 1 :])
        return args, kwargs

    def hand_on(self, states: Tensor | tuple | list | None):
        """A view of the text states that belongs to this forward and carries the outputs of all projections.

        Two forwards before one backward each find their own outputs, and so does a block that gradient checkpointing
        computes again. In a tuple the text comes first, before image prompts, and only the text is projected here.
        """
        if isinstance(states, tuple | list):
            return type(states)([self.hand_on(states[0]), *states[1:]]) if states else states
        if states is None:
            return None
        own = states.view_as(states)
        fits = [s for s in self.stacks if s.weight.shape[1] == states.shape[-1] and s.weight.device == states.device]
        setattr(own, SEEN, {stack: stack.project_all(states) for stack in fits})
        return own
