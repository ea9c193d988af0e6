"""The bit contract: a word is a pure function of a key and of the element's place.

    word = f(key words, global indices)

The last index is the element's column, the leading ones are its row. Rows go through threefry2x32 in
pairs of indices, at full strength; columns through two cheap hashes under the key; and where a row meets
a column their words are mixed cheaply. Nothing else enters: not the shape, the layout, the device count,
jit or x64. `docs/bits.md` states the contract.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from dropjax import _arguments, _checks, sharding

__all__ = ["VERSION", "random_words", "threefry2x32"]

VERSION = 2
"""Changes with any change of the words; `tests/test_bits.py` holds known answers."""

_DOMAIN = (np.uint32(0x64726F70), np.uint32(0x6A617800 + VERSION))  # "drop", "jax" and the version
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
_STRIDES = (np.uint32(0x9E3779B9), np.uint32(0x85EBCA6B))
_NARROW = 32  # columns from which on the words of rows are kept in an array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("key", "origin"), meta_fields=("cut", "shared", "generator")
)
@dataclasses.dataclass(frozen=True)
class Draw:
    """One draw: its key and the place of the piece that draws."""

    key: Array  # its words, uint32[2], or where it is known the typed key: see `draw`
    origin: tuple[Array | None, ...]  # where the piece starts along each dimension; None is 0
    cut: tuple[tuple[str, ...], ...]  # the mesh axes over which each dimension is cut
    shared: tuple[int, ...] = ()  # dimensions along which the index is 0
    generator: str = "mix"


def draw(
    function: str,
    key: Array,
    data: Any,
    shape: tuple[int, ...],
    *,
    shared: Sequence[int] | int = (),
    generator: str = "mix",
    start: Mapping[int, ArrayLike] | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Draw:
    """Checks what a draw for the data (x and its rate, or None) is made of, and consumes the key."""
    key = _checks.key(function, key)
    _checks.generator(function, generator)
    dims = _checks.dims(function, "broadcast_dims", shared, len(shape))
    if generator == "threefry" and (start or any(d is not None for d in dict(sharded_dims or {}))):
        raise ValueError(
            f"{function}: generator must be 'mix' where start or sharded_dims is given, got 'threefry', whose "
            "masks depend on the whole shape."
        )
    if generator == "threefry" and any(map(_checks.is_symbolic, shape[1:])):
        raise ValueError(f"{function}: generator must be 'mix' for symbolic shapes {tuple(shape)}, got 'threefry'.")
    if generator == "threefry" and (_flag("jax_enable_x64") or not _flag("jax_threefry_partitionable")):
        raise ValueError(
            f"{function}: generator must be 'mix' under jax_enable_x64 or without jax_threefry_partitionable, got "
            "'threefry', whose masks would not be those of jax.random.bernoulli."
        )
    place = sharding.place(function, key, data, shape, start, sharded_dims)
    if _checks.is_traced(key) or generator == "threefry" or _flag("jax_debug_key_reuse"):
        key = key_words(function, key, generator)
    # else outside jit, where to read the words by a call of its own would take as long as all the rest
    return Draw(key, *place, dims, generator)


def key_words(function: str, key: Array, generator: str = "mix") -> Array:
    """Returns the two words, `uint32[2]`, of a checked key of any implementation, and consumes it."""
    typed = _checks.is_typed(key)
    words = jax.random.key_data(key) if typed else key
    if typed and _flag("jax_debug_key_reuse"):
        words = words + jax.random.bits(key, (1,), jnp.uint32)[:0].sum(dtype=jnp.uint32)  # adds 0, uses the key up
    if words.shape == (2,) and (generator == "mix" or not typed or jax.random.key_impl(key) == "threefry2x32"):
        return words
    if generator == "threefry":
        raise ValueError(
            f"{function}: generator='threefry' must be given a threefry key, got {_checks.describe(key)}. "
            "Make one with jax.random.key(0, impl='threefry2x32')."
        )
    return _two_words(words)


def _flag(name: str) -> bool:
    return bool(getattr(jax.config, name))  # defined at run time, which not all type stubs know


@jax.jit
def _two_words(words: Array) -> Array:
    """One or four words to two: threefry of one half under the other, so that no pattern cancels."""
    if words.shape == (2,):
        return words
    if words.shape == (1,):
        return jnp.stack([words[0], jnp.zeros_like(words[0])])
    return jnp.stack(threefry2x32(words[0], words[1], words[2], words[3]))


@_arguments.public
def threefry2x32(key0: ArrayLike, key1: ArrayLike, x0: ArrayLike, x1: ArrayLike) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds, elementwise, in 32-bit add, xor and rotate.

    Args:
      key0, key1: uint32, the key words.
      x0, x1: uint32, the counter words; all four broadcast.

    Returns:
      Two uint32 arrays.

    Reference:
      Salmon, Moraes, Dror, Shaw, [Parallel random numbers: as easy as 1, 2,
      3](https://doi.org/10.1145/2063384.2063405), 2011.
    """
    key0, key1, x0, x1 = (jnp.asarray(word, jnp.uint32) for word in (key0, key1, x0, x1))
    schedule = (key0, key1, key0 ^ key1 ^ _PARITY)
    x0, x1 = x0 + key0, x1 + key1
    for group in range(5):
        for r in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << np.uint32(r)) | (x1 >> np.uint32(32 - r)))
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1


