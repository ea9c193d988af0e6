"""Arguments in another order: the error of every public function states its own."""

import importlib
import inspect
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dropjax
from dropjax import _names, bits, constraints, linen, mc, schedules, sharding, training
from dropjax import nnx as dropjax_nnx
from dropjax.mc import moments, plots
from tests.variants import VARIANTS

KEY = jax.random.key(0)
X = np.linspace(-3, 3, 12, dtype=np.float32).reshape(4, 3)
KERNEL = np.ones((3, 2), np.float32)
EDGES = np.array([0, 1, 2]), np.array([1, 2, 0])
P, LABELS = np.full((3, 2), 0.5, np.float32), np.array([0, 1, 1])
SAMPLES, TARGETS = np.linspace(0, 1, 15, dtype=np.float32).reshape(5, 3), np.ones(3, np.float32)
LINEN = nn.Sequential([nn.Dense(3), nn.Dropout(0.5, deterministic=True)])
VARIABLES = LINEN.init(jax.random.key(1), X)
MODEL = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))


def draws(key):
    return dropjax.dropout(key, X, 0.5)


def loss(state, batch, key):
    return (state * batch).sum()


CALLS = {
    **{row.function: ((KEY, X, 0.5), row.options) for row in VARIANTS.values()},
    dropjax.keep_mask: ((KEY, (4, 3), 0.5), {}),
    dropjax.apply_mask: ((X, X > 0, 0.5), {}),
    dropjax.token_dropout: ((KEY, X, 0.5), {}),
    dropjax.standout: ((KEY, X, X), {}),
    dropjax.standout_expectation: ((X, X), {}),
    dropjax.drop_edge: ((KEY, *EDGES, 0.5), {}),
    dropjax.drop_node: ((KEY, 3, *EDGES, 0.5), {}),
    dropjax.layer_drop: ((KEY, lambda x: x, X, 0.5), {}),
    dropjax.weight_drop: ((KEY, {"kernel": KERNEL}, 0.5), {"names": "kernel"}),
    dropjax.masksembles_masks: ((KEY, 16, 4, 2.0), {}),
    dropjax.masksembles: ((X, np.ones((2, 3), bool)), {}),
    dropjax.masksembles_samples: ((lambda x: x, X, 2), {}),
    dropjax.multi_sample_dropout: ((KEY, lambda x: x, X, 0.5), {"num_samples": 2}),
    dropjax.r_drop: ((draws, KEY), {}),
    dropjax.symmetric_kl: ((X, X), {}),
    dropjax.concrete_dropout: ((KEY, X, -2.0), {}),
    dropjax.concrete_dropout_kl: ((-2.0, KERNEL), {}),
    dropjax.variational_gaussian_dropout: ((KEY, X, -2.0), {}),
    dropjax.variational_dropout_kl: ((-2.0,), {}),
    dropjax.local_reparametrization: ((KEY, X, 0.1), {}),
    dropjax.variational_dense: ((KEY, X, KERNEL, -2.0), {}),
    dropjax.sparse_variational_dense: ((KEY, X, KERNEL, KERNEL), {}),
    dropjax.sparse_log_alpha: ((KERNEL, -2 * KERNEL), {}),
    dropjax.sparse_kernel: ((KERNEL, -2 * KERNEL), {}),
    dropjax.sparsity: ((KERNEL, -2 * KERNEL), {}),
    bits.random_words: ((KEY, (4, 3)), {}),
    bits.threefry2x32: ((1, 2, 3, 4), {}),
    mc.sample: ((draws, KEY, 3), {}),
    mc.classify: ((draws, KEY, 3), {}),
    mc.regress: ((draws, KEY, 3), {}),
    mc.explain: ((draws, KEY), {}),
    mc.brier: ((P, LABELS), {}),
    mc.calibration_error: ((P, LABELS), {}),
    mc.reliability: ((P, LABELS), {}),
    mc.negative_log_likelihood: ((P, LABELS), {"logits": False}),
    mc.conformal_scores: ((P, LABELS), {}),
    mc.conformal_threshold: ((TARGETS, 0.1), {}),
    mc.conformal_sets: ((P, 0.5), {}),
    mc.conformal_residuals: ((TARGETS, TARGETS), {}),
    mc.conformal_intervals: ((TARGETS, 0.5), {}),
    mc.crps: ((SAMPLES, TARGETS), {}),
    mc.crps_gaussian: ((TARGETS, TARGETS, TARGETS), {}),
    mc.pinball: ((TARGETS, TARGETS, 0.5), {}),
    mc.interval_coverage: ((TARGETS, TARGETS, TARGETS), {}),
    mc.detection: ((TARGETS, TARGETS), {}),
    mc.risk_coverage: ((TARGETS, TARGETS), {}),
    mc.fit_temperature: ((np.log(P), LABELS), {}),
    mc.temperature_scale: ((P, 1.5), {}),
    moments.dense: ((X, X**2, KERNEL, np.ones(2, np.float32)), {}),
    moments.dropout: ((X, X**2, 0.5), {}),
    moments.relu: ((X, X**2), {}),
    plots.regression: ((TARGETS, TARGETS, TARGETS), {}),
    plots.reliability: ((P, LABELS), {}),
    plots.risk_coverage: ((TARGETS, TARGETS), {}),
    plots.entropies: ((TARGETS, TARGETS), {}),
    plots.convergence: ((TARGETS,), {}),
    linen.mc_apply: ((LINEN, VARIABLES, KEY, X), {}),
    linen.mc_draws: ((LINEN, VARIABLES, X), {}),
    linen.replace_flax: (("mix",), {}),
    linen.with_rates: ((0.5,), {}),
    dropjax_nnx.mc_draws: ((MODEL, X), {}),
    dropjax_nnx.mc_view: ((MODEL, KEY), {}),
    dropjax_nnx.replace_flax: ((MODEL, "mix"), {}),
    dropjax_nnx.set_rates: ((nnx.Sequential(dropjax_nnx.Dropout(0.5)), 0.5), {}),
    sharding.assert_masks_differ: ((draws, KEY), {}),
    constraints.clip_norm: ((X, 2.5), {"axis": 0}),
    constraints.max_norm: ((2.5,), {"axis": 0}),
    schedules.constant: ((0.5,), {}),
    schedules.linear: ((0.25, 0.5, 100), {}),
    schedules.cosine: ((0.25, 0.5, 100), {}),
    schedules.early: ((0.5, 100), {}),
    schedules.late: ((0.5, 100), {}),
    schedules.curriculum: ((0.5, 0.1), {}),
    schedules.depth: ((0.5, 12), {}),
    training.fit: (
        (loss, jnp.ones(3), optax.sgd(0.1), lambda step: jnp.ones(3)),
        {"seed": 0, "steps": 1, "progress": False},
    ),
}
SWAPS = [
    pytest.param(function, i, j, id=f"{function.__module__.partition('.')[2]}.{function.__name__}-{i}-{j}")
    for function, (args, _) in CALLS.items()
    for i, j in itertools.combinations(range(len(args)), 2)
]


