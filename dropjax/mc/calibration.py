"""How far confidence can be trusted."""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from dropjax import _arguments, _checks
from dropjax.masks import nan_unless
from dropjax.mc import _inputs

_MOST_BINS = 2**16
_MOST_SUMS = 2**22  # of blocks of examples, for all bins
Binning = Literal["equal_width", "equal_mass"]
Norm = Literal["l1", "l2", "max"]


class Reliability(NamedTuple):
    """A reliability diagram: predictions binned by confidence, float32 `[bins]`; NaN where a bin is empty."""

    confidence: Array
    """Mean confidence of the predictions in each bin."""
    accuracy: Array
    """Share of them that are right."""
    size: Array
    """How many there are, int32."""


@_arguments.public
def reliability(
    probabilities: ArrayLike, labels: ArrayLike, *, num_bins: int = 15, binning: Binning = "equal_width"
) -> Reliability:
    """Bins predictions by confidence, the highest class probability.

    Of equal width, bin b holds the confidences in (b / bins, (b + 1) / bins]. Of equal mass, it holds those
    of rank b n / bins up to (b + 1) n / bins; equal confidences have the lowest of their ranks and stay together,
    so that the order of the examples does not matter.

    Args:
      probabilities: float `[n, classes]`.
      labels: int `[n]`, the true classes.
      num_bins: number of bins, at most 65,536.
      binning: `"equal_width"` over [0, 1], or `"equal_mass"`.

    Returns:
      `Reliability`; confidence and accuracy are NaN in all bins where traced probabilities or labels are out of range.

    Raises:
      TypeError, ValueError: if shapes or dtypes do not fit, or known values are out of range.

    Example:
      >>> reliability(jnp.array([[0.9, 0.1], [0.4, 0.6]]), jnp.array([0, 0]), num_bins=2).accuracy
      Array([nan, 0.5], dtype=float32)

    Reference:
      Guo, Pleiss, Sun, Weinberger, [On calibration of modern neural
      networks](https://arxiv.org/abs/1706.04599), 2017; for equal mass Nguyen, O'Connor, [Posterior calibration and
      exploratory analysis](https://arxiv.org/abs/1508.05154), 2015.
    """
    num_bins = _check("reliability", num_bins, binning)
    p, y = _inputs.classes("reliability", probabilities, labels)
    _checks.known_length("reliability", "dimension 0 of probabilities", p.shape[0])
    return _reliability(p, y, num_bins, binning)


