"""Scores of predicted distributions against what came true: proper ones, and the coverage of intervals."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from dropjax import _arguments, _checks
from dropjax.masks import nan_unless
from dropjax.mc import _inputs


class Coverage(NamedTuple):
    """How often intervals hold the target, and how wide they are; float32 scalars."""

    coverage: Array
    """Share of the targets in `[lower, upper]`: for 90 % intervals about 0.9."""
    width: Array
    """Mean width: of two methods with the same coverage, the sharper one is better."""


@_arguments.public
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
    p, valid = _inputs.clean(p, labels)
    square = ((p - jax.nn.one_hot(labels, p.shape[1], dtype=p.dtype)) ** 2).sum(-1)
    return nan_unless(valid, square).mean()


@_arguments.public
def negative_log_likelihood(predictions: ArrayLike, labels: ArrayLike, *, logits: bool = False) -> Array:
    """Returns the mean negative log probability of the true classes, in nats.

    A true class of probability 0 costs infinity, as does one below the least normal number of the dtype, which XLA
    takes for 0 on CPU. Logits stay in the log domain; for those of T samples this
    is -log mean_t softmax(logits_t), the likelihood of the averaged prediction, and not the average of
    their likelihoods.

    Args:
      predictions: probabilities, float `[n, classes]`; or, with `logits`, logits `[n, classes]` or those of T
        samples, `[T, n, classes]`.
      labels: int `[n]`, the true classes.
      logits: whether predictions are logits.

    Returns:
      float32 scalar, float64 for float64; NaN where traced probabilities or labels are out of range, or logits have no
      softmax (NaN, +inf, or all -inf).

    Raises:
      TypeError, ValueError: if shapes or dtypes do not fit, or known values are out of range. Known logits that look
        like probabilities are a warning.

    Example:
      >>> negative_log_likelihood(jnp.array([[1e4, 0.0]]), jnp.array([1]), logits=True)
      Array(10000., dtype=float32)

    Reference:
      Gneiting, Raftery, [Strictly proper scoring rules](https://doi.org/10.1198/016214506000001437), 2007.
    """
    if not _checks.flag("negative_log_likelihood", "logits", logits):
        return _of_probabilities(*_inputs.classes("negative_log_likelihood", predictions, labels))
    checked = check_logits("negative_log_likelihood", predictions, labels)
    _inputs.warn_of_probabilities("negative_log_likelihood", predictions, "For probabilities pass logits=False.")
    return _of_logits(*checked)


@jax.jit
def _of_probabilities(p: Array, labels: Array) -> Array:
    p, valid = _inputs.clean(p, labels)
    return nan_unless(valid, -jnp.log(_inputs.at_label(p, labels))).mean()


@jax.jit
def _of_logits(logits: Array, labels: Array) -> Array:
    valid = has_softmax(logits, labels)
    room = _inputs.headroom(logits).min()
    loss = -log_likelihood(jnp.where(valid[:, None], logits, 0), labels, room)
    return nan_unless(valid, loss).mean() / room


def check_logits(function: str, logits: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    """Checks logits and labels; returns the former wide, and of shape `[T, n, classes]`."""
    y = _inputs.labelled(function, "logits", logits, labels, (2, 3))
    (z,) = _inputs.widen(jnp.asarray(logits))
    return z.reshape(-1, *z.shape[-2:]), y


def has_softmax(logits: Array, labels: Array) -> Array:
    """Whether all logits of an example `[T, n, classes]` have a softmax, and its label is one of the classes; `[n]`."""
    return jnp.isfinite(logits.max(-1)).all(0) & _inputs.is_label(labels, logits)


def log_likelihood(logits: Array, labels: Array, room: ArrayLike = 1) -> Array:
    """log mean_t softmax(logits_t)[label], `[n]`, of logits `[T, n, classes]`, times `_inputs.headroom`."""
    return _inputs.log_mean_exp(_inputs.at_label(_inputs.log_softmax(logits, room), labels), room)


@_arguments.public
def interval_coverage(lower: ArrayLike, upper: ArrayLike, targets: ArrayLike) -> Coverage:
    """Returns how many targets lie in their intervals, and the mean width of these.

    Args:
      lower: real `[...]`.
      upper: real, of the same shape, not below lower.
      targets: real, of the same shape.

    Returns:
      `Coverage`; NaN where a bound or a target is NaN, or a traced upper bound is below its lower one. The width is
      infinite where an interval has one infinite end, and 0 where both ends are the same infinity.

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
    if _checks.is_known(lower) and _checks.is_known(upper):
        _inputs.require(
            "interval_coverage",
            "upper must not be below lower, {got} The order of the arguments is lower, upper, targets.",
            upper,
            lambda of: ~(of < np.asarray(lower)),
        )
    return _coverage(low, high, y)


@jax.jit
def _coverage(low: Array, high: Array, y: Array) -> Coverage:
    valid = ~jnp.isnan(y) & (low <= high)
    inside = nan_unless(valid, ((low <= y) & (y <= high)).astype(y.dtype))
    room = _inputs.headroom(low, high).min()
    width = _inputs.difference(high * room, low * room)
    return Coverage(inside.mean(), nan_unless(valid, width).mean() / room)


@_arguments.public
def pinball(quantiles: ArrayLike, targets: ArrayLike, level: float) -> Array:
    """Returns the mean pinball loss of predicted quantiles, least for the true ones.

    Mean of max(level (y - q), (level - 1) (y - q)).

    Args:
      quantiles: real `[...]`, the predicted quantiles.
      targets: real, of the same shape.
      level: which quantile they are, in (0, 1).

    Returns:
      float32 scalar, float64 for float64; infinite where one of a quantile and its target is, NaN where one is NaN.

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
    return _pinball(q, y, jnp.asarray(level, q.dtype), jnp.asarray(1 - level, q.dtype))


@jax.jit
def _pinball(q: Array, y: Array, below: Array, above: Array) -> Array:
    """Mean of max(below (y - q), above (q - y)): the shares of the distribution below and above the quantile q."""
    room = _inputs.headroom(q, y).min()
    gap = _inputs.difference(y * room, q * room)
    finite = jnp.where(jnp.isinf(gap), 0, gap)
    loss = jnp.where(jnp.isinf(gap), jnp.abs(gap), jnp.maximum(below * finite, -above * finite))
    return loss.mean() / room


@_arguments.public
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
      float32 scalar, float64 for float64; infinite where a sample or its target is (and 0 where all are the same
      infinity), NaN where one is NaN.

    Raises:
      TypeError, ValueError: if shapes or dtypes do not fit.

    Example:
      >>> crps(jnp.array([[0.0], [2.0]]), jnp.array([1.0]))
      Array(0.5, dtype=float32)

    Reference:
      Gneiting, Raftery, [Strictly proper scoring rules](https://doi.org/10.1198/016214506000001437), 2007; Ferro,
      [Fair scores for ensemble forecasts](https://doi.org/10.1002/qj.2270), 2014.
    """
    x, y = _inputs.array("crps", "samples", samples), _inputs.array("crps", "targets", targets)
    if x.ndim:
        _checks.known_length("crps", "dimension 0 of samples", x.shape[0])
    least = 2 if _checks.flag("crps", "fair", fair) else 1
    if x.ndim != y.ndim + 1 or x.shape[1:] != y.shape or len(x) < least:
        order = " The order of the arguments is samples, targets." if x.ndim and y.shape[1:] == x.shape else ""
        if x.shape[1:] == y.shape:
            order = " Draw more of them."
        raise ValueError(
            f"crps: samples and targets must be of shapes [T, ...] and [...], with T at least {least}, got "
            f"{_checks.describe(x)} and {_checks.describe(y)}.{order}"
        )
    return _crps(*_inputs.numbers("crps", samples=x, targets=jnp.broadcast_to(y[None], x.shape)), bool(fair))


@functools.partial(jax.jit, static_argnums=2)
def _crps(x: Array, y: Array, fair: bool) -> Array:
    # It is twice the mean pinball loss of the sorted samples as quantiles of levels (t - 1/2) / T, and, if fair, of
    # levels (t - 1) / (T - 1): a sum of positive terms, and no square of T.
    rank = jnp.arange(len(x)).astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    rank = rank if fair else rank + 0.5
    total = len(x) - 1.0 if fair else float(len(x))
    return 2 * _pinball(jnp.sort(x, 0), y, rank / total, (total - rank) / total)


@_arguments.public
def crps_gaussian(mean: ArrayLike, std: ArrayLike, targets: ArrayLike) -> Array:
    """Returns the mean continuous ranked probability score of Gaussian predictions.

    With z = (y - mean) / std it is std (z (2 Φ(z) - 1) + 2 φ(z) - 1 / sqrt(π)); the absolute error where std is 0.

    Args:
      mean: real `[...]`.
      std: real, of the same shape, at least 0.
      targets: real, of the same shape.

    Returns:
      float32 scalar, float64 for float64; infinite where a number is (a mean and its target that are the same infinity
      have no distance), NaN where one is NaN or a traced std is negative.

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
    room = _inputs.headroom(m, s, y).min()
    distance = _inputs.difference(y * room, m * room)
    valid, endless = (s >= 0) & ~jnp.isnan(distance), jnp.isinf(s)
    s = jnp.where(valid, s, 0) * room
    far = (jnp.abs(distance) > 1e6 * s) & ~endless  # there 2 Φ(z) - 1 is 1, φ(z) is 0, and z may overflow
    ends = far | endless | (s == 0)
    # Both are divided by the larger one first, so that the derivative of 1 / s does not overflow.
    larger = jnp.where(ends, 1, lax.stop_gradient(jnp.maximum(jnp.abs(distance), s)))
    z = jnp.where(ends, 0, distance) / larger / jnp.where(ends, 1, s / larger)
    root = np.sqrt(np.pi).astype(s.dtype)
    score = s * (z * (2 * jax.scipy.stats.norm.cdf(z) - 1) + 2 * jax.scipy.stats.norm.pdf(z) - 1 / root)
    far_score = jnp.abs(distance) - jnp.where(endless, 0, s) / root
    return nan_unless(valid, jnp.where(far, far_score, score)).mean() / room
