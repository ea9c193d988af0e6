"""Noise in place of zeros."""

import functools
from collections.abc import Mapping, Sequence

from jax import Array
from jax.typing import ArrayLike

from dropjax import _arguments, _checks, bits, masks, sharding
from dropjax._checks import Rate


@_arguments.public
def gaussian_noise(
    key: Array,
    x: ArrayLike,
    stddev: ArrayLike,
    *,
    broadcast_dims: Sequence[int] = (),
    start: Mapping[int, ArrayLike] | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Array:
    """Adds Gaussian noise to each element.

    y = x + stddev n with n ~ N(0, 1): E[y] = x and Var[y] = stddev^2.

    Args:
      key: one JAX key; it is consumed.
      x: real float `[...]`.
      stddev: standard deviation of the noise, not negative: a number, or a float array that broadcasts
        against x. It may be traced, and is not differentiated.
      broadcast_dims: dimensions along which the noise is shared; negatives count from the end.
      start: `{dim: index}`, where this piece starts in the whole array; indices may be traced.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.

    Returns:
      Array of the shape and dtype of x; the noise is float32. NaN where a traced stddev is NaN or negative.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> y = gaussian_noise(jax.random.key(0), jnp.ones(10_000), 0.2)
      >>> 0.19 < float(y.std()) < 0.21
      True

    Reference:
      Bishop, [Training with noise is equivalent to Tikhonov
      regularization](https://doi.org/10.1162/neco.1995.7.1.108), 1995. Keras's GaussianNoise.
    """
    x = _checks.array("gaussian_noise", x, real=True)
    checked = _checks.rate("gaussian_noise", stddev, x.shape, argument="stddev")
    draw = bits.draw(
        "gaussian_noise", key, (x, checked), x.shape, shared=broadcast_dims, start=start, sharded_dims=sharded_dims
    )
    return _gaussian_noise(draw, x, checked)


@functools.partial(masks.redrawn, prevent_cse=True)
def _gaussian_noise(draw: bits.Draw, x: Array, stddev: Rate) -> Array:
    s = masks.number(stddev)
    noise = masks.nan_unless(s >= 0, s) * masks.normal(draw, x.shape)
    wide = masks.wide(x)
    return (x.astype(wide) + noise.astype(wide)).astype(x.dtype)


@_arguments.public
def uniform_dropout(
    key: Array,
    x: ArrayLike,
    beta: ArrayLike,
    *,
    broadcast_dims: Sequence[int] = (),
    start: Mapping[int, ArrayLike] | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Array:
    """Multiplies each element by uniform noise around 1: Uout, which shifts variances less than dropout.

    y = x (1 + u) with u ~ U(-beta, beta): E[y] = x and Var[y] = x^2 beta^2 / 3.

    Args:
      key: one JAX key; it is consumed.
      x: float or complex `[...]`.
      beta: half the width of the noise, in `[0, 1]`: a number, or a float array that broadcasts against
        x. It may be traced, and is not differentiated.
      broadcast_dims: dimensions along which the noise is shared; negatives count from the end.
      start: `{dim: index}`, where this piece starts in the whole array; indices may be traced.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.

    Returns:
      Array of the shape and dtype of x; the noise is float32. NaN where a traced beta is NaN or out of range.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> y = uniform_dropout(jax.random.key(0), jnp.ones(10_000), 0.3)
      >>> 0.7 < float(y.min()) < 0.71 and 1.29 < float(y.max()) < 1.3
      True

    Reference:
      Li, Chen, Hu, Yang, [Understanding the disharmony between dropout and batch normalization by variance
      shift](https://arxiv.org/abs/1801.05134), 2018, section 5.2.
    """
    x = _checks.array("uniform_dropout", x)
    checked = _checks.rate("uniform_dropout", beta, x.shape, argument="beta")
    draw = bits.draw(
        "uniform_dropout", key, (x, checked), x.shape, shared=broadcast_dims, start=start, sharded_dims=sharded_dims
    )
    return _uniform_dropout(draw, x, checked)


@masks.redrawn
def _uniform_dropout(draw: bits.Draw, x: Array, beta: Rate) -> Array:
    b = masks.nan_unless(masks.valid(beta), masks.number(beta))
    return masks.times(x, 1 + b * masks.uniform(draw, x.shape))
