"""Every check and timing that needs a GPU, unattended and within a time: `make gpu`, or `python -m bench.gpu` in a checkout.

The stages run one after another, each in its own process with its own log and time limit. They build _C_cuda for this GPU, run
the GPU tests and compute-sanitizer, and then the bench in parts. The result is one folder to commit, with summary.md as its
overview. A second run continues: it skips stages that the same code has passed in that folder.

It needs torch, triton, numpy, pytest, safetensors and transformers; nvcc and cmake for _C_cuda; peft for its arms; diffusers,
pydantic, rich, pillow and pyyaml for the tests and timings of training; matplotlib for the plots. Nothing is installed: the
package runs from the checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

import torch

from .machine import ROOT, SOURCES, describe, source_hash

# what a training step needs besides torch
TRAINING = ("diffusers", "transformers", "pydantic", "rich", "PIL", "yaml")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


def code_hash() -> str:
    return source_hash((*SOURCES, "tests"))


def architecture(capability: tuple[int, int]) -> str:
    """What nvcc compiles for, as CMake spells it. "native" would leave out what only sm_90a has."""
    major, minor = capability
    return f"{major}{minor}{'a' if major == 9 else ''}-real"


@dataclass(frozen=True)
class Stage:
    """A command that ends within `limit` seconds, or is ended. `report` is the JUnit file of a stage of tests."""

    name: str
    command: tuple[str, ...]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    report: Path | None = None
    left_out: str = ""


def stages(output: Path) -> list[Stage]:
    """The most important stages come first, in case time runs out."""
    python = sys.executable
    imports = "import stamina_fast as sf, stamina_fast.kernels.masked_linear, stamina_fast.bench.run; print(sf.backends())"

    def tests(name: str, limit: float, *paths: str) -> Stage:
        report = output / "logs" / f"{name}.xml"
        settings = ("-c", "tests/gpu/pytest.ini", "--rootdir", str(ROOT), "--confcutdir", "tests/gpu", f"--junitxml={report}")
        command = (python, "-m", "pytest", *settings, *paths)
        return Stage(name, command, limit, {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, report)

    def build(limit: float) -> Stage:
        """Build _C_cuda into the package. If that fails, the later stages run with the other backends."""
        missing = [tool for tool in ("nvcc", "cmake") if not shutil.which(tool)]
        folder = output / "build"
        target = architecture(torch.cuda.get_device_capability()) if torch.cuda.is_available() else "native"
        settings = (f"-DPython_EXECUTABLE={python}", f"-DSTAMINA_CUDA_ARCHITECTURES={target}")
        steps = (
            ["cmake", "-S", str(ROOT), "-B", str(folder), *settings],
            ["cmake", "--build", str(folder), "--target", "_C_cuda", "--parallel"],
            ["cp", str(folder / "csrc" / "cuda" / "_C_cuda.so"), str(ROOT / "stamina_fast")],
            ["rm", "-r", str(folder)],
        )
        script = " && ".join(map(shlex.join, steps))
        return Stage("build", ("bash", "-c", script), limit, left_out=f"{' and '.join(missing)} not on PATH" if missing else "")

    def bench(plan: str, limit: float) -> Stage:
        suite = (python, "-m", "stamina_fast.bench.suite", plan, "--device", "cuda", "--output", str(output), "--resume")
        return Stage(f"bench-{plan}", (*suite, "--minutes", f"{0.9 * limit / 60:.2f}"), limit)

    def step(name: str, limit: float, *options: str) -> Stage:
        """A whole training step beside diffusers' loops."""
        missing = [package for package in TRAINING if find_spec(package) is None]
        command = (python, "-m", "stamina_fast.bench.step", "--device", "cuda", "--output", str(output / f"step-{name}.json"))
        # most of the time goes into random weights, and into steps that are marked, counted and traced
        timed = ("--seconds", f"{limit / 4:.0f}", "--rounds", "15", *options)
        left_out = f"training needs {', '.join(missing)}: not installed" if missing else ""
        return Stage(f"step-{name}", (*command, *timed), limit, left_out=left_out)

    def sanitizer(tool: str | None, limit: float) -> Stage:
        missing = "" if shutil.which("compute-sanitizer") else "compute-sanitizer is not on PATH; the CUDA toolkit has it"
        program = (python, "-m", "stamina_fast.bench.sanitize")
        if tool is None:
            # first without the tool, which compiles the kernels: under the tool that takes far longer
            return Stage("sanitizer-none", program, limit, left_out=missing)
        check = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *program)
        # without torch's caching allocator, so that the sanitizer knows the bounds of each tensor
        return Stage(f"sanitizer-{tool}", check, limit, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, left_out=missing)

    kernels = ["tests/kernels/test_kernels.py", "tests/ops/test_backends.py", "tests/ops/test_penalties.py"]
    return [
        build(240), Stage("imports", (python, "-c", imports), 90),
        tests("tests", 400, "tests/gpu"), bench("sd15", 180),
        step("sd15-b1", 150), step("sd15-b4", 150, "--batch", "4"), step("sdxl-b1", 210, "--model", "sdxl"),
        step("sd15-b1-compiled", 240, "--arm", "ours", "--arm", "frozen", "--channels-last", "--compile"),
        step("sd15-memory", 120, "--arm", "ours", "--checkpointing"), sanitizer(None, 150),
        *(sanitizer(tool, 90) for tool in SANITIZERS),
        tests("kernel-tests", 240, *kernels), bench("sdxl", 210), bench("compiled", 240), bench("ranks", 150),
        bench("dtypes", 100), bench("sd21", 120),
    ]


