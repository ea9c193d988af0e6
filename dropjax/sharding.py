"""The place of a piece: global coordinates inside shard_map and pmap, and offsets.

Under `jax.jit`, with automatic or explicit axes, arrays are whole and nothing here is needed. Inside a
manual region each device sees only its piece, so the index of the piece's first element must be known.
"""

import contextvars
import functools
import inspect
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import multihost_utils, xla_metadata
from jax.typing import ArrayLike

from dropjax import _checks

ShardedDims = Mapping[int | None, str | Sequence[str]]
"""`{dim: axis name or names}`, and `{None: names}` for copies that are meant to share their mask."""

_UNNAMED = ("_internal_pmap_axis_name", "<axis ")  # how JAX calls the axis of a pmap that was given no axis_name


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
    if (seen := _seen.get()) is not None:
        _watch(seen, function, key, data, origin, manual, cut.get(None, ()))
    return tuple(origin)


def assert_masks_differ(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Runs a step function and raises where two shards draw the same mask and nobody said that they should.

    Inside shard_map and pmap two draws are the same if their keys and their places are. `sharded_dims` is an
    account of each draw, which this compares with what really happens: keys that were folded to differ and do
    not, `{}` where nothing differs, starts that coincide. Draws are compared over the mesh axes over which x
    varies (over all where the types do not say), without the axes of declared copies, `{None: axis}`. Layers of
    dropjax are seen like functions; what draws without dropjax is not.

    Args:
      fn: any function that draws by dropjax on its way, jitted or not, also a whole training step with its
        gradients. It is traced anew, and run once, with one callback to the host for each draw of a device.
      args: its positional arguments; buffers that fn donates are gone afterwards.
      kwargs: its keyword arguments.

    Returns:
      None.

    Raises:
      AssertionError: if shards repeat a mask; it names the function, the shards, the key and the place.
      ValueError: if fn draws nothing.

    Example:
      >>> from dropjax import dropout
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> cut = jax.sharding.PartitionSpec("data")
      >>> step = lambda x: dropout(jax.random.key(0), x, 0.5, sharded_dims={0: "data"})
      >>> assert_masks_differ(jax.shard_map(step, mesh=mesh, in_specs=cut, out_specs=cut), jnp.ones((4, 2)))
    """
    seen: list[_Seen] = []
    token = _seen.set(seen)
    try:
        # The metadata enters the key of jit's cache, so that the function is traced with the watcher in it.
        with xla_metadata.set_xla_metadata(dropjax_watch=str(next(_calls))):
            jax.block_until_ready(fn(*args, **kwargs))
        jax.effects_barrier()
    finally:
        _seen.reset(token)
    everywhere = _of_all_processes(seen)
    if not everywhere:
        raise ValueError(
            "assert_masks_differ: fn must draw by dropjax, got a function that draws nothing. Dropout of Flax is "
            "seen under replace_flax; an executable that is compiled already is not."
        )
    shards: dict[Any, dict[tuple[int, ...], str]] = {}
    for draw in everywhere:
        shards.setdefault((draw.axes, draw.words, draw.place), {})[draw.shard] = draw.function
    for (axes, words, place), by_shard in shards.items():
        if len(by_shard) > 1:
            (first, function), (second, other) = sorted(by_shard.items())[:2]
            raise AssertionError(
                f"assert_masks_differ: {function} on shard {dict(zip(axes, first, strict=True))} and {other} on shard "
                f"{dict(zip(axes, second, strict=True))} drew the same mask, for the key words {words} and a first "
                f"element at {place}; {len(by_shard)} shards did. Declare the cut, sharded_dims={{dim: axis}}, or "
                "copies that share the mask, sharded_dims={None: axis}, or fold the axis into the key, "
                "jax.random.fold_in(key, jax.lax.axis_index(axis))."
            )


class _Seen(NamedTuple):
    """One draw on one device: two that differ in nothing but the shard repeat a mask."""

    function: str
    axes: tuple[str, ...]  # the mesh axes over which masks must differ
    shard: tuple[int, ...]  # its place along them
    words: tuple[int, ...]  # of the key
    place: tuple[int, ...]  # of the first element


_seen: contextvars.ContextVar[list[_Seen] | None] = contextvars.ContextVar("_seen", default=None)
_calls = itertools.count()


def _watch(
    seen: list[_Seen],
    function: str,
    key: Array,
    data: Any,
    origin: Sequence[Array | None],
    manual: tuple[str, ...],
    copies: tuple[str, ...],
) -> None:
    """Has every device tell the host what it draws."""
    typed = data is not None and manual and _varying(lax.axis_index(manual[0]))
    axes = tuple(name for name in manual if name not in copies and (not typed or name in _varying(data)))
    words = jax.random.key_data(key) if _checks.is_typed(key) else key
    shard = [lax.axis_index(name) for name in axes]

    def tell(*numbers: Any) -> None:
        of_shard, of_words, of_place = (tuple(int(n) for n in np.ravel(np.asarray(part))) for part in numbers)
        seen.append(_Seen(function, axes, of_shard, of_words, of_place))

    place = [jnp.uint32(0) if first is None else first for first in origin]
    jax.debug.callback(tell, shard, words, place)


def _of_all_processes(seen: list[_Seen]) -> list[_Seen]:
    """What the devices of all processes drew; each process hears of its own only."""
    if jax.process_count() == 1:
        return seen
    text = np.frombuffer(json.dumps(seen).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.array(text.size)).max())
    texts = multihost_utils.process_allgather(np.pad(text, (0, longest - text.size), constant_values=ord(" ")))
    of_each = (json.loads(bytes(of_one)) for of_one in np.asarray(texts))
    return [_Seen(name, *map(tuple, numbers)) for of_one in of_each for name, *numbers in of_one]


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
        if manual[0].startswith(_UNNAMED) and not declared:
            raise ValueError(
                f"{function}: sharded_dims must be given inside pmap, since devices would draw the same mask. Give the "
                "pmap an axis_name and pass {dim: axis_name} for a cut dimension, {None: axis_name} for copies that "
                "share the mask, or {} if the key differs on every device."
            )
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
