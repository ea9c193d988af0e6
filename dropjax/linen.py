"""The dropout layers for Flax Linen: fields, and the function they call.

`Dropout` takes what `flax.linen.Dropout` takes, in the same order. Every layer also accepts a key at the
call (`rng=`) and the place of its piece (`start=`).
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.experimental import xla_metadata
from jax.typing import ArrayLike

from dropjax import _checks, sharding
from dropjax.functional import depth, elementwise, noise, self_normalising, structured, tokens
from dropjax.sharding import ShardedDims

_FlaxDropout = nn.Dropout  # Flax's own, also where somebody sets flax.linen.Dropout to ours


class _Layer(nn.Module):
    """All framework logic: deterministic or not, which key, and the function with the layer's fields."""

    _function: ClassVar[Callable[..., Array]]

    def __post_init__(self) -> None:
        if hasattr(self, "sharded_dims"):
            object.__setattr__(self, "sharded_dims", sharding.pairs(self.sharded_dims))
        super().__post_init__()

    def __call__(
        self,
        inputs: ArrayLike,
        deterministic: bool | None = None,
        rng: Array | None = None,
        *,
        start: Mapping[int, ArrayLike] | None = None,
        **place: Any,
    ) -> Array:
        """Applies the layer's function to the inputs.

        Args:
          inputs: float array `[...]`.
          deterministic: if True the inputs are returned as they are; given here or as a field.
          rng: a key to use instead of one from `make_rng(rng_collection)`.
          start: `{dim: index}`, where the inputs start in the whole array.
          place: what else says where the inputs lie: `indices` of an embedding.

        Returns:
          Array of the shape and dtype of the inputs.
        """
        rate, options = sharding.fields(self._function)
        fields = {name: getattr(self, name) for name in options}
        return _call(
            self, self._function, getattr(self, rate), inputs, deterministic, rng, start=start, **place, **fields
        )


def _call(
    layer: Any,
    function: Callable[..., Array],
    rate: ArrayLike,
    inputs: ArrayLike,
    deterministic: bool | None = None,
    rng: Array | None = None,
    **options: Any,
) -> Any:
    deterministic = nn.merge_param("deterministic", layer.deterministic, deterministic)
    if deterministic or (isinstance(rate, int | float) and rate == 0):
        return inputs
    key = layer.make_rng(layer.rng_collection) if rng is None else rng
    return function(key, inputs, rate, **options)


class Dropout(_Layer):
    """`dropjax.dropout` as a layer, in place of `flax.linen.Dropout`.

    Attributes:
      rate: probability of dropping an element, in `[0, 1]`; a number or an array, also a traced one.
      broadcast_dims: dimensions along which the mask is shared.
      deterministic: if True the inputs are returned as they are; given here or at the call.
      rng_collection: name of the rng stream.
      generator: `"mix"`, or `"threefry"` for Flax's masks bit for bit.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.

    Example:
      >>> layer = Dropout(0.5)
      >>> y = layer.apply({}, jnp.ones((2, 3)), deterministic=False, rngs={"dropout": jax.random.key(0)})
    """

    rate: ArrayLike
    broadcast_dims: Sequence[int] = ()
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    generator: str = dataclasses.field(default="mix", kw_only=True)
    sharded_dims: ShardedDims | None = dataclasses.field(default=None, kw_only=True)
    _function = staticmethod(elementwise.dropout)


class GaussianDropout(_Layer):
    """`dropjax.gaussian_dropout` as a layer: multiplicative noise of mean 1.

    Attributes:
      rate: in `[0, 1)`; the variance of the noise is rate / (1 - rate).
      broadcast_dims: dimensions along which the noise is shared.
      deterministic: if True the inputs are returned as they are; given here or at the call.
      rng_collection: name of the rng stream.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.
    """

    rate: ArrayLike
    broadcast_dims: Sequence[int] = ()
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    sharded_dims: ShardedDims | None = dataclasses.field(default=None, kw_only=True)
    _function = staticmethod(elementwise.gaussian_dropout)


class AlphaDropout(_Layer):
    """`dropjax.alpha_dropout` as a layer, for networks of SELU units.

    Attributes:
      rate: probability of dropping an element, in `[0, 1]`.
      broadcast_dims: dimensions along which the mask is shared.
      deterministic: if True the inputs are returned as they are; given here or at the call.
      rng_collection: name of the rng stream.
      generator: `"mix"` or `"threefry"`.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.
    """

    rate: ArrayLike
    broadcast_dims: Sequence[int] = ()
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    generator: str = dataclasses.field(default="mix", kw_only=True)
    sharded_dims: ShardedDims | None = dataclasses.field(default=None, kw_only=True)
    _function = staticmethod(self_normalising.alpha_dropout)


class SpatialDropout(_Layer):
    """`dropjax.spatial_dropout` as a layer: drops whole channels after a convolution.

    Attributes:
      rate: probability of dropping a channel, in `[0, 1]`.
      channel_axis: the axis of the channels.
      batch_axes: the axes along which decisions differ besides the channel's.
      deterministic: if True the inputs are returned as they are; given here or at the call.
      rng_collection: name of the rng stream.
      generator: `"mix"` or `"threefry"`.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.
    """

    rate: ArrayLike
    channel_axis: int = -1
    batch_axes: int | Sequence[int] = (0,)
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    generator: str = dataclasses.field(default="mix", kw_only=True)
    sharded_dims: ShardedDims | None = dataclasses.field(default=None, kw_only=True)
    _function = staticmethod(structured.spatial_dropout)


