"""Several processes: one model and one set of bits, one batch in parts, and whatever stops one of them stops all."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import types
import unittest.mock
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path

import pytest
import safetensors.torch
import tinypipes
import torch
from tinyruns import NAMES, SMALL, assert_same, run, tensors, write_concepts

from stamina_fast.attach import Adapters
from stamina_fast.cli import explain
from stamina_fast.errors import FileError, InputError, StaminaError
from stamina_fast.io.images import load_image, write_image
from stamina_fast.io.run import Run
from stamina_fast.train import TrainOptions, loop, ranks as module
from stamina_fast.train.buckets import Buckets
from stamina_fast.train.flat import Optimizer
from stamina_fast.train.latents import LatentBank
from stamina_fast.train.ranks import LostError, Ranks, digest, rank_here, together
from stamina_fast.train.step import Buffers, Feed, Step

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
    """Destroying a group of nccl waits for its kernels, and those for a rank that has stopped."""
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


# training

def keep(file, named):
    safetensors.torch.save_file({name: tensor.detach().clone() for name, tensor in named.items()}, file)


def gradients_of(patch, kept):
    """Where every step's mean gradient is kept, before it is clipped, and AdamW's own amplification of roundings left out."""
    norms = Optimizer.norms

    def look(optimizer):
        kept.append(torch.cat([flat.grads for flat in optimizer.flats]).clone())
        return norms(optimizer)

    patch.setattr(Optimizer, "norms", look)


def learn(rank, kind, folder, output, results, changes):
    """A whole run; the bits of the pipeline and all gradients go to `results`, one file a rank."""
    pipeline, kept = tinypipes.KINDS[kind](), []
    with pytest.MonkeyPatch.context() as patch:
        gradients_of(patch, kept)
        run(pipeline, folder, output, progress=True, on_task=lambda *_: print("on_task", flush=True), **changes)
    keep(f"{results}{rank}.safetensors", tensors(pipeline) | {"gradients": torch.stack(kept)})


def results_of(results, count=2):
    return [safetensors.torch.load_file(f"{results}{rank}.safetensors") for rank in range(count)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return write_concepts(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    """The same with one more picture each, that is twice as wide as high."""
    folder = write_concepts(tmp_path_factory.mktemp("shaped"), 2)
    for name in NAMES[:2]:
        write_image(folder / name / "wide.png", load_image(folder / name / "0.png").repeat(1, 1, 2))
    return folder


@pytest.mark.parametrize(("kind", "changes"), [
    ("sd15", {"method": "c-stamina", "sparsity_weight": 0.1}), ("sdxl", {"batch": 2, "accumulate": 2, "attention": "measured"}),
], ids=["sd15", "sdxl"])
def test_two_processes_are_one_of_twice_the_batch(kind, changes, two, tmp_path):
    codes, said = start(tmp_path, 2, learn, kind, two, tmp_path / "run", tmp_path / "rank", changes)
    assert codes == [0, 0], said
    ours, theirs = results_of(tmp_path / "rank")
    assert_same(ours, theirs)
    # rank 0 alone shows, samples and writes
    assert said[0].count("on_task") == 2
    assert "learned cat in" in said[0]
    assert said[1] == ""
    made = Run.open(tmp_path / "run")
    assert made.config["processes"] == 2
    saved = tensors(type(tinypipes.KINDS[kind]()).from_pretrained(tmp_path / "run" / "model"))
    assert_same(saved, {name: tensor for name, tensor in ours.items() if name != "gradients"})
    alone = alone_with_twice_the_batch(kind, two, tmp_path / "alone", changes, ours["gradients"])
    for name in ("cat", "cup"):
        for row, other in zip(made.load_task(name).curve, alone.load_task(name).curve, strict=True):
            assert row == pytest.approx(other, rel=2e-2)


def alone_with_twice_the_batch(kind, folder, output, changes, gradients):
    """One process with all pictures of which two took halves, and the first gradients of both."""
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        gradients_of(patch, kept)
        alone = run(tinypipes.KINDS[kind](), folder, output, **changes | {"batch": 4})
    for step in (0, 1):
        error = (gradients[step] - kept[step]).norm() / kept[step].norm()
        assert 0 < error < 1e-5, (step, error)
    return alone


def test_two_processes_take_pictures_of_the_same_shape(shaped, tmp_path, monkeypatch):
    changes, seen, fill_ = {"aspect_buckets": True, "resolution": 96, "seed": 1}, [], Buckets.fill_
    codes, said = start(tmp_path, 2, learn, "sd15", shaped, tmp_path / "run", tmp_path / "rank", changes)
    assert codes == [0, 0], said
    ours, theirs = results_of(tmp_path / "rank")
    assert_same(ours, theirs)
    monkeypatch.setattr(Buckets, "fill_", lambda buckets, step: seen.append(fill_(buckets, step)) or seen[-1])
    alone_with_twice_the_batch("sd15", shaped, tmp_path / "alone", changes, ours["gradients"])
    assert set(seen[:2]) == {(96, 96), (64, 128)}


def test_each_rank_has_pictures_of_its_own(monkeypatch):
    """Rows of the same draw: together those of one process, and none twice."""
    bank = LatentBank(torch.randn(50, 4, 8, 8), torch.rand(50, 4, 8, 8), torch.arange(50), torch.rand(50, 4), 0.5, 0.1)
    ids = [torch.arange(50)[:, None].expand(50, 7)]

    def filled(batch, rank, count):
        ranks = Ranks.__new__(Ranks)
        ranks.rank, ranks.count = rank, count
        buffers = Buffers.empty(batch, (4, 8, 8), [7], torch.device("cpu"))
        Feed(buffers, bank, ids, 64, 1000, 5, ranks).fill_(3)
        return [buffers.latents, buffers.noise, buffers.t, buffers.frames, *buffers.ids]

    whole, parts = filled(6, 0, 1), [filled(2, rank, 3) for rank in range(3)]
    for all_rows, *rows in zip(whole, *parts, strict=True):
        assert torch.equal(all_rows, torch.cat(rows))
    assert len(whole[1].unique()) == whole[1].numel()


def flip_a_bit(tensor):
    tensor.view(-1).view(torch.uint8)[3] ^= 1


def spoil(rank, how, folder, output):
    """A run of two concepts in which one rank goes wrong at the second one, or before it."""
    fold, commit, call, steps = Adapters.fold_, Run.commit_task, Step.__call__, iter(range(100))

    def fold_(adapters, name):
        embeddings = fold(adapters, name)
        if rank == 1 and name == "cup":
            if how == "weight":
                flip_a_bit(adapters.stacks[0].weight)
            elif how == "factor":
                flip_a_bit(adapters.tasks[name]["stacks.0.a"])
            elif how == "token":
                flip_a_bit(next(iter(embeddings.values())))
        return embeddings

    def commit_task(made, name, *args, **kwargs):
        if how == "disk" and name == "cup":
            raise FileError(f"cannot write {name}: No space left on device; free some space and run again")
        return commit(made, name, *args, **kwargs)

    def step_(step):
        if next(steps) == SMALL["steps"] + 2 and rank == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif how == "nan":
                step.buffers.latents[0, 0, 0, 0] = float("nan")
            elif how == "inf":
                step.buffers.latents[0, 0, 0, 0] = float("inf")
        call(step)

    def load(path):
        if how == "picture" and rank == 1:
            raise InputError(f"{path.name} is not a picture; save it again")
        return load_image(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Adapters, "fold_", fold_)
        patch.setattr(Run, "commit_task", commit_task)
        patch.setattr(Step, "__call__", step_)
        patch.setattr(loop, "load_image", load)
        changes = {"seed": rank} if how == "options" else {}
        run(tinypipes.sd15(), folder, output, **changes)


OTHER_BITS = "rank 1 folded other bits for cup, which is not stored: train again with --resume; rank 0 is the measure"
NOT_FINITE = "cup: the latents is not finite at step 2; the task is rolled back and the earlier ones are kept: lower the " \
    "learning rate and train again"
NO_SPACE = "cannot write cup: No space left on device; free some space and run again"
SPOILT = {
    "weight": [OTHER_BITS] * 2,
    "factor": [OTHER_BITS] * 2,
    "token": [OTHER_BITS] * 2,
    "nan": [NOT_FINITE] * 2,
    "inf": [NOT_FINITE] * 2,
    "disk": [NO_SPACE, f"rank 0: {NO_SPACE}"],
    "picture": ["rank 1: 0.png is not a picture; save it again", "0.png is not a picture; save it again"],
    "options": ["rank 1 was started with other options, pictures or another model; rank 0 is the measure"] * 2,
    "killed": None,
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_goes_wrong_on_one_rank_stops_both_and_stores_nothing(how, two, tmp_path):
    codes, said = start(tmp_path, 2, spoil, how, two, tmp_path / "run")
    if how == "killed":
        assert codes == [2, -signal.SIGKILL]
        assert said[0].startswith("stamina-fast: rank 0 lost another process (")
        assert said[0].count("\n") == 1
    else:
        assert codes == [2, 2], said
        assert said == [f"stamina-fast: {line}\n" for line in SPOILT[how]]
    if how in ("picture", "options"):
        assert not (tmp_path / "run").exists()
    else:
        assert [task["name"] for task in Run.open(tmp_path / "run").tasks()] == ["cat"]
        assert not (tmp_path / "run" / "model").exists()


def go_on(rank, folder, output, results, changes):
    pipeline = tinypipes.sd15()
    run(pipeline, folder, output, resume=True, **changes)
    keep(f"{results}{rank}.safetensors", tensors(pipeline))


def test_several_processes_go_on_in_the_same_bits_and_no_other_number(two, tmp_path):
    changes = {"save_every": 1}
    codes, said = start(tmp_path, 2, go_on, two, tmp_path / "whole", tmp_path / "whole", changes)
    assert codes == [0, 0], said
    assert start(tmp_path, 2, spoil_saved, two, tmp_path / "run", changes)[0] == [2, -signal.SIGKILL]
    assert Run.open(tmp_path / "run").load_checkpoint().step == 2
    with pytest.raises(InputError, match=r"was started with 2 processes, is 1 now, .* start 2, or choose another") as caught:
        run(tinypipes.sd15(), two, tmp_path / "run", resume=True, **changes)
    assert "\n" not in str(caught.value)
    codes, said = start(tmp_path, 2, go_on, two, tmp_path / "run", tmp_path / "resumed", changes)
    assert codes == [0, 0], said
    whole, resumed = results_of(tmp_path / "whole"), results_of(tmp_path / "resumed")
    for one, two_ in zip(whole, resumed, strict=True):
        assert_same(one, two_)
    digests = [[task["sha256"] for task in Run.open(tmp_path / name).tasks()] for name in ("whole", "run")]
    assert digests[0] == digests[1]


def spoil_saved(rank, folder, output, changes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SMALL, "save_every", changes["save_every"])
        spoil(rank, "killed", folder, output)


def test_learning_rates_grow_with_the_pictures_of_a_step_where_that_is_asked_for(two, tmp_path, monkeypatch):
    assert TrainOptions(batch=2).scale(8) == 1
    assert TrainOptions(batch=2, scale_lr=True).scale(8) == 4
    assert TrainOptions(scale_lr=True).scale(1) == 1
    with pytest.raises(InputError, match="scale_lr must be true or false, got 2"):
        TrainOptions(scale_lr=2)
    peaks, reset = [], Optimizer.reset_
    monkeypatch.setattr(Optimizer, "reset_", lambda optimizer: [peaks.append(list(optimizer.peaks)), reset(optimizer)])
    run(tinypipes.sd15(), two, tmp_path / "run", steps=1, batch=1, learning_rate=0.1, token_learning_rate=0.2, scale_lr=True)
    assert peaks[-1] == [0.025, 0.05]


# the launchers

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
    "accelerate launch": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_run_the_command_line(launcher, two, tmp_path):
    module, *options = LAUNCHERS[launcher]
    pytest.importorskip(module.partition(".")[0])
    tinypipes.sd15().save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", module, *options, str(free_port()), "-m", "stamina_fast.cli", "train", "--device", "cpu"]
    command += ["--model", tmp_path / "model", "--concepts", two, "--output", tmp_path / "run", "--steps", "2", "--rank", "2"]
    done = subprocess.run([*map(str, command), "--batch", "1", "--scale-lr"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is a plain diffusers pipeline") == 1
    made = Run.open(tmp_path / "run")
    assert made.config["processes"] == 2
    assert made.config["train"]["scale_lr"] is True
    assert [task["name"] for task in made.tasks()] == ["cat", "cup"]
    assert (tmp_path / "run" / "model" / "model_index.json").is_file()
