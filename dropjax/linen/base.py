"""What every Linen layer shares: deterministic or not, which key, and the function with the layer's fields."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
from jax import Array
from jax.typing import ArrayLike

from dropjax import sharding
from dropjax.sharding import ShardedDims


class Bare(nn.Module):
    """All framework logic, without fields: Flax's `Dropout` has its own order of them."""

    _function: ClassVar[Callable[..., Array]]

    def __post_init__(self) -> None:
        if hasattr(self, "sharded_dims"):
            object.__setattr__(self, "sharded_dims", sharding.pairs(self.sharded_dims))
        super().__post_init__()

    def __call__(
        self,
        inputs: ArrayLike,
        deterministic: bool | None = None,
        rng: Array | None = None,
        *,
        start: Mapping[int, ArrayLike] | None = None,
        **place: Any,
    ) -> Array:
        """Applies the layer's function to the inputs.

        Args:
          inputs: float array `[...]`.
          deterministic: if True the inputs are returned as they are; given here or as a field.
          rng: a key to use instead of one from `make_rng(rng_collection)`.
          start: `{dim: index}`, where the inputs start in the whole array.
          place: what else says where the inputs lie: `indices` of an embedding.

        Returns:
          Array of the shape and dtype of the inputs.
        """
        rate, options = sharding.fields(self._function)
        fields = {name: getattr(self, name) for name in options}
        return call(
            self, self._function, getattr(self, rate), inputs, deterministic, rng, start=start, **place, **fields
        )


def call(
    layer: Any,
    function: Callable[..., Array],
    rate: ArrayLike,
    inputs: ArrayLike,
    deterministic: bool | None = None,
    rng: Array | None = None,
    **options: Any,
) -> Any:
    """Returns the inputs, or the function of them with a key of the layer's stream."""
    key = key_of(layer, rate, deterministic, rng)
    return inputs if key is None else function(key, inputs, rate, **options)


def key_of(layer: Any, rate: ArrayLike, deterministic: bool | None, rng: Array | None) -> Array | None:
    """A key of the layer's stream, or None where nothing is dropped."""
    deterministic = nn.merge_param("deterministic", layer.deterministic, deterministic)
    if deterministic or (isinstance(rate, int | float) and rate == 0):
        return None
    return layer.make_rng(layer.rng_collection) if rng is None else rng


class Layer(Bare):
    """A layer with the fields that all have, by keyword.

    Attributes:
      deterministic: if True the inputs are returned as they are; given here or at the call.
      rng_collection: name of the rng stream.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.
    """

    _: dataclasses.KW_ONLY
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    sharded_dims: ShardedDims | None = None
