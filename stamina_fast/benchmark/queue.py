"""The queue: cells in their folders, each run by one process at a time, over many commands and kills.

    OUT/cells/ID/cell.json        what the cell is
    OUT/cells/ID/lock             locked while a process works on the cell; the kernel unlocks it when that process ends
    OUT/cells/ID/run/             its RUN folder, from which a cell that was stopped goes on
    OUT/cells/ID/result.json      written last: the cell is done
    OUT/cells/ID/error.txt        why it failed; it is left alone until it is to be tried again

Each worker process walks over all cells and takes those that are open and that no other process, of this command or of
another one on the same folder, is working on. Then it waits for those of others, and takes over what they leave open.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path

import torch
from rich.console import Console

from ..errors import InputError, StaminaError
from ..io.files import make_folder, read_json, remove, write_bytes, write_json
from ..quiet import quiet
from ..threads import threads
from .cell import lighten, run_cell
from .plan import Cell, Plan, check, load_plan
from .report import write_report
from .subjects import Setup, Subjects, prepare

DONE, FAILED, OPEN = "done", "failed", "open"


class Stopped(BaseException):
    """The command that started this worker is gone."""


def run_benchmark(plan: str | Path | Plan, output: str | Path, *, workers: int = 1, retry: bool = False, progress: bool = True,
                  command: str | None = None, **setup) -> list[str]:
    """Run the cells of a plan in the folder `output`, and write the report there; return the ids of cells that are not done.

    plan      the name of a plan, a YAML file, or a Plan
    workers   cells at a time, each in a process of its own
    retry     try cells again that failed before
    command   what a person types for this call; the report says it
    setup     fields of `Setup`: model, concepts, features, device, threads, keep

    The same call goes on where it was stopped, by whatever. Raises StaminaError before anything is begun: for a method or an
    option that does not exist, and for a folder that was begun with another model or other concepts.
    """
    plan = plan if isinstance(plan, Plan) else load_plan(plan)
    setup, output, cells = Setup(**setup), Path(output), plan.cells()
    if workers < 1 or setup.threads < 1:
        raise InputError(f"workers and threads must be at least 1, got {workers} and {setup.threads}; pass more")
    check(cells)
    console = Console(quiet=not progress, markup=False, highlight=False, soft_wrap=True)
    with held(make_folder(output) / "set.lock"), threads(setup.threads):
        console.print("preparing the concepts, and what names them")
        prepare(output, plan, setup)
        note(output / "commands.json", command)
    for cell in cells:
        folder = make_folder(folder_of(output, cell))
        write_json(folder / "cell.json", cell.as_dict())
        if retry:
            with held(folder / "lock", wait=False) as mine:
                if mine:
                    remove(folder / "error.txt")
    Watch(output, cells, setup, console).run(workers)
    with held(output / "set.lock"):
        write_report(output)
    left = [cell for cell in cells if state(folder_of(output, cell)) != DONE]
    for cell in left:
        console.print(f"{cell.id}: {why(folder_of(output, cell))}")
    console.print(f"{len(cells) - len(left)} of {len(cells)} cells are done; {output / 'report.html'} says what they show")
    return [cell.id for cell in left]


def note(path: Path, command: str | None) -> None:
    """Add a command to a list of them, once."""
    known = read_json(path) if path.is_file() else []
    if command is not None and command not in known:
        write_json(path, [*known, command])


def folder_of(output: Path, cell: Cell) -> Path:
    return output / "cells" / cell.id


def state(folder: Path) -> str:
    """Whether the cell in a folder is done, has failed, or is open."""
    if (folder / "result.json").exists():
        return DONE
    return FAILED if (folder / "error.txt").exists() else OPEN


def why(folder: Path) -> str:
    """Why a cell is not done, in one line."""
    error = folder / "error.txt"
    if not error.exists():
        return "is not finished; the same command goes on with it"
    return f"failed: {error.read_text().strip().splitlines()[-1]}; {error} has more, --retry tries again"


@contextlib.contextmanager
def held(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file until the block ends or the process does. Yields False if another holds it and not `wait`.

    The file says which process holds it, or held it last.
    """
    try:
        import fcntl
    except ImportError as error:
        raise StaminaError("the benchmark needs the file locks of Linux or macOS; use one of these") from error
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            file.truncate(0)
            print(os.getpid(), file=file, flush=True)
            yield True


