"""Exports with symbolic shapes: what one program computes for every length, or the error that says why it cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dropjax
from dropjax import bits, constraints, mc
from tests.test_variants import RATE, inputs
from tests.variants import VARIANTS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compiler")]
MASKS = np.array([[True, False, True, True, False, True], [True, True, False, True, True, False]])
NODES = jnp.arange(5)
FUNCTIONS = {name: lambda key, x, row=row: row.function(key, x, RATE, **row.options) for name, row in VARIANTS.items()}
FUNCTIONS |= {
    "keep_mask": lambda key, x: dropjax.keep_mask(key, x.shape, RATE),
    "random_words": lambda key, x: bits.random_words(key, x.shape),
    "apply_mask": lambda key, x: dropjax.apply_mask(x, x > 0, RATE),
    "a rate for each example": lambda key, x: dropjax.dropout(key, x, x[:, :1, :1] ** 2 % 1),
    "a microbatch": lambda key, x: dropjax.dropout(key, x, RATE, start={0: x.shape[0]}),
    "embedding_dropout": lambda key, x: dropjax.embedding_dropout(key, x, RATE, indices=(x[:, :, 0] > 2).astype(int)),
    "the gradient": lambda key, x: jax.grad(lambda x: (dropjax.dropout(key, x, RATE) ** 2).sum())(x),
    "drop_block, example": lambda key, x: dropjax.drop_block(key, x, RATE, block_size=3, normalize="example"),
    "drop_block, batch": lambda key, x: dropjax.drop_block(key, x, RATE, block_size=3, normalize="batch"),
    "targeted_dropout": lambda key, x: dropjax.targeted_dropout(key, x, RATE),
    "targeted_dropout of units": lambda key, x: dropjax.targeted_dropout(key, x, RATE, kind="unit"),
    "standout": lambda key, x: dropjax.standout(key, x, x),
    "standout_expectation": lambda key, x: dropjax.standout_expectation(x, x),
    "layer_drop": lambda key, x: dropjax.layer_drop(key, jnp.sin, x, RATE),
    "weight_drop": lambda key, x: dropjax.weight_drop(key, {"w": x}, RATE, names="w"),
    "multi_sample_dropout": lambda key, x: dropjax.multi_sample_dropout(key, jnp.sin, x, RATE, num_samples=2),
    "r_drop": lambda key, x: dropjax.r_drop(lambda key: dropjax.dropout(key, x, RATE), key),
    "symmetric_kl": lambda key, x: dropjax.symmetric_kl(x, 2 * x),
    "concrete_dropout": lambda key, x: dropjax.concrete_dropout(key, x, RATE),
    "concrete_dropout_kl": lambda key, x: dropjax.concrete_dropout_kl(RATE, x),
    "variational_gaussian_dropout": lambda key, x: dropjax.variational_gaussian_dropout(key, x, -2.0),
    "variational_dropout_kl": lambda key, x: dropjax.variational_dropout_kl(-x),
    "local_reparametrization": lambda key, x: dropjax.local_reparametrization(key, x, x**2),
    "variational_dense": lambda key, x: dropjax.variational_dense(key, x, x[0, :2].T, -2.0),
    "sparse_variational_dense": lambda key, x: dropjax.sparse_variational_dense(key, x, x[0, :2].T, -2.0),
    "sparse_log_alpha": lambda key, x: dropjax.sparse_log_alpha(x, -2.0),
    "sparse_kernel": lambda key, x: dropjax.sparse_kernel(x, -2.0),
    "sparsity": lambda key, x: dropjax.sparsity(x, -2.0),
    "masksembles_samples": lambda key, x: dropjax.masksembles_samples(jnp.sin, x, 2),
    "clip_norm": lambda key, x: constraints.clip_norm(x, 0.5, axis=0),
    "max_norm": lambda key, x: constraints.max_norm(0.5, axis=0).update(x, None, x)[0],
}
OF_THE_BATCH = {
    "generator threefry": lambda key, x: dropjax.dropout(key, x, RATE, generator="threefry"),
    "token_dropout": lambda key, x: dropjax.token_dropout(key, x, 0.5, num_prefix_tokens=1),
    "whole blocks": lambda key, x: dropjax.drop_block(key, x, RATE, block_size=3, whole_blocks=True),
    "masksembles": lambda key, x: dropjax.masksembles(x, MASKS, members=(x[:, 0, 0] > 2).astype(int)),
}
GRAPHS = {
    "drop_edge": lambda key, u: dropjax.drop_edge(key, u, u[::-1], RATE, undirected=True),
    "drop_edge, rate for each": lambda key, u: dropjax.drop_edge(key, u, u, u / 9, valid=u > 1),
    "drop_node": lambda key, u: dropjax.drop_node(key, u.shape[0], u, u[::-1], RATE),
    "drop_node, named": lambda key, u: dropjax.drop_node(key, u, u, u[::-1], RATE),
}


def exported(function, key, x, shape):
    shapes = jax.ShapeDtypeStruct((), key.dtype), jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), x.dtype)
    return jax.export.export(jax.jit(function))(*shapes)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("function", "x", "shape"),
    [pytest.param(f, inputs(), "b, l, d", id=name) for name, f in FUNCTIONS.items()]
    + [pytest.param(f, inputs(), "b, 4, 6", id=name) for name, f in OF_THE_BATCH.items()]
    + [pytest.param(f, NODES, "edges", id=name) for name, f in GRAPHS.items()],
)
def test_one_program_for_all_lengths(function, x, shape, key):
    """It gives what a program for the one length gives, masks to the bit."""
    y, expected = exported(function, key, x, shape).call(key, x), jax.jit(function)(key, x)
    for a, b in zip(jax.tree.leaves(y), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a == 0, b == 0)
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "generator threefry": r"dropout: generator must be 'mix' for symbolic shapes \(b, l, d\), got 'threefry'\.",
        "token_dropout": r"token_dropout: the length of token_axis must be known while tracing, got l\. Export with a ",
        "whole blocks": r"drop_block: the length of dimension 1, in which whole blocks lie, must be known while ",
        "masksembles": r"masksembles: masks must be bool \[num_masks, d\] for x of shape \(b, l, d\), got bool\[2,6\]",
    }.items(),
)
def test_a_length_that_must_be_known_is_named(name, message, key):
    with pytest.raises((TypeError, ValueError), match=message):
        exported(OF_THE_BATCH[name], key, inputs(), "b, l, d")


P, LABELS = np.float32([[0.5, 0.25, 0.25], [0.125, 0.5, 0.375]]), np.int32([1, 2])
METRICS = {
    "brier": (mc.brier, [("n, c", P), ("n", LABELS)]),
    "negative_log_likelihood": (
        lambda z, y: mc.negative_log_likelihood(z, y, logits=True),
        [("t, n, c", P[None]), ("n", LABELS)],
    ),
    "interval_coverage": (mc.interval_coverage, [("n", P[0]), ("n", P[0] + 1), ("n", P[1])]),
    "crps": (mc.crps, [("2, n", P), ("n", P[1])]),
    "crps_gaussian": (mc.crps_gaussian, [("n", P[0]), ("n", P[1]), ("n", P[0])]),
    "fit_temperature": (mc.fit_temperature, [("n, c", 4 * P), ("n", LABELS)]),
    "conformal_sets": (lambda p: mc.conformal_sets(p, 0.5, score="aps", key=jax.random.key(0)), [("n, c", P)]),
    "conformal_intervals": (mc.conformal_intervals, [("n", P[0]), ("", P[0, 0])]),
    "classify": (lambda x: mc.classify(lambda key: dropjax.dropout(key, x, 0.5), jax.random.key(0), 3), [("n, c", P)]),
}
OF_LENGTHS = {
    "reliability": (mc.reliability, "probabilities", [("n, c", P), ("n", LABELS)]),
    "calibration_error": (mc.calibration_error, "probabilities", [("n, c", P), ("n", LABELS)]),
    "crps": (mc.crps, "samples", [("t, n", P), ("n", P[0])]),
    "risk_coverage": (mc.risk_coverage, "uncertainty", [("n", P[0]), ("n", P[1])]),
    "fit_temperature": (mc.fit_temperature, "samples of logits", [("t, n, c", P[None]), ("n", LABELS)]),
    "conformal_threshold": (lambda s: mc.conformal_threshold(s, 0.5), "scores", [("n", P[0])]),
}


def of_lengths(function, arguments):
    scope = jax.export.SymbolicScope()
    shapes = [jax.export.symbolic_shape(shape, scope=scope) for shape, _ in arguments]
    return jax.export.export(jax.jit(function))(*map(jax.ShapeDtypeStruct, shapes, [x.dtype for _, x in arguments]))


@pytest.mark.parametrize("name", METRICS)
def test_metrics_of_all_lengths(name):
    function, arguments = METRICS[name]
    values = [x for _, x in arguments]
    result = of_lengths(function, arguments).call(*values)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), result, jax.jit(function)(*values))


@pytest.mark.parametrize("name", OF_LENGTHS)
def test_lengths_that_metrics_must_know_are_named(name):
    function, argument, arguments = OF_LENGTHS[name]
    message = (
        rf"^{name}: the length of dimension 0 of {argument} must be known .* other dimensions may be symbolic\.(\n|$)"
    )
    with pytest.raises(TypeError, match=message):
        of_lengths(function, arguments)


def test_explain_must_know_lengths(key):
    def explained(key, x):
        return mc.explain(lambda key: dropjax.dropout(key, x, RATE), key).share

    with pytest.raises(TypeError, match="explain: the length of each dimension in fn must be known while tracing, got"):
        exported(explained, key, inputs(), "b, l, d")
