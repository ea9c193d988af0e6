"""Summaries of uncertainty, streamed over the samples."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dropjax import _checks
from dropjax.mc import sampling


class Classification(NamedTuple):
    """What T samples of class probabilities say; all float32, entropies in nats."""

    probabilities: Array
    """Mean class probabilities, `[..., classes]`."""
    predictive_entropy: Array
    """Total uncertainty: the entropy of the mean, `[...]`."""
    expected_entropy: Array
    """Aleatoric part: the mean of the samples' entropies, `[...]`."""
    mutual_information: Array
    """Epistemic part (BALD): the difference of the two, at least 0, `[...]`."""
    votes: Array
    """Share of the samples whose most probable class is each class, `[..., classes]`."""

    @property
    def variation_ratio(self) -> Array:
        """Share of the samples that disagree with the most frequent prediction, `[...]`."""
        return 1 - self.votes.max(-1)


class _Sums(NamedTuple):
    probabilities: Array
    entropy: Array
    votes: Array


def _entropy(p: Array, log_p: Array) -> Array:
    """-sum p log p in nats; 0 log 0 is 0, also in the gradient, and NaN stays NaN."""
    return -jnp.where(p == 0, 0, p * jnp.where(p == 0, 0, log_p)).sum(-1)


def classify(
    fn: Callable[[Array], Array], key: Array, num_samples: int, *, chunk_size: int | None = None
) -> Classification:
    """Summarises a stochastic classifier over samples, without keeping them.

    With p_t = softmax(fn(fold_in(key, t))), the predictive entropy is H(mean p_t), the expected entropy
    mean H(p_t), and their difference the mutual information between prediction and weights. Call it
    inside `jax.jit`.

    Args:
      fn: function of a key that returns logits, float `[..., classes]`. One that ignores its key, with one
        sample, gives the same fields for a deterministic pass.
      key: one JAX key.
      num_samples: T, at least 1.
      chunk_size: how many samples are computed at a time; memory is O(chunk_size); None for all.
        Any chunk size gives the same samples, and sums that agree to float32 rounding.

    Returns:
      `Classification`.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

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
    key, num_samples, chunk_size, logits = sampling.check("classify", fn, key, num_samples, chunk_size)
    if not _checks.is_array(logits) or not jnp.issubdtype(logits.dtype, jnp.floating) or logits.ndim < 1:
        raise TypeError(
            f"classify: fn must return logits, a float array [..., classes], got {_checks.describe(logits)}."
        )

    def summed(logits: Array) -> _Sums:
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        votes = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=jnp.float32)
        return _Sums(jnp.exp(log_p), _entropy(jnp.exp(log_p), log_p), votes)

    sums = sampling.fold(lambda key: summed(fn(key)), key, num_samples, chunk_size)
    mean = sums.probabilities / num_samples
    total, expected = _entropy(mean, jnp.log(jnp.where(mean > 0, mean, 1))), sums.entropy / num_samples
    return Classification(mean, total, expected, jnp.maximum(total - expected, 0), sums.votes / num_samples)
