"""Dropout against the traffic it cannot avoid, against its peers, and inside programs: `python -m benchmarks.dropout`.

`x * 2` reads an array and writes an array, as dropout must. `fresh` writes into new memory, which pays page
faults; `warm` donates the input's buffer, as inside a training step. Every ratio is the median of the ratios of
rounds in which all runs take turns.
"""

import argparse
import functools
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax import Array
from tqdm import tqdm

import dropjax
from benchmarks import programs, timing

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RATE = 0.1
Step = Callable[[Array], Array]
Row = dict[str, Any]
SHAPES = [
    *((2**k, 2**k) for k in range(6, 14)),
    *((2**k, 64) for k in (10, 14, 16, 18, 20)),
    *((2**k, 2**18) for k in (0, 4, 8)),
    (8, 8, 8, 8), (64, 64, 64, 64), (64, 64, 128, 128),
]  # fmt: skip


def dropjax_steps(key: Array) -> dict[str, Step]:
    """The copy, and ours forward and backward."""

    def ours(x: Array) -> Array:
        return dropjax.dropout(key, x, RATE)

    return {
        "x * 2": lambda x: x * np.array(2, x.dtype),
        "dropjax": ours,
        "dropjax backward": lambda x: jax.vjp(ours, x)[1](x)[0],
    }


def flax_step(impl: str) -> Step:
    """Flax's layer with a key of an implementation."""
    key = jax.random.key(0, impl=impl)
    layer: Any = nn.Dropout(RATE, deterministic=False)
    return lambda x: layer.apply({}, x, rngs={"dropout": key})


def peer_steps(key: Array) -> dict[str, Step]:
    """The peers that are installed; each maps an array to an array of its shape."""
    steps: dict[str, Step] = {}
    for impl in ["threefry2x32", "philox2x32", "rbg", "unsafe_rbg"]:
        try:
            steps[f"flax, {impl}"] = flax_step(impl)
        except ValueError:  # not in this version of JAX
            continue
    if importlib.util.find_spec("keras"):
        import keras

        layer = keras.layers.Dropout(RATE, seed=0)
        state = [variable.value for variable in layer.non_trainable_variables]
        steps["keras"] = lambda x: layer.stateless_call([], state, x, training=True)[0]
    if importlib.util.find_spec("equinox"):
        import equinox

        dropout = equinox.nn.Dropout(RATE)
        steps["equinox"] = lambda x: dropout(x, key=key)
    if importlib.util.find_spec("haiku"):
        import haiku

        steps["haiku"] = lambda x: haiku.dropout(key, RATE, x)
    return steps


def runs_of(steps: dict[str, Step], shape: tuple[int, ...], dtype: Any, kind: str) -> dict[str, Callable[[], Any]]:
    """Runs of compiled steps, on one input that stays or each on a buffer of its own that it hands on."""
    if kind == "warm":
        return {name: timing.chained(step, jnp.ones(shape, dtype)) for name, step in steps.items()}
    x = jnp.ones(shape, dtype)
    return {name: functools.partial(jax.jit(step), x) for name, step in steps.items()}


def torch_runs(shape: tuple[int, ...], dtype: str, kind: str) -> dict[str, Callable[[], Any]]:
    """PyTorch's dropout on the CPU, in place where the buffer is warm."""
    if not importlib.util.find_spec("torch"):
        return {}
    import torch

    x = torch.ones(shape, dtype=getattr(torch, dtype))
    drop = torch.nn.functional.dropout
    return {"torch": lambda: drop(x, RATE, training=True, inplace=kind == "warm")}


def measure(shape: tuple[int, ...], dtype: Any, rounds: int, *, peers: bool) -> Row:
    """Milliseconds and ratios to `x * 2`, fresh and warm, for one shape and dtype."""
    key, name = jax.random.key(0), jnp.dtype(dtype).name
    row: Row = {"shape": shape, "elements": int(np.prod(shape)), "dtype": name}
    for kind in ["fresh", "warm"]:
        others = peer_steps(key) if peers else {"flax, threefry2x32": flax_step("threefry2x32")}
        runs = runs_of(dropjax_steps(key) | others, shape, dtype, kind)
        if peers:
            runs |= torch_runs(shape, name, kind)
        seconds = timing.alternate(runs, rounds, rest=0.3 if peers else 0)
        row[kind] = {
            "ms": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
            "times x * 2": timing.ratios(seconds, "x * 2"),
            "times dropjax": timing.ratios(seconds, "dropjax"),
        }
    return row


