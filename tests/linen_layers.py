"""Every Linen layer: how it is built, and what it is called with."""

import flax.linen as nn
import jax
import jax.numpy as jnp

import dropjax.linen
from tests.variants import VARIANTS

KEY = jax.random.key(0)
KERAS = {f"SpatialDropout{n}D": n for n in (1, 2, 3)}
RATED = {row.layer: {} for row in VARIANTS.values()} | {
    **{name: {} for name in KERAS},
    "TokenDropout": {},
    "DropConnectDense": {"features": 4},
    "LayerDrop": {"module": nn.Dense(12)},
    "WeightDrop": {"module": nn.Dense(4), "names": "kernel"},
}
"""Layers with a rate (or a stddev or beta), and their other fields."""
OTHERS = {
    "ConcreteDropout": {"initial_rate": 0.5},
    "VariationalGaussianDropout": {},
    "VariationalDense": {"features": 4},
    "SparseVariationalDense": {"features": 4},
    "Standout": {},
    "Masksembles": {"num_masks": 2, "scale": 2.0},
}
LAYERS = [*RATED, *OTHERS]


def rate_of(name):
    """The name of its rate."""
    return {"GaussianNoise": "stddev", "UniformDropout": "beta"}.get(name, "rate")


def build(layer, rate=0.5, **fields):
    """A layer of this rate, if it has one."""
    own = {rate_of(layer): rate, **RATED[layer]} if layer in RATED else OTHERS[layer]
    return getattr(dropjax.linen, layer)(**{**own, **fields})


def inputs(name):
    """What it is called with: two examples."""
    x = jnp.linspace(1, 2, 2 * 12 * 12).reshape(2, *[1] * (KERAS.get(name, 1) - 1), 12, 12)
    return (x, 0 * x) if name == "Standout" else (x,)


def variables(layer, *args):
    """The variables of a layer."""
    return layer.init({"params": KEY, "dropout": KEY}, *args, **deterministic(layer, True))


def deterministic(layer, value):
    """The keyword for evaluation or training; Masksembles has none."""
    return {} if isinstance(layer, dropjax.linen.Masksembles) else {"deterministic": value}
