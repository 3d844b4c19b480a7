"""The queue: cells run once, whatever is killed goes on with the same numbers, and a failure stops nothing else."""

import json
import os
import shutil
import signal
import threading
import time

import pytest
from typer.testing import CliRunner

from stamina_fast.benchmark import Plan, run_benchmark
from stamina_fast.benchmark.queue import held, why
from stamina_fast.cli import app
from stamina_fast.errors import FileError, InputError
from stamina_fast.io.run import Run


def cells_of(plan):
    """The cells by what they are: the one that fails, and the two that can be trained."""
    named = {"bad" if cell.changes else cell.method: cell for cell in plan.cells()}
    assert set(named) == {"bad", "stamina", "lora"}
    return named


def result_of(output, cell):
    return json.loads((output / "cells" / cell.id / "result.json").read_text())


def numbers(value):
    """A result without times, and without what a machine or a commit changes."""
    if isinstance(value, dict):
        return {key: numbers(part) for key, part in value.items() if key not in ("seconds", "machine", "files")}
    return [numbers(part) for part in value] if isinstance(value, list) else value


def test_two_commands_on_one_folder_run_every_cell_once(filled, plan):
    output, left, said = filled
    cells = cells_of(plan)
    for cell in cells.values():
        assert said.count(f"{cell.id}: begins") == 1, said
    for name in ("stamina", "lora"):
        assert said.count(f"{cells[name].id}: done in") == 1, said
        assert (output / "cells" / cells[name].id / "result.json").is_file()
    assert left == [[cells["bad"].id]] * 2
    assert sorted(path.name for path in (output / "cells").iterdir()) == sorted(cell.id for cell in cells.values())


def test_a_cell_that_fails_keeps_its_traceback_and_stops_no_other(filled, plan):
    output, _, said = filled
    cell = cells_of(plan)["bad"]
    folder = output / "cells" / cell.id
    error = (folder / "error.txt").read_text()
    assert "Traceback" in error
    assert "rank" in error.splitlines()[-1]
    assert f"{cell.id}: failed: " in said
    assert "--retry" in why(folder)
    assert not (folder / "result.json").exists()


def test_a_result_says_everything_that_a_report_needs(filled, plan):
    output, _, _ = filled
    cell = cells_of(plan)["stamina"]
    result = result_of(output, cell)
    assert result["cell"] == json.loads(json.dumps(cell.as_dict()))
    assert sorted(result["concepts"]) == ["face-01-man", "landmark-01-tower"]
    assert set(result["mmd"]) == {"A", "F", "P"}
    for row in result["mmd"].values():
        assert row["interval"][0] <= row["mean"] <= row["interval"][1]
    ends = [task["mmd_end"] for task in result["tasks"]]
    assert result["mmd"]["A"]["mean"] == pytest.approx(sum(ends) / 2)
    records = Run.open(output / "cells" / cell.id / "run").tasks()
    for position, (task, record) in enumerate(zip(result["tasks"], records, strict=True)):
        assert task["position"] == position
        assert task["name"] == record["name"] == result["concepts"][position]
        assert task["sha256"] == record["sha256"]
        assert {"mmd_after", "mmd_end", "intervals", "distance", "step", "density", "overlap", "seconds", "named_after",
                "named_end"} <= set(task)
    assert [row["age"] for row in result["by_age"]] == [0, 1]
    assert all(scene["kind"] in scene["prompt"].split() and scene["both"] <= scene["seen"] <= 1 for scene in result["scenes"])
    assert len(result["pairs"]) == 1
    assert result["parameters"]["trainable"] > 0
    assert all(result["machine"][key] for key in ("cpu", "threads", "torch", "diffusers"))
    assert result["settings"]["stamina"]["rank"] == 2
    assert len(result["changes"]["shared"]) == 2


def test_what_is_large_is_removed_and_what_a_report_shows_stays(filled, plan):
    output, _, _ = filled
    for name in ("stamina", "lora"):
        run = output / "cells" / cells_of(plan)[name].id / "run"
        assert not (run / "model").exists()
        assert not list(run.rglob("factors.safetensors"))
        assert len(list(run.rglob("token.safetensors"))) == 2
        assert (run / "samples").is_dir()


def copied(filled, target):
    """An output folder with the set of another one, and no cells."""
    shutil.copytree(filled[0] / "set", target / "set")
    return target


def test_results_that_are_kept_alone_are_gone_on_with(filled, plan, model, tmp_path):
    """As from a repository: no cell is trained again, and the set is made again as it was."""
    output, kept = tmp_path / "out", filled[0]
    files = [kept / "set" / "set.json", *(kept / "cells").glob("*/result.json")]
    for file in files:
        target = output / file.relative_to(kept)
        target.parent.mkdir(parents=True)
        shutil.copy(file, target)
    fine = plan.model_copy(update={"groups": [plan.groups[0].model_copy(update={"changes": [{}]}), plan.groups[1]]})
    assert run_benchmark(fine, output, model=model, progress=False) == []
    for file in files:
        assert json.loads((output / file.relative_to(kept)).read_text()) == json.loads(file.read_text())
    assert not list((output / "cells").rglob("run"))
    for name in ("concepts_list.json", "classifier.safetensors", "kinds.safetensors", "concepts/face-01-man/00.png"):
        assert (output / "set" / name).read_bytes() == (kept / "set" / name).read_bytes()


