"""What a stochastic classifier says and does not know, streamed over the samples."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh

from dropjax import _arguments, _checks
from dropjax.masks import nan_unless
from dropjax.mc import _inputs, running, sampling, streaming
from dropjax.mc.running import Moments, Sum

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
    """Epistemic part (BALD): the difference of the two, at least 0, `[...]`. Summed without taking that difference,
    so that a small one keeps the digits that the probabilities of the samples have."""
    votes: Array
    """How many samples have each class as their most probable one, int32 `[..., classes]`."""
    variation_ratio: Array
    """Share of the samples that disagree with the most frequent prediction, `[...]`."""
    variance: Array
    """Variance over the samples of the probability of the class that the mean predicts, `[...]`."""
    invalid: Array
    """Whether a sample's logits had no softmax (NaN, or +inf, or all -inf), or were no probabilities where those are
    expected, bool `[...]`; the rest is NaN there."""
    num_samples: Array
    """T, how many samples were drawn, int32 scalar."""


class _Sums(NamedTuple):
    p: Moments
    entropy: Moments
    information: Sum
    votes: Array
    invalid: Array
    least: Array
    """The least value of all rows that hold numbers, and of their sums over the classes the extremes, scalars."""
    low: Array
    high: Array


@_arguments.public
def classify(
    fn: Callable[[Array], Array],
    key: Array,
    num_samples: int,
    *,
    logits: bool = True,
    chunk_size: int | None = None,
    tolerance: float | None = None,
    statistic: str = "probabilities",
    mesh: Mesh | None = None,
    axes: str | Sequence[str] | None = None,
) -> Classification:
    """Summarises a stochastic classifier over samples, without keeping them.

    With p_t = softmax(fn(fold_in(key, t))), the predictive entropy is H(mean p_t), the expected entropy
    mean H(p_t), and their difference the mutual information between prediction and weights, the mean of
    KL(p_t, mean p_t). Variances are over the T samples, with divisor T. What does not depend on the key is computed
    once. Call it inside `jax.jit`.

    Args:
      fn: function of a key that returns logits, float `[..., classes]`. One that ignores its key, with one
        sample, gives the same fields for a deterministic pass.
      key: one JAX key.
      num_samples: T, at least 1; with a tolerance the most that are drawn.
      logits: whether fn returns logits; False where it returns probabilities, of which those of one input sum to 1
        (to 1 %, and are divided by their sum). Outside jit probabilities that are taken for logits are a warning.
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
      TypeError, ValueError: if an argument is not as said above; outside jit also for probabilities that are none.
        Invalid logits, and probabilities that are NaN, are a warning outside jit.

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
    _inputs.choice("classify", "statistic", statistic, STATISTICS)
    if tolerance is not None and chunk_size is None:
        chunk_size = streaming.CHUNK
    logits = _checks.flag("classify", "logits", logits)
    passes = sampling.prepare("classify", fn, key, num_samples, chunk_size, mesh, axes)
    output = passes.shapes
    if (
        not _checks.is_array(output)
        or not jnp.issubdtype(output.dtype, jnp.floating)
        or output.ndim < 1
        or not output.shape[-1]
    ):
        raise TypeError(
            f"classify: fn must return {'logits' if logits else 'probabilities'}, a float array [..., classes] of at "
            f"least one class, got {_checks.describe(output)}."
        )
    slack = _inputs.slack(output.dtype)
    finished = streaming.within(tolerance, lambda sums, count: _error(sums, count, statistic))

    def compute(draw: sampling.Draw) -> tuple[Classification, tuple[Array, Array, Array]]:
        summarise = functools.partial(_summarise, logits=logits, slack=slack)
        sums, count = streaming.fold(passes, draw, summarise, _merge, finished=finished)
        return _finish(sums, count), (sums.least, sums.low, sums.high)

    summary, extremes = passes.run(compute)
    if all(_checks.is_known(x) for x in (summary.invalid, *extremes)):
        least, low, high = (float(x) for x in extremes)
        if not logits and low <= high and not (least >= 0 and low >= 1 - slack and high <= 1 + slack):
            raise ValueError(
                "classify: fn must return probabilities of at least 0 that sum to 1 over the classes, got values from "
                f"{least:g} and sums from {low:g} to {high:g}. For logits leave logits=True."
            )
        near = slack - 0.009  # to 0.1 %, which logits hardly ever are in every sample of every input
        if logits and output.shape[-1] > 1 and least >= 0 and 1 - near <= low <= high <= 1 + near:
            _checks.warn(
                "classify: fn must return logits, got values of at least 0 that sum to 1 over the classes in every "
                "sample, which look like probabilities. For those pass logits=False."
            )
    what = "logits without a softmax (NaN or infinite)" if logits else "probabilities that are NaN"
    if message := streaming.warn_of("classify", summary.invalid, what):
        _checks.warn(message)
    return summary


