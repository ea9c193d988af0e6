"""Words and masks in the orders in which a user's arrays would meet them.

Each order maps a key and the number of a block to that block, an array whose memory is the stream.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dropjax import bits, keep_mask

Order = Callable[[Array, Array], Array]
WORDS = 2**24  # about so many a block


def rows(*row: int, size: int = WORDS) -> Order:
    """Arrays `[n, *row]` one under the other."""
    n = size // int(np.prod(row))
    return lambda key, block: bits.random_words(key, (n, *row), start={0: block * n})


def column_major(key: Array, block: Array) -> Array:
    """An array of 2^16 rows, column after column."""
    return bits.random_words(key, (2**16, 2**8), start={1: block * 2**8}).T


def long_row(key: Array, block: Array) -> Array:
    """An array of rank 1: a single row."""
    return bits.random_words(key, (WORDS,), start={0: block * WORDS})


def strided(key: Array, block: Array) -> Array:
    """Every 64th column of every third row."""
    return bits.random_words(key, (3 * 2**13, 2**17), start={0: block * (3 * 2**13)})[::3, ::64]


def keys(derive: Callable[[Array, Array], Array]) -> Order:
    """One word at one place, under key after key."""

    def block_of(key: Array, block: Array) -> Array:
        return jax.vmap(lambda k: bits.random_words(k, ()))(derive(key, block))

    return block_of


def folded(key: Array, block: Array) -> Array:
    """The keys `fold_in(key, 0)`, `fold_in(key, 1)`, ..."""
    number = block * WORDS + jnp.arange(WORDS, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, number)


def split(key: Array, block: Array) -> Array:
    """The keys of `split`, a large one for each block."""
    return jax.random.split(jax.random.fold_in(key, block), WORDS)


def interleaved(key: Array, block: Array) -> Array:
    """Sixteen keys in turn at place after place of rows of 1,024 columns."""
    keys, n = jax.random.split(key, 16), WORDS // 16 // 1024
    words = jax.vmap(lambda k: bits.random_words(k, (n, 1024), start={0: block * n}))(keys)
    return jnp.moveaxis(words, 0, -1)


def part(dtype: type, shift: int) -> Order:
    """Some bits of each word alone, of rows of 4,096 columns."""
    whole = rows(4096)
    return lambda key, block: (whole(key, block) >> np.uint32(shift)).astype(dtype)


def packed_masks(key: Array, block: Array) -> Array:
    """The masks of rate 1/2, eight elements a byte."""
    n = 2 * WORDS // 4096
    mask = keep_mask(key, (n, 512, 8), 0.5, start={0: block * n})
    return (mask << np.arange(8, dtype=np.uint8)).sum(-1, dtype=jnp.uint8)


def dropped_of_eight(key: Array, block: Array) -> Array:
    """For eight elements of a mask of rate 0.1, which one is dropped; 255 where not exactly one is."""
    n = 2 * WORDS // 4096
    dropped = ~keep_mask(key, (n, 512, 8), 0.1, start={0: block * n})
    index = (dropped * np.arange(8, dtype=np.uint8)).sum(-1, dtype=jnp.uint8)
    return jnp.where(dropped.sum(-1, dtype=jnp.uint8) == 1, index, np.uint8(255))


ORDERS: dict[str, Order] = {
    "row-major": rows(4096),
    "column-major": column_major,
    "rows of 3": rows(3),
    "rows of 64": rows(64),
    "rows of 1000": rows(1000),
    "rank 4": rows(7, 7, 64),
    "one long row": long_row,
    "one column": rows(1),
    "strided": strided,
    "fold_in": keys(folded),
    "split": keys(split),
    "keys and places": interleaved,
    "high halves": part(np.uint16, 16),
    "low halves": part(np.uint16, 0),
    **{f"byte {k}": part(np.uint8, 8 * k) for k in range(4)},
    "masks, rate 0.5": packed_masks,
    "masks, rate 0.1": dropped_of_eight,
}

WRAPPING = {"rows of 3", "one long row", "one column", "fold_in"}  # another key after each 2^32 words


def stream(order: str, seed: int) -> Iterator[memoryview]:
    """The blocks of an order under `jax.random.key(seed)`, without end.

    Where an index would wrap, other keys take over in time.
    """
    first, block_of = jax.random.key(seed), jax.jit(ORDERS[order])
    block = 0
    while True:
        round_, block_of_key = divmod(block, 2**8) if order in WRAPPING else (0, block)
        key = jax.random.fold_in(first, round_) if round_ else first
        data = np.asarray(block_of(key, jnp.uint32(block_of_key)))
        yield three_bits(data) if order == "masks, rate 0.1" else np.ascontiguousarray(data).data.cast("B")
        block += 1


def three_bits(values: np.ndarray) -> memoryview:
    """The values below 8 as three bits each, eight of them in three bytes; the odd ones are left out."""
    values = values[values < 8]
    eight = values[: len(values) // 32 * 32].reshape(-1, 8).astype(np.uint32)  # whole words of 32 bits
    packed = (eight << np.arange(0, 24, 3, dtype=np.uint32)).sum(1, dtype=np.uint32)
    return np.ascontiguousarray(packed.view(np.uint8).reshape(-1, 4)[:, :3]).data.cast("B")