def cores(rounds: int) -> programs.Figures:
    """New memory, 4096 x 4096 of float32: times of `x * 2`, and on how many cores, of filling it and of dropout."""
    steps = dropjax_steps(jax.random.key(0)) | {"zeros": lambda x: jnp.zeros_like(x) + x[0, 0]}
    runs = runs_of(steps, (4096, 4096), jnp.float32, "fresh")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    used: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(4 * rounds):
        for name in [*runs][i % len(runs) :] + [*runs][: i % len(runs)]:
            begin, busy = time.perf_counter(), time.process_time()
            jax.block_until_ready(runs[name]())
            seconds[name].append(time.perf_counter() - begin)
            used[name].append((time.process_time() - busy) / seconds[name][-1])
    times = timing.ratios(seconds, "x * 2")
    return {f"{name}: times": times[name] for name in runs} | {
        f"{name}: cores": statistics.median(used[name]) for name in runs
    }


def table(rows: list[Row]) -> str:
    """The sizes as Markdown; every figure but the first is a ratio to `x * 2`, the last one to dropjax."""
    lines = [
        "| shape | dtype | | `x * 2`, ms | dropjax | backward | flax | flax / dropjax |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for kind in ["fresh", "warm"]:
            times, shape = row[kind]["times x * 2"], " x ".join(map(str, row["shape"]))
            flax = "flax, threefry2x32"
            lines.append(
                f"| {shape} | {row['dtype']} | {kind} | {row[kind]['ms']['x * 2']:.3g} | {times['dropjax']:.2f} "
                f"| {times['dropjax backward']:.2f} | {times[flax]:.1f} | {row[kind]['times dropjax'][flax]:.1f} |"
            )
    return "\n".join(lines)


def peer_table(rows: list[Row]) -> str:
    """Each peer's time over ours, as Markdown."""
    columns = [(row, kind) for row in rows for kind in ["fresh", "warm"]]
    head = [f"{row['dtype']} {kind}" for row, kind in columns]
    lines = ["| time over dropjax's | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for name in rows[0]["fresh"]["ms"]:
        figures = [row[kind]["times dropjax"][name] for row, kind in columns]
        lines.append(f"| {name} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")
    return "\n".join(lines)


def plot(rows: list[Row], path: str) -> None:
    """Time against size for square arrays, with the line of the copy."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    colours = {"x * 2": "#777777", "dropjax": "#0072B2", "flax, threefry2x32": "#D55E00"}
    for axis, dtype in zip(axes, ["float32", "bfloat16"], strict=True):
        square = [r for r in rows if r["dtype"] == dtype and len(r["shape"]) == 2 and r["shape"][0] == r["shape"][1]]
        for name, colour in colours.items():
            for kind, style in {"fresh": ":", "warm": "-"}.items():
                label = f"{name.partition(',')[0]}, {'new memory' if kind == 'fresh' else 'warm buffer'}"
                times = [row[kind]["ms"][name] for row in square]
                axis.loglog([row["elements"] for row in square], times, style, color=colour, label=label)
        axis.set_title(dtype)
        axis.set_xlabel("elements of a square array")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds for one call")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Measures, prints the tables, and writes JSON and the plot under benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="rounds of alternating calls (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="two small shapes, nothing written: tries the runner")
    options = parser.parse_args()
    shapes = [s for s in SHAPES if np.prod(s) == 2**12] if options.small else SHAPES
    dtypes = [jnp.float32, jnp.bfloat16]
    cases = [(shape, dtype) for dtype in dtypes for shape in shapes]
    rows = [measure(shape, dtype, options.rounds, peers=False) for shape, dtype in tqdm(cases, desc="shapes")]
    square = (64, 64) if options.small else (4096, 4096)
    peers = [measure(square, dtype, options.rounds, peers=True) for dtype in tqdm(dtypes, desc="peers")]
    small = [programs.residuals, programs.importing, programs.eager]
    inside = {}
    for case in tqdm(small if options.small else [cores, *programs.CASES], desc="programs"):
        inside[(case.__doc__ or "").strip()] = case(options.rounds)
    print(timing.environment(), table(rows), peer_table(peers), sep="\n\n", end="\n\n")
    for title, figures in inside.items():
        print(title, *(f"  {name}: {figure:.3g}" for name, figure in figures.items()), sep="\n")
    if not options.small:
        path = timing.save("dropout", {"sizes": rows, "peers": peers, "programs": inside})
        plot(rows, str(path.with_suffix(".png")))
        print(f"wrote {path.relative_to(path.parent.parent.parent)} and its plot")


if __name__ == "__main__":
    main()
