"""How everything here is timed: in one process, alternating, by medians of per-round ratios."""

import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"


def alternate(runs: Mapping[str, Callable[[], Any]], rounds: int = 21, *, rest: float = 0) -> dict[str, list[float]]:
    """Seconds of each run in each round; every round calls each run once, after one call to warm up.

    Each round has an order of its own, since what ran before leaves caches and threads in some state. Before each
    run there are `rest` seconds, in which another library's threads may stop waiting for work on all cores.
    """
    for run in runs.values():
        jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            time.sleep(rest)
            begin = time.perf_counter()
            jax.block_until_ready(runs[name]())
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratios(seconds: Mapping[str, list[float]], base: str) -> dict[str, float]:
    """The median over rounds of each run's time over that of the base in the same round."""
    return {
        name: statistics.median(a / b for a, b in zip(values, seconds[base], strict=True))
        for name, values in seconds.items()
    }


def chained(step: Callable[[Any], Any], x: jax.Array, *, ahead: bool = False) -> Callable[[], Any]:
    """A run on warm buffers: the step's input is donated and its output is the next input.

    Compiled ahead of time it stays what it is when jit's caches are cleared, but is dispatched more slowly.
    """
    compiled: Callable[[Any], Any] = jax.jit(step, donate_argnums=0)
    if ahead:
        compiled = jax.jit(step, donate_argnums=0).lower(x).compile()
    box = [compiled(x)]

    def run() -> Any:
        box[0] = compiled(box[0])
        return box[0]

    return run


def environment() -> dict[str, str]:
    """Versions and device, to stand beside every figure."""
    packages = {name: metadata.version(name) for name in ["jax", "jaxlib", "flax", "dropjax"]}
    processor = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        pass
    device = jax.devices()[0].device_kind
    return packages | {"python": platform.python_version(), "device": device, "processor": processor}


def save(name: str, results: Any) -> Path:
    """Writes results with the environment under benchmarks/results/."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")
    return path
