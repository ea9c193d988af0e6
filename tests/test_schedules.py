"""Rates over steps: closed forms, under jit without retracing, joined by optax; and over depth."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dropjax
from dropjax import schedules

STEPS = np.arange(0, 260)
CASES = {
    "constant": (schedules.constant(0.3), 0.3 + 0 * STEPS),
    "linear": (schedules.linear(0.1, 0.5, 100, begin=50), np.interp(STEPS, [50, 150], [0.1, 0.5])),
    "linear down": (schedules.linear(0.5, 0.0, 1), np.where(STEPS == 0, 0.5, 0)),
    "cosine": (schedules.cosine(0.5, 0.1, 200), 0.1 + 0.2 * (1 + np.cos(np.pi * np.minimum(STEPS / 200, 1)))),
    "early": (schedules.early(0.4, 100), np.where(STEPS < 100, 0.4, 0)),
    "early, decaying": (schedules.early(0.4, 100, decay=True), 0.4 * np.maximum(1 - STEPS / 100, 0)),
    "late": (schedules.late(0.4, 100), np.where(STEPS < 100, 0, 0.4)),
    "curriculum": (schedules.curriculum(0.5, 0.02), 0.5 * (1 - np.exp(-0.02 * STEPS))),
}


@pytest.mark.parametrize(("schedule", "expected"), CASES.values(), ids=CASES.keys())
def test_closed_forms(schedule, expected):
    rates = jax.vmap(schedule)(jnp.asarray(STEPS))
    assert rates.dtype == jnp.float32
    np.testing.assert_allclose(rates, expected, atol=2e-7)
    np.testing.assert_allclose([schedule(int(step)) for step in STEPS[::37]], rates[::37], rtol=2e-7)
    assert ((rates >= 0) & (rates <= 1)).all()


@pytest.mark.usefixtures("standard_promotion")
def test_optax_has_the_same_lines_and_cosines():
    steps = jnp.arange(0, 130)
    pairs = [
        (schedules.linear(0.1, 0.5, 100, begin=7), optax.linear_schedule(0.1, 0.5, 100, 7)),
        (schedules.cosine(0.5, 0.0, 100), optax.cosine_decay_schedule(0.5, 100)),
    ]
    for ours, theirs in pairs:
        np.testing.assert_allclose(jax.vmap(ours)(steps), jax.vmap(theirs)(steps), atol=1e-6)


def test_a_jitted_step_is_traced_once_and_optax_joins(key):
    schedule = optax.join_schedules([schedules.early(0.5, 3), schedules.late(0.9, 3)], [5])
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(lambda step: dropjax.dropout(key, jnp.ones(1000), schedule(step)), n=1))
    for i, rate in enumerate([0.5, 0.5, 0.5, 0, 0, 0, 0, 0, 0.9, 0.9]):
        np.testing.assert_array_equal(step(i), dropjax.dropout(key, jnp.ones(1000), rate))


@pytest.mark.parametrize("schedule", [case[0] for case in CASES.values()], ids=CASES.keys())
def test_steps_of_all_integer_types(schedule):
    """A step that is unsigned, as that of nnx.Optimizer, or narrow, does not wrap; nor does a huge one."""
    for step in (0, 3, 49, 120):
        expected = schedule(step)
        for kind in (np.int8, np.uint8, np.int64, np.uint32, jnp.uint32, jnp.int32, np.float32):
            assert schedule(kind(step)) == expected
            assert jax.jit(schedule)(kind(step)) == pytest.approx(float(expected), abs=1e-7)
    assert schedule(2**40) == pytest.approx(float(schedule(10**6)), abs=1e-7)


def test_depth():
    np.testing.assert_allclose(schedules.depth(0.2, 12), np.linspace(0, 0.2, 12), rtol=1e-6)
    paper = [0.5 * block / 10 for block in range(1, 11)]  # Huang et al.: p_l = l / L (1 - p_L)
    np.testing.assert_allclose(schedules.depth(0.5, 11)[1:], paper, rtol=1e-6)
    np.testing.assert_allclose(
        schedules.depth(0.3, (2, 1, 3), mode="stagewise"), [0, 0, 0.15, 0.3, 0.3, 0.3], rtol=1e-6
    )
    np.testing.assert_allclose(
        schedules.depth(np.float32(0.3), np.array([2, 1, 3])), schedules.depth(0.3, 6), rtol=1e-6
    )
    assert float(schedules.constant(schedules.depth(0.2, 3)[2])(0)) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: schedules.constant(1.5), ValueError, r"constant: rate must be in \[0, 1\], got 1.5."),
        (lambda: schedules.constant(jnp.ones(2)), TypeError, "constant: rate must be a number, got"),
        (lambda: schedules.linear(0.1, -0.2, 5), ValueError, r"linear: end must be in \[0, 1\], got -0.2."),
        (lambda: schedules.linear(0.1, 0.2, 0), ValueError, "linear: steps must be at least 1, got 0."),
        (lambda: schedules.cosine(0.1, 0.2, 5.5), TypeError, "cosine: steps must be an integer, got 5.5."),
        (lambda: schedules.early(0.1, 0), ValueError, "early: steps must be at least 1, got 0."),
        (lambda: schedules.late("no", 3), TypeError, "late: rate must be a number, got 'no'"),
        (lambda: schedules.curriculum(0.1, 0), ValueError, "curriculum: gamma must be a float32 number above 0"),
        (
            lambda: schedules.curriculum(0.1, 1e39),
            ValueError,
            "curriculum: gamma must be a float32 number above 0",
        ),
        (lambda: schedules.linear(0.1, 0.2, 2**63), ValueError, r"linear: steps must be below 2\^63, got 9223"),
        (lambda: schedules.late(0.1, 2**63), ValueError, r"late: steps must be below 2\^63, got 9223"),
        (
            lambda: schedules.cosine(0, 1, 9)(None),
            TypeError,
            "schedule: step must be a number or .*, got None",
        ),
        (lambda: schedules.early(0.1, 9)(jnp.array(1j)), TypeError, r"schedule: step must be .* got complex64\[\]"),
        (lambda: schedules.depth(0.1, (2, 0)), ValueError, "depth: blocks must be at least 1, got 0."),
        (
            lambda: schedules.depth(0.1, 3, mode="up"),
            ValueError,
            "depth: mode must be 'linear' or 'stagewise', got 'up'",
        ),
    ],
)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_steps_before_the_first_and_beyond_int32():
    for step, rates in [(-5, [0, 0.5, 0, 0]), (10, [0, 0.5, 0, 0.31606]), (4e9, [0.5, 0, 0.5, 0.5])]:
        late = [schedules.linear(0, 0.5, 2**31), schedules.early(0.5, 3 * 10**9), schedules.late(0.5, 3 * 10**9)]
        found = [float(schedule(step)) for schedule in (*late, schedules.curriculum(np.float32(0.5), np.float32(0.1)))]
        np.testing.assert_allclose(found, rates, atol=1e-5)
