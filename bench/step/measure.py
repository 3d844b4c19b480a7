"""Measure the arms of a step: check that they train, time them in turns, record phases, launches, memory and a profile."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import stamina_fast as sf
from stamina_fast.training.capture import WARM

from .. import clock
from .arms import Arm
from .models import networks
from .phases import PHASES

# steps that every arm runs before it is timed. Their losses are compared, and a graph is recorded and replayed in them
CHECKED = WARM + 2
# a sample on a GPU: as many steps as fill this time, within this number
SAMPLE_SECONDS, MOST_STEPS = 0.3, 8
PHASE_STEPS = 5
PROFILED_STEPS = 3
NAMES_SHOWN = 25
# largest relative difference of losses that must be equal: of the first step, of all that are checked
AGREE = {torch.float32: (1e-4, 1e-2), torch.bfloat16: (2e-2, 1e-1)}


def on_gpu(arm: Arm) -> bool:
    return arm.case.device.startswith("cuda")


def wait(arm: Arm) -> None:
    if on_gpu(arm):
        torch.cuda.synchronize()


def begin(arm: Arm) -> dict:
    """Start an arm and run the steps to be checked: seconds of the start, losses, gradient, and which operators ran."""
    start = time.perf_counter()
    arm.start()
    wait(arm)
    seconds, before = time.perf_counter() - start, Counter(sf.launches())
    losses = []
    for _ in range(CHECKED):
        arm()
        losses.append(arm.loss.item())
    ran = Counter(sf.launches()) - before
    return {"start_s": seconds, "losses": losses, "gradient": arm.gradient(), "operators": dict(ran)}


def judge(arms: list[Arm], facts: dict[str, dict]) -> list[str]:
    """A line for every arm that does not train, or that differs from the eager reference where it must not."""
    red = []
    for arm in arms:
        found = facts[arm.name]
        if not all(map(math.isfinite, (*found["losses"], found["gradient"]))) or found["gradient"] <= 0:
            red.append(f"{arm.name} does not train: losses {found['losses']}, gradient {found['gradient']}")
        if getattr(arm, "wanted", False) and not arm.captured.recordings:
            red.append(f"{arm.name} was not captured, the log says why")
        ran = {name.split("/")[1] for name in found["operators"]}
        wanted = {arm.backend} if getattr(arm, "backend", None) else set()
        if ran != wanted:
            red.append(f"{arm.name} ran the operators {found['operators']}, wanted those of {wanted or 'nobody'}")
    specified = facts.get("reference", {}).get("losses")
    for arm in arms:
        if specified is None or not hasattr(arm, "backend"):
            continue
        # A B = 0 at first, so the frozen step has the same first loss, and others later
        count = CHECKED if arm.backend else 1
        apart = [abs(a - b) / abs(b) for a, b in zip(facts[arm.name]["losses"], specified, strict=True)][:count]
        first, later = AGREE[arm.case.dtype]
        if apart[0] > first or max(apart) > later:
            red.append(f"{arm.name} differs from the reference: losses {facts[arm.name]['losses']}, wanted {specified}")
    return red


def sample(arm: Arm) -> Callable[[], float]:
    """Milliseconds of a step. On a GPU several are timed together, since the host runs ahead in training."""


    def on_host() -> float:
        start = time.perf_counter()
        arm()
        return 1e3 * (time.perf_counter() - start)

    if not on_gpu(arm):
        return on_host
    count = max(1, min(MOST_STEPS, round(1e3 * SAMPLE_SECONDS / clock.event_time(arm, 1))))

    def several() -> None:
        for _ in range(count):
            arm()

    return lambda: clock.event_time(several, count)


def phases(arms: list[Arm]) -> dict[str, dict[str, float]]:
    """{arm: milliseconds by phase}: medians over steps that wait for the device at every mark. The first step is left out."""
    turns = [{arm.name: arm.once() for arm in arms} for _ in range(1 + PHASE_STEPS)][1:]
    return {
        arm.name: {name: 1e3 * statistics.median(turn[arm.name].get(name, 0.0) for turn in turns) for name in PHASES}
        for arm in arms
    }


def look(arm: Arm) -> float:
    """Seconds that the host takes to read the state of a run."""
    start = time.perf_counter()
    arm.look()
    wait(arm)
    return time.perf_counter() - start


class Dispatches(TorchDispatchMode):
    """Counts the operators that reach a device, below autograd."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def launches(arm: Arm) -> dict[str, int]:
    """Of one step. CPU: operators dispatched. GPU: kernels run, and calls by which the host launched work of any kind."""
    if not on_gpu(arm):
        with Dispatches() as dispatches:
            arm()
        return {"dispatches": dispatches.count}
    with traced(arm) as profiler:
        arm()
        wait(arm)
    kernels = sum(not event.name.startswith(("Memcpy", "Memset")) for event in device_events(profiler))
    asked = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")
    return {"kernels": kernels, "host launches": sum(event.name.startswith(asked) for event in profiler.events())}


def traced(arm: Arm):
    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu(arm) else [ProfilerActivity.CPU]
    return profile(activities=kinds)


def device_events(profiler) -> list:
    """What ran on the GPU, without the spans of annotations that the profiler shows there too."""
    return [event for event in profiler.events() if event.device_type == DeviceType.CUDA and not event.is_user_annotation]


def remains(arm: Arm) -> list[dict]:
    """Where a step's time goes, in milliseconds, largest first: kernels on a GPU, operators on a CPU."""
    with traced(arm) as profiler:
        for _ in range(PROFILED_STEPS):
            arm()
        wait(arm)
    spent, calls = Counter(), Counter()
    for event in device_events(profiler) if on_gpu(arm) else profiler.events():
        spent[event.name] += event.time_range.elapsed_us() if on_gpu(arm) else event.self_cpu_time_total
        calls[event.name] += 1
    shown = [name for name, _ in spent.most_common(NAMES_SHOWN)]
    rest = "all others"
    for name in spent.keys() - set(shown):
        spent[rest] += spent[name]
        calls[rest] += calls[name]
    return [{"name": name, "ms": spent[name] / 1e3 / PROFILED_STEPS, "calls": calls[name] / PROFILED_STEPS}
            for name in (*shown, rest)]


def storages(modules: list[nn.Module]) -> dict[int, int]:
    """{address: bytes} of the memory behind all parameters and buffers, each counted once."""
    tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def grown(call: Callable[[], object], device: str) -> tuple[int, int]:
    """(bytes still held, most bytes held) of what `call` allocated, off the allocator."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    moves = sorted((e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    held = list(itertools.accumulate((nbytes for _, nbytes in moves), initial=0))
    return held[-1], max(held)


def memory(arm: Arm, held: int, common: dict[int, int]) -> dict[str, int]:
    """Bytes of a training with this arm alone: its networks, what it trains with, and the peak of a step.

    held     bytes that stayed after its start and first steps
    common   storages of the networks that the arms share; those of them that the arm still uses are its own here
    """
    weights = sum(nbytes for address, nbytes in storages(networks(arm.pipeline)).items() if address in common)
    with arm.eager():
        _, peak = grown(arm, arm.case.device)
    return {"networks": weights, "own": held, "step": peak, "peak": weights + held + peak}
