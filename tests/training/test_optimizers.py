"""Optimizers of other libraries have their own bits over flat vectors, also after a reset and a resume."""

import logging
import sys

import pytest
import tinypipes
import torch
from replay import Replay
from tinyruns import assert_same, run, run_until, tensors, write_concepts
from torch import nn

from stamina_fast.errors import InputError
from stamina_fast.training import TrainOptions, loop
from stamina_fast.training.flat import Flat
from stamina_fast.training.optimizers import LIBRARIES, class_of, make_optimizer

# adamw8bit keeps small vectors in 32 bits: this rank makes the factors large enough
OPTIONS = {"steps": 6, "method": "c-stamina", "lr_schedule": "cosine", "weight_decay": 0.01, "rank": 16, "gate_rank": 8}


@pytest.fixture(scope="module", params=LIBRARIES)
def name(request):
    pytest.importorskip(LIBRARIES[request.param][0].partition(".")[0])
    return request.param


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return write_concepts(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def whole(name, two, tmp_path_factory):
    """An uninterrupted run, and the tensors of its pipeline."""
    pipeline = tinypipes.sd15()
    return run(pipeline, two, tmp_path_factory.mktemp("whole") / "run", optimizer=name, **OPTIONS), tensors(pipeline)


def shapes(optimizer):
    return {key: (moment.dtype, tuple(moment.shape)) for key, moment in optimizer.moments().items()}


def test_steps_have_the_bits_of_the_library(name):
    """Two vectors with their own rates, over two tasks: the library run by itself gives the same bits."""
    draw = torch.Generator().manual_seed(0)
    sizes = [(64, 8000), (64, 128)]
    flats = [Flat([(f"p{n}", nn.Parameter(torch.randn(n, generator=draw))) for n in parameters]) for parameters in sizes]
    rates = (0.5, 2.0)
    optimizer = make_optimizer(name, list(zip(flats, rates, strict=True)), (0.8, 0.9), 0.01)
    for _ in range(2):
        optimizer.reset_()
        twins = [nn.Parameter(flat.values.detach().clone()) for flat in flats]
        options = LIBRARIES[name][3] | {"betas": (0.8, 0.9), "weight_decay": 0.01}
        alone = [class_of(name)([twin], lr=rate, **options) for twin, rate in zip(twins, rates, strict=True)]
        for step in range(5):
            optimizer.set_rate_(1 - step / 10)
            for flat, twin, rate, of_twin in zip(flats, twins, rates, alone, strict=True):
                flat.grads.copy_(torch.randn(len(flat), generator=draw))
                twin.grad = flat.grads.clone()
                of_twin.param_groups[0]["lr"] = rate * (1 - step / 10)
                of_twin.step()
            optimizer.step_()
        for flat, twin in zip(flats, twins, strict=True):
            assert torch.equal(flat.values, twin)


def test_what_is_remembered_goes_on_elsewhere_and_is_forgotten_by_a_reset(name):
    def made():
        flat = Flat([("p", nn.Parameter(torch.randn(5000, generator=torch.Generator().manual_seed(0))))])
        return flat, make_optimizer(name, [(flat, 1.0)], (0.9, 0.99), 0.0)

    def steps(flat, optimizer, seed):
        draw = torch.Generator().manual_seed(seed)
        for _ in range(4):
            flat.grads.copy_(torch.randn(len(flat), generator=draw))
            optimizer.step_()

    (one, optimizer), (other, second) = made(), made()
    fresh = {key: moment.clone() for key, moment in optimizer.moments().items()}
    steps(one, optimizer, 1)
    kept, values = {key: moment.clone() for key, moment in optimizer.moments().items()}, one.values.detach().clone()
    assert shapes(optimizer) == shapes(second)
    assert any(not torch.equal(kept[key], fresh[key]) for key in kept)
    second.restore_(kept)
    other.values.data.copy_(values)
    for flat, each in ((one, optimizer), (other, second)):
        steps(flat, each, 2)
    assert torch.equal(one.values, other.values)
    assert not torch.equal(one.values, values)
    # a reset leaves the same as a new optimizer over the same values
    optimizer.reset_()
    third = make_optimizer(name, [(other, 1.0)], (0.9, 0.99), 0.0)
    assert_same(optimizer.moments(), third.moments())


@pytest.mark.parametrize(("at", "left"), [(0, 6), (3, 4)], ids=["between tasks", "within a task"])
def test_a_resumed_run_ends_in_the_same_bits(at, left, name, two, whole, tmp_path):
    """In the second task the resumed run has a new optimizer, and the uninterrupted one had a reset one."""
    run_until(OPTIONS["steps"] + at, tinypipes.sd15(), two, tmp_path / "run", save_every=2, optimizer=name, **OPTIONS)
    steps, pipeline = [], tinypipes.sd15()
    made = run(pipeline, two, tmp_path / "run", resume=True, optimizer=name, on_step=lambda *at: steps.append(at), **OPTIONS)
    assert len(steps) == left
    assert_same(tensors(pipeline), whole[1])
    for task in ("cat", "cup"):
        assert made.load_task(task).curve == whole[0].load_task(task).curve
    with pytest.raises(InputError, match=f"train.optimizer was '{name}', is 'adamw'"):
        run(tinypipes.sd15(), two, tmp_path / "run", resume=True, **OPTIONS)


def test_it_steps_behind_the_captured_rest(name, two, whole, tmp_path, monkeypatch, caplog):
    stand_in, pipeline = Replay(), tinypipes.sd15()
    monkeypatch.setattr(loop, "recorder", lambda wanted, device: stand_in)
    with caplog.at_level(logging.WARNING, "stamina_fast"):
        run(pipeline, two, tmp_path / "run", optimizer=name, **OPTIONS)
    assert_same(tensors(pipeline), whole[1])
    assert stand_in.replayed == 2 * OPTIONS["steps"] - stand_in.warmed > 0
    (line,) = [record.getMessage() for record in caplog.records if record.name == "stamina_fast"]
    assert "its step cannot be captured" in line


@pytest.fixture
def optimizers(monkeypatch):
    """The optimizers that runs make."""
    made = []
    monkeypatch.setattr(loop, "make_optimizer", lambda *args: made.append(make_optimizer(*args)) or made[-1])
    return made


def test_eight_bits_are_eight_bits(two, tmp_path, optimizers):
    pytest.importorskip("bitsandbytes")
    run(tinypipes.sd15(), two, tmp_path / "run", optimizer="adamw8bit", **OPTIONS)
    moments = optimizers[0].moments()
    assert (moments["0.state1"].dtype, moments["0.state2"].dtype) == (torch.uint8, torch.uint8)
    assert moments["0.step"] == OPTIONS["steps"]


def test_prodigy_finds_its_rates(two, tmp_path, optimizers):
    """None is given; it finds one for factors and masks, and another for the token."""
    pytest.importorskip("prodigyopt")
    run(tinypipes.sd15(), two, tmp_path / "run", optimizer="prodigy", steps=40, learning_rate=None)
    assert optimizers[0].peaks == [1.0, 1.0]
    assert [group["d0"] for group in optimizers[0].groups] == [1e-6, 1e-6]
    found = [group["d"] for group in optimizers[0].groups]
    assert min(found) > 1e-5
    assert found[0] != found[1]


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_library_is_one_line_before_anything_is_loaded(name, two, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, LIBRARIES[name][0], None)
    monkeypatch.setattr(loop, "together", lambda: pytest.fail("something was begun"))
    with pytest.raises(InputError, match=rf"'{name}' cannot run here: .*stamina-fast\[{LIBRARIES[name][2]}\]") as caught:
        run(None, two, tmp_path / "run", optimizer=name)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_rates_are_those_of_the_optimizer():
    assert TrainOptions().learning_rates(1) == (4e-4, 5e-2)
    assert TrainOptions(optimizer="adamw8bit", learning_rate=0).learning_rates(1) == (0, 5e-2)
    assert TrainOptions(optimizer="prodigy").learning_rates(1) == (1, 1)
    assert TrainOptions(optimizer="prodigy", token_learning_rate=0.5, scale_lr=True).learning_rates(2) == (2, 1)
    with pytest.raises(InputError, match="optimizer must be one of adamw, adamw8bit, prodigy, got 'lion'"):
        TrainOptions(optimizer="lion")
