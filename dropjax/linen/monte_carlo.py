"""Any Linen model, unchanged, with its dropout on and everything else in evaluation."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.nnx import bridge
from jax import Array
from jax.extend.core import get_opaque_trace_state
from jax.interpreters.partial_eval import DynamicJaxprTracer

from dropjax import _arguments, _checks, _drawing, _flax_attention, sharding
from dropjax.functional import elementwise
from dropjax.linen import base, calls, learned, rates, replace, wrappers

_OF_WEIGHTS = (wrappers.DropConnect, wrappers.DropConnectDense, wrappers.LayerDrop, wrappers.WeightDrop)
"""Layers whose examples share what is drawn anyway."""
_UNSHARED = (calls.Standout, learned.SparseVariationalDense, learned.VariationalDense)


@_arguments.public
def mc_apply(
    module: nn.Module,
    variables: Mapping[str, Any],
    key: Array,
    *args: Any,
    masks: str = "per_example",
    rngs: Mapping[str, Array] | None = None,
    method: Any = None,
    **kwargs: Any,
) -> Any:
    """Applies a Linen model with its dropout on, whatever `deterministic` it was built or is called with.

    Call the model as for evaluation (`train=False`, `deterministic=True`): then `BatchNorm` uses
    its running averages, and nothing is written unless `mutable` says so. Drawn are
    `flax.linen.Dropout`, as `dropjax.dropout`; the layers of `dropjax.linen`; and the dropout on
    attention weights where a module calls Flax's `dot_product_attention` or
    `dot_product_attention_weights`, under whatever name. A layer whose `rng_collection` is not in
    `rngs` draws from the stream `dropout`. There is a warning, once, of a module with a dropout
    rate above 0, or a dropout by its name alone, that is called and does not draw; `mc_draws` lists
    what does.

    Args:
      module: a Linen module.
      variables: its variables.
      key: one JAX key.
      args: the arguments of the call.
      masks: `"per_example"`, or `"shared"`: one mask for all examples along dimension 0 of what
        each layer is given, so that the outputs are those of one function, drawn from the posterior
        over functions. That dimension must be the batch, so not under vmap over it. Standout and
        the variational dense layers have no masks to share.
      rngs: further streams, for layers that have one of their own.
      method: the method to call, as in `module.apply`.
      kwargs: the keyword arguments of the call, and `mutable` and `capture_intermediates` as in
        `module.apply`.

    Returns:
      What the model returns.

    Raises:
      TypeError, ValueError: if an argument is not as said above, if no dropout of a rate above 0 was
      met, or if no key reaches it.

    Example:
      >>> model = nn.Sequential([nn.Dense(4), nn.Dropout(0.5, deterministic=True)])
      >>> x = jnp.ones((2, 3))
      >>> y = mc_apply(model, model.init(jax.random.key(0), x), jax.random.key(1), x)
    """
    _checks_of_masks("mc_apply", masks)
    key = _checks.key("mc_apply", key)
    streams = {"dropout": key, **(rngs or {})}
    apply = functools.partial(module.apply, variables, *args, rngs=streams, **kwargs)
    result, record = _run(apply, masks, ("mc_apply", masks), method)
    model = f"{type(module).__module__}.{type(module).__qualname__}"
    suspects = _drawing.not_yet_told(model, record.missed())
    if suspects or not record.drawn:
        # What a jit inside the model has traced before is not met again: only a new trace sees all.
        record = _traced(apply, masks, method)
        if not record.drawn:
            raise _drawing.none_drawn("mc_apply", record.missed())
        missed = {row.path for row in record.missed()}
        _drawing.warn("mc_apply", [row for row in suspects if row.path in missed])
    return result


@_arguments.public
def mc_draws(
    module: nn.Module,
    variables: Mapping[str, Any],
    *args: Any,
    masks: str = "per_example",
    rngs: Mapping[str, Array] | None = None,
    method: Any = None,
    **kwargs: Any,
) -> _drawing.Draws:
    """Lists what `mc_apply` draws in a call of a Linen model, without running anything.

    The call is traced, not computed. Listed are all layers that draw, and all modules with a
    dropout rate that do not: layers of a kind of their own, layers with a rate of 0, attention with
    an attention function of its own, modules of NNX inside `bridge.to_linen`. Modules of one
    configuration under `nn.jit` are traced, and listed, once.

    Args:
      module: a Linen module.
      variables: its variables; arrays here and in the call may be `jax.ShapeDtypeStruct`.
      args: the arguments of the call, without a key.
      masks: as in `mc_apply`.
      rngs: as in `mc_apply`.
      method: as in `mc_apply`.
      kwargs: as in `mc_apply`.

    Returns:
      Rows `(path, kind, rate, drawn)`, a tuple that prints as a table.

    Raises:
      ValueError: if masks are not as said above.

    Example:
      >>> model = nn.Sequential([nn.Dense(4), nn.Dropout(0.5, deterministic=True)])
      >>> x = jnp.ones((2, 3))
      >>> mc_draws(model, model.init(jax.random.key(0), x), x)
      path      kind     rate  draws
      layers_1  Dropout  0.5   yes
    """
    _checks_of_masks("mc_draws", masks)
    leaves, structure = jax.tree.flatten((variables, args, kwargs))
    given = {i: leaf for i, leaf in enumerate(leaves) if _checks.is_array(leaf)}

    def apply(given: Mapping[int, Array], key: Array, method: Any) -> None:
        filled = [given.get(i, leaf) for i, leaf in enumerate(leaves)]
        variables, args, kwargs = jax.tree.unflatten(structure, filled)
        module.apply(variables, *args, rngs={"dropout": key, **(rngs or {})}, method=method, **kwargs)

    return _traced(apply, masks, method, given, jax.eval_shape(jax.random.key, 0)).draws()


def _checks_of_masks(function: str, masks: str) -> None:
    if masks not in _drawing.MASKS:
        raise ValueError(f"{function}: masks must be one of {_drawing.MASKS}, got {_checks.describe(masks)}.")


def _run(apply: Callable[..., Any], masks: str, way: Any, method: Any) -> tuple[Any, _drawing.Record]:
    run = _Run(masks == "shared")
    with nn.intercept_methods(run.intercept), replace.drawing(run.attend, way):
        return apply(method=run.called(method)), run.record


def _traced(apply: Callable[..., Any], masks: str, method: Any, *args: Any) -> _drawing.Record:
    """What a call draws, looking into everything that is jitted in it."""
    records: list[_drawing.Record] = []

    def trace(*args: Any) -> None:
        records.append(_run(functools.partial(apply, *args), masks, object(), method)[1])

    jax.eval_shape(trace, *args)
    return records[0]


class _Run:
    """One call of a model with its dropout on."""

    def __init__(self, shared: bool) -> None:
        self.shared, self.record = shared, _drawing.Record()
        self.inside: set[int] = set()  # layers whose call is that of their base
        self.callers: list[tuple[nn.Module, Any]] = []  # modules that run now, and traces they run in

    def intercept(self, next_method: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module, called = context.module, context.method_name == "__call__"
        if _flax_attention.linen.get() != self.attend:  # an inner context holds
            return next_method(*args, **kwargs)
        if replace.is_flax_dropout(context):
            with rates.set_on(module):
                return self._drop(module, *args, **kwargs)
        if called and isinstance(module, (base.Bare, *_OF_WEIGHTS)) and id(module) not in self.inside:
            call = inspect.signature(context.orig_method)
            if "deterministic" in call.parameters:  # else a subclass, which calls that of its base or does not draw
                with rates.set_on(module):
                    return self._draw(module, next_method, call.bind(*args, **kwargs))
        if called and id(module) not in self.inside:
            self.record.meet(rates.path(module), type(module), _drawing.named_rate(type(module), vars(module)))
        if isinstance(module, bridge.ToLinen):
            self._meet_nnx(module, args)
        with self._calling(module):
            return next_method(*args, **kwargs)

    def called(self, method: Any) -> Any:
        """What is called in the place of a method, a function or a partial, and may call attention itself."""
        if not callable(method) or isinstance(getattr(method, "__self__", None), nn.Module):
            return method

        @functools.wraps(method)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with self._calling(module):
                return method(module, *args, **kwargs)

        return call

    @contextlib.contextmanager
    def _calling(self, module: nn.Module) -> Iterator[None]:
        self.callers.append((module, _trace_state()))
        try:
            yield
        finally:
            self.callers.pop()

    def attend(self, given: Mapping[str, Any]) -> _flax_attention.Drop | None:
        """Dropout on attention weights in any case, by the module that calls the function."""
        if not self.callers:
            return None
        module, trace = self.callers[-1]
        rate = rates.set_for(module, given["dropout_rate"])
        if _drawing.is_zero(rate):
            return None
        if self.shared:
            _drawing.batched("mc_apply", type(module).__name__, given["query"], 4)
        self.record.draw(rates.path(module), type(module), rate)
        # What JAX has jitted may be used again, with a key that it closes over: there only an argument serves.
        jitted = trace != _trace_state() and isinstance(given["query"] + 0, DynamicJaxprTracer)
        key = given["dropout_rng"] if jitted else _key(module, "dropout")
        if key is None:
            raise _drawing.no_key("mc_apply", type(module), "nn.jit(lambda module, x: ...)(self, x)")
        return _flax_attention.Drop(key, rate, share_batch=self.shared)

    def _drop(self, layer: Any, inputs: Any, deterministic: bool | None = None, rng: Array | None = None) -> Array:
        """What Flax's dropout returns, drawn in any case, as ours."""
        if _drawing.is_zero(layer.rate):
            self.record.meet(rates.path(layer), type(layer), 0.0)
            return inputs
        self.record.draw(rates.path(layer), type(layer), layer.rate)
        key = _key(layer, layer.rng_collection)
        draw = functools.partial(
            _with_rate, elementwise.dropout, key, layer.rate, {"broadcast_dims": layer.broadcast_dims}
        )
        return _drawing.of_rows("mc_apply", layer, draw, inputs, {}) if self.shared else draw(inputs)

    def _draw(self, layer: Any, next_method: Callable[..., Any], given: inspect.BoundArguments) -> Any:
        """What a layer of dropjax returns, drawn in any case."""
        draws = _drawing.draws(layer)
        given.arguments |= {"deterministic": None, "rng": _key(layer, layer.rng_collection) if draws else None}
        rate = _drawing.rate_of(layer)
        (self.record.draw if draws else self.record.meet)(rates.path(layer), type(layer), rate)
        if draws and self.shared and not isinstance(layer, _OF_WEIGHTS):
            if isinstance(layer, _UNSHARED):
                raise _drawing.unshared("mc_apply", layer)
            if not _drawing.is_shared(layer, given.arguments["inputs"]):
                return _draw_shared(layer, given)
        own = layer.deterministic
        object.__setattr__(layer, "deterministic", not draws)  # a bound module is frozen
        self.inside.add(id(layer))
        try:
            return next_method(*given.args, **given.kwargs)
        finally:
            object.__setattr__(layer, "deterministic", own)
            self.inside.remove(id(layer))

    def _meet_nnx(self, module: nn.Module, args: tuple) -> None:
        """Notes the dropout of a model of NNX, which the bridge hands to a method of its own once it has run."""
        for model in args:
            for path, inner in nnx.iter_modules(model) if isinstance(model, nnx.Module) else ():
                names = "/".join(map(str, (*module.path, *path)))
                self.record.meet(names, type(inner), _drawing.named_rate(type(inner), vars(inner)))


def _trace_state() -> Any:
    return get_opaque_trace_state(convention="flax")


def _key(module: Any, collection: str) -> Array:
    collection = collection if module.has_rng(collection) else "dropout"
    if not module.has_rng(collection) and not module.has_rng("params"):  # which Flax takes then
        raise ValueError(
            f"mc_apply: {rates.path(module) or type(module).__name__} must get the stream 'dropout', got none. Name it "
            "in nn.scan or nn.vmap, split_rngs={'params': True, 'dropout': True}; hand it to an apply of its own, "
            "rngs={'dropout': self.make_rng('dropout')}."
        )
    return base.key_from_stream(module, collection)


def _draw_shared(layer: Any, given: inspect.BoundArguments) -> Any:
    rate = getattr(layer, sharding.fields(layer._function)[0])
    draw = functools.partial(_with_rate, layer._function, given.arguments["rng"], rate, base.options_of(layer))
    place = {name: value for name, value in given.kwargs.items() if value is not None}
    return _drawing.of_rows("mc_apply", layer, draw, given.arguments["inputs"], place)


def _with_rate(function: Callable[..., Any], key: Array, rate: Any, fields: dict, inputs: Array, **place: Any) -> Any:
    return function(key, inputs, rate, **fields, **place)
