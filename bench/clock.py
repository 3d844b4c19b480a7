"""Clocks. All arms of a comparison take turns in one run, and each round shuffles their order.

On a GPU, device events time an arm in four modes. It is replayed as a CUDA graph or launched eagerly, and the L2 is warm (the
same memory every time) or cold (copies in rotation, together several times the L2). On a CPU there is one mode.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from .arms import Arm
from .problem import Case

CPU_MODE = "cpu"
GPU_MODES = ("graph, warm", "graph, cold", "eager, warm", "eager, cold")
# a sample lasts at least this long, by repeating the call
SAMPLE_SECONDS = 1e-3
MOST_COPIES = 32
FEWEST_ROUNDS = 5


def copies_needed(case: Case, nbytes: int) -> int:
    """Copies of a problem of `nbytes` that fill three times the L2; 1, and no cold mode, if these are over MOST_COPIES."""
    if not case.device.startswith("cuda"):
        return 1
    cache = torch.cuda.get_device_properties(case.device).L2_cache_size
    copies = max(2, math.ceil(3 * cache / nbytes))
    return copies if copies <= MOST_COPIES else 1


def take_turns(samples: dict[str, Callable[[], float]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every sample in every round. A first round is not counted; it tells how many rounds fit `seconds`."""
    order, times = list(samples), {name: [] for name in samples}
    shuffle = random.Random(0).shuffle
    start = time.perf_counter()
    for sample in samples.values():
        sample()
    fit = int(seconds / max(1e-9, time.perf_counter() - start))
    for _ in range(min(rounds, max(FEWEST_ROUNDS, fit))):
        shuffle(order)
        for name in order:
            times[name].append(samples[name]())
    return times


def cpu_sample(arm: Arm) -> Callable[[], float]:
    call = arm.calls[0]
    start = time.perf_counter()
    call()
    repeats = max(1, min(100, round(SAMPLE_SECONDS / (time.perf_counter() - start))))

    def sample() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return 1e3 * (time.perf_counter() - start) / repeats

    return sample


def event_time(run: Callable[[], None], calls: int) -> float:
    """Milliseconds of one of the `calls` that `run` enqueues, between two events on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def gpu_sample(arm: Arm, mode: str, stream: torch.cuda.Stream, pool) -> Callable[[], float]:
    """One timed replay or launch of several calls: of all copies in turn if cold, of the first one every time if warm.

    Raises RuntimeError where the arm cannot be captured.
    """
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in arm.calls:
            call()
        once = event_time(arm.calls[0], 1)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    warm = mode.endswith("warm")
    calls = arm.calls[:1] * max(1, min(20, round(1e3 * SAMPLE_SECONDS / once))) if warm else arm.calls

    def launch() -> None:
        for call in calls:
            call()

    run = launch
    if mode.startswith("graph"):
        graph = torch.cuda.CUDAGraph()
        # nobody reads the results of one graph after another's replay, so all graphs share one pool of memory
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            launch()
        run = graph.replay

    def sample() -> float:
        if warm:
            run()
        return event_time(run, len(calls))

    return sample


def time_arms(arms: list[Arm], mode: str, rounds: int, seconds: float) -> tuple[dict[str, list[float]], dict[str, str]]:
    """({arm: milliseconds}, {arm: why it could not be captured})."""
    samples, refused = {}, {}
    pool = torch.cuda.graph_pool_handle() if mode.startswith("graph") else None
    stream = torch.cuda.Stream() if mode in GPU_MODES else None
    for arm in arms:
        try:
            samples[arm.name] = cpu_sample(arm) if stream is None else gpu_sample(arm, mode, stream, pool)
        except RuntimeError as error:
            if pool is None:
                raise
            refused[arm.name] = str(error).splitlines()[0]
    return take_turns(samples, rounds, seconds), refused


def memory(arms: list[Arm], device: str) -> dict[str, tuple[int, int]]:
    """{arm: (bytes kept for backward beyond y, most bytes held during forward + backward)}, beyond what was there before.

    It is read off the allocator, which sees everything, and not off what autograd says it saved.
    """
    gc.collect()
    return gpu_memory(arms) if device.startswith("cuda") else cpu_memory(arms)


def size(y: Tensor | tuple[Tensor, ...]) -> int:
    return sum(part.nbytes for part in (y if isinstance(y, tuple) else (y,)))


def gpu_memory(arms: list[Arm]) -> dict[str, tuple[int, int]]:
    found = {}
    for arm in arms:
        product = arm.products[0]
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = product.compute()
        kept = torch.cuda.memory_allocated() - before - size(y)
        del y
        torch.cuda.reset_peak_memory_stats()
        product.backward()
        found[arm.name] = kept, torch.cuda.max_memory_allocated() - before
    return found


def cpu_memory(arms: list[Arm]) -> dict[str, tuple[int, int]]:
    """One recording of all arms: every allocation and release, with marks around each arm."""
    results = {}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for arm in arms:
            with record_function(f"kept: {arm.name}"):
                y = arm.products[0].compute()
            results[arm.name] = size(y)
            del y
            with record_function(f"peak: {arm.name}"):
                gradients = arm.products[0].backward()
            del gradients
    events = profiler.profiler.kineto_results.events()
    moves = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    marks = {event.name(): (event.start_ns(), event.start_ns() + event.duration_ns()) for event in events}

    def held(mark: str) -> list[int]:
        start, end = marks[mark]
        return list(itertools.accumulate((nbytes for when, nbytes in moves if start <= when <= end), initial=0))

    return {name: (held(f"kept: {name}")[-1] - y, max(held(f"peak: {name}"))) for name, y in results.items()}


def roofs(case: Case) -> dict[str, float]:
    """Measured roofs: bytes a second of a copy far larger than any cache, and FLOP a second of a large square product."""
    on_device = case.device.startswith("cuda")
    count, side = (1 << 30, 8192) if on_device else (1 << 26, 512)
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=case.device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=case.device).to(case.dtype) for _ in range(2))
    product = torch.empty_like(left)

    def once(run: Callable[[], None]) -> float:
        if on_device:
            return event_time(run, 1) / 1e3
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def fastest(run: Callable[[], None]) -> float:
        # half precision on a CPU without instructions for it takes seconds
        times, start = [once(run)], time.perf_counter()
        while len(times) < 8 and time.perf_counter() - start < 1:
            times.append(once(run))
        return min(times)

    copy, gemm = fastest(lambda: target.copy_(source)), fastest(lambda: torch.mm(left, right, out=product))
    return {"copy_bytes_per_s": 2 * count / copy, "gemm_flop_per_s": 2 * side**3 / gemm}
