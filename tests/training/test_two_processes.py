"""Two processes train one model: they have the same bits, share a batch, and store nothing if one fails."""

import os
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import tinypipes
import torch
from processes import free_port, start
from tinyruns import NAMES, SMALL, assert_same, run, size_of, tensors, write_concepts

from stamina_fast.adapter.attach import Adapters
from stamina_fast.errors import FileError, InputError
from stamina_fast.io.images import as_floats, check_image, load_image, write_image
from stamina_fast.io.run import Run
from stamina_fast.training import TrainOptions, data, record
from stamina_fast.training.data import Feed
from stamina_fast.training.flat import Optimizer
from stamina_fast.training.latents import LatentBank
from stamina_fast.training.ranks import Ranks
from stamina_fast.training.step import Buffers


def keep(file, named):
    safetensors.torch.save_file({name: tensor.detach().clone() for name, tensor in named.items()}, file)


def gradients_of(patch, kept):
    """Append every step's mean gradient to `kept`, before clipping, and before AdamW amplifies roundings."""
    norms = Optimizer.norms

    def look(optimizer):
        kept.append(torch.cat([flat.grads for flat in optimizer.flats]).clone())
        return norms(optimizer)

    patch.setattr(Optimizer, "norms", look)


def learn(rank, kind, folder, output, results, changes):
    """A whole run. The tensors of the pipeline and all gradients go to `results`, one file a rank."""
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
    """The same concepts, each with one more picture that is twice as wide as high."""
    folder = write_concepts(tmp_path_factory.mktemp("shaped"), 2)
    for name in NAMES[:2]:
        write_image(folder / name / "wide.png", as_floats(load_image(folder / name / "0.png")).repeat(1, 1, 2))
    return folder


@pytest.mark.parametrize(("kind", "changes"), [
    ("sd15", {"method": "c-stamina", "sparsity_weight": 0.1}), ("sdxl", {"batch": 2, "accumulate": 2, "attention": "measured"}),
    ("sd15", {"method": "ewc", "fisher_batches": 2}),
], ids=["sd15", "sdxl", "ewc"])
def test_two_processes_are_one_of_twice_the_batch(kind, changes, two, tmp_path):
    codes, said = start(tmp_path, 2, learn, kind, two, tmp_path / "run", tmp_path / "rank", changes)
    assert codes == [0, 0], said
    ours, theirs = results_of(tmp_path / "rank")
    assert_same(ours, theirs)
    # only rank 0 shows progress, calls on_task and writes
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
    """Train in one process with the batch that two shared, and compare the first two gradients."""
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        gradients_of(patch, kept)
        alone = run(tinypipes.KINDS[kind](), folder, output, **changes | {"batch": 4})
    for step in (0, 1):
        error = (gradients[step] - kept[step]).norm() / kept[step].norm()
        assert 0 < error < 1e-5, (step, error)
    return alone


def test_two_processes_take_pictures_of_the_same_shape(shaped, tmp_path):
    changes, seen = {"aspect_buckets": True, "resolution": 96, "seed": 1}, []
    codes, said = start(tmp_path, 2, learn, "sd15", shaped, tmp_path / "run", tmp_path / "rank", changes)
    assert codes == [0, 0], said
    ours, theirs = results_of(tmp_path / "rank")
    assert_same(ours, theirs)
    changes["on_step"] = lambda step, task, i: seen.append(size_of(step))
    alone_with_twice_the_batch("sd15", shaped, tmp_path / "alone", changes, ours["gradients"])
    assert set(seen[:2]) == {(96, 96), (64, 128)}


def test_each_rank_has_pictures_of_its_own(monkeypatch):
    """Ranks take different rows of one draw; together they are the batch of one process."""
    bank = LatentBank(torch.randn(50, 4, 8, 8), torch.rand(50, 4, 8, 8), torch.arange(50), torch.rand(50, 4), 0.5, 0.1)
    ids = [torch.arange(50)[:, None].expand(50, 7)]

    def filled(batch, rank, count):
        ranks = Ranks.__new__(Ranks)
        ranks.rank, ranks.count = rank, count
        buffers = Buffers.empty(batch, (4, 8, 8), [7], torch.device("cpu"))
        Feed(bank, ids, 64, 1000, 5, ranks).fill_(buffers, 3)
        return [buffers.latents, buffers.noise, buffers.t, buffers.frames, *buffers.ids]

    whole, parts = filled(6, 0, 1), [filled(2, rank, 3) for rank in range(3)]
    for all_rows, *rows in zip(whole, *parts, strict=True):
        assert torch.equal(all_rows, torch.cat(rows))
    assert len(whole[1].unique()) == whole[1].numel()


def flip_a_bit(tensor):
    tensor.view(-1).view(torch.uint8)[3] ^= 1


def spoil(rank, how, folder, output):
    """A run of two concepts in which one rank fails at the second one, or before it."""
    fold, commit, load = Adapters.fold_, Run.commit_task, data.load_image

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

    def on_step(step, task, i):
        if (rank, task, i) != (1, 1, 2):
            return
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how in ("nan", "inf"):
            step.buffers.latents[0, 0, 0, 0] = float(how)

    def check_image_(path):
        if how == "no picture" and rank == 1:
            raise InputError(f"{path.name} is not a picture; save it again")
        return check_image(path)

    def load_image_(path):
        if how == "picture" and rank == 1 and path.parent.name == "cup":
            raise InputError(f"{path.name} is not a picture; save it again")
        return load(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Adapters, "fold_", fold_)
        patch.setattr(Run, "commit_task", commit_task)
        patch.setattr(record, "check_image", check_image_)
        patch.setattr(data, "load_image", load_image_)
        changes = {"on_step": on_step} | ({"seed": rank} if how == "options" else {})
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
    "no picture": ["rank 1: 0.png is not a picture; save it again", "0.png is not a picture; save it again"],
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
    if how in ("no picture", "options"):
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
