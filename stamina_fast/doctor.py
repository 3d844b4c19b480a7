"""What this machine can run, what is missing, and how to get it."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from .ops import dispatch

# what csrc/cuda is compiled for
ARCHITECTURES = ((8, 0), (8, 9), (9, 0), (10, 0))


def requirements(extra: str | None = None) -> list[Requirement]:
    """The requirements of the installed package on this platform; with `extra`, those that this extra adds."""
    wanted = [Requirement(line) for line in metadata.requires("stamina-fast") or []]
    plain = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    if extra is None:
        return plain
    return [r for r in wanted if r not in plain and r.marker.evaluate({"extra": extra})]


def installed(requirement: Requirement) -> tuple[bool, str, str]:
    """(fits, version, remedy) of one requirement."""
    remedy = f'pip install "{requirement.name}{requirement.specifier}"'
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return False, "missing", remedy
    fits = requirement.specifier.contains(version, prereleases=True)
    return fits, version, "" if fits else remedy


def devices() -> list[tuple[str, str]]:
    """(device, description) of every device of torch. Without a GPU, the last row says why."""
    cores = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}"
    rows = [("cpu", f"{platform.processor() or platform.machine()}, {cores}")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        architecture = f"sm_{properties.major}{properties.minor}"
        rows.append((f"cuda:{index}", f"{properties.name}, {architecture}, {properties.total_memory / 2**30:.0f} GiB"))
    if len(rows) == 1:
        if torch.version.cuda is None and torch.version.hip is None:
            reason = "this torch is a CPU build; with a GPU, install torch from an index that has CUDA builds"
        else:
            reason = "torch was built for one but finds none; look at the driver (nvidia-smi)"
        rows.append(("no GPU", reason))
    return rows


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _verified() -> Table:
    """The default backend on each GPU architecture that is compiled for, has a committed result, or is in this machine."""
    here = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    table = _table("default on GPUs", "architecture", "default", "why")
    for capability in sorted({*ARCHITECTURES, *dispatch.VERIFIED, *here}):
        name = "sm_{}{}".format(*capability)
        backend = dispatch.VERIFIED.get(capability)
        why = f"no result is committed for {name}" if backend is None else f"verified by the result committed for {name}"
        table.add_row(name, backend or "reference", why)
    return table


def report(console: Console) -> bool:
    """Print versions, devices and backends. Returns whether everything required is installed; extras are not required."""
    complete = True
    versions = _table(f"stamina-fast {metadata.version('stamina-fast')} on Python {platform.python_version()}",
                      "package", "installed", "wanted", "remedy")
    for extra in (None, "xformers"):
        for requirement in requirements(extra):
            fits, version, remedy = installed(requirement)
            complete &= fits or extra is not None
            name = requirement.name if extra is None else f"{requirement.name} (optional)"
            versions.add_row(name, version, str(requirement.specifier), remedy)
    console.print(versions, "")
    hardware = _table("devices", "device", "what")
    for row in devices():
        hardware.add_row(*row)
    console.print(hardware, "")
    backends = _table("backends", "backend", "state", "why")
    for name, (available, reason) in dispatch.backends().items():
        backends.add_row(name, "available" if available else "refused", reason)
    console.print(backends, "")
    console.print(_verified(), "")
    if not dispatch.VERIFIED:
        said = "no result is committed for any GPU yet: no kernel is a default; backend= or STAMINA_BACKEND chooses one"
        console.print(said, "", soft_wrap=True)
    default = dispatch.choose(None, torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32)
    console.print(f"masked_linear on this machine runs on: {default}")
    console.print("everything required is there" if complete else "something required is missing: see the remedies above")
    return complete
