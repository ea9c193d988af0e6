"""One training step: a state in its parts, the loss and its gradient, and what an optimizer asks for."""

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from dropjax import _checkpoints, _checks


class Parts(NamedTuple):
    """A state in its parts: what is trained, and what is carried along."""

    trained: Any
    carried: Any
    merge: Callable[[Any, Any], Any]  # (trained, carried) -> state
    carry: Callable[[Any, Any], Any]  # (state after the call, changed collections) -> carried


def checked_parts(state: Any) -> Parts:
    """Checks what is trained, and takes the state apart."""
    if isinstance(state, type):
        raise TypeError(
            f"fit: state must be what is trained, got the class {state.__name__}. Build the model: an "
            "nnx.Module is a state; of a Linen module, what init returns."
        )
    if not isinstance(state, nnx.Module) and any(map(_is_nnx, jax.tree.leaves(state, is_leaf=_is_nnx))):
        raise TypeError(
            f"fit: state must be one nnx.Module, or hold none, got {_checks.describe(state)}. Put several into "
            "nnx.Dict or nnx.List, which are modules."
        )
    parts = _parts(state)
    if not jax.tree.leaves(parts.trained):
        raise ValueError(f"fit: state must have something to train, got {_checks.describe(state)}.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(parts.trained):
        if not _checks.is_array(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"fit: state must have float arrays to train, got {_checks.describe(leaf)} at "
                f"state{jax.tree_util.keystr(path)}. Convert numbers with jnp.asarray. For a Linen "
                "module pass its variables, model.init(...); what is not trained goes beside 'params'."
            )
    for leaf in jax.tree.leaves((parts.trained, parts.carried)):
        _checks.of_all_processes("fit", "state", leaf, "jax.jit(lambda state: state, out_shardings=sharding)(state)")
    return parts


def _parts(state: Any) -> Parts:
    if isinstance(state, nnx.Module):
        nnx.pop(state := nnx.clone(state), nnx.Intermediate)
        graph, trained, carried = nnx.split(state, nnx.Param, nnx.Not(nnx.Param))  # type: ignore[misc]  # its stub
        return Parts(
            trained,
            carried,
            lambda trained, carried: nnx.merge(graph, trained, carried, copy=True),
            lambda model, changed: (
                _replaced({}, changed) or nnx.state(model, nnx.Not(nnx.Any(nnx.Param, nnx.Intermediate)))
            ),
        )
    if isinstance(state, Mapping) and "params" in state:
        carried = {name: value for name, value in state.items() if name != "params"}
        return Parts(
            state["params"],
            carried,
            lambda trained, carried: type(state)({"params": trained, **carried}),  # type: ignore[call-arg]  # dict-like
            lambda variables, changed: _replaced({k: v for k, v in variables.items() if k != "params"}, changed),
        )
    return Parts(state, {}, lambda trained, carried: trained, lambda state, changed: _replaced({}, changed))


def _replaced(carried: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(changed, Mapping) or not changed.keys() <= carried.keys():
        raise ValueError(
            "fit: loss_fn must return the loss, or the loss and a mapping of changes to the collections "
            f"of the state beside 'params', which are {sorted(carried)}, got {_checks.describe(changed)}. "
            "Metrics go to evaluate."
        )
    return {**carried, **changed}


def jitted(loss_fn: Callable[..., Any], optimizer: optax.GradientTransformation, parts: Parts) -> Callable[..., Any]:
    def loss_of(trained: Any, carried: Any, batch: Any, key: Array) -> tuple[Array, Any]:
        state = parts.merge(trained, carried)
        result = loss_fn(state, batch, key)
        loss, changed = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        if not _checks.is_array(loss) or loss.shape != () or not jnp.issubdtype(loss.dtype, jnp.floating):
            raise TypeError(f"fit: loss_fn must return a float scalar, got {_checks.describe(loss)}.")
        after = parts.carry(state, changed)
        if _checkpoints.leaves(after) != _checkpoints.leaves(carried):
            wrong = next(
                (a, b)
                for a, b in itertools.zip_longest(_checkpoints.leaves(carried), _checkpoints.leaves(after))
                if a != b
            )
            raise ValueError(
                "fit: loss_fn must keep names, shapes and dtypes of the state that is carried along, got "
                f"{wrong[1]} for {wrong[0]}. Give the state all that the loss fills in."
            )
        return loss, after

    takes = inspect.signature(optimizer.update).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained: Any, optimizer_state: Any, carried: Any, batch: Any, key: Array) -> tuple[_checkpoints.Run, Any]:
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, after), gradients = gradient(trained, carried, batch, key)

        def value_fn(tried: Any, obj_fn: Any = None) -> Array:
            # A line search refuses obj_fn, Sophia's name of it, unless its function takes it; and
            # transposes that function as one to the default float dtype.
            tried, again = _completed(tried, trained), jax.random.clone(key)
            return loss_of(tried, carried, batch, again)[0].astype(float)

        value = loss.astype(float)
        extra = {"value": value, "grad": gradients, "value_fn": value_fn, "obj_fn": value_fn}
        extra = {name: extra[name] for name in extra if takes_all or name in takes}
        with promoting(), _blamed_on_optax():
            updates, state_after = optimizer.update(gradients, optimizer_state, trained, **extra)
            updated = optax.apply_updates(trained, updates)
        # The dtypes that it began with: others would be compiled again, and found in no checkpoint.
        state_after = jax.tree.map(_as_before, state_after, optimizer_state)
        healthy = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updated)]).all()
        return _checkpoints.Run(updated, state_after, after), (loss, healthy)

    return step


def _as_before(new: Any, old: Any) -> Array:
    return jnp.asarray(new, old.dtype)


def _completed(tried: Any, trained: Any) -> Any:
    """Parameters that an optimizer tries, in the dtypes trained; those masked from it stay as they are."""

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def complete(new: Any, old: Any) -> Any:
        return old if is_masked(new) else _as_before(new, old)

    return jax.tree.map(complete, tried, trained, is_leaf=is_masked)


def check_optimizer(optimizer: Any) -> None:
    methods = [getattr(optimizer, name, None) for name in ("init", "update")]
    if isinstance(optimizer, type) or not all(map(callable, methods)):
        name, kind = getattr(optimizer, "__name__", None), type(optimizer).__name__
        raise TypeError(
            "fit: optimizer must be an optax transformation, got "
            f"{f'{name} ({kind})' if name else _checks.describe(optimizer)}. Build one, as "
            "optax.adam(1e-3); put several into optax.chain; of an nnx.Optimizer pass its tx."
        )


@contextlib.contextmanager
def promoting() -> Iterator[None]:
    """The code of optax mixes dtypes and ranks, also where the user's own code must not."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@contextlib.contextmanager
def _blamed_on_optax() -> Iterator[None]:
    """Where wrappers of optax keep from an optimizer what it asks for."""
    try:
        yield
    except (TypeError, ValueError) as error:
        error.add_note(
            "fit: the optimizer failed, not the loss. In optax.partition and optax.masked a line search "
            "needs mask_compatible_extra_args=True; optax.MultiSteps goes around optax.chain."
        )
        raise


def _is_nnx(node: Any) -> bool:
    return isinstance(node, nnx.Module | nnx.Variable | nnx.State)
