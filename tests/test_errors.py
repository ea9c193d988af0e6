"""Bad input: every message, and that it comes before any computation."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dropjax
import dropjax.linen
import dropjax.nnx
from dropjax import bits
from tests.variants import VARIANTS

KEY, X = jax.random.key(0), jnp.ones((2, 3))


PLACED = {row.function: row for row in VARIANTS.values()}


everywhere = pytest.mark.parametrize("function", PLACED, ids=lambda f: f.__name__)


def raises(kind, message, function, *args, **kwargs):
    """Raises this message, eagerly and while tracing under jit; the order is the function's own."""
    name = getattr(function, "__name__", "")
    if "key, x, rate" in message:
        message = message.replace("key, x, rate", ", ".join(list(inspect.signature(function).parameters)[:3]))
    for run in [function, lambda *a, **k: jax.jit(lambda: function(*a, **k))()]:
        with pytest.raises(kind) as caught:
            run(*args, **kwargs)
        assert message in str(caught.value)
        if name in dir(dropjax):
            assert str(caught.value).startswith(f"{name}: ")


@everywhere
@pytest.mark.parametrize(
    ("rate", "kind", "message"),
    [
        (np.nan, ValueError, "rate must be in [0, 1"),
        (-0.1, ValueError, "got -0.1."),
        (1.5, ValueError, "got 1.5."),
        (np.float32(2), ValueError, "got 2.0. For a percentage, pass 0.02."),
        (30, ValueError, "got 30.0. For a percentage, pass 0.3."),
        (-np.inf, ValueError, "got -inf."),
        (np.array([[0.1], [1.1]]), ValueError, "got 1.1."),
        ("half", TypeError, "rate must be a number or a float array, got 'half' (str)."),
        (None, TypeError, "rate must be a number or a float array, got None (NoneType)."),
        (True, TypeError, "rate must be a number or a float array, got True (bool)."),
        ([0.5], TypeError, "rate must be a number or a float array, got [0.5] (list)."),
        (KEY, TypeError, "rate must be a number or a float array, got key<fry>[]. The order of the arguments is"),
        (0.5j, TypeError, "rate must be a number or a float array"),
        (np.array(True), TypeError, "rate must be a number or a float array, got bool[]."),
        (np.array([0.1, 0.2]), ValueError, "of x, got shape (2,). Add axes of length 1 until it does."),
        (
            np.full((4, 2, 3), 0.5),
            ValueError,
            "of x, got shape (4, 2, 3). The order of the arguments is key, x, rate.",
        ),
    ],
    ids=str,
)
def test_rate(function, rate, kind, message):
    name = list(inspect.signature(function).parameters)[2]
    above_one = message.startswith("got ") and np.min(rate) > 0
    if not (above_one and "range" in PLACED[function].not_for):
        raises(
            kind,
            message.replace("in [0, 1", "in [0").replace("rate must", f"{name} must"),
            function,
            KEY,
            X,
            rate,
        )


def test_rate_in_concrete_jax_array():
    with pytest.raises(ValueError, match=r"dropout: rate must be in \[0, 1\], got 1.5."):
        dropjax.dropout(KEY, X, jnp.float32(1.5))


def test_rate_traced_that_does_not_broadcast():
    with pytest.raises(ValueError, match=r"dropout: rate must broadcast against the shape \(2, 3\) of x"):
        jax.jit(lambda rate: dropjax.dropout(KEY, X, rate))(jnp.zeros(2))


def test_rate_one_of_gaussian_dropout():
    for rate in [1.0, 1 - 1e-12, np.float32(1)]:  # rounded to float32 first
        raises(ValueError, "rate must be in [0, 1), got", dropjax.gaussian_dropout, KEY, X, rate)


@everywhere
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.ones((2, 3), jnp.int32), "x must be a float or complex array, got int32[2,3]."),
        (np.ones((2, 3), bool), "x must be a float or complex array, got bool[2,3]."),
        (3, "x must be a float or complex array, got int32[]."),
        ([1.0, 2.0], "x must be a float or complex array, got [1.0, 2.0] (list). Convert it with jnp.asarray."),
        (None, "x must be a float or complex array, got None (NoneType)."),
        (KEY, "x must be a float or complex array, got key<fry>[]. The order of the arguments is key, x, rate."),
        (jnp.ones((2, 3), jnp.float8_e8m0fnu), "x must have a dtype with a zero and a NaN, got float8_e8m0fnu[2,3]."),
    ],
    ids=str,
)
def test_x(function, x, message):
    raises(TypeError, message, function, KEY, x, 0.5)


