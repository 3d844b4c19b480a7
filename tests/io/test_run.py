"""The RUN folder: a task is in it whole or not at all, whatever happens while it is written."""

import contextlib
import errno
import json
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stamina_fast.errors import FileError, InputError
from stamina_fast.io.files import write_json
from stamina_fast.io.run import FILES, KEPT, Run, from_inversion

CONFIG = {"model": "tiny", "steps": 3, "rates": [0.1, 1e-05], "name": "ä"}


def task(i):
    factors = {"down.a": torch.full((2, 2), float(i)), "down.b": torch.arange(3.0) * i}
    info = {"token": "<one>", "seconds": i, "steps": 3}
    return factors, {"text_encoder": torch.ones(4) * i}, [{"step": i, "loss": 0.5}], info


def commit(run, i, name=None, kept=None):
    by = {"backend": "reference", "device": "cpu"}
    return run.commit_task(name or f"concept {i}", *task(i), folded_by=by, kept=kept)


def check(run, count):
    """Exactly `count` tasks are in the run, every one as it was committed."""
    assert [t["name"] for t in run.tasks()] == [f"concept {i}" for i in range(count)]
    for i in range(count):
        got, (factors, token, curve, info) = run.load_task(f"concept {i}"), task(i)
        assert got.factors.keys() == factors.keys()
        assert all(torch.equal(got.factors[key], factors[key]) for key in factors)
        assert torch.equal(got.token["text_encoder"], token["text_encoder"])
        assert (got.curve, got.info) == (curve, info)


def partials(path):
    return [p for p in path.rglob("*") if p.name.endswith(".partial")]


TOKENS = {
    "one vector": ({"text_encoder": torch.ones(4)}, {"<one>": [1, 4]}),
    "three": ({"text_encoder": torch.ones(3, 4)}, {"<one>": [3, 4]}),
    "two encoders": ({"text_encoder": torch.ones(4), "text_encoder_2": torch.zeros(6)}, {"clip_l": [1, 4], "clip_g": [1, 6]}),
    "both": ({"text_encoder": torch.ones(3, 4), "text_encoder_2": torch.zeros(3, 6)}, {"clip_l": [3, 4], "clip_g": [3, 6]}),
}


@pytest.mark.parametrize(("token", "shapes"), TOKENS.values(), ids=TOKENS)
def test_a_tokens_file_is_a_textual_inversion(tmp_path, token, shapes):
    run = Run.create(tmp_path, CONFIG)
    folder = run.commit_task("x", {}, token, [], {"token": "<one>"})
    assert {name: list(rows.shape) for name, rows in load_file(folder / "token.safetensors").items()} == shapes
    loaded = run.load_task("x").token
    assert set(loaded) == set(token)
    assert all(torch.equal(loaded[part], rows) for part, rows in token.items())


@pytest.mark.parametrize("token", [value for value, _ in TOKENS.values()], ids=TOKENS)
def test_a_tokens_file_of_an_older_run_is_read(token):
    loaded = from_inversion(dict(token))
    assert set(loaded) == set(token)
    assert all(torch.equal(loaded[part], rows) for part, rows in token.items())


def test_what_is_committed_is_loaded(tmp_path):
    run = Run.create(tmp_path / "new" / "run", CONFIG)
    for i in range(3):
        folder = commit(run, i)
        assert folder == run.folder(f"concept {i}")
    again = Run.open(run.path)
    assert again.config == CONFIG
    check(again, 3)
    manifest = json.loads((run.path / "manifest.json").read_text())
    for i, entry in enumerate(manifest["tasks"]):
        assert entry["name"] == f"concept {i}"
        assert entry["folder"].startswith(f"0{i + 1}-concept-{i}")
        assert set(entry["files"]) == set(FILES)
        assert entry["sha256"] == entry["files"]["factors.safetensors"]
        assert entry["folded_by"] == {"backend": "reference", "device": "cpu"}
    assert {p.name for p in run.path.iterdir()} == {"config.yaml", "manifest.json", "tasks"}


def test_other_files_of_a_task_are_nobodys_business(tmp_path):
    run = Run.create(tmp_path, CONFIG)
    commit(run, 0)
    (run.folder("concept 0") / "samples.png").write_bytes(b"x")
    commit(Run.create(tmp_path, CONFIG, resume=True), 1)
    check(Run.open(tmp_path), 2)
    assert (run.folder("concept 0") / "samples.png").exists()


