"""Dropout that decides for each element by itself."""

import functools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dropjax import _arguments, _checks, bits, masks, sharding
from dropjax._checks import Rate


@_arguments.public
def dropout(
    key: Array,
    x: ArrayLike,
    rate: ArrayLike,
    *,
    broadcast_dims: Sequence[int] = (),
    generator: str = "mix",
    start: Mapping[int, ArrayLike] | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Array:
    """Zeroes each element with probability `rate` and scales the others up, keeping the expectation.

    y = x * m / q with m ~ Bernoulli(q), q = 1 - rate: E[y] = x, which is why we divide, and
    Var[y] = x^2 rate / (1 - rate). To not drop, do not call.

    Args:
      key: one JAX key; it is consumed.
      x: float or complex `[...]`.
      rate: probability of dropping, in `[0, 1]`: a number, or a float array that broadcasts against x
        (a rate per channel, per neuron, per example). It may be traced, and is not differentiated.
      broadcast_dims: dimensions along which the mask is shared; negatives count from the end.
      generator: `"mix"`, the contract of `dropjax.bits`; or `"threefry"`, for migration: the masks and
        the division of Flax's Dropout, bit for bit, with a threefry key.
      start: `{dim: index}`, where this piece starts in the whole array (a microbatch, a chunk); indices
        may be traced.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension, and
        `{None: axis name}` for copies that share the mask.

    Returns:
      Array of the shape and dtype of x. NaN where a traced rate is NaN or out of range.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> dropout(jax.random.key(2), jnp.ones(4), 0.25)
      Array([1.3333334, 1.3333334, 1.3333334, 0.       ], dtype=float32)

    Reference:
      Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, [Dropout: a simple way to prevent neural
      networks from overfitting](https://jmlr.org/papers/v15/srivastava14a.html), 2014. The paper scales
      the weights at test time instead.
    """
    x = _checks.array("dropout", x)
    checked = _checks.rate("dropout", rate, x.shape)
    draw = bits.draw(
        "dropout", key, (x, checked), x.shape,
        shared=broadcast_dims, generator=generator, start=start, sharded_dims=sharded_dims,
    )  # fmt: skip
    return _dropout(draw, x, checked)


@masks.redrawn
def _dropout(draw: bits.Draw, x: Array, rate: Rate) -> Array:
    return masks.apply(x, masks.keep(draw, x.shape, rate), rate, draw.generator)


@_arguments.public
def gaussian_dropout(
    key: Array,
    x: ArrayLike,
    rate: ArrayLike,
    *,
    broadcast_dims: Sequence[int] = (),
    start: Mapping[int, ArrayLike] | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Array:
    """Multiplies each element by Gaussian noise of mean 1 and the variance that dropout's noise has.

    y = x * n with n ~ N(1, rate / (1 - rate)): E[y] = x and Var[y] = x^2 rate / (1 - rate).

    Args:
      key: one JAX key; it is consumed.
      x: float or complex `[...]`.
      rate: in `[0, 1)`: a number, or a float array that broadcasts against x. It may be traced, and is
        not differentiated.
      broadcast_dims: dimensions along which the noise is shared; negatives count from the end.
      start: `{dim: index}`, where this piece starts in the whole array; indices may be traced.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.

    Returns:
      Array of the shape and dtype of x; the noise is float32. NaN where a traced rate is not in `[0, 1)`.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> y = gaussian_dropout(jax.random.key(0), jnp.ones(10_000), 0.2)
      >>> 0.48 < float(y.std()) < 0.52
      True

    Reference:
      Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, [Dropout: a simple way to prevent neural
      networks from overfitting](https://jmlr.org/papers/v15/srivastava14a.html), 2014, section 10.
    """
    x = _checks.array("gaussian_dropout", x)
    checked = _checks.rate("gaussian_dropout", rate, x.shape)
    draw = bits.draw(
        "gaussian_dropout", key, (x, checked), x.shape, shared=broadcast_dims, start=start, sharded_dims=sharded_dims
    )
    return _gaussian_dropout(draw, x, checked)


@functools.partial(masks.redrawn, prevent_cse=True)
def _gaussian_dropout(draw: bits.Draw, x: Array, rate: Rate) -> Array:
    r = masks.number(rate)
    good = (r >= 0) & (r < 1)
    stddev = masks.nan_unless(good, jnp.sqrt(jnp.where(good, r, 0) / jnp.where(good, 1 - r, 1)))
    return masks.times(x, 1 + stddev * masks.normal(draw, x.shape))
