"""Several processes: one model and one set of bits, one batch in parts, and whatever stops one of them stops all."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path

import pytest
import tinypipes
import torch

from stamina_fast.cli import explain
from stamina_fast.errors import InputError, StaminaError
from stamina_fast.train import ranks as module
from stamina_fast.train.ranks import Ranks, digest, rank_here, together

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["stamina_fast.cli", "tinypipes", "tinyruns"])
SOON = timedelta(seconds=60)


@pytest.fixture(scope="module", autouse=True)
def server():
    """The process that the others are forked from finds what it is to import, which each of them would import otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(tinypipes.__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def as_rank(rank, count, port, log, work, arguments):
    """The whole life of one process: what it says goes to `log`, and its exit code is that of the command line."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    torch.set_num_threads(1)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    try:
        work(rank, *arguments)
    except StaminaError as error:
        print(f"stamina-fast: {explain(error)}", flush=True)
        sys.exit(2)


def start(tmp_path, count, work, *arguments, seconds=90):
    """`work(rank, *arguments)` in `count` processes: the exit code of each, and what each said."""
    logs = [tmp_path / f"rank{rank}.log" for rank in range(count)]
    for log in logs:
        log.unlink(missing_ok=True)
    port = free_port()
    started = [
        PROCESSES.Process(target=as_rank, args=(rank, count, port, str(log), work, arguments)) for rank, log in enumerate(logs)
    ]
    end = time.monotonic() + seconds
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(max(0, end - time.monotonic()))
            assert process.exitcode is not None, [log.read_text() for log in logs if log.exists()]
    finally:
        for process in started:
            process.kill()
    return [process.exitcode for process in started], [log.read_text() for log in logs]


# the ranks alone

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
        # a line that is too long is cut, not refused
        assert [len(line) for line in ranks.meet("x" * 5000)] == [module.LINE - 1] * count
        # what nobody can expect to be exact has the same bits everywhere, or the ranks would part after a step
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
    with together(timedelta(seconds=2)) as ranks:
        ranks.connect(torch.device("cpu"))
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else time.sleep(8)
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


def test_a_digest_sees_every_bit():
    tensors = {"a": torch.zeros(4), "b": torch.zeros(3, dtype=torch.bfloat16), "c": torch.zeros(())}
    found = {digest(tensors.items())}
    for name, tensor in tensors.items():
        bits = tensor.clone()
        bits.view(-1).view(torch.uint8)[-1] ^= 1
        found.add(digest((tensors | {name: bits}).items()))
    found |= {digest((tensors | {"a": torch.zeros(2, 2)}).items()), digest([("d", torch.zeros(4))])}
    assert len(found) == 6
