"""Names and keywords of other libraries raise errors that state ours; what is public is named in `__all__`."""

import functools
import importlib
import inspect
import pickle
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dropjax
import dropjax.linen
import dropjax.nnx
from dropjax import _names, mc
from dropjax.mc import moments, plots
from tests.test_order import CALLS

KEY, X = jax.random.key(0), np.ones((4, 3), np.float32)
PACKAGES = ["dropjax", "dropjax.linen", "dropjax.nnx", "dropjax.mc", "dropjax.functional"]
MODULES = [*_names.HOMES, moments.__name__, plots.__name__]
OURS = {name for names in _names.HOMES.values() for name in names}


def exists(path):
    """Whether `dropjax.a.b` is there."""
    thing = dropjax
    for name in path.split(".")[1:]:
        thing = getattr(thing, name)
    return thing is not None


@pytest.mark.parametrize("module", MODULES)
def test_all(module):
    """A star import binds what is public, and nothing else: no module, and nothing of JAX or Flax."""
    module = importlib.import_module(module)
    assert len(set(module.__all__)) == len(module.__all__)
    if module.__name__ in _names.HOMES:
        assert sorted(module.__all__) == sorted(_names.HOMES[module.__name__])
    bound = {}
    exec(f"from {module.__name__} import *", bound)
    assert set(bound) - {"__builtins__"} == set(module.__all__)
    assert not any(inspect.ismodule(thing) for name, thing in bound.items() if name != "__builtins__")
    for name, thing in vars(module).items():
        if name[0] != "_" and getattr(thing, "__module__", "").startswith(module.__name__) and callable(thing):
            assert name in module.__all__ or module.__name__ in ("dropjax.bits", "dropjax.sharding")


