"""NNX modules that drop layers or weights of other modules, and layers that keep something of their own."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from dropjax import _checks
from dropjax.functional import depth, ensembles, weights
from dropjax.nnx.base import Layer, Source, Stochastic
from dropjax.sharding import ShardedDims

__all__ = ["DropConnect", "DropConnectDense", "LayerDrop", "Masks", "Masksembles", "WeightDrop"]


@nnx.dataclass(eq=False)
class LayerDrop(Stochastic):
    """Runs a module, or leaves it out and returns its input: `dropjax.layer_drop` as a wrapper.

    A module that is left out costs nothing, and leaves its statistics and streams as they were. The module holds its
    residual connection, so that its output has the structure, shapes and dtypes of its input.

    Args:
      module: the module that is run.
      rate: probability of leaving it out, in `[0, 1]`.
      deterministic: if True the module is always run; `model.train()` and `model.eval()` set it.
      rng_collection: name of the rng stream.
      rngs: the streams to fork the layer's own from; without them each call needs `rngs=`.

    Example:
      >>> block = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
      >>> y = LayerDrop(block, 0.2, rngs=nnx.Rngs(1))(jnp.ones((2, 3)))
    """

    module: nnx.Module
    rate: ArrayLike

    def __call__(
        self, inputs: Any, *args: Any, deterministic: bool | None = None, rngs: Source = None, **kwargs: Any
    ) -> Any:
        """Calls the module or returns the inputs.

        Args:
          inputs: a pytree of arrays `[...]`.
          args: more for the module.
          deterministic: if True the module is run; overrides the field. The module does not get it.
          rngs: a key, `RngStream` or `Rngs` to use instead of the layer's own. The module does not get it.
          kwargs: more for the module.

        Returns:
          The pytree of the inputs.
        """
        rate = self._field("rate")
        key = self._key_at(rate, 0.0, deterministic, rngs)
        if key is None:
            return self.module(inputs, *args, **kwargs)
        taken = depth.branch("LayerDrop", key, rate)
        graph, state = nnx.split(self.module)
        values = _values(state)
        changing: set[Any] = set()

        def run(pair: tuple[Any, dict[Any, Any]]) -> tuple[Any, dict[Any, Any]]:
            inputs, old = pair
            y, new = _run("LayerDrop", graph, _replaced(state, values | old), inputs, *args, **kwargs)
            changing.update(new)
            return y, old | new

        def returned(inputs: Any) -> Any:
            return run((inputs, {}))[0]

        inputs = jax.tree.map(jnp.asarray, inputs)  # traced for what the module changes, and its errors at rate 1, too
        jax.eval_shape(lambda inputs: depth.left_out("LayerDrop", jax.lax.switch, 0, returned, inputs), inputs)
        old = {path: values[path] for path in changing}
        y, new = depth.left_out("LayerDrop", jax.lax.switch, taken, run, (inputs, old))
        _update(self.module, state, {path: value for path, value in new.items() if value is not old[path]})
        return y


@nnx.dataclass(eq=False)
class WeightDrop(Stochastic):
    """Runs a module with named parameters dropped: `dropjax.weight_drop` as a wrapper.

    What is stored stays as it is, and gradients reach it through the masks. One call has one mask for each parameter:
    wrap what runs over time, such as `nnx.RNN`, for the same mask at all times.

    Args:
      module: the module that is run.
      rate: probability of dropping a weight, in `[0, 1]`.
      names: ends of the parameters' paths in the module, or a function of a path.
      deterministic: if True nothing is dropped; `model.train()` and `model.eval()` set it.
      rng_collection: name of the rng stream.
      rngs: the streams to fork the layer's own from; without them each call needs `rngs=`.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension, or a function of a
        path; ignored for axes that are not manual at the call.

    Example:
      >>> rnn = nnx.RNN(nnx.OptimizedLSTMCell(2, 3, rngs=nnx.Rngs(0)))
      >>> y = WeightDrop(rnn, 0.5, names="dense_h/kernel", rngs=nnx.Rngs(1))(jnp.ones((1, 5, 2)))
    """

    module: nnx.Module
    rate: ArrayLike
    _: dataclasses.KW_ONLY
    names: weights.Names
    sharded_dims: ShardedDims | Callable[[str], ShardedDims | None] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        weights.named_paths(nnx.state(self.module, nnx.Param), self.names)

    def __call__(self, *args: Any, deterministic: bool | None = None, rngs: Source = None, **kwargs: Any) -> Any:
        """Calls the module with dropped parameters.

        Args:
          args: for the module.
          deterministic: if True nothing is dropped; overrides the field. The module does not get it.
          rngs: a key, `RngStream` or `Rngs` to use instead of the layer's own. The module does not get it.
          kwargs: for the module.

        Returns:
          What the module returns.
        """
        rate = self._field("rate")
        key = self._key_at(rate, 0.0, deterministic, rngs)
        if key is None:
            return self.module(*args, **kwargs)
        parts: Any = nnx.split(self.module, nnx.Param, ...)
        graph, params, rest = parts
        dropped = weights.weight_drop(key, params, rate, names=self.names, sharded_dims=self._field("sharded_dims"))
        y, new = _run("WeightDrop", graph, nnx.merge_state(dropped, rest), *args, **kwargs)
        _update(self.module, nnx.merge_state(params, rest), new)
        return y


def _values(state: nnx.State) -> dict[Any, Any]:
    """The values of variables, and the arrays that are none."""
    leaves = nnx.to_flat_state(state)
    return {path: leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf for path, leaf in leaves}


def _replaced(state: nnx.State, values: dict[Any, Any]) -> nnx.State:
    """The leaves of a state that have a value, with this value."""
    leaves = [(path, leaf, values[path]) for path, leaf in nnx.to_flat_state(state) if path in values]
    return nnx.from_flat_state(
        [(path, leaf.replace(value) if isinstance(leaf, nnx.Variable) else value) for path, leaf, value in leaves]
    )


def _run(function: str, graph: Any, state: nnx.State, *args: Any, **kwargs: Any) -> tuple[Any, dict[Any, Any]]:
    """What a copy of the module returns, and the values that it changed."""
    before = _values(state)
    module = nnx.merge(graph, state, copy=True)
    y = module(*args, **kwargs)
    structure, written = nnx.split(module)
    after = _values(written)
    if structure != graph:
        got = set(after) - set(before) or "other static attributes"
        raise ValueError(f"{function}: module must not create variables, nor change what is static, got {got}.")
    return y, {path: value for path, value in after.items() if value is not before[path]}


def _update(module: nnx.Module, state: nnx.State, new: dict[Any, Any]) -> None:
    """Writes what has changed and nothing else, since a module of an outer trace may be read but not written."""
    if new:
        nnx.update(module, _replaced(state, new))


@nnx.dataclass(eq=False)
class DropConnect(Layer):
    """`dropjax.drop_connect` as a layer: drops single weights of the kernel that it is given.

    Args:
      rate: probability of dropping a weight, in `[0, 1]`.
      broadcast_dims: dimensions of the kernel along which the mask is shared.
      generator: `"mix"` or `"threefry"`.
    """

    rate: ArrayLike
    _: dataclasses.KW_ONLY
    broadcast_dims: Sequence[int] = ()
    generator: str = "mix"
    _function = staticmethod(weights.drop_connect)


class DropConnectDense(nnx.Linear):
    """Flax's `Linear` with `dropjax.drop_connect` of its kernel; the bias is not dropped.

    Args:
      in_features: how many features there are.
      out_features: how many features there will be.
      rate: probability of dropping a weight, in `[0, 1]`.
      deterministic: if True nothing is dropped; `model.train()` and `model.eval()` set it.
      rng_collection: name of the rng stream.
      rngs: the streams, of the parameters and to fork the layer's own from.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension of the kernel;
        ignored for axes that are not manual at the call.
      linear: what else `nnx.Linear` takes.

    Example:
      >>> layer = DropConnectDense(3, 4, 0.5, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.ones((2, 3)))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rate: ArrayLike,
        *,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs,
        sharded_dims: ShardedDims | None = None,
        **linear: Any,
    ) -> None:
        _checks.field("DropConnectDense", "drop_connect", "rate", rate)
        super().__init__(in_features, out_features, rngs=rngs, **linear)
        self.drop = DropConnect(
            rate, deterministic=deterministic, rng_collection=rng_collection, rngs=rngs, sharded_dims=sharded_dims
        )

    def __call__(  # type: ignore[override]  # what Flax's takes besides is for explicit meshes
        self, inputs: Array, *, deterministic: bool | None = None, rngs: Source = None
    ) -> Array:
        """Multiplies by the kernel, some weights of which are dropped, and adds the bias.

        Args:
          inputs: float array `[..., in_features]`.
          deterministic: if True nothing is dropped; overrides the field.
          rngs: a key, `RngStream` or `Rngs` to use instead of the layer's own.

        Returns:
          Array `[..., out_features]`.
        """
        kernel = self.drop(self.kernel[...], deterministic=deterministic, rngs=rngs)
        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, bias = self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)
        options = {} if self.preferred_element_type is None else {"preferred_element_type": self.preferred_element_type}
        contracted = (((inputs.ndim - 1,), (0,)), ((), ()))
        y = self.dot_general(inputs, kernel, contracted, precision=self.precision, **options)
        return y if bias is None else y + jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))


