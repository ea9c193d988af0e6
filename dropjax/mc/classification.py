"""What a stochastic classifier says and does not know, streamed over the samples."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from dropjax import _arguments, _checks
from dropjax.mc import sampling, streaming
from dropjax.mc.streaming import Moments

STATISTICS = ("probabilities", "expected_entropy", "predictive_entropy", "mutual_information")


class Classification(NamedTuple):
    """What T samples of class probabilities say; float32 (float64 of float64 logits), entropies in nats."""

    probabilities: Array
    """Mean class probabilities, `[..., classes]`."""
    predictive_entropy: Array
    """Total uncertainty: the entropy of the mean, `[...]`."""
    expected_entropy: Array
    """Aleatoric part: the mean of the samples' entropies, `[...]`."""
    mutual_information: Array
    """Epistemic part (BALD): the difference of the two, at least 0, `[...]`."""
    votes: Array
    """How many samples have each class as their most probable one, int32 `[..., classes]`."""
    variation_ratio: Array
    """Share of the samples that disagree with the most frequent prediction, `[...]`."""
    variance: Array
    """Variance over the samples of the probability of the class that the mean predicts, `[...]`."""
    invalid: Array
    """Whether a sample's logits had no softmax (NaN, or +inf, or all -inf), bool `[...]`; the rest is NaN there."""
    num_samples: Array
    """T, how many samples were drawn, int32 scalar."""


class _Sums(NamedTuple):
    p: Moments
    entropy: Moments
    votes: Array
    invalid: Array


@_arguments.public
def classify(
    fn: Callable[[Array], Array],
    key: Array,
    num_samples: int,
    *,
    chunk_size: int | None = None,
    tolerance: float | None = None,
    statistic: str = "probabilities",
    mesh: Mesh | None = None,
    axes: str | Sequence[str] | None = None,
) -> Classification:
    """Summarises a stochastic classifier over samples, without keeping them.

    With p_t = softmax(fn(fold_in(key, t))), the predictive entropy is H(mean p_t), the expected entropy
    mean H(p_t), and their difference the mutual information between prediction and weights. Variances are over
    the T samples, with divisor T. What does not depend on the key is computed once. Call it inside `jax.jit`.

    Args:
      fn: function of a key that returns logits, float `[..., classes]`. One that ignores its key, with one
        sample, gives the same fields for a deterministic pass.
      key: one JAX key.
      num_samples: T, at least 1; with a tolerance the most that are drawn.
      chunk_size: how many samples are computed at a time; memory is O(chunk_size); None for all, or 10 with a
        tolerance. Any chunk size gives the same samples, and summaries that agree to rounding.
      tolerance: draw chunks until the standard error of the statistic, as estimated from the samples so far, is
        at most this for every input that is not invalid. Not differentiable in reverse.
      statistic: `"probabilities"` (of every class), `"expected_entropy"`, or `"predictive_entropy"` or
        `"mutual_information"`, for which an upper bound of the error (to first order) is used.
      mesh: devices that share each chunk's samples; a chunk is rounded up to a multiple of their number.
      axes: the axes of the mesh that share them; None for all.

    Returns:
      `Classification`.

    Raises:
      TypeError, ValueError: if an argument is not as said above. Invalid logits are a warning outside jit.

    Example:
      >>> import dropjax
      >>> fn = lambda key: dropjax.dropout(key, jnp.array([[3.0, -1.0]]), 0.5)
      >>> summary = classify(fn, jax.random.key(0), 1_000)
      >>> summary.probabilities.shape, bool(summary.mutual_information[0] > 0)
      ((1, 2), True)

    Reference:
      Gal, Islam, Ghahramani, [Deep Bayesian active learning with image
      data](https://arxiv.org/abs/1703.02910), 2017; Houlsby and others, [Bayesian active
      learning](https://arxiv.org/abs/1112.5745), 2011.
    """
    tolerance = streaming.tolerance("classify", tolerance)
    if statistic not in STATISTICS:
        raise ValueError(f"classify: statistic must be one of {STATISTICS}, got {_checks.describe(statistic)}.")
    if tolerance is not None and chunk_size is None:
        chunk_size = streaming.CHUNK
    passes = sampling.prepare("classify", fn, key, num_samples, chunk_size, mesh, axes)
    logits = passes.shapes
    if (
        not _checks.is_array(logits)
        or not jnp.issubdtype(logits.dtype, jnp.floating)
        or logits.ndim < 1
        or not logits.shape[-1]
    ):
        raise TypeError(
            "classify: fn must return logits, a float array [..., classes] of at least one class, got "
            f"{_checks.describe(logits)}."
        )

    finished = streaming.within(tolerance, lambda sums, count: _error(sums, count, statistic))

    def compute(draw: sampling.Draw) -> Classification:
        return _finish(*streaming.fold(passes, draw, _summarise, _merge, finished=finished))

    summary = passes.run(compute)
    if message := streaming.warn_of("classify", summary.invalid, "logits without a softmax (NaN or infinite)"):
        _checks.warn(message)
    return summary


