"""What every variant promises, over all rows of tests/variants.py."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dropjax
from tests.variants import VARIANTS

RATE = 0.3
SHAPE = (5, 4, 6)

every = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


def having(prop):
    """All rows but those whose row says why the property is not for them."""
    rows = {name: row for name, row in VARIANTS.items() if prop not in row.not_for}
    return pytest.mark.parametrize("variant", rows.values(), ids=rows.keys())


def inputs(shape=SHAPE, dtype=jnp.float32):
    return (jnp.asarray(np.random.default_rng(3).normal(size=shape)) + 2).astype(dtype)


def draw(variant, key, x, rate=RATE, **more):
    return variant.function(key, x, rate, **variant.options, **more)


def assert_same(variant, a, b, x, rate=RATE):
    """Bit for bit, or within 4 ulp of the largest term (docs/bits.md) where compilers may contract."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    if variant.exact:
        np.testing.assert_array_equal(a, b)
    else:
        largest = np.maximum(np.abs(a), np.abs(np.asarray(x)) + 2)  # x, SELU's saturation value, and y
        assert (np.abs(a - b) <= 4 * np.spacing(largest.astype(a.dtype))).all()


@every
def test_matches_its_oracle(variant, key):
    x = inputs((3, 4, 5))
    expected = variant.oracle(jax.random.key_data(key), np.asarray(x), RATE, variant.options)
    if variant.exact:
        np.testing.assert_array_equal(draw(variant, key, x), expected)
    else:
        np.testing.assert_allclose(draw(variant, key, x), expected, rtol=2e-5, atol=2e-6)


@every
def test_same_key_same_result_and_other_key_other_result(variant, key):
    x = inputs()
    np.testing.assert_array_equal(draw(variant, key, x), draw(variant, key, x))
    assert any((draw(variant, key, x) != draw(variant, jax.random.key(seed), x)).any() for seed in range(30, 40))


@every
def test_legacy_key_draws_what_the_typed_key_draws(variant, key):
    x = inputs()
    np.testing.assert_array_equal(draw(variant, key, x), draw(variant, jax.random.key_data(key), x))


@every
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_mean_and_variance_are_those_of_the_theory(variant, rate):
    """Sample moments of n draws lie within 6 standard errors, which the theory's moments give."""
    n, x = 20_000, inputs((2, 3, 4))
    keys = jax.random.split(jax.random.key(5), n)
    y = np.asarray(jax.jit(jax.vmap(lambda key: draw(variant, key, x, rate)))(keys), np.float64)
    mean, variance, fourth = variant.moments(np.asarray(x, np.float64), rate)
    assert (np.abs(y.mean(0) - mean) < 6 * np.sqrt(variance / n)).all()
    deviation = ((y - mean) ** 2).mean(0) - variance
    rounding = 8 * np.abs(y).max(0) ** 2 * 2.0**-24  # of y to float32, all that is left where |y - mean| is constant
    assert (np.abs(deviation) < 6 * np.sqrt((fourth - variance**2) / n) + rounding).all()


@every
def test_jit_equals_eager(variant, key):
    x = inputs()
    assert_same(variant, jax.jit(lambda key, x: draw(variant, key, x))(key, x), draw(variant, key, x), x)


@pytest.mark.slow
@every
@pytest.mark.parametrize("rate", [0.0, 1 / 3, 0.999])
def test_traced_rate_equals_number(variant, key, rate):
    x = inputs()
    traced = jax.jit(lambda rate: draw(variant, key, x, rate))(jnp.float32(rate))
    assert_same(variant, traced, draw(variant, key, x, rate), x)


@every
def test_rates_of_all_kinds_agree(variant, key):
    x = inputs()
    whole = variant.whole_rate or SHAPE
    for rate in [np.float32(RATE), np.float64(RATE), np.array(RATE), jnp.float32(RATE), jnp.full(whole, RATE)]:
        assert_same(variant, draw(variant, key, x, rate), draw(variant, key, x), x)


@every
def test_rate_zero_is_the_identity(variant, key):
    x = inputs()
    for rate in [0, 0.0, jnp.float32(0)]:
        np.testing.assert_array_equal(draw(variant, key, x, rate), x)


