"""Keys of Linen layers: each path has its own, under every transform, whatever Flax makes of the path."""

import hashlib
import json

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dropjax
import dropjax.linen
from tests.linen_layers import LAYERS, build, inputs
from tests.variants import VARIANTS

pytestmark = pytest.mark.usefixtures("quick_compiler")

KEY, X = jax.random.key(0), jnp.ones(64)
PAIR = ("ab", "cdef"), ("abc", "def")  # one path to Flax, which joins the names


class Child(nn.Module):
    """A module that calls another one, under a name."""

    make: type
    inner: str
    fields: dict

    @nn.compact
    def __call__(self, *inputs):
        return self.make(**self.fields, name=self.inner)(*inputs)


class Tree(nn.Module):
    """Modules at paths of two names, each under a child of its own."""

    make: type
    paths: tuple = PAIR
    fields: dict = flax.core.FrozenDict(rate=0.5, deterministic=False)
    child: type = Child

    @nn.compact
    def __call__(self, *inputs):
        return [self.child(self.make, inner, self.fields, name=name)(*inputs) for name, inner in self.paths]


def masks(paths=PAIR, make=dropjax.linen.Dropout, key=KEY, **options):
    return Tree(make, paths, **options).apply({}, X, rngs={"dropout": key})


class Stream(nn.Module):
    """What `make_rng` returns, for each call."""

    calls: int = 1

    def __call__(self, x):
        return [self.make_rng("dropout") for _ in range(self.calls)][-1]


def word(path):
    return int.from_bytes(hashlib.sha256(json.dumps(path).encode()).digest()[:4], "little")


@pytest.mark.parametrize("separator", [False, True])
def test_the_path_is_folded_into_the_key_of_flax(separator):
    before = flax.config.flax_fix_rng_separator
    flax.config.update("flax_fix_rng_separator", separator)
    try:
        found, keys = masks(), masks(make=Stream, fields={})
    finally:
        flax.config.update("flax_fix_rng_separator", before)
    for path, mask, key in zip(PAIR, found, keys, strict=True):
        np.testing.assert_array_equal(mask, dropjax.dropout(jax.random.fold_in(key, word(path)), X, 0.5))
    assert (found[0] != found[1]).any()
    assert separator or keys[0] == keys[1]  # what this is for


def test_the_root_and_each_call_have_keys_of_their_own():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = dropjax.linen.Dropout(0.5, deterministic=False, name="layer")
            return layer(x), layer(x), layer(x, rng=KEY), layer(x)

    first, second, given, third = Twice().apply({}, X, rngs={"dropout": KEY})
    assert (first != second).any()
    assert (first != third).any()
    np.testing.assert_array_equal(given, dropjax.dropout(KEY, X, 0.5))
    root = dropjax.linen.Dropout(0.5, deterministic=False).apply({}, X, rngs={"dropout": KEY})
    key = Stream().apply({}, X, rngs={"dropout": KEY})
    np.testing.assert_array_equal(root, dropjax.dropout(jax.random.fold_in(key, word(())), X, 0.5))


def test_many_layers_have_as_many_masks():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return [dropjax.linen.Dropout(0.5, deterministic=False, name=str(j))(x) for j in range(12)]

    class Blocks(nn.Module):
        @nn.compact
        def __call__(self, x):
            return [Block(name=f"block{i}")(x) for i in range(12)]

    found = jax.tree.leaves(Blocks().apply({}, X, rngs={"dropout": KEY}))
    assert len({np.asarray(mask).tobytes() for mask in found}) == len(found) == 144


@pytest.mark.parametrize(
    "pair",
    [
        ("a/b", "c", "a", "b/c"),
        ("", "a", "a", ""),
        ('a","b', "c", "a", 'b","c'),
        ("jit(a", "b", "jit(", "ab"),
        ("ä", "\0b", "ä\0", "b"),
        ("1", "23", "12", "3"),
    ],
)
def test_names_may_hold_anything(pair):
    first, second = masks((pair[:2], pair[2:]))
    assert (first != second).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_draws_by_its_path(name):
    """From the same parameters, over 16 keys, since some draw but one bit."""
    args, keys = inputs(name), jax.random.split(KEY, 16)
    options = {} if name == "Masksembles" else {"deterministic": False}
    model = Tree(lambda name, **fields: build(fields.pop("of"), name=name, **fields), fields={"of": name, **options})
    if name == "Masksembles":
        first, second = jax.vmap(lambda key: model.init_with_output({"params": key}, *args)[0])(keys)
    else:
        variables = model.init({"params": KEY, "dropout": KEY}, *args)
        variables = {kind: {"ab": of["ab"], "abc": {"def": of["ab"]["cdef"]}} for kind, of in variables.items()}
        first, second = jax.vmap(lambda key: model.apply(variables, *args, rngs={"dropout": key}))(keys)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


GENERATORS = sorted({row.layer for row in VARIANTS.values() if hasattr(getattr(dropjax.linen, row.layer), "generator")})


