"""One fp32 vector for everything that trains, so that clipping, checking and AdamW are a few launches whatever the model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# floats; views start at multiples of 256 bytes, so that no kernel sees an odd address
ALIGN = 64


class Flat:
    """Parameters as views of `values`, their gradients as views of `grads`, both fp32 [size]; `names` in the order laid out.

    The gap behind a parameter holds zeros and stays so: its gradient is always zero.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]):
        named = list(named)
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        starts, end = [], 0
        for p in self.parameters:
            starts.append(end)
            end += -(-p.numel() // ALIGN) * ALIGN
        device = self.parameters[0].device if named else None
        self.values = nn.Parameter(torch.zeros(end, device=device))
        self.grads = torch.zeros(end, device=device)
        self.values.grad = self.grads
        self.views = [self.values.data[i : i + p.numel()].view_as(p) for i, p in zip(starts, self.parameters, strict=True)]
        self.grad_views = [self.grads[i : i + p.numel()].view_as(p) for i, p in zip(starts, self.parameters, strict=True)]
        self.tie_()

    def tie_(self) -> None:
        """Make every parameter a view again, keeping its present value; nothing happens to those that still are."""
        for p, view, grad in zip(self.parameters, self.views, self.grad_views, strict=True):
            if p.data_ptr() != view.data_ptr():
                view.copy_(p.detach())
                p.data = view
            p.grad = grad

    def non_finite(self) -> list[str]:
        """Names of the parameters that hold a NaN or an infinity (waits for the device)."""
        return [name for name, p in zip(self.names, self.parameters, strict=True) if not torch.isfinite(p.detach()).all()]

    def __len__(self) -> int:
        return self.values.numel()


class Optimizer:
    """One fused AdamW over flat vectors, each with its own learning rate; the rates and the moments live on the device.

    The moments exist from the start and are written in place for good, so that a captured step finds them where they were.
    """

    # nothing that changes from step to step is kept by the host
    capturable = True

    def __init__(self, rates: list[tuple[Flat, float]], betas: tuple[float, float], weight_decay: float):
        rates = [(flat, rate) for flat, rate in rates if len(flat)]
        self.flats, self.peaks = [flat for flat, _ in rates], [rate for _, rate in rates]
        self.names = [name for flat in self.flats for name in flat.names]
        self.grads = [grad for flat in self.flats for grad in flat.grad_views]
        self.values = [view for flat in self.flats for view in flat.views]
        self._start(betas, weight_decay)
        self.reset_()
        self.set_rate_(1.0)

    def _start(self, betas: tuple[float, float], weight_decay: float) -> None:
        device = self.flats[0].values.device
        self.rates = [torch.tensor(rate, device=device) for rate in self.peaks]
        groups = [{"params": [flat.values], "lr": lr} for flat, lr in zip(self.flats, self.rates, strict=True)]
        # on a GPU torch wants to be told that the step may be captured; the arithmetic is the same
        capturable = device.type == "cuda"
        self.adamw = torch.optim.AdamW(groups, betas=betas, weight_decay=weight_decay, fused=True, capturable=capturable)
        # and else warns at the first step that is not, such as those before a capture
        self.adamw._warned_capturable_if_run_uncaptured = True
        # torch makes the moments in the first step: here one that moves nothing
        self.set_rate_(0.0)
        self.adamw.step()

    def reset_(self) -> None:
        """Forget the moments and the step count, in place."""
        for moment in self.moments().values():
            moment.zero_()
        for flat in self.flats:
            flat.tie_()
            flat.grads.zero_()

    def moments(self) -> dict[str, Tensor]:
        """What the optimizer remembers from step to step, "I.KEY" for its I-th vector: the count of steps, and the moments."""
        states = [self.adamw.state[flat.values] for flat in self.flats]
        return {f"{i}.{key}": value for i, state in enumerate(states) for key, value in sorted(state.items())}

    def restore_(self, moments: dict[str, Tensor]) -> None:
        """Put back what `moments` returned in a step of the same task."""
        for name, moment in self.moments().items():
            moment.copy_(moments[name])

    def tensors(self) -> list[Tensor]:
        """What `step_` reads and writes beside parameters and gradients."""
        return [*self.moments().values(), *self.rates]

    def set_rate_(self, factor: float) -> None:
        for rate, peak in zip(self.rates, self.peaks, strict=True):
            rate.fill_(peak * factor)

    def norms(self) -> Tensor:
        """L2 norm of the gradient of each parameter, fp32 [len(names)], in the order of `names`."""
        return torch.stack(torch._foreach_norm(self.grads))

    def value_norms(self) -> Tensor:
        """L2 norm of each parameter, fp32 [len(names)], in the order of `names`."""
        return torch.stack(torch._foreach_norm(self.values))

    def scale_grads_(self, factor: Tensor) -> None:
        for flat in self.flats:
            flat.grads.mul_(factor)

    def zero_grads_(self) -> None:
        for flat in self.flats:
            flat.grads.zero_()

    def step_(self) -> None:
        self.adamw.step()
