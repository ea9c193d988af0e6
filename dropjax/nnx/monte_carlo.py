"""Any NNX model, unchanged, with its dropout on and everything else in evaluation."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
from flax import nnx
from flax.errors import TraceContextError
from flax.nnx import bridge
from jax import Array

from dropjax import _arguments, _checks, _drawing, _flax_attention, _tracing
from dropjax.nnx import stacks, stand_ins
from dropjax.nnx.base import Stochastic
from dropjax.nnx.calls import Standout
from dropjax.nnx.learned import SparseVariationalDense, VariationalDense
from dropjax.nnx.wrappers import DropConnect, LayerDrop, WeightDrop

_Model = TypeVar("_Model", bound=nnx.Module)
_OVERRULED = ("deterministic", "rngs")
_UNSHARED = (Standout, SparseVariationalDense, VariationalDense)
_OF_WEIGHTS = (DropConnect, LayerDrop, WeightDrop)
"""Layers whose examples share what is drawn anyway."""


@_arguments.public
def mc_view(module: _Model, key: Array, *, masks: str = "per_example") -> _Model:
    """Returns a copy of an NNX model with its dropout on and everything else in evaluation.

    Call it inside `fn`. The copy's streams are its own, made of the key, and what it writes it
    writes to itself: the model is not changed. Drawn are `flax.nnx.Dropout`, as `dropjax.dropout`;
    the layers of `dropjax.nnx`; and the dropout on attention weights in modules that call Flax's
    `dot_product_attention` or `dot_product_attention_weights`, as `MultiHeadAttention` does; all of
    them whatever `deterministic` they are called with. There is a warning, once, of a module with a
    dropout rate above 0, or a dropout by its name alone, that the model contains and that does not
    draw, and of one in a Linen model
    inside `bridge.to_nnx` when it is called; `mc_draws` lists what draws.

    Layers that are stacked, for `nnx.scan` or `nnx.vmap`, get a key each where they, or layers of
    Flax beside them, show by their shapes how they are stacked. In a stack of nothing but modules
    of your own, give the dropout a stream.

    Args:
      module: an `nnx.Module`.
      key: one JAX key.
      masks: `"per_example"`, or `"shared"`: one mask for all examples along dimension 0 of what
        each layer is given, so that the outputs are those of one function, drawn from the posterior
        over functions. That dimension must be the batch, so not under vmap over it. Standout and
        the variational dense layers have no masks to share.

    Returns:
      The copy, to be called as for evaluation.

    Raises:
      TypeError, ValueError: if an argument is not as said above, or if the model has no dropout of
      a rate above 0.

    Example:
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, deterministic=True))
      >>> y = mc_view(model, jax.random.key(1))(jnp.ones((2, 3)))
    """
    _checks_of_model("mc_view", module, masks)
    copy, record, count = _view(module, _checks.key("mc_view", key), masks)
    if not count:
        raise _drawing.none_drawn("mc_view", record.missed())
    _drawing.warn("mc_view", _drawing.not_yet_told(_name(type(module)), record.missed()))
    return copy


@_arguments.public
def mc_draws(
    model: nnx.Module, *args: Any, masks: str = "per_example", method: str | None = None, **kwargs: Any
) -> _drawing.Draws:
    """Lists what an `mc_view` of an NNX model draws in a call, without running anything.

    The call is traced, not computed. Listed are all layers that draw, and all modules in the model
    with a dropout rate that do not: layers of a kind of their own, layers with a rate of 0 or that
    the call passes by, attention with an attention function of its own, layers of Linen inside
    `bridge.to_nnx`.

    Args:
      model: an `nnx.Module`.
      args: the arguments of the call, without a key; arrays here and below may be
        `jax.ShapeDtypeStruct`.
      masks: as in `mc_view`.
      method: name of the method to call, by default `__call__`.
      kwargs: the keyword arguments of the call.

    Returns:
      Rows `(path, kind, rate, drawn)`, a tuple that prints as a table.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5))
      >>> mc_draws(model, jnp.ones((2, 3)))
      path      kind     rate  draws
      layers/1  Dropout  0.5   yes
    """
    _checks_of_model("mc_draws", model, masks)
    leaves, structure = jax.tree.flatten((args, kwargs))
    given = {i: leaf for i, leaf in enumerate(leaves) if _checks.is_array(leaf)}
    graph, state = nnx.split(model)
    record = _drawing.Record()

    def trace(state: Any, given: Mapping[int, Array], key: Array) -> None:
        nonlocal record
        copy, record, _ = _view(nnx.merge(graph, state), key, masks, paths=True)
        args, kwargs = jax.tree.unflatten(structure, [given.get(i, leaf) for i, leaf in enumerate(leaves)])
        token = _record.set(record)
        try:
            with _tracing.traced_as(object()):
                getattr(copy, method or "__call__")(*args, **kwargs)
        finally:
            _record.reset(token)

    jax.eval_shape(trace, state, given, jax.eval_shape(jax.random.key, 0))
    return record.draws()


_record: contextvars.ContextVar[_drawing.Record | None] = contextvars.ContextVar("_record", default=None)


def _checks_of_model(function: str, model: Any, masks: str) -> None:
    if masks not in _drawing.MASKS:
        raise ValueError(f"{function}: masks must be one of {_drawing.MASKS}, got {_checks.describe(masks)}.")
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"{function}: module must be an nnx.Module, got {type(model).__name__}. For Linen use dropjax.linen."
        )


def _view(module: _Model, key: Array, masks: str, paths: bool = False) -> tuple[_Model, _drawing.Record, int]:
    """The copy, what of it has a rate and does not draw, and how many modules draw."""
    copy: Any = nnx.clone(module)
    copy.eval()
    record, count, shared = _drawing.Record(), 0, masks == "shared"
    modules: dict[str, Any] = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(copy)}
    stacked = stacks.shapes(modules)
    for path, layer in modules.items():
        kind, flax = stand_ins.own_class(layer), stand_ins.is_flax(layer)
        if issubclass(kind, bridge.ToNNX):
            stand_ins.draw_by(layer, _observe)
            layer.to_nnx__path = path  # the bridge takes no attribute that begins so for a variable
            continue
        if not flax and not isinstance(layer, Stochastic):
            rate = _drawing.named_rate(kind, vars(layer))
            if not stand_ins.attends(layer) or (isinstance(layer, nnx.MultiHeadAttention) and not layer.dropout_rate):
                record.meet(path, kind, rate)
                continue
            layer.dropjax_rngs = _stream("dropout", jax.random.fold_in(key, count), stacked[path])
            stand_ins.attend_by(layer, _attend, masks, evaluate=True)
        else:
            record.meet(path, kind, _drawing.rate_of(layer))
            if not _drawing.draws(layer):
                continue
            if shared and isinstance(layer, _UNSHARED):
                raise _drawing.unshared("mc_view", layer)
            layer.rngs = _stream(layer.rng_collection, jax.random.fold_in(key, count), stacked[path])
            if flax:
                stand_ins.replace(layer, "mix")
            rows = shared and not isinstance(layer, _OF_WEIGHTS)
            stand_ins.draw_by(layer, _draw_shared if rows else _draw)
        if paths:
            layer.dropjax_path = path
        else:
            record.draw(path, kind, None)
        count += 1
    if stand_ins.own_class(copy) is type(copy):  # for attention that a module calls by ways that its code does not show
        copy.dropjax_rngs = _stream("dropout", jax.random.fold_in(key, count), stacked[""])
        copy.dropjax_path = ""
        stand_ins.attend_by(copy, _attend, masks, evaluate=True)
    return copy, record, count


def _stream(collection: str, key: Array, stack: tuple[int, ...]) -> Any:
    """A stream of its own; of layers that are stacked, one key for each."""
    return nnx.data(nnx.RngStream(jax.random.split(key, stack) if stack else key, tag=collection))


def _next(stream: nnx.RngStream) -> Array:
    """The next key of a stream; the first of several where the layer is not stacked after all."""
    if not stream.key.shape:
        return stream()
    key = jax.random.fold_in(stream.key[...].ravel()[0], stream.count[...].ravel()[0])
    stream.count[...] += 1
    return key


def _key(layer: Any) -> Array:
    """The next key of a layer's own stream."""
    try:
        return _next(layer.rngs)
    except TraceContextError as error:
        error.add_note(
            "mc_view: a function that JAX transforms cannot change the stream of a module that it closes over. Pass it "
            "through a transformation of nnx, nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0))(layer, x)."
        )
        raise


