"""Any NNX model, unchanged, with its dropout on and everything else in evaluation."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx
from jax import Array

from dropjax import _checks, sharding
from dropjax.nnx.base import FlaxDropout, Layer
from dropjax.nnx.layers import Dropout
from dropjax.nnx.replace import Attention

_Model = TypeVar("_Model", bound=nnx.Module)
_MASKS = ("per_example", "shared")
_OVERRULED = ("deterministic", "rngs")


def mc_view(module: _Model, key: Array, *, masks: str = "per_example") -> _Model:
    """Returns a copy of an NNX model with its dropout on and everything else in evaluation.

    Call it inside `fn`. The copy's streams are its own, made of the key, and what it writes it writes to itself: the
    model is not changed. Drawn are `flax.nnx.Dropout`, as `dropjax.dropout`; the layers of `dropjax.nnx`; and the
    dropout on the weights of Flax's `MultiHeadAttention`, all of them whatever `deterministic` they are called with.

    Args:
      module: an `nnx.Module`.
      key: one JAX key.
      masks: `"per_example"`, or `"shared"`: one mask for all examples along dimension 0 of what each layer is given, so
        that the outputs are those of one function, drawn from the posterior over functions.

    Returns:
      The copy, to be called as for evaluation.

    Raises:
      TypeError, ValueError: if an argument is not as said above, or if the model has no dropout of a rate above 0.

    Example:
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, deterministic=True))
      >>> y = mc_view(model, jax.random.key(1))(jnp.ones((2, 3)))
    """
    if masks not in _MASKS:
        raise ValueError(f"mc_view: masks must be one of {_MASKS}, got {_checks.describe(masks)}.")
    key = _checks.key("mc_view", key)
    copy = nnx.clone(module)
    copy.eval()
    found = 0
    for _, of in nnx.iter_modules(copy):
        attention = isinstance(of, nnx.MultiHeadAttention) and (
            of.attention_fn is nnx.dot_product_attention or isinstance(of.attention_fn, Attention)
        )
        layer = type(of) is FlaxDropout or isinstance(of, Layer)
        any_of: Any = of
        if not (attention or layer) or _is_zero(any_of.dropout_rate if attention else _rate(any_of)):
            continue
        any_of.rngs = _stream(any_of, "dropout" if attention else any_of.rng_collection, jax.random.fold_in(key, found))
        if attention:
            any_of.attention_fn = Attention("mix", share_batch=masks == "shared")
            any_of.__class__ = _drawing(_attend, type(of))
        else:
            if type(of) is FlaxDropout:
                any_of.__class__, any_of.generator, any_of.sharded_dims = Dropout, "mix", None
            any_of.__class__ = _drawing(_draw_shared if masks == "shared" else _draw, type(of))
        found += 1
    if not found:
        raise ValueError(
            "mc_view: module must have dropout of a rate above 0, got none. Dropout that is a layer of its own kind, "
            "or plain code, takes its key as in training."
        )
    return copy


def _rate(layer: Any) -> Any:
    return layer.rate if type(layer) is FlaxDropout else getattr(layer, sharding.fields(layer._function)[0])


def _is_zero(rate: Any) -> bool:
    return isinstance(rate, int | float) and rate == 0


def _stream(module: Any, collection: str, key: Array) -> Any:
    """A stream of its own; of layers that are stacked for a scan, one key for each, as they had."""
    own = module.rngs
    if isinstance(own, nnx.RngStream) and own.key.shape:
        key = jax.random.split(key, own.key.shape)
    return nnx.data(nnx.RngStream(key, tag=collection))


def _draw(own: Callable[..., Array], layer: Any, inputs: Array, **options: Any) -> Array:
    place = {name: value for name, value in options.items() if name not in _OVERRULED}
    return own(layer, inputs, deterministic=False, rngs=layer.rngs(), **place)


def _draw_shared(own: Callable[..., Array], layer: Any, inputs: Array, **options: Any) -> Array:
    place = {name: value for name, value in options.items() if name not in _OVERRULED}
    key, indices = layer.rngs(), place.pop("indices", None)

    def of_one(row: Array, index: Array | None) -> Array:
        place_of_one = place if index is None else {**place, "indices": index[None]}
        return own(layer, row[None], deterministic=False, rngs=key, **place_of_one)[0]

    return jax.vmap(of_one, in_axes=(0, None if indices is None else 0))(inputs, indices)


def _attend(own: Callable[..., Array], layer: Any, *args: Any, **options: Any) -> Array:
    rest = {name: value for name, value in options.items() if name not in _OVERRULED}
    return own(layer, *args, deterministic=False, rngs=layer.rngs, **rest)


@functools.cache
def _drawing(call: Callable[..., Array], kind: type) -> type:
    """A class of layers that draw in any case; the layout is that of the layer's own class."""
    own = kind.__call__

    def __call__(self: Any, *args: Any, **options: Any) -> Array:
        return call(own, self, *args, **options)

    return type(kind)(kind.__name__, (kind,), {"__call__": __call__, "__module__": kind.__module__})