@contextlib.contextmanager
def checkout() -> Iterator[Path]:
    """A folder of links for PYTHONPATH with the whole package: stamina_fast/, and in it kernels/ and bench/."""
    with tempfile.TemporaryDirectory(prefix="stamina-fast-") as folder:
        (Path(folder) / "stamina_fast").mkdir()
        link_parts(Path(folder))
        yield Path(folder)


def link_parts(folder: Path) -> None:
    """Add links to parts of the package that the folder lacks, such as what a stage has built."""
    for part in (*(ROOT / "stamina_fast").iterdir(), ROOT / "kernels", ROOT / "bench"):
        link = folder / "stamina_fast" / part.name
        if part.name != "__pycache__" and not link.exists():
            link.symlink_to(part)


def ended(process: subprocess.Popen, limit: float) -> int | None:
    """The exit code, or None after `limit` seconds. In any case the whole process group is ended."""
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def count_tests(report: Path) -> tuple[Counter, Counter]:
    """({"passed" | "failed" | "skipped": tests}, {reason: skipped tests}) of a JUnit file."""
    outcomes, reasons = Counter(), Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        if skipped is not None:
            reasons[skipped.get("message", "")] += 1
        failed = case.find("failure") is not None or case.find("error") is not None
        outcomes["failed" if failed else "passed" if skipped is None else "skipped"] += 1
    return outcomes, reasons


