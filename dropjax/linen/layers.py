"""The Linen layers: the fields of each, and the function that it calls.

Every layer but `Dropout`, which has them in Flax's order, takes its `deterministic`, `rng_collection` and
`sharded_dims` by keyword.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dropjax import _checks
from dropjax.functional import blocks, depth, elementwise, graphs, noise, pruning, self_normalising, structured, tokens
from dropjax.linen import base
from dropjax.linen.base import Bare, Layer
from dropjax.sharding import ShardedDims

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


class Dropout(Bare):
    """`dropjax.dropout` as a layer, in place of `flax.linen.Dropout`.

    Attributes:
      rate: probability of dropping an element, in `[0, 1]`; a number or an array, also a traced one.
      broadcast_dims: dimensions along which the mask is shared.
      deterministic: if True the inputs are returned as they are; given here or at the call.
      rng_collection: name of the rng stream.
      generator: `"mix"`, or `"threefry"` for Flax's masks bit for bit.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension; ignored for axes that are not
        manual at the call.

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


class GaussianDropout(Layer):
    """`dropjax.gaussian_dropout` as a layer: multiplicative noise of mean 1.

    Attributes:
      rate: in `[0, 1)`; the variance of the noise is rate / (1 - rate).
      broadcast_dims: dimensions along which the noise is shared.
    """

    rate: ArrayLike
    broadcast_dims: Sequence[int] = ()
    _function = staticmethod(elementwise.gaussian_dropout)


class AlphaDropout(Layer):
    """`dropjax.alpha_dropout` as a layer, for networks of SELU units.

    Attributes:
      rate: probability of dropping an element, in `[0, 1]`.
      broadcast_dims: dimensions along which the mask is shared.
      generator: `"mix"` or `"threefry"`.
    """

    rate: ArrayLike
    broadcast_dims: Sequence[int] = ()
    generator: str = "mix"
    _function = staticmethod(self_normalising.alpha_dropout)


class SpatialDropout(Layer):
    """`dropjax.spatial_dropout` as a layer: drops whole channels after a convolution.

    Attributes:
      rate: probability of dropping a channel, in `[0, 1]`.
      channel_axis: the axis of the channels.
      batch_axes: the axes along which decisions differ besides the channel's.
      generator: `"mix"` or `"threefry"`.
    """

    rate: ArrayLike
    channel_axis: int = -1
    batch_axes: int | Sequence[int] = (0,)
    generator: str = "mix"
    _function = staticmethod(structured.spatial_dropout)


class SpatialDropout1D(SpatialDropout):
    """`SpatialDropout` for sequences, under Keras's name: the rank of the inputs must be 3.

    `[batch, length, channels]`, Keras's `data_format="channels_last"`; `channel_axis=1` is `"channels_first"`.
    """

    _function = staticmethod(structured.spatial_dropout_1d)


class SpatialDropout2D(SpatialDropout):
    """`SpatialDropout` for images, under Keras's name: the rank of the inputs must be 4.

    `[batch, height, width, channels]`, Keras's `data_format="channels_last"`; `channel_axis=1` is `"channels_first"`.
    """

    _function = staticmethod(structured.spatial_dropout_2d)


class SpatialDropout3D(SpatialDropout):
    """`SpatialDropout` for volumes, under Keras's name: the rank of the inputs must be 5.

    `[batch, depth, height, width, channels]`, Keras's `data_format="channels_last"`; `channel_axis=1` is
    `"channels_first"`.
    """

    _function = staticmethod(structured.spatial_dropout_3d)


class GaussianNoise(Layer):
    """`dropjax.gaussian_noise` as a layer: additive noise of mean 0.

    Attributes:
      stddev: standard deviation of the noise.
      broadcast_dims: dimensions along which the noise is shared.
    """

    stddev: ArrayLike
    broadcast_dims: Sequence[int] = ()
    _function = staticmethod(noise.gaussian_noise)


class UniformDropout(Layer):
    """`dropjax.uniform_dropout` as a layer: uniform multiplicative noise around 1.

    Attributes:
      beta: half the width of the noise, in `[0, 1]`.
      broadcast_dims: dimensions along which the noise is shared.
    """

    beta: ArrayLike
    broadcast_dims: Sequence[int] = ()
    _function = staticmethod(noise.uniform_dropout)


class FeatureAlphaDropout(Layer):
    """`dropjax.feature_alpha_dropout` as a layer: alpha dropout of whole channels.

    Attributes:
      rate: probability of dropping a channel, in `[0, 1]`.
      channel_axis: the axis of the channels.
      batch_axes: the axes along which decisions differ besides the channel's.
      generator: `"mix"` or `"threefry"`.
    """

    rate: ArrayLike
    channel_axis: int = -1
    batch_axes: int | Sequence[int] = (0,)
    generator: str = "mix"
    _function = staticmethod(self_normalising.feature_alpha_dropout)


