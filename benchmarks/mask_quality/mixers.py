"""Ways from a column and its row to a word that were tried, and two that every battery must catch.

Each is a pair: the words (c, d) of a column from the key's words, and what mixes them with the row's words (a, b).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks import timing
from dropjax import bits, dropout

ColumnWords = Callable[[Array, Array, Array], tuple[Array, Array]]
Mixer = tuple[ColumnWords, Callable[[Array, Array, Array, Array], Array]]
GOLDEN = np.uint32(0x9E3779B9)
hashed = bits._lowbias32


def stride(k0: Array, k1: Array, column: Array) -> tuple[Array, Array]:
    """The column times an odd constant, without the key: a regular permutation."""
    return column * GOLDEN, jnp.zeros_like(column)


def summed(k0: Array, k1: Array, column: Array) -> tuple[Array, Array]:
    """The sum of two permutations under the key: sometimes two columns have one word."""
    c, d = MIXERS["contract"][0](k0, k1, column)
    return c + d, jnp.zeros_like(column)


def injections(a: Array, b: Array, c: Array, d: Array) -> Array:
    """One round of lowbias32, a before it and b after it."""
    return hashed(c ^ a) + b


def between(a: Array, b: Array, c: Array, d: Array) -> Array:
    """One round of lowbias32, with b added between its multiplications."""
    x = c ^ a
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D) + b
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def triple32(a: Array, b: Array, c: Array, d: Array) -> Array:
    """Wellons's three rounds, with b added after the second multiplication."""
    x = c ^ a
    x = (x ^ (x >> np.uint32(17))) * np.uint32(0xED5AD4BB)
    x = (x ^ (x >> np.uint32(11))) * np.uint32(0xAC4C1B51) + b
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x31848BAB)
    return x ^ (x >> np.uint32(14))


def one_multiplication(a: Array, b: Array, c: Array, d: Array) -> Array:
    """A shorter mixing of good column words."""
    x = (c ^ a) * np.uint32(0x846CA68B)
    return (x ^ (x >> np.uint32(15))) + b


MIXERS: dict[str, Mixer] = {
    "contract": (bits._column_words, bits._mix),
    "version 1": (stride, injections),
    "summed columns": (summed, injections),
    "triple32": (stride, triple32),
    "two rounds": (stride, lambda a, b, c, d: hashed(hashed(c ^ a) + b)),
    "b between": (stride, between),
    "one multiplication": (summed, one_multiplication),
    "one injection": (stride, lambda a, b, c, d: hashed(c ^ a)),
    "single multiply": (stride, lambda a, b, c, d: (c ^ a) * GOLDEN + b),
}


def install(name: str) -> None:
    """Makes every draw of this process use the mixer."""
    for function, replacement in zip(["_column_words", "_mix"], MIXERS[name], strict=True):
        setattr(bits, function, replacement)
    jax.clear_caches()


def speed(rounds: int = 15) -> str:
    """Each mixer's dropout of 4096 x 4096 in warm buffers, in times of `x * 2`, as Markdown."""
    lines = ["| mixer | float32 | bfloat16 |", "|---|---|---|"]
    times = []
    for dtype in (jnp.float32, jnp.bfloat16):
        runs = {"x * 2": timing.chained(lambda x: x * np.array(2, x.dtype), jnp.ones((4096, 4096), dtype))}
        for name in MIXERS:
            install(name)
            x = jnp.ones((4096, 4096), dtype)
            runs[name] = timing.chained(lambda x: dropout(jax.random.key(0), x, 0.1), x, ahead=True)
        times.append(timing.ratios(timing.alternate(runs, rounds), "x * 2"))
    install("contract")
    return "\n".join([*lines, *(f"| {name} | {times[0][name]:.2f} | {times[1][name]:.2f} |" for name in MIXERS)])
