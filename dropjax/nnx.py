"""The dropout layers for Flax NNX: fields, and the function they call.

`Dropout` takes what `flax.nnx.Dropout` takes, in the same order. Every layer also accepts a key at the
call (`rngs=`), so that plain `jax.jit`, `jax.grad` and `lax.scan` need no mutable stream, and the place of
its piece (`start=`).
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.attention import dot_product_attention_weights
from flax.nnx.nn.dtypes import promote_dtype
from jax import Array
from jax.typing import ArrayLike

from dropjax import _checks, sharding
from dropjax.functional import depth, elementwise, noise, self_normalising, structured, tokens
from dropjax.sharding import ShardedDims

_FlaxDropout = nnx.Dropout  # Flax's own, also where somebody sets flax.nnx.Dropout to ours
_Model = TypeVar("_Model", bound=nnx.Module)


class _Signature:
    """The signature of a class, which the metaclass of NNX hides; instances keep that of `__call__`."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        if instance is not None:
            raise AttributeError("__signature__")
        signature = inspect.signature(owner.__init__)  # type: ignore[misc]  # the class's own, by intent
        return signature.replace(parameters=list(signature.parameters.values())[1:])


class _Layer(nnx.Module):
    """All framework logic: deterministic or not, which key, and the function with the layer's fields."""

    _function: ClassVar[Callable[..., Array]]
    __signature__ = _Signature()

    deterministic: bool | None
    rng_collection: str
    rngs: nnx.Rngs | nnx.RngStream | None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, sharding.pairs(value) if name == "sharded_dims" else value)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # every layer is a dataclass
            value = getattr(self, field.name)
            if isinstance(value, list):
                setattr(self, field.name, tuple(value))
        flax = _FlaxDropout(0.5, rng_collection=self.rng_collection, rngs=self.rngs)  # forks, and raises its own error
        self.rngs = nnx.data(flax.rngs)

    def __call__(
        self,
        inputs: ArrayLike,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | Array | None = None,
        start: Mapping[int, ArrayLike] | None = None,
        **place: Any,
    ) -> Array:
        """Applies the layer's function to the inputs.

        Args:
          inputs: float array `[...]`.
          deterministic: if True the inputs are returned as they are; overrides the field.
          rngs: a key, `RngStream` or `Rngs` to use instead of the layer's own.
          start: `{dim: index}`, where the inputs start in the whole array. Pieces of one array need one
            key: pass it as `rngs`, since the layer's own stream gives each call a new one.
          place: what else says where the inputs lie: `indices` of an embedding.

        Returns:
          Array of the shape and dtype of the inputs.
        """
        deterministic = self.deterministic if deterministic is None else deterministic
        name, options = sharding.fields(self._function)
        rate = getattr(self, name)
        if deterministic or (deterministic is not None and isinstance(rate, int | float) and rate == 0):
            return inputs  # type: ignore[return-value]  # what came in goes out
        source = self.rngs if rngs is None else rngs
        if deterministic is None or not isinstance(source, nnx.Rngs | nnx.RngStream | Array):
            return _FlaxDropout(0.5, deterministic=deterministic)(inputs, rngs=source)  # raises Flax's own error
        if isinstance(source, nnx.Rngs):
            source = source[self.rng_collection]
        key = source() if isinstance(source, nnx.RngStream) else source
        fields = {name: getattr(self, name) for name in options}
        return self._function(key, inputs, rate, start=start, **place, **fields)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Class method used by `nnx.view`.

        Args:
          deterministic: if True, disables dropout.
        """
        if deterministic is not None:
            self.deterministic = deterministic


@nnx.dataclass(eq=False)
class Dropout(_Layer):
    """`dropjax.dropout` as a layer, in place of `flax.nnx.Dropout`.

    Args:
      rate: probability of dropping an element, in `[0, 1]`; a number or an array, also a traced one.
      broadcast_dims: dimensions along which the mask is shared.
      deterministic: if True the inputs are returned as they are; `model.train()` and `model.eval()` set it.
      rng_collection: name of the rng stream.
      rngs: the streams to fork the layer's own from; without them each call needs `rngs=`.
      generator: `"mix"`, or `"threefry"` for Flax's masks bit for bit.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.

    Example:
      >>> layer = Dropout(0.5, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.ones((2, 3)))
      >>> y = jax.jit(lambda key, x: layer(x, rngs=key))(jax.random.key(1), y)
    """

    rate: ArrayLike
    _: dataclasses.KW_ONLY
    broadcast_dims: Sequence[int] = ()
    deterministic: bool | None = False
    rng_collection: str = "dropout"
    rngs: nnx.Rngs | nnx.RngStream | None = None
    generator: str = "mix"
    sharded_dims: ShardedDims | None = None
    _function = staticmethod(elementwise.dropout)


@nnx.dataclass(eq=False)
class GaussianDropout(_Layer):
    """`dropjax.gaussian_dropout` as a layer: multiplicative noise of mean 1.

    Args:
      rate: in `[0, 1)`; the variance of the noise is rate / (1 - rate).
      broadcast_dims: dimensions along which the noise is shared.
      deterministic: if True the inputs are returned as they are.
      rng_collection: name of the rng stream.
      rngs: the streams to fork the layer's own from; without them each call needs `rngs=`.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.
    """

    rate: ArrayLike
    _: dataclasses.KW_ONLY
    broadcast_dims: Sequence[int] = ()
    deterministic: bool | None = False
    rng_collection: str = "dropout"
    rngs: nnx.Rngs | nnx.RngStream | None = None
    sharded_dims: ShardedDims | None = None
    _function = staticmethod(elementwise.gaussian_dropout)


@nnx.dataclass(eq=False)
class AlphaDropout(_Layer):
    """`dropjax.alpha_dropout` as a layer, for networks of SELU units.

    Args:
      rate: probability of dropping an element, in `[0, 1]`.
      broadcast_dims: dimensions along which the mask is shared.
      deterministic: if True the inputs are returned as they are.
      rng_collection: name of the rng stream.
      rngs: the streams to fork the layer's own from; without them each call needs `rngs=`.
      generator: `"mix"` or `"threefry"`.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.
    """

    rate: ArrayLike
    _: dataclasses.KW_ONLY
    broadcast_dims: Sequence[int] = ()
    deterministic: bool | None = False
    rng_collection: str = "dropout"
    rngs: nnx.Rngs | nnx.RngStream | None = None
    generator: str = "mix"
    sharded_dims: ShardedDims | None = None
    _function = staticmethod(self_normalising.alpha_dropout)


@nnx.dataclass(eq=False)
class SpatialDropout(_Layer):
    """`dropjax.spatial_dropout` as a layer: drops whole channels after a convolution.

    Args:
      rate: probability of dropping a channel, in `[0, 1]`.
      channel_axis: the axis of the channels.
      batch_axes: the axes along which decisions differ besides the channel's.
      deterministic: if True the inputs are returned as they are.
      rng_collection: name of the rng stream.
      rngs: the streams to fork the layer's own from; without them each call needs `rngs=`.
      generator: `"mix"` or `"threefry"`.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.
    """

    rate: ArrayLike
    _: dataclasses.KW_ONLY
    channel_axis: int = -1
    batch_axes: int | Sequence[int] = (0,)
    deterministic: bool | None = False
    rng_collection: str = "dropout"
    rngs: nnx.Rngs | nnx.RngStream | None = None
    generator: str = "mix"
    sharded_dims: ShardedDims | None = None
    _function = staticmethod(structured.spatial_dropout)


@nnx.dataclass(eq=False)
class GaussianNoise(_Layer):
    """`dropjax.gaussian_noise` as a layer: additive noise of mean 0.

    Args:
      stddev: standard deviation of the noise.
      broadcast_dims: dimensions along which the noise is shared.
      deterministic: if True the inputs are returned as they are.
      rng_collection: name of the rng stream.
      rngs: the streams to fork the layer's own from; without them each call needs `rngs=`.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.
    """

    stddev: ArrayLike
    _: dataclasses.KW_ONLY
    broadcast_dims: Sequence[int] = ()
    deterministic: bool | None = False
    rng_collection: str = "dropout"
    rngs: nnx.Rngs | nnx.RngStream | None = None
    sharded_dims: ShardedDims | None = None
    _function = staticmethod(noise.gaussian_noise)


@nnx.dataclass(eq=False)
class UniformDropout(_Layer):
    """`dropjax.uniform_dropout` as a layer: uniform multiplicative noise around 1.

    Args:
      beta: half the width of the noise, in `[0, 1]`.
      broadcast_dims: dimensions along which the noise is shared.
      deterministic: if True the inputs are returned as they are.
      rng_collection: name of the rng stream.
      rngs: the streams to fork the layer's own from; without them each call needs `rngs=`.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.
    """

    beta: ArrayLike
    _: dataclasses.KW_ONLY
    broadcast_dims: Sequence[int] = ()
    deterministic: bool | None = False
    rng_collection: str = "dropout"
    rngs: nnx.Rngs | nnx.RngStream | None = None
    sharded_dims: ShardedDims | None = None
    _function = staticmethod(noise.uniform_dropout)


@nnx.dataclass(eq=False)
class FeatureAlphaDropout(_Layer):
    """`dropjax.feature_alpha_dropout` as a layer: alpha dropout of whole channels.

    Args:
      rate: probability of dropping a channel, in `[0, 1]`.
      channel_axis: the axis of the channels.
      batch_axes: the axes along which decisions differ besides the channel's.
      deterministic: if True the inputs are returned as they are.
      rng_collection: name of the rng stream.
      rngs: the streams to fork the layer's own from; without them each call needs `rngs=`.
      generator: `"mix"` or `"threefry"`.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.
    """

    rate: ArrayLike
    _: dataclasses.KW_ONLY
    channel_axis: int = -1
    batch_axes: int | Sequence[int] = (0,)
    deterministic: bool | None = False
    rng_collection: str = "dropout"
    rngs: nnx.Rngs | nnx.RngStream | None = None
    generator: str = "mix"
    sharded_dims: ShardedDims | None = None
    _function = staticmethod(self_normalising.feature_alpha_dropout)


@nnx.dataclass(eq=False)
class DropPath(_Layer):
    """`dropjax.drop_path` as a layer: drops residual branches, which is stochastic depth.

    Args:
      rate: probability of dropping a branch, in `[0, 1]`.
      mode: `"row"`, a decision for each example, or `"batch"`, one for all.
      scale: whether what is kept is divided by 1 - rate.
      batch_axis: the axis of the examples.
      deterministic: if True the inputs are returned as they are.
      rng_collection: name of the rng stream.
      rngs: the streams to fork the layer's own from; without them each call needs `rngs=`.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.
    """

    rate: ArrayLike
    _: dataclasses.KW_ONLY
    mode: str = "row"
    scale: bool = True
    batch_axis: int = 0
    deterministic: bool | None = False
    rng_collection: str = "dropout"
    rngs: nnx.Rngs | nnx.RngStream | None = None
    sharded_dims: ShardedDims | None = None
    _function = staticmethod(depth.drop_path)


@nnx.dataclass(eq=False)
class EmbeddingDropout(_Layer):
    """`dropjax.embedding_dropout` as a layer: drops whole words; give `indices=` with what was looked up.

    Args:
      rate: probability of dropping a row of the vocabulary, in `[0, 1]`.
      deterministic: if True the inputs are returned as they are.
      rng_collection: name of the rng stream.
      rngs: the streams to fork the layer's own from; without them each call needs `rngs=`.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.
    """

    rate: ArrayLike
    _: dataclasses.KW_ONLY
    deterministic: bool | None = False
    rng_collection: str = "dropout"
    rngs: nnx.Rngs | nnx.RngStream | None = None
    sharded_dims: ShardedDims | None = None
    _function = staticmethod(tokens.embedding_dropout)


@nnx.dataclass(eq=False)
class DropHead(_Layer):
    """`dropjax.drop_head` as a layer: drops whole attention heads.

    Args:
      rate: probability of dropping a head, in `[0, 1]`.
      head_axis: the axis of the heads.
      batch_axes: the axes along which decisions differ besides the head's.
      deterministic: if True the inputs are returned as they are.
      rng_collection: name of the rng stream.
      rngs: the streams to fork the layer's own from; without them each call needs `rngs=`.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.
    """

    rate: ArrayLike
    _: dataclasses.KW_ONLY
    head_axis: int = 1
    batch_axes: int | Sequence[int] = (0,)
    deterministic: bool | None = False
    rng_collection: str = "dropout"
    rngs: nnx.Rngs | nnx.RngStream | None = None
    sharded_dims: ShardedDims | None = None
    _function = staticmethod(tokens.drop_head)


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
        found += type(module) is _FlaxDropout or isinstance(module, _Layer)
        found += isinstance(attention, _Attention) or attention is nnx.dot_product_attention
        if type(module) is _FlaxDropout:  # changed in place, so that lists, dicts and shared references keep it
            ours: Any = module
            ours.__class__, ours.generator, ours.sharded_dims = Dropout, generator, None
        elif attention is nnx.dot_product_attention:
            setattr(module, "attention_fn", _Attention(generator))  # noqa: B010  # not known to be an attention module
    if not found:
        raise ValueError("replace_flax: model must contain Flax's Dropout or MultiHeadAttention, got neither.")
    return model


@dataclasses.dataclass(frozen=True)
class _Attention:
    """Flax's attention with our dropout on its weights."""

    generator: str

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
        shared = tuple(range(weights.ndim - 2)) if broadcast_dropout else ()
        weights = elementwise.dropout(
            dropout_rng, weights, dropout_rate, broadcast_dims=shared, generator=self.generator
        )
        value = jnp.repeat(value, weights.shape[-3] // value.shape[-2], axis=-2)
        return jnp.einsum("...hqk,...khd->...qhd", weights, value, precision=precision)
