"""Programs that are lowered twice, in one process and in two: `python -m tests.programs` prints their hashes."""

import hashlib
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import dropjax
import dropjax.linen
import dropjax.nnx
from dropjax import mc

X, KEY = jnp.ones((2, 3, 8)), jax.random.key(0)
INNER = jax.jit(lambda x, key: nn.Dropout(0.5).apply({}, x, deterministic=True, rngs={"dropout": key}))


class Model(nn.Module):
    """Flax's dropout, attention, ours, and what is jitted inside."""

    @nn.compact
    def __call__(self, x, train=False):
        key = self.make_rng("dropout") if self.has_rng("dropout") else KEY
        x = INNER(nn.jit(nn.Dropout)(0.5, deterministic=not train)(x), key)
        x = nn.MultiHeadDotProductAttention(2, dropout_rate=0.2)(x, deterministic=not train)
        x = dropjax.linen.DropPath(0.1)(x, deterministic=not train)
        return nn.remat(nn.Dropout, static_argnums=(2,))(0.3)(x, not train)


def network():
    rngs = nnx.Rngs(0)
    attention = nnx.MultiHeadAttention(2, 8, dropout_rate=0.2, decode=False, deterministic=False, rngs=rngs)
    return nnx.Sequential(nnx.Dropout(0.5, rngs=rngs), attention, dropjax.nnx.DropPath(0.1, rngs=rngs))


VARIABLES = Model().init({"params": KEY, "dropout": KEY}, X)


def replaced(generator, key):
    with dropjax.linen.replace_flax(generator):
        return Model().apply(VARIABLES, X, train=True, rngs={"dropout": key})


def rated(rate, key):
    with dropjax.linen.with_rates(rate):
        return dropjax.linen.mc_apply(Model(), VARIABLES, key, X)


def layer(module, key):
    return module.apply(module.init(key, X), X, rngs={"dropout": key})


PROGRAMS = {
    "dropout": lambda key: dropjax.dropout(key, X, 0.5),
    "drop_block": lambda key: dropjax.drop_block(key, X[None], 0.1, block_size=3),
    "layer_drop": lambda key: dropjax.layer_drop(key, jnp.tanh, X, 0.5),
    "attention weights": lambda key: dropjax.drop_head(key, X[None], 0.5),
    "Linen layers": lambda key: layer(
        nn.Sequential(
            [dropjax.linen.Dropout(0.5, deterministic=False), dropjax.linen.ConcreteDropout(deterministic=False)]
        ),
        key,
    ),
    "mc_apply": lambda key: dropjax.linen.mc_apply(Model(), VARIABLES, key, X),
    "mc_apply, shared": lambda key: dropjax.linen.mc_apply(Model(), VARIABLES, key, X, masks="shared"),
    "mc.classify of mc_apply": lambda key: (
        mc.classify(lambda key: dropjax.linen.mc_apply(Model(), VARIABLES, key, X), key, 4, chunk_size=2).probabilities
    ),
    "replace_flax": lambda key: replaced("mix", key),
    "replace_flax, threefry": lambda key: replaced("threefry", key),
    "with_rates": lambda key: rated(jax.random.uniform(key), key),
    "with_rates, a number": lambda key: rated(0.25, key),
    "with_rates, a function": lambda key: rated(lambda path, rate: rate / 2, key),
    "mc_view": lambda key: dropjax.nnx.mc_view(network(), key)(X),
    "mc_view, shared": lambda key: dropjax.nnx.mc_view(network(), key, masks="shared")(X),
    "mc.regress of mc_view": lambda key: mc.regress(lambda key: dropjax.nnx.mc_view(network(), key)(X), key, 4).mean,
    "NNX replace_flax": lambda key: dropjax.nnx.replace_flax(network())(X) + dropjax.dropout(key, X, 0.5),
}


def text(name):
    """The program, lowered by a jit of its own."""
    return jax.jit(lambda key: PROGRAMS[name](key)).lower(KEY).as_text()


def digest(program):
    return hashlib.sha256(program.encode()).hexdigest()


if __name__ == "__main__":
    print(json.dumps({name: digest(text(name)) for name in PROGRAMS}))
