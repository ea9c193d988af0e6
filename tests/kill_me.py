"""A training run for tests/test_training.py to kill: python -m tests.kill_me FOLDER KIND STEPS."""

import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import dropjax
import dropjax.linen
import dropjax.nnx
from dropjax.training import fit


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.relu(nn.Dense(16)(x)))
        return nn.Dense(1)(dropjax.linen.Dropout(0.3, deterministic=False)(x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(4, 16, rngs=rngs), nnx.BatchNorm(16, rngs=rngs)
        self.dropout, self.last = dropjax.nnx.Dropout(0.3, rngs=rngs), nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(self.norm(nnx.relu(self.first(x)))))


def data(step):
    x = np.random.default_rng(step).normal(size=(32, 4)).astype(np.float32)
    return x, np.sin(x.sum(-1, keepdims=True))


def linen_loss(variables, batch, key):
    y, changed = Linen().apply(variables, batch[0], rngs={"dropout": key}, mutable=["batch_stats"])
    return jnp.mean((y - batch[1]) ** 2), changed


def nnx_loss(model, batch, key):
    return jnp.mean((model(batch[0]) - batch[1]) ** 2)  # its own streams, which are carried along


def plain_loss(weights, batch, key):
    hidden = dropjax.dropout(key, jnp.tanh(batch[0] @ weights["first"]), 0.3)
    return jnp.mean((hidden @ weights["last"] - batch[1]) ** 2)


def arguments(kind):
    if kind == "linen":
        return linen_loss, Linen().init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, data(0)[0])
    if kind == "nnx":
        return nnx_loss, Nnx(nnx.Rngs(0))
    first, last = jax.random.normal(jax.random.key(0), (4, 16)), jnp.zeros((16, 1))
    return plain_loss, {"first": first, "last": last}


def train(folder, kind, steps, slow=0.0, **options):
    loss_fn, state = arguments(kind)

    def slowly(step):
        time.sleep(slow)
        return data(step)

    return fit(
        loss_fn, state, optax.adamw(1e-2), slowly, seed=3, steps=steps, checkpoint_dir=folder, checkpoint_every=3,
        **{"progress": False} | options,
    )  # fmt: skip


def words(result):
    """All that training ends with, as bytes."""
    leaves = jax.tree.leaves(
        (nnx.state(result.state) if isinstance(result.state, nnx.Module) else result.state, result.optimizer_state)
    )
    keys = [jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v for v in leaves]
    return b"".join(np.asarray(v).tobytes() for v in keys) + result.losses.tobytes()


if __name__ == "__main__":
    print("imported", flush=True)
    result = train(sys.argv[1], sys.argv[2], int(sys.argv[3]), slow=0.01)
    print("done", flush=True)
