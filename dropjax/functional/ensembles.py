"""Fixed masks: each is a member of an ensemble within one network."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from dropjax import _arguments, _checks, bits, sharding
from dropjax.masks import nan_unless


@_arguments.public
def masksembles_masks(key: Array, num_features: int, num_masks: int, scale: float) -> Array:
    """Draws the fixed masks of an ensemble, which together use every feature.

    Each of n masks keeps m of T places at random, and places that none keeps are left out. m and T are the integers
    with T / m nearest to `scale` for which T (1 - (1 - m / T)^n), the places used in expectation, is nearest to the
    number of features; masks are drawn until the places used are exactly that. Two masks share m^2 / T = m / scale of
    their m ones and have an intersection over union of 1 / (2 scale - 1), up to that rounding and condition; for two
    masks they share 2 m - num_features. With `scale` 1 all masks are the same, and with a large one they share nothing.

    Args:
      key: one JAX key; it is consumed. It may be traced, so that layers can be initialised under `jax.jit`.
      num_features: how many features, at least 1. Where there are few, few scales can be met.
      num_masks: n, the number of members, at least 1.
      scale: in `[1, 100]`: how much masks differ.

    Returns:
      bool `[num_masks, num_features]`: m ones in each row, and one at least in each column.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> masks = masksembles_masks(jax.random.key(0), 12, 4, 2.0)
      >>> masks.sum(1).tolist(), bool(masks.any(0).all())
      ([6, 6, 6, 6], True)

    Reference:
      Durasov, Bagautdinov, Baque, Fua, [Masksembles for uncertainty estimation](https://arxiv.org/abs/2012.08334),
      2021. Its code rounds m down, searches for a scale by drawing masks of changing sizes, and gives up at times.
    """
    name = "masksembles_masks"
    num_features = _checks.integer(name, "num_features", num_features, 1)
    num_masks = _checks.integer(name, "num_masks", num_masks, 1)
    if isinstance(scale, bool) or not isinstance(scale, int | float | np.integer | np.floating):
        raise TypeError(f"{name}: scale must be a number, got {_checks.describe(scale)}.")
    if not 1 <= scale <= 100:
        raise ValueError(f"{name}: scale must be in [1, 100], got {scale}.")
    ones, places = _sizes(num_features, num_masks, float(scale))
    words = bits.key_words(name, _checks.key(name, key))
    return _masks(words, num_features, num_masks, ones, places)


@functools.cache
def _sizes(features: int, count: int, scale: float) -> tuple[int, int]:
    """The number of ones in a mask, and of places to choose them from."""

    def used(ones: int, places: float) -> float:
        return places * -math.expm1(count * math.log1p(-ones / places)) if ones < places else places

    exact = features / used(1, scale)
    found = []
    for ones in {max(1, math.floor(exact)), min(features, math.ceil(exact))}:
        if ones * count < features:
            continue
        low, high = features, features  # what is used grows with the number of places
        while used(ones, high) < features and high < 64 * features * count:
            high *= 2
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if used(ones, middle) >= features else (middle + 1, high)
        places = min((low, max(low - 1, features)), key=lambda places: abs(used(ones, places) - features))
        found.append((abs(places / ones - scale), ones, places))
    return min(found)[1:]


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _masks(words: Array, features: int, count: int, ones: int, places: int) -> Array:
    def drawn(trial: ArrayLike) -> Array:
        first = jnp.asarray(trial, jnp.uint32) * np.uint32(count)
        draw = bits.Draw(words, (first, None), ((), ()))
        lots = bits.words(draw, (count, places))
        return lots <= jnp.sort(lots, axis=1)[:, ones - 1 : ones]

    def bad(trial: Array) -> Array:  # or two lots were the same
        kept = drawn(trial)
        return (kept.any(0).sum() != features) | (kept.sum(1) != ones).any()

    kept = drawn(lax.while_loop(bad, lambda trial: trial + np.uint32(1), jnp.uint32(0)))
    return kept[:, jnp.nonzero(kept.any(0), size=features)[0]]


@_arguments.public
def masksembles(
    x: ArrayLike,
    masks: ArrayLike,
    *,
    members: ArrayLike | None = None,
    batch_axis: int = 0,
    channel_axis: int = -1,
) -> Array:
    """Applies to each example the fixed mask of its member of the ensemble, in training and at inference alike.

    y = x m, not divided by anything, as in the paper: each member is a network of its own that is trained with its
    mask. Without `members` the batch is cut into as many equal groups as there are masks, the first of which gets the
    first mask, and so on. For all members' predictions see `masksembles_samples`.

    Args:
      x: float or complex `[batch, ..., features]`.
      masks: bool `[num_masks, features]`, from `masksembles_masks`; a fixed part of the model, to be saved with it.
      members: integers `[batch]`, the mask of each example, or one integer for all; `jnp.arange(batch) % num_masks`
        serves batches of any size. Where a traced one is out of range y is NaN.
      batch_axis: the axis of the examples.
      channel_axis: the axis of the features.

    Returns:
      Array of the shape and dtype of x. Inside shard_map and pmap x is what the device has: pass the `members` of its
      examples, and the masks cut as the features are.

    Raises:
      TypeError, ValueError: if an argument is not as said above, the batch cannot be cut into equal groups, or there
        are no `members` where x is a piece.

    Example:
      >>> masks = jnp.array([[True, False], [False, True]])
      >>> masksembles(jnp.ones((4, 2)), masks).tolist()
      [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]

    Reference:
      Durasov, Bagautdinov, Baque, Fua, [Masksembles for uncertainty estimation](https://arxiv.org/abs/2012.08334),
      2021.
    """
    name = "masksembles"
    x = _checks.array(name, x)
    batch = _checks.dim(name, "batch_axis", batch_axis, x.ndim)
    channel = _checks.dim(name, "channel_axis", channel_axis, x.ndim)
    if batch == channel:
        raise ValueError(f"{name}: batch_axis and channel_axis must differ, got {batch_axis} and {channel_axis}.")
    size, features = x.shape[batch], x.shape[channel]
    if not _checks.is_array(masks) or masks.dtype != jnp.bool_ or masks.ndim != 2 or masks.shape[1] != features:
        raise ValueError(
            f"{name}: masks must be bool [num_masks, {features}] for x of shape {x.shape}, got "
            f"{_checks.describe(masks)}. Draw them with masksembles_masks."
        )
    axes = set() if members is not None else {*sharding.varying(x), *sharding.untyped()}
    if axes:
        raise ValueError(
            f"{name}: members must be given inside shard_map and pmap, where x is a piece (here over mesh axis "
            f"{min(axes)!r}), since each device would cut its own piece into groups. Cut those of the whole batch, "
            "jnp.arange(batch) // (batch // num_masks), as the batch is cut."
        )
    chosen, known = _members(size, masks.shape[0], members)
    # no gather: JAX may not know its sharding
    own = chosen[:, None] == jnp.arange(masks.shape[0], dtype=chosen.dtype)[None]
    kept = (own[:, :, None] & jnp.asarray(masks)[None]).any(1)
    y = jnp.where(_along(kept, x.ndim, batch, channel), x, jnp.asarray(0, x.dtype))
    if known:
        return y
    good = _along(own.any(1, keepdims=True), x.ndim, batch, channel)
    return nan_unless(good, y)


def _along(table: Array, rank: int, batch: int, channel: int) -> Array:
    """Lays a table of examples and features along two dimensions of an array."""
    table = table if batch < channel else table.T
    return jnp.expand_dims(table, [d for d in range(rank) if d not in (batch, channel)])


def _members(size: int, count: int, members: ArrayLike | None) -> tuple[Array, bool]:
    """The mask of each example, and whether it is known that there is such a mask."""
    if members is None:
        if size % count:
            raise ValueError(
                f"masksembles: the batch must be a multiple of the {count} masks, got {size} examples. Pass "
                f"members=jnp.arange({size}) % {count}, or one member for all; at inference see masksembles_samples."
            )
        return jnp.arange(size) // max(size // count, 1), True
    integer = isinstance(members, int | np.ndarray | Array | np.integer) and not isinstance(members, bool)
    if (
        not integer
        or not jnp.issubdtype(jnp.asarray(members).dtype, jnp.integer)
        or np.shape(members) not in ((), (size,))
    ):
        raise TypeError(
            f"masksembles: members must be integers of shape ({size},), one for each example, or one integer, got "
            f"{_checks.describe(members)}."
        )
    if not _checks.is_traced(members) and np.size(members) and not 0 <= np.min(members) <= np.max(members) < count:
        raise ValueError(f"masksembles: members must be in [0, {count}), got {np.min(members)} to {np.max(members)}.")
    chosen = jnp.atleast_1d(jnp.asarray(members))
    wide = chosen if chosen.dtype.itemsize >= 4 else chosen.astype(jnp.int32)  # int8 cannot count 200 masks
    return wide, not _checks.is_traced(members)


@_arguments.public
def masksembles_samples(fn: Callable[[Any], Any], x: Any, num_masks: int) -> Any:
    """Runs a network with Masksembles for all its members: one pass over a batch that holds x once for each.

    Args:
      fn: the network in evaluation, a function of a batch to a pytree of arrays `[batch, ...]`. Inside shard_map and
        pmap it passes `members=jnp.repeat(jnp.arange(num_masks), batch)` to masksembles.
      x: the inputs, a pytree of arrays `[batch, ...]`.
      num_masks: n, the number of members.

    Returns:
      The pytree of fn with arrays `[num_masks, batch, ...]`: average probabilities, not logits, over the first axis.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> masks = masksembles_masks(jax.random.key(0), 12, 4, 2.0)
      >>> masksembles_samples(lambda x: masksembles(x, masks), jnp.ones((3, 12)), 4).shape
      (4, 3, 12)

    Reference:
      Durasov, Bagautdinov, Baque, Fua, [Masksembles for uncertainty estimation](https://arxiv.org/abs/2012.08334),
      2021.
    """
    name = "masksembles_samples"
    num_masks = _checks.integer(name, "num_masks", num_masks, 1)
    if not callable(fn):
        raise TypeError(f"{name}: fn must be a function of a batch, got {_checks.describe(fn)}.")
    x = jax.tree.map(jnp.asarray, x)
    sizes = {a.shape[:1] for a in jax.tree.leaves(x)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"{name}: x must be arrays [batch, ...] of one batch, got {jax.tree.map(_checks.describe, x)}."
        )
    outputs = fn(jax.tree.map(lambda a: jnp.concatenate([a] * num_masks), x))
    size = num_masks * sizes.pop()[0]
    if not all(a.ndim and a.shape[0] == size for a in jax.tree.leaves(outputs)):
        found = jax.tree.map(_checks.describe, outputs)
        raise ValueError(f"{name}: fn must return arrays [{size}, ...], one for each example, got {found}.")
    return jax.tree.map(lambda a: a.reshape(num_masks, size // num_masks, *a.shape[1:]), outputs)
