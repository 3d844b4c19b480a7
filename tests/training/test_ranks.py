"""Ranks exchange lines and average tensors, and a rank that stops stops all of them."""

import os
import signal
import time
import types
import unittest.mock
from datetime import timedelta

import pytest
import torch
from processes import SOON, start

from stamina_fast.errors import InputError, StaminaError
from stamina_fast.training import ranks as module
from stamina_fast.training.ranks import LostError, Ranks, digest, rank_here, together


def meet_and_average(rank, count):
    with together(SOON) as ranks:
        assert (ranks.rank, ranks.count, ranks.local) == (rank, count, rank)
        assert ranks.device("cpu") == torch.device("cpu")
        ranks.connect(torch.device("cpu"))
        vector, matrix = torch.arange(100.0) + rank, torch.full((3, 5), float(rank), requires_grad=True)
        ranks.average_([vector, matrix])
        mean = (count - 1) / 2
        assert vector.tolist() == [i + mean for i in range(100)]
        assert matrix.tolist() == [[mean] * 5] * 3
        assert ranks.meet(f"ä{rank}") == [f"ä{i}" for i in range(count)]
        # a line that is too long is truncated
        assert [len(line) for line in ranks.meet("x" * 5000)] == [module.LINE - 1] * count
        # rounded means too have the same bits on all ranks, or the ranks would drift apart
        noise = torch.randn(99_991, generator=torch.Generator().manual_seed(rank))
        ranks.average_([noise])
        ranks.agree(digest([("noise", noise)]), "has other bits")
        assert rank_here() == rank


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_meet_and_average(count, tmp_path):
    assert start(tmp_path, count, meet_and_average, count) == ([0] * count, [""] * count)


def stop_one(rank, which, where, what):
    with together(SOON) as ranks:
        ranks.connect(torch.device("cpu"))
        if rank == which:
            raise what
        if where == "gradients":
            ranks.average_([torch.ones(1000)])
        ranks.meet()


@pytest.mark.parametrize("where", ["gradients", "meeting"])
@pytest.mark.parametrize("which", [0, 2])
def test_what_stops_one_stops_all_with_its_reason(which, where, tmp_path):
    codes, said = start(tmp_path, 3, stop_one, which, where, InputError("a bad\npicture"))
    assert codes == [2, 2, 2]
    assert said == ["stamina-fast: " + ("" if rank == which else f"rank {which}: ") + "a bad picture\n" for rank in range(3)]


def test_a_bug_of_one_is_named_to_the_others(tmp_path):
    codes, said = start(tmp_path, 2, stop_one, 0, "gradients", ZeroDivisionError("a bug"))
    assert codes == [1, 2]
    assert "Traceback" in said[0]
    assert said[1] == "stamina-fast: rank 0: ZeroDivisionError: a bug\n"


def say_otherwise(rank, count):
    with together(SOON) as ranks:
        ranks.agree("one" if rank == 1 else "other", "folded other weights")


@pytest.mark.parametrize("count", [2, 3])
def test_the_odd_one_is_named(count, tmp_path):
    codes, said = start(tmp_path, count, say_otherwise, count)
    assert codes == [2] * count
    assert set(said) == {"stamina-fast: rank 1 folded other weights; rank 0 is the measure\n"}


def vanish(rank, how, where):
    module.PARTING = timedelta(seconds=1)
    with together(timedelta(seconds=3)) as ranks:
        ranks.connect(torch.device("cpu"))
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else time.sleep(10)
        ranks.average_([torch.ones(9)]) if where == "gradients" else ranks.meet()


@pytest.mark.parametrize("where", ["gradients", "meeting"])
@pytest.mark.parametrize("how", ["killed", "stuck"])
def test_who_is_gone_or_stuck_is_not_waited_for(how, where, tmp_path):
    began = time.monotonic()
    codes, said = start(tmp_path, 2, vanish, how, where)
    assert codes == [2, -9 if how == "killed" else 2]
    assert said[0].startswith("stamina-fast: rank 0 lost another process (")
    assert said[0].endswith("go on with --resume\n")
    assert said[0].count("\n") == 1
    assert time.monotonic() - began < 60


def test_one_process_is_left_alone(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for count in (None, "1"):
        if count:
            monkeypatch.setenv("WORLD_SIZE", count)
        with together() as ranks:
            assert not torch.distributed.is_initialized()
            assert (ranks.rank, ranks.count, rank_here()) == (0, 1, 0)
            assert ranks.device(None) is None
            assert ranks.device("cuda:3") == "cuda:3"
            assert ranks.meet("hello") == ["hello"]
            assert ranks.rows(4) == (4, slice(0, 4))
            ranks.connect(torch.device("meta"))
            odd = torch.tensor([float("nan"), 1 / 3])
            ranks.average_([odd])
            assert odd[1] == torch.tensor(1 / 3)
            ranks.agree("anything", "differs")
    with pytest.raises(ZeroDivisionError), together():
        raise ZeroDivisionError


@pytest.mark.parametrize(("values", "named"), [
    ({"WORLD_SIZE": "2"}, "RANK must be a number where WORLD_SIZE is set, it is not set"),
    ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "first"}, "LOCAL_RANK .* got 'first'"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE .* got 'two'"),
    ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "did not meet at None:None .*MASTER_ADDR.*torchrun"),
])
def test_a_broken_environment_is_one_line(values, named, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StaminaError, match=named) as caught, together():
        pass
    assert "\n" not in str(caught.value)


def test_each_process_takes_its_own_gpu(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    second = Ranks.__new__(Ranks)
    second.rank, second.count, second.local = 5, 8, 1
    assert second.device(None) == second.device("cuda") == torch.device("cuda", 1)
    assert taken == [1, 1]
    assert second.device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="'cuda' for 8 processes, got 'cuda:0'"):
        second.device("cuda:0")
    second.local = 2
    with pytest.raises(InputError, match="process 2 of this machine has no GPU, there are 2"):
        second.device(None)


def test_a_failure_aborts_what_waits_on_a_gpu_and_destroys_nothing(monkeypatch):
    """Destroying a group of nccl waits for its kernels, which wait for the rank that has stopped."""
    done = []
    monkeypatch.setattr(torch.distributed, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda group: done.append("destroyed"))
    for error, said in ((StaminaError("bad"), [(b"!", "bad"), (b"+", "")]), (LostError("gone"), LostError("gone too"))):
        ranks = Ranks.__new__(Ranks)
        ranks.rank, ranks.count, ranks.over, ranks.owns, ranks.patience = 0, 2, False, True, SOON
        ranks.gradients, ranks.messages = types.SimpleNamespace(abort=lambda: done.append("aborted")), object()
        monkeypatch.setattr(Ranks, "_gather", unittest.mock.Mock(side_effect=[said]))
        ranks.leave(error)
        assert ranks.over
    assert done == ["aborted", "aborted"]


def test_a_digest_sees_every_bit():
    tensors = {"a": torch.zeros(4), "b": torch.zeros(3, dtype=torch.bfloat16), "c": torch.zeros(())}
    found = {digest(tensors.items())}
    for name, tensor in tensors.items():
        bits = tensor.clone()
        bits.view(-1).view(torch.uint8)[-1] ^= 1
        found.add(digest((tensors | {name: bits}).items()))
    found |= {digest((tensors | {"a": torch.zeros(2, 2)}).items()), digest([("d", torch.zeros(4))])}
    assert len(found) == 6