@having("rate_one")
def test_rate_one_is_zero(variant, key):
    x = inputs().at[0, 0, 0].set(jnp.inf)
    for rate in [1, 1.0, jnp.float32(1)]:
        y = draw(variant, key, x.at[0, 0, 0].set(1), rate)
        np.testing.assert_array_equal(y, jnp.zeros_like(x))


@pytest.mark.slow
@every
def test_values_and_gradients_are_finite_at_the_limits(variant, key):
    x = inputs()
    highest = np.float32(1) if "rate_one" not in variant.not_for else np.nextafter(np.float32(1), np.float32(0))
    for rate in [0.0, float(highest), jnp.float32(0), jnp.asarray(highest)]:
        y, gradient = jax.value_and_grad(lambda x: draw(variant, key, x, rate).sum())(x)  # noqa: B023
        assert jnp.isfinite(y)
        assert jnp.isfinite(gradient).all()
    gradient = jax.grad(lambda rate: draw(variant, key, x, rate).sum())(jnp.float32(0.5))
    assert gradient == 0  # the rate is not differentiated


@having("range")
def test_traced_rate_out_of_range_is_nan(variant, key):
    x, call = inputs(), jax.jit(lambda key, x, rate: draw(variant, key, x, rate))
    for rate in [np.nan, -0.5, 1.5, np.inf]:
        assert jnp.isnan(call(key, x, jnp.float32(rate))).all()
        if variant.whole_rate != (1, 1, 1):
            y = call(key, x, jnp.full((5, 1, 1), 0.5).at[2].set(rate))
            assert jnp.isnan(y[2]).all()
            assert jnp.isfinite(y[:2]).all()


@having("linear")
def test_gradient_is_the_mask_times_the_scale(variant, key):
    x = inputs()
    gradient = jax.grad(lambda x: draw(variant, key, x).sum())(x)
    assert_same(variant, gradient, draw(variant, key, jnp.ones_like(x)), jnp.ones_like(x))


def test_gradient_of_alpha_dropout_is_its_scale_where_kept(key):
    x = inputs()
    gradient = jax.grad(lambda x: dropjax.alpha_dropout(key, x, RATE).sum())(x)
    a = ((1 - RATE) * (1 + RATE * 1.7580993408473766**2)) ** -0.5
    np.testing.assert_allclose(gradient, np.where(dropjax.keep_mask(key, SHAPE, RATE), a, 0), rtol=1e-6)


@every
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4, 2), (2, 3, 0, 5)])
def test_empty_arrays(variant, key, shape):
    axes = {"channel_axis", "head_axis"} & set(inspect.signature(variant.function).parameters)
    options = {k: v for k, v in variant.options.items() if k in axes | {"targeted"}}
    x = jnp.zeros(shape)
    if axes and len(shape) == 1:
        options = {**options, **dict.fromkeys(axes, 0), "batch_axes": ()}
    assert variant.function(key, x, RATE, **options).shape == shape


@having("scalar")
def test_scalars(variant, key):
    y = jax.vmap(lambda key: variant.function(key, jnp.float32(2), 0.5))(jax.random.split(key, 64))
    assert len(np.unique(y)) >= 2
    assert variant.function(key, 2.0, 0.5).dtype == jnp.float32


FLOATS = ["float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e3m4"]


@pytest.mark.slow
@every
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtype_is_kept_and_rounded_once(variant, key, dtype):
    """Narrow floats give what float32 gives, rounded to the dtype."""
    x = inputs(dtype=jnp.dtype(dtype))
    y = draw(variant, key, x)
    assert y.dtype == x.dtype
    wide = np.asarray(draw(variant, key, x.astype(jnp.float32)))
    if variant.exact:
        np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(wide.astype(x.dtype), np.float32))
    else:
        one_step = jnp.finfo(x.dtype).eps * np.maximum(np.abs(wide), float(jnp.finfo(x.dtype).tiny) * 4)
        assert (np.abs(np.asarray(y, np.float32) - wide) <= np.asarray(one_step, np.float32)).all()


@having("complex")
@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_complex(variant, key, dtype):
    with jax.enable_x64(dtype == "complex128"):
        x = inputs().astype(dtype) * 1j
        y = draw(variant, key, x)
        assert y.dtype == dtype
        real = draw(variant, key, inputs())  # a factor 1 + noise near 0 is rounded as 1 and the noise are
        np.testing.assert_allclose(y.imag, real, rtol=1e-6, atol=4 * np.finfo(np.float32).eps * np.abs(inputs()).max())
        assert (y.real == 0).all()


