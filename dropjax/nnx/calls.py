"""NNX layers whose call takes or gives more than an array: tokens with their indices, and logits."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from dropjax import _checks, _layers
from dropjax.functional import adaptive, sequences
from dropjax.nnx.base import Layer, Source

__all__ = ["Standout", "TokenDropout"]


@nnx.dataclass(eq=False)
class TokenDropout(Layer):
    """`dropjax.token_dropout` as a layer: removes tokens, and says which are left.

    Args:
      rate: the part of the tokens to be removed, in `[0, 1)`: one number, known while tracing.
      num_keep: how many are kept, instead of a rate.
      num_prefix_tokens: how many tokens at the front are kept always.
      ordered: whether tokens keep their order.
      token_axis: the axis of the tokens.
      batch_axes: the axes along which decisions differ.
    """

    rate: ArrayLike | None = None
    _: dataclasses.KW_ONLY
    num_keep: int | None = None
    num_prefix_tokens: int = 0
    ordered: bool = True
    token_axis: int = 1
    batch_axes: int | Sequence[int] = (0,)
    _function = staticmethod(sequences.token_dropout)  # type: ignore[assignment]  # it gives indices, too

    def __post_init__(self) -> None:
        super().__post_init__()
        sequences.one_of(self.rate, self.num_keep)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "rate" and value is not None:
            _layers.check(self, name, value)
            if _checks.is_traced(value) or np.ndim(value):
                raise TypeError(
                    f"TokenDropout: rate must be one number that is known while tracing, since it makes a length, got "
                    f"{_checks.describe(value)}. Pass num_keep, or build the layer outside of what is traced."
                )
            value = np.asarray(value)[()] if isinstance(value, Array | np.ndarray) else value
        super().__setattr__(name, value)

    def __call__(  # type: ignore[override]  # it gives indices, too
        self,
        inputs: ArrayLike,
        *,
        deterministic: bool | None = None,
        rngs: Source = None,
        start: Mapping[int, ArrayLike] | None = None,
    ) -> sequences.Tokens:
        """Removes tokens.

        Args:
          inputs: float array, by default `[batch, tokens, ...]`.
          deterministic: if True all tokens are kept; overrides the field.
          rngs: a key, `RngStream` or `Rngs` to use instead of the layer's own.
          start: `{dim: index}`, where the inputs start in the whole array.

        Returns:
          `Tokens(tokens, indices)`.
        """
        sequences.one_of(self.rate, self.num_keep)
        left: Any = self._apply(inputs, deterministic, rngs, start=start)
        return (
            left if isinstance(left, sequences.Tokens) else sequences.all_tokens(left, self.token_axis, self.batch_axes)
        )


@nnx.dataclass(eq=False)
class Standout(Layer):
    """`dropjax.standout` as a layer: keeps each unit with the sigmoid of its logit; deterministic, the expectation.

    Args:
      alpha: scale of the logits.
      beta: shift of the logits.

    Example:
      >>> inputs, logits = jnp.ones(3), jnp.array([-99.0, 0.0, 99.0])
      >>> Standout(deterministic=True)(inputs, logits).round(3).tolist()
      [0.0, 0.5, 1.0]
    """

    alpha: ArrayLike = 1.0
    beta: ArrayLike = 0.0
    _function = staticmethod(adaptive.standout)

    def __call__(  # type: ignore[override]  # it takes logits, too
        self,
        inputs: ArrayLike,
        logits: ArrayLike,
        *,
        deterministic: bool | None = None,
        rngs: Source = None,
        start: Mapping[int, ArrayLike] | None = None,
    ) -> Array:
        """Drops units by their logits, or multiplies each by the probability that it is kept.

        Args:
          inputs: float array `[...]`: the activations.
          logits: float array that broadcasts against them: the preactivations.
          deterministic: if True the expectation is returned; overrides the field.
          rngs: a key, `RngStream` or `Rngs` to use instead of the layer's own.
          start: `{dim: index}`, where the inputs start in the whole array.

        Returns:
          Array of the shape and dtype of the inputs.
        """
        deterministic = self.deterministic if deterministic is None else deterministic
        fields = {"alpha": self._field("alpha"), "beta": self._field("beta")}
        if deterministic:
            _layers.unmoved(self, start, inputs)
            return adaptive.standout_expectation(inputs, logits, **fields)
        key = self._key(inputs, deterministic, rngs)
        return self._function(key, inputs, logits, start=start, sharded_dims=self._field("sharded_dims"), **fields)
