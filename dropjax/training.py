"""A small training loop: one jitted step, progress, checkpoints and exact resume.

Nothing random needs saving: the key of a step is a function of (seed, step).
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from dropjax import _arguments, _checkpoints, _checks, _step

__all__ = ["Fit", "fit"]

_DOMAIN = 0x74726169  # "trai": the keys of steps are no keys that a user folds out of the same seed


class Fit(NamedTuple):
    """What training returns: the trained state, and all that was recorded on the way."""

    state: Any
    """The trained state, of the kind that was given."""
    optimizer_state: Any
    """The state of the optax optimizer."""
    losses: np.ndarray
    """The loss of every step, float64 `[steps]`, also of the steps before a restart."""
    history: list[tuple[int, dict[str, float]]]
    """What `evaluate` returned, with the number of steps done, also from before a restart."""


@_arguments.public
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
    checkpoint_every: int | None = None,
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
        once, under `jax.jit`, and again for an optimizer with a line search.
      state: what is trained. A pytree of float arrays; or a mapping with `"params"`, which alone are
        trained, and other collections (Linen's variables); or an `nnx.Module`, whose `nnx.Param` are
        trained and whose other state (batch statistics, rng streams) is carried from step to step. An
        NNX model's own streams do not depend on `seed`: to draw with `key`, pass
        `rngs=nnx.Rngs(dropout=key)` through its call. The state given is not modified.
      optimizer: an optax transformation. One that asks for them gets the loss (`value`), the gradient
        (`grad`) and the loss as a function of what is trained (`value_fn`, Sophia's `obj_fn`), of the same
        batch and key. A line search so compares losses under the same dropout masks.
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
        None takes a tenth of `steps`, but at least 10 and at most 1000.
      progress: whether to show a progress bar, which needs `dropjax[train]`; None shows one if it can.
        Of several processes, the first shows it.

    Returns:
      `Fit`.

    Raises:
      FloatingPointError: if the loss of a step, or what is trained after it, is not finite; nothing is saved after it.
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
    tenth = min(1000, max(10, steps // 10))
    every = tenth if checkpoint_every is None else _checks.integer("fit", "checkpoint_every", checkpoint_every, 1)
    shows = None if progress is None else _checks.flag("fit", "progress", progress)
    _check_functions(loss_fn, data, evaluate)
    _step.check_optimizer(optimizer)
    parts = _step.checked_parts(state)
    step_fn = _step.jitted(loss_fn, optimizer, parts)
    trained = _copied(parts.trained)
    with _step.promoting():
        run = _checkpoints.Run(trained, _copied(optimizer.init(trained)), parts.carried)
    first, losses = 0, np.zeros(0)
    history: list[tuple[int, dict[str, float]]] = []
    checkpoints = None if checkpoint_dir is None else _checkpoints.Checkpoints(checkpoint_dir, seed)
    if checkpoints and (kept := checkpoints.restore(run)):
        first, run, losses, history = kept
        if first > steps:
            raise ValueError(f"fit: steps must be at least {first}, as in checkpoint_dir, got {steps}.")
    if checkpoints and checkpoint_every is not None and first < steps < every:
        _checks.warn(
            f"fit: checkpoint_every is {every}, more than the {steps} steps: nothing is saved before the "
            "end. Leave it out for a checkpoint after each tenth of the run.",
        )
    losses = np.concatenate([losses, np.zeros(steps - first)])
    root = jax.random.fold_in(jax.random.key(seed), _DOMAIN)
    ahead: Any = None  # loss and health of the step before, not waited for
    if first < steps:  # what is wrong with the loss is an error here, before a progress bar
        batch = _batch(data, first)
        jax.eval_shape(step_fn, *run, batch, root)

    with _checks.together("fit"), checkpoints or contextlib.nullcontext(), _bar(first, steps, shows) as bar:
        for step in range(first, steps):
            batch = batch if step == first else _batch(data, step)
            run, outcome = step_fn(*run, batch, jax.random.fold_in(root, step))
            done = step + 1
            if ahead is not None:
                losses[step - 1] = _finite(ahead, step - 1)
            ahead = outcome
            evaluates = evaluate is not None and (done % evaluate_every == 0 or done == steps)
            saves = checkpoints is not None and (done % every == 0 or done == steps)
            if evaluates or saves or done == steps:
                losses[step], ahead = _finite(outcome, step), None
            if evaluate is not None and evaluates:
                history.append((done, _named(evaluate(parts.merge(_copied(run.trained), run.carried)))))
                bar.set_postfix(history[-1][1], refresh=False)
            if checkpoints is not None and saves:
                checkpoints.save(done, run, losses[:done], history)
            bar.update()
    return Fit(parts.merge(run.trained, run.carried), run.optimizer_state, losses, history)


def _check_functions(loss_fn: Any, data: Any, evaluate: Any) -> None:
    """Checks the functions, and that they can be called as they will be."""
    if not callable(loss_fn):
        raise TypeError(f"fit: loss_fn must be a function, got {_checks.describe(loss_fn)}.")
    if not callable(data):
        raise TypeError(
            f"fit: data must be a function of the step, got {_checks.describe(data)}. For arrays: "
            "lambda step: (x[rows(step)], y[rows(step)]). An iterator cannot go back to the step at "
            "which a run continues."
        )
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"fit: evaluate must be a function of the state, got {_checks.describe(evaluate)}.")
    _check_signature("loss_fn", loss_fn, "state", "batch", "key")
    _check_signature("data", data, "step")
    if evaluate is not None:
        _check_signature("evaluate", evaluate, "state")


def _check_signature(argument: str, function: Any, *names: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some compiled functions hide theirs
        return
    try:
        signature.bind(*names)
    except TypeError as error:
        bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        signature = signature.replace(parameters=bare, return_annotation=signature.empty)
        called, plural = ", ".join(names), "s" * (len(names) > 1)
        raise TypeError(
            f"fit: {argument} must take {len(names)} positional argument{plural}, {called}, got a "
            f"function of {signature} ({error}). Wrap it: lambda {called}: ..."
        ) from None


def _copied(tree: Any) -> Any:
    """The step takes its arguments' memory, which must not be the caller's.

    A weakly typed array becomes a strong one, as it would in the first step, which would be traced twice.
    """
    return jax.tree.map(lambda leaf: jnp.array(leaf, dtype=jnp.result_type(leaf)), tree)


def _batch(data: Callable[[int], Any], step: int) -> Any:
    """The batch of a step, checked.

    jit may read a NumPy array after it returns, when data() already writes the next batch into it.
    So may `jnp.array`, in jax 0.12: the copy must be NumPy's.
    """
    batch = data(step)
    leaves = jax.tree_util.tree_leaves_with_path(batch, lambda node: isinstance(node, Iterator))
    for path, leaf in leaves:
        try:
            jax.typeof(leaf)
        except (TypeError, OverflowError):
            raise TypeError(
                f"fit: data must return arrays, or a tree of them, got {_checks.describe(leaf)} at "
                f"data({step}){jax.tree_util.keystr(path)}. Convert numbers with np.asarray, and leave "
                "out what is none."
            ) from None
        _checks.of_all_processes("fit", "data", leaf, "jax.make_array_from_process_local_data(sharding, rows)")
    return jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, batch)


def _named(measured: Any) -> dict[str, float]:
    if not isinstance(measured, Mapping):
        raise TypeError(f"fit: evaluate must return named numbers, got {_checks.describe(measured)}.")
    for name, value in measured.items():
        if not isinstance(value, float | int | np.generic | np.ndarray | Array) or np.ndim(value):
            got = f"{_checks.describe(value)} for {name!r}"
            raise TypeError(f"fit: evaluate must return named numbers, got {got}.")
    return {str(name): float(value) for name, value in measured.items()}


def _finite(outcome: tuple[Array, Array], step: int) -> np.float64:
    value, healthy = np.float64(outcome[0]), bool(outcome[1])
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