def _summarise(values: Array, *, logits: bool, slack: float) -> _Sums:
    values = values.astype(streaming.wide(values.dtype))
    if logits:
        good = known = jnp.isfinite(values.max(-1))
        sums = jnp.clip(values, -1, 2).sum(-1)  # as good for telling probabilities, and finite
    else:
        sums = values.sum(-1)
        known = ~jnp.isnan(sums)
        good = (values >= 0).all(-1) & (jnp.abs(sums - 1) <= slack)
    least, low = (jnp.where(known, x, np.inf).min(initial=np.inf) for x in (values.min(-1), sums))
    high = jnp.where(known, sums, -np.inf).max(initial=-np.inf)
    # Computed before they are used: XLA on CPU would fuse the last product of fn with a difference into one operation,
    # whose largest logit is then not that which was subtracted, and compute p again for all that is made of it.
    values = lax.optimization_barrier(jnp.where(good[..., None], values, 1))
    is_vote = _is_largest(values)
    weights = jnp.exp(values - lax.stop_gradient(values.max(-1, keepdims=True))) if logits else values
    p = lax.optimization_barrier(_shares(weights, is_vote))
    votes = (is_vote & good[..., None]).sum(0, dtype=jnp.int32)
    of_class, away = running.moments(p)
    of_entropy, _ = running.moments(_entropy(p.value, is_vote))
    information = running.divergences(of_class.mean.value, away)
    return _Sums(of_class, of_entropy, running.exactly(information), votes, ~good.all(0), least, low, high)


def _merge(one: _Sums, m: Array, other: _Sums, n: int) -> _Sums:
    p = running.merge_moments(one.p, m, other.p, n)
    means = (one.p.mean, other.p.mean, p.mean)
    return _Sums(
        p,
        running.merge_moments(one.entropy, m, other.entropy, n),
        running.merge_divergences(one.information, m, other.information, n, means),
        one.votes + other.votes,
        one.invalid | other.invalid,
        jnp.minimum(one.least, other.least),
        jnp.minimum(one.low, other.low),
        jnp.maximum(one.high, other.high),
    )


def _finish(sums: _Sums, count: Array) -> Classification:
    mean, n = sums.p.mean.value, jnp.asarray(count).astype(sums.entropy.mean.value.dtype)
    best = mean.argmax(-1, keepdims=True)
    variance = jnp.take_along_axis(sums.p.variance.value, best, -1)[..., 0]
    ratio = (count - sums.votes.max(-1)).astype(n.dtype) / n
    valid = ~sums.invalid
    fields = (mean, _entropy(mean, _is_largest(mean)), sums.entropy.mean.value, sums.information.value)
    mean, total, expected, information, ratio, variance = (
        nan_unless(valid[..., None] if x.ndim > valid.ndim else valid, x) for x in (*fields, ratio, variance)
    )
    return Classification(mean, total, expected, information, sums.votes, ratio, variance, sums.invalid, count)


def _shares(weights: Array, is_largest: Array) -> Sum:
    """Weights divided by their sum; in two floats where one is almost all, and varies by what the others have."""
    total = weights.sum(-1, keepdims=True)
    p = weights / total
    others = lax.stop_gradient(jnp.where(is_largest, 0, weights).sum(-1, keepdims=True) / total)
    rest = jnp.where(is_largest & (others < 0.5), (1 - lax.stop_gradient(p)) - others, 0)
    return Sum(p, rest)


def _is_largest(values: Array) -> Array:
    """True at the first of the largest of the classes."""
    classes = jnp.arange(values.shape[-1], dtype=jnp.int32).reshape((1,) * (values.ndim - 1) + (-1,))
    return values.argmax(-1, keepdims=True).astype(jnp.int32) == classes


def _entropy(p: Array, is_largest: Array) -> Array:
    """-sum p log p in nats, from all but the largest p; 0 log 0 is 0, also in the gradient."""
    others = jnp.where(is_largest, 0, p)
    rest = others.sum(-1)
    return -(others * jnp.log(jnp.where(others > 0, others, 1))).sum(-1) - (1 - rest) * jnp.log1p(-rest)


def _error(sums: _Sums, count: Any, statistic: str) -> Array:
    """The standard error of a statistic, or an upper bound of it, `[...]`.

    The entropy of the mean moves by -sum (log mean_c - a) dmean_c for any constant a, since probabilities sum to 1,
    so that its error is at most the sum of the errors of mean_c, so weighted.
    """
    of_class = streaming.standard_error(sums.p.variance.value, count)
    of_entropy = streaming.standard_error(sums.entropy.variance.value, count)
    if statistic == "probabilities":
        return of_class.max(-1)
    if statistic == "expected_entropy":
        return of_entropy
    mean = sums.p.mean.value
    weight = jnp.abs(jnp.log(jnp.where(mean > 0, mean, 1)) - jnp.log(mean.max(-1, keepdims=True)))
    of_total = jnp.where((of_class > 0) & (weight > 0), weight * of_class, 0).sum(-1)
    of_total = jnp.where(jnp.asarray(count) > 1, of_total, np.inf)
    return of_total if statistic == "predictive_entropy" else of_total + of_entropy
