"""What identifies a timing: the machine, the versions, and exactly which code ran."""

from __future__ import annotations

import hashlib
import importlib.metadata as metadata
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("stamina_fast", "kernels", "bench", "csrc")


def output_of(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def source_hash(folders: tuple[str, ...] = SOURCES) -> str:
    """SHA-256 over the names and bytes of all code in `folders`. It tells two versions apart where there is no git."""
    digest = hashlib.sha256()
    suffixes = {".py", ".cpp", ".cu", ".h", ".hpp", ".cuh"}
    # ROOT itself: an installed package holds kernels/ and bench/
    paths = [*ROOT.glob("*"), *(path for name in folders for path in (ROOT / name).rglob("*"))]
    found = {path for path in paths if path.suffix in suffixes}
    for path in sorted(found):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()


def commit() -> tuple[str | None, bool | None]:
    """(commit, whether tracked files differ from it), or (None, None) outside a git checkout."""
    # an installed package may lie in somebody else's repository
    if not (ROOT / ".git").exists():
        return None, None
    # the results themselves do not count: a bench writes them one after another
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)bench/results")
    return output_of("git", "rev-parse", "HEAD"), None if changed is None else bool(changed)


def describe(device: str) -> dict:
    """Everything a committed result says about where it comes from."""
    head, dirty = commit()
    facts = {
        "device": device_name(device), "cpu": cpu_name(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "platform": platform.platform(), "torch": torch.__version__,
        **{name: version(name) for name in ("triton", "peft", "numpy")},
        "commit": head, "dirty": dirty, "source": source_hash(), "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        query = output_of("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader")
        driver, clock, power = (query.splitlines()[0].split(", ") if query else (None, None, None))
        facts |= {
            "capability": f"sm_{properties.major}{properties.minor}", "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory, "l2_bytes": properties.L2_cache_size, "cuda": torch.version.cuda,
            "driver": driver, "most_clock": clock, "power_limit": power,
        }
    return facts
