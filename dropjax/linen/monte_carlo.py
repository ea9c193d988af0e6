"""Any Linen model, unchanged, with its dropout on and everything else in evaluation."""

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
from jax import Array
from jax.experimental import xla_metadata

from dropjax import _arguments, _checks, _drawing, sharding
from dropjax.functional import elementwise
from dropjax.linen import base, calls, layers, replace, wrappers

_OF_WEIGHTS = (wrappers.DropConnect, wrappers.DropConnectDense, wrappers.LayerDrop, wrappers.WeightDrop)
"""Layers whose examples share what is drawn anyway."""

_SHAREABLE = (base.Bare.__call__, calls.TokenDropout.__call__, layers.EmbeddingDropout.__call__)
"""Calls of layers whose examples may share a mask."""

_calls = itertools.count()


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

    Call the model as for evaluation (`train=False`, `deterministic=True`): then `BatchNorm` uses its running averages,
    and nothing is written, since no collection is mutable. Drawn are `flax.linen.Dropout`, as `dropjax.dropout`;
    the layers of `dropjax.linen`; and the dropout on attention weights where `attention_fn` is Flax's own. A layer
    whose `rng_collection` is not in `rngs` draws from the stream `dropout`.

    Args:
      module: a Linen module.
      variables: its variables.
      key: one JAX key.
      args: the arguments of the call.
      masks: `"per_example"`, or `"shared"`: one mask for all examples along dimension 0 of what each layer is given, so
        that the outputs are those of one function, drawn from the posterior over functions. That dimension must be the
        batch, so not under vmap over it. Standout and the variational dense layers have no masks to share.
      rngs: further streams, for layers that have one of their own.
      method: the method to call, as in `module.apply`.
      kwargs: the keyword arguments of the call.

    Returns:
      What the model returns.

    Raises:
      TypeError, ValueError: if an argument is not as said above, or if no dropout of a rate above 0 was met.

    Example:
      >>> model = nn.Sequential([nn.Dense(4), nn.Dropout(0.5, deterministic=True)])
      >>> x = jnp.ones((2, 3))
      >>> y = mc_apply(model, model.init(jax.random.key(0), x), jax.random.key(1), x)
    """
    if masks not in _drawing.MASKS:
        raise ValueError(f"mc_apply: masks must be one of {_drawing.MASKS}, got {_checks.describe(masks)}.")
    key = _checks.key("mc_apply", key)
    drawn: list[str] = []
    inside: set[int] = set()  # layers whose call is that of their base

    def intercept(next_method: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        of, shared = context.module, masks == "shared"
        if context.method_name == "__call__" and type(of).__call__ is replace.FlaxDropout.__call__:
            return _draw_flax(of, shared, drawn, *args, **kwargs)
        if context.method_name == "__call__" and isinstance(of, (base.Bare, *_OF_WEIGHTS)) and id(of) not in inside:
            return _draw(of, next_method, shared, drawn, inside, args, kwargs)
        if getattr(of, "attention_fn", None) not in (nn.dot_product_attention, replace.attention):
            return next_method(*args, **kwargs)
        own = of.attention_fn
        draws = functools.wraps(nn.dot_product_attention)(functools.partial(_attend, of, shared, drawn))
        object.__setattr__(of, "attention_fn", draws)  # Flax reads its signature
        try:
            return next_method(*args, **kwargs)
        finally:
            object.__setattr__(of, "attention_fn", own)

    streams = {"dropout": key, **(rngs or {})}
    # The metadata enters the key of jit's cache, so that what is jitted in the model is traced anew, in this context.
    with nn.intercept_methods(intercept), xla_metadata.set_xla_metadata(dropjax_monte_carlo=str(next(_calls))):
        result = module.apply(variables, *args, rngs=streams, method=method, **kwargs)
    if not drawn:
        raise ValueError(
            "mc_apply: module must have dropout of a rate above 0 on the way of this call, got none. Dropout that is a "
            "layer of its own kind, or plain code, takes its key as in training: use module.apply."
        )
    return result


def _key(module: Any, collection: str) -> Array:
    return base.key_from_stream(module, collection if module.has_rng(collection) else "dropout")


def _draw(
    layer: Any,
    next_method: Callable[..., Any],
    shared: bool,
    drawn: list[str],
    inside: set[int],
    args: tuple,
    kwargs: dict,
) -> Any:
    """What a layer of dropjax returns, drawn in any case."""
    call = inspect.signature(type(layer).__call__)
    if "deterministic" not in call.parameters:  # a subclass, which calls that of its base or does not draw
        return next_method(*args, **kwargs)
    given = call.bind(layer, *args, **kwargs)
    draws = _drawing.draws(layer)
    given.arguments |= {"deterministic": None, "rng": _key(layer, layer.rng_collection) if draws else None}
    if draws:
        drawn.append(type(layer).__name__)
        if shared and not isinstance(layer, _OF_WEIGHTS) and not _drawing.is_shared(layer, given.arguments["inputs"]):
            if type(layer).__call__ not in _SHAREABLE:
                raise _drawing.unshared("mc_apply", layer)
            return _draw_shared(layer, layer._function, given)
    own = layer.deterministic
    object.__setattr__(layer, "deterministic", not draws)  # a bound module is frozen, as for attention
    inside.add(id(layer))
    try:
        return next_method(*given.args[1:], **given.kwargs)
    finally:
        object.__setattr__(layer, "deterministic", own)
        inside.remove(id(layer))


def _draw_shared(layer: Any, function: Callable[..., Any], given: inspect.BoundArguments) -> Any:
    rate, _ = sharding.fields(function)
    fields = base.options_of(layer)
    draw = functools.partial(_with_rate, function, given.arguments["rng"], getattr(layer, rate), fields)
    return _drawing.of_rows("mc_apply", layer, draw, given.arguments["inputs"], dict(given.kwargs))


def _with_rate(function: Callable[..., Any], key: Array, rate: Any, fields: dict, inputs: Array, **place: Any) -> Any:
    return function(key, inputs, rate, **fields, **place)


def _draw_flax(
    layer: Any,
    shared: bool,
    drawn: list[str],
    inputs: Any,
    deterministic: bool | None = None,
    rng: Array | None = None,
) -> Array:
    """What Flax's dropout returns, drawn in any case, as ours."""
    if _drawing.is_zero(layer.rate):
        return inputs
    drawn.append(type(layer).__name__)
    fields = {"broadcast_dims": layer.broadcast_dims}
    key = _key(layer, layer.rng_collection)
    draw = functools.partial(_with_rate, elementwise.dropout, key, layer.rate, fields)
    return _drawing.of_rows("mc_apply", layer, draw, inputs, {}) if shared else draw(inputs)


def _attend(module: Any, shared: bool, drawn: list[str], *args: Any, **options: Any) -> Array:
    """Flax's attention with dropout on its weights in any case."""
    if _drawing.is_zero(options.get("dropout_rate", 0.0)):
        return nn.dot_product_attention(*args, **options)
    if shared:
        _drawing.batched("mc_apply", type(module).__name__, args[0], 4)
    drawn.append(type(module).__name__)
    key = _key(module, "dropout")
    return replace.attention(*args, **{**options, "deterministic": False, "dropout_rng": key}, share_batch=shared)