def test_a_worker_that_is_killed_leaves_a_cell_that_goes_on_to_the_same_numbers(filled, plan, model, tmp_path):
    output, cell = copied(filled, tmp_path / "out"), cells_of(plan)["stamina"]
    alone = plan.model_copy(update={"groups": [plan.groups[0].model_copy(update={"changes": [{}]})]})
    assert [cell.id for cell in alone.cells()] == [cell.id]
    folder, left = output / "cells" / cell.id, []
    command = threading.Thread(target=lambda: left.extend(run_benchmark(alone, output, model=model, progress=False)))
    command.start()
    run = folder / "run"
    while command.is_alive() and not ((run / "manifest.json").exists() and Run.open(run).tasks()):
        time.sleep(0.02)
    os.kill(int((folder / "lock").read_text()), signal.SIGKILL)
    command.join()
    assert left == [cell.id]
    assert not (folder / "result.json").exists()
    assert not (folder / "error.txt").exists()
    kept = {path: path.stat().st_mtime_ns for path in (run / "tasks").rglob("factors.safetensors")}
    assert kept
    assert run_benchmark(alone, output, model=model, progress=False, keep=True) == []
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "a finished task is not learned again"
    assert (run / "model").is_dir()
    assert numbers(result_of(output, cell)) == numbers(result_of(filled[0], cell))


def test_retry_tries_what_failed_and_leaves_what_is_done(filled, plan, model, capsys):
    output, _, _ = filled
    cells = cells_of(plan)
    error, result = (output / "cells" / cells[name].id / file for name, file in (("bad", "error.txt"), ("lora", "result.json")))
    before = error.stat().st_mtime_ns, result.stat().st_mtime_ns
    assert run_benchmark(plan, output, model=model) == [cells["bad"].id]
    assert "begins" not in capsys.readouterr().out
    assert error.stat().st_mtime_ns == before[0]
    assert run_benchmark(plan, output, model=model, retry=True) == [cells["bad"].id]
    said = capsys.readouterr().out
    assert said.count("begins") == 1
    assert error.stat().st_mtime_ns > before[0]
    assert result.stat().st_mtime_ns == before[1]


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    with held(tmp_path / "lock") as first, held(tmp_path / "lock", wait=False) as second:
        assert (first, second) == (True, False)
    with held(tmp_path / "lock", wait=False) as third:
        assert third
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_another_set_in_the_same_folder_is_refused(filled, plan, model):
    other = plan.model_copy(update={"samples": 3, "tuning": False})
    with pytest.raises(FileError, match="samples, tuning"):
        run_benchmark(other, filled[0], model=model, progress=False)


def test_what_cannot_be_trained_leaves_no_folder(model, tmp_path):
    plan = Plan.model_validate({"identities": 2, "cells": [{"methods": ["no-such"]}]})
    with pytest.raises(InputError, match="no-such"):
        run_benchmark(plan, tmp_path / "out", model=model, progress=False)
    assert not (tmp_path / "out").exists()


def test_the_command_fails_while_a_cell_is_not_done_and_writes_the_report(filled, plan, model, tmp_path):
    (tmp_path / "mine.yaml").write_text(plan.model_dump_json(by_alias=True))
    result = CliRunner().invoke(app, ["benchmark", "--plan", str(tmp_path / "mine.yaml"), "--output", str(filled[0]), "--model",
                                      model])
    assert result.exit_code == 1, result.output
    assert f"{cells_of(plan)['bad'].id}: failed: " in result.output
    assert "2 of 3 cells are done" in result.output
    (filled[0] / "report.html").unlink()
    result = CliRunner().invoke(app, ["benchmark", "--report", str(filled[0])])
    assert result.exit_code == 0, result.output
    assert (filled[0] / "report.html").is_file()
    assert str(filled[0] / "report.html") in result.output


def test_adapters_that_are_summed_are_drawn_apart_too(filled, plan, model, tmp_path):
    group = plan.groups[0].model_copy(update={"methods": ["lora-merge"], "changes": [{}]})
    merged = plan.model_copy(update={"groups": [group]})
    output, (cell,) = copied(filled, tmp_path / "out"), merged.cells()
    assert run_benchmark(merged, output, model=model, progress=False) == []
    result, samples = result_of(output, cell), output / "cells" / cell.id / "run" / "samples" / f"g{merged.guidance:g}"
    first, second = result["concepts"]
    pictures = {(stage, name): [path.read_bytes() for path in sorted((samples / stage / name).glob("*.png"))]
                for stage, name in (("apart", first), ("after-01", first), ("apart", second), ("after-02", second))}
    # the sum of one adapter is that adapter
    assert pictures["apart", first] == pictures["after-01", first]
    assert pictures["apart", second] != pictures["after-02", second]
    assert [0 <= task["named_apart"] <= 1 for task in result["tasks"]] == [True, True]
