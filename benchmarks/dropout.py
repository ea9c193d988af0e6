"""Dropout against the traffic it cannot avoid, and against Flax: `python -m benchmarks.dropout`.

`x * 2` reads an array and writes an array, as dropout must. `fresh` writes into new memory, which pays page
faults; `warm` donates the input's buffer, as inside a training step.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from tqdm import tqdm

import dropjax
from benchmarks import timing

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RATE = 0.1
Row = dict[str, Any]
SHAPES = [*((2**k, 2**k) for k in range(6, 14)), (2**16, 64), (2**20, 64), (64, 64, 64, 64)]


def steps(key: jax.Array) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """What is compared: each maps an array to an array of its shape."""
    flax = nn.Dropout(RATE, deterministic=False)

    def ours(x: jax.Array) -> jax.Array:
        return dropjax.dropout(key, x, RATE)

    def backward(x: jax.Array) -> jax.Array:
        return jax.vjp(ours, x)[1](x)[0]

    return {
        "x * 2": lambda x: x * np.array(2, x.dtype),
        "dropjax": ours,
        "dropjax backward": backward,
        "flax": lambda x: flax.apply({}, x, rngs={"dropout": key}),
    }


def measure(shape: tuple[int, ...], dtype: Any, rounds: int) -> Row:
    """Milliseconds and ratios to `x * 2`, fresh and warm, for one shape and dtype."""
    row: Row = {"shape": shape, "elements": int(np.prod(shape)), "dtype": jnp.dtype(dtype).name}
    for kind in ["fresh", "warm"]:
        x = jnp.ones(shape, dtype)
        runs: dict[str, Callable[[], Any]] = {}
        for name, step in steps(jax.random.key(0)).items():
            if kind == "warm":
                runs[name] = timing.chained(step, jnp.ones(shape, dtype))
            else:
                runs[name] = functools.partial(jax.jit(step), x)
        seconds = timing.alternate(runs, rounds)
        row[kind] = {
            "ms": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
            "times x * 2": timing.ratios(seconds, "x * 2"),
            "flax over dropjax": timing.ratios(seconds, "dropjax")["flax"],
        }
    return row


def table(rows: list[Row]) -> str:
    """The rows as Markdown; every figure but the first is a ratio."""
    lines = [
        "| shape | dtype | | `x * 2`, ms | dropjax | backward | flax | flax / dropjax |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for kind in ["fresh", "warm"]:
            times, shape = row[kind]["times x * 2"], " x ".join(map(str, row["shape"]))
            lines.append(
                f"| {shape} | {row['dtype']} | {kind} | {row[kind]['ms']['x * 2']:.3g} | {times['dropjax']:.2f} "
                f"| {times['dropjax backward']:.2f} | {times['flax']:.1f} | {row[kind]['flax over dropjax']:.1f} |"
            )
    return "\n".join(lines)


def plot(rows: list[Row], path: str) -> None:
    """Time against size for square arrays, with the line of the copy."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    colours = {"x * 2": "#777777", "dropjax": "#0072B2", "flax": "#D55E00"}
    for axis, dtype in zip(axes, ["float32", "bfloat16"], strict=True):
        square = [
            row
            for row in rows
            if row["dtype"] == dtype and len(row["shape"]) == 2 and row["shape"][0] == row["shape"][1]
        ]
        for name, colour in colours.items():
            for kind, style in {"fresh": ":", "warm": "-"}.items():
                times = [row[kind]["ms"][name] for row in square]
                axis.loglog([row["elements"] for row in square], times, style, color=colour, label=f"{name}, {kind}")
        axis.set_title(dtype)
        axis.set_xlabel("elements")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures, prints the table, and writes JSON and the plot under benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="rounds of alternating calls (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="only arrays below 2^20 elements, to try the runner")
    options = parser.parse_args()
    shapes = [s for s in SHAPES if not options.small or np.prod(s) < 2**20]
    cases = [(shape, dtype) for dtype in (jnp.float32, jnp.bfloat16) for shape in shapes]
    rows = [measure(shape, dtype, options.rounds) for shape, dtype in tqdm(cases, desc="shapes")]
    print(timing.environment())
    print(table(rows))
    if not options.small:
        path = timing.save("dropout", rows)
        plot(rows, str(path.with_suffix(".png")))
        print(f"wrote {path.relative_to(path.parent.parent.parent)} and its plot")


if __name__ == "__main__":
    main()