@_arguments.public
def random_words(
    key: Array,
    shape: int | Sequence[int],
    *,
    start: Mapping[int, ArrayLike] | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Array:
    """Draws one uniform 32-bit word for each element of an array.

    The word at global indices (i0, ..., column) is, with (k0, k1) the words of the key,

        k0, k1 = k0 ^ 0x64726F70, k1 ^ 0x6A617802
        a, b = threefry2x32((k0, k1), (i0, i1)), then under those words (i2, i3), ...
        c, d = lowbias32((column * 0x9E3779B9) ^ k0), lowbias32((column * 0x85EBCA6B) ^ k1)
        x = (c ^ a) * (b | 1)
        x = (x ^ (x >> 15)) * 0x846CA68B
        word = (x ^ (x >> 16)) + d

    with the leading indices padded by zeros to at least one pair. Growing any dimension keeps the
    words of the places that it had.

    Args:
      key: one JAX key, typed or legacy, of any implementation; it is consumed.
      shape: the shape of the array, or of this piece of it.
      start: `{dim: index}`, where this piece starts in the whole array; indices may be traced, and
        then wrap at 2^32 unchecked.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.

    Returns:
      uint32 `[*shape]`. Each word is uniform.

    Raises:
      TypeError, ValueError: if the key is not one key, or an index is not in [0, 2^32).

    Example:
      >>> words = random_words(jax.random.key(0), (2, 3))
      >>> bool((random_words(jax.random.key(0), (1, 3), start={0: 1}) == words[1:]).all())
      True

    Reference:
      lowbias32: Wellons, [Prospecting for hash functions](https://nullprogram.com/blog/2018/07/31/), 2018.
    """
    shape = _checks.shape("random_words", shape)
    return _words_of(draw("random_words", key, None, shape, start=start, sharded_dims=sharded_dims), shape)


@functools.partial(jax.jit, static_argnums=1)
def _words_of(draw: Draw, shape: tuple[int, ...]) -> Array:
    return jnp.broadcast_to(words(draw, shape), shape)


def words(draw: Draw, shape: tuple[int, ...]) -> Array:
    """The contract's words, uint32, of length 1 along the shared dimensions."""
    *leading, column = _coordinates(draw, shape) or [jnp.uint32(0)]
    k0, k1 = _domain_words(draw)
    a, b = _row_words(k0, k1, leading)
    c, d = _column_words(k0, k1, column)
    if c.size != 1 and (_checks.is_symbolic(column.shape[-1]) or column.shape[-1] >= _NARROW):
        a, b = _apart(a, b)
    if a.size != 1:
        c, d = _apart(c, d)
    return _mix(a, b, c, d)


def words_at(draw: Draw, *coordinates: ArrayLike) -> Array:
    """The contract's words at named places, uint32: one index along each dimension, which broadcast.

    The place of the piece does not enter. It is `words` where an element is known by what it is, a row of a
    vocabulary or an edge between two nodes, and not by where it lies.
    """
    *leading, column = (jnp.asarray(index).astype(jnp.uint32) for index in coordinates)
    k0, k1 = _domain_words(draw)
    return _mix(*_row_words(k0, k1, leading), *_column_words(k0, k1, column))


def _domain_words(draw: Draw) -> tuple[Array, Array]:
    words = _two_words(jax.random.key_data(draw.key) if _checks.is_typed(draw.key) else draw.key)
    return words[0] ^ _DOMAIN[0], words[1] ^ _DOMAIN[1]


def _row_words(k0: Array, k1: Array, leading: Sequence[Array]) -> tuple[Array, Array]:
    """The words of each row, from its indices in pairs."""
    rows: list[ArrayLike] = [*leading, *[np.uint32(0)] * (len(leading) % 2 or 2 * (not leading))]
    for i, j in zip(rows[::2], rows[1::2], strict=True):
        k0, k1 = threefry2x32(k0, k1, i, j)
    return k0, k1


def _column_words(k0: Array, k1: Array, column: Array) -> tuple[Array, Array]:
    """The words of each column. Two: one alone would be the same for two columns now and then, or never."""
    return _lowbias32((column * _STRIDES[0]) ^ k0), _lowbias32((column * _STRIDES[1]) ^ k1)


def _mix(a: Array, b: Array, c: Array, d: Array) -> Array:
    """The word where a row (a, b) meets a column (c, d); `docs/bits.md` has the mixers that were tried."""
    x = (c ^ a) * (b | np.uint32(1))
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return (x ^ (x >> np.uint32(16))) + d


def _apart(first: Array, second: Array) -> tuple[Array, Array]:
    """The same two words, in a form that XLA computes once, into an array of both.

    Where words are broadcast along other dimensions XLA would fuse them and compute them again for each
    element. On CPU it drops barriers before it fuses, but it never fuses a division by something other than
    a constant into a broadcast. This division is by the 1 that a dropped barrier leaves.
    """
    is_first = lax.broadcasted_iota(jnp.uint32, (2, *first.shape), 0) == 0
    both = jnp.where(is_first, first, second)
    both = lax.div(both, jnp.broadcast_to(lax.optimization_barrier(np.uint32(1)), both.shape))
    return lax.index_in_dim(both, 0, keepdims=False), lax.index_in_dim(both, 1, keepdims=False)


def _coordinates(draw: Draw, shape: tuple[int, ...]) -> list[Array]:
    """For each dimension its global indices, uint32 of length 1 along all other dimensions."""
    coordinates = []
    for d, (length, origin, axes) in enumerate(zip(shape, draw.origin, draw.cut, strict=True)):
        along = [1] * len(shape)
        if d in draw.shared:
            coordinates.append(jnp.zeros(along, jnp.uint32))
        else:
            along[d] = length
            index = lax.broadcasted_iota(jnp.uint32, along, d)
            first = sharding.first(origin, axes, length)
            coordinates.append(index if first is None else index + first)
    return coordinates


def _lowbias32(x: Array) -> Array:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def threefry_words(draw: Draw, shape: tuple[int, ...]) -> Array:
    """The words that `jax.random.bits` draws for a threefry key (partitionable): one block an element."""
    shape = tuple(1 if d in draw.shared else n for d, n in enumerate(shape))
    high, low = linear_index([lax.broadcasted_iota(jnp.uint32, shape, d) for d in range(len(shape))], shape)
    a, b = threefry2x32(draw.key[0], draw.key[1], high, low)
    return a ^ b


def linear_index(indices: Sequence[Array], shape: tuple[int, ...]) -> tuple[Array, Array]:
    """The row-major position of an element as the high and low word of a 64-bit number."""
    high = low = jnp.uint32(0)
    stride = 1
    for index, length in zip(reversed(indices), reversed(shape), strict=True):
        term = index * np.uint32(stride & 0xFFFFFFFF)
        low = low + term
        if _checks.is_symbolic(length) or stride * length > 2**32:
            carry = (low < term).astype(jnp.uint32)
            whole = multiply_high(index, np.uint32(stride & 0xFFFFFFFF))
            high = high + carry + whole + index * np.uint32(stride >> 32)
        stride *= length
    return high, low


def multiply_high(x: Array, y: Any) -> Array:
    """The high word of the product of two words, from 16-bit halves."""
    half, ones = np.uint32(16), np.uint32(0xFFFF)
    x0, x1, y0, y1 = x & ones, x >> half, y & ones, y >> half
    middle = (x0 * y0 >> half) + (x1 * y0 & ones) + (x0 * y1 & ones)
    return x1 * y1 + (x1 * y0 >> half) + (x0 * y1 >> half) + (middle >> half)