@_arguments.public
def calibration_error(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    num_bins: int = 15,
    binning: Binning = "equal_width",
    classwise: bool = False,
    norm: Norm = "l1",
) -> Array:
    """Expected calibration error: the mean gap between confidence and accuracy.

    ECE = sum_b (n_b / n) |accuracy_b - confidence_b|. With `classwise` each class counts, and not only the most
    probable one: the probability of class k is the confidence that k is true, and the errors of the classes are
    averaged (the static calibration error; of equal mass, the adaptive one). Few examples in a bin
    make it too large, also where the predictions are calibrated.

    Args:
      probabilities: float `[n, classes]`.
      labels: int `[n]`, the true classes.
      num_bins: number of bins, at most 65,536.
      binning: `"equal_width"` over [0, 1], or `"equal_mass"`, see `reliability`.
      classwise: whether to bin the probability of every class.
      norm: `"l1"`, the mean gap; `"l2"`, the root of the mean squared gap; `"max"`, the largest gap of a bin.

    Returns:
      float32 scalar in `[0, 1]`; NaN where traced probabilities or labels are out of range.

    Raises:
      TypeError, ValueError: if shapes or dtypes do not fit, or known values are out of range.

    Example:
      >>> calibration_error(jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([0, 1]))
      Array(0.5, dtype=float32)

    Reference:
      Guo, Pleiss, Sun, Weinberger, [On calibration of modern neural
      networks](https://arxiv.org/abs/1706.04599), 2017; Nixon and others, [Measuring calibration in deep
      learning](https://arxiv.org/abs/1904.01685), 2019 (classwise, equal mass); Kumar, Liang, Ma, [Verified
      uncertainty calibration](https://arxiv.org/abs/1909.10155), 2019 (l2).
    """
    num_bins = _check("calibration_error", num_bins, binning)
    _inputs.choice("calibration_error", "norm", norm, ("l1", "l2", "max"))
    classwise = _checks.flag("calibration_error", "classwise", classwise)
    p, y = _inputs.classes("calibration_error", probabilities, labels)
    _checks.known_length("calibration_error", "dimension 0 of probabilities", p.shape[0])
    return _error(p, y, num_bins, binning, classwise, norm)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _reliability(p: Array, labels: Array, num_bins: int, binning: str) -> Reliability:
    p, valid = _inputs.clean(p, labels)
    bins = _binned(p.max(-1), p.argmax(-1) == labels, num_bins, binning)
    filled = (bins.size > 0) & valid.all()
    confidence, accuracy = (nan_unless(filled, mean) for mean in (bins.confidence, bins.accuracy))
    return Reliability(confidence, accuracy, bins.size)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _error(p: Array, labels: Array, num_bins: int, binning: str, classwise: bool, norm: str) -> Array:
    p, valid = _inputs.clean(p, labels)
    if classwise:
        right = labels[:, None] == jnp.arange(p.shape[1])[None]
        bins = jax.vmap(lambda p, right: _binned(p, right, num_bins, binning), in_axes=1)(p, right)
    else:
        bins = _binned(p.max(-1), p.argmax(-1) == labels, num_bins, binning)
    size = bins.size.astype(jnp.float32)  # whose sum over the classes int32 may not hold
    share = size / size.sum()
    gap = jnp.abs(bins.accuracy - bins.confidence)
    return nan_unless(valid.all(), _norm(share, gap, norm))


def _norm(share: Array, gap: Array, norm: str) -> Array:
    if norm == "max":
        return gap.max()
    if norm == "l1":
        return (share * gap).sum()
    square = (share * gap**2).sum()
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))  # whose gradient is finite at 0


def _check(function: str, num_bins: int, binning: str) -> int:
    _inputs.choice(function, "binning", binning, ("equal_width", "equal_mass"))
    num_bins = _checks.integer(function, "num_bins", num_bins, 1)
    if num_bins > _MOST_BINS:
        raise ValueError(f"{function}: num_bins must be at most {_MOST_BINS}, got {num_bins}.")
    return num_bins


def _binned(confidence: Array, right: Array, num_bins: int, binning: str) -> Reliability:
    """Means of bins, which are 0 where a bin is empty."""
    confidence, n = confidence.astype(jnp.float32), len(confidence)
    if binning == "equal_width":
        # compared with, since a product would be rounded past them
        ends = np.append(np.arange(1, num_bins) / num_bins, np.inf)
        bins = jnp.searchsorted(jnp.asarray(ends, jnp.float32), confidence)
    else:
        ranks = jnp.searchsorted(jnp.sort(confidence), confidence)
        first = [-(-b * n // num_bins) for b in range(1, num_bins + 1)]
        bins = jnp.searchsorted(jnp.asarray(np.array(first, np.int32)), ranks.astype(jnp.int32), side="right")
    counts = jnp.zeros(num_bins, jnp.int32)
    size, hits = counts.at[bins].add(1), counts.at[bins].add(right.astype(jnp.int32))
    # Of deviations from the lowest of each bin, in blocks: a float32 sum of many drifts, and stops growing at 2^24.
    lowest = jnp.full(num_bins, 2, jnp.float32).at[bins].min(lax.stop_gradient(confidence))
    length = max(64, n * num_bins // _MOST_SUMS)
    sums = jnp.zeros((n // length + 1, num_bins), jnp.float32)
    total = sums.at[jnp.arange(n) // length, bins].add(confidence - lowest[bins]).sum(0)
    in_bin = jnp.maximum(size, 1).astype(jnp.float32)
    mean = jnp.where(size > 0, lowest + total / in_bin, 0)
    return Reliability(mean, hits.astype(jnp.float32) / in_bin, size)