def test_submodules_are_imported_where_they_are_asked_for():
    code = """
import sys, dropjax
light = ["flax", "optax", "matplotlib", "dropjax.mc"]
assert not any(name in sys.modules for name in light)
names = ["bits", "constraints", "linen", "mc", "nnx", "schedules", "sharding", "training"]
assert set(names) <= set(dir(dropjax)) and "plots" in dir(dropjax.mc)
assert dropjax.mc.classify and dropjax.schedules.linear and "flax" not in sys.modules
assert dropjax.nnx.Dropout and dropjax.linen.Dropout and dropjax.constraints.max_norm and dropjax.training.fit
assert dropjax.mc.plots.reliability and all(getattr(dropjax, name) for name in names)
from dropjax.mc import hoisting
from dropjax import _checkpoints, functional
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("row", _names.NAMES, ids=lambda row: row.typed)
def test_names_of_other_libraries(package, row):
    module = importlib.import_module(package)
    layer = f"{'dropjax.linen' if package == 'dropjax.linen' else 'dropjax.nnx'}.{row.layer}"
    for name in row.typed.split():
        with pytest.raises(AttributeError) as caught:
            getattr(module, name)
        assert str(caught.value).startswith(f"{package} has no {name}: ")
        assert f"dropjax.{row.function}" in str(caught.value)
        assert not row.layer or layer in str(caught.value)
        with pytest.raises(ImportError) as imported:
            exec(f"from {package} import {name}")
        assert str(imported.value) == str(caught.value)
        assert not hasattr(module, name)


def test_the_rows_of_names():
    assert all(exists(f"dropjax.{row.function}") for row in _names.NAMES)
    for row in _names.NAMES:
        assert not row.layer or (hasattr(dropjax.linen, row.layer) and hasattr(dropjax.nnx, row.layer))
        assert not row.remark or row.remark.endswith(".")
    typed = [name for row in _names.NAMES for name in row.typed.split()]
    assert len(set(typed)) == len(typed)
    assert not OURS & set(typed)


@pytest.mark.parametrize("package", PACKAGES)
def test_our_names_in_another_module(package):
    """The error says where they are."""
    module = importlib.import_module(package)
    for home, names in _names.HOMES.items():
        for name in set(names) - set(dir(module)):
            with pytest.raises(AttributeError, match=rf"{package} has no {name}: it is .*{home}\.{name}\b"):
                getattr(module, name)


@pytest.mark.parametrize(
    ("package", "name", "message"),
    [
        ("dropjax", "Dropout", "it is dropjax.linen.Dropout and dropjax.nnx.Dropout, as a function dropjax.dropout."),
        ("dropjax", "SpatialDropout2D", "dropjax.nnx.SpatialDropout2D, as a function dropjax.spatial_dropout."),
        ("dropjax.linen", "dropout", "it is dropjax.dropout."),
        ("dropjax", "droput", "Did you mean dropjax.dropout?"),
        ("dropjax", "drop_paths", "Did you mean dropjax.drop_path?"),
        ("dropjax.nnx", "dropPath", "Did you mean dropjax.nnx.DropPath?"),
        ("dropjax.nnx", "Dropout_2d", "Did you mean Dropout2d? PyTorch's Dropout2d is dropjax.spatial_dropout, as"),
        ("dropjax.mc", "clasify", "Did you mean dropjax.mc.classify?"),
        ("dropjax", "clasify", "dropjax has no clasify. Did you mean classify? It is dropjax.mc.classify."),
        ("dropjax", "Cutout", "dropjax has no Cutout. Did you mean Uout? Uout is dropjax.uniform_dropout"),
        ("dropjax.nnx", "Linear", "dropjax.nnx has no Linear: it is flax.nnx.Linear."),
        ("dropjax.linen", "Dense", "dropjax.linen has no Dense: it is flax.linen.Dense."),
        ("dropjax", "something", "module 'dropjax' has no attribute 'something'"),
        ("dropjax", "__wrapped__", "module 'dropjax' has no attribute '__wrapped__'"),
    ],
)
def test_names_that_are_alike(package, name, message):
    with pytest.raises(AttributeError) as caught:
        getattr(importlib.import_module(package), name)
    assert message in str(caught.value)


TYPED = [word for row in _names.KEYWORDS for word in row.typed.split()]


HANDING_ON = [
    dropjax.linen.mc_apply, dropjax.linen.mc_draws, dropjax.nnx.mc_draws, dropjax.sharding.assert_masks_differ,
]  # fmt: skip  # their keywords, to a model or a function


@pytest.mark.parametrize(
    "function", [f for f in CALLS if f not in HANDING_ON], ids=lambda f: f"{f.__module__}.{f.__name__}"
)
def test_every_keyword_of_other_libraries(function):
    """The error names an argument of the function, or says why there is none."""
    args, options = CALLS[function]
    parameters = inspect.signature(function).parameters
    for typed in [*TYPED, "nonsense"]:
        if typed in parameters:
            continue
        with pytest.raises(TypeError) as caught:
            function(*args, **options, **{typed: 0.5})
        text = str(caught.value)
        assert text.startswith(f"{function.__name__}: got an unexpected keyword argument '{typed}'. ")
        assert any(f"It is {name} here, " in text for name in parameters) or text.endswith(
            ("do not call it.", "take what is returned.", "has the dtype of x.", "?", f"are {', '.join(parameters)}.")
        )


@pytest.mark.parametrize(
    ("function", "typed", "message"),
    [
        (dropjax.dropout, "p", "It is rate here, the probability of dropping."),
        (dropjax.drop_path, "drop_prob", "It is rate here, the probability of dropping."),
        (dropjax.dropout, "keep_prob", "It is rate here, the probability of dropping, 1 - keep_prob."),
        (dropjax.gaussian_noise, "p", "It is stddev here, the standard deviation of the noise."),
        (dropjax.gaussian_noise, "rate", "It is stddev here"),
        (dropjax.concrete_dropout, "p", "It is rate_logit here"),
        (dropjax.dropout, "training", "There is no flag: where nothing is to be dropped, do not call it."),
        (dropjax.spatial_dropout, "deterministic", "There is no flag"),
        (dropjax.spatial_dropout, "inference", "There is no flag"),
        (dropjax.drop_block, "couple_channels", "It is shared_channels here"),
        (dropjax.dropout, "noise_shape", "It is broadcast_dims here"),
        (dropjax.spatial_dropout, "noise_shape", "It is batch_axes here"),
        (dropjax.dropout, "seed", "It is key here, a JAX key, jax.random.key(0)."),
        (dropjax.dropout, "inplace", "JAX arrays do not change"),
        (dropjax.dropout, "axis", "It is broadcast_dims here"),
        (dropjax.spatial_dropout, "data_format", "It is channel_axis here, -1 for channels_last"),
        (dropjax.drop_block, "kernel_size", "It is block_size here"),
        (dropjax.drop_path, "scale_by_keep", "It is scale here"),
        (dropjax.drop_edge, "edge_index", "It is senders here"),
        (dropjax.dropout, "brodcast_dims", "Did you mean broadcast_dims?"),
        (dropjax.dropout, "nonsense", "The keywords are key, x, rate, broadcast_dims, generator, start, sharded_dims."),
        (mc.classify, "n_samples", "It is num_samples here, how many samples."),
        (mc.calibration_error, "n_bins", "It is num_bins here, how many bins."),
        (mc.brier, "y_true", "It is labels here, of the true classes."),
        (dropjax.training.fit, "epochs", "It is steps here, how many steps in all."),
        (dropjax.schedules.linear, "transition_steps", "It is steps here, how many steps."),
    ],
)
def test_keywords(function, typed, message):
    args, options = CALLS[function]
    for given in (args, args[: len(args) - 1]):  # also where it stands for one that is missing
        with pytest.raises(TypeError) as caught:
            function(*given, **options, **{typed: 0.5})
        assert message in str(caught.value)


LAYERS = [
    pytest.param(getattr(module, name), id=f"{module.__name__}.{name}")
    for module in (dropjax.linen, dropjax.nnx)
    for name in sorted(module.__all__)
    if inspect.isclass(getattr(module, name)) and issubclass(getattr(module, name), nn.Module | nnx.Module)
]
BUILT = {  # what layers are built with, where that is not a rate
    "DropConnectDense": (3, 0.5),
    "Masksembles": (2, 2.0),
    "TokenDropout": (0.5,),
    "Standout": (),
    "ConcreteDropout": (),
    "VariationalGaussianDropout": (),
    "VariationalDense": (3,),
    "SparseVariationalDense": (3,),
}


def names_ours(error, layer, typed, accepted):
    text = str(error.value)
    assert text.startswith(f"{layer.__name__}: got an unexpected keyword argument '{typed}'. ")
    return any(f"It is {name} here, " in text for name in accepted)


@pytest.mark.parametrize("layer", LAYERS)
def test_keywords_that_layers_are_built_with(layer):
    fields = inspect.signature(layer).parameters
    for typed in TYPED:
        if typed in fields or any(p.kind == p.VAR_KEYWORD for p in fields.values()):
            continue
        with pytest.raises(TypeError) as caught:
            layer(**{typed: 0.5})
        assert names_ours(caught, layer, typed, fields) or "." in str(caught.value)
    for typed, ours in {"p": ("rate", "initial_rate", "stddev", "beta"), "is_training": ("deterministic",)}.items():
        if any(name in fields for name in ours):
            with pytest.raises(TypeError) as caught:
                layer(**{typed: 0.5})
            assert names_ours(caught, layer, typed, fields)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("deterministic", [True, False])
def test_keywords_that_layers_are_called_with(layer, deterministic):
    """In training and in evaluation; wrappers hand their keywords to what they wrap."""
    linen, name = layer.__module__.startswith("dropjax.linen"), layer.__name__
    if name in ("LayerDrop", "WeightDrop"):
        inner = nn.Dense(3) if linen else nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        built = layer(inner, 0.5, **({} if name == "LayerDrop" else {"names": "*kernel"}))
    else:
        sizes = BUILT.get(name, (0.5,))
        own = name in ("DropConnectDense", "Masksembles", "VariationalDense", "SparseVariationalDense") and not linen
        built = layer(*((3, *sizes) if own else sizes), **({"rngs": nnx.Rngs(0)} if own else {}))
    inputs = (X, X) if name == "Standout" else (X,)
    taken = inspect.signature(type(built).__call__).parameters
    decided = {"deterministic": deterministic} if "deterministic" in taken else {}
    decided |= {"rngs": KEY} if name in ("LayerDrop", "WeightDrop") and not linen else {}
    for typed in ["training", "seed", "nonsense"]:
        call = functools.partial(built.init, {"params": KEY, "dropout": KEY}) if linen else built
        with pytest.raises(TypeError, match=typed) as caught:
            call(*inputs, **decided, **{typed: 0.5})
        if not any(p.kind == p.VAR_KEYWORD for p in taken.values()):
            ours = {"training": "deterministic", "seed": "rng" if linen else "rngs"}.get(typed)
            assert names_ours(caught, layer, typed, taken) == (ours in taken)


def test_several_keywords():
    with pytest.raises(TypeError) as caught:
        dropjax.dropout(KEY, X, p=0.5, training=True, nonsense=3)
    assert str(caught.value) == (
        "dropout: got an unexpected keyword argument 'p' and 'training', 'nonsense'. p is rate here, the probability "
        "of dropping. There is no flag: where nothing is to be dropped, do not call it. The keywords are key, x, rate, "
        "broadcast_dims, generator, start, sharded_dims."
    )


def test_keywords_are_typed_once():
    assert len(set(TYPED)) == len(TYPED)


@pytest.mark.parametrize("function", CALLS, ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_public_functions_are_as_they_were(function):
    """They pickle, and show their signature and documentation."""
    plain = inspect.unwrap(function)
    assert plain is not function
    assert pickle.loads(pickle.dumps(function)) is function
    assert inspect.signature(function) == inspect.signature(plain)
    assert (function.__name__, function.__doc__) == (plain.__name__, plain.__doc__)


def test_programs_are_as_they_were():
    plain, args = inspect.unwrap(dropjax.dropout), (KEY, X, 0.5)
    assert str(jax.make_jaxpr(dropjax.dropout)(*args)) == str(jax.make_jaxpr(plain)(*args))
    jitted = jax.jit(dropjax.dropout, static_argnames=("broadcast_dims", "generator"))
    np.testing.assert_array_equal(jitted(*args, broadcast_dims=(1,)), plain(*args, broadcast_dims=(1,)))
    keys = jax.random.split(KEY, 2)
    mapped = jax.vmap(dropjax.dropout, (0, None, None))(keys, X, 0.5)
    np.testing.assert_array_equal(mapped, jnp.stack([plain(key, X, 0.5) for key in keys]))


def test_errors_inside_are_not_taken_for_errors_of_the_call():
    def fn(x):
        raise TypeError("fn got an unexpected keyword argument 'p'")

    with pytest.raises(TypeError, match=r"^fn got an unexpected keyword argument 'p'"):
        dropjax.layer_drop(KEY, fn, X, 0.5)
    with pytest.raises(KeyError, match=r"^'missing'"):
        mc.sample(lambda key: {}["missing"], KEY, 2)


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((KEY, X, 1.5), {}),
        ((KEY, X, np.full((2,), 0.5, np.float32)), {}),
        ((KEY, np.arange(3), 0.5), {}),
        ((KEY, [1.0], 0.5), {}),
        ((0, X, 0.5), {}),
        ((KEY, X, [0.5]), {}),
        ((KEY, X, 0.5), {"broadcast_dims": (5,)}),
        ((KEY, X, 0.5), {"start": {0: -1}}),
    ],
)
def test_the_order_is_stated_only_where_it_may_help(args, options):
    with pytest.raises((TypeError, ValueError)) as caught:
        dropjax.dropout(*args, **options)
    assert "order" not in str(caught.value)


def test_the_order_is_stated_where_an_array_is_given_for_the_key():
    """As in the libraries whose functions begin with x."""
    for function, args in [
        (dropjax.dropout, (X, 0.5, True)),
        (dropjax.drop_block, (X, 0.1, 7)),
        (dropjax.token_dropout, (X, 0.5)),
        (dropjax.embedding_dropout, (X, np.array([0]), 0.1)),
        (dropjax.standout, (X, X, X)),
    ]:
        order = rf"^{function.__name__}: .* The order of the arguments is key, x"
        with pytest.raises((TypeError, ValueError), match=order):
            function(*args)


def test_missing_and_extra_arguments():
    with pytest.raises(
        TypeError, match=r"^dropout: rate must be given, got none. The order of the arguments is key, x"
    ):
        dropjax.dropout(X, 0.5)
    with pytest.raises(TypeError, match=r"too many positional arguments. The order of the arguments is key, x, rate\."):
        dropjax.dropout(KEY, X, 0.5, (0,))
    with pytest.raises(TypeError, match=r"is loss_fn, state, optimizer, data, and by keyword seed, steps."):
        dropjax.training.fit(lambda state, batch, key: 0.0, X)


def test_warnings_point_at_the_line_of_the_call():
    labels = np.array([0, 1, 1])
    for call in [
        lambda: mc.sample(lambda key: X, KEY, 2),
        lambda: mc.classify(lambda key: X + jnp.inf * dropjax.dropout(key, X, 0.5), KEY, 2),
        lambda: mc.regress(lambda key: X + jnp.inf * dropjax.dropout(key, X, 0.5), KEY, 2),
        lambda: mc.fit_temperature(np.log(np.array([[0.9, 0.1], [0.1, 0.9], [0.1, 0.9]])), labels),
    ]:
        with pytest.warns(UserWarning, match=": ") as caught:
            call()
        assert {warning.filename for warning in caught} == {__file__}
