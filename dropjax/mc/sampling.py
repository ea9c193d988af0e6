"""Samples of a stochastic function, chunk by chunk, on one device or many."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dropjax import _arguments, _checks
from dropjax.mc import hoisting, tracing

Draw = Callable[[Any, int], Any]
"""From the first sample's number and how many samples to their values, `[size, ...]`."""

_MOST = 2**31 - 1  # what an int32 counts


@_arguments.public
def sample(
    fn: Callable[[Array], Any],
    key: Array,
    num_samples: int,
    *,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
    axes: str | Sequence[str] | None = None,
) -> Any:
    """Draws samples of a stochastic function: one forward pass for each.

    Sample t is `fn(fold_in(key, t))`: its masks are the same bit for bit for any `chunk_size` and any `mesh`, values
    agree to rounding, and 100 samples are the first of 200. What in `fn` does not depend on its key is
    computed once for all samples. Call it inside `jax.jit`.

    Args:
      fn: function of a key that returns a pytree of arrays.
      key: one JAX key.
      num_samples: T, from 1 to 2^31 - 1.
      chunk_size: how many samples are computed at a time, which bounds the memory; None for all.
      mesh: devices that share each chunk's samples; a chunk is rounded up to a multiple of their number.
      axes: the axes of the mesh that share them; None for all. Over the others the arrays in `fn` may be cut.

    Returns:
      The pytree of `fn` with arrays of shape `[T, ...]`; what does not depend on the key is repeated.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> import dropjax
      >>> samples = sample(lambda key: dropjax.dropout(key, jnp.ones(3), 0.5), jax.random.key(0), 100)
      >>> samples.shape
      (100, 3)

    Reference:
      Gal, Ghahramani, [Dropout as a Bayesian approximation](https://arxiv.org/abs/1506.02142), 2016.
    """
    passes = prepare("sample", fn, key, num_samples, chunk_size, mesh, axes)

    def compute(draw: Draw) -> Any:
        first, starts = passes.chunks()
        values = passes.gathered(draw(0, first))
        if not len(starts):
            return values
        _, more = lax.scan(lambda _, start: (None, passes.gathered(draw(start, passes.chunk_size))), None, starts)
        return jax.tree.map(
            lambda a, b: jnp.concatenate([a, b.reshape(b.shape[0] * b.shape[1], *a.shape[1:])]), values, more
        )

    return passes.run(compute)


