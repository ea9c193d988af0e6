"""Dropout inside whole programs: scans, vmaps, training steps, remat, compilation and import.

Each case takes the number of rounds and returns one row of figures. `python -m benchmarks.dropout` runs them all.
"""

import contextlib
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import dropjax
import dropjax.linen
from benchmarks import timing

RATE = 0.1
Drop = Callable[[Array, Array], Array]
Figures = dict[str, float]


def ours(key: Array, x: Array) -> Array:
    """Our dropout."""
    return dropjax.dropout(key, x, RATE)


def bernoulli(key: Array, x: Array) -> Array:
    """What people write by hand."""
    return jnp.where(jax.random.bernoulli(key, 1 - RATE, x.shape), x / (1 - RATE), 0)


def without(key: Array, x: Array) -> Array:
    """No dropout."""
    return x


def compile_seconds(program: Callable[..., Any], *arguments: Any) -> float:
    """Seconds to trace and compile a program, from empty caches."""
    jax.clear_caches()
    begin = time.perf_counter()
    jax.jit(program).lower(*arguments).compile()
    return time.perf_counter() - begin


def train(drop: Drop, width: int, steps: int) -> Callable[[Array, Array, Array], Array]:
    """Steps of gradient descent in one scan, on a network of one hidden layer with dropout before and after it."""

    def loss(weights: tuple[Array, Array], key: Array, x: Array, y: Array) -> Array:
        first, second = jax.random.split(key)
        hidden = drop(second, jax.nn.relu(drop(first, x) @ weights[0]))
        return ((hidden @ weights[1] - y) ** 2).mean()

    def program(key: Array, x: Array, y: Array) -> Array:
        weights = (jnp.full((x.shape[-1], width), 0.01), jnp.full((width, 1), 0.01))

        def step(weights: tuple[Array, Array], t: Array) -> tuple[tuple[Array, Array], Array]:
            value, gradients = jax.value_and_grad(loss)(weights, jax.random.fold_in(key, t), x, y)
            return optax.apply_updates(weights, jax.tree.map(lambda g: -0.01 * g, gradients)), value

        return jax.lax.scan(step, weights, jnp.arange(steps))[1][-1]

    return program


def alone(drop: Drop, steps: int) -> Callable[..., Array]:
    """Nothing but dropout in a scan."""

    def program(key: Array, x: Array, y: Array) -> Array:
        def step(total: Array, t: Array) -> tuple[Array, None]:
            return total + drop(jax.random.fold_in(key, t), x), None

        return jax.lax.scan(step, jnp.zeros_like(x), jnp.arange(steps))[0]

    return program


def small(make: Callable[[Drop], Callable[..., Any]], *arguments: Any, rounds: int) -> Figures:
    """How much faster, and how much slower to compile, a program is with ours than with bernoulli."""
    programs = {"dropjax": make(ours), "bernoulli": make(bernoulli)}
    seconds = timing.alternate({n: functools.partial(jax.jit(p), *arguments) for n, p in programs.items()}, rounds)
    built = {n: [compile_seconds(p, *arguments) for _ in range(3)] for n, p in programs.items()}
    return {
        "bernoulli over dropjax": timing.ratios(seconds, "dropjax")["bernoulli"],
        "dropjax ms": 1e3 * statistics.median(seconds["dropjax"]),
        "compile, dropjax over bernoulli": timing.ratios(built, "bernoulli")["dropjax"],
    }


def scan(rounds: int) -> Figures:
    """30 x 500 in a scan of 4,000 steps, dropout alone."""
    return small(lambda drop: alone(drop, 4000), jax.random.key(0), jnp.ones((30, 500)), 0.0, rounds=rounds)


def scan_training(rounds: int) -> Figures:
    """4,000 steps of training on batches of 30 x 500 with 50 hidden units, in one scan."""
    arguments = jax.random.key(0), jnp.ones((30, 500)), jnp.ones((30, 1))
    return small(lambda drop: train(drop, 50, 4000), *arguments, rounds=rounds)


def vmapped_training(rounds: int) -> Figures:
    """100 steps of training of 240 networks at once, batches of 128 x 13, 50 hidden units."""
    keys, x, y = jax.random.split(jax.random.key(0), 240), jnp.ones((128, 13)), jnp.ones((128, 1))
    return small(lambda drop: jax.vmap(train(drop, 50, 100), (0, None, None)), keys, x, y, rounds=rounds)


