"""Our dropout in NNX models whose source is not touched."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.attention import dot_product_attention_weights
from flax.nnx.nn.dtypes import promote_dtype
from jax import Array

from dropjax import _arguments, _checks
from dropjax.functional import elementwise
from dropjax.nnx.base import FlaxDropout, Layer
from dropjax.nnx.layers import Dropout

_Model = TypeVar("_Model", bound=nnx.Module)


@_arguments.public
def replace_flax(model: _Model, generator: str = "mix") -> _Model:
    """Puts our dropout into an NNX model whose source you do not touch; changes and returns the model.

    Replaces every `flax.nnx.Dropout`, wherever it stands (also in lists and shared), and the dropout on
    the attention weights of Flax's `MultiHeadAttention`. Subclasses of `Dropout`, modules with another
    `attention_fn`, and what is ours already are left alone. Parameters and rng streams stay as they are.

    Args:
      model: an `nnx.Module`.
      generator: `"mix"`, or `"threefry"` for Flax's masks bit for bit.

    Returns:
      The same model.

    Raises:
      ValueError: if the model contains nothing to replace.

    Example:
      >>> layer = replace_flax(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
      >>> type(layer) is Dropout
      True
    """
    _checks.generator("replace_flax", generator)
    found = 0
    for _, module in nnx.iter_modules(model):
        attention = getattr(module, "attention_fn", None)
        found += type(module) is FlaxDropout or isinstance(module, Layer)
        found += isinstance(attention, Attention) or attention is nnx.dot_product_attention
        if type(module) is FlaxDropout:  # changed in place, so that lists, dicts and shared references keep it
            ours: Any = module
            ours.__class__, ours.generator, ours.sharded_dims = Dropout, generator, None
        elif attention is nnx.dot_product_attention:
            setattr(module, "attention_fn", Attention(generator))  # noqa: B010  # not known to be an attention module
    if not found:
        raise ValueError("replace_flax: model must contain Flax's Dropout or MultiHeadAttention, got neither.")
    return model


@dataclasses.dataclass(frozen=True)
class Attention:
    """Flax's attention with our dropout on its weights."""

    generator: str
    share_batch: bool = False

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        promote_dtype: Callable[..., Any] = promote_dtype,
        **options: Any,
    ) -> Array:
        """Takes what `nnx.dot_product_attention` takes."""
        options |= {"precision": precision, "module": module, "deterministic": True}
        if deterministic or dropout_rate == 0:
            return nnx.dot_product_attention(
                query,
                key,
                value,
                bias,
                mask,
                dropout_rate=dropout_rate,
                dtype=dtype,
                promote_dtype=promote_dtype,
                **options,
            )
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
        weights = dot_product_attention_weights(query, key, bias, mask, dtype=query.dtype, **options)
        shared = tuple(range(weights.ndim - 2)) if broadcast_dropout else (0,) * self.share_batch
        weights = elementwise.dropout(
            dropout_rng, weights, dropout_rate, broadcast_dims=shared, generator=self.generator
        )
        value = jnp.repeat(value, weights.shape[-3] // value.shape[-2], axis=-2)
        return jnp.einsum("...hqk,...khd->...qhd", weights, value, precision=precision)