def _drawn(layer: Any, rate: Any) -> None:
    if (record := _record.get()) is not None and hasattr(layer, "dropjax_path"):
        record.draw(layer.dropjax_path, stand_ins.own_class(layer), rate)


def _draw(own: Callable[..., Any], layer: Any, *args: Any, **options: Any) -> Any:
    _drawn(layer, _drawing.rate_of(layer))
    place = {name: value for name, value in options.items() if name not in _OVERRULED}
    return own(layer, *args, deterministic=False, rngs=_key(layer), **place)


def _draw_shared(own: Callable[..., Any], layer: Any, inputs: Array, **options: Any) -> Any:
    if _drawing.is_shared(layer, inputs):
        return _draw(own, layer, inputs, **options)
    _drawn(layer, _drawing.rate_of(layer))
    place = {name: value for name, value in options.items() if name not in _OVERRULED}
    draw = functools.partial(own, layer, deterministic=False, rngs=_key(layer))
    return _drawing.of_rows("mc_view", layer, draw, inputs, place)


def _attend(layer: Any, masks: str, given: Mapping[str, Any]) -> _flax_attention.Drop | None:
    rate, shared = given["dropout_rate"], masks == "shared"
    if _drawing.is_zero(rate):
        return None
    if shared:
        _drawing.batched("mc_view", stand_ins.own_class(layer).__name__, given["query"], 4)
    _drawn(layer, rate)
    for module in (layer, *stand_ins.inside_transformation(layer)):
        with contextlib.suppress(TraceContextError):
            return _flax_attention.Drop(_next(module.dropjax_rngs), rate, share_batch=shared)
    if (key := given["dropout_rng"]) is None:
        raise _drawing.no_key("mc_view", stand_ins.own_class(layer), "nnx.jit(lambda module, x: ...)(self, x)")
    return _flax_attention.Drop(key, rate, share_batch=shared)


def _observe(own: Callable[..., Any], layer: Any, *args: Any, **options: Any) -> Any:
    """Calls a model of Linen, whose dropout stays off, and notes it."""
    record = _record.get()
    seen = _drawing.Record() if record is None else record
    kind = type(layer.to_nnx__module)

    def meet(next_method: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        if context.method_name == "__call__":
            inner = context.module
            rate = inner.rate if isinstance(inner, nn.Dropout) else _drawing.named_rate(type(inner), vars(inner))
            seen.meet("/".join((layer.to_nnx__path, *inner.path)), type(inner), rate)
        return next_method(*args, **kwargs)

    with nn.intercept_methods(meet):
        result = own(layer, *args, **options)
    if record is None:
        _drawing.warn("mc_view", _drawing.not_yet_told(_name(kind), seen.missed()))
    return result


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
