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

from dropjax import _arguments, _checks, _watch

__all__ = ["ShardedDims", "assert_masks_differ"]

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
) -> tuple[tuple[Array | None, ...], tuple[tuple[str, ...], ...]]:
    """Returns for each dimension where it starts (None stands for 0), and over which mesh axes it is cut.

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
    given = starts(function, start, shape)
    manual = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    cut = _axes_of_dims(function, sharded_dims, len(shape), manual)
    if manual:
        _account(function, (key, *given.values()), data, manual, cut, declared=sharded_dims is not None)
    for d, axes in cut.items():
        if d is not None:
            last(function, d, _known(given.get(d, 0)), shape[d] * lax.axis_size(axes))
    axes_of = tuple(cut.get(d, ()) for d in range(len(shape)))
    origin = tuple(jnp.asarray(given[d], jnp.uint32) if d in given else None for d in range(len(shape)))
    if (seen := _watch.seen.get()) is not None:
        corner = [first(*of) for of in zip(origin, axes_of, shape, strict=True)]
        typed = data is not None and bool(manual) and bool(varying(lax.axis_index(manual[0])))
        must = (varying(data) if typed else frozenset(manual)) - frozenset(cut.get(None, ()))
        may = frozenset(manual) - must - frozenset(cut.get(None, ()))
        _watch.record(seen, function, key, data, corner, shape, sorted(must), sorted(may))
    return origin, axes_of


def starts(function: str, value: Any, shape: tuple[int, ...]) -> dict[int, Any]:
    """Returns `start` with dimensions counted from the front; known indices are checked against 2^32."""
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{function}: start must be a mapping {{dim: index}}, got {_checks.describe(value)}.")
    _checks.dims(function, "the dimensions of start", tuple(value), len(shape))
    given = {d: jnp.asarray(index) if _checks.is_symbolic(index) else index for d, index in value.items()}
    found = {_checks.dim(function, "start", d, len(shape)): index for d, index in given.items()}
    for d, index in found.items():
        integer = _checks.is_array(index) and jnp.issubdtype(index.dtype, jnp.integer) and index.shape == ()
        if not integer and (isinstance(index, bool) or not isinstance(index, int)):
            raise TypeError(f"{function}: start[{d}] must be an integer, got {_checks.describe(index)}.")
        if not _checks.is_traced(index) and int(index) < 0:
            raise ValueError(f"{function}: start[{d}] must not be negative, got {index}.")
    for d, length in enumerate(shape):
        index = found.get(d, 0)
        last(function, d, 0 if _checks.is_traced(index) else int(index), length)
    return found


def last(function: str, d: int, first: int, length: int) -> None:
    """Every index of an array, also of one that is cut over devices, is a 32-bit word."""
    if isinstance(length, int) and first + max(length, 1) > _checks.MAX_INDEX:  # a symbolic length is not known
        raise ValueError(
            f"{function}: indices must be below 2^32, got {first} to {first + length - 1} along dimension {d}. "
            "Split the dimension in two."
        )


def first(origin: Array | None, axes: tuple[str, ...], length: int) -> Array | None:
    """The global index of a piece's first element along a dimension that is cut over axes; None stands for 0."""
    if not axes:
        return origin
    offset = lax.axis_index(axes).astype(jnp.uint32) * jnp.uint32(length)
    return offset if origin is None else origin + offset


