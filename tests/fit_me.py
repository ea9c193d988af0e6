"""One of two processes that train together: `python -m tests.fit_me FOLDER PORT PROCESS`.

Its programs go to the folder, and the losses, with what the optimizer saw last, to its output.
"""

import json
import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dropjax.training import fit
from tests import kill_me


def line(**options):
    return optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(4, **options))


def looking(optimizer):
    """Keeps in its state what it was given: the loss twice, and how far two gradients of it are apart."""

    def update(updates, state, params, *, value, grad, value_fn, **other):
        again, slope = jax.value_and_grad(value_fn)(params)
        apart = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), grad, slope)
        updates, inner = optimizer.update(updates, state["inner"], params)
        seen = {"value": value, "again": again, "apart": jnp.stack(jax.tree.leaves(apart)).max()}
        return updates, {"inner": inner, **seen}

    def init(params):
        return {"inner": optimizer.init(params), **dict.fromkeys(("value", "again", "apart"), jnp.zeros(()))}

    return optax.GradientTransformationExtraArgs(init, update)


RUNS = [("plain", lambda: line(store_grad=True)), ("linen", optax.adam), ("nnx", optax.adam), ("nnx", optax.adam)]


def train(kind, optimizer, place=lambda state: state, data=kill_me.data):
    loss_fn, state = kill_me.arguments(kind)
    if kind == "nnx":
        nnx.update(state, place(nnx.state(state)))
    else:
        state = place(state)
    optimizer = looking(optimizer(1e-2)) if optimizer is optax.adam else optimizer()
    result = fit(loss_fn, state, optimizer, data, seed=0, steps=3, progress=False)
    seen = result.optimizer_state
    return [*result.losses, *([float(seen[n]) for n in ("value", "again", "apart")] if "apart" in seen else [])]


if __name__ == "__main__":
    folder, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
    jax.config.update("jax_platforms", "cpu")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
    whole, cut = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))

    def place(state):
        return jax.jit(lambda state: state, out_shardings=whole)(state)

    def data(step):
        mine = slice(16 * process, 16 * process + 16)
        return tuple(jax.make_array_from_process_local_data(cut, values[mine]) for values in kill_me.data(step))

    outputs = []
    for i, run in enumerate(RUNS):
        jax.config.update("jax_dump_ir_to", f"{folder}/{i}")
        outputs.append(train(*run, place, data))
    print(json.dumps(outputs))
