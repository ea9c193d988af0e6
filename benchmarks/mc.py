"""Monte Carlo dropout: a hundred samples against one pass, and against a Python loop of passes.

python -m benchmarks.mc [--quick] [--rounds 7]
python -m benchmarks.mc --devices 2                  samples shared among CPU devices, into mc_mesh.json
"""

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import dropjax
from benchmarks import timing
from dropjax import mc

T = 100
Row = dict[str, float]


class Convolutional(nn.Module):
    """Four convolutions, and dropout in the head alone."""

    @nn.compact
    def __call__(self, x: Array, key: Array | None = None) -> Array:
        """Returns logits of images `[n, 32, 32, 3]`."""
        for features, stride in ((32, 1), (64, 2), (128, 2), (128, 2)):
            x = nn.relu(nn.Conv(features, (3, 3), strides=stride)(x))
        x = nn.relu(nn.Dense(128)(x.mean((1, 2))))
        return nn.Dense(10)(x if key is None else dropjax.dropout(key, x, 0.5))


def network(batch: int, *, of_inputs: bool = True) -> tuple[Callable[..., Array], Any, Array]:
    """784-1200-1200-10 with dropout before every layer (or not before the first); the pass, its weights, an input."""
    rng = np.random.default_rng(0)
    sizes = (784, 1200, 1200, 10)
    weights = [jnp.asarray(rng.normal(0, (2 / m) ** 0.5, (m, n)), jnp.float32) for m, n in itertools.pairwise(sizes)]

    def one_pass(key: Array | None, weights: Any, x: Array) -> Array:
        for i, w in enumerate(weights):
            if key is not None and (i > 0 or of_inputs):
                x = dropjax.dropout(jax.random.fold_in(key, i), x, 0.5)
            x = x @ w
            x = x if i == len(weights) - 1 else jax.nn.relu(x)
        return x

    return one_pass, weights, jnp.asarray(rng.uniform(size=(batch, 784)), jnp.float32)


def memory(fn: Callable[..., Any], *arguments: Any) -> int:
    """Bytes of temporary memory of the compiled program."""
    analysis: Any = jax.jit(fn).lower(*arguments).compile().memory_analysis()
    return analysis.temp_size_in_bytes


def head_only(rounds: int, batch: int) -> Row:
    """T samples of a network with dropout in its head, in times of one deterministic pass."""
    model: Any = Convolutional()
    key = jax.random.key(0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, 32, 32, 3)), jnp.float32)
    variables = model.init(jax.random.key(1), x)
    ours: Any = jax.jit(lambda v, x, key: mc.classify(lambda key: model.apply(v, x, key), key, T, chunk_size=10))
    once: Any = jax.jit(lambda v, x: jax.nn.softmax(model.apply(v, x)))
    seconds = timing.alternate({"once": lambda: once(variables, x), "ours": lambda: ours(variables, x, key)}, rounds)
    share = mc.explain(lambda key: model.apply(variables, x, key), key).share
    return {"batch": batch, "ratio": timing.ratios(seconds, "once")["ours"], "share of FLOPs shared": share}


def against_a_loop(rounds: int, batch: int, chunk_size: int, *, of_inputs: bool = True) -> Row:
    """The summary of T samples in times of a loop of T jitted passes, and that loop without any dropout."""
    one_pass, weights, x = network(batch, of_inputs=of_inputs)
    key = jax.random.key(0)
    jitted: Any = jax.jit(one_pass)
    folded: Any = jax.jit(jax.random.fold_in)

    def ours(key: Array, weights: Any, x: Array) -> Any:
        return mc.classify(lambda key: one_pass(key, weights, x), key, T, chunk_size=chunk_size)

    def chunk(keys: Array, weights: Any, x: Array) -> Array:
        return jax.vmap(lambda key: one_pass(key, weights, x))(keys)

    def loop() -> Any:
        return [jitted(folded(key, t), weights, x) for t in range(T)]

    streamed: Any = jax.jit(ours)
    runs = {
        "loop": loop, "ours": lambda: streamed(key, weights, x),
        "loop without": lambda: [jitted(None, weights, x) for _ in range(T)],
    }  # fmt: skip
    ratios = timing.ratios(timing.alternate(runs, rounds), "loop")
    peak = memory(ours, key, weights, x) / memory(chunk, jax.random.split(key, chunk_size), weights, x)
    return {
        "batch": batch, "chunk": chunk_size, "ratio": ratios["ours"], "loop without dropout": ratios["loop without"],
        "memory in chunks": peak,
    }  # fmt: skip


def over_a_mesh(rounds: int, batch: int) -> Row:
    """T samples shared among all devices, in times of one device; the cores are the same."""
    one_pass, weights, x = network(batch)
    key, mesh = jax.random.key(0), jax.make_mesh((jax.device_count(),), ("samples",))

    def run(mesh: Any) -> Callable[[], Any]:
        compiled: Any = jax.jit(
            lambda key, weights, x: mc.classify(
                lambda key: one_pass(key, weights, x), key, T, chunk_size=2 * jax.device_count(), mesh=mesh
            )
        )
        return lambda: compiled(key, weights, x)

    seconds = timing.alternate({"one": run(None), "mesh": run(mesh)}, rounds)
    return {"devices": jax.device_count(), "batch": batch, "ratio": timing.ratios(seconds, "one")["mesh"]}


def main() -> None:
    """Runs all, prints, and writes benchmarks/results/mc.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--devices", type=int, default=1, help="of the CPU; more than one measures the mesh alone")
    args = parser.parse_args()
    rounds = 3 if args.quick else args.rounds
    if args.devices > 1:
        jax.config.update("jax_num_cpu_devices", args.devices)
        rows = [over_a_mesh(rounds, batch) for batch in (1, 1000)]
        print(rows, timing.save("mc_mesh", {"rounds": rounds, "samples": T, "rows": rows}))
        return
    results = {
        "dropout in the head, against one pass": head_only(rounds, 64),
        "dropout everywhere, batch 1, against a loop": against_a_loop(rounds, 1, T),
        "dropout everywhere, batch 1000, against a loop": against_a_loop(rounds, 1000, 4),
        "dropout of hidden units, batch 1000, against a loop": against_a_loop(rounds, 1000, 4, of_inputs=False),
    }
    for name, row in results.items():
        print(f"{name:<52}", "  ".join(f"{key} {value:.3g}" for key, value in row.items()))
    print(timing.save("mc", {"rounds": rounds, "samples": T, "rows": results}))


if __name__ == "__main__":
    main()