def order_of(function):
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(str(p).partition(":")[0] for p in parameters if p.kind < inspect.Parameter.KEYWORD_ONLY)


def kind(value):
    """Whether a swap can be noticed: values of one kind and shape stand for one another."""
    if jnp.issubdtype(getattr(value, "dtype", None), jax.dtypes.prng_key):
        return "key"
    if isinstance(value, float | int | np.ndarray | jax.Array):
        return np.asarray(value).dtype.kind, np.shape(value)
    return type(value)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(("function", "i", "j"), SWAPS)
def test_swapped_arguments(function, i, j):
    args, options = CALLS[function]
    swapped = list(args)
    swapped[i], swapped[j] = args[j], args[i]
    if kind(args[i]) == kind(args[j]):
        return
    with pytest.raises((TypeError, ValueError)) as caught:
        function(*swapped, **options)
    assert str(caught.value).startswith(f"{function.__name__}: ")
    assert f"The order of the arguments is {order_of(function)}" in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_public_function_has_a_call():
    modules = [*_names.HOMES, "dropjax.mc.moments", "dropjax.mc.plots"]
    public = {getattr(importlib.import_module(m), n) for m in modules for n in importlib.import_module(m).__all__}
    assert set(CALLS) == {thing for thing in public if inspect.isfunction(thing)}
