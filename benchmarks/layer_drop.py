"""What LayerDrop saves: a deep stack at several rates against the stack without it: `python -m benchmarks.layer_drop`.

Layers that are left out are not computed, so that the time should be that of the layers which are kept. The keys of a
rate are such that the number of kept layers is the expected one.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

import dropjax
from benchmarks import timing

LAYERS, BATCH, WIDTH = 24, 256, 512
RATES = (0.0, 0.25, 0.5, 0.75, 1.0)


def block(x: Array, weights: tuple[Array, Array]) -> Array:
    """A residual block of two products."""
    return x + jnp.tanh(x @ weights[0]) @ weights[1]


def stack(x: Array, weights: tuple[Array, Array], keys: Array, rate: float | Array | None) -> Array:
    """All layers, one after another."""

    def layer(x: Array, of: tuple[Array, tuple[Array, Array]]) -> tuple[Array, None]:
        key, own = of
        return (block(x, own) if rate is None else dropjax.layer_drop(key, lambda x: block(x, own), x, rate)), None

    return lax.scan(layer, x, (keys, weights))[0]


def keys_that_keep(rate: float, expected: int) -> Array:
    """The first split of keys under which that many layers are kept."""
    draw = jax.jit(lambda seed: jax.random.split(jax.random.key(seed), LAYERS))
    count = jax.jit(jax.vmap(lambda key: dropjax.keep_mask(key, (), rate)))
    return next(keys for keys in map(draw, range(10_000)) if int(count(keys).sum()) == expected)


def measure(rounds: int, small: bool) -> dict[str, Any]:
    """Seconds of the passes at each rate, and their ratios to the stack without LayerDrop."""
    width, batch = (64, 8) if small else (WIDTH, BATCH)
    first, second, third = jax.random.split(jax.random.key(0), 3)
    shape = (LAYERS, width, width)
    weights = tuple(jax.random.normal(key, shape) / width for key in (first, second))
    x = jax.random.normal(third, (batch, width))
    forward: Any = jax.jit(stack, static_argnums=3)
    backward: Any = jax.jit(jax.grad(lambda *given: (stack(*given) ** 2).sum(), (0, 1)), static_argnums=3)
    keys = {rate: keys_that_keep(rate, round((1 - rate) * LAYERS)) for rate in RATES}
    results = {}
    for name, run in {"forward": forward, "forward and backward": backward}.items():
        runs: dict[str, Callable[[], Any]] = {"without": functools.partial(run, x, weights, keys[0.0], None)}
        for rate in RATES:
            runs[f"rate {rate:g}"] = functools.partial(run, x, weights, keys[rate], rate)
        seconds = timing.alternate(runs, rounds)
        ratios = timing.ratios(seconds, "without")
        kept = {"without": LAYERS} | {f"rate {rate:g}": round((1 - rate) * LAYERS) for rate in RATES}
        results[name] = {
            of: {"kept": kept[of], "milliseconds": 1e3 * sorted(seconds[of])[rounds // 2], "ratio": ratios[of]}
            for of in runs
        }
    return {"layers": LAYERS, "batch": batch, "width": width, "rounds": rounds, "passes": results}


def main() -> None:
    """Measures, prints the table and writes JSON under benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="rounds of alternating calls (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="a narrow stack, nothing written: tries the runner")
    options = parser.parse_args()
    results = measure(options.rounds, options.small)
    print(timing.environment())
    print(
        "| pass | | layers kept | ms | of the time without | layers kept / all |", "|---|---|---|---|---|---|", sep="\n"
    )
    for name, rows in results["passes"].items():
        for of, row in rows.items():
            share = row["kept"] / LAYERS
            print(f"| {name} | {of} | {row['kept']} | {row['milliseconds']:.1f} | {row['ratio']:.2f} | {share:.2f} |")
    if not options.small:
        print(f"wrote {timing.save('layer_drop', results).name}")


if __name__ == "__main__":
    main()
