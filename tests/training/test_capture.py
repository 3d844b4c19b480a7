"""The captured step, with a stand-in for CUDA graphs on a CPU: the bits of step by step, and whatever it froze is caught."""

import contextlib
import logging

import pytest
import tinypipes
import torch
from replay import Replay
from tinyruns import assert_same, run, tensors, write_concepts

from stamina_fast.errors import InputError
from stamina_fast.ops.noise import GateNoise
from stamina_fast.training import capture, loop
from stamina_fast.training.capture import WARM, Captured, recorder
from stamina_fast.training.flat import Optimizer
from stamina_fast.training.step import Step

# everything that a step takes from outside changes from step to step, and the second task is another one
MOVING = {"steps": 6, "lr_schedule": "cosine", "warmup": 3, "tau_end": 0.4, "weight_decay": 0.01}
VARIANTS = {
    "stamina": {"steps": 16},
    "c-stamina": {"method": "c-stamina", "sparsity_weight": 0.1, "steps": 16},
    "sparse": {"sparsity_weight": 0.1},
    "c-lora": {"method": "c-lora"},
    "fixed": {"method": "fixed-gate"},
    "random": {"method": "random-mask"},
    "accumulated": {"accumulate": 2},
    "checkpointed": {"gradient_checkpointing": True},
}
CASES = [("sd15", variant) for variant in VARIANTS] + [("sdxl", name) for name in ("c-stamina", "accumulated", "checkpointed")]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return write_concepts(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture
def recorded(monkeypatch):
    """A function that trains with the stand-in: (run, its recorder, how often the step was recorded)."""
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
    # one recording for both tasks; a second one where the folded past becomes part of the step
    assert recordings == (2 if variant in ("sparse", "c-stamina", "c-lora") else 1)
    # what is new in the second recording is run once before it
    assert stand_in.warmed == WARM + recordings - 1
    assert stand_in.replayed == 2 * options["steps"] - stand_in.warmed


def test_the_folded_past_is_recorded_once_for_all_later_tasks(three, tmp_path, recorded):
    whole = run(tinypipes.sd21(), three, tmp_path / "plain", steps=6, method="c-stamina")
    made, stand_in, recordings = recorded(tinypipes.sd21(), three, tmp_path / "captured", steps=6, method="c-stamina")
    assert_same_run(made, whole)
    assert (recordings, stand_in.warmed, stand_in.replayed) == (2, WARM + 1, 3 * 6 - WARM - 1)


def rate_of_python(patch):
    """The learning rate as a number that the optimizer is told, as schedulers do."""
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
    """A row of the losses counted by Python."""
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
    """The stand-in has teeth: each of these steps is right step by step and wrong when replayed."""
    options = MOVING | {"method": "c-stamina"}
    plant(monkeypatch)
    whole = run(tinypipes.sd15(), two, tmp_path / "plain", **options)
    with pytest.raises(AssertionError):
        assert_same_run(recorded(tinypipes.sd15(), two, tmp_path / "captured", **options)[0], whole)


def test_what_cannot_be_captured_is_said_once_and_goes_on(two, tmp_path, monkeypatch, recorded, caplog):
    def predict(self, noisy, *others):
        # an odd module that looks at what it gets
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
    """The same pictures, noise and masks: only the order of sums differs. Both penalties count once."""
    options = MOVING | {"method": "c-stamina", "batch": 4, "steps": 4}
    whole, parts = (run(tinypipes.sd15(), two, tmp_path / str(n), accumulate=n, **options) for n in (1, 4))
    one, two_ = (torch.tensor([[list(row.values())[1:6] for row in task] for task in losses(made)]) for made in (whole, parts))
    torch.testing.assert_close(two_, one, rtol=1e-3, atol=1e-5)
