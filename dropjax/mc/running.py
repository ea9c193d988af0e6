"""Running means, variances, divergences and log sums of samples that come in chunks, to the rounding of one pass.

A running number is a float and what its rounding left out, and means move by differences of means, so that neither
an offset (N(1e5, 1)) nor a long run (a million chunks) costs digits.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType


class Sum(NamedTuple):
    """A number in two floats, `[...]` each."""

    value: Array
    """The number, rounded."""
    rest: Array
    """What rounding left out, below half a step of the value."""


def exactly(value: Array) -> Sum:
    """A float as a sum."""
    return Sum(value, jnp.zeros_like(value))


def add(one: Sum, more: Array) -> Sum:
    """A sum plus a number; infinite where that is. Its derivative is that of the plain sum.

    Reference:
      Knuth, The art of computer programming 2, 4.2.2, theorem B; Neumaier, [Rundungsfehleranalyse einiger Verfahren
      zur Summation endlicher Summen](https://doi.org/10.1002/zamm.19740540106), 1974.
    """
    more = more + one.rest
    value = one.value + more
    finite = jnp.isfinite(value)
    a, b, s = (lax.stop_gradient(jnp.where(finite, x, 0)) for x in (one.value, more, value))
    of_b = s - a
    return Sum(value, (a - (s - of_b)) + (b - of_b))


class Moments(NamedTuple):
    """Mean and variance (divisor n) of samples, `[...]` each."""

    mean: Sum
    variance: Sum


def moments(values: Array | Sum) -> tuple[Moments, Array]:
    """The moments of finite samples `[n, ...]`, and the distance of each from the mean, `[n, ...]`.

    Halves of distances are summed in units of the largest: two floats may lie further apart than a float can say,
    and squares of distances overflow, or vanish, long before their mean does.
    """
    values = values if isinstance(values, Sum) else exactly(values)
    return in_rows(_moments, values)


def _moments(values: Sum) -> tuple[Moments, Array]:
    first = Sum(values.value[:1], values.rest[:1])
    half = _half_distance(first, values)
    tiny = np.finfo(half.dtype).tiny
    unit = jnp.clip(lax.stop_gradient(jnp.abs(half).max(0, keepdims=True)), tiny, 1 / tiny)  # which has an inverse
    half = half / unit
    step = half.mean(0, keepdims=True)
    away = half - step
    variance = 4 * ((jnp.square(away).mean(0) * unit[0]) * unit[0])
    step = (step * unit)[0]
    mean = add(add(Sum(first.value[0], first.rest[0]), step), step)
    return Moments(mean, exactly(variance)), 2 * unit * away


def merge_moments(one: Moments, m: Any, other: Moments, n: int) -> Moments:
    """The moments of m and n samples together.

    Reference:
      Chan, Golub, LeVeque, [Algorithms for computing the sample
      variance](https://doi.org/10.1080/00031305.1983.10483115), 1983.
    """
    mine, share = _shares(m, n, one.mean.value.dtype)
    half = _half_distance(one.mean, other.mean)
    between = (2 * mine * half) * (2 * share * half)
    return Moments(
        merge_means(one.mean, m, other.mean, n), add(merge_means(one.variance, m, other.variance, n), between)
    )


def merge_means(one: Sum, m: Any, other: Sum, n: int) -> Sum:
    """The mean of m and n samples together."""
    _, share = _shares(m, n, one.value.dtype)
    step = _half_distance(one, other) * share
    return add(add(one, step), step)  # the whole distance may overflow


def _shares(m: Any, n: int, dtype: Any) -> tuple[Array, Array]:
    count = jnp.asarray(m).astype(dtype)
    return count / (count + n), n / (count + n)


def _half_distance(one: Sum, other: Sum) -> Array:
    """Half of other - one; 0 from infinity, which stays."""
    stays = jnp.isinf(one.value)
    half = (0.5 * other.value - 0.5 * jnp.where(stays, 0, one.value)) + 0.5 * (other.rest - one.rest)
    return jnp.where(stays, 0, half)


def merge_divergences(one: Sum, m: Any, other: Sum, n: int, means: tuple[Sum, Sum, Sum]) -> Sum:
    """The mean divergence of m and n distributions from their common mean.

    It is what Chan's formula is to variances: the mean of both divergences, plus that of both means from their
    common mean. No term is negative, so a small divergence keeps its digits.

    Args:
      one: mean divergence of m distributions from their mean.
      m: how many.
      other: that of n more.
      n: how many.
      means: of the m, of the n, and of all, `[..., classes]` each.

    Returns:
      The mean divergence of all.
    """
    mine, share = _shares(m, n, one.value.dtype)
    away = 2 * _half_distance(means[0], means[1])
    mean = means[2].value
    between = mine * _divergence(mean, -share * away) + share * _divergence(mean, mine * away)
    return add(merge_means(one, m, other, n), between.sum(-1))


def divergences(mean: Array, away: Array) -> Array:
    """The mean over samples of KL(mean + away, mean), for `away` of `[n, ..., classes]` that sum to 0, in nats."""
    return in_rows(lambda away, mean: _divergence(mean, away).mean(0), away, mean[None]).sum(-1)


def in_rows(function: Callable[..., Any], *samples: Any) -> Any:
    """A function of samples `[n, ...]` that treats all places alike, of matrices `[n, places]`.

    XLA on CPU vectorises loops over long rows, and not those over a few classes. Axes of explicit meshes stay.
    """
    places = jax.tree.leaves(samples)[0].shape[1:]
    if len(places) < 2 or AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        return function(*samples)
    flat = jax.tree.map(lambda x: x.reshape(x.shape[0], math.prod(places)), samples)

    def unflatten(x: Array) -> Array:
        return x.reshape(*x.shape[:-1], *places)

    return jax.tree.map(unflatten, function(*flat))


@jax.custom_jvp
def _divergence(mean: Array, away: Array) -> Array:
    """(mean + away) log(1 + away / mean) - away, which is nowhere negative."""
    u = _relative(mean, away)
    small = jnp.abs(u) < 0.1
    s = jnp.where(small, u, 0) / (2 + jnp.where(small, u, 0))  # log(1 + u) = 2 artanh(s)
    series = jnp.zeros_like(s)
    for k in range(15, 1, -2):  # to 2^-53
        series = series * jnp.square(s) + 1 / k
    near = 2 * jnp.square(s) / (1 - s) * (1 + (1 + s) * s * series)
    nothing = u <= -1  # 0 log 0
    u = jnp.where(small | nothing, 1, u)
    far = (1 + u) * jnp.log1p(u) - u
    return mean * jnp.where(small, near, jnp.where(nothing, 1, far))


@_divergence.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    u = _relative(*primals)
    log = jnp.where(u <= -1, 0, jnp.log1p(jnp.where(u <= -1, 0, u)))
    of_mean, of_away = tangents
    return _divergence(*primals), log * of_away + (log - u) * of_mean


def _relative(mean: Array, away: Array) -> Array:
    return jnp.maximum(away / jnp.where(mean > 0, mean, 1), -1)


class LogSum(NamedTuple):
    """log(sum exp(x)) as the largest x, `[...]`, and the sum of exp(x - largest)."""

    largest: Array
    total: Sum

    @property
    def value(self) -> Array:
        """log(sum exp(x))."""
        return self.largest + jnp.log(self.total.value)


def log_sum(values: Array) -> LogSum:
    """The log of the sum of the exponentials of samples `[n, ...]`."""
    largest = _finite(lax.stop_gradient(values.max(0)))
    return LogSum(largest, exactly(jnp.exp(values - largest[None]).sum(0)))


def merge_log_sums(one: LogSum, other: LogSum) -> LogSum:
    """The log of the sum over both."""
    largest = jnp.maximum(one.largest, other.largest)
    mine, share = jnp.exp(one.largest - largest), jnp.exp(other.largest - largest)
    total = Sum(one.total.value * mine, one.total.rest * mine)
    return LogSum(largest, add(total, (other.total.value + other.total.rest) * share))


def _finite(largest: Array) -> Array:
    """Where every x is -inf, any finite number is as good, and does not give inf - inf."""
    return jnp.where(jnp.isneginf(largest), np.finfo(largest.dtype).min, largest)
