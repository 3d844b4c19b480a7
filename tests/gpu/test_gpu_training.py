"""Training on a real GPU: the fused steps against the reference's, and a fold that leaves a plain model."""

import pytest
import torch

import stamina_fast as sf

pytest.importorskip("diffusers", reason="training needs diffusers, which is not installed")
pytest.importorskip("pydantic", reason="training needs pydantic, which is not installed")
pytest.importorskip("PIL", reason="training needs pillow, which is not installed")
pytest.importorskip("rich", reason="training needs rich, which is not installed")
import tinypipes
from tinyruns import run, write_concepts

from stamina_fast.training import loop
from stamina_fast.training.capture import WARM, Captured

OPTIONS = {"steps": 16, "sparsity_weight": 0.1, "forgetting_weight": 100.0, "device": "cuda"}


@pytest.fixture(autouse=True)
def repeatable(monkeypatch):
    """Make cuDNN deterministic, so that only our kernels differ between the two runs."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def trained(backend, folder, output, dtype, monkeypatch, **options):
    """(the losses [tasks, steps], what ran) of two tasks of 16 steps."""
    monkeypatch.setenv("STAMINA_BACKEND", backend)
    before = sf.launches()
    made = run(tinypipes.sd15().to("cuda", dtype), folder, output, **{**OPTIONS, "capture": False, **options})
    ran = {name: count - before.get(name, 0) for name, count in sf.launches().items() if count > before.get(name, 0)}
    return torch.tensor([[row["loss"] for row in made.load_task(task["name"]).curve] for task in made.tasks()]), ran


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_32_steps_are_those_of_the_reference(dtype, limit, tmp_path, monkeypatch):
    available, reason = sf.backends()["triton"]
    if not available:
        pytest.skip(reason)
    folder = write_concepts(tmp_path / "two", 2)
    wanted, _ = trained("reference", folder, tmp_path / "reference", dtype, monkeypatch)
    losses, ran = trained("triton", folder, tmp_path / "triton", dtype, monkeypatch)
    assert ran["masked_linear/triton"] >= 32
    assert ran["fold_/triton"] == 2
    assert not {"masked_linear/reference", "masked_linear_backward/reference", "fold_/reference"} & ran.keys()
    assert wanted.shape == (2, 16)
    assert (losses - wanted).abs().max() <= limit


CHANGES = {"plain": {}, "parts": {"accumulate": 2}, "again": {"gradient_checkpointing": True}}
CHANGES |= {method: {"method": method} for method in ("dense-logits", "hard-concrete", "top-k", "two-four")}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_32_captured_steps_are_those_step_by_step(change, tmp_path, monkeypatch, caplog):
    """A run records one graph, and a second once there is a folded past. Later tasks replay them."""
    made = []
    monkeypatch.setattr(loop, "Captured", lambda *args: made.append(Captured(*args)) or made[-1])
    folder = write_concepts(tmp_path / "two", 2)
    backend = "triton" if sf.backends()["triton"][0] else "reference"
    # the fused kernels of attention sum gradients in no fixed order
    options = change | {"attention": "math"}
    wanted, _ = trained(backend, folder, tmp_path / "plain", torch.float32, monkeypatch, **options)
    losses, ran = trained(backend, folder, tmp_path / "captured", torch.float32, monkeypatch, capture=True, **options)
    assert not [record.getMessage() for record in caplog.records if record.name == "stamina_fast"]
    assert made[-1].recordings == 2
    # Python runs only in the warm-ups, one of them before the second recording, and in the recordings
    assert ran[f"masked_linear/{backend}"] == (WARM + 1 + 2) * change.get("accumulate", 1)
    torch.testing.assert_close(losses, wanted, rtol=0, atol=0)
