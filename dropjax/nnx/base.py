"""What every NNX layer shares: deterministic or not, which key, and the function with the layer's fields."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from dropjax import sharding
from dropjax.sharding import ShardedDims

FlaxDropout = nnx.Dropout  # Flax's own, also where somebody sets flax.nnx.Dropout to ours


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
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                setattr(self, field.name, tuple(value))
        flax = FlaxDropout(0.5, rng_collection=self.rng_collection, rngs=self.rngs)  # forks, and raises its own error
        self.rngs = nnx.data(flax.rngs)

    def _key(self, inputs: Any, deterministic: bool | None, rngs: Any) -> Array:
        """The key of this call, from what was given at the call or from the layer's own stream."""
        source = self.rngs if rngs is None else rngs
        if deterministic is None or not isinstance(source, nnx.Rngs | nnx.RngStream | Array):
            return FlaxDropout(0.5, deterministic=deterministic)(inputs, rngs=source)  # raises Flax's own error
        if isinstance(source, nnx.Rngs):
            source = source[self.rng_collection]
        return source() if isinstance(source, nnx.RngStream) else source

    def _key_at(self, rate: ArrayLike, inputs: Any, deterministic: bool | None, rngs: Any) -> Array | None:
        """The key of this call, or None where nothing is dropped."""
        deterministic = self.deterministic if deterministic is None else deterministic
        if deterministic or (deterministic is not None and isinstance(rate, int | float) and rate == 0):
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
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.
    """

    _function: ClassVar[Callable[..., Array]]

    _: dataclasses.KW_ONLY
    sharded_dims: ShardedDims | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, sharding.pairs(value) if name == "sharded_dims" else value)

    def __call__(
        self,
        inputs: ArrayLike,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | Array | None = None,
        start: Mapping[int, ArrayLike] | None = None,
        **place: Any,
    ) -> Array:
        """Applies the layer's function to the inputs.

        Args:
          inputs: float array `[...]`.
          deterministic: if True the inputs are returned as they are; overrides the field.
          rngs: a key, `RngStream` or `Rngs` to use instead of the layer's own.
          start: `{dim: index}`, where the inputs start in the whole array. Pieces of one array need one
            key: pass it as `rngs`, since the layer's own stream gives each call a new one.
          place: what else says where the inputs lie: `indices` of an embedding.

        Returns:
          Array of the shape and dtype of the inputs.
        """
        name, options = sharding.fields(self._function)
        rate = getattr(self, name)
        key = self._key_at(rate, inputs, deterministic, rngs)
        if key is None:
            return inputs  # type: ignore[return-value]  # what came in goes out
        fields = {name: getattr(self, name) for name in options}
        return self._function(key, inputs, rate, start=start, **place, **fields)