def vmapped(rounds: int) -> Figures:
    """128 x 50 for 240 keys under vmap, 20 steps of a scan, dropout alone."""
    keys = jax.random.split(jax.random.key(0), 240)
    program = functools.partial(alone, steps=20)
    return small(lambda drop: jax.vmap(program(drop), (0, None, None)), keys, jnp.ones((128, 50)), 0.0, rounds=rounds)


def threefry(rounds: int) -> Figures:
    """A mask of 4096 x 4096 with the bits of jax.random.bernoulli."""
    key, shape = jax.random.key(0), (4096, 4096)
    masks = {
        "dropjax": lambda key: dropjax.keep_mask(key, shape, RATE, generator="threefry"),
        "bernoulli": lambda key: jax.random.bernoulli(key, np.float32(1 - RATE), shape),
    }
    seconds = timing.alternate({n: functools.partial(jax.jit(m), key) for n, m in masks.items()}, rounds)
    return {"bernoulli over dropjax": timing.ratios(seconds, "dropjax")["bernoulli"]}


class Block(nn.Module):
    """A transformer block with dropout on attention weights, residuals and the hidden layer."""

    rate: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[..., length, features]` to the same shape."""
        drop = nn.Dropout(self.rate, deterministic=False)
        normed = nn.LayerNorm()(x)
        attended = nn.MultiHeadDotProductAttention(4, dropout_rate=self.rate, deterministic=False)(normed)
        x = x + drop(attended)
        hidden = drop(nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x))))
        return x + drop(nn.Dense(x.shape[-1])(hidden))


def transformer(rounds: int) -> Figures:
    """A training step of two blocks, T = 256, D = 256, B = 4, over the same step without dropout."""
    x, optimizer = jax.random.normal(jax.random.key(1), (4, 256, 256)), optax.sgd(1e-3)

    def step_with(rate: float, replace: bool) -> Callable[[], Any]:
        model = nn.Sequential([Block(rate), Block(rate)])

        def loss(variables: Any, key: Array) -> Array:
            outputs: Any = model.apply(variables, x, rngs={"dropout": key})
            return (outputs**2).mean()

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(variables: Any, state: Any, key: Array) -> tuple[Any, Any]:
            gradients = jax.grad(loss)(variables, key)
            updates, state = optimizer.update(gradients, state)
            return optax.apply_updates(variables, updates), state

        variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, x)
        box = [(variables, optimizer.init(variables))]

        def run() -> Any:
            with dropjax.linen.replace_flax() if replace else contextlib.nullcontext():
                box[0] = step(*box[0], jax.random.key(2))
            return box[0]

        return run

    runs = {"without": step_with(0.0, False), "dropjax": step_with(RATE, True), "flax": step_with(RATE, False)}
    seconds = timing.alternate(runs, rounds)
    times = timing.ratios(seconds, "without")
    return {
        "dropjax over without": times["dropjax"],
        "flax over without": times["flax"],
        "without ms": 1e3 * statistics.median(seconds["without"]),
    }


def remat(rounds: int) -> Figures:
    """Peak temporary memory of the gradient of a 12-layer remat stack, over the same stack without dropout."""
    weights = jnp.zeros((12, 256, 256))

    def gradient(drop: Drop) -> Callable[..., Any]:
        @jax.checkpoint
        def layer(x: Array, given: tuple[Array, Array]) -> Array:
            weight, key = given
            return x + drop(key, jax.nn.gelu(x @ weight))

        def loss(weights: Array, x: Array, keys: Array) -> Array:
            return (jax.lax.scan(lambda x, given: (layer(x, given), None), x, (weights, keys))[0] ** 2).sum()

        return jax.grad(loss)

    def peak(drop: Drop) -> int:
        arguments = weights, jnp.zeros((4096, 256)), jax.random.split(jax.random.key(0), 12)
        analysis: Any = jax.jit(gradient(drop)).lower(*arguments).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    base = peak(without)
    return {"dropjax over without": peak(ours) / base, "bernoulli over without": peak(bernoulli) / base}


def fusion(rounds: int) -> Figures:
    """bias + gelu + dropout, and dropout + residual + layer norm, 4096 x 1024, over the same without dropout."""
    x, residual, bias = jnp.ones((4096, 1024)), jnp.ones((4096, 1024)), jnp.ones(1024)

    def biased(drop: Drop) -> Callable[..., Array]:
        return lambda key, x, residual: drop(key, jax.nn.gelu(x + bias))

    def normed(drop: Drop) -> Callable[..., Array]:
        return lambda key, x, residual: jax.nn.standardize(residual + drop(key, x))

    figures = {}
    for name, make in {"bias + gelu": biased, "residual + layer norm": normed}.items():
        for way in ["forward", "forward and backward"]:
            runs = {}
            for kind, drop in {"without": without, "dropjax": ours, "bernoulli": bernoulli}.items():
                function = make(drop)
                if way != "forward":
                    function = functools.partial(_both, function)
                runs[kind] = functools.partial(jax.jit(function), jax.random.key(0), x, residual)
            times = timing.ratios(timing.alternate(runs, rounds), "without")
            figures[f"{name}, {way}: dropjax"] = times["dropjax"]
            figures[f"{name}, {way}: bernoulli"] = times["bernoulli"]
    return figures


def _both(function: Callable[..., Array], key: Array, x: Array, residual: Array) -> Any:
    y, backward = jax.vjp(lambda x, residual: function(key, x, residual), x, residual)
    return y, backward(y)


def residuals(rounds: int) -> Figures:
    """Bytes that one call keeps for its backward pass."""
    key, x = jax.random.key(0), jnp.ones((1024, 1024))
    backward = jax.vjp(lambda x: ours(key, x), x)[1]
    return {"bytes": float(sum(kept.nbytes for kept in jax.tree.leaves(backward)))}


def importing(rounds: int) -> Figures:
    """Seconds that importing dropjax adds to importing jax."""
    program = "import jax, time; t = time.perf_counter(); import dropjax; print(time.perf_counter() - t)"
    run = functools.partial(subprocess.run, [sys.executable, "-c", program], capture_output=True, check=True)
    return {"seconds": statistics.median(float(run().stdout) for _ in range(5))}


def eager(rounds: int) -> Figures:
    """A call outside jit on 1,000 elements: layers called as Flax's are, and the function."""
    key, x = jax.random.key(0), jnp.ones(1000)
    flax, layer = nn.Dropout(RATE, deterministic=False), dropjax.linen.Dropout(RATE, deterministic=False)
    runs = {
        "flax": lambda: flax.apply({}, x, rngs={"dropout": key}),
        "layer": lambda: layer.apply({}, x, rngs={"dropout": key}),
        "function": lambda: ours(key, x),
    }
    seconds = timing.alternate(runs, 20 * rounds)
    times = timing.ratios(seconds, "flax")
    return {
        "flax over our layer": 1 / times["layer"],
        "flax over our function": 1 / times["function"],
        "our layer, microseconds": 1e6 * statistics.median(seconds["layer"]),
    }


def compiling(rounds: int) -> Figures:
    """Tracing and compiling a program with 200 dropout calls, over the same with Flax's."""
    key, x = jax.random.key(0), jnp.ones((64, 64))

    def program(layer: nn.Module) -> Callable[..., Array]:
        def calls(key: Array, x: Array) -> Array:
            for i in range(200):
                dropped: Any = layer.apply({}, x, rngs={"dropout": jax.random.fold_in(key, i)})
                x = jnp.sin(dropped)
            return x

        return calls

    layers: dict[str, Any] = {"flax": nn.Dropout, "dropjax": dropjax.linen.Dropout}
    programs = {name: program(layer(RATE, deterministic=False)) for name, layer in layers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(min(rounds, 3)):
        for name, calls in programs.items():
            seconds[name].append(compile_seconds(calls, key, x))
    return {
        "dropjax over flax": timing.ratios(seconds, "flax")["dropjax"],
        "flax seconds": statistics.median(seconds["flax"]),
    }


CASES: list[Callable[[int], Figures]] = [
    scan, scan_training, vmapped, vmapped_training, threefry, transformer, remat, residuals, importing, eager,
    compiling, fusion,
]  # fmt: skip