class Passes(NamedTuple):
    """Forward passes of a checked function, ready to run."""

    key: Array
    num_samples: int
    chunk_size: int
    program: hoisting.Program
    consts: Sequence[Any]
    shapes: Any
    mesh: Mesh | None
    axes: tuple[str, ...]

    def chunks(self) -> tuple[int, Array]:
        """How many samples the first chunk has, and where the others, which are full, start.

        The first is computed before any loop, so that what the loop carries has the types that it has on a mesh.
        """
        first = self.num_samples % self.chunk_size or self.chunk_size
        return first, jnp.arange(first, self.num_samples, self.chunk_size, dtype=jnp.uint32)

    def run(self, compute: Callable[[Draw], Any]) -> Any:
        """Compiles and runs what is computed from the samples; what they share is computed before."""
        one_by_one = hoisting.loops(self.program)  # vmap over their keys would not draw what a loop draws

        @jax.jit
        def program(key: Array, consts: Sequence[Any]) -> Any:
            _, needed = self.program.run_shared(consts, [None])

            def one(key: Array) -> Any:
                return jax.tree.unflatten(jax.tree.structure(self.shapes), self.program.run_sampled([key], needed))

            def draw(first: Any, size: int) -> Any:
                if one_by_one:
                    return lax.map(one, _keys(key, jnp.uint32(first) + jnp.arange(size, dtype=jnp.uint32)))
                padded = -(-size // self._devices()) * self._devices()
                keys = self._shared_out(_keys(key, jnp.uint32(first) + jnp.arange(padded, dtype=jnp.uint32)))
                values = jax.vmap(one, spmd_axis_name=None if self._explicit() else self.axes or None)(keys)
                return values if padded == size else jax.tree.map(lambda x: x[:size], self.gathered(values))

            return compute(draw)

        return program(self.key, self.consts)

    def gathered(self, values: Any) -> Any:
        """On explicit axes the samples, brought to every device: their number may not be divisible."""
        if not self._explicit():
            return values
        return jax.tree.map(
            lambda x: jax.sharding.reshard(x, PartitionSpec(None, *jax.typeof(x).sharding.spec[1:])), values
        )

    def _devices(self) -> int:
        count = 1
        for axis in self.axes:
            count *= self.mesh.shape[axis]  # type: ignore[union-attr]  # axes are of a mesh
        return count

    def _explicit(self) -> bool:
        context = jax.sharding.get_abstract_mesh()
        types = dict(zip(context.axis_names, context.axis_types, strict=True))
        return any(types.get(axis) == AxisType.Explicit for axis in self.axes)

    def _shared_out(self, keys: Array) -> Array:
        if self.mesh is None:
            return keys
        if self._explicit():
            return jax.sharding.reshard(keys, PartitionSpec(self.axes))
        mesh = self.mesh
        if jax.sharding.get_abstract_mesh().empty:
            mesh = Mesh(mesh.devices, mesh.axis_names)  # with automatic axes
        return lax.with_sharding_constraint(keys, NamedSharding(mesh, PartitionSpec(self.axes)))


def prepare(
    function: str,
    fn: Callable[[Array], Any],
    key: Array,
    num_samples: int,
    chunk_size: int | None,
    mesh: Mesh | None,
    axes: str | Sequence[str] | None,
) -> Passes:
    """Checks the arguments and traces fn."""
    if not callable(fn):
        raise TypeError(f"{function}: fn must be a function of a key, got {_checks.describe(fn)}.")
    num_samples = _checks.integer(function, "num_samples", num_samples, 1)
    if num_samples > _MOST:
        raise ValueError(f"{function}: num_samples must be at most {_MOST}, got {num_samples}.")
    chunk_size = num_samples if chunk_size is None else _checks.integer(function, "chunk_size", chunk_size, 1)
    key = _checks.key(function, key)
    names = _axes(function, mesh, axes)
    program, consts, shapes = tracing.trace(function, fn, key)
    empty = not any(of.size for of in jax.tree.leaves(shapes))
    if num_samples > 1 and not empty and not any(program.varies):
        _checks.warn(
            f"{function}: fn ignores its key, so its {num_samples} samples are all the same. Is the model in "
            "evaluation mode, or does its dropout take keys from elsewhere?"
        )
    return Passes(key, num_samples, min(chunk_size, num_samples), program, consts, shapes, mesh, names)


def _axes(function: str, mesh: Mesh | None, axes: str | Sequence[str] | None) -> tuple[str, ...]:
    if mesh is None:
        if axes is not None:
            raise ValueError(f"{function}: axes must be given with a mesh, got {axes!r} without. Pass mesh=.")
        return ()
    if not isinstance(mesh, Mesh):
        raise TypeError(f"{function}: mesh must be a jax.sharding.Mesh, got {_checks.describe(mesh)}.")
    names = tuple(mesh.axis_names) if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    if not names or len(set(names)) < len(names) or not set(names) <= set(mesh.axis_names):
        raise ValueError(
            f"{function}: axes must be among the mesh's, {tuple(mesh.axis_names)}, each once, got {axes!r}."
        )
    if manual := set(names) & set(jax.sharding.get_abstract_mesh().manual_axes):
        raise ValueError(
            f"{function}: axes must not be manual here, got {min(manual)!r}. Inside shard_map each device runs its own "
            "samples: leave mesh out, and fold the axis into the key."
        )
    return names


def _keys(key: Array, samples: Array) -> Array:
    if _checks.is_typed(key) and jax.random.key_impl(key) == "unsafe_rbg":  # whose vmap is not a loop
        return lax.map(lambda t: jax.random.fold_in(key, t), samples)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, samples)