class Masks(nnx.Variable):
    """Fixed masks of an ensemble: saved with the model and not trained."""


class Masksembles(nnx.Module):
    """`dropjax.masksembles` as a layer, with fixed masks that are drawn when it is made.

    In training and in evaluation each example has one member's mask; `dropjax.masksembles_samples` runs all members.

    Args:
      num_features: how many features.
      num_masks: how many members.
      scale: in `[1, 100]`: how much masks differ.
      batch_axis: the axis of the examples.
      channel_axis: the axis of the features.
      rngs: the streams, or a key: the masks are drawn with the one that parameters are drawn with.

    Example:
      >>> layer = Masksembles(12, 4, 2.0, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((8, 12))).shape
      (8, 12)
    """

    def __init__(
        self,
        num_features: int,
        num_masks: int,
        scale: float,
        *,
        batch_axis: int = 0,
        channel_axis: int = -1,
        rngs: nnx.Rngs | Array,
    ) -> None:
        key = rngs.params() if isinstance(rngs, nnx.Rngs) else rngs
        self.masks = Masks(ensembles.masksembles_masks(key, num_features, num_masks, scale))
        self.batch_axis, self.channel_axis = batch_axis, channel_axis

    def __call__(self, inputs: ArrayLike, members: ArrayLike | None = None) -> Array:
        """Applies to each example the mask of its member.

        Args:
          inputs: float array `[batch, ..., features]`.
          members: integers `[batch]`, or one: the mask of each example; None for equal groups.

        Returns:
          Array of the shape and dtype of the inputs.
        """
        return ensembles.masksembles(
            inputs, self.masks[...], members=members, batch_axis=self.batch_axis, channel_axis=self.channel_axis
        )
