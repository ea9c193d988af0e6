"""What a stochastic regression says and does not know, streamed over the samples."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from dropjax import _arguments, _checks
from dropjax.mc import _inputs, sampling, streaming
from dropjax.mc.streaming import LogSum, Moments

_BINS, _PASSES = 64, 2


class Regression(NamedTuple):
    """What T samples of a mean say; float32 (float64 of float64 outputs)."""

    mean: Array
    """Mean of the samples' means, `[...]`."""
    epistemic: Array
    """Variance of the samples' means, divisor T, `[...]`."""
    aleatoric: Array | None
    """Mean of the samples' variances, or 1 / precision, `[...]`; None if neither is given."""
    total: Array
    """Variance of the equal mixture of the samples: epistemic plus what is known of aleatoric, `[...]`."""
    log_likelihood: Array | None
    """Log of the mixture's density at the targets, `[...]` without the event dimensions; None without targets.

    NaN where a target is, or where one of the event's outputs is invalid."""
    quantiles: Array | None
    """Of the samples' means, `[quantiles, ...]`; None if none are asked for."""
    invalid: Array
    """Whether a sample was NaN or infinite, its variance negative (with targets, also 0), or too large to sum, bool
    `[...]`; the rest is NaN there."""
    num_samples: Array
    """T, how many samples were drawn, int32 scalar."""


class _Sums(NamedTuple):
    mean: Moments
    variance: Array | None  # mean of the variances
    density: LogSum | None
    low: Array
    high: Array
    invalid: Array