@pytest.mark.parametrize("name", GENERATORS)
def test_threefry_keeps_the_keys_of_flax(name):
    layer = getattr(dropjax.linen, name)
    model = Tree(layer, fields={"rate": 0.5, "deterministic": False, "generator": "threefry"})
    first, second = model.apply({}, jnp.ones((4, 8)), rngs={"dropout": KEY})
    np.testing.assert_array_equal(first, second)
    (key, _) = masks(make=Stream, fields={})
    np.testing.assert_array_equal(first, layer._function(key, jnp.ones((4, 8)), 0.5, generator="threefry"))


class Step(Child):
    """A child that is scanned over."""

    @nn.compact
    def __call__(self, x, *_):
        return x, self.make(**self.fields, name=self.inner)(x)


def rows(outputs):
    return [y[1] if isinstance(y, tuple) else y for y in outputs]


@pytest.mark.parametrize(
    "child",
    [
        nn.remat(Child),
        nn.fold_rngs(Child),
        nn.vmap(Child, in_axes=None, axis_size=3, split_rngs={"dropout": True}),
        nn.vmap(Child, in_axes=None, axis_size=3, split_rngs={"dropout": False}),
        nn.scan(Step, length=3, split_rngs={"dropout": True}),
        nn.scan(Step, length=3, split_rngs={"dropout": False}),
        nn.remat(nn.scan(nn.remat(Step), length=3, split_rngs={"dropout": True})),
    ],
    ids=["remat", "fold_rngs", "vmap", "vmap shared", "scan", "scan shared", "remat scan remat"],
)
def test_transforms_keep_the_path(child):
    """The whole path is folded in, and rows are the same where Flax's keys are."""
    found = rows(masks(child=child))
    keys = [key.ravel() for key in rows(masks(make=Stream, fields={}, child=child))]
    for path, mask, of_path in zip(PAIR, found, keys, strict=True):
        expected = [dropjax.dropout(jax.random.fold_in(key, word(path)), X, 0.5) for key in of_path]
        np.testing.assert_array_equal(mask.reshape(-1, 64), expected)
    assert (found[0] != found[1]).any()


def test_branches_keep_the_path():
    class Branches(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = [Child(dropjax.linen.Dropout, inner, Tree.fields, name=name) for name, inner in PAIR]
            for layer in layers:
                layer(x)  # makes them outside the branches
            return [nn.cond(True, lambda _, layer=layer: layer(x), lambda _: x, self) for layer in layers]

    first, second = Branches().apply({}, X, rngs={"dropout": KEY})
    assert (first != second).any()


@pytest.mark.parametrize(
    "wrap", [nn.jit, lambda module: nn.remat(nn.jit(module)), lambda module: nn.jit(nn.remat(module))]
)
def test_jitted_modules_draw_what_they_draw_alone(wrap):
    """Modules of one configuration share a trace, of the first one's path; each has a key of its own."""

    class Blocks(nn.Module):
        names: tuple
        block: type

        @nn.compact
        def __call__(self, x):
            return [self.block(dropjax.linen.Dropout, name=name)(x) for name in self.names]

    def draw(*names, block):
        return dict(zip(names, Blocks(names, block).apply({}, X, rngs={"dropout": KEY}), strict=True))

    block = wrap(Tree)
    both = draw("x", "y", block=block)
    assert len({np.asarray(mask).tobytes() for of in both.values() for mask in of}) == 4
    alone = draw("y", block=wrap(Tree))
    np.testing.assert_array_equal(both["y"], alone["y"])
    np.testing.assert_array_equal(draw("y", block=block)["y"], alone["y"])


def test_modules_of_a_shared_scope_a_clone_and_a_list():
    class Shared(nn.Module):
        def setup(self):
            self.first, self.second = (dropjax.linen.Dropout(0.5, deterministic=False) for _ in range(2))
            self.listed = [dropjax.linen.Dropout(0.5, deterministic=False) for _ in range(2)]
            self.mapped = {"a": dropjax.linen.Dropout(0.5, deterministic=False)}
            self.cloned = dropjax.linen.Dropout(0.5, deterministic=False).clone()
            nn.share_scope(self, self.first)

        def __call__(self, x):
            return [layer(x) for layer in [self.first, self.second, *self.listed, self.mapped["a"], self.cloned]]

    found = Shared().apply({}, X, rngs={"dropout": KEY})
    assert len({np.asarray(mask).tobytes() for mask in found}) == 6


@pytest.mark.parametrize("generator", ["mix", "threefry"])
def test_dropout_of_flax_inside_replace_flax(generator):
    with dropjax.linen.replace_flax(generator):
        found, keys = masks(make=nn.Dropout), masks(make=Stream, fields={})
    for path, mask, key in zip(PAIR, found, keys, strict=True):
        key = key if generator == "threefry" else jax.random.fold_in(key, word(path))
        np.testing.assert_array_equal(mask, dropjax.dropout(key, X, 0.5, generator=generator))


@pytest.mark.parametrize("make", [nn.Dropout, dropjax.linen.Dropout])
def test_monte_carlo_draws_by_the_path(make):
    first, second = dropjax.linen.mc_apply(Tree(make, fields={"rate": 0.5, "deterministic": True}), {}, KEY, X)
    assert (first != second).any()
