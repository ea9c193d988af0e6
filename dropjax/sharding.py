"""The place of a piece: global coordinates inside shard_map and pmap, and offsets.

Under `jax.jit`, with automatic or explicit axes, arrays are whole and nothing here is needed. Inside a
manual region each device sees only its piece, so the index of the piece's first element must be known.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from dropjax import _checks

ShardedDims = Mapping[int | None, str | Sequence[str]]
"""`{dim: axis name or names}`, and `{None: names}` for copies that are meant to share their mask."""


def place(
    function: str,
    key: Array,
    data: Any,
    shape: tuple[int, ...],
    start: Mapping[int, ArrayLike] | None,
    sharded_dims: ShardedDims | None,
) -> tuple[Array | None, ...]:
    """Returns for each dimension the global index of the piece's first element; None stands for 0.

    Args:
      function: name for error messages.
      key: the checked key; an axis over which it varies needs no other account.
      data: what the mask is applied to, x and its rate, or None where only the shape is known.
      shape: the local shape.
      start: `{dim: index}`, the place of the first element in the whole array.
      sharded_dims: which dimensions are cut over which manual mesh axes.

    Raises:
      ValueError: if indices pass 2^32, an axis is not manual here, or, inside shard_map or pmap, an
        axis over which x varies is not accounted for.
    """
    starts = _checks.start(function, start, shape)
    manual = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    cut = _axes_of_dims(function, sharded_dims, len(shape), manual)
    if manual:
        _account(function, (key, *starts.values()), data, manual, cut, declared=sharded_dims is not None)
    origin: list[Array | None] = [None] * len(shape)
    for d, index in starts.items():
        origin[d] = jnp.asarray(index, jnp.uint32)
    for d, axes in ((d, axes) for d, axes in cut.items() if d is not None and axes):
        first = starts.get(d, 0)
        whole = shape[d] * lax.axis_size(axes)
        _checks.last(function, d, 0 if _checks.is_traced(first) else int(first), whole)
        offset = lax.axis_index(axes).astype(jnp.uint32) * jnp.uint32(shape[d])
        before = origin[d]
        origin[d] = offset if before is None else before + offset
    return tuple(origin)


def pairs(sharded_dims: ShardedDims | None) -> tuple[tuple[int | None, str | Sequence[str]], ...] | None:
    """The mapping as sorted pairs, which a layer stores so that it can be hashed; None stays None."""
    if not isinstance(sharded_dims, Mapping):
        return sharded_dims
    found = {d: names if isinstance(names, str) else tuple(names) for d, names in sharded_dims.items()}
    return tuple(sorted(found.items(), key=lambda pair: str(pair[0])))


@functools.cache
def options(function: Callable[..., Any]) -> list[str]:
    """The options of a placed function that are fields of its layer: all but the place of a piece."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind == p.KEYWORD_ONLY and p.name != "start"]


def _axes_of_dims(
    function: str, sharded_dims: ShardedDims | None, rank: int, manual: tuple[str, ...]
) -> dict[int | None, tuple[str, ...]]:
    try:
        given = dict(sharded_dims or {})
    except (TypeError, ValueError):
        raise TypeError(
            f"{function}: sharded_dims must be a mapping {{dim: axis name}}, got {_checks.describe(sharded_dims)}."
        ) from None
    cut: dict[int | None, tuple[str, ...]] = {}
    for d, names in given.items():
        where = None if d is None else _checks.dim(function, "sharded_dims", d, rank)
        cut[where] = (*cut.get(where, ()), *((names,) if isinstance(names, str) else names))
    named = [name for names in cut.values() for name in names]
    for name in named:
        if name not in manual:
            raise ValueError(
                f"{function}: sharded_dims must name manual mesh axes, which here are {manual}, got {name!r}. "
                "Under jax.jit the arrays are whole: leave sharded_dims out."
            )
    if len(set(named)) < len(named) or len(cut) < len(given):
        raise ValueError(f"{function}: sharded_dims must name each dimension and each axis once, got {given}.")
    return cut


def _account(
    function: str,
    own: Any,
    data: Any,
    manual: tuple[str, ...],
    cut: Mapping[int | None, tuple[str, ...]],
    declared: bool,
) -> None:
    """Raises where shards would repeat one another's mask without anyone having said so."""
    named = {name for names in cut.values() for name in names}
    if not _varying(lax.axis_index(manual[0])):  # pmap, or check_vma=False: the types say nothing
        missing = frozenset(name for name in manual if lax.axis_size(name) > 1) - named
        if not declared or (named and missing):
            raise ValueError(
                f"{function}: sharded_dims must be given inside pmap and unchecked shard_map, for every axis of "
                f"{manual}, since shards would draw the same mask. Pass {{dim: {min(missing or manual)!r}}} for a cut "
                f"dimension, {{None: {min(missing or manual)!r}}} for copies that share the mask, or {{}} if the key "
                "differs on every shard."
            )
        return
    missing = (frozenset(manual) if data is None else _varying(data)) - _varying(own) - named
    if missing:
        name = min(missing)
        raise ValueError(
            f"{function}: x must be accounted for over mesh axis {name!r}, over which it varies, got the same key on "
            f"every shard, which would repeat one mask. Declare the cut, sharded_dims={{dim: {name!r}}}; declare "
            f"copies that share the mask, sharded_dims={{None: {name!r}}}; or fold the axis into the key, "
            f"jax.random.fold_in(key, jax.lax.axis_index({name!r}))."
        )


def _varying(tree: Any) -> frozenset[str]:
    """The mesh axes over which any array of a pytree varies."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, Array)]
    return frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in arrays))
