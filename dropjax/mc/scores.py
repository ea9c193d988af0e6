"""Scores of predicted distributions against what came true: proper ones, and the coverage of intervals."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from dropjax import _checks
from dropjax.mc import _inputs


class Coverage(NamedTuple):
    """How often intervals hold the target, and how wide they are; float32 scalars."""

    coverage: Array
    """Share of the targets in `[lower, upper]`: for 90 % intervals about 0.9."""
    width: Array
    """Mean width: of two methods with the same coverage, the sharper one is better."""


def brier(probabilities: ArrayLike, labels: ArrayLike) -> Array:
    """Returns the mean Brier score: the squared distance of the probabilities from the one-hot label.

    Mean over examples of sum_k (p_k - [k = label])^2: 0 is perfect, 2 is worst. For two classes it is twice what
    scikit-learn's `brier_score_loss` gives.

    Args:
      probabilities: float `[n, classes]`.
      labels: int `[n]`, the true classes.

    Returns:
      float32 scalar in `[0, 2]`, float64 for float64; NaN where traced probabilities or labels are out of range.

    Raises:
      TypeError, ValueError: if shapes or dtypes do not fit, or known values are out of range.

    Example:
      >>> brier(jnp.array([[0.75, 0.25]]), jnp.array([0]))
      Array(0.125, dtype=float32)

    Reference:
      Brier, [Verification of forecasts expressed in terms of
      probability](https://doi.org/10.1175/1520-0493(1950)078%3C0001:VOFEIT%3E2.0.CO;2), 1950.
    """
    return _brier(*_inputs.classes("brier", probabilities, labels))


@jax.jit
def _brier(p: Array, labels: Array) -> Array:
    p = _inputs.clean(p, labels)
    return ((p - jax.nn.one_hot(labels, p.shape[1], dtype=p.dtype)) ** 2).sum(-1).mean()


def negative_log_likelihood(predictions: ArrayLike, labels: ArrayLike, *, logits: bool = False) -> Array:
    """Returns the mean negative log probability of the true classes, in nats.

    A true class of probability 0 costs infinity. Logits stay in the log domain; for those of T samples this
    is -log mean_t softmax(logits_t), the likelihood of the averaged prediction, and not the average of
    their likelihoods.

    Args:
      predictions: probabilities, float `[n, classes]`; or, with `logits`, logits `[n, classes]` or those of T
        samples, `[T, n, classes]`.
      labels: int `[n]`, the true classes.
      logits: whether predictions are logits.

    Returns:
      float32 scalar, float64 for float64; NaN where traced probabilities or labels are out of range.

    Raises:
      TypeError, ValueError: if shapes or dtypes do not fit, or known values are out of range.

    Example:
      >>> negative_log_likelihood(jnp.array([[1e4, 0.0]]), jnp.array([1]), logits=True)
      Array(10000., dtype=float32)

    Reference:
      Gneiting, Raftery, [Strictly proper scoring rules](https://doi.org/10.1198/016214506000001437), 2007.
    """
    if not _checks.flag("negative_log_likelihood", "logits", logits):
        return _of_probabilities(*_inputs.classes("negative_log_likelihood", predictions, labels))
    return _of_logits(*check_logits("negative_log_likelihood", predictions, labels))


@jax.jit
def _of_probabilities(p: Array, labels: Array) -> Array:
    return -jnp.log(_inputs.at_label(_inputs.clean(p, labels), labels)).mean()


@jax.jit
def _of_logits(logits: Array, labels: Array) -> Array:
    return -log_likelihood(logits, labels).mean()


def check_logits(function: str, logits: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    """Checks logits and labels; returns the former wide, and of shape `[T, n, classes]`."""
    y = _inputs.labelled(function, "logits", logits, labels, (2, 3))
    (z,) = _inputs.widen(jnp.asarray(logits))
    return z.reshape(-1, *z.shape[-2:]), y


def log_likelihood(logits: Array, labels: Array) -> Array:
    """log mean_t softmax(logits_t)[label], `[n]`, of logits `[T, n, classes]`; NaN where the label is none of them."""
    log_p = _inputs.at_label(jax.nn.log_softmax(logits), labels)
    log_p = jnp.where(_inputs.is_label(labels, logits)[None], log_p, jnp.nan)
    return jax.nn.logsumexp(log_p, axis=0) - jnp.log(jnp.asarray(len(logits), log_p.dtype))


def interval_coverage(lower: ArrayLike, upper: ArrayLike, targets: ArrayLike) -> Coverage:
    """Returns how many targets lie in their intervals, and the mean width of these.

    Args:
      lower: real `[...]`.
      upper: real, of the same shape, not below lower.
      targets: real, of the same shape.

    Returns:
      `Coverage`; NaN where a bound or a target is NaN, or a traced upper bound is below its lower one.

    Raises:
      TypeError, ValueError: if shapes or dtypes do not fit, or known bounds are in the wrong order.

    Example:
      >>> interval_coverage(jnp.zeros(4), jnp.ones(4), jnp.array([0.5, 1.0, 1.5, -1.0])).coverage
      Array(0.5, dtype=float32)

    Reference:
      Gneiting, Balabdaoui, Raftery, [Probabilistic forecasts, calibration and
      sharpness](https://doi.org/10.1111/j.1467-9868.2007.00587.x), 2007.
    """
    low, high, y = _inputs.numbers("interval_coverage", lower=lower, upper=upper, targets=targets)
    if _inputs.is_known(lower) and _inputs.is_known(upper):
        _inputs.require(
            "interval_coverage", "upper must not be below lower, {got}", upper, lambda of: ~(of < np.asarray(lower))
        )
    return _coverage(low, high, y)


@jax.jit
def _coverage(low: Array, high: Array, y: Array) -> Coverage:
    missing = jnp.isnan(y) | ~(low <= high)
    inside = jnp.where(missing, jnp.nan, ((low <= y) & (y <= high)).astype(y.dtype))
    return Coverage(inside.mean(), jnp.where(missing, jnp.nan, high - low).mean())


def pinball(quantiles: ArrayLike, targets: ArrayLike, level: float) -> Array:
    """Returns the mean pinball loss of predicted quantiles, least for the true ones.

    Mean of max(level (y - q), (level - 1) (y - q)).

    Args:
      quantiles: real `[...]`, the predicted quantiles.
      targets: real, of the same shape.
      level: which quantile they are, in (0, 1).

    Returns:
      float32 scalar, float64 for float64.

    Raises:
      TypeError, ValueError: if shapes or dtypes do not fit, or the level is out of range.

    Example:
      >>> pinball(jnp.array([1.0]), jnp.array([3.0]), 0.75)
      Array(1.5, dtype=float32)

    Reference:
      Koenker, Bassett, [Regression quantiles](https://doi.org/10.2307/1913643), 1978.
    """
    q, y = _inputs.numbers("pinball", quantiles=quantiles, targets=targets)
    level = _inputs.fraction("pinball", "level", level)
    return jnp.maximum(level * (y - q), (level - 1) * (y - q)).mean()


def crps(samples: ArrayLike, targets: ArrayLike, *, fair: bool = False) -> Array:
    """Returns the mean continuous ranked probability score of samples, in units of the target.

    E|X - y| - E|X - X'| / 2, where X and X' are drawn from the T samples: with one sample the absolute error. That
    is the score of the samples as they are. `fair` draws two different ones, which is
    what infinitely many samples would score on average: compare different T with it.

    Args:
      samples: real `[T, ...]`.
      targets: real `[...]`.
      fair: whether to estimate the score of the distribution that the samples come from; needs T of at least 2.

    Returns:
      float32 scalar, float64 for float64. NaN where a sample or a target is NaN.

    Raises:
      TypeError, ValueError: if shapes or dtypes do not fit.

    Example:
      >>> crps(jnp.array([[0.0], [2.0]]), jnp.array([1.0]))
      Array(0.5, dtype=float32)

    Reference:
      Gneiting, Raftery, [Strictly proper scoring rules](https://doi.org/10.1198/016214506000001437), 2007; Ferro,
      [Fair scores for ensemble forecasts](https://doi.org/10.1002/qj.2270), 2014.
    """
    x, y = jnp.asarray(samples), jnp.asarray(targets)
    least = 2 if _checks.flag("crps", "fair", fair) else 1
    if x.ndim != y.ndim + 1 or x.shape[1:] != y.shape or len(x) < least:
        raise ValueError(
            f"crps: samples and targets must be of shapes [T, ...] and [...], with T at least {least}, got "
            f"{_checks.describe(x)} and {_checks.describe(y)}."
        )
    return _crps(*_inputs.numbers("crps", samples=x, targets=jnp.broadcast_to(y[None], x.shape)), bool(fair))


@functools.partial(jax.jit, static_argnums=2)
def _crps(x: Array, y: Array, fair: bool) -> Array:
    num_samples = len(x)
    distance, x = jnp.abs(x - y), jnp.sort(x - y, 0)
    weights = (2 * jnp.arange(1, num_samples + 1) - num_samples - 1).astype(x.dtype)
    pairs = num_samples * ((num_samples - 1) if fair else num_samples)
    return (distance.mean(0) - (weights.reshape(-1, *[1] * (x.ndim - 1)) * x).sum(0) / pairs).mean()


def crps_gaussian(mean: ArrayLike, std: ArrayLike, targets: ArrayLike) -> Array:
    """Returns the mean continuous ranked probability score of Gaussian predictions.

    With z = (y - mean) / std it is std (z (2 Φ(z) - 1) + 2 φ(z) - 1 / sqrt(π)); the absolute error where std is 0.

    Args:
      mean: real `[...]`.
      std: real, of the same shape, at least 0.
      targets: real, of the same shape.

    Returns:
      float32 scalar, float64 for float64; NaN where a traced std is negative.

    Raises:
      TypeError, ValueError: if shapes or dtypes do not fit, or a known std is negative.

    Example:
      >>> crps_gaussian(jnp.array([0.0]), jnp.array([0.0]), jnp.array([2.0]))
      Array(2., dtype=float32)

    Reference:
      Gneiting, Raftery, [Strictly proper scoring rules](https://doi.org/10.1198/016214506000001437), 2007.
    """
    m, s, y = _inputs.numbers("crps_gaussian", mean=mean, std=std, targets=targets)
    _inputs.require("crps_gaussian", "std must not be negative, {got}", std, lambda of: ~(of < 0))
    return _crps_gaussian(m, s, y)


@jax.jit
def _crps_gaussian(m: Array, s: Array, y: Array) -> Array:
    far = jnp.abs(y - m) > 1e6 * s  # there 2 Φ(z) - 1 is 1, φ(z) is 0, and z may overflow
    z = jnp.where(far, 0, y - m) / jnp.where(far | (s == 0), 1, s)
    score = s * (
        z * (2 * jax.scipy.stats.norm.cdf(z) - 1)
        + 2 * jax.scipy.stats.norm.pdf(z)
        - 1 / jnp.sqrt(jnp.pi).astype(s.dtype)
    )
    far_score = jnp.abs(y - m) - s / jnp.sqrt(jnp.pi).astype(s.dtype)
    return jnp.where(s >= 0, jnp.where(far, far_score, score), jnp.nan).mean()