class GaussianNoise(_Layer):
    """`dropjax.gaussian_noise` as a layer: additive noise of mean 0.

    Attributes:
      stddev: standard deviation of the noise.
      broadcast_dims: dimensions along which the noise is shared.
      deterministic: if True the inputs are returned as they are; given here or at the call.
      rng_collection: name of the rng stream.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.
    """

    stddev: ArrayLike
    broadcast_dims: Sequence[int] = ()
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    sharded_dims: ShardedDims | None = dataclasses.field(default=None, kw_only=True)
    _function = staticmethod(noise.gaussian_noise)


class UniformDropout(_Layer):
    """`dropjax.uniform_dropout` as a layer: uniform multiplicative noise around 1.

    Attributes:
      beta: half the width of the noise, in `[0, 1]`.
      broadcast_dims: dimensions along which the noise is shared.
      deterministic: if True the inputs are returned as they are; given here or at the call.
      rng_collection: name of the rng stream.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.
    """

    beta: ArrayLike
    broadcast_dims: Sequence[int] = ()
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    sharded_dims: ShardedDims | None = dataclasses.field(default=None, kw_only=True)
    _function = staticmethod(noise.uniform_dropout)


class FeatureAlphaDropout(_Layer):
    """`dropjax.feature_alpha_dropout` as a layer: alpha dropout of whole channels.

    Attributes:
      rate: probability of dropping a channel, in `[0, 1]`.
      channel_axis: the axis of the channels.
      batch_axes: the axes along which decisions differ besides the channel's.
      deterministic: if True the inputs are returned as they are; given here or at the call.
      rng_collection: name of the rng stream.
      generator: `"mix"` or `"threefry"`.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.
    """

    rate: ArrayLike
    channel_axis: int = -1
    batch_axes: int | Sequence[int] = (0,)
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    generator: str = dataclasses.field(default="mix", kw_only=True)
    sharded_dims: ShardedDims | None = dataclasses.field(default=None, kw_only=True)
    _function = staticmethod(self_normalising.feature_alpha_dropout)


class DropPath(_Layer):
    """`dropjax.drop_path` as a layer: drops residual branches, which is stochastic depth.

    Attributes:
      rate: probability of dropping a branch, in `[0, 1]`.
      mode: `"row"`, a decision for each example, or `"batch"`, one for all.
      scale: whether what is kept is divided by 1 - rate.
      batch_axis: the axis of the examples.
      deterministic: if True the inputs are returned as they are; given here or at the call.
      rng_collection: name of the rng stream.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.
    """

    rate: ArrayLike
    mode: str = "row"
    scale: bool = True
    batch_axis: int = 0
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    sharded_dims: ShardedDims | None = dataclasses.field(default=None, kw_only=True)
    _function = staticmethod(depth.drop_path)


class EmbeddingDropout(_Layer):
    """`dropjax.embedding_dropout` as a layer: drops whole words; give `indices=` with what was looked up.

    Attributes:
      rate: probability of dropping a row of the vocabulary, in `[0, 1]`.
      deterministic: if True the inputs are returned as they are; given here or at the call.
      rng_collection: name of the rng stream.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.
    """

    rate: ArrayLike
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    sharded_dims: ShardedDims | None = dataclasses.field(default=None, kw_only=True)
    _function = staticmethod(tokens.embedding_dropout)


class DropHead(_Layer):
    """`dropjax.drop_head` as a layer: drops whole attention heads.

    Attributes:
      rate: probability of dropping a head, in `[0, 1]`.
      head_axis: the axis of the heads.
      batch_axes: the axes along which decisions differ besides the head's.
      deterministic: if True the inputs are returned as they are; given here or at the call.
      rng_collection: name of the rng stream.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.
    """

    rate: ArrayLike
    head_axis: int = 1
    batch_axes: int | Sequence[int] = (0,)
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    sharded_dims: ShardedDims | None = dataclasses.field(default=None, kw_only=True)
    _function = staticmethod(tokens.drop_head)


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
    if isinstance(module, _FlaxDropout) and type(module).__call__ is _FlaxDropout.__call__:
        if context.method_name != "__call__":
            return next_method(*args, **kwargs)
        function = functools.partial(
            elementwise.dropout, broadcast_dims=module.broadcast_dims, generator=_generator.get()
        )
        return _call(module, function, module.rate, *args, **kwargs)
    if getattr(module, "attention_fn", None) is not nn.dot_product_attention:
        return next_method(*args, **kwargs)
    # A bound module is frozen, and a copy would be another module: its function is swapped for this call.
    object.__setattr__(module, "attention_fn", _attention)
    try:
        return next_method(*args, **kwargs)
    finally:
        object.__setattr__(module, "attention_fn", nn.dot_product_attention)


@functools.wraps(nn.dot_product_attention)
def _attention(
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
        shared = tuple(range(weights.ndim - 2)) if broadcast_dropout else ()
        weights = elementwise.dropout(
            dropout_rng, weights, dropout_rate, broadcast_dims=shared, generator=_generator.get()
        )
        return product(equation, weights, values)

    return nn.dot_product_attention(
        query, key, value, bias, mask, deterministic=True, qk_attn_weights_einsum=qk_attn_weights_einsum or plain,
        attn_weights_value_einsum=drop_and_multiply, **options,
    )  # fmt: skip