def note_of(stage: Stage, log: Path) -> tuple[bool, list[str]]:
    """(whether the log or report lets the stage pass, lines for the summary)."""
    if stage.report is not None and stage.report.is_file():
        outcomes, reasons = count_tests(stage.report)
        lines = [", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))]
        lines += [f"skipped {count}: {reason}" for reason, count in reasons.most_common()]
        # a run that skipped every test proves nothing
        return outcomes["passed"] > 0 and not outcomes["failed"], lines
    trouble = r"RED|not run|: failed|left out|no cold times|no plots|: no (graph|eager),|runs uncaptured"
    wanted = re.compile(trouble + r"|ERROR SUMMARY|^visited|, by rounds |^peak |^left with ")
    return True, [line.strip() for line in log.read_text(errors="replace").splitlines() if wanted.search(line)]


def run_stage(stage: Stage, output: Path, path: Path, seconds: float) -> dict:
    """Run one stage within `seconds`; its record, which is also written to stages/NAME.json."""
    log, record = output / "logs" / f"{stage.name}.log", output / "stages" / f"{stage.name}.json"
    for file in (log, record):
        file.parent.mkdir(parents=True, exist_ok=True)
    limit, start = min(stage.limit, seconds), time.monotonic()
    if stage.left_out:
        result = {"state": "left out", "notes": [stage.left_out]}
    elif limit < min(30, stage.limit):
        result = {"state": "not run", "notes": ["the time was over; run again and it goes on here"]}
    else:
        if stage.report is not None:
            stage.report.unlink(missing_ok=True)
        paths = os.pathsep.join(filter(None, (str(path), os.environ.get("PYTHONPATH"))))
        # the working folder must not come before those paths: its stamina_fast has no kernels
        settings = {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", **stage.environment}
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | settings
        with log.open("w") as sink:
            process = subprocess.Popen(
                stage.command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
            )
            code = ended(process, limit)
        passed, notes = note_of(stage, log)
        state = f"stopped after {limit:.0f} s" if code is None else "passed" if code == 0 and passed else "failed"
        if state == "failed" and not notes:
            notes = log.read_text(errors="replace").splitlines()[-3:]
        result = {"state": state, "code": code, "notes": notes}
    result |= {"seconds": round(time.monotonic() - start, 1), "source": code_hash(), "command": list(stage.command)}
    record.write_text(json.dumps(result, indent=1) + "\n")
    return result


def passed_before(stage: Stage, output: Path) -> dict | None:
    """The record of a stage that the same code has passed in this folder."""
    record = output / "stages" / f"{stage.name}.json"
    if not record.is_file():
        return None
    result = json.loads(record.read_text())
    return result if result["state"] == "passed" and result["source"] == code_hash() else None


def summarize(output: Path, facts: dict, records: dict[str, dict]) -> None:
    """summary.md: the machine, then each stage with its state, time and notes."""
    lines = [f"# {facts['device']}, {facts['date'][:10]}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items() if value is not None]
    lines += ["", "| stage | state | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {record['state']} | {record['seconds']:.0f} |" for name, record in records.items()]
    for name, record in records.items():
        if record["notes"]:
            lines += ["", f"**{name}**", "", *(f"- {note}" for note in record["notes"])]
    (output / "summary.md").write_text("\n".join(lines) + "\n")


def everything(output: Path, minutes: float, only: list[str]) -> bool:
    """Run all stages (those whose name begins with one of `only`) within `minutes`; whether none failed or is missing."""
    output.mkdir(parents=True, exist_ok=True)
    end, records, facts = time.monotonic() + 60 * minutes, {}, describe("cuda")
    (output / "machine.json").write_text(json.dumps(facts, indent=1) + "\n")
    with checkout() as path:
        for stage in stages(output):
            record = passed_before(stage, output)
            if record is None:
                if only and not stage.name.startswith(tuple(only)):
                    continue
                print(f"{stage.name} …", flush=True)
                record = run_stage(stage, output, path, end - time.monotonic())
                link_parts(path)
            records[stage.name] = record
            print(f"{stage.name}: {record['state']}, {record['seconds']:.0f} s", *record["notes"], sep="\n  ", flush=True)
            summarize(output, facts, records)
            if stage.name == "imports" and record["state"] != "passed":
                break
    print(f"commit {output}; its summary.md has the rest")
    return all(record["state"] in ("passed", "left out") for record in records.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=os.environ.get("OUT"), help="default: $OUT, or in bench/results")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--only", action="append", default=[], help="stages whose name begins so; may be repeated")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA device and torch sees none: run it where there is one, with a CUDA build of torch",
              file=sys.stderr)
        sys.exit(2)
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    output = options.output or ROOT / "bench" / "results" / f"gpu-{name}-{datetime.now(UTC):%Y-%m-%d}"
    sys.exit(0 if everything(Path(output).resolve(), options.minutes, options.only) else 1)


if __name__ == "__main__":
    main()
