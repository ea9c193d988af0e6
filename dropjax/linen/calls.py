"""Linen layers whose call takes or gives more than an array: tokens with their indices, and logits."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
from jax import Array
from jax.typing import ArrayLike

from dropjax import _layers
from dropjax.functional import adaptive, sequences
from dropjax.linen.base import Layer, key_from_stream, options_of

__all__ = ["Standout", "TokenDropout"]


class TokenDropout(Layer):
    """`dropjax.token_dropout` as a layer: removes tokens, and says which are left.

    Attributes:
      rate: the part of the tokens to be removed, in `[0, 1)`: one number, known while tracing.
      num_keep: how many are kept, instead of a rate.
      num_prefix_tokens: how many tokens at the front are kept always.
      ordered: whether tokens keep their order.
      token_axis: the axis of the tokens.
      batch_axes: the axes along which decisions differ.
    """

    rate: ArrayLike | None = None
    num_keep: int | None = None
    num_prefix_tokens: int = 0
    ordered: bool = True
    token_axis: int = 1
    batch_axes: int | Sequence[int] = (0,)
    _function = staticmethod(sequences.token_dropout)  # type: ignore[assignment]  # it gives indices, too

    def __post_init__(self) -> None:
        super().__post_init__()
        sequences.one_of(self.rate, self.num_keep)

    def __call__(  # type: ignore[override]  # it gives indices, too
        self,
        inputs: ArrayLike,
        deterministic: bool | None = None,
        rng: Array | None = None,
        *,
        start: Mapping[int, ArrayLike] | None = None,
    ) -> sequences.Tokens:
        """Removes tokens.

        Args:
          inputs: float array, by default `[batch, tokens, ...]`.
          deterministic: if True all tokens are kept; given here or as a field.
          rng: a key to use instead of one from `make_rng(rng_collection)`.
          start: `{dim: index}`, where the inputs start in the whole array.

        Returns:
          `Tokens(tokens, indices)`.
        """
        left: Any = super().__call__(inputs, deterministic, rng, start=start)
        return (
            left if isinstance(left, sequences.Tokens) else sequences.all_tokens(left, self.token_axis, self.batch_axes)
        )


class Standout(Layer):
    """`dropjax.standout` as a layer: keeps each unit with the sigmoid of its logit; deterministic, the expectation.

    Attributes:
      alpha: scale of the logits.
      beta: shift of the logits.

    Example:
      >>> inputs, logits = jnp.ones(3), jnp.array([-99.0, 0.0, 99.0])
      >>> Standout().apply({}, inputs, logits, deterministic=True).round(3).tolist()
      [0.0, 0.5, 1.0]
    """

    alpha: ArrayLike = 1.0
    beta: ArrayLike = 0.0
    _function = staticmethod(adaptive.standout)

    def __call__(  # type: ignore[override]  # it takes logits, too
        self,
        inputs: ArrayLike,
        logits: ArrayLike,
        deterministic: bool | None = None,
        rng: Array | None = None,
        *,
        start: Mapping[int, ArrayLike] | None = None,
    ) -> Array:
        """Drops units by their logits, or multiplies each by the probability that it is kept.

        Args:
          inputs: float array `[...]`: the activations.
          logits: float array that broadcasts against them: the preactivations.
          deterministic: if True the expectation is returned; given here or as a field.
          rng: a key to use instead of one from `make_rng(rng_collection)`.
          start: `{dim: index}`, where the inputs start in the whole array.

        Returns:
          Array of the shape and dtype of the inputs.
        """
        if nn.merge_param("deterministic", self.deterministic, deterministic):
            _layers.unmoved(self, start, inputs)
            return adaptive.standout_expectation(inputs, logits, alpha=self.alpha, beta=self.beta)
        key = key_from_stream(self, self.rng_collection) if rng is None else rng
        return self._function(key, inputs, logits, start=start, **options_of(self))
