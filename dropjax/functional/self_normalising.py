"""Dropout for self-normalising networks: mean 0 and variance 1 stay what they are."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dropjax import _arguments, _checks, bits, masks, sharding
from dropjax._checks import Rate

ALPHA_PRIME = -1.7580993408473766
"""-scale * alpha of SELU: the value that SELU saturates to, to which alpha dropout drops."""


@_arguments.public
def alpha_dropout(
    key: Array,
    x: ArrayLike,
    rate: ArrayLike,
    *,
    broadcast_dims: Sequence[int] = (),
    generator: str = "mix",
    start: Mapping[int, ArrayLike] | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Array:
    """Sets each element with probability `rate` to SELU's saturation value, keeping mean 0 and variance 1.

    y = a (x if kept else α') + b with q the keep rate, α' = -1.7581, a = (q (1 + (1 - q) α'^2))^-1/2
    and b = -a α' (1 - q). For x of mean 0 and variance 1, E[y] = 0 and Var[y] = 1.

    Args:
      key: one JAX key; it is consumed.
      x: real float `[...]`.
      rate: probability of dropping, in `[0, 1]`: a number, or a float array that broadcasts against x.
        At 1 the output is 0. It may be traced, and is not differentiated.
      broadcast_dims: dimensions along which the mask is shared; negatives count from the end.
      generator: `"mix"` or `"threefry"`, as for `dropout`.
      start: `{dim: index}`, where this piece starts in the whole array; indices may be traced.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.

    Returns:
      Array of the shape and dtype of x. NaN where a traced rate is NaN or out of range.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> y = alpha_dropout(jax.random.key(0), jax.random.normal(jax.random.key(1), 100_000), 0.3)
      >>> abs(float(y.mean())) < 0.02 and 0.98 < float(y.std()) < 1.02
      True

    Reference:
      Klambauer, Unterthiner, Mayr, Hochreiter, [Self-normalizing neural
      networks](https://arxiv.org/abs/1706.02515), 2017.
    """
    x = _checks.array("alpha_dropout", x, real=True)
    checked = _checks.rate("alpha_dropout", rate, x.shape)
    draw = bits.draw(
        "alpha_dropout", key, (x, checked), x.shape,
        shared=broadcast_dims, generator=generator, start=start, sharded_dims=sharded_dims,
    )  # fmt: skip
    return _alpha_dropout(draw, x, checked)


@_arguments.public
def feature_alpha_dropout(
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
    """Sets whole channels to SELU's saturation value: `alpha_dropout` with a decision for each example and channel.

    y = a (x if kept else α') + b with the constants of `alpha_dropout`, where a channel is kept or not in all
    its places. For x of mean 0 and variance 1, E[y] = 0 and Var[y] = 1.

    Args:
      key: one JAX key; it is consumed.
      x: real float `[...]`.
      rate: probability of dropping, in `[0, 1]`: a number, or a float array that broadcasts against x.
        At 1 the output is 0. It may be traced, and is not differentiated.
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
      >>> y = feature_alpha_dropout(jax.random.key(0), jnp.ones((2, 4, 4, 3)), 0.5)
      >>> y[:, 0, 0].tolist() == y[:, 3, 2].tolist()
      True

    Reference:
      Klambauer, Unterthiner, Mayr, Hochreiter, [Self-normalizing neural
      networks](https://arxiv.org/abs/1706.02515), 2017. PyTorch's FeatureAlphaDropout.
    """
    x = _checks.array("feature_alpha_dropout", x, real=True)
    checked = _checks.rate("feature_alpha_dropout", rate, x.shape)
    shared = _checks.places("feature_alpha_dropout", x.ndim, channel_axis, batch_axes)
    _checks.whole("feature_alpha_dropout", checked, shared, "all places of a channel")
    draw = bits.draw(
        "feature_alpha_dropout", key, (x, checked), x.shape,
        shared=shared,
        generator=generator, start=start, sharded_dims=sharded_dims,
    )  # fmt: skip
    return _alpha_dropout(draw, x, checked)


@masks.redrawn
def _alpha_dropout(draw: bits.Draw, x: Array, rate: Rate) -> Array:
    kept = masks.keep(draw, x.shape, rate)
    q = masks.keep_rate(rate)
    a = jnp.where(q == 0, 0, (jnp.where(q == 0, 1, q) * (1 + (1 - q) * ALPHA_PRIME**2)) ** -0.5)
    a = masks.nan_unless(masks.valid(rate), a)
    b = -a * ALPHA_PRIME * (1 - q)
    wide = masks.wide(x)
    return (jnp.where(kept, x.astype(wide), ALPHA_PRIME) * a.astype(wide) + b.astype(wide)).astype(x.dtype)
