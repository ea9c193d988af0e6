"""Any NNX model, unchanged, with its dropout on and everything else in evaluation."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx
from jax import Array

from dropjax import _arguments, _checks, _drawing
from dropjax.nnx.base import FlaxDropout, Stochastic
from dropjax.nnx.calls import Standout
from dropjax.nnx.layers import Dropout
from dropjax.nnx.learned import SparseVariationalDense, VariationalDense
from dropjax.nnx.replace import Attention
from dropjax.nnx.wrappers import DropConnect, LayerDrop, WeightDrop

_Model = TypeVar("_Model", bound=nnx.Module)
_OVERRULED = ("deterministic", "rngs")
_UNSHARED = (Standout, SparseVariationalDense, VariationalDense)
_OF_WEIGHTS = (DropConnect, LayerDrop, WeightDrop)
"""Layers whose examples share what is drawn anyway."""


@_arguments.public
def mc_view(module: _Model, key: Array, *, masks: str = "per_example") -> _Model:
    """Returns a copy of an NNX model with its dropout on and everything else in evaluation.

    Call it inside `fn`. The copy's streams are its own, made of the key, and what it writes it writes to itself: the
    model is not changed. Drawn are `flax.nnx.Dropout`, as `dropjax.dropout`; the layers of `dropjax.nnx`; and the
    dropout on the weights of Flax's `MultiHeadAttention`, all of them whatever `deterministic` they are called with.

    Args:
      module: an `nnx.Module`.
      key: one JAX key.
      masks: `"per_example"`, or `"shared"`: one mask for all examples along dimension 0 of what each layer is given, so
        that the outputs are those of one function, drawn from the posterior over functions. That dimension must be the
        batch, so not under vmap over it. Standout and the variational dense layers have no masks to share.

    Returns:
      The copy, to be called as for evaluation.

    Raises:
      TypeError, ValueError: if an argument is not as said above, or if the model has no dropout of a rate above 0.

    Example:
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, deterministic=True))
      >>> y = mc_view(model, jax.random.key(1))(jnp.ones((2, 3)))
    """
    if masks not in _drawing.MASKS:
        raise ValueError(f"mc_view: masks must be one of {_drawing.MASKS}, got {_checks.describe(masks)}.")
    key = _checks.key("mc_view", key)
    copy = nnx.clone(module)
    copy.eval()
    found, shared = 0, masks == "shared"
    for _, of in nnx.iter_modules(copy):
        attention = isinstance(of, nnx.MultiHeadAttention) and (
            of.attention_fn is nnx.dot_product_attention or isinstance(of.attention_fn, Attention)
        )
        flax = type(of).__call__ is FlaxDropout.__call__
        any_of: Any = of
        if attention:
            if _drawing.is_zero(any_of.dropout_rate):
                continue
        elif not (flax or isinstance(of, Stochastic)) or not _drawing.draws(of):
            continue
        any_of.rngs = _stream(any_of, "dropout" if attention else any_of.rng_collection, jax.random.fold_in(key, found))
        if attention:
            any_of.attention_fn = Attention("mix", share_batch=shared)
            any_of.__class__ = _drawing_class(_attend, type(of))
        else:
            if flax:
                any_of.__class__, any_of.generator, any_of.sharded_dims = Dropout, "mix", None
            if shared and isinstance(of, _UNSHARED):
                raise _drawing.unshared("mc_view", of)
            rows = shared and not isinstance(of, _OF_WEIGHTS)
            any_of.__class__ = _drawing_class(_draw_shared if rows else _draw, type(of))
        found += 1
    if not found:
        raise ValueError(
            "mc_view: module must have dropout of a rate above 0, got none. Dropout that is a layer of its own kind, "
            "or plain code, takes its key as in training."
        )
    return copy


def _stream(module: Any, collection: str, key: Array) -> Any:
    """A stream of its own; of layers that are stacked for a scan, one key for each, as they had."""
    own = module.rngs
    if isinstance(own, nnx.RngStream) and own.key.shape:
        key = jax.random.split(key, own.key.shape)
    return nnx.data(nnx.RngStream(key, tag=collection))


def _draw(own: Callable[..., Any], layer: Any, *args: Any, **options: Any) -> Any:
    place = {name: value for name, value in options.items() if name not in _OVERRULED}
    return own(layer, *args, deterministic=False, rngs=layer.rngs(), **place)


def _draw_shared(own: Callable[..., Any], layer: Any, inputs: Array, **options: Any) -> Any:
    if _drawing.is_shared(layer, inputs):
        return _draw(own, layer, inputs, **options)
    place = {name: value for name, value in options.items() if name not in _OVERRULED}
    draw = functools.partial(own, layer, deterministic=False, rngs=layer.rngs())
    return _drawing.of_rows("mc_view", layer, draw, inputs, place)


def _attend(own: Callable[..., Array], layer: Any, *args: Any, **options: Any) -> Array:
    rest = {name: value for name, value in options.items() if name not in _OVERRULED}
    if layer.attention_fn.share_batch:
        _drawing.batched("mc_view", type(layer).__name__, args[0] if args else options.get("inputs_q"), 3)
    return own(layer, *args, deterministic=False, rngs=layer.rngs, **rest)


@functools.cache
def _drawing_class(call: Callable[..., Array], kind: type) -> type:
    """A class of layers that draw in any case; the layout is that of the layer's own class."""
    own = kind.__call__

    def __call__(self: Any, *args: Any, **options: Any) -> Array:
        return call(own, self, *args, **options)

    return type(kind)(kind.__name__, (kind,), {"__call__": __call__, "__module__": kind.__module__})