@every
def test_float64_and_x64_draw_the_same(variant, key):
    x = inputs()
    expected = draw(variant, key, x)
    with jax.enable_x64(True):
        assert_same(variant, draw(variant, key, np.asarray(x)), expected, x)
        y = draw(variant, key, np.asarray(x, np.float64), np.float64(RATE))
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
        if variant.exact and "scale" not in variant.not_for:
            kept = np.asarray(y != 0)
            realised = 1 - round(float(np.float32(RATE)) * 2**32) / 2**32
            np.testing.assert_allclose(y, np.where(kept, np.asarray(x, np.float64) / realised, 0), rtol=1e-15)
            np.testing.assert_array_equal(draw(variant, key, np.asarray(x, np.float64), jnp.float32(RATE)), y)


def along(*dims):
    """Rows and dimensions, but for those along which a row says that its pieces depend on each other."""
    cases = [(row, d) for row in VARIANTS for d in dims if f"dim {d}" not in VARIANTS[row].not_for]
    return pytest.mark.parametrize(("variant", "dim"), [pytest.param(VARIANTS[r], d, id=f"{r}-{d}") for r, d in cases])


@along(0, 1, 2, -1)
def test_pieces_are_parts_of_the_whole(variant, key, dim):
    x = inputs((6, 4, 8))
    whole = draw(variant, key, x)
    half = x.shape[dim] // 2
    first, second = jnp.split(x, [half], axis=dim)
    traced = jax.jit(lambda index, x: draw(variant, key, x, start={dim: index}))
    pieces = [draw(variant, key, first, start={dim: 0}), traced(half, second)]
    assert_same(variant, jnp.concatenate(pieces, axis=dim), whole, x)


@along(0, 1, 2)
def test_growing_any_dimension_keeps_what_was_there(variant, key, dim):
    x = inputs()
    grown = jnp.concatenate([x, x], axis=dim)
    part = jax.lax.slice_in_dim(draw(variant, key, grown), 0, x.shape[dim], axis=dim)
    assert_same(variant, part, draw(variant, key, x), x)


@every
def test_a_rate_per_example(variant, key):
    x = inputs()
    rates = jnp.array([0.0, 0.2, 0.4, 0.6, 0.8])
    if variant.whole_rate == (1, 1, 1):
        with pytest.raises(ValueError, match="rate must be the same in a branch that is dropped"):
            draw(variant, key, x, rates[:, None, None])
        return
    y = draw(variant, key, x, rates[:, None, None])
    for i, rate in enumerate(rates):
        assert_same(variant, y[i], draw(variant, key, x, rate)[i], x[i])


@every
def test_a_rate_along_any_dimension_or_an_error_where_it_would_drop_parts(variant, key):
    x, r = inputs(), inspect.signature(variant.function).parameters
    for d, length in enumerate(SHAPE):
        rates = jnp.linspace(0, 0.5, length).reshape([-1 if i == d else 1 for i in range(3)])
        if (variant.whole_rate or SHAPE)[d] == 1:
            with pytest.raises(ValueError, match=rf"{list(r)[2]} must be the same in .* got shape \("):
                draw(variant, key, x, rates)
        else:
            first = jnp.take(draw(variant, key, x, rates), 0, d)
            assert_same(variant, first, jnp.take(draw(variant, key, x, 0.0), 0, d), first)


@every
def test_no_retrace_when_only_the_rate_changes(variant, key):
    x = inputs()
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(lambda rate: draw(variant, key, x, rate), n=1))
    for rate in [0.0, 0.1, 0.5]:
        step(jnp.float32(rate))


@pytest.mark.slow
@every
def test_symbolic_shapes_export(variant, key):
    (b,) = jax.export.symbolic_shape("b")
    shapes = jax.ShapeDtypeStruct((b, 4, 6), jnp.float32)
    for rate in [RATE, jnp.full((4, 1), RATE) if variant.whole_rate is None else jnp.full((1, 1), RATE)]:
        exported = jax.export.export(jax.jit(lambda x: draw(variant, key, x, rate)))(shapes)  # noqa: B023
        assert_same(variant, exported.call(inputs()), draw(variant, key, inputs()), inputs())
