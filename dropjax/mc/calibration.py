"""How far confidence can be trusted."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dropjax import _checks


class Reliability(NamedTuple):
    """A reliability diagram: predictions binned by confidence, float32 `[bins]`; NaN where a bin is empty."""

    confidence: Array
    """Mean confidence of the predictions in each bin."""
    accuracy: Array
    """Share of them that are right."""
    size: Array
    """How many there are, int32."""


def reliability(probabilities: ArrayLike, labels: ArrayLike, *, num_bins: int = 15) -> Reliability:
    """Bins predictions by confidence, the highest class probability, into bins of equal width.

    Bin b holds the confidences in (b / bins, (b + 1) / bins].

    Args:
      probabilities: float `[n, classes]`.
      labels: int `[n]`, the true classes.
      num_bins: number of bins over [0, 1].

    Returns:
      `Reliability`.

    Raises:
      TypeError, ValueError: if shapes or dtypes do not fit, or known values are out of range.

    Example:
      >>> reliability(jnp.array([[0.9, 0.1], [0.4, 0.6]]), jnp.array([0, 0]), num_bins=2).accuracy
      Array([nan, 0.5], dtype=float32)

    Reference:
      Guo, Pleiss, Sun, Weinberger, [On calibration of modern neural
      networks](https://arxiv.org/abs/1706.04599), 2017.
    """
    return _reliability("reliability", probabilities, labels, num_bins)


def _reliability(function: str, probabilities: ArrayLike, labels: ArrayLike, num_bins: int) -> Reliability:
    probabilities, labels = jnp.asarray(probabilities), jnp.asarray(labels)
    num_bins = _checks.integer(function, "num_bins", num_bins, 1)
    got = f"got {_checks.describe(probabilities)} and {_checks.describe(labels)}."
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise ValueError(
            f"{function}: probabilities and labels must be of shapes [n, classes] and [n], {got} "
            "For one-hot labels pass their argmax."
        )
    if not jnp.issubdtype(probabilities.dtype, jnp.floating) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{function}: probabilities must be floats and labels integers, {got}")
    if not _checks.is_traced(probabilities) and not bool(((probabilities >= 0) & (probabilities <= 1.001)).all()):
        raise ValueError(f"{function}: probabilities must be in [0, 1], got others. For logits pass their softmax.")
    if not _checks.is_traced(labels) and not bool(((labels >= 0) & (labels < probabilities.shape[1])).all()):
        raise ValueError(f"{function}: labels must be in [0, {probabilities.shape[1]}), got others.")
    confidence, right = probabilities.astype(jnp.float32).max(-1), probabilities.argmax(-1) == labels
    bins = jnp.clip(jnp.ceil(confidence * num_bins).astype(jnp.int32) - 1, 0, num_bins - 1)
    counts = jnp.zeros(num_bins, jnp.int32)
    size, hits = counts.at[bins].add(1), counts.at[bins].add(right.astype(jnp.int32))
    # sums of blocks first: a float32 sum of ones would stop growing at 2^24
    block = jnp.arange(len(bins)) // 4096
    total = jnp.zeros((len(bins) // 4096 + 1, num_bins), jnp.float32).at[block, bins].add(confidence).sum(0)
    in_bin = jnp.maximum(size, 1).astype(jnp.float32)
    empty = jnp.where(size > 0, 0, jnp.nan)
    return Reliability(total / in_bin + empty, hits.astype(jnp.float32) / in_bin + empty, size)


def calibration_error(probabilities: ArrayLike, labels: ArrayLike, *, num_bins: int = 15) -> Array:
    """Expected calibration error: the mean gap between confidence and accuracy.

    ECE = sum_b (n_b / n) |accuracy_b - confidence_b| over bins of equal width.

    Args:
      probabilities: float `[n, classes]`.
      labels: int `[n]`, the true classes.
      num_bins: number of bins over [0, 1].

    Returns:
      float32 scalar in `[0, 1]`.

    Raises:
      TypeError, ValueError: if shapes or dtypes do not fit, or known values are out of range.

    Example:
      >>> calibration_error(jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([0, 1]))
      Array(0.5, dtype=float32)

    Reference:
      Guo, Pleiss, Sun, Weinberger, [On calibration of modern neural
      networks](https://arxiv.org/abs/1706.04599), 2017.
    """
    bins = _reliability("calibration_error", probabilities, labels, num_bins)
    share = bins.size.astype(jnp.float32) / jnp.float32(bins.size.sum())
    return jnp.where(bins.size > 0, jnp.abs(bins.accuracy - bins.confidence) * share, 0).sum()
