"""DropBlock: contiguous blocks of a feature map are dropped together."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from dropjax import _arguments, _checks, bits, masks, sharding
from dropjax._checks import Fixed, Rate

_DIGIT = 4  # bits of a threshold that one step of its search finds


@_arguments.public
def drop_block(
    key: Array,
    x: ArrayLike,
    rate: ArrayLike,
    *,
    block_size: int | Sequence[int] = 7,
    whole_blocks: bool = False,
    shared_channels: bool = False,
    normalize: str = "expected",
    channel_axis: int = -1,
    batch_axes: int | Sequence[int] = (0,),
    start: Mapping[int, ArrayLike] | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Array:
    """Drops contiguous blocks of feature maps of any number of spatial dimensions.

    y = x m / q, q = 1 - rate. Blocks begin at seeds, drawn with probability gamma a place, and m = 0 where any
    block lies. A place that n blocks can cover is kept with probability (1 - gamma)^n, and gamma is such that
    the expected share that is kept is q, to within 2 n / 2^32. Blocks may reach over the border, where they are cut:
    then n is the volume of a block everywhere, so that E[y] = x and Var[y] = x^2 rate / (1 - rate) at every
    place. With `whole_blocks` all lie within the map, as in the paper: the mean over places is exact, and a
    corner, which one block covers, is dropped less than the middle.

    Args:
      key: one JAX key; it is consumed.
      x: float or complex, `[batch, *space, channels]` by default; without a spatial dimension it is `dropout`.
      rate: expected share of the places that is dropped, in `[0, 1]`: a number, or a float array that broadcasts
        against x and is the same for all places of a map. It may be traced, and is not differentiated.
      block_size: the length of a block, even or odd: one for all spatial dimensions or one for each.
      whole_blocks: whether blocks lie within the map. Blocks longer than the map are then as long as it is, and
        neither `start` nor `sharded_dims` may name a spatial dimension, since the whole map must be known.
      shared_channels: whether all channels of an example share a mask; else each has its own.
      normalize: what is kept is divided by `"expected"`: q, which leaves examples independent of each other;
        `"example"`: the share of each example's mask that was kept; `"batch"`: that of the whole batch, as in
        the paper. Where nothing is kept y is 0. Counts are exact, also over devices.
      channel_axis: the axis of the channels; 1 for `[batch, channels, *space]`.
      batch_axes: the axes of the examples; `()` for one example.
      start: `{dim: index}`, where this piece starts in the whole array; indices may be traced. Not along
        dimensions that are counted.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension. Counts are summed over
        these axes; a device with a key of its own counts its own piece.

    Returns:
      Array of the shape and dtype of x. NaN where a traced rate is NaN or out of range.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> y = drop_block(jax.random.key(12), jnp.ones((1, 9, 1)), 0.5, block_size=3)
      >>> y.ravel().tolist()
      [2.0, 0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0]

    Reference:
      Ghiasi, Lin, Le, [DropBlock: a regularization method for convolutional
      networks](https://arxiv.org/abs/1810.12890), 2018. The paper draws whole blocks, takes rate n_map / (n_block
      n_seeds) for gamma, which counts overlaps twice, and normalises; `docs/variants.md` has numbers.
    """
    x = _checks.array("drop_block", x)
    checked = _checks.rate("drop_block", rate, x.shape)
    space = _checks.places("drop_block", x.ndim, channel_axis, batch_axes)
    whole_blocks = _checks.flag("drop_block", "whole_blocks", whole_blocks)
    for d in space if whole_blocks else ():
        _checks.known_length("drop_block", f"dimension {d}, in which whole blocks lie,", x.shape[d])
    shared = (channel_axis % x.ndim,) if _checks.flag("drop_block", "shared_channels", shared_channels) else ()
    _checks.choice("drop_block", "normalize", normalize)
    _checks.whole("drop_block", checked, sorted([*space, *shared]), "all places that a block can cover")
    sizes = _sizes(block_size, len(space))
    draw = bits.draw("drop_block", key, (x, checked), x.shape, shared=shared, start=start, sharded_dims=sharded_dims)
    placed = {d % x.ndim for d in start or ()}
    if whole_blocks and any(d in placed or draw.cut[d] for d in space):
        raise ValueError(
            "drop_block: whole_blocks must be False where start or sharded_dims is along a spatial dimension, since "
            f"the borders of the map are not known, got {start} and {sharded_dims}."
        )
    batch = _checks.dims("drop_block", "batch_axes", batch_axes, x.ndim)
    counted = {"expected": [], "example": [d for d in range(x.ndim) if d not in batch], "batch": list(range(x.ndim))}
    if any(d in placed for d in counted[normalize]):
        raise ValueError(
            f"drop_block: start must not be along what is counted, {tuple(counted[normalize])} for "
            f"normalize={normalize!r}, got {start}. Use normalize='expected'."
        )
    blocks = Blocks(
        tuple(space),
        sizes,
        whole_blocks,
        tuple(d for d in counted[normalize] if d not in shared),
        channel_axis % x.ndim,
    )
    sharding.starts("drop_block", start, blocks.seeds(x.shape) if not whole_blocks else x.shape)
    return _drop_block(draw, x, checked, blocks)


def _sizes(value: Any, number: int) -> tuple[int, ...]:
    """The length of a block along each spatial dimension."""
    given = [value] * number if np.ndim(value) == 0 else list(value)
    if len(given) != number:
        raise ValueError(
            f"drop_block: block_size must be one number or one for each of the {number} spatial dimensions, got "
            f"{_checks.describe(value)}."
        )
    return tuple(_checks.integer("drop_block", "block_size", size, 1) for size in given)


class Blocks(NamedTuple):
    """Where blocks may lie, and what is counted."""

    space: tuple[int, ...]  # the spatial dimensions
    sizes: tuple[int, ...]  # the lengths of a block along them
    whole: bool  # whether blocks lie within the map
    counted: tuple[int, ...]  # dimensions along which what is kept is counted; () for none
    channel: int = -1

    def seeds(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the seeds: with the places before the map from where a block reaches it, or of whole blocks."""
        lengths = list(shape)
        for d, size in zip(self.space, self.within(shape), strict=True):
            lengths[d] += 1 - size if self.whole else size - 1
        return tuple(lengths)

    def within(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The lengths of a block: of a whole one at most those of the map."""
        lengths = [shape[d] for d in self.space]
        return tuple(min(*pair) if self.whole else pair[0] for pair in zip(self.sizes, lengths, strict=True))

    def covers(self, shape: tuple[int, ...]) -> dict[int, int]:
        """How many places are covered by how many blocks."""
        if not self.whole:
            return {math.prod(self.sizes): 1}
        found = {1: 1}
        for d, size in zip(self.space, self.within(shape), strict=True):
            place = np.arange(shape[d])
            ends = np.minimum(place + 1, shape[d] - place)
            numbers, places = np.unique(np.minimum(ends, min(size, shape[d] - size + 1)), return_counts=True)
            pairs = [(n * int(m), p * int(o)) for n, p in found.items() for m, o in zip(numbers, places, strict=True)]
            found = {n: sum(p for m, p in pairs if m == n) for n in sorted({n for n, _ in pairs})}
        return found


@functools.partial(masks.redrawn, static_argnums=(3,))
def _drop_block(draw: bits.Draw, x: Array, rate: Rate, blocks: Blocks) -> Array:
    if isinstance(rate, Fixed) and masks.threshold(rate) in (0, 2**32):
        return masks.apply(x, masks.keep(draw, x.shape, rate), rate)
    if blocks.whole and 0 in x.shape:
        return x
    kept = ~_covered(draw, x.shape, rate, blocks)
    if not blocks.counted:
        return masks.apply(x, kept, rate)
    axes = tuple(axis for d in blocks.counted for axis in draw.cut[d])
    count = kept.sum(blocks.counted, keepdims=True, dtype=jnp.uint32)
    count = lax.psum(count, axes) if axes else count
    dtype = masks.wide(x)
    total = jnp.asarray(math.prod(kept.shape[d] for d in blocks.counted), dtype) * math.prod(map(lax.axis_size, axes))
    factor = total / jnp.maximum(count, 1).astype(dtype)
    nothing = masks.nan_unless(masks.valid(rate), dtype.type(0))
    scaled = masks.widened(x, factor + nothing)
    return jnp.where(kept, scaled, jnp.asarray(nothing, scaled.dtype)).astype(x.dtype)


def _covered(draw: bits.Draw, shape: tuple[int, ...], rate: Rate, blocks: Blocks) -> Array:
    """True where a block lies."""
    origin, cut = list(draw.origin), list(draw.cut)
    for d in blocks.space:
        origin[d], cut[d] = sharding.first(origin[d], cut[d], shape[d]), ()
    draw = dataclasses.replace(draw, origin=tuple(origin), cut=tuple(cut))
    words = bits.words(draw, blocks.seeds(shape))
    covered = words < _threshold(rate, blocks.covers(shape))
    if not isinstance(rate, Fixed):
        covered = covered | (masks.number(rate) == 1)
    channels = covered.shape[blocks.channel]
    covered = _packed(covered, blocks.channel)
    for d, size in zip(blocks.space, blocks.within(shape), strict=True):
        if blocks.whole:
            covered = _padded(covered, d, size - 1, size - 1)
        covered = _any_of(covered, d, size)
    return _unpacked(covered, blocks.channel, channels)


def _packed(flags: Array, d: int) -> Array:
    """Eight flags of a dimension to a byte, one where its length is symbolic: where XLA keeps a mask, it keeps bits."""
    if _checks.is_symbolic(flags.shape[d]):
        return flags.astype(jnp.uint8)
    flags = _padded(flags, d, 0, -flags.shape[d] % 8)
    lanes = lax.broadcasted_iota(jnp.uint8, (8, *(1,) * (flags.ndim - 1 - d)), 0)
    flags = flags.reshape(*flags.shape[:d], flags.shape[d] // 8, 8, *flags.shape[d + 1 :])
    return (flags.astype(jnp.uint8) << lanes.reshape((1,) * (d + 1) + lanes.shape)).sum(d + 1, dtype=jnp.uint8)


def _unpacked(packed: Array, d: int, length: int) -> Array:
    """The flags that `_packed` packed."""
    if _checks.is_symbolic(length):
        return packed == 1
    lanes = lax.broadcasted_iota(jnp.uint8, (8, *(1,) * (packed.ndim - 1 - d)), 0)
    flags = (lax.expand_dims(packed, [d + 1]) >> lanes.reshape((1,) * (d + 1) + lanes.shape)) & np.uint8(1)
    flags = flags.reshape(*packed.shape[:d], packed.shape[d] * 8, *packed.shape[d + 1 :])
    return lax.slice_in_dim(flags, 0, length, axis=d) == 1


def _padded(x: Array, d: int, low: int, high: int) -> Array:
    """Zeros before and after along a dimension."""
    return lax.pad(x, np.zeros((), x.dtype), [(low, high, 0) if d == i else (0, 0, 0) for i in range(x.ndim)])


def _any_of(covered: Array, d: int, size: int) -> Array:
    """Bitwise or of `size` neighbours along a dimension, from two windows of half the length."""
    half, length = (size + 1) // 2, covered.shape[d] - size + 1
    if half > 1:
        window = [half if d == i else 1 for i in range(covered.ndim)]
        covered = lax.reduce_window(covered, np.uint8(0), lax.bitwise_or, window, [1] * covered.ndim, "VALID")
    first, last = (lax.slice_in_dim(covered, at, at + length, axis=d) for at in (0, size - half))
    return first | last


def _threshold(rate: Rate, covers: dict[int, int]) -> Any:
    """A seed is drawn where its word is below t, the largest for which no less than q is kept.

    In integers only, so that every backend finds the same, and the same for a number and for an array.
    """
    numbers = np.array(list(covers), np.int64)
    weights = np.array([places * 2**32 // sum(covers.values()) for places in covers.values()], np.uint64)
    target = masks.threshold(rate)
    if isinstance(rate, Fixed):
        t = 0
        for bit in (1 << i for i in reversed(range(32))):
            kept = np.full(len(numbers), 2**32 - (t | bit), np.uint64)
            t |= bit * (_share(kept, numbers, weights, _high) >= 2**32 - target)
        return np.uint32(t)

    def digit(i: Any, t: Array) -> Array:
        shift = (np.uint32(32 // _DIGIT - 1) - jnp.uint32(i)) * np.uint32(_DIGIT)
        digits = lax.broadcasted_iota(jnp.uint32, (*(1,) * t.ndim, 2**_DIGIT - 1), t.ndim) + np.uint32(1)
        candidates = t[..., None] | (digits << shift)
        kept = jnp.broadcast_to(-candidates[..., None], (*candidates.shape, len(numbers)))
        enough = _share(kept, numbers, weights.astype(np.uint32), bits.multiply_high) >= -target[..., None]
        return t | (enough.sum(-1, dtype=jnp.uint32) << shift)

    t = lax.fori_loop(0, 32 // _DIGIT, digit, target ^ target)
    return jnp.where(target == 0, 0, t)


def _share(kept: Any, numbers: np.ndarray, weights: np.ndarray, high: Callable[[Any, Any], Any]) -> Any:
    """The mean of kept^number over places, in units of 2^-32; products are rounded down."""
    along = (1,) * (kept.ndim - 1) + (-1,)
    power, square, exponents = kept, kept, (numbers - 1).reshape(along)
    where: Any = np.where if isinstance(kept, np.ndarray) else jnp.where
    for i in range(int(exponents.max()).bit_length()):
        odd, factor = (exponents >> i) % 2 == 1, high(power, square)
        power = factor if odd.all() else where(odd, factor, power) if odd.any() else power
        square = high(square, square)
    return power[..., 0] if len(numbers) == 1 else high(power, weights.reshape(along)).sum(-1, dtype=kept.dtype)


def _high(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The high words of products of words, in 64 bits."""
    return (x * y) >> np.uint64(32)
