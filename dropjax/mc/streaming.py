"""Statistics over samples that come in chunks, none of which is kept."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dropjax import _checks
from dropjax.mc.sampling import Draw, Passes

CHUNK = 10
"""How many samples are drawn between two looks at a tolerance, if nothing else is said."""


def wide(dtype: Any) -> Any:
    """The dtype in which samples of a float dtype are summarised: float32 at least."""
    return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)


def fold(
    passes: Passes,
    draw: Draw,
    summarise: Callable[[Any], Any],
    merge: Callable[[Any, Any, Any, int], Any],
    *,
    finished: Callable[[Any, Array], Array] | None = None,
) -> tuple[Any, Array]:
    """Summarises all samples, or as many as it takes.

    Args:
      passes: what is sampled.
      draw: gives the samples of a chunk.
      summarise: from the samples of a chunk, `[n, ...]`, to their summary.
      merge: from a summary, of how many samples, and a summary of n more, to the summary of both.
      finished: from a summary, of how many samples, to whether they are enough; None for all.

    Returns:
      The summary and how many samples it is of, int32.
    """
    size = passes.chunk_size

    def more(total: Any, count: Any, size: int = size) -> Any:
        return merge(total, count, summarise(draw(count, size)), size)

    if finished is None:
        first, starts = passes.chunks()
        total = summarise(draw(0, first))
        if len(starts):
            total, _ = lax.scan(lambda total, start: (more(total, start), None), total, starts)
        return total, jnp.int32(passes.num_samples)
    rest = passes.num_samples % size  # comes last: an error is estimated from full chunks
    total, count = lax.while_loop(
        lambda state: (state[1] < passes.num_samples - rest) & ~finished(*state),
        lambda state: (more(*state), state[1] + np.uint32(size)),
        (summarise(draw(0, size)), jnp.uint32(size)),
    )
    if rest:
        going = (count == passes.num_samples - rest) & ~finished(total, count)
        total = lax.cond(going, lambda total: more(total, count, rest), lambda total: total, total)
        count += going.astype(count.dtype) * np.uint32(rest)
    return total, count.astype(jnp.int32)


def standard_error(variance: Array, count: Array) -> Array:
    """Of a mean of so many samples with this variance, divisor n; infinite for one, of which nothing is known."""
    n = jnp.asarray(count).astype(variance.dtype)
    return jnp.where(n > 1, jnp.sqrt(variance) / jnp.sqrt(jnp.maximum(n - 1, 1)), np.inf)


def within(tolerance: float | None, error: Callable[[Any, Array], Array]) -> Callable[[Any, Array], Array] | None:
    """Whether the error of a summary (with a field `invalid`) is within the tolerance for every valid input."""
    if tolerance is None:
        return None
    return lambda sums, count: (jnp.where(sums.invalid, 0, error(sums, count)) <= tolerance).all()


def tolerance(function: str, value: Any) -> float | None:
    """Returns a checked tolerance."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | np.generic):
        raise TypeError(f"{function}: tolerance must be a number, got {_checks.describe(value)}.")
    number = float(_checks.floats(value))
    if not 0 < number < math.inf:
        raise ValueError(
            f"{function}: tolerance must be positive, got {number}. It is the standard error at which to stop."
        )
    return number


def warn_of(function: str, invalid: Array, what: str) -> str | None:
    """What to warn of, outside jit, where some inputs gave what is not a number."""
    if _checks.is_traced(invalid) or not getattr(invalid, "is_fully_addressable", True):
        return None
    bad = int(np.asarray(jax.device_get(invalid)).sum())
    if not bad:
        return None
    return f"{function}: fn returned {what} for {bad} of {invalid.size} inputs, which `invalid` names: they are NaN."
