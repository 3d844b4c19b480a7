"""null-space: the folded residual does not react to shared words and earlier tokens."""

import numpy as np
import pytest
import tinypipes
import torch
from tinyruns import run

from stamina_fast.errors import InputError
from stamina_fast.training.methods.null_space import basis_of

PROMPTS = ["", "a photo of", "a photo of <cat>", "a photo of <cup>", "a photo of <rocket>"]


def main_directions(states, energy):
    """U [k, m] by a singular value decomposition in float64."""
    _, s, v = np.linalg.svd(states.double().numpy(), full_matrices=False)
    m = next(m for m in range(1, len(s) + 1) if (s[:m] ** 2).sum() >= energy * (s**2).sum())
    return torch.from_numpy(v[:m].T)


def test_basis_holds_the_energy_with_as_few_directions_as_possible():
    states = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -3, 12)
    for energy in (0.5, 0.9, 0.999):
        basis, wanted = basis_of(states, energy), main_directions(states, energy)
        assert basis.shape == wanted.shape
        # the same space, whatever the signs
        torch.testing.assert_close((basis @ basis.T).double(), wanted @ wanted.T, rtol=0, atol=1e-6)
        assert (states @ basis).square().sum() >= energy * states.square().sum()
    assert basis_of(states, 0).shape == (12, 1)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_what_is_folded_is_orthogonal_to_earlier_text(kind, three, tmp_path):
    pipeline = tinypipes.KINDS[kind]()
    made = run(pipeline, three, tmp_path / "run", method="null-space", null_energy=0.9)
    lora = run(tinypipes.KINDS[kind](), three, tmp_path / "lora", method="lora")
    how = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    states = [pipeline.encode_prompt(prompt, **how)[0][0] for prompt in PROMPTS]
    for task, name in enumerate(("cat", "cup", "rocket")):
        basis = main_directions(torch.cat(states[: task + 2]).detach(), 0.9)
        assert 0 < basis.shape[1] < len(basis)
        ours, theirs = ({key: x.double() for key, x in r.load_task(name).factors.items()} for r in (made, lora))
        left = [(f["stacks.0.b"] @ basis).norm() / f["stacks.0.b"].norm() for f in (ours, theirs)]
        assert left[0] < 1e-5 < 0.1 < left[1]
        # it learned something all the same
        assert ours["stacks.0.a"].norm() > 0.5 * theirs["stacks.0.a"].norm() > 0


def test_too_much_energy_is_refused(three, tmp_path):
    with pytest.raises(InputError, match=r"null_energy 1 leaves none of 32 directions to 'c(at|up)'; lower it"):
        run(tinypipes.sd15(), three, tmp_path / "run", method="null-space", null_energy=1.0)
