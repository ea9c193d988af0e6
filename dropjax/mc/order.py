"""Quantiles of samples that are not kept: they are drawn again, to count how many lie below some edges."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dropjax import _checks
from dropjax.mc import sampling, streaming

_BINS, _PASSES = 64, 2


def levels(function: str, quantiles: Any) -> np.ndarray | None:
    """Returns checked levels, float64."""
    if quantiles is None:
        return None
    try:
        levels = np.asarray(quantiles, np.float64)
    except (TypeError, ValueError, OverflowError):  # also where they are traced
        raise TypeError(
            f"{function}: quantiles must be a sequence of numbers, got {_checks.describe(quantiles)}."
        ) from None
    if levels.ndim != 1 or not levels.size or not ((levels >= 0) & (levels <= 1)).all():
        raise ValueError(
            f"{function}: quantiles must be numbers in [0, 1], got {quantiles}. For one pass a list of one."
        )
    return levels


def quantiles(
    passes: sampling.Passes,
    means: sampling.Draw,
    levels: np.ndarray,
    ends: tuple[Array, Array],
    count: Array,
    *,
    fixed: bool,
) -> Array:
    """Narrows, for each level, an interval that holds the sample of its rank.

    Args:
      passes: what is sampled.
      means: gives the samples of a chunk, finite.
      levels: numbers in `[0, 1]`.
      ends: the least and the greatest sample, `[...]`.
      count: how many samples there are.
      fixed: whether that is all of them.

    Returns:
      The middle of the intervals, or the sample where it is known, `[levels, ...]`.
    """
    ones = (1,) * ends[0].ndim
    rank = jnp.stack([_rank(level, count) for level in levels]).reshape(-1, *ones)
    low, high = (jnp.broadcast_to(end[None], (len(levels), *end.shape)) for end in ends)
    inner = (jnp.arange(_BINS, dtype=low.dtype) / _BINS).reshape(-1, 1, *ones)
    for _ in range(_PASSES):
        width = (high - low)[None]
        far = jnp.isinf(width)
        # The ends are floats of the samples' own grid, and so are these: an interval of one step is never cut.
        edges = low[None] + jnp.where(far, 0, width) * inner
        edges = jnp.where(far, low[None] * (1 - inner) + high[None] * inner, edges)

        def below(values: Array, edges: Array = edges) -> Array:
            return (lax.stop_gradient(values)[None, None] <= edges[:, :, None]).sum(2, dtype=jnp.int32)

        finished = None if fixed else lambda _, drawn: drawn >= count.astype(drawn.dtype)
        counts, _ = streaming.fold(passes, means, below, lambda a, m, b, n: a + b, finished=finished)
        enough = counts >= rank[None]
        low = jnp.maximum(low, jnp.where(enough, low[None], edges).max(0))
        high = jnp.minimum(high, jnp.where(enough, edges, high[None]).min(0))
    middle = low + (high - low) / 2
    return jnp.where(rank == count, ends[1][None], jnp.where(middle > low, middle, high))


def _rank(level: float, count: Array) -> Array:
    """ceil(level * count), at least 1, with the level rounded down to 32 bits: 0.07 of 100 is the 7th."""
    share = min(int(level * 2**32), 2**32 - 1)
    a, b, count = np.uint32(share // 2**16), np.uint32(share % 2**16), count.astype(jnp.uint32)
    c, d = count // 2**16, count % 2**16
    middle = a * d + b * d // 2**16
    end = b * c + middle % 2**16
    whole = (end % 2**16 == 0) & (b * d % 2**16 == 0)
    rank = a * c + middle // 2**16 + end // 2**16 + (~whole).astype(jnp.uint32)
    return jnp.maximum(rank, 1).astype(jnp.int32)
