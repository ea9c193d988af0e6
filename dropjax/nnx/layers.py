"""The NNX layers: the fields of each, and the function that it calls.

Every layer also takes `deterministic`, `rng_collection`, `rngs` and `sharded_dims`, by keyword.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from dropjax import _checks
from dropjax.functional import blocks, depth, elementwise, graphs, noise, pruning, self_normalising, structured, tokens
from dropjax.nnx.base import Layer, Source

__all__ = [
    "AlphaDropout",
    "DropBlock",
    "DropHead",
    "DropPath",
    "Dropout",
    "EmbeddingDropout",
    "FeatureAlphaDropout",
    "GaussianDropout",
    "GaussianNoise",
    "MaskFeature",
    "SpatialDropout",
    "SpatialDropout1D",
    "SpatialDropout2D",
    "SpatialDropout3D",
    "TargetedDropout",
    "UniformDropout",
]


@nnx.dataclass(eq=False)
class Dropout(Layer):
    """`dropjax.dropout` as a layer, in place of `flax.nnx.Dropout`.

    Args:
      rate: probability of dropping an element, in `[0, 1]`; a number or an array, also a traced one.
      broadcast_dims: dimensions along which the mask is shared.
      generator: `"mix"`, or `"threefry"` for Flax's masks bit for bit.

    Example:
      >>> layer = Dropout(0.5, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.ones((2, 3)))
      >>> y = jax.jit(lambda key, x: layer(x, rngs=key))(jax.random.key(1), y)
    """

    rate: ArrayLike
    _: dataclasses.KW_ONLY
    broadcast_dims: Sequence[int] = ()
    generator: str = "mix"
    _function = staticmethod(elementwise.dropout)


@nnx.dataclass(eq=False)
class GaussianDropout(Layer):
    """`dropjax.gaussian_dropout` as a layer: multiplicative noise of mean 1.

    Args:
      rate: in `[0, 1)`; the variance of the noise is rate / (1 - rate).
      broadcast_dims: dimensions along which the noise is shared.
    """

    rate: ArrayLike
    _: dataclasses.KW_ONLY
    broadcast_dims: Sequence[int] = ()
    _function = staticmethod(elementwise.gaussian_dropout)


@nnx.dataclass(eq=False)
class AlphaDropout(Layer):
    """`dropjax.alpha_dropout` as a layer, for networks of SELU units.

    Args:
      rate: probability of dropping an element, in `[0, 1]`.
      broadcast_dims: dimensions along which the mask is shared.
      generator: `"mix"` or `"threefry"`.
    """

    rate: ArrayLike
    _: dataclasses.KW_ONLY
    broadcast_dims: Sequence[int] = ()
    generator: str = "mix"
    _function = staticmethod(self_normalising.alpha_dropout)


@nnx.dataclass(eq=False)
class SpatialDropout(Layer):
    """`dropjax.spatial_dropout` as a layer: drops whole channels after a convolution.

    Args:
      rate: probability of dropping a channel, in `[0, 1]`.
      channel_axis: the axis of the channels.
      batch_axes: the axes along which decisions differ besides the channel's.
      generator: `"mix"` or `"threefry"`.
    """

    rate: ArrayLike
    _: dataclasses.KW_ONLY
    channel_axis: int = -1
    batch_axes: int | Sequence[int] = (0,)
    generator: str = "mix"
    _function = staticmethod(structured.spatial_dropout)


@nnx.dataclass(eq=False)
class SpatialDropout1D(SpatialDropout):
    """`SpatialDropout` for sequences, under Keras's name: the rank of the inputs must be 3.

    `[batch, length, channels]`, Keras's `data_format="channels_last"`; `channel_axis=1` is `"channels_first"`.
    """

    _function = staticmethod(structured.spatial_dropout_1d)


@nnx.dataclass(eq=False)
class SpatialDropout2D(SpatialDropout):
    """`SpatialDropout` for images, under Keras's name: the rank of the inputs must be 4.

    `[batch, height, width, channels]`, Keras's `data_format="channels_last"`; `channel_axis=1` is `"channels_first"`.
    """

    _function = staticmethod(structured.spatial_dropout_2d)


@nnx.dataclass(eq=False)
class SpatialDropout3D(SpatialDropout):
    """`SpatialDropout` for volumes, under Keras's name: the rank of the inputs must be 5.

    `[batch, depth, height, width, channels]`, Keras's `data_format="channels_last"`; `channel_axis=1` is
    `"channels_first"`.
    """

    _function = staticmethod(structured.spatial_dropout_3d)


@nnx.dataclass(eq=False)
class GaussianNoise(Layer):
    """`dropjax.gaussian_noise` as a layer: additive noise of mean 0.

    Args:
      stddev: standard deviation of the noise.
      broadcast_dims: dimensions along which the noise is shared.
    """

    stddev: ArrayLike
    _: dataclasses.KW_ONLY
    broadcast_dims: Sequence[int] = ()
    _function = staticmethod(noise.gaussian_noise)


@nnx.dataclass(eq=False)
class UniformDropout(Layer):
    """`dropjax.uniform_dropout` as a layer: uniform multiplicative noise around 1.

    Args:
      beta: half the width of the noise, in `[0, 1]`.
      broadcast_dims: dimensions along which the noise is shared.
    """

    beta: ArrayLike
    _: dataclasses.KW_ONLY
    broadcast_dims: Sequence[int] = ()
    _function = staticmethod(noise.uniform_dropout)


@nnx.dataclass(eq=False)
class FeatureAlphaDropout(Layer):
    """`dropjax.feature_alpha_dropout` as a layer: alpha dropout of whole channels.

    Args:
      rate: probability of dropping a channel, in `[0, 1]`.
      channel_axis: the axis of the channels.
      batch_axes: the axes along which decisions differ besides the channel's.
      generator: `"mix"` or `"threefry"`.
    """

    rate: ArrayLike
    _: dataclasses.KW_ONLY
    channel_axis: int = -1
    batch_axes: int | Sequence[int] = (0,)
    generator: str = "mix"
    _function = staticmethod(self_normalising.feature_alpha_dropout)


@nnx.dataclass(eq=False)
class DropPath(Layer):
    """`dropjax.drop_path` as a layer: drops residual branches, which is stochastic depth.

    Args:
      rate: probability of dropping a branch, in `[0, 1]`.
      mode: `"row"`, a decision for each example, or `"batch"`, one for all.
      scale: whether what is kept is divided by 1 - rate.
      batch_axis: the axis of the examples.
    """

    rate: ArrayLike
    _: dataclasses.KW_ONLY
    mode: str = "row"
    scale: bool = True
    batch_axis: int = 0
    _function = staticmethod(depth.drop_path)


@nnx.dataclass(eq=False)
class EmbeddingDropout(Layer):
    """`dropjax.embedding_dropout` as a layer: drops whole words; give `indices=` with what was looked up.

    Args:
      rate: probability of dropping a row of the vocabulary, in `[0, 1]`.
    """

    rate: ArrayLike
    _function = staticmethod(tokens.embedding_dropout)

    def __call__(
        self,
        inputs: ArrayLike,
        *,
        deterministic: bool | None = None,
        rngs: Source = None,
        start: Mapping[int, ArrayLike] | None = None,
        indices: ArrayLike | None = None,
    ) -> Array:
        """Drops rows of a table, or of what was looked up.

        Args:
          inputs: float array, `[vocabulary, ...]`, or `[..., features]` with `indices`.
          deterministic: if True the inputs are returned as they are; overrides the field.
          rngs: a key, `RngStream` or `Rngs` to use instead of the layer's own.
          start: `{dim: index}`, where the inputs start in the whole array.
          indices: integers `[...]`: which row of the vocabulary each of the inputs is.

        Returns:
          Array of the shape and dtype of the inputs.
        """
        if indices is not None:
            _checks.indices("embedding_dropout", indices, jnp.shape(inputs))
        return self._apply(inputs, deterministic, rngs, start=start, indices=indices)


@nnx.dataclass(eq=False)
class MaskFeature(Layer):
    """`dropjax.mask_feature` as a layer: masks columns, rows or single features of nodes.

    Args:
      rate: probability of masking, in `[0, 1]`.
      mode: `"col"`, `"row"` or `"all"`.
      fill_value: what masked features become.
      scale: whether what is kept is divided by 1 - rate.
    """

    rate: ArrayLike
    _: dataclasses.KW_ONLY
    mode: str = "col"
    fill_value: float = 0.0
    scale: bool = False
    _function = staticmethod(graphs.mask_feature)


@nnx.dataclass(eq=False)
class DropHead(Layer):
    """`dropjax.drop_head` as a layer: drops whole attention heads.

    Args:
      rate: probability of dropping a head, in `[0, 1]`.
      head_axis: the axis of the heads.
      batch_axes: the axes along which decisions differ besides the head's.
    """

    rate: ArrayLike
    _: dataclasses.KW_ONLY
    head_axis: int = 1
    batch_axes: int | Sequence[int] = (0,)
    _function = staticmethod(tokens.drop_head)


@nnx.dataclass(eq=False)
class DropBlock(Layer):
    """`dropjax.drop_block` as a layer: drops contiguous blocks of feature maps of any number of dimensions.

    Args:
      rate: expected share of the places that is dropped, in `[0, 1]`.
      block_size: the length of a block: one for all spatial dimensions or one for each.
      whole_blocks: whether blocks lie within the map, as in the paper.
      shared_channels: whether all channels of an example share a mask.
      normalize: `"expected"`, `"example"` or `"batch"`: what is kept is divided by this share.
      channel_axis: the axis of the channels.
      batch_axes: the axes of the examples.
    """

    rate: ArrayLike
    _: dataclasses.KW_ONLY
    block_size: int | Sequence[int] = 7
    whole_blocks: bool = False
    shared_channels: bool = False
    normalize: str = "expected"
    channel_axis: int = -1
    batch_axes: int | Sequence[int] = (0,)
    _function = staticmethod(blocks.drop_block)


@nnx.dataclass(eq=False)
class TargetedDropout(Layer):
    """`dropjax.targeted_dropout` as a layer of weights: drops only those of least magnitude.

    Args:
      rate: probability of dropping a candidate, in `[0, 1]`.
      targeted: share of the weights or units that are candidates, in `[0, 1]`.
      kind: `"weight"` or `"unit"`.
      rescale: whether candidates that are kept are divided by 1 - rate.
      channel_axis: the axis of the units.
      batch_axes: axes of several kernels in one array.
    """

    rate: ArrayLike
    _: dataclasses.KW_ONLY
    targeted: ArrayLike = 0.5
    kind: str = "weight"
    rescale: bool = False
    channel_axis: int = -1
    batch_axes: int | Sequence[int] = ()
    _function = staticmethod(pruning.targeted_dropout)
