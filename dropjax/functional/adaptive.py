"""Dropout whose rate is computed from what is dropped."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from dropjax import _arguments, _checks, bits, masks, sharding


@_arguments.public
def standout(
    key: Array,
    x: ArrayLike,
    logits: ArrayLike,
    *,
    alpha: ArrayLike = 1.0,
    beta: ArrayLike = 0.0,
    start: Mapping[int, ArrayLike] | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Array:
    """Keeps each activation with a probability of its own, the sigmoid of its logit: adaptive dropout.

    y = x m, m ~ Bernoulli(p), p = sigmoid(alpha * logits + beta): E[y] = x p and Var[y] = x^2 p (1 - p). Nothing is
    divided by p: it is large where the unit stands out, and that is what the network learns with. So evaluation is
    not the identity but the expectation, `standout_expectation`.

    The mask is a constant to the derivative: dy/dx = m, and no gradient reaches logits, alpha and beta, as
    in the paper's method of tied weights, where the logits are the preactivations and learn as those do. Unlike
    other masks it is kept for the backward pass, a byte an element, since it hangs on the last bits of the logits.

    Args:
      key: one JAX key; it is consumed.
      x: float or complex `[...]`: the activations.
      logits: float, of the shape of x or what broadcasts against it: the preactivations W a of which x = g(W a).
      alpha: scale of the logits, finite: a number or a float array that broadcasts against x; may be traced.
      beta: shift of the logits, the same. At alpha = 0 every unit is kept with probability sigmoid(beta).
      start: `{dim: index}`, where this piece starts in the whole array; indices may be traced.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.

    Returns:
      Array of the shape and dtype of x. NaN where a logit is NaN.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> standout(jax.random.key(0), jnp.ones(4), jnp.array([-99.0, 0.0, 0.0, 99.0])).tolist()
      [0.0, 1.0, 1.0, 1.0]

    Reference:
      Ba, Frey, [Adaptive dropout for training deep neural
      networks](https://proceedings.neurips.cc/paper/2013/hash/7b5b23f4aadf9513306bcd59afb6e4c9-Abstract.html), 2013.
      There beta is added to each weight; for that pass the logits (alpha W + beta) a themselves.
    """
    x, affine = _check("standout", x, logits, alpha, beta)
    draw = bits.draw("standout", key, (x, affine), x.shape, start=start, sharded_dims=sharded_dims)
    return _standout(draw, x, *affine)


@_arguments.public
def standout_expectation(x: ArrayLike, logits: ArrayLike, *, alpha: ArrayLike = 1.0, beta: ArrayLike = 0.0) -> Array:
    """Multiplies each activation by the probability with which `standout` keeps it: what evaluation uses.

    y = x sigmoid(alpha * logits + beta), which is E[standout(key, x, logits)]. It is differentiable in all four.

    Args:
      x: float or complex `[...]`: the activations.
      logits: float, of the shape of x or what broadcasts against it.
      alpha: scale of the logits, finite: a number or a float array that broadcasts against x.
      beta: shift of the logits, the same.

    Returns:
      Array of the shape and dtype of x.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> standout_expectation(jnp.ones(3), jnp.array([-99.0, 0.0, 99.0])).round(3).tolist()
      [0.0, 0.5, 1.0]

    Reference:
      Ba, Frey, [Adaptive dropout for training deep neural
      networks](https://proceedings.neurips.cc/paper/2013/hash/7b5b23f4aadf9513306bcd59afb6e4c9-Abstract.html), 2013.
    """
    x, affine = _check("standout_expectation", x, logits, alpha, beta)
    return _expectation(x, *affine)


def _check(function: str, x: ArrayLike, *affine: Any) -> tuple[Array, tuple[Array, ...]]:
    x = _checks.array(function, x)
    ranges = {"logits": None, "alpha": "(-inf, inf)", "beta": "(-inf, inf)"}  # a NaN of the network stays a NaN
    named = zip(ranges.items(), affine, strict=True)
    arrays = [(argument, _checks.real(function, argument, value, range)) for (argument, range), value in named]
    return x, tuple(_checks.broadcasts(function, argument, value, x.shape) for argument, value in arrays)


@jax.jit
def _standout(draw: bits.Draw, x: Array, logits: Array, alpha: Array, beta: Array) -> Array:
    z = _affine(logits, alpha, beta, np.float32)
    return _masked(jnp.where(jnp.isnan(z), np.uint8(2), _keep(bits.words(draw, x.shape), z).astype(jnp.uint8)), x)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _masked(kept: Array, x: Array) -> Array:
    """x where 1, 0 where 0, NaN where 2; drawn once, since z may be rounded otherwise in the backward pass."""
    return masks.nan_unless(kept < 2, jnp.where(kept == 1, x, jnp.asarray(0, x.dtype)))


def _keep(words: Array, z: Array) -> Array:
    """True with probability sigmoid(z), rounded to 2^-32: the rarer of keeping and dropping has the threshold."""
    t = jnp.round(jax.nn.sigmoid(-jnp.abs(z)) * np.float32(2**32)).astype(jnp.uint32)
    return jnp.where(z < 0, ~words < t, words >= t)


@jax.jit
def _expectation(x: Array, logits: Array, alpha: Array, beta: Array) -> Array:
    return masks.times(x, jax.nn.sigmoid(_affine(logits, alpha, beta, masks.wide(x))))


def _affine(logits: Array, alpha: Array, beta: Array, dtype: Any) -> Array:
    largest = jnp.finfo(dtype).max  # of an infinite logit the sigmoid is 0 or 1, also of 0 times it, and flat
    return alpha.astype(dtype) * jnp.clip(logits.astype(dtype), -largest, largest) + beta.astype(dtype)
