"""Several processes of a test, each a rank of the same training."""

import multiprocessing
import os
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
from stamina_fast.errors import StaminaError

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["stamina_fast.cli", "tinypipes", "tinyruns"])
SOON = timedelta(seconds=60)


def serve():
    """The process that the others are forked from finds what it is to import, which each of them would import otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        # the first call starts it, the others find it running
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
    serve()
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
