"""Any Linen model, unchanged, with its dropout on and everything else in evaluation."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from jax import Array
from jax.experimental import xla_metadata

from dropjax import _checks, sharding
from dropjax.functional import elementwise
from dropjax.linen import base, replace

_MASKS = ("per_example", "shared")
_calls = itertools.count()


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
      module: a Linen module, not bound.
      variables: its variables.
      key: one JAX key.
      args: the arguments of the call.
      masks: `"per_example"`, or `"shared"`: one mask for all examples along dimension 0 of what each layer is given, so
        that the outputs are those of one function, drawn from the posterior over functions.
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
    if masks not in _MASKS:
        raise ValueError(f"mc_apply: masks must be one of {_MASKS}, got {_checks.describe(masks)}.")
    key = _checks.key("mc_apply", key)
    drawn: list[str] = []

    def intercept(next_method: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        of, shared = context.module, masks == "shared"
        plain = isinstance(of, replace.FlaxDropout) and type(of).__call__ is replace.FlaxDropout.__call__
        if context.method_name == "__call__" and (plain or isinstance(of, base.Bare)):
            return _draw(of, plain, shared, drawn, *args, **kwargs)
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
    return module.make_rng(collection if module.has_rng(collection) else "dropout")


def _is_zero(rate: Any) -> bool:
    return isinstance(rate, int | float) and rate == 0


def _draw(
    layer: Any,
    plain: bool,
    shared: bool,
    drawn: list[str],
    inputs: Any,
    deterministic: bool | None = None,
    rng: Array | None = None,
    **place: Any,
) -> Any:
    """What a layer of dropout returns, drawn in any case."""
    if plain:
        function: Callable[..., Array] = elementwise.dropout
        rate, fields = layer.rate, {"broadcast_dims": layer.broadcast_dims}
    else:
        function = layer._function
        name, options = sharding.fields(function)
        rate, fields = getattr(layer, name), {option: getattr(layer, option) for option in options}
    if _is_zero(rate):
        return inputs
    drawn.append(type(layer).__name__)
    key = _key(layer, layer.rng_collection)
    if not shared:
        return function(key, inputs, rate, **fields, **place)
    indices = place.pop("indices", None)

    def of_one(row: Array, index: Array | None) -> Array:
        place_of_one = place if index is None else {**place, "indices": index[None]}
        return function(key, row[None], rate, **fields, **place_of_one)[0]

    return jax.vmap(of_one, in_axes=(0, None if indices is None else 0))(inputs, indices)


def _attend(module: Any, shared: bool, drawn: list[str], *args: Any, **options: Any) -> Array:
    """Flax's attention with dropout on its weights in any case."""
    if _is_zero(options.get("dropout_rate", 0.0)):
        return nn.dot_product_attention(*args, **options)
    drawn.append(type(module).__name__)
    key = _key(module, "dropout")
    return replace.attention(*args, **{**options, "deterministic": False, "dropout_rng": key}, share_batch=shared)
