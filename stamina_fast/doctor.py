"""What this machine can run, what is missing, and how to get it."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from . import dispatch


def requirements(extra: str | None = None) -> list[Requirement]:
    """What the installed package asks for on this platform; with `extra`, what that extra adds."""
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
    """(device, what it is) of everything torch can compute on; without a GPU, why."""
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


def report(console: Console) -> bool:
    """Print versions, devices and backends; whether everything that is required is there (extras are optional)."""
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
    verified = _table("verified on GPUs", "architecture", "default")
    for (major, minor), name in sorted(dispatch.VERIFIED.items()):
        verified.add_row(f"sm_{major}{minor}", name)
    if not dispatch.VERIFIED:
        verified.add_row("none yet", "reference, until a result is committed; backend= or STAMINA_BACKEND chooses another")
    console.print(verified, "")
    default = dispatch.choose(None, torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32)
    console.print(f"masked_linear on this machine runs on: {default}")
    console.print("everything required is there" if complete else "something required is missing: see the remedies above")
    return complete
