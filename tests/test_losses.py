"""Divergences of logits and of probabilities, which must not be taken for one another."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dropjax

P = np.array([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]], np.float32)
Q = np.array([[0.1, 0.1, 0.8], [0.0, 0.9, 0.1]], np.float32)
EXPECTED = ((P - Q) * (np.log(np.where(P > 0, P, 1)) - np.log(np.where(Q > 0, Q, 1)))).sum(-1) / 2


def divergences(p, q, **options):
    """Of both functions: symmetric_kl itself, and r_drop of a function whose two draws are p and q."""
    yield lambda: dropjax.symmetric_kl(p, q, **options)
    key = jax.random.key(0)
    first = jax.random.key_data(jax.random.split(key))[0]
    yield (
        lambda: (
            (
                dropjax.r_drop(lambda key: jnp.where((jax.random.key_data(key) == first).all(), p, q), key, **options)
            ).divergence
        )
    )


@pytest.mark.parametrize("which", [0, 1])
def test_probabilities_and_logits_agree(which):
    for p, q, options in [(P, Q, {"logits": False}), (np.log(P + 1e-30), np.log(Q + 1e-30), {})]:
        call = list(divergences(jnp.asarray(p), jnp.asarray(q), **options))[which]
        np.testing.assert_allclose(call(), EXPECTED, rtol=1e-5)
        np.testing.assert_allclose(jax.jit(call)(), EXPECTED, rtol=1e-5)
    gradient = jax.grad(lambda p: dropjax.symmetric_kl(p, jnp.asarray(Q), logits=False).sum())(jnp.asarray(P))
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_probabilities_that_are_taken_for_logits_are_a_warning(which, dtype):
    call = list(divergences(jnp.asarray(P, dtype), jnp.asarray(Q, dtype)))[which]
    with pytest.warns(UserWarning, match=r"logits, got values of at least 0 that sum to 1 .* pass logits=False\."):
        call()
    traced = jax.jit(lambda p, q: list(divergences(p, q))[which]())
    traced(jnp.asarray(P, dtype), jnp.asarray(Q, dtype))  # nothing is known there
    for other in (np.abs(P) * 2, P - 0.1, np.full((2, 1), 1, np.float32)):
        list(divergences(jnp.asarray(other), jnp.asarray(other)))[which]()


@pytest.mark.parametrize("which", [0, 1])
def test_logits_that_are_taken_for_probabilities_are_an_error(which):
    call = list(divergences(jnp.log(P + 1e-3), jnp.log(Q + 1e-3), logits=False))[which]
    with pytest.raises(
        ValueError, match=r"probabilities of at least 0 that sum to 1 over .* For logits leave logits=T"
    ):
        call()
    with pytest.raises(TypeError, match="logits must be True or False, got 'no'"):
        list(divergences(P, Q, logits="no"))[which]()


def test_infinite_logits():
    """-inf is a probability of 0; what has no softmax has no divergence."""
    low, none = jnp.array([-jnp.inf, 0.0, 1.0]), jnp.array([0.0, 0.0, 2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dropjax.symmetric_kl(low, low) == 0
        assert dropjax.symmetric_kl(low, none) == jnp.inf
        assert dropjax.symmetric_kl(jnp.exp(low) / jnp.exp(low).sum(), jnp.array([0.2, 0.4, 0.4]), logits=False) > 1e30
        for bad in ([jnp.inf, 0, 1], [jnp.nan, 0, 1], [-jnp.inf] * 3, [jnp.inf, -jnp.inf, 0]):
            assert jnp.isnan(dropjax.symmetric_kl(jnp.array(bad, jnp.float32), none))
    bad = jax.jit(lambda p: dropjax.symmetric_kl(p, jnp.abs(p), logits=False))(jnp.array([-0.5, 1.0, 0.5]))
    assert jnp.isnan(bad)
