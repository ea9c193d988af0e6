"""What every Linen layer shares: deterministic or not, which key, and the function with the layer's fields."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from dropjax import _layers, sharding
from dropjax.linen.values import Value
from dropjax.sharding import ShardedDims


class Bare(Value):
    """All framework logic, without fields: Flax's `Dropout` has its own order of them."""

    _function: ClassVar[Callable[..., Array]]

    def __call__(
        self,
        inputs: ArrayLike,
        deterministic: bool | None = None,
        rng: Array | None = None,
        *,
        start: Mapping[int, ArrayLike] | None = None,
    ) -> Array:
        """Applies the layer's function to the inputs.

        Args:
          inputs: float array `[...]`.
          deterministic: if True the inputs are returned as they are; given here or as a field.
          rng: a key to use instead of one from `make_rng(rng_collection)`.
          start: `{dim: index}`, where the inputs start in the whole array.

        Returns:
          Array of the shape and dtype of the inputs.
        """
        return call(self, inputs, deterministic, rng, start=start)


def call(layer: Any, inputs: Any, deterministic: bool | None, rng: Array | None, **place: Any) -> Any:
    """Returns the inputs, or what the layer's function makes of them with its fields, at their place."""
    rate = getattr(layer, sharding.fields(layer._function)[0])
    key = key_of(layer, rate, deterministic, rng)
    if key is None:
        _layers.unmoved(layer, place["start"], inputs)
        return inputs
    return layer._function(key, inputs, rate, **options_of(layer), **place)


def options_of(layer: Any) -> dict[str, Any]:
    """The fields that are options of the layer's function, as they hold at this call."""
    fields = {name: getattr(layer, name) for name in sharding.fields(layer._function)[1]}
    return {**fields, "sharded_dims": sharding.manual(layer.sharded_dims)}


def key_of(
    layer: Any, rate: ArrayLike, deterministic: bool | None, rng: Array | None, generator: str | None = None
) -> Array | None:
    """A key of the layer's stream, or None where nothing is dropped."""
    deterministic = nn.merge_param("deterministic", layer.deterministic, deterministic)
    if deterministic or (isinstance(rate, int | float | np.generic) and rate == 0):
        return None
    return key_from_stream(layer, layer.rng_collection, generator) if rng is None else rng


def key_from_stream(module: nn.Module, collection: str, generator: str | None = None) -> Array:
    """The next key of a module's stream, which no module of another path has.

    Flax's `make_rng` hashes the names of a path without a separator: `ab/cdef` and `abc/def` would share a key. The
    generator `"threefry"`, by default that of the module's field, keeps it.
    """
    key = module.make_rng(collection)
    return key if (generator or getattr(module, "generator", "mix")) == "threefry" else key_of_path(module, key)


def key_of_path(module: nn.Module, key: Array) -> Array:
    """Folds the first 32 bits of the SHA-256 of the module's path, the JSON list of its names, into a key.

    Under `nn.jit` the path begins inside the jitted module: modules of one configuration share its trace, whatever
    their paths are, and each has a key of its own.
    """
    scope: Any = module.scope
    names = scope.path
    transforms = [mark[: mark.rfind(name)] for name, mark in zip(names[::-1], scope.debug_path[::-1], strict=False)]
    inside = next((i for i, of_name in enumerate(transforms) if "jit(" in of_name), len(names))
    return _fold_in(key, _word(names[len(names) - inside :]))


@functools.lru_cache(4096)
def _word(path: tuple[str, ...]) -> np.uint32:
    return np.uint32(int.from_bytes(hashlib.sha256(json.dumps(path).encode()).digest()[:4], "little"))


_fold_in = jax.jit(jax.random.fold_in)


class Layer(Bare):
    """A layer with the fields that all have, by keyword.

    Attributes:
      deterministic: if True the inputs are returned as they are; given here or at the call.
      rng_collection: name of the rng stream.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension; ignored for axes that are not
        manual at the call.
    """

    _: dataclasses.KW_ONLY
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    sharded_dims: ShardedDims | None = None