def work(said: connection.Connection, output: Path, cells: Sequence[Cell], setup: Setup) -> None:
    """The life of a worker: run the cells that are open, and say what begins, ends and fails."""
    quiet()
    torch.set_num_threads(setup.threads)
    subjects = Subjects.open(output, setup)
    # a broken pipe: the command is gone, and its worker goes too
    with contextlib.suppress(Stopped, KeyboardInterrupt, BrokenPipeError):
        # the second time, wait for cells that others are working on: they may be killed and leave them open
        for cell, wait in [*((cell, False) for cell in cells), *((cell, True) for cell in cells)]:
            folder = folder_of(output, cell)
            with held(folder / "lock", wait) as mine:
                stop_with_parent()
                if mine and state(folder) == OPEN:
                    attempt(said, cell, subjects, folder)
                elif mine and state(folder) == DONE and not setup.keep:
                    lighten(folder)


def attempt(said: connection.Connection, cell: Cell, subjects: Subjects, folder: Path) -> None:
    """Run one cell. What it raises goes to error.txt."""
    said.send(("begins", cell.id, None))
    start = time.perf_counter()
    try:
        run_cell(cell, subjects, folder, on_task=stop_with_parent)
    except Exception as error:
        write_bytes(folder / "error.txt", traceback.format_exc().encode())
        said.send(("failed", cell.id, " ".join(str(error).split()) or type(error).__name__))
    else:
        said.send(("done", cell.id, time.perf_counter() - start))


def stop_with_parent(*_) -> None:
    """Called between cells and concepts: a worker whose command was killed ends, and leaves its cell to the next command."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise Stopped


class Watch:
    """Starts the workers, says what they say, and replaces one that was killed as long as cells are left to begin."""

    def __init__(self, output: Path, cells: Sequence[Cell], setup: Setup, console: Console):
        self.output, self.cells, self.setup, self.console = output, cells, setup, console
        self.began, self.current, self.took = set(), {}, []
        self.todo = sum(state(folder_of(output, cell)) == OPEN for cell in cells)

    def run(self, workers: int) -> None:
        """Return when no worker is left."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["stamina_fast.benchmark.queue"])
        self.workers, live = workers, {}
        try:
            for _ in range(min(workers, self.todo)):
                self.start(context, live)
            while live:
                for ready in connection.wait(list(live)):
                    try:
                        self.hear(ready, *ready.recv())
                    except EOFError:
                        process = live.pop(ready)
                        process.join()
                        # one that died before it began a cell would die again
                        if process.exitcode and self.lost(ready, process.exitcode):
                            self.start(context, live)
        finally:
            for process in live.values():
                process.kill()

    def start(self, context, live: dict) -> None:
        """A worker for the cells that were not begun by a worker of this command."""
        cells = [cell for cell in self.cells if cell.id not in self.began]
        if any(state(folder_of(self.output, cell)) == OPEN for cell in cells):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(theirs, self.output, cells, self.setup))
            process.start()
            # the worker has the other end, and its death must close the pipe
            theirs.close()
            live[ours] = process

    def hear(self, worker, what: str, cell: str, more) -> None:
        """Say in one line what a worker said."""
        if what == "begins":
            self.began.add(cell)
            self.current[worker] = cell
            self.console.print(f"{cell}: begins, {len(self.began)} of {self.todo}")
            return
        self.current.pop(worker, None)
        if what == "done":
            self.took.append(more)
            self.console.print(f"{cell}: done in {timedelta(seconds=round(more))}, {self.left()} left")
        else:
            self.console.print(f"{cell}: failed: {more}")

    def lost(self, worker, code: int) -> bool:
        """Say that a worker was killed, and return whether it was working on a cell."""
        cell = self.current.pop(worker, None)
        remedy = "the same command goes on with it" if cell else "see its message above, and run the same command again"
        self.console.print(f"{cell or 'a worker'}: its process ended with code {code}; {remedy}")
        return cell is not None

    def left(self) -> str:
        """The time that the rest will take, by the mean of finished cells."""
        rounds = max(0, self.todo - len(self.took)) / self.workers
        return str(timedelta(seconds=round(rounds * sum(self.took) / len(self.took))))
