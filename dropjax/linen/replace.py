"""Our dropout in Linen models whose source is not touched."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.experimental import xla_metadata

from dropjax import _arguments, _checks
from dropjax.functional import elementwise
from dropjax.linen import base

FlaxDropout = nn.Dropout  # Flax's own, also where somebody sets flax.linen.Dropout to ours


@_arguments.public
@contextlib.contextmanager
def replace_flax(generator: str = "mix") -> Iterator[None]:
    """Inside this context Flax's dropout is ours, in models whose source you do not touch.

    Replaces `flax.linen.Dropout` and the dropout on the attention weights of modules whose `attention_fn`
    is Flax's own, such as `MultiHeadDotProductAttention`. Layers with a dropout of their own, or with another
    `attention_fn`, are left alone. Parameters, rng streams and checkpoints stay as they are. A jitted
    function is traced anew inside the context, so none keeps the dropout that it was compiled with. The
    context holds for the thread that enters it; within another one the inner generator holds.

    Args:
      generator: `"mix"`, or `"threefry"` for Flax's masks bit for bit.

    Example:
      >>> model = nn.Dropout(0.5, deterministic=False)
      >>> with replace_flax():
      ...   y = model.apply({}, jnp.ones((2, 3)), rngs={"dropout": jax.random.key(0)})
    """

    _checks.generator("replace_flax", generator)

    token = _generator.set(generator)
    try:
        # The metadata enters the key of jit's cache; nothing reads it.
        with nn.intercept_methods(_intercept), xla_metadata.set_xla_metadata(dropjax_generator=generator):
            yield
    finally:
        _generator.reset(token)


_generator = contextvars.ContextVar("_generator", default="mix")


def _intercept(next_method: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    module = context.module
    if isinstance(module, FlaxDropout) and type(module).__call__ is FlaxDropout.__call__:
        if context.method_name != "__call__":
            return next_method(*args, **kwargs)
        return _dropout(module, *args, **kwargs)
    if getattr(module, "attention_fn", None) is not nn.dot_product_attention:
        return next_method(*args, **kwargs)
    # A bound module is frozen, and a copy would be another module: its function is swapped for this call.
    object.__setattr__(module, "attention_fn", attention)
    try:
        return next_method(*args, **kwargs)
    finally:
        object.__setattr__(module, "attention_fn", nn.dot_product_attention)


def _dropout(layer: Any, inputs: Any, deterministic: bool | None = None, rng: Array | None = None) -> Any:
    """What Flax's dropout returns, drawn by ours."""
    generator = _generator.get()
    key = base.key_of(layer, layer.rate, deterministic, rng, generator)
    if key is None:
        return inputs
    return elementwise.dropout(key, inputs, layer.rate, broadcast_dims=layer.broadcast_dims, generator=generator)


@functools.wraps(nn.dot_product_attention)
def attention(
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
    *,
    qk_attn_weights_einsum: Callable[..., Array] | None = None,
    attn_weights_value_einsum: Callable[..., Array] | None = None,
    share_batch: bool = False,
    **options: Any,
) -> Array:
    """Flax's attention, whose dropout happens on the way into the product of weights and values."""
    options |= {"dtype": dtype, "module": module}
    if deterministic or dropout_rate == 0:
        return nn.dot_product_attention(
            query, key, value, bias, mask, deterministic=True, qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum, precision=precision, **options,
        )  # fmt: skip
    plain = functools.partial(jnp.einsum, precision=precision)
    product = attn_weights_value_einsum or plain

    def drop_and_multiply(equation: str, weights: Array, values: Array) -> Array:
        shared = tuple(range(weights.ndim - 2)) if broadcast_dropout else (0,) * share_batch
        weights = elementwise.dropout(
            dropout_rng, weights, dropout_rate, broadcast_dims=shared, generator=_generator.get()
        )
        return product(equation, weights, values)

    return nn.dot_product_attention(
        query, key, value, bias, mask, deterministic=True, qk_attn_weights_einsum=qk_attn_weights_einsum or plain,
        attn_weights_value_einsum=drop_and_multiply, **options,
    )  # fmt: skip
