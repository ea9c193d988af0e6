"""Statistics over samples that come in chunks, none of which is kept."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

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


class Moments(NamedTuple):
    """Mean and sum of squared deviations of samples, `[...]` each."""

    mean: Array
    squares: Array


def moments(values: Array) -> Moments:
    """The moments of samples `[n, ...]`, around the first of them: equal samples have variance 0."""
    away = values - values[:1]
    mean = away.mean(0, keepdims=True)
    return Moments((values[:1] + mean)[0], jnp.square(away - mean).sum(0))


def merge_moments(one: Moments, m: Any, other: Moments, n: int) -> Moments:
    """The moments of m and n samples together.

    Reference:
      Chan, Golub, LeVeque, [Algorithms for computing the sample
      variance](https://doi.org/10.1080/00031305.1983.10483115), 1983.
    """
    away = other.mean - one.mean
    share = n / (jnp.asarray(m).astype(away.dtype) + n)
    squares = one.squares + other.squares + jnp.square(away) * (n * (1 - share))
    return Moments(one.mean + away * share, squares)


class LogSum(NamedTuple):
    """log(sum exp(x)) as the largest x and the sum of exp(x - largest), `[...]` each."""

    largest: Array
    total: Array

    @property
    def value(self) -> Array:
        """log(sum exp(x))."""
        return self.largest + jnp.log(self.total)


def log_sum(values: Array) -> LogSum:
    """The log of the sum of the exponentials of samples `[n, ...]`."""
    largest = _finite(lax.stop_gradient(values.max(0)))
    return LogSum(largest, jnp.exp(values - largest[None]).sum(0))


def merge_log_sums(one: LogSum, other: LogSum) -> LogSum:
    """The log of the sum over both."""
    largest = jnp.maximum(one.largest, other.largest)
    total = one.total * jnp.exp(one.largest - largest) + other.total * jnp.exp(other.largest - largest)
    return LogSum(largest, total)


def _finite(largest: Array) -> Array:
    """Where every x is -inf, any finite number is as good, and does not give inf - inf."""
    return jnp.where(jnp.isneginf(largest), np.finfo(largest.dtype).min, largest)


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


def standard_error(squares: Array, count: Array) -> Array:
    """Of a mean of so many samples; infinite for one, of which nothing is known."""
    n = jnp.asarray(count).astype(squares.dtype)
    return jnp.where(n > 1, jnp.sqrt(squares / (n * jnp.maximum(n - 1, 1))), np.inf)


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
    if not 0 < float(value) < math.inf:
        raise ValueError(
            f"{function}: tolerance must be positive, got {float(value)}. It is the standard error at which to stop."
        )
    return float(value)


def warn_of(function: str, invalid: Array, what: str) -> str | None:
    """What to warn of, outside jit, where some inputs gave what is not a number."""
    if _checks.is_traced(invalid) or not getattr(invalid, "is_fully_addressable", True):
        return None
    bad = int(np.asarray(jax.device_get(invalid)).sum())
    if not bad:
        return None
    return f"{function}: fn returned {what} for {bad} of {invalid.size} inputs, which `invalid` names: they are NaN."