@_arguments.public
def regress(
    fn: Callable[[Array], Any],
    key: Array,
    num_samples: int,
    *,
    targets: ArrayLike | None = None,
    precision: ArrayLike | None = None,
    event_dims: int = 0,
    quantiles: Sequence[float] | None = None,
    chunk_size: int | None = None,
    tolerance: float | None = None,
    mesh: Mesh | None = None,
    axes: str | Sequence[str] | None = None,
) -> Regression:
    """Summarises a stochastic regression over samples, without keeping them.

    The prediction is the equal mixture of N(mean_t, variance_t), with (mean_t, variance_t) = fn(fold_in(key, t)), or
    with variance_t = 1 / precision. Its variance is the variance of mean_t (epistemic) plus the mean of variance_t
    (aleatoric), its log likelihood logsumexp_t(log N(target; mean_t, variance_t)) - log T.

    A quantile q is the ceil(q T)-th smallest mean_t, to within 1 / 4096 of the range of the samples: samples are
    drawn again from their keys, twice, to count how many lie below each of 64 edges. So T passes become 3 T.

    Args:
      fn: function of a key that returns means, float `[...]`, or a pair of means and variances of one shape.
      key: one JAX key.
      num_samples: T, at least 1; with a tolerance the most that are drawn.
      targets: float `[...]`, of exactly the shape of the means.
      precision: of the observations, the inverse of their variance, positive; a number or an array that broadcasts
        against the means. For an fn that returns means only. A traced one out of range makes the summary invalid.
      event_dims: how many trailing dimensions make one target, whose density is the product over them.
      quantiles: numbers in `[0, 1]`.
      chunk_size: how many samples are computed at a time; memory is O(chunk_size); None for all, or 10 with a
        tolerance.
      tolerance: draw chunks until the standard error of the mean, as estimated from the samples so far, is at
        most this for every output that is not invalid. Not differentiable in reverse.
      mesh: devices that share each chunk's samples; a chunk is rounded up to a multiple of their number.
      axes: the axes of the mesh that share them; None for all.

    Returns:
      `Regression`.

    Raises:
      TypeError, ValueError: if an argument is not as said above. Invalid outputs are a warning outside jit.

    Example:
      >>> import dropjax
      >>> fn = lambda key: dropjax.dropout(key, jnp.ones((3, 4)), 0.5).sum(-1)
      >>> regress(fn, jax.random.key(0), 1_000, precision=2.0).aleatoric
      Array([0.5, 0.5, 0.5], dtype=float32)

    Reference:
      Gal, Ghahramani, [Dropout as a Bayesian approximation](https://arxiv.org/abs/1506.02142), 2016; Kendall, Gal,
      [What uncertainties do we need](https://arxiv.org/abs/1703.04977), 2017.
    """
    tolerance = streaming.tolerance("regress", tolerance)
    chunk_size = streaming.CHUNK if tolerance is not None and chunk_size is None else chunk_size
    passes = sampling.prepare("regress", fn, key, num_samples, chunk_size, mesh, axes)
    shape, dtype, has_variance = _shapes(passes.shapes)
    targets, precision = _observations(shape, dtype, has_variance, targets, precision)
    event_dims = _checks.integer("regress", "event_dims", event_dims, 0)
    if event_dims > len(shape):
        raise ValueError(f"regress: event_dims must be at most the rank of the means, {len(shape)}, got {event_dims}.")
    levels = _levels(quantiles)

    def summarise(values: Any) -> _Sums:
        means, variances = values if has_variance else (values, None)
        means = means.astype(dtype)
        invalid = ~jnp.isfinite(means)
        if variances is not None:
            invalid |= ~(variances >= 0) | jnp.isinf(variances)
            variances = jnp.where(variances >= 0, variances, np.nan).astype(dtype)
        density = None
        if targets is not None:
            scale, log_variance = _scale(variances, precision)
            logs = -0.5 * (log_variance + np.log(2 * np.pi) + jnp.square((targets[None] - means) * scale))
            invalid |= jnp.isnan(logs) & ~jnp.isnan(targets)[None]
            density = streaming.log_sum(logs.sum(tuple(range(logs.ndim - event_dims, logs.ndim))))
        variance = None if variances is None else variances.mean(0)
        low, high = (lax.stop_gradient(of) for of in (means.min(0), means.max(0)))
        return _Sums(streaming.moments(means), variance, density, low, high, invalid.any(0))

    def error(sums: _Sums, count: Array) -> Array:
        return jnp.where(sums.invalid, 0, streaming.standard_error(sums.mean.squares, count))

    def means_of(draw: sampling.Draw) -> sampling.Draw:
        return lambda first, size: (draw(first, size)[0] if has_variance else draw(first, size)).astype(dtype)

    def compute(draw: sampling.Draw) -> Regression:
        sums, count = streaming.fold(passes, draw, summarise, _merge, finished=streaming.within(tolerance, error))
        found = None
        if levels is not None:
            found = _quantiles(passes, means_of(draw), levels, sums, count, fixed=tolerance is None)
        n = count.astype(dtype)
        epistemic = sums.mean.squares / n
        aleatoric = sums.variance if precision is None else jnp.broadcast_to(1 / precision, shape)
        total = epistemic if aleatoric is None else epistemic + aleatoric
        invalid = sums.invalid | ~jnp.isfinite(sums.mean.mean) | ~jnp.isfinite(total)

        def valid(value: Array) -> Array:
            return jnp.where(invalid, np.nan, value)

        mean, epistemic, total = valid(sums.mean.mean), valid(epistemic), valid(total)
        aleatoric = None if aleatoric is None else valid(aleatoric)
        density = None
        if sums.density is not None:
            of_event = invalid.any(tuple(range(len(shape) - event_dims, len(shape))))
            density = jnp.where(of_event, np.nan, sums.density.value - jnp.log(n))
        found = None if found is None else jnp.where(invalid[None], np.nan, found)
        return Regression(mean, epistemic, aleatoric, total, density, found, invalid, count)

    summary = passes.run(compute)
    if message := streaming.warn_of(
        "regress", summary.invalid, "what is not finite, or too large, or a variance that is not positive,"
    ):
        _checks.warn(message)
    return summary


def _scale(variances: Array | None, precision: Array | None) -> tuple[Array, Array]:
    """One over the standard deviation, and the log of the variance."""
    if variances is not None:
        return 1 / jnp.sqrt(variances), jnp.log(variances)
    of_all = jnp.asarray(precision)[None]
    return jnp.sqrt(of_all), -jnp.log(of_all)


def _merge(one: _Sums, m: Array, other: _Sums, n: int) -> _Sums:
    variance = None
    if one.variance is not None and other.variance is not None:
        share = n / (jnp.asarray(m).astype(one.variance.dtype) + n)
        variance = one.variance + (other.variance - one.variance) * share
    density = None
    if one.density is not None and other.density is not None:
        density = streaming.merge_log_sums(one.density, other.density)
    return _Sums(
        streaming.merge_moments(one.mean, m, other.mean, n),
        variance,
        density,
        jnp.minimum(one.low, other.low),
        jnp.maximum(one.high, other.high),
        one.invalid | other.invalid,
    )