@_arguments.public
def assert_masks_differ(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Runs a step function and raises where two shards draw the same mask and nobody said that they should.

    Inside shard_map and pmap two draws are the same if their keys and their places are. `sharded_dims` is an
    account of each draw, which this compares with what really happens: keys that were folded to differ and do
    not, `{}` where nothing differs, starts whose pieces overlap. Draws are compared over the mesh axes over which
    x varies by its type (over all where types do not say) or by its values, without the axes of declared copies,
    `{None: axis}`. Layers of dropjax are seen like functions; what draws without dropjax is not, nor dropout of a
    constant that is multiplied afterwards, nor a dimension that shares its mask and is declared as cut in error.

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
    seen = _watch.watched(fn, args, kwargs)
    if not seen:
        raise ValueError(
            "assert_masks_differ: fn must draw by dropjax, got a function that draws nothing. Dropout of Flax is "
            "seen under replace_flax; an executable that is compiled already is not, nor another thread."
        )
    if repeated := _watch.repeated(seen):
        raise AssertionError(
            f"assert_masks_differ: two shards drew the same mask: {repeated}. Declare the cut, "
            "sharded_dims={dim: axis}; or copies that share the mask, sharded_dims={None: axis}; or mend start; or "
            "fold the axis into the key, jax.random.fold_in(key, jax.lax.axis_index(axis))."
        )


def pairs(sharded_dims: ShardedDims | None) -> tuple[tuple[int | None, str | Sequence[str]], ...] | None:
    """The mapping as sorted pairs, which a layer stores so that it can be hashed; None stays None."""
    if not isinstance(sharded_dims, Mapping):
        return sharded_dims
    stored = {d: tuple(names) if isinstance(names, list) else names for d, names in sharded_dims.items()}
    return tuple(sorted(stored.items(), key=lambda pair: str(pair[0])))


def manual(sharded_dims: ShardedDims | None) -> ShardedDims | None:
    """`sharded_dims` of a layer without the mesh axes that are not manual at this call.

    Outside shard_map and pmap arrays are whole, so one model serves initialisation, evaluation and a
    sharded step. Where no named axis is manual the result is None, which declares nothing, and not {}:
    a misspelt axis stays an error inside shard_map.
    """
    if not sharded_dims:
        return sharded_dims
    axes = jax.sharding.get_abstract_mesh().manual_axes
    try:
        named = {d: (names,) if isinstance(names, str) else tuple(names) for d, names in dict(sharded_dims).items()}
    except (TypeError, ValueError):
        return sharded_dims  # an error, which the function raises
    left = {d: tuple(name for name in names if name in axes) for d, names in named.items()}
    return {d: names for d, names in left.items() if names} or None


@functools.cache
def fields(function: Callable[..., Any]) -> tuple[str, list[str]]:
    """What a layer stores of its function: the name of its rate, and its options but for the place of its input."""
    _, _, rate, *options = inspect.signature(function).parameters
    return rate, [name for name in options if name not in ("start", "indices")]


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
        given_names = (names,) if isinstance(names, str) or not isinstance(names, Sequence) else tuple(names)
        if not all(isinstance(name, str) for name in given_names):
            raise TypeError(
                f"{function}: sharded_dims must map a dimension to the name of a mesh axis, or to several, got "
                f"{_checks.describe(names)} for {d}. Leave out dimensions that are not cut."
            )
        cut[where] = (*cut.get(where, ()), *given_names)
    named = [name for names in cut.values() for name in names]
    for name in named:
        if name not in manual:
            remedy = "An axis that jit takes care of needs no word."
            if not manual:
                remedy = "Under jax.jit the arrays are whole: leave sharded_dims out."
            raise ValueError(
                f"{function}: sharded_dims must name manual mesh axes, which here are {manual}, got {name!r}. {remedy}"
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
    if not varying(lax.axis_index(manual[0])):  # pmap, or check_vma=False: the types say nothing
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
    missing = (frozenset(manual) if data is None else varying(data)) - varying(own) - named
    if missing:
        name = min(missing)
        raise ValueError(
            f"{function}: x must be accounted for over mesh axis {name!r}, over which it varies, got the same key on "
            f"every shard, which would repeat one mask. Declare the cut, sharded_dims={{dim: {name!r}}}; declare "
            f"copies that share the mask, sharded_dims={{None: {name!r}}}; or fold the axis into the key, "
            f"jax.random.fold_in(key, jax.lax.axis_index({name!r}))."
        )


def _known(index: Any) -> int:
    return 0 if _checks.is_traced(index) else int(index)


def varying(tree: Any) -> frozenset[str]:
    """The mesh axes over which any array of a pytree varies."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    return frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in arrays))


def untyped() -> tuple[str, ...]:
    """The manual axes of which types do not say what varies over them: those of pmap and of unchecked shard_map."""
    return tuple(name for name in jax.sharding.get_abstract_mesh().manual_axes if not varying(lax.axis_index(name)))


def spread(x: Array, axes: frozenset[str]) -> Array:
    """The same values, with a type that varies over the axes, too."""
    missing = tuple(axes - varying(x))
    return lax.pcast(x, missing, to="varying") if missing else x