def test_where_a_run_may_begin(tmp_path):
    Run.create(tmp_path / "a", CONFIG)
    (tmp_path / "b").mkdir()
    Run.create(tmp_path / "b", CONFIG)
    with pytest.raises(FileError, match="is not empty; resume it if it is a run"):
        Run.create(tmp_path / "a", CONFIG)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.doc").touch()
    for resume in (False, True):
        with pytest.raises(FileError, match=r"is not empty.*choose another folder"):
            Run.create(tmp_path / "c", CONFIG, resume=resume)
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["thesis.doc"]
    with pytest.raises(FileError, match="cannot create the folder"):
        Run.create(tmp_path / "c" / "thesis.doc", CONFIG)
    for path in (tmp_path / "c", tmp_path / "missing"):
        with pytest.raises(FileError, match="is not a run"):
            Run.open(path)
    Run.create(tmp_path / "new", CONFIG, resume=True)
    assert Run.create(tmp_path / "new", {"other": 1}, resume=True).config == CONFIG


@pytest.mark.parametrize("name", ["concept 0", "Concept 0", " concept  0 ", "", "a\nb"])
def test_names_that_are_taken_or_none(tmp_path, name):
    run = Run.create(tmp_path, CONFIG)
    commit(run, 0)
    with pytest.raises(InputError):
        run.commit_task(name, *task(1))
    check(run, 1)


def test_unknown_tasks_are_named(tmp_path):
    run = Run.create(tmp_path, CONFIG)
    with pytest.raises(InputError, match="no task 'x'; finished are none"):
        run.load_task("x")
    commit(run, 0)
    with pytest.raises(InputError, match="no task 'x'; finished are 'concept 0'"):
        run.folder("x")


def test_a_curve_that_is_not_finite_leaves_nothing(tmp_path):
    run = Run.create(tmp_path, CONFIG)
    with pytest.raises(InputError, match="as JSON"):
        run.commit_task("x", {}, {}, [{"loss": float("nan")}], {})
    assert not list((tmp_path / "tasks").iterdir())


CALLS = ("open", "write", "fsync", "replace", "mkdir")


class Stop(BaseException):
    """The machine is gone: nobody may catch this and clean up."""


def on_call(patch, number, act):
    """Before call `number` of an os function that changes the disk, `act`; returns the list of calls seen."""
    seen = []
    for name, function in [(name, getattr(os, name)) for name in CALLS]:
        def call(*args, real=function, name=name, **kwargs):
            seen.append(name)
            if len(seen) - 1 == number:
                act()
            elif number is not None and len(seen) - 1 > number and act is dead:
                raise Stop
            return real(*args, **kwargs)

        patch.setattr(os, name, call)
    return seen


def dead():
    raise Stop


def calls_of_a_commit(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "count", CONFIG)
    commit(run, 0)
    with monkeypatch.context() as patch:
        seen = on_call(patch, None, dead)
        commit(run, 1)
    return len(seen)


def test_stopped_before_each_call(tmp_path, monkeypatch):
    """As if the power went at each step of a commit: the task is there whole, or it is not and the run goes on without it."""
    total, whole = calls_of_a_commit(tmp_path, monkeypatch), 0
    assert total > 20
    for number in range(total):
        path = tmp_path / str(number)
        run = Run.create(path, CONFIG)
        commit(run, 0)
        with monkeypatch.context() as patch:
            on_call(patch, number, dead)
            # what a dead process cannot do either
            patch.setattr("pathlib.Path.unlink", lambda self, missing_ok=False: None)
            with pytest.raises(Stop):
                commit(run, 1)
        done = len(Run.open(path).tasks())
        check(Run.open(path), done)
        whole += done == 2
        again = Run.create(path, CONFIG, resume=True)
        assert not partials(path)
        assert len(list((path / "tasks").iterdir())) == done
        for i in range(done, 3):
            commit(again, i)
        check(Run.open(path), 3)
    # only making the last rename durable comes after the acknowledgement
    assert whole == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_each_call(tmp_path, monkeypatch, code):
    total = calls_of_a_commit(tmp_path, monkeypatch)

    def refuse():
        raise OSError(code, os.strerror(code))

    for number in range(total):
        path = tmp_path / str(number)
        run = Run.create(path, CONFIG)
        commit(run, 0)
        with monkeypatch.context() as patch:
            on_call(patch, number, refuse)
            with pytest.raises(FileError, match=os.strerror(code)) as caught:
                commit(run, 1)
        assert "\n" not in str(caught.value)
        done = len(run.tasks())
        check(Run.open(path), done)
        assert not partials(path)
        # nothing is left of it, and the same run goes on
        assert len(list((path / "tasks").iterdir())) == done
        for i in range(done, 3):
            commit(run, i)
        check(Run.open(path), 3)


def test_stopped_while_a_run_begins(tmp_path, monkeypatch):
    for number in range(30):
        path = tmp_path / str(number)
        with monkeypatch.context() as patch:
            seen = on_call(patch, number, dead)
            patch.setattr("pathlib.Path.unlink", lambda self, missing_ok=False: None)
            with contextlib.suppress(Stop):
                Run.create(path, CONFIG)
        run = Run.create(path, CONFIG, resume=True)
        assert run.config == CONFIG
        commit(run, 0)
        assert not partials(path)
    assert len(seen) < 30


