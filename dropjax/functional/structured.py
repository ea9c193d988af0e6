"""Dropout that decides for whole groups of elements."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax import Array
from jax.typing import ArrayLike

from dropjax import _arguments, _checks, bits, masks, sharding
from dropjax._checks import Rate


@_arguments.public
def spatial_dropout(
    key: Array,
    x: ArrayLike,
    rate: ArrayLike,
    *,
    channel_axis: int = -1,
    batch_axes: int | Sequence[int] = (0,),
    generator: str = "mix",
    start: Mapping[int, ArrayLike] | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Array:
    """Drops whole channels: one decision for each example and channel, shared over all places.

    y = x * m / q with one m ~ Bernoulli(q), q = 1 - rate, for each batch index and channel: E[y] = x and
    Var[y] = x^2 rate / (1 - rate). Neighbouring activations of a convolution are so alike that dropping
    single ones only lowers the learning rate.

    Args:
      key: one JAX key; it is consumed.
      x: float or complex, of any rank: `[batch, *space, channels]` by default.
      rate: probability of dropping a channel, in `[0, 1]`: a number, or a float array that broadcasts
        against x. It may be traced, and is not differentiated.
      channel_axis: the axis of the channels; 1 for `[batch, channels, *space]`.
      batch_axes: the axes along which decisions differ besides the channel's; `()` for one example.
      generator: `"mix"` or `"threefry"`, as for `dropout`.
      start: `{dim: index}`, where this piece starts in the whole array; indices may be traced.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.

    Returns:
      Array of the shape and dtype of x. NaN where a traced rate is NaN or out of range.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> y = spatial_dropout(jax.random.key(0), jnp.ones((2, 4, 4, 3)), 0.5)
      >>> y[:, 0, 0].tolist() == y[:, 3, 2].tolist()
      True

    Reference:
      Tompson, Goroshin, Jain, LeCun, Bregler, [Efficient object localization using convolutional
      networks](https://arxiv.org/abs/1411.4280), 2015.
    """
    x = _checks.array("spatial_dropout", x)
    checked = _checks.rate("spatial_dropout", rate, x.shape)
    shared = _checks.places("spatial_dropout", x.ndim, channel_axis, batch_axes)
    _checks.whole("spatial_dropout", checked, shared, "all places of a channel")
    draw = bits.draw(
        "spatial_dropout", key, (x, checked), x.shape,
        shared=shared,
        generator=generator, start=start, sharded_dims=sharded_dims,
    )  # fmt: skip
    return _spatial_dropout(draw, x, checked)


@masks.redrawn
def _spatial_dropout(draw: bits.Draw, x: Array, rate: Rate) -> Array:
    return masks.apply(x, masks.keep(draw, x.shape, rate), rate, draw.generator)


def _of_rank(name: str, rank: int) -> Callable[..., Array]:
    """`spatial_dropout` of arrays of one rank, for the layers under Keras's names."""

    @functools.wraps(spatial_dropout)
    def function(key: Array, x: ArrayLike, rate: ArrayLike, **options: Any) -> Array:
        if np.ndim(x) != rank:
            raise ValueError(
                f"{name}: x must have {rank} dimensions, a batch, {rank - 2} of space and channels, got {np.ndim(x)}. "
                "SpatialDropout takes any number."
            )
        return spatial_dropout(key, x, rate, **options)

    function.__name__, function.__qualname__ = name, f"spatial_dropout_{rank - 2}d"
    return function


spatial_dropout_1d = _of_rank("SpatialDropout1D", 3)
spatial_dropout_2d = _of_rank("SpatialDropout2D", 4)
spatial_dropout_3d = _of_rank("SpatialDropout3D", 5)