class DropPath(Layer):
    """`dropjax.drop_path` as a layer: drops residual branches, which is stochastic depth.

    Attributes:
      rate: probability of dropping a branch, in `[0, 1]`.
      mode: `"row"`, a decision for each example, or `"batch"`, one for all.
      scale: whether what is kept is divided by 1 - rate.
      batch_axis: the axis of the examples.
    """

    rate: ArrayLike
    mode: str = "row"
    scale: bool = True
    batch_axis: int = 0
    _function = staticmethod(depth.drop_path)


class EmbeddingDropout(Layer):
    """`dropjax.embedding_dropout` as a layer: drops whole words; give `indices=` with what was looked up.

    Attributes:
      rate: probability of dropping a row of the vocabulary, in `[0, 1]`.
    """

    rate: ArrayLike
    _function = staticmethod(tokens.embedding_dropout)

    def __call__(
        self,
        inputs: ArrayLike,
        deterministic: bool | None = None,
        rng: Array | None = None,
        *,
        indices: ArrayLike | None = None,
        start: Mapping[int, ArrayLike] | None = None,
    ) -> Array:
        """Drops words of a table, or of what was looked up in it.

        Args:
          inputs: float array: the table `[vocabulary, ...]`, or with `indices` `[*indices.shape, ...]`.
          deterministic: if True the inputs are returned as they are; given here or as a field.
          rng: a key to use instead of one from `make_rng(rng_collection)`.
          indices: integers `[...]`, the row of the vocabulary of each embedding in the inputs.
          start: `{dim: index}`, where this piece of the table starts.

        Returns:
          Array of the shape and dtype of the inputs.
        """
        if indices is not None:
            _checks.indices("embedding_dropout", indices, jnp.shape(inputs))
        return base.call(self, inputs, deterministic, rng, start=start, indices=indices)


class MaskFeature(Layer):
    """`dropjax.mask_feature` as a layer: masks columns, rows or single features of nodes.

    Attributes:
      rate: probability of masking, in `[0, 1]`.
      mode: `"col"`, `"row"` or `"all"`.
      fill_value: what masked features become.
      scale: whether what is kept is divided by 1 - rate.
    """

    rate: ArrayLike
    mode: str = "col"
    fill_value: float = 0.0
    scale: bool = False
    _function = staticmethod(graphs.mask_feature)


class DropHead(Layer):
    """`dropjax.drop_head` as a layer: drops whole attention heads.

    Attributes:
      rate: probability of dropping a head, in `[0, 1]`.
      head_axis: the axis of the heads.
      batch_axes: the axes along which decisions differ besides the head's.
    """

    rate: ArrayLike
    head_axis: int = 1
    batch_axes: int | Sequence[int] = (0,)
    _function = staticmethod(tokens.drop_head)


class DropBlock(Layer):
    """`dropjax.drop_block` as a layer: drops contiguous blocks of feature maps of any number of dimensions.

    Attributes:
      rate: expected share of the places that is dropped, in `[0, 1]`.
      block_size: the length of a block: one for all spatial dimensions or one for each.
      whole_blocks: whether blocks lie within the map, as in the paper.
      shared_channels: whether all channels of an example share a mask.
      normalize: `"expected"`, `"example"` or `"batch"`: what is kept is divided by this share.
      channel_axis: the axis of the channels.
      batch_axes: the axes of the examples.
    """

    rate: ArrayLike
    block_size: int | Sequence[int] = 7
    whole_blocks: bool = False
    shared_channels: bool = False
    normalize: str = "expected"
    channel_axis: int = -1
    batch_axes: int | Sequence[int] = (0,)
    _function = staticmethod(blocks.drop_block)


class TargetedDropout(Layer):
    """`dropjax.targeted_dropout` as a layer of weights: drops only those of least magnitude.

    Attributes:
      rate: probability of dropping a candidate, in `[0, 1]`.
      targeted: share of the weights or units that are candidates, in `[0, 1]`.
      kind: `"weight"` or `"unit"`.
      rescale: whether candidates that are kept are divided by 1 - rate.
      channel_axis: the axis of the units.
      batch_axes: axes of several kernels in one array.
    """

    rate: ArrayLike
    targeted: ArrayLike = 0.5
    kind: str = "weight"
    rescale: bool = False
    channel_axis: int = -1
    batch_axes: int | Sequence[int] = ()
    _function = staticmethod(pruning.targeted_dropout)
