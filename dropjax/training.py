"""A small training loop: one jitted step, progress, checkpoints and exact resume.

Nothing random needs saving: the key of a step is a function of (seed, step).
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from dropjax import _checkpoints, _checks

_DOMAIN = 0x74726169  # "trai": the keys of steps are no keys that a user folds out of the same seed


class Fit(NamedTuple):
    """What training returns: the trained state, and all that was recorded on the way."""

    state: Any
    """The trained state, of the kind that was given."""
    optimizer_state: Any
    """The state of the optax optimizer."""
    losses: np.ndarray
    """The loss of every step, float32 `[steps]`, also of the steps before a restart."""
    history: list[tuple[int, dict[str, float]]]
    """What `evaluate` returned, with the number of steps done, also from before a restart."""


def fit(
    loss_fn: Callable[[Any, Any, Array], Any],
    state: Any,
    optimizer: optax.GradientTransformation,
    data: Callable[[int], Any],
    *,
    seed: int,
    steps: int,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    evaluate_every: int = 100,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 1000,
    progress: bool | None = None,
) -> Fit:
    """Trains a state: the key of a step is a function of (seed, step), and its batch is `data(step)`.

    The same arguments give the same parameters, also when a run is killed at any moment and started
    again with the same `checkpoint_dir`: it continues from its last good checkpoint. A folder is for one
    run: another seed, or other shapes of state or optimizer, are errors, but another `loss_fn`, `data`
    or learning rate is not noticed.

    Args:
      loss_fn: `loss_fn(state, batch, key)` returns the loss, a float scalar; or a pair of the loss and
        the collections that changed, as Linen's `apply(..., mutable=[...])` returns them. It is traced
        once, under `jax.jit`.
      state: what is trained. A pytree of float arrays; or a mapping with `"params"`, which alone are
        trained, and other collections (Linen's variables); or an `nnx.Module`, whose `nnx.Param` are
        trained and whose other state (batch statistics, rng streams) is carried from step to step. An
        NNX model's own streams do not depend on `seed`: to draw with `key`, pass
        `rngs=nnx.Rngs(dropout=key)` through its call. The state given is not modified.
      optimizer: an optax transformation.
      data: the batch of a step, any pytree of arrays; it must depend on the step alone. Of several
        processes, each returns the same global arrays, and state lies on the devices of all.
      seed: seed of all keys.
      steps: how many steps to have done at the end.
      evaluate: called with the state after every `evaluate_every` steps and at the end; returns named
        numbers, which appear in `history` and in the progress bar. An NNX model comes in training
        mode; call its `eval()` first.
      evaluate_every: number of steps from one evaluation to the next.
      checkpoint_dir: where checkpoints are written and looked for; None for none. Needs
        `dropjax[train]`. A checkpoint is verified when it is read; a broken one is passed over.
      checkpoint_every: number of steps from one checkpoint to the next; one is also written at the end.
      progress: whether to show a progress bar, which needs `dropjax[train]`; None shows one if it can.
        Of several processes, the first shows it.

    Returns:
      `Fit`.

    Raises:
      FloatingPointError: if the loss or the updated state of a step is not finite; nothing is saved after it.
      TypeError, ValueError: if an argument is not as said above, or the checkpoints are of another run.

    Example:
      >>> import optax
      >>> loss = lambda w, x, key: jnp.mean((x * w - 2 * x) ** 2)
      >>> fit(loss, jnp.zeros(()), optax.sgd(0.5), lambda step: jnp.ones(4), seed=0, steps=50, progress=False).state
      Array(2., dtype=float32)
    """
    seed, steps = _checks.integer("fit", "seed", seed, 0), _checks.integer("fit", "steps", steps, 0)
    if seed >= 2**32:
        raise ValueError(f"fit: seed must be below 2^32, got {seed}.")
    evaluate_every = _checks.integer("fit", "evaluate_every", evaluate_every, 1)
    checkpoint_every = _checks.integer("fit", "checkpoint_every", checkpoint_every, 1)
    parts = _checked_parts(loss_fn, state, optimizer, data)
    step_fn = _step(loss_fn, optimizer, parts)
    trained = _copied(parts.trained)
    run = _checkpoints.Run(trained, _copied(optimizer.init(trained)), parts.carried)
    first, losses = 0, np.zeros(0, np.float32)
    history: list[tuple[int, dict[str, float]]] = []
    checkpoints = None if checkpoint_dir is None else _checkpoints.Checkpoints(Path(checkpoint_dir).expanduser(), seed)
    if checkpoints and (found := checkpoints.restore(run)):
        first, run, losses, history = found
        if first > steps:
            raise ValueError(f"fit: steps must be at least {first}, as in checkpoint_dir, got {steps}.")
    losses = np.concatenate([losses, np.zeros(steps - first, np.float32)])
    root = jax.random.fold_in(jax.random.key(seed), _DOMAIN)
    ahead: Any = None  # loss and health of the step before, not waited for

    with _bar(first, steps, progress) as bar, _checks.together("fit"):
        for step in range(first, steps):
            batch = jax.tree.map(_owned, data(step))
            run, outcome = step_fn(*run, batch, jax.random.fold_in(root, step))
            done = step + 1
            if ahead is not None:
                losses[step - 1] = _finite(ahead, step - 1)
            ahead = outcome
            evaluates = evaluate is not None and (done % evaluate_every == 0 or done == steps)
            saves = checkpoints is not None and (done % checkpoint_every == 0 or done == steps)
            if evaluates or saves or done == steps:
                losses[step], ahead = _finite(outcome, step), None
            if evaluate is not None and evaluates:
                measured = evaluate(parts.merge(_copied(run.trained), run.carried))
                if not isinstance(measured, Mapping):
                    raise TypeError(f"fit: evaluate must return named numbers, got {_checks.describe(measured)}.")
                history.append((done, {str(name): float(value) for name, value in measured.items()}))
                bar.set_postfix(history[-1][1], refresh=False)
            if checkpoints is not None and saves:
                checkpoints.save(done, run, losses[:done], history)
            bar.update()
    return Fit(parts.merge(run.trained, run.carried), run.optimizer_state, losses, history)


class _Parts(NamedTuple):
    """A state in its parts: what is trained, and what is carried along."""

    trained: Any
    carried: Any
    merge: Callable[[Any, Any], Any]  # (trained, carried) -> state
    carry: Callable[[Any, Any], Any]  # (state after the call, changed collections) -> carried


def _checked_parts(loss_fn: Any, state: Any, optimizer: Any, data: Any) -> _Parts:
    """Checks what is trained and with what, and takes the state apart."""
    if not callable(loss_fn):
        raise TypeError(f"fit: loss_fn must be a function, got {_checks.describe(loss_fn)}.")
    if not callable(data):
        raise TypeError(
            f"fit: data must be a function of the step, got {_checks.describe(data)}. "
            "For arrays: lambda step: (x[rows(step)], y[rows(step)])."
        )
    if not hasattr(optimizer, "init") or not hasattr(optimizer, "update"):
        raise TypeError(f"fit: optimizer must be an optax transformation, got {_checks.describe(optimizer)}.")
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
                f"state{jax.tree_util.keystr(path)}. For a Linen module pass its variables, model.init(...); what "
                "is not trained goes beside 'params'."
            )
    for leaf in jax.tree.leaves((parts.trained, parts.carried)):
        _checks.of_all_processes("fit", "state", leaf, "jax.jit(lambda state: state, out_shardings=sharding)(state)")
    return parts


def _parts(state: Any) -> _Parts:
    if isinstance(state, nnx.Module):
        nnx.pop(state := nnx.clone(state), nnx.Intermediate)
        graph, trained, carried = nnx.split(state, nnx.Param, nnx.Not(nnx.Param))  # type: ignore[misc]  # its stub
        return _Parts(
            trained,
            carried,
            lambda trained, carried: nnx.merge(graph, trained, carried, copy=True),
            lambda model, changed: (
                _replaced({}, changed) or nnx.state(model, nnx.Not(nnx.Any(nnx.Param, nnx.Intermediate)))
            ),
        )
    if isinstance(state, Mapping) and "params" in state:
        carried = {name: value for name, value in state.items() if name != "params"}
        return _Parts(
            state["params"],
            carried,
            lambda trained, carried: type(state)({"params": trained, **carried}),  # type: ignore[call-arg]  # dict-like
            lambda variables, changed: _replaced({k: v for k, v in variables.items() if k != "params"}, changed),
        )
    return _Parts(state, {}, lambda trained, carried: trained, lambda state, changed: _replaced({}, changed))


def _replaced(carried: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(changed, Mapping) or not changed.keys() <= carried.keys():
        raise ValueError(
            "fit: loss_fn must return the loss, or the loss and a mapping of changes to the collections of the state "
            f"beside 'params', which are {sorted(carried)}, got {_checks.describe(changed)}."
        )
    return {**carried, **changed}


def _step(loss_fn: Callable[..., Any], optimizer: optax.GradientTransformation, parts: _Parts) -> Callable[..., Any]:
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

    update = optax.with_extra_args_support(optimizer).update

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained: Any, optimizer_state: Any, carried: Any, batch: Any, key: Array) -> tuple[_checkpoints.Run, Any]:
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, carried), gradients = gradient(trained, carried, batch, key)
        updates, optimizer_state = update(gradients, optimizer_state, trained, value=loss)
        trained = optax.apply_updates(trained, updates)
        healthy = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(trained)]).all()
        return _checkpoints.Run(trained, optimizer_state, carried), (loss, healthy)

    return step


def _copied(tree: Any) -> Any:
    """The step takes its arguments' memory, which must not be the caller's."""
    return jax.tree.map(jnp.copy, tree)


def _is_nnx(node: Any) -> bool:
    return isinstance(node, nnx.Module | nnx.Variable | nnx.State)


def _owned(leaf: Any) -> Any:
    """jit may read a NumPy array after it returns, when data() already writes the next batch into it.

    So may `jnp.array`, in jax 0.12: the copy must be NumPy's.
    """
    _checks.of_all_processes("fit", "data", leaf, "jax.make_array_from_process_local_data(sharding, rows)")
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def _finite(outcome: tuple[Array, Array], step: int) -> np.float32:
    value, healthy = np.float32(outcome[0]), bool(outcome[1])
    if not np.isfinite(value) or not healthy:
        what = (
            f"loss must be finite, got {value}" if not np.isfinite(value) else "updated state must be finite, it is not"
        )
        raise FloatingPointError(
            f"fit: the {what} at step {step}. Nothing was saved after that step: lower the "
            f"learning rate, clip the gradients, or look at data({step})."
        )
    return value


def _bar(first: int, steps: int, progress: bool | None) -> Any:
    if progress is False or jax.process_index() > 0:
        return _NoBar()
    try:
        from tqdm import tqdm
    except ImportError:
        if progress is None:
            return _NoBar()
        raise ImportError("fit: progress needs tqdm: pip install 'dropjax[train]', or pass progress=False.") from None
    return tqdm(initial=first, total=steps, desc="training", unit="step")


class _NoBar(contextlib.nullcontext):
    def __enter__(self) -> "_NoBar":
        return self

    def set_postfix(self, *args: Any, **kwargs: Any) -> None:
        pass

    def update(self) -> None:
        pass
