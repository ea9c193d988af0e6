"""Checkpoints of a training run: written by Orbax, verified when read."""

import functools
import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from dropjax import _checks


class Run(NamedTuple):
    """Everything that a training step changes."""

    trained: Any
    optimizer_state: Any
    carried: Any


class Checkpoints:
    """The checkpoints of one run in one folder.

    Orbax writes into a temporary folder and renames it, so a half-written checkpoint has no step. A digest
    of all that was saved tells a damaged one, which is moved to `broken/` and never touched again.

    Of several processes all gather what is saved, and the first writes it and chooses what all of them read. In each,
    Orbax runs as if there were no other: reading with another count of processes is then no special case.
    """

    def __init__(self, folder: str | os.PathLike[str], seed: int):
        try:
            import orbax.checkpoint as ocp
        except ImportError:
            raise ImportError("fit: checkpoint_dir needs Orbax: pip install 'dropjax[train]'.") from None
        if not isinstance(folder, str | os.PathLike):
            raise TypeError(f"fit: checkpoint_dir must be a path, got {_checks.describe(folder)}.")
        self._ocp, self._folder, self._seed = ocp, Path(folder).expanduser().absolute(), seed
        self._last: int | None = None
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(f"fit: checkpoint_dir must be a folder, got the file {self._folder}.")
        (self._folder / "steps").mkdir(parents=True, exist_ok=True)

    @functools.cached_property
    def _manager(self) -> Any:
        """Made at its first use, since it looks at all steps: the first process may yet move a broken one."""
        me = jax.process_index()
        alone = self._ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
        options = self._ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False, create=False, multiprocessing_options=alone
        )
        return self._ocp.CheckpointManager(self._folder / "steps", options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        """Says of an error or an interruption what of the run is kept."""
        if error is not None:
            last = "no checkpoint yet" if self._last is None else f"the checkpoint of step {self._last}"
            error.add_note(f"fit: {self._folder} holds {last}, from which the same call continues.")

    def save(self, step: int, run: Run, losses: np.ndarray, history: list) -> None:
        """Saves what `restore` needs; when this returns, in any process, the checkpoint is there."""
        arrays = _arrays(run) | {"losses": losses}
        if jax.process_index() == 0:
            about = {"step": step, "seed": self._seed, "leaves": leaves(run), "history": history}
            about["digest"] = _digest(arrays, about)
            args = self._ocp.args
            self._manager.save(step, args=args.Composite(arrays=args.StandardSave(arrays), about=args.JsonSave(about)))
        multihost_utils.sync_global_devices(f"fit: saved {step}")
        self._last = step

    def restore(self, like: Run) -> tuple[int, Run, np.ndarray, list] | None:
        """Returns step, run, losses and history of the newest checkpoint that is whole, None without one.

        Raises:
          ValueError: if that checkpoint has another seed, state or optimizer.
        """
        found = self._newest()
        if found is None:
            return None
        step, arrays, about = found
        if about["seed"] != self._seed:
            raise ValueError(
                f"fit: seed must be {about['seed']}, as in checkpoint_dir {self._folder}, got {self._seed}. "
                "Use another folder for another run."
            )
        if about["leaves"] != leaves(like):
            wrong = next((a, b) for a, b in itertools.zip_longest(about["leaves"], leaves(like)) if a != b)
            raise ValueError(
                f"fit: state and optimizer must be those of the checkpoint in {self._folder}, got {wrong[1]} "
                f"for {wrong[0]}. Use another folder for another run."
            )
        self._last, history = step, [(done, numbers) for done, numbers in about["history"]]
        return step, _run(arrays, like), arrays["losses"], history

    def _newest(self) -> tuple[int, dict[str, np.ndarray], dict[str, Any]] | None:
        """The newest checkpoint that is whole: the first process looks for it, the others read the same step."""
        found = None
        for step in sorted(self._manager.all_steps(), reverse=True) if jax.process_index() == 0 else ():
            try:
                found = step, *self._read(step)
                break
            except Exception as error:
                self._set_aside(step, error)
        step = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if found is None else found[0])))
        return None if step < 0 else found or (step, *self._read(step))

    def _read(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        args = self._ocp.args
        read = self._manager.restore(step, args=args.Composite(arrays=args.StandardRestore(), about=args.JsonRestore()))
        arrays = {name: np.asarray(value) for name, value in read["arrays"].items()}
        about = dict(read["about"])
        if about.pop("digest") != _digest(arrays, about) or about["step"] != step:
            raise ValueError("its digest is not that of its content")
        return arrays, about

    def _set_aside(self, step: int, error: Exception) -> None:
        _checks.warn(
            f"fit: the checkpoint of step {step} in {self._folder} is broken and was moved to broken/ "
            f"({type(error).__name__}: {str(error)[:200]})."
        )
        aside = self._folder / "broken" / str(step)
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        (self._folder / "steps" / str(step)).rename(aside)
        self._manager.reload()


def _arrays(run: Run) -> dict[str, np.ndarray]:
    """The leaves of a run on the host, under their position; random keys as their words."""
    values = [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in jax.tree.leaves(run)]
    return {f"{i:06}": _on_host(value) for i, value in enumerate(values) if np.size(value)}


def _on_host(value: Any) -> np.ndarray:
    if isinstance(value, jax.Array) and not (value.is_fully_addressable or value.is_fully_replicated):
        return multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value)


def _run(arrays: dict[str, np.ndarray], like: Run) -> Run:
    def placed(value: np.ndarray | None, leaf: Any) -> Any:
        if value is None or not isinstance(leaf, jax.Array):  # None: of size zero, which Orbax does not save
            return leaf if value is None else value
        if leaf.committed:  # every process holds the whole value, and places the parts that are its own
            array: Any = jax.make_array_from_callback(value.shape, leaf.sharding, lambda index: value[index])
        else:
            array = jnp.asarray(value)  # jit puts it where the others are
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else array

    values, structure = jax.tree.flatten(like)
    return jax.tree.unflatten(structure, [placed(arrays.get(f"{i:06}"), leaf) for i, leaf in enumerate(values)])


def leaves(run: Any) -> list[str]:
    """The name, dtype and shape of every leaf."""
    found = jax.tree_util.tree_leaves_with_path(run)
    return [f"{jax.tree_util.keystr(path)} {jnp.result_type(leaf)}{jnp.shape(leaf)}" for path, leaf in found]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def _digest(arrays: dict[str, np.ndarray], about: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
