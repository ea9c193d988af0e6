"""Words to masks and noise, and their application to an array.

A rate is rounded to float32 and becomes the integer threshold t = round(rate * 2^32), half to even: an
element is dropped where its word is below t. What is kept is scaled by the inverse of the keep rate
that t realises, q = 1 - t / 2^32, so that E[y] = x holds for the rate that is really drawn.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from dropjax import _arguments, _checks, bits, sharding
from dropjax._checks import Fixed, Rate

_WORDS = 2**32


@_arguments.public
def keep_mask(
    key: Array,
    shape: int | Sequence[int],
    rate: ArrayLike,
    *,
    broadcast_dims: Sequence[int] = (),
    generator: str = "mix",
    start: Mapping[int, ArrayLike] | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Array:
    """Draws the mask that `dropout` applies: True where an element is kept.

    P(mask = True) = q, with q = 1 - round(rate * 2^32) / 2^32 the realised keep rate.

    Args:
      key: one JAX key; it is consumed.
      shape: the shape of the array to be masked, or of this piece of it.
      rate: probability of dropping, in `[0, 1]`: a number, or a float array that broadcasts against
        `shape`. Where a traced rate is NaN or out of range the mask is True and `apply_mask` gives NaN.
      broadcast_dims: dimensions along which the mask is shared; negatives count from the end.
      generator: `"mix"`, the contract of `dropjax.bits`, or `"threefry"`, the masks that
        `jax.random.bernoulli(key, float32(1 - rate), shape)` draws.
      start: `{dim: index}`, where this piece starts in the whole array; indices may be traced.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.

    Returns:
      bool `[*shape]`.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> mask = keep_mask(jax.random.key(0), (100, 100), 0.25)
      >>> 0.73 < float(mask.mean()) < 0.77
      True
    """
    lengths = _checks.shape("keep_mask", shape)
    checked = _checks.rate("keep_mask", rate, lengths)
    draw = bits.draw(
        "keep_mask", key, None, lengths,
        shared=broadcast_dims, generator=generator, start=start, sharded_dims=sharded_dims,
    )  # fmt: skip
    return _keep_mask(draw, checked, lengths)


@functools.partial(jax.jit, static_argnums=2)
def _keep_mask(draw: bits.Draw, rate: Rate, shape: tuple[int, ...]) -> Array:
    return jnp.broadcast_to(keep(draw, shape, rate), shape)


@_arguments.public
def apply_mask(x: ArrayLike, mask: ArrayLike, rate: ArrayLike) -> Array:
    """Zeroes x where the mask is False and scales the rest so that the expectation is x.

    y = x / q where kept, 0 elsewhere, with q the keep rate that `rate` realises: E[y] = x and
    Var[y] = x^2 (1 - q) / q for a mask that `keep_mask` drew with the same rate.

    Args:
      x: float or complex `[...]`.
      mask: bool, True = kept; broadcasts against x. Any mask, also a stored one, will do.
      rate: probability of dropping, in `[0, 1]`: a number, or a float array that broadcasts against x.

    Returns:
      Array of the shape and dtype of x. Values are scaled in float32 at least, and rounded once.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> apply_mask(jnp.ones(3), jnp.array([True, False, True]), 0.5)
      Array([2., 0., 2.], dtype=float32)
    """
    x = _checks.array("apply_mask", x)
    return _apply_mask(x, _checks.mask("apply_mask", mask, x.shape), _checks.rate("apply_mask", rate, x.shape))


@jax.jit
def _apply_mask(x: Array, mask: Array, rate: Rate) -> Array:
    return apply(x, mask, rate)


def redrawn(
    formula: Callable[..., Array], *, prevent_cse: bool = False, static_argnums: tuple[int, ...] = ()
) -> Callable[..., Array]:
    """Compiles a formula of a draw so that its backward pass draws again instead of storing a mask.

    What is kept between the passes is the key's words, and those arguments that are arrays and that
    the derivative needs: a rate, but not x where the formula is linear in x. `prevent_cse` is for noise that
    costs so much that XLA would rather keep it than compute it twice; it bars the backward pass from fusion
    with what comes before it.
    """
    remat = jax.checkpoint(formula, prevent_cse=prevent_cse, static_argnums=static_argnums)
    return jax.jit(remat, static_argnums=static_argnums)


def keep(draw: bits.Draw, shape: tuple[int, ...], rate: Rate) -> Array:
    """True where an element is kept; of length 1 along shared dimensions of a rate that allows it."""
    if draw.generator == "threefry":
        # jax draws a uniform of 23 bits and keeps where it is below float32(1 - rate)
        uniform = bits.threefry_words(draw, shape) >> np.uint32(9)
        return uniform < _bernoulli_threshold(rate)
    if isinstance(rate, Fixed) and threshold(rate) in (0, _WORDS):
        return jnp.full(shape, threshold(rate) == 0)
    return above(bits.words(draw, shape), rate)


def above(words: Array, rate: Rate) -> Array:
    """True where a word is not below the threshold of the rate."""
    t = threshold(rate)
    if isinstance(rate, Fixed):
        return words >= np.uint32(t) if t < _WORDS else jnp.zeros(words.shape, bool)
    return (words >= t) & (rate != 1)


def threshold(rate: Rate) -> Any:
    """round(rate * 2^32), half to even: an int for a fixed rate, else uint32 with 0 for a rate of 1."""
    if isinstance(rate, Fixed):
        return round(float(number(rate)) * _WORDS)
    r = number(rate)
    return jnp.where((r > 0) & (r < 1), jnp.round(r * np.float32(_WORDS)), 0).astype(jnp.uint32)


def _bernoulli_threshold(rate: Rate) -> ArrayLike:
    if isinstance(rate, Fixed):
        return np.uint32(np.ceil(np.float32(1 - rate.value) * np.float32(2**23)))
    kept = jnp.where(valid(rate), 1 - number(rate), 1)
    return jnp.ceil(kept * np.float32(2**23)).astype(jnp.uint32)


def valid(rate: Rate) -> Any:
    """Whether a rate is in [0, 1]; a traced one may not be."""
    return (number(rate) >= 0) & (number(rate) <= 1)


def nan_unless(valid: Any, value: Any) -> Any:
    """Returns the value where valid, elsewhere NaN; where valid is known it was checked, and the value is returned.

    The NaN is 0 / 0 and no constant: `jax_debug_nans` reports every operation whose result has a NaN, also one that
    is never selected.
    """
    if not isinstance(valid, Array):
        return value
    nan = np.float32(0) / valid.astype(np.float32)
    return jnp.where(valid, value, nan.astype(value.dtype))


def number(rate: Rate) -> Any:
    """The rate in float32, a NumPy number where it is fixed; it is not differentiated."""
    return np.float32(rate.value) if isinstance(rate, Fixed) else lax.stop_gradient(rate)


def keep_rate(rate: Rate, dtype: Any = np.float32) -> Any:
    """q = 1 - t / 2^32, rounded once to dtype; a NumPy number for a fixed rate."""
    t = threshold(rate)
    if isinstance(rate, Fixed):
        return np.dtype(dtype).type((_WORDS - t) / _WORDS)
    q = jnp.where(t == 0, 1, (-t).astype(dtype) * np.dtype(dtype).type(2.0**-32))
    return jnp.where(rate == 1, 0, q)


def scale(rate: Rate, dtype: Any = np.float32) -> Any:
    """1 / q; 1 at a rate of 1, where nothing is kept, and NaN where a traced rate is out of range."""
    q = keep_rate(rate, dtype)
    if isinstance(rate, Fixed):
        return q.dtype.type(1) / q if q else q.dtype.type(1)
    q = jnp.where(q == 0, 1, q)
    return nan_unless(valid(rate), reciprocal(q) if q.dtype == jnp.float32 else 1 / q)


def reciprocal(q: Array) -> Array:
    """1 / q for float32 q in [2^-32, 1], correctly rounded on every backend.

    Accelerators divide to within 2 ulp. The remainder of the integer significands, which wraps at 2^32
    but is small, says by how much the quotient is off.
    """
    word = lax.bitcast_convert_type(q, jnp.uint32)
    exponent, significand = word >> np.uint32(23), (word & np.uint32(0x7FFFFF)) | np.uint32(0x800000)
    # 2^47 / significand, in [2^23, 2^24], from the bits of the quotient of the significand alone
    unit = lax.bitcast_convert_type((word & np.uint32(0x7FFFFF)) | np.uint32(0x3F800000), jnp.float32)
    quotient = lax.div(jnp.full_like(unit, 2**24), unit).astype(jnp.uint32)
    for _ in range(3):
        remainder = lax.bitcast_convert_type(-(quotient * significand), jnp.int32)
        quotient = jnp.where(remainder < 0, quotient - np.uint32(1), quotient)
        quotient = jnp.where(remainder >= significand.astype(jnp.int32), quotient + np.uint32(1), quotient)
    remainder = -(quotient * significand)
    quotient = quotient + (np.uint32(2) * remainder >= significand).astype(jnp.uint32)
    rounded = ((np.uint32(253) - exponent) << np.uint32(23)) + (quotient - np.uint32(0x800000))
    return lax.bitcast_convert_type(rounded, jnp.float32)


def apply(x: Array, kept: Array, rate: Rate, generator: str = "mix", *, rescale: bool = True) -> Array:
    """x / q (or x) where kept, 0 elsewhere; a true select, so that an infinity that is dropped is 0."""
    if not rescale:
        scaled = nan_unless(valid(rate), x)
    elif generator == "threefry":
        scaled = _divided(x, rate)
    elif isinstance(rate, Fixed) and threshold(rate) == 0:
        scaled = x
    else:
        scaled, kept = widened(x, scale(rate, wide(x))), kept & (number(rate) != 1)
    nothing = nan_unless(valid(rate), np.float32(0))
    # selected before it is rounded: XLA on CPU selects narrow floats by widening and rounding them again
    return jnp.where(kept, scaled, jnp.asarray(nothing, scaled.dtype)).astype(x.dtype)


def _divided(x: Array, rate: Rate) -> Array:
    """x / (1 - rate) in the dtype of x, as Flax divides."""
    if isinstance(rate, Fixed):
        return jnp.zeros_like(x) if rate.value == 1 else x / (1 - rate.value)
    kept = jnp.where(rate == 1, 1, 1 - number(rate))
    return x / nan_unless(valid(rate), kept).astype(x.dtype)


def wide(x: Array) -> Any:
    """The dtype in which x is scaled: float32 at least."""
    return np.dtype(np.float64) if x.dtype in (jnp.float64, jnp.complex128) else np.dtype(np.float32)


def times(x: Array, factor: ArrayLike) -> Array:
    """x * factor for a real factor of at least float32, rounded once to the dtype of x."""
    return widened(x, factor).astype(x.dtype)


def widened(x: Array, factor: ArrayLike) -> Array:
    """x * factor for a real factor of at least float32, not yet rounded to the dtype of x."""
    dtype = wide(x)
    factor = jnp.asarray(factor, dtype)
    if jnp.iscomplexobj(x):
        return lax.complex(jnp.real(x) * factor, jnp.imag(x) * factor)
    return x.astype(dtype) * factor


def uniform(draw: bits.Draw, shape: tuple[int, ...]) -> Array:
    """Uniform float32 noise in (-1, 1): midpoints of 2^24 equal intervals, so E = 0 exactly."""
    odd = (bits.words(draw, shape) >> np.uint32(8)).astype(jnp.int32) * 2 + (1 - 2**24)
    return odd.astype(jnp.float32) * np.float32(2.0**-24)


def normal(draw: bits.Draw, shape: tuple[int, ...]) -> Array:
    """Standard normal float32 noise: the inverse distribution function at such a midpoint, so E = 0 exactly."""
    return np.float32(np.sqrt(2)) * lax.erf_inv(uniform(draw, shape))