def test_integer_x_names_the_remedy():
    raises(TypeError, "convert with x.astype(jnp.float32)", dropjax.dropout, KEY, jnp.arange(3), 0.5)


def test_complex_alpha_dropout():
    raises(
        TypeError,
        "x must be a real float array, got complex64[2]",
        dropjax.alpha_dropout,
        KEY,
        jnp.ones(2, jnp.complex64),
        0.5,
    )


@everywhere
@pytest.mark.parametrize(
    ("key", "kind", "message"),
    [
        (0, TypeError, "key must be a JAX random key, got 0. Make one with jax.random.key(0)."),
        (nnx.Rngs(0), TypeError, "key must be a JAX random key, got a value (Rngs). Call the stream for a key, rngs."),
        (None, TypeError, "key must be a JAX random key, got None (NoneType)."),
        (np.ones((2, 3), np.float32), TypeError, "got float32[2,3]. The order of the arguments is key, x, rate."),
        (jax.random.split(KEY, 3), ValueError, "key must be one key, got an array of keys of shape (3,)."),
        (jax.random.PRNGKey(0)[None], ValueError, "key must be one key, got an array of keys of shape (1,)."),
        (np.zeros(3, np.uint32), ValueError, "key must be one key of 1, 2 or 4 words, got uint32[3]."),
        (np.uint32(3), ValueError, "key must be one key of 1, 2 or 4 words, got uint32[]."),
        (np.zeros(2, np.int32), TypeError, "key must be a JAX random key, got int32[2]."),
    ],
    ids=["int", "Rngs", "None", "array", "keys", "legacy keys", "three words", "scalar word", "signed"],
)
def test_key(function, key, kind, message):
    raises(kind, message, function, key, X, 0.5)


@pytest.mark.parametrize(
    ("dims", "kind", "message"),
    [
        ((2,), ValueError, "broadcast_dims must be in [-2, 2) for rank 2, got 2."),
        ((-3,), ValueError, "broadcast_dims must be in [-2, 2) for rank 2, got -3."),
        ((0, -2), ValueError, "broadcast_dims must name each dimension once, got (0, -2)."),
        ((0.5,), TypeError, "broadcast_dims must name dimensions by integers, got 0.5."),
        ((True,), TypeError, "broadcast_dims must name dimensions by integers, got True (bool)."),
        ("01", TypeError, "broadcast_dims must be a sequence of dimensions, got '01' (str)."),
        (None, TypeError, "broadcast_dims must be a sequence of dimensions, got None (NoneType)."),
    ],
)
def test_broadcast_dims(dims, kind, message):
    for function in [dropjax.dropout, dropjax.gaussian_dropout, dropjax.alpha_dropout]:
        raises(kind, message, function, KEY, X, 0.5, broadcast_dims=dims)
    raises(kind, message, dropjax.keep_mask, KEY, (2, 3), 0.5, broadcast_dims=dims)


def test_axes_of_spatial_dropout():
    raises(
        ValueError,
        "channel_axis must be in [-2, 2) for rank 2, got 2.",
        dropjax.spatial_dropout,
        KEY,
        X,
        0.5,
        channel_axis=2,
    )
    raises(
        ValueError, "channel_axis must not be one of batch_axes, got 0 and (0,).",
        dropjax.spatial_dropout, KEY, X, 0.5, channel_axis=0,
    )  # fmt: skip


@everywhere
@pytest.mark.parametrize(
    ("start", "kind", "message"),
    [
        ({0: 2**32 - 1}, ValueError, "indices must be below 2^32, got 4294967295 to 4294967296 along dimension 0."),
        ({-1: 2**32}, ValueError, "indices must be below 2^32, got 4294967296 to 4294967298 along dimension 1."),
        ({0: -1}, ValueError, "start[0] must not be negative, got -1."),
        ({0: 1.0}, TypeError, "start[0] must be an integer, got 1.0."),
        ({0: True}, TypeError, "start[0] must be an integer, got True (bool)."),
        ({0: jnp.zeros(2, jnp.int32)}, TypeError, "start[0] must be an integer, got int32[2]."),
        ({2: 0}, ValueError, "the dimensions of start must be in [-2, 2) for rank 2, got 2."),
        ({0: 1, -2: 1}, ValueError, "the dimensions of start must name each dimension once, got (0, -2)."),
        ((0, 4), TypeError, "start must be a mapping {dim: index}, got (0, 4) (tuple)."),
    ],
    ids=str,
)
def test_start(function, start, kind, message):
    raises(kind, message, function, KEY, X, 0.5, start=start)