def child_commits(path, report):
    """In a forked child: commit until killed, telling the parent of each task acknowledged."""
    run = Run.create(path, CONFIG, resume=True)
    for i in range(len(run.tasks()), 1000):
        commit(run, i)
        os.write(report, b".")


def test_fifty_kills_lose_no_acknowledged_task(tmp_path):
    rng, path, acknowledged, lived = random.Random(0), tmp_path / "run", 0, 0
    start = time.perf_counter()
    check(Run.create(tmp_path / "timed", CONFIG), 0)
    commit(Run.open(tmp_path / "timed"), 0)
    patience = time.perf_counter() - start
    for _ in range(50):
        if acknowledged > 20:
            path, acknowledged = tmp_path / str(rng.random()), 0
        before, (theirs, report) = acknowledged, os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                child_commits(path, report)
            finally:
                os._exit(1)
        os.close(report)
        # however slow the machine is, a child lives for two tasks at most, and is killed anywhere in the next
        acknowledged += sum(len(os.read(theirs, 1)) for _ in range(rng.randrange(3)))
        time.sleep(rng.uniform(0, patience))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        while told := os.read(theirs, 4096):
            acknowledged += len(told)
        os.close(theirs)
        with contextlib.suppress(FileError):
            done = len(Run.open(path).tasks())
            # one more may have been acknowledged on the disk just before the kill
            assert acknowledged <= done <= acknowledged + 1
            lived += done - before
            acknowledged = done
        check(Run.create(path, CONFIG, resume=True), acknowledged)
        assert not partials(path)
    assert lived > 10


def test_what_a_method_keeps_is_a_file_of_its_own(tmp_path):
    run, kept = Run.create(tmp_path, CONFIG), {"fisher.0": torch.rand(3, 2)}
    commit(run, 0)
    folder = commit(run, 1, kept=kept)
    assert [set(entry["files"]) - set(FILES) for entry in run.tasks()] == [set(), {KEPT}]
    assert run.load_task("concept 0").kept == {}
    assert torch.equal(run.load_task("concept 1").kept["fisher.0"], kept["fisher.0"])
    check(run, 2)
    (folder / KEPT).unlink()
    with pytest.raises(FileError, match=KEPT):
        run.load_task("concept 1")


def test_flipped_bits_are_detected(tmp_path):
    """3,000 flips anywhere in what a run keeps: every one is an error of one line, none a wrong number."""
    run = Run.create(tmp_path, CONFIG)
    commit(run, 0)
    kept = [tmp_path / "config.yaml", tmp_path / "manifest.json"]
    kept += [path for path in (tmp_path / "tasks").rglob("*") if path.is_file()]
    assert len(kept) == 2 + len(FILES)
    rng = random.Random(0)
    for _ in range(3000):
        path = rng.choice(kept)
        good = path.read_bytes()
        bad = np.frombuffer(good, np.uint8).copy()
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad.tobytes())
        with pytest.raises(FileError) as caught:
            Run.open(tmp_path) if path.parent == tmp_path else run.load_task("concept 0")
        assert "\n" not in str(caught.value)
        path.write_bytes(good)
    check(Run.open(tmp_path), 1)


@pytest.mark.parametrize("name", [*FILES, "../../manifest.json", "../../config.yaml"])
def test_missing_files_are_named(tmp_path, name):
    run = Run.create(tmp_path, CONFIG)
    path = (commit(run, 0) / name).resolve()
    path.unlink()
    with pytest.raises(FileError, match=path.name):
        Run.open(tmp_path).load_task("concept 0")


@pytest.mark.parametrize("change", [
    {"folder": "../../etc"}, {"folder": "01-a/../b"}, {"sha256": "x"}, {"files": {}}, {"files": {"../x": "0" * 64}},
    {"name": 3}, {"extra": 1},
])
def test_a_manifest_made_by_someone_else(tmp_path, change):
    run = Run.create(tmp_path, CONFIG)
    commit(run, 0)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["tasks"][0].update(change)
    write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(FileError, match="damaged") as caught:
        Run.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_reader_leaves_a_running_commit_alone(tmp_path):
    run = Run.create(tmp_path, CONFIG)
    commit(run, 0)
    unfinished = tmp_path / "tasks" / "02-x"
    unfinished.mkdir()
    (unfinished / ".factors.safetensors.partial").touch()
    check(Run.open(tmp_path), 1)
    assert unfinished.exists()
    Run.create(tmp_path, CONFIG, resume=True)
    assert not unfinished.exists()


def test_a_tasks_folder_that_points_elsewhere_is_refused(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "tasks").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="outside"):
        commit(run, 0)
    assert not list((tmp_path / "elsewhere").iterdir())
