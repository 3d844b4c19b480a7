"""Tiny runs for the trainer's tests: drawn pictures, few steps, narrow factors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stamina_fast.io.images import write_image
from stamina_fast.training import train

NAMES = ("cat", "cup", "rocket", "face")
SMALL = {
    "steps": 4, "batch": 2, "crops": 2, "read_every": 2, "rank": 2, "gate_rank": 2, "code_width": 4, "mlp_width": 8,
    "token_width": 8, "token_input_width": 4, "density": 0.5, "learning_rate": 1e-2, "progress": False,
}
# options with which a method's own work is small
CHEAP = {"ewc": {"fisher_batches": 2}, "replay": {"replay_count": 1, "replay_steps": 2}}


def write_concepts(folder: Path, count: int) -> Path:
    """`count` concepts of two pictures: coloured stripes that differ between concepts."""
    for i, name in enumerate(NAMES[:count]):
        (folder / name).mkdir(parents=True)
        for j in range(2):
            draw = torch.Generator().manual_seed(10 * i + j)
            wave = torch.sin(torch.arange(40)[None] * (0.2 + 0.3 * i) + j)[None] * torch.ones(3, 36, 1)
            write_image(folder / name / f"{j}.png", (wave * torch.rand(3, 1, 1, generator=draw)).clamp(-1, 1))
    return folder


def run(pipeline, folder: Path, output: Path, **changes):
    return train(pipeline, folder, output, **(SMALL | changes))


class Killed(BaseException):
    """Stands for a kill: nothing in the trainer may catch it."""


def run_until(count: int, *args, **changes) -> None:
    """`run`, killed when it has made `count` steps and is about to make another."""
    left = iter(range(count))

    def kill(step, task, i):
        if next(left, None) is None:
            raise Killed

    with pytest.raises(Killed):
        run(*args, on_step=kill, **changes)


def size_of(step) -> tuple[int, int]:
    """Height and width, in pixels, of the pictures in the batch of a step."""
    return tuple(step.buffers.frames[0, 4:].int().tolist())


def stacked(factors, sizes) -> torch.Tensor:
    """A B [N, k] in float64, from the stored factors of one stack without a mask."""
    a, b = factors["stacks.0.a"].double(), factors["stacks.0.b"].double()
    return torch.cat([rows @ group for rows, group in zip(a.split(sizes), b, strict=True)])


def tensors(pipeline) -> dict[str, torch.Tensor]:
    """A copy of every tensor of a pipeline, by part and name."""
    return {
        f"{part}.{name}": tensor.detach().clone()
        for part, module in pipeline.components.items() if isinstance(module, torch.nn.Module)
        for name, tensor in module.state_dict().items()
    }


def assert_same(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different


def is_text_kv(name: str) -> bool:
    return name.startswith("unet.") and name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))


def is_embedding(name: str) -> bool:
    return name.endswith("token_embedding.weight")
