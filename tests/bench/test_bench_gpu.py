"""`make gpu`, as far as a machine without a GPU can hold it: stages, limits, resumption, the package in a plain checkout."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stamina_fast.bench import gpu

# the package as an editable or a plain install would give it must not be found
GUARD = "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]\n"


def stage(program, limit=60.0, name="stage", **options):
    return gpu.Stage(name, (sys.executable, "-c", program), limit, **options)


def run(one, tmp_path, seconds=600.0):
    return gpu.run_stage(one, tmp_path, tmp_path, seconds)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    done = subprocess.run([sys.executable, "-m", "bench.gpu", "--output", tmp_path / "out"], cwd=gpu.ROOT, capture_output=True,
                          text=True, timeout=240)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("make gpu needs a CUDA device")
    assert not (tmp_path / "out").exists()


def test_a_plain_checkout_is_a_whole_package(tmp_path):
    names = [f"kernels.{path.stem}" for path in (gpu.ROOT / "kernels").glob("*.py")] + ["bench.suite", "tiny.world"]
    imports = f"[importlib.import_module('stamina_fast.' + name).__file__ for name in {names}]"
    with gpu.checkout() as path:
        program = f"{GUARD}import importlib\nprint(*{imports}, sep='\\n')"
        record = gpu.run_stage(stage(program, limit=240), tmp_path, path, 600)
        printed = (tmp_path / "logs" / "stage.log").read_text()
        assert record["state"] == "passed", printed
        files = printed.split()
        assert len(files) == len(names)
        assert all(Path(file).is_relative_to(path) for file in files)
    assert not path.exists()
    assert (gpu.ROOT / "kernels").is_dir()


def test_a_stage_leaves_its_log_and_its_record(tmp_path):
    good, bad = (run(stage(f"print('done'); raise SystemExit({code})", name=str(code)), tmp_path) for code in (0, 3))
    assert (good["state"], bad["state"]) == ("passed", "failed")
    assert bad["notes"] == ["done"]
    assert (tmp_path / "logs" / "0.log").read_text() == "done\n"
    assert json.loads((tmp_path / "stages" / "3.json").read_text()) == bad
    red = run(stage("print('RED, not timed: an arm'); raise SystemExit(1)"), tmp_path)
    assert red["notes"] == ["RED, not timed: an arm"]


def test_a_stage_past_its_limit_is_ended_with_its_children(tmp_path):
    alive = tmp_path / "alive"
    child = f"import time\nwhile True:\n open({str(alive)!r}, 'a').write('x')\n time.sleep(0.05)"
    program = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(600)"
    assert run(stage(program, limit=5), tmp_path)["state"] == "stopped after 5 s"
    assert alive.is_file()
    size = alive.stat().st_size
    time.sleep(0.5)
    assert alive.stat().st_size == size


def test_what_does_not_fit_the_time_is_not_begun(tmp_path):
    assert run(stage("raise SystemExit(5)"), tmp_path, seconds=10)["state"] == "not run"
    assert run(stage("raise SystemExit(5)", left_out="no such tool"), tmp_path)["notes"] == ["no such tool"]


def test_only_a_stage_that_this_code_has_passed_is_not_repeated(tmp_path, monkeypatch):
    one = stage("pass")
    assert gpu.passed_before(one, tmp_path) is None
    run(dataclasses.replace(one, command=(sys.executable, "-c", "raise SystemExit(1)")), tmp_path)
    assert gpu.passed_before(one, tmp_path) is None
    run(one, tmp_path)
    assert gpu.passed_before(one, tmp_path)["state"] == "passed"
    monkeypatch.setattr(gpu, "code_hash", lambda: "of other code")
    assert gpu.passed_before(one, tmp_path) is None


def test_everything_goes_on_and_sums_up(tmp_path, monkeypatch):
    """The stage that failed runs again, the one that passed does not; a failed import ends it all."""
    counted = f"open({str(tmp_path / 'runs')!r}, 'a').write('x')"
    broken = [True]

    def stages(output):
        second = stage("raise SystemExit(1)" if broken[0] else "pass", name="second")
        return [stage(counted, name="imports"), second, stage("pass", name="third", left_out="no such tool")]

    monkeypatch.setattr(gpu, "stages", stages)
    monkeypatch.setattr(gpu, "describe", lambda device: {"device": "a GPU", "date": "2026-01-01", "driver": None})
    out = tmp_path / "out"
    assert not gpu.everything(out, 5, [])
    broken[0] = False
    assert gpu.everything(out, 5, [])
    assert (tmp_path / "runs").read_text() == "x"
    summary = (out / "summary.md").read_text()
    assert summary.startswith("# a GPU, 2026-01-01\n")
    for line in ("| imports | passed |", "| second | passed |", "| third | left out |", "- no such tool"):
        assert line in summary
    monkeypatch.setattr(gpu, "stages", lambda output: [stage("raise SystemExit(1)", name="imports"), stage(counted)])
    assert not gpu.everything(tmp_path / "other", 5, [])
    assert (tmp_path / "runs").read_text() == "x"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_tests_that_are_all_skipped_have_shown_nothing(tmp_path):
    """The real command of the stage: its settings need no plugin, and the reasons reach the summary."""
    tests = next(one for one in gpu.stages(tmp_path) if one.name == "tests")
    with gpu.checkout() as path:
        result = gpu.run_stage(tests, tmp_path, path, 600)
    assert (result["state"], result["code"]) == ("failed", 0), (tmp_path / "logs" / "tests.log").read_text()
    (counts, reason) = result["notes"]
    assert counts.endswith(" skipped")
    assert reason.endswith(": no CUDA device")


def test_every_stage_runs_something_that_is_there():
    commands = {one.name: one.command for one in gpu.stages(Path("out"))}
    assert {"step-sd15-b1", "step-sd15-b4", "step-sdxl-b1", "step-sd15-b1-compiled", "step-sd15-memory"} <= set(commands)
    assert {"tests", "kernel-tests", "bench-sd15", "bench-sdxl", "bench-compiled", "sanitizer-memcheck"} <= set(commands)
    for command in commands.values():
        for part in command:
            if part.startswith("tests/"):
                assert (gpu.ROOT / part).exists()


def test_hopper_is_compiled_with_its_own_instructions():
    """As `STAMINA_HOPPER` in csrc/cuda/CMakeLists.txt looks for them."""
    assert [gpu.architecture(one) for one in ((8, 0), (9, 0), (10, 0))] == ["80-real", "90a-real", "100-real"]
    assert gpu.architecture((9, 0)) in (gpu.ROOT / "csrc" / "cuda" / "CMakeLists.txt").read_text()