def test_indices_past_two_to_the_32():
    raises(
        ValueError,
        "indices must be below 2^32, got 0 to 4294967296 along dimension 0.",
        bits.random_words,
        KEY,
        (2**32 + 1,),
    )


def test_shape():
    raises(ValueError, "shape must not be negative, got (2, -1).", dropjax.keep_mask, KEY, (2, -1), 0.5)
    raises(TypeError, "shape must be a tuple of integers, got 'ab' (str).", dropjax.keep_mask, KEY, "ab", 0.5)
    raises(TypeError, "a tuple of integers, got float32[2,3]. Pass its shape.", dropjax.keep_mask, KEY, X, 0.5)
    raises(TypeError, "random_words: shape must be a tuple of integers, got 2.5.", bits.random_words, KEY, 2.5)


def test_generator():
    raises(
        ValueError,
        "generator must be one of ('mix', 'threefry'), got 'rbg' (str).",
        dropjax.dropout,
        KEY,
        X,
        0.5,
        generator="rbg",
    )
    message = "generator must be 'mix' where start or sharded_dims is given, got 'threefry'"
    raises(ValueError, message, dropjax.dropout, KEY, X, 0.5, generator="threefry", start={0: 1})
    key = jax.random.key(0, impl="rbg")
    raises(
        ValueError, "generator='threefry' must be given a threefry key, got key<rbg>[].",
        dropjax.dropout, key, X, 0.5, generator="threefry",
    )  # fmt: skip


def test_mask_of_apply_mask():
    raises(TypeError, "mask must be a boolean array (True = kept), got float32[2,3].", dropjax.apply_mask, X, X, 0.5)
    mask = jnp.ones((4,), bool)
    raises(
        ValueError,
        "mask must broadcast against the shape (2, 3) of x, got shape (4,).",
        dropjax.apply_mask,
        X,
        mask,
        0.5,
    )


@pytest.mark.parametrize(
    ("name", "option", "before"),
    [
        ("drop_block", "whole_blocks", (X[..., None],)),
        ("drop_block", "shared_channels", (X[..., None],)),
        ("drop_path", "scale", (X,)),
        ("mask_feature", "scale", (X,)),
        ("targeted_dropout", "rescale", (X,)),
        ("token_dropout", "ordered", (X,)),
        ("drop_edge", "undirected", (np.arange(3), np.arange(3))),
    ],
)
def test_flags(name, option, before):
    function = getattr(dropjax, name)
    for value in ("False", "no", 1, None, jnp.array(True), np.array([True])):
        with pytest.raises(TypeError, match=f"{name}: {option} must be True or False, got "):
            function(KEY, *before, 0.5, **{option: value})
    for flag in (True, False):
        jax.eval_shape(lambda: function(KEY, *before, 0.5, **{option: np.bool_(flag)}))  # noqa: B023


def test_counts_are_no_flags():
    image = jnp.ones((2, 3, 1))
    raises(
        TypeError,
        "block_size must be an integer, got True (bool).",
        dropjax.drop_block,
        KEY,
        image,
        0.5,
        block_size=True,
    )
    for option in ("num_prefix_tokens", "num_keep"):
        call = dropjax.token_dropout
        raises(TypeError, f"{option} must be an integer, got True", call, KEY, X, **{"num_keep": 1, option: True})
    raises(TypeError, "num_features must be an integer, got True", dropjax.masksembles_masks, KEY, True, 2, 1.0)
    raises(
        TypeError, "nodes must be an integer, got True", dropjax.drop_node, KEY, True, np.arange(1), np.arange(1), 0.5
    )


def test_options_are_keyword_only():
    for function in PLACED:
        with pytest.raises(TypeError, match="positional argument"):
            function(KEY, X, 0.5, (0,))