def _summarise(logits: Array) -> _Sums:
    log_p = jax.nn.log_softmax(logits.astype(streaming.wide(logits.dtype)))
    invalid = jnp.isnan(log_p).any(-1)
    votes = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=jnp.int32)
    votes = jnp.where(invalid[..., None], 0, votes).sum(0, dtype=jnp.int32)
    p = jnp.exp(log_p)
    return _Sums(streaming.moments(p), streaming.moments(_entropy(p, log_p)), votes, invalid.any(0))


def _merge(one: _Sums, m: Array, other: _Sums, n: int) -> _Sums:
    return _Sums(
        streaming.merge_moments(one.p, m, other.p, n),
        streaming.merge_moments(one.entropy, m, other.entropy, n),
        one.votes + other.votes,
        one.invalid | other.invalid,
    )


def _finish(sums: _Sums, count: Array) -> Classification:
    mean, expected = sums.p.mean, sums.entropy.mean
    total = _entropy(mean, jnp.log(jnp.where(mean > 0, mean, 1)))
    n = count.astype(mean.dtype)
    best = mean.argmax(-1, keepdims=True)
    variance = jnp.take_along_axis(sums.p.squares, best, -1)[..., 0] / n
    ratio = jnp.where(sums.invalid, np.nan, (jnp.asarray(count, jnp.int32) - sums.votes.max(-1)).astype(mean.dtype) / n)
    information = jnp.maximum(total - expected, 0)
    return Classification(
        mean, total, expected, information, sums.votes, ratio, variance, sums.invalid, jnp.asarray(count, jnp.int32)
    )


def _entropy(p: Array, log_p: Array) -> Array:
    """-sum p log p in nats; 0 log 0 is 0, also in the gradient, and NaN stays NaN."""
    return -jnp.where(p == 0, 0, p * jnp.where(p == 0, 0, log_p)).sum(-1)


def _error(sums: _Sums, count: Any, statistic: str) -> Array:
    """The standard error of a statistic, or an upper bound of it, `[...]`.

    The entropy of the mean moves by -sum (log mean_c - a) dmean_c for any constant a, since probabilities sum to 1,
    so that its error is at most the sum of the errors of mean_c, so weighted.
    """
    of_class = streaming.standard_error(sums.p.squares, count)
    of_entropy = streaming.standard_error(sums.entropy.squares, count)
    if statistic == "probabilities":
        return of_class.max(-1)
    if statistic == "expected_entropy":
        return of_entropy
    mean = sums.p.mean
    weight = jnp.abs(jnp.log(jnp.where(mean > 0, mean, 1)) - jnp.log(mean.max(-1, keepdims=True)))
    of_total = jnp.where((of_class > 0) & (weight > 0), weight * of_class, 0).sum(-1)
    of_total = jnp.where(jnp.asarray(count) > 1, of_total, np.inf)
    return of_total if statistic == "predictive_entropy" else of_total + of_entropy
