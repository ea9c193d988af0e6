"""Linen modules that drop layers or weights of other modules, and layers that keep something of their own."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dropjax import sharding
from dropjax.functional import depth, ensembles, weights
from dropjax.linen.base import Layer, key_from_stream, key_of
from dropjax.linen.values import Value
from dropjax.sharding import ShardedDims

__all__ = ["DropConnect", "DropConnectDense", "LayerDrop", "Masksembles", "WeightDrop"]


class LayerDrop(Value):
    """Runs a module, or leaves it out and returns its input: `dropjax.layer_drop` as a wrapper.

    A module that is left out costs nothing, and leaves its statistics as they were; its parameters are always made. It
    holds its residual connection, so that its output has the structure, shapes and dtypes of its input. What it sows
    into mutable collections is an error, since it would be missing where the module is left out.

    Attributes:
      module: the module that is run.
      rate: probability of leaving it out, in `[0, 1]`.
      deterministic: if True the module is always run; given here or at the call.
      rng_collection: name of the rng stream.

    Example:
      >>> layer = LayerDrop(nn.Dense(3), 0.2, deterministic=False)
      >>> params = layer.init(jax.random.key(0), jnp.ones((2, 3)))
      >>> y = layer.apply(params, jnp.ones((2, 3)), rngs={"dropout": jax.random.key(1)})
    """

    module: nn.Module
    rate: ArrayLike
    _: dataclasses.KW_ONLY
    deterministic: bool | None = None
    rng_collection: str = "dropout"

    @nn.compact
    def __call__(
        self, inputs: Any, *args: Any, deterministic: bool | None = None, rng: Array | None = None, **kwargs: Any
    ) -> Any:
        """Calls the module or returns the inputs.

        Args:
          inputs: a pytree of arrays `[...]`.
          args: more for the module.
          deterministic: if True the module is run; given here or as a field. The module does not get it.
          rng: a key to use instead of one from `make_rng(rng_collection)`. The module does not get it.
          kwargs: more for the module.

        Returns:
          The pytree of the inputs.
        """
        rate = 0 if self.is_initializing() else self.rate
        key = key_of(self, rate, deterministic, rng)
        if key is None:
            return self.module(inputs, *args, **kwargs)

        def fn(module: Any, inputs: Any) -> Any:
            before = _structures(module)
            y = module(inputs, *args, **kwargs)
            if made := [name for name, of in _structures(module).items() if of != before.get(name, of_nothing)]:
                raise ValueError(
                    f"LayerDrop: module must not make variables, which it would not where it is left out, got new ones "
                    f"in {made}. Take them out of mutable=, or sow what LayerDrop returns."
                )
            return y

        of_nothing = jax.tree.structure({})
        inputs = jax.tree.map(jnp.asarray, inputs)
        taken = depth.branch("LayerDrop", key, rate)
        if isinstance(taken, int) and taken:
            taken = jnp.int32(taken)  # traced as at other rates, so that a wrong argument is an error
        return depth.left_out("LayerDrop", nn.switch, taken, fn, self.module, inputs)


def _structures(module: nn.Module) -> dict[str, Any]:
    return {name: jax.tree.structure(variables) for name, variables in module.variables.items()}


class WeightDrop(Value):
    """Runs a module with named parameters dropped: `dropjax.weight_drop` as a wrapper.

    What is stored stays as it is, and gradients reach it through the masks. One call has one mask for each parameter:
    wrap what runs over time, such as `nn.RNN`, for the same mask at all times.

    Attributes:
      module: the module that is run.
      rate: probability of dropping a weight, in `[0, 1]`.
      names: ends of the parameters' paths in the module, or a function of a path.
      deterministic: if True nothing is dropped; given here or at the call.
      rng_collection: name of the rng stream.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension, or a function of a path to
        that; ignored for axes that are not manual at the call.

    Example:
      >>> layer = WeightDrop(nn.RNN(nn.OptimizedLSTMCell(3)), 0.5, names="h?/kernel", deterministic=False)
      >>> params = layer.init(jax.random.key(0), jnp.ones((1, 5, 2)))
      >>> y = layer.apply(params, jnp.ones((1, 5, 2)), rngs={"dropout": jax.random.key(1)})
    """

    module: nn.Module
    rate: ArrayLike
    _: dataclasses.KW_ONLY
    names: weights.Names
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    sharded_dims: ShardedDims | Callable[[str], ShardedDims | None] | None = None

    @nn.compact
    def __call__(self, *args: Any, deterministic: bool | None = None, rng: Array | None = None, **kwargs: Any) -> Any:
        """Calls the module with dropped parameters.

        Args:
          args: for the module.
          deterministic: if True nothing is dropped; given here or as a field. The module does not get it.
          rng: a key to use instead of one from `make_rng(rng_collection)`. The module does not get it.
          kwargs: for the module.

        Returns:
          What the module returns.
        """
        rate = 0 if self.is_initializing() else self.rate
        key = key_of(self, rate, deterministic, rng)
        if key is None:
            y = self.module(*args, **kwargs)
            if self.is_initializing():
                weights.named_paths(self.module.variables.get("params", {}), self.names)
            return y

        given = self.sharded_dims
        cut = (lambda path: sharding.manual(given(path))) if callable(given) else sharding.manual(given)

        def dropped(collections: Any) -> Any:
            params = weights.weight_drop(key, collections["params"], rate, names=self.names, sharded_dims=cut)
            return {**collections, "params": params}

        run = nn.map_variables(lambda module: module(*args, **kwargs), "params", dropped)
        return run(self.module)


class DropConnect(Layer):
    """`dropjax.drop_connect` as a layer: drops single weights of the kernel that it is given.

    Attributes:
      rate: probability of dropping a weight, in `[0, 1]`.
      broadcast_dims: dimensions of the kernel along which the mask is shared.
      generator: `"mix"` or `"threefry"`.
    """

    rate: ArrayLike
    broadcast_dims: Sequence[int] = ()
    generator: str = "mix"
    _function = staticmethod(weights.drop_connect)


class DropConnectDense(Value):
    """Flax's `Dense` with `dropjax.drop_connect` of its kernel; the bias is not dropped.

    Attributes:
      features: how many features there will be.
      rate: probability of dropping a weight, in `[0, 1]`.
      use_bias: whether a bias is added.
      dtype: of the computation; None for that of inputs and parameters together.
      param_dtype: of the parameters.
      precision: of the product, as in `jax.lax`.
      kernel_init: initializer of the kernel.
      bias_init: initializer of the bias.
      deterministic: if True nothing is dropped; given here or at the call.
      rng_collection: name of the rng stream.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension of the kernel; ignored for axes
        that are not manual at the call.

    Example:
      >>> layer = DropConnectDense(4, 0.5, deterministic=False)
      >>> params = layer.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, jnp.ones((2, 3)))
    """

    features: int
    rate: ArrayLike
    _: dataclasses.KW_ONLY
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    sharded_dims: ShardedDims | None = None

    @nn.compact
    def __call__(self, inputs: Array, deterministic: bool | None = None, rng: Array | None = None) -> Array:
        """Multiplies by the kernel, some weights of which are dropped, and adds the bias.

        Args:
          inputs: float array `[..., in_features]`.
          deterministic: if True nothing is dropped; given here or as a field.
          rng: a key to use instead of one from `make_rng(rng_collection)`.

        Returns:
          Array `[..., features]`.
        """
        kernel = self.param("kernel", self.kernel_init, (jnp.shape(inputs)[-1], self.features), self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        key = key_of(self, self.rate, deterministic, rng)
        if key is not None:
            kernel = weights.drop_connect(key, kernel, self.rate, sharded_dims=sharding.manual(self.sharded_dims))
        inputs, kernel, bias = nn.dtypes.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        y = jnp.matmul(inputs, kernel, precision=self.precision)
        return y if bias is None else y + jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))


class Masksembles(Value):
    """`dropjax.masksembles` as a layer, with fixed masks that are drawn at initialisation.

    They are in the collection `"masksembles"`, beside `"params"`: save both. In training and in evaluation each
    example has one member's mask; `dropjax.masksembles_samples` runs all members.

    Attributes:
      num_masks: how many members.
      scale: in `[1, 100]`: how much masks differ.
      batch_axis: the axis of the examples.
      channel_axis: the axis of the features.

    Example:
      >>> layer = Masksembles(4, 2.0)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((8, 12)))
      >>> layer.apply(variables, jnp.ones((8, 12))).shape
      (8, 12)
    """

    num_masks: int
    scale: float
    _: dataclasses.KW_ONLY
    batch_axis: int = 0
    channel_axis: int = -1
    _ranges = "masksembles_masks"

    @nn.compact
    def __call__(self, inputs: ArrayLike, members: ArrayLike | None = None) -> Array:
        """Applies to each example the mask of its member.

        Args:
          inputs: float array `[batch, ..., features]`.
          members: integers `[batch]`, or one: the mask of each example; None for equal groups.

        Returns:
          Array of the shape and dtype of the inputs.
        """

        def drawn() -> Array:
            features = jnp.shape(inputs)[self.channel_axis]
            return ensembles.masksembles_masks(key_from_stream(self, "params"), features, self.num_masks, self.scale)

        masks = self.variable("masksembles", "masks", drawn).value
        return ensembles.masksembles(
            inputs, masks, members=members, batch_axis=self.batch_axis, channel_axis=self.channel_axis
        )