def _quantiles(
    passes: sampling.Passes, means: sampling.Draw, levels: np.ndarray, sums: _Sums, count: Array, *, fixed: bool
) -> Array:
    """Narrows, for each level, an interval that holds the sample of its rank."""
    ones = (1,) * sums.low.ndim
    exact = jnp.asarray(levels, jnp.float32) * count.astype(jnp.float32)
    rank = jnp.ceil(exact * np.float32(1 - 1e-6)).astype(jnp.int32)  # an exact rank is not rounded up
    rank = jnp.clip(rank, 1, count).reshape(-1, *ones)
    low, high = (jnp.broadcast_to(of[None], (len(levels), *of.shape)) for of in (sums.low, sums.high))
    inner = (jnp.arange(1, _BINS, dtype=low.dtype) / _BINS).reshape(-1, 1, *ones)
    for _ in range(_PASSES):
        edges = low[None] + (high - low)[None] * inner

        def below(values: Array, edges: Array = edges) -> Array:
            return (lax.stop_gradient(values)[None, None] <= edges[:, :, None]).sum(2, dtype=jnp.int32)

        finished = None if fixed else lambda _, drawn: drawn >= count.astype(drawn.dtype)
        counts, _ = streaming.fold(passes, means, below, lambda a, m, b, n: a + b, finished=finished)
        index = (counts < rank[None]).sum(0, dtype=jnp.int32).astype(low.dtype)
        low, high = low + (high - low) * (index / _BINS), low + (high - low) * ((index + 1) / _BINS)
    found = jnp.where(rank == count, sums.high[None], low + (high - low) / 2)
    return jnp.where(rank == 1, sums.low[None], found)


def _shapes(shapes: Any) -> tuple[tuple[int, ...], Any, bool]:
    """The shape of the means, the dtype of the summary, and whether fn returns variances, too."""
    pair = isinstance(shapes, tuple | list) and len(shapes) == 2
    arrays = list(shapes) if pair else [shapes]
    floats = [_checks.is_array(a) and jnp.issubdtype(a.dtype, jnp.floating) for a in arrays]
    if not all(floats) or arrays[0].shape != arrays[-1].shape:
        got = ", ".join(_checks.describe(a) for a in arrays)
        raise TypeError(
            f"regress: fn must return means, a float array, or a pair (means, variances) of one shape, got {got}."
        )
    return tuple(arrays[0].shape), streaming.wide(arrays[0].dtype), pair


def _observations(
    shape: tuple[int, ...], dtype: Any, has_variance: bool, targets: Any, precision: Any
) -> tuple[Array | None, Array | None]:
    if precision is not None and has_variance:
        raise ValueError("regress: precision must be None where fn returns variances, got both. Add one to the other.")
    if targets is not None and precision is None and not has_variance:
        raise ValueError("regress: precision must be given with targets, got None. Or let fn return (mean, variance).")
    if targets is not None:
        targets = jnp.asarray(targets)
        if tuple(targets.shape) != shape:
            raise ValueError(f"regress: targets must have the shape {shape} of the means, got {targets.shape}.")
        targets = targets.astype(dtype)
    if precision is not None:
        limits = np.finfo(dtype)
        _inputs.require(
            "regress",
            f"precision must be positive, from {limits.tiny:.3g} to {limits.max:.3g} in {dtype.name}, {{got}}",
            precision,
            lambda of: (of >= limits.tiny) & (of <= limits.max),
        )
        precision = jnp.asarray(precision).astype(dtype)
        fits = zip(reversed(precision.shape), reversed(shape), strict=False)
        if precision.ndim > len(shape) or any(n not in (1, m) for n, m in fits):
            raise ValueError(f"regress: precision must broadcast against {shape}, got shape {precision.shape}.")
        precision = jnp.where((precision >= limits.tiny) & (precision <= limits.max), precision, np.nan)
        precision = precision.reshape((1,) * (len(shape) - precision.ndim) + precision.shape)
    return targets, precision


def _levels(quantiles: Any) -> np.ndarray | None:
    if quantiles is None:
        return None
    levels = np.asarray(quantiles, np.float64)
    if levels.ndim != 1 or not levels.size or not ((levels >= 0) & (levels <= 1)).all():
        raise ValueError(f"regress: quantiles must be numbers in [0, 1], got {quantiles}. For one pass a list of one.")
    return levels
