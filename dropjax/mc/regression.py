"""What a stochastic regression says and does not know, streamed over the samples."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from dropjax import _arguments, _checks
from dropjax.masks import nan_unless
from dropjax.mc import _inputs, order, running, sampling, streaming
from dropjax.mc.running import LogSum, Moments, Sum


class Regression(NamedTuple):
    """What T samples of a mean say; float32 (float64 of float64 outputs)."""

    mean: Array
    """Mean of the samples' means, `[...]`."""
    epistemic: Array
    """Variance of the samples' means, divisor T, `[...]`; infinite where it is more than the dtype holds."""
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
    """Whether a sample was NaN or infinite, or its variance negative (with targets, also 0), bool `[...]`; the rest is
    NaN there."""
    num_samples: Array
    """T, how many samples were drawn, int32 scalar."""


class _Sums(NamedTuple):
    mean: Moments
    variance: Sum | None  # mean of the variances
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

    A quantile q is the ceil(q T)-th smallest mean_t, to within 1 / 4096 of the range of the samples, and exactly where
    no more floats than that lie in the range: samples are drawn again from their keys, twice, to count how many lie
    below each of 64 edges. So T passes become 3 T.

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
    targets, missing, precision, positive = _observations(shape, dtype, has_variance, targets, precision)
    event_dims = _checks.integer("regress", "event_dims", event_dims, 0)
    if event_dims > len(shape):
        raise ValueError(f"regress: event_dims must be at most the rank of the means, {len(shape)}, got {event_dims}.")
    levels = order.levels("regress", quantiles)

    def summarise(values: Any) -> _Sums:
        means, variances = values if has_variance else (values, None)
        means, invalid = _finite(means, dtype)
        if variances is not None:
            variances = variances.astype(dtype)
            least = 0 if targets is None else np.finfo(dtype).tiny  # below it 1 / variance is infinite
            bad = ~(variances >= least) | jnp.isinf(variances)
            variances, invalid = jnp.where(bad, 1, variances), invalid | bad
        if precision is not None:
            invalid |= ~positive[None]
        density = None
        if targets is not None:
            scale, log_variance = _scale(variances, precision)
            away = 2 * (0.5 * targets[None] - 0.5 * means) * scale
            logs = -0.5 * (log_variance + math.log(2 * math.pi) + jnp.square(away))
            density = running.log_sum(logs.sum(tuple(range(logs.ndim - event_dims, logs.ndim))))
        variance = None if variances is None else running.moments(variances)[0].mean
        low, high = (lax.stop_gradient(end) for end in (means.min(0), means.max(0)))
        return _Sums(running.moments(means)[0], variance, density, low, high, invalid.any(0))

    def error(sums: _Sums, count: Array) -> Array:
        return streaming.standard_error(sums.mean.variance.value, count)

    def means_of(draw: sampling.Draw) -> sampling.Draw:
        return lambda first, size: _finite(draw(first, size)[0] if has_variance else draw(first, size), dtype)[0]

    def compute(draw: sampling.Draw) -> Regression:
        sums, count = streaming.fold(passes, draw, summarise, _merge, finished=streaming.within(tolerance, error))
        epistemic = sums.mean.variance.value
        aleatoric = None
        if sums.variance is not None:
            aleatoric = sums.variance.value
        elif precision is not None:
            aleatoric = jnp.broadcast_to(1 / precision, shape)
        total = epistemic if aleatoric is None else epistemic + aleatoric
        density = None
        if sums.density is not None:
            known = ~(sums.invalid | missing).any(tuple(range(len(shape) - event_dims, len(shape))))
            density = nan_unless(known, sums.density.value - jnp.log(count.astype(dtype)))
        found = None
        if levels is not None:
            ends = (sums.low, sums.high)
            found = order.quantiles(passes, means_of(draw), levels, ends, count, fixed=tolerance is None)
            found = nan_unless(~sums.invalid[None], found)
        mean, epistemic, total = (nan_unless(~sums.invalid, x) for x in (sums.mean.mean.value, epistemic, total))
        aleatoric = None if aleatoric is None else nan_unless(~sums.invalid, aleatoric)
        return Regression(mean, epistemic, aleatoric, total, density, found, sums.invalid, count)

    summary = passes.run(compute)
    if message := streaming.warn_of(
        "regress", summary.invalid, "what is not finite, or a variance that is not positive,"
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
        variance = running.merge_means(one.variance, m, other.variance, n)
    density = None
    if one.density is not None and other.density is not None:
        density = running.merge_log_sums(one.density, other.density)
    return _Sums(
        running.merge_moments(one.mean, m, other.mean, n),
        variance,
        density,
        jnp.minimum(one.low, other.low),
        jnp.maximum(one.high, other.high),
        one.invalid | other.invalid,
    )


def _finite(means: Array, dtype: Any) -> tuple[Array, Array]:
    """The means, 0 where they are not finite, and where that is.

    Selected before they are used: XLA on CPU would fuse the last product of fn with a difference into one operation,
    so that a sample is not the same number in all places.
    """
    means = means.astype(dtype)
    invalid = ~jnp.isfinite(means)
    return jnp.where(invalid, 0, means), invalid


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
) -> tuple[Array | None, Any, Array | None, Any]:
    """The targets and where they are NaN, the precision and where it is positive; any number in place of the rest."""
    missing = positive = None
    if precision is not None and has_variance:
        raise ValueError("regress: precision must be None where fn returns variances, got both. Add one to the other.")
    if targets is not None and precision is None and not has_variance:
        raise ValueError("regress: precision must be given with targets, got None. Or let fn return (mean, variance).")
    if targets is not None:
        targets = _inputs.real("regress", "targets", targets)
        if tuple(targets.shape) != shape:
            raise ValueError(f"regress: targets must have the shape {shape} of the means, got {targets.shape}.")
        targets = targets.astype(dtype)
        missing = jnp.isnan(targets)
        targets = jnp.where(missing, 0, targets)
    if precision is not None:
        limits, given = np.finfo(dtype), precision
        precision = _inputs.real("regress", "precision", precision).astype(dtype)
        _inputs.require(
            "regress",
            f"precision must be positive, from {limits.tiny:.3g} to {limits.max:.3g} in {dtype.name}, {{got}}",
            given,
            lambda of: (of >= limits.tiny) & (of <= limits.max),
        )
        fits = zip(reversed(precision.shape), reversed(shape), strict=False)
        if precision.ndim > len(shape) or any(n not in (1, m) for n, m in fits):
            raise ValueError(f"regress: precision must broadcast against {shape}, got shape {precision.shape}.")
        precision = precision.reshape((1,) * (len(shape) - precision.ndim) + precision.shape)
        positive = (precision >= limits.tiny) & (precision <= limits.max)
        precision = jnp.where(positive, precision, 1)
    return targets, missing, precision, positive
