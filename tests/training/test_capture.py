"""The captured step, with a stand-in for CUDA graphs on a CPU: it has the bits of uncaptured steps."""

import contextlib
import logging

import pytest
import tinypipes
import torch
from replay import Replay
from tinyruns import CHEAP, assert_same, run, tensors, write_concepts

from stamina_fast.errors import InputError
from stamina_fast.ops.noise import GateNoise
from stamina_fast.training import capture, loop
from stamina_fast.training.capture import WARM, Captured, recorder
from stamina_fast.training.flat import Optimizer
from stamina_fast.training.methods import METHODS, Strategy
from stamina_fast.training.step import Step

# options with which everything that a step reads from outside changes from step to step
MOVING = {"steps": 6, "lr_schedule": "cosine", "warmup": 3, "tau_end": 0.4, "weight_decay": 0.01}
VARIANTS = {
    "stamina": {"steps": 16},
    "c-stamina": {"method": "c-stamina", "sparsity_weight": 0.1, "steps": 16},
    "sparse": {"sparsity_weight": 0.1},
    "c-lora": {"method": "c-lora"},
    "fixed": {"method": "fixed-gate"},
    "random": {"method": "random-mask"},
    "accumulated": {"accumulate": 2},
    "recomputed": {"gradient_checkpointing": True},
    **{method: {"method": method, **CHEAP.get(method, {})} for method in METHODS if METHODS[method].strategy is not Strategy},
    "dense": {"method": "dense-logits"},
    "soft": {"method": "soft-mask"},
    "l0": {"method": "hard-concrete", "sparsity_weight": 0.1},
    "top": {"method": "top-k"},
    "two-four": {"method": "two-four"},
    "full": {"method": "custom-diffusion"},
}
CASES = [("sd15", variant) for variant in VARIANTS] + [("sdxl", name) for name in ("c-stamina", "accumulated", "recomputed")]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return write_concepts(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture
def recorded(monkeypatch):
    """A function that trains with the stand-in and returns (run, its recorder, how often the step was recorded)."""
    made = []
    monkeypatch.setattr(loop, "Captured", lambda *args: made.append(Captured(*args)) or made[-1])

    def train(*args, **options):
        stand_in = Replay()
        with monkeypatch.context() as patch:
            patch.setattr(loop, "recorder", lambda wanted, device: stand_in)
            result = run(*args, **options)
        return result, stand_in, made[-1].recordings

    return train


def losses(made):
    return [[{k: v for k, v in row.items() if k != "seconds"} for row in made.load_task(t["name"]).curve] for t in made.tasks()]


def assert_same_run(one, two):
    assert losses(one) == losses(two)
    assert [task["sha256"] for task in one.tasks()] == [task["sha256"] for task in two.tasks()]


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_captured_steps_of_two_tasks_are_those_step_by_step(kind, variant, two, tmp_path, recorded):
    options = MOVING | VARIANTS[variant]
    plain, pipeline = tinypipes.KINDS[kind](), tinypipes.KINDS[kind]()
    whole = run(plain, two, tmp_path / "plain", **options)
    made, stand_in, recordings = recorded(pipeline, two, tmp_path / "captured", **options)
    assert_same_run(made, whole)
    assert_same(tensors(pipeline), tensors(plain))
    # one recording serves both tasks, unless the folded past becomes part of the step
    assert recordings == (2 if variant in ("sparse", "c-stamina", "c-lora", "l0") else 1)
    # before a second recording the step runs once uncaptured
    assert stand_in.warmed == WARM + recordings - 1
    assert stand_in.replayed == 2 * options["steps"] - stand_in.warmed


def test_the_folded_past_is_recorded_once_for_all_later_tasks(three, tmp_path, recorded):
    whole = run(tinypipes.sd21(), three, tmp_path / "plain", steps=6, method="c-stamina")
    made, stand_in, recordings = recorded(tinypipes.sd21(), three, tmp_path / "captured", steps=6, method="c-stamina")
    assert_same_run(made, whole)
    assert (recordings, stand_in.warmed, stand_in.replayed) == (2, WARM + 1, 3 * 6 - WARM - 1)


def rate_of_python(patch):
    """The learning rate is a number of Python, as torch's schedulers set it."""
    def set_rate_(self, factor):
        for group, peak in zip(self.adamw.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor

    patch.setattr(Optimizer, "set_rate_", set_rate_)


def temperature_of_python(patch):
    call = Step.__call__

    def step(self):
        self.adapters.tau = float(self.buffers.tau.detach().numpy())
        call(self)

    patch.setattr(Step, "__call__", step)


def noise_of_python(patch):
    call = Step.__call__

    def step(self):
        self.adapters.noise = GateNoise(*(int(x.numpy()) for x in (self.buffers.seed, self.buffers.clock)))
        call(self)

    patch.setattr(Step, "__call__", step)


def clock_of_python(patch):
    """Python indexes the row of the losses."""
    call = Step.__call__

    def step(self):
        here = self.losses[int(self.buffers.clock.numpy())]
        call(self)
        here.add_(1)

    patch.setattr(Step, "__call__", step)


def table_that_moves(patch):
    patch.setattr(capture.Tables, "held", lambda self: contextlib.nullcontext())
    patch.setattr(Step, "addresses", lambda self: [])


def past_that_appears(patch):
    patch.setattr(Step, "addresses", lambda self: [])


FROZEN = [rate_of_python, temperature_of_python, noise_of_python, clock_of_python, table_that_moves, past_that_appears]


@pytest.mark.parametrize("plant", FROZEN)
def test_a_frozen_value_is_caught(plant, two, tmp_path, monkeypatch, recorded):
    """The stand-in can fail: each of these steps is right uncaptured and wrong when replayed."""
    options = MOVING | {"method": "c-stamina"}
    plant(monkeypatch)
    whole = run(tinypipes.sd15(), two, tmp_path / "plain", **options)
    with pytest.raises(AssertionError):
        assert_same_run(recorded(tinypipes.sd15(), two, tmp_path / "captured", **options)[0], whole)


def test_what_cannot_be_captured_is_said_once_and_goes_on(two, tmp_path, monkeypatch, recorded, caplog):
    def predict(self, noisy, *others):
        # a module that reads its input
        return original(self, noisy * (1 if noisy.sum().item() < 1e9 else 0), *others)

    original = loop.Backbone.predict
    monkeypatch.setattr(loop.Backbone, "predict", predict)
    whole = run(tinypipes.sd15(), two, tmp_path / "plain", **MOVING)
    with caplog.at_level(logging.WARNING, "stamina_fast"):
        made, stand_in, recordings = recorded(tinypipes.sd15(), two, tmp_path / "captured", **MOVING)
    assert_same_run(made, whole)
    assert (recordings, stand_in.replayed) == (0, 0)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "stamina_fast"]
    assert "cannot be captured" in line
    assert "reads the device" in line
    assert "\n" not in line


def test_capture_is_for_gpus(two, tmp_path):
    assert recorder(None, torch.device("cpu")) is None
    assert recorder(False, torch.device("cuda")) is None
    with pytest.raises(InputError, match="capture needs a CUDA device"):
        run(tinypipes.sd15(), two, tmp_path / "run", capture=True)
    assert not (tmp_path / "run").exists()


def test_parts_of_a_batch_are_the_batch(two, tmp_path):
    """Pictures, noise and masks are the same and penalties count once: only the order of sums differs."""
    options = MOVING | {"method": "c-stamina", "batch": 4, "steps": 4}
    whole, parts = (run(tinypipes.sd15(), two, tmp_path / str(n), accumulate=n, **options) for n in (1, 4))
    one, two_ = (torch.tensor([[list(row.values())[1:6] for row in task] for task in losses(made)]) for made in (whole, parts))
    torch.testing.assert_close(two_, one, rtol=1e-3, atol=1e-5)
