"""What every NNX layer shares: deterministic or not, which key, and the function with the layer's fields."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.errors import TraceContextError
from jax import Array
from jax.typing import ArrayLike

from dropjax import _layers, sharding
from dropjax.sharding import ShardedDims

FlaxDropout = nnx.Dropout  # Flax's own, also where somebody sets flax.nnx.Dropout to ours
Source = nnx.Rngs | nnx.RngStream | Array | None


class Rate(nnx.Variable):
    """A rate in an array, and any other array that a layer is built with: state that is saved and not trained.

    A layer makes one of an array that it is built with or that is assigned to its field: `layer.rate` is then a
    variable like `layer.kernel`, and `layer.rate[...]` its array of float32. What is assigned later changes it in place
    and is broadcast to its shape if possible, so that a stack of layers keeps a rate for each. A number is a static
    attribute of the layer, and no state.

    Example:
      >>> from dropjax.nnx import Dropout
      >>> layer = Dropout(jnp.float32(0.5))
      >>> layer.rate = 0.25
      >>> layer.rate[...], nnx.state(Dropout(0.5), Rate)
      (Array(0.25, dtype=float32), State({}))
    """


class _Signature:
    """The signature of a class, which the metaclass of NNX hides; instances keep that of `__call__`."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        if instance is not None:
            raise AttributeError("__signature__")
        signature = inspect.signature(owner.__init__)  # type: ignore[misc]  # the class's own, by intent
        return signature.replace(parameters=list(signature.parameters.values())[1:])


@nnx.dataclass(eq=False)
class Stochastic(nnx.Module):
    """Deterministic or not, and which key: the fields that everything has that draws, by keyword.

    Args:
      deterministic: if True the inputs are returned as they are; `model.train()` and `model.eval()` set it.
      rng_collection: name of the rng stream.
      rngs: the streams to fork the layer's own from; without them each call needs `rngs=`.
    """

    __signature__ = _Signature()

    _: dataclasses.KW_ONLY
    deterministic: bool | None = False
    rng_collection: str = "dropout"
    rngs: nnx.Rngs | nnx.RngStream | None = None

    def __post_init__(self) -> None:
        flax = FlaxDropout(0.5, rng_collection=self.rng_collection, rngs=self.rngs)  # forks, and raises its own error
        self.rngs = nnx.data(flax.rngs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "rngs" and isinstance(value, Mapping | Sequence):
            FlaxDropout(0.5, rngs=value)  # type: ignore[arg-type]  # raises Flax's own error
        kind = _layers.declared(type(self)).get(name)
        if kind is not None and not isinstance(value, nnx.Variable | dataclasses.Field):  # a field: of nnx.data
            _layers.check(self, name, value)
            if kind == ArrayLike:
                value = self._number_or_rate(name, value)
            elif name == "sharded_dims":
                value = sharding.pairs(value)
            elif isinstance(value, list):
                value = tuple(value)
        super().__setattr__(name, nnx.data(value) if isinstance(value, nnx.Variable) else value)

    def _number_or_rate(self, name: str, value: Any) -> Any:
        """What a field keeps: a number as it is, an array as a variable."""
        own = vars(self).get(name)
        if isinstance(own, Rate):
            own.set_value(_array(value, own.get_value().shape))
            return own
        if isinstance(own, Array) or not isinstance(value, int | float | np.generic):
            stream = vars(self).get("rngs")
            stack = stream.key.shape if isinstance(stream, nnx.RngStream) else ()
            return Rate(_array(value, stack))
        return value

    def _field(self, name: str) -> Any:
        """A field as a function takes it."""
        value = getattr(self, name)
        if name == "sharded_dims":
            return (lambda path: sharding.manual(value(path))) if callable(value) else sharding.manual(value)
        return value.get_value() if isinstance(value, nnx.Variable) else value

    def _key(self, inputs: Any, deterministic: bool | None, rngs: Any) -> Array:
        """The key of this call, from what was given at the call or from the layer's own stream."""
        source = self.rngs if rngs is None else rngs
        if deterministic is None or not isinstance(source, nnx.Rngs | nnx.RngStream | Array):
            return FlaxDropout(0.5, deterministic=deterministic)(inputs, rngs=source)  # raises Flax's own error
        if isinstance(source, nnx.Rngs):
            source = source[self.rng_collection]
        if not isinstance(source, nnx.RngStream):
            return source
        try:
            return source()
        except TraceContextError as error:
            error.add_note(
                f"{type(self).__name__}: a function that JAX transforms cannot change the stream of a model that it "
                "closes over. Give the key at the call, rngs=key, or pass the model through a transformation of nnx."
            )
            raise

    def _key_at(self, rate: ArrayLike, inputs: Any, deterministic: bool | None, rngs: Any) -> Array | None:
        """The key of this call, or None where nothing is dropped."""
        deterministic = self.deterministic if deterministic is None else deterministic
        if deterministic or (deterministic is not None and isinstance(rate, int | float | np.generic) and rate == 0):
            return None
        return self._key(inputs, deterministic, rngs)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Class method used by `nnx.view`.

        Args:
          deterministic: if True, disables dropout.
        """
        if deterministic is not None:
            self.deterministic = deterministic


@nnx.dataclass(eq=False)
class Layer(Stochastic):
    """A layer that calls its function, and the fields that all layers have, by keyword.

    Args:
      deterministic: if True the inputs are returned as they are; `model.train()` and `model.eval()` set it.
      rng_collection: name of the rng stream.
      rngs: the streams to fork the layer's own from; without them each call needs `rngs=`.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension; ignored for
        axes that are not manual at the call.
    """

    _function: ClassVar[Callable[..., Array]]

    _: dataclasses.KW_ONLY
    sharded_dims: ShardedDims | None = None

    def __call__(
        self,
        inputs: ArrayLike,
        *,
        deterministic: bool | None = None,
        rngs: Source = None,
        start: Mapping[int, ArrayLike] | None = None,
    ) -> Array:
        """Applies the layer's function to the inputs.

        Args:
          inputs: float array `[...]`.
          deterministic: if True the inputs are returned as they are; overrides the field.
          rngs: a key, `RngStream` or `Rngs` to use instead of the layer's own.
          start: `{dim: index}`, where the inputs start in the whole array. Pieces of one array need one
            key: pass it as `rngs`, since the layer's own stream gives each call a new one.

        Returns:
          Array of the shape and dtype of the inputs.
        """
        return self._apply(inputs, deterministic, rngs, start=start)

    def _apply(self, inputs: ArrayLike, deterministic: bool | None, rngs: Source, **place: Any) -> Array:
        """The inputs, or the function of them with a key and the layer's fields."""
        name, options = sharding.fields(self._function)
        rate = self._field(name)
        key = self._key_at(rate, inputs, deterministic, rngs)
        if key is None:
            _layers.unmoved(self, place["start"], inputs)
            return inputs  # type: ignore[return-value]  # what came in goes out
        return self._function(key, inputs, rate, **place, **{name: self._field(name) for name in options})


def _array(value: Any, shape: tuple[int, ...]) -> Array:
    """The value as an array of float32, of the shape if it broadcasts to it.

    It is a copy, so that a model whose layers were given one array can be donated.
    """
    if isinstance(value, jax.ShapeDtypeStruct):
        return value  # type: ignore[return-value]  # it stands for one
    value = jnp.array(value, jnp.float32)
    try:
        return jnp.broadcast_to(value, shape)
    except ValueError:
        return value
