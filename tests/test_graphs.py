"""Dropout of graphs: decisions belong to nodes and pairs of nodes, not to where they stand in an array."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy import stats

import dropjax
from dropjax import sharding
from tests import oracle
from tests.test_errors import KEY, raises

pytestmark = pytest.mark.usefixtures("quick_compiler")
RATE = 0.3
EDGES = np.random.default_rng(4).integers(0, 12, (2, 64))  # with parallel edges, both directions, and self loops
SENDERS, RECEIVERS = jnp.asarray(EDGES)


def kept(key, *place):
    """Whether the word at a place is not below the threshold, from the contract in Python integers."""
    words = [int(k) for k in jax.random.key_data(key)]
    return oracle.word(words, [int(i) for i in place]) >= oracle.threshold(RATE)


def test_edges_match_their_oracle(key):
    u, v = EDGES
    directed = [kept(key, *pair) for pair in zip(u, v, strict=True)]
    undirected = [kept(key, min(pair), max(pair)) for pair in zip(u, v, strict=True)]
    ids = np.arange(64) % 3
    relations = [kept(key, *place) for place in zip(u, v, ids, strict=True)]
    for options, expected in [
        ({}, directed),
        ({"undirected": True}, undirected),
        ({"edge_ids": jnp.asarray(ids)}, relations),
    ]:
        mask = dropjax.drop_edge(key, SENDERS, RECEIVERS, RATE, **options)
        assert mask.dtype == jnp.bool_
        np.testing.assert_array_equal(mask, expected)
        assert 0 < mask.sum() < 64
    np.testing.assert_array_equal(dropjax.drop_edge(key, SENDERS, RECEIVERS, 0), np.ones(64, bool))
    np.testing.assert_array_equal(dropjax.drop_edge(key, SENDERS, RECEIVERS, 1.0), np.zeros(64, bool))


def test_both_directions_of_a_pair_have_one_decision_wherever_they_stand(key):
    nodes = np.arange(40)
    u, v = (a.ravel() for a in np.meshgrid(nodes, nodes, indexing="ij"))
    shuffled = np.random.default_rng(1).permutation(u.size)
    back = np.argsort(shuffled)
    drop = jax.jit(lambda u, v: dropjax.drop_edge(key, u, v, RATE, undirected=True))
    mask = np.asarray(drop(u, v)).reshape(40, 40)
    np.testing.assert_array_equal(mask, mask.T)
    np.testing.assert_array_equal(np.asarray(drop(u[shuffled], v[shuffled]))[back], mask.ravel())
    np.testing.assert_array_equal(drop(v, u), mask.ravel())
    directed = np.asarray(dropjax.drop_edge(key, u, v, RATE)).reshape(40, 40)
    np.testing.assert_array_equal(np.triu(directed), np.triu(mask))  # where u <= v both have the same place
    assert (directed != directed.T).any()


def test_the_number_of_kept_edges_is_binomial(key):
    """Within 6 standard deviations sqrt(n q (1 - q)) of n q, for edges, and for pairs where they are undirected."""
    u, v = np.nonzero(~np.eye(200, dtype=bool))
    for undirected, n in [(False, 200 * 199), (True, 200 * 199 / 2)]:
        number = int(dropjax.drop_edge(key, u, v, RATE, undirected=undirected).sum()) * n / len(u)
        assert abs(number - n * 0.7) < 6 * np.sqrt(n * 0.7 * 0.3)


def pattern_statistic(masks, q):
    """The chi-square statistic of all patterns of three decisions against independent ones."""
    patterns = list(itertools.product([False, True], repeat=3))
    counts = np.array([(masks == p).all(1).sum() for p in patterns])
    chances = np.array([np.prod([q if kept else 1 - q for kept in p]) for p in patterns])
    return stats.chisquare(counts, chances * len(masks)).statistic


def test_decisions_are_independent_over_pairs_and_nodes(key):
    """Below the upper quantile of 1e-6 of chi-square with 7 degrees of freedom, for 20,000 keys from one."""
    u, v = jnp.array([0, 1, 2]), jnp.array([1, 2, 0])

    @jax.jit
    @jax.vmap
    def draw(key):
        return dropjax.drop_edge(key, u, v, RATE, undirected=True), dropjax.drop_node(key, 3, u, v, RATE)

    edges, nodes = draw(jax.random.split(key, 20_000))
    for masks in [np.asarray(edges), np.asarray(nodes.nodes)]:
        assert pattern_statistic(masks, 0.7) < stats.chi2.isf(1e-6, 7)
    np.testing.assert_array_equal(nodes.edges, nodes.nodes & jnp.roll(nodes.nodes, -1, axis=1))


def test_nodes_match_their_oracle(key):
    expected = np.array([kept(key, i, 0) for i in range(12)])
    nodes, edges = dropjax.drop_node(key, 12, SENDERS, RECEIVERS, RATE)
    np.testing.assert_array_equal(nodes, expected)
    np.testing.assert_array_equal(edges, expected[EDGES[0]] & expected[EDGES[1]])
    assert 0 < nodes.sum() < 12
    asked = dropjax.drop_node(key, jnp.array([11, 3, 3]), SENDERS, RECEIVERS, RATE)
    np.testing.assert_array_equal(asked.nodes, expected[[11, 3, 3]])
    np.testing.assert_array_equal(asked.edges, edges)
    features = dropjax.mask_feature(key, jnp.ones((12, 2)), RATE, mode="row")
    np.testing.assert_array_equal(features[:, 0] != 0, nodes)
    for rate, wanted in [(0.0, True), (1, False)]:
        assert all((mask == wanted).all() for mask in dropjax.drop_node(key, 12, SENDERS, RECEIVERS, rate))


def test_padding_stays_invalid_and_may_hold_anything(key):
    valid = np.arange(64) < 50
    u = np.where(valid, EDGES[0], -1)
    for undirected in (False, True):
        mask = dropjax.drop_edge(key, u, RECEIVERS, RATE, valid=valid, undirected=undirected)
        whole = dropjax.drop_edge(key, SENDERS, RECEIVERS, RATE, undirected=undirected)
        np.testing.assert_array_equal(mask, np.asarray(whole) & valid)
    nodes, edges = dropjax.drop_node(key, 12, u, RECEIVERS, RATE, valid=valid)
    np.testing.assert_array_equal(edges, dropjax.drop_node(key, 12, SENDERS, RECEIVERS, RATE).edges & valid)
    assert nodes.shape == (12,)


def test_weights_are_scaled_by_apply_mask(key):
    weights = jnp.linspace(1, 2, 64)
    rate = jnp.linspace(0.1, 0.9, 64)

    def loss(weights, rate):
        mask = dropjax.drop_edge(key, SENDERS, RECEIVERS, rate)
        return dropjax.apply_mask(weights, mask, rate).sum()

    mask = dropjax.drop_edge(key, SENDERS, RECEIVERS, rate)
    expected = np.where(mask, 1 / (1 - np.asarray(rate, np.float64)), 0)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(weights, rate), expected, rtol=1e-6)
    for bad in [jnp.nan, -0.5, 1.5]:
        assert jnp.isnan(jax.jit(loss)(weights, jnp.full(64, 0.5).at[3].set(bad)))
        nodes, edges = jax.jit(lambda rate: dropjax.drop_node(key, 12, SENDERS, RECEIVERS, rate))(bad)
        assert nodes.all() and edges.all()  # noqa: PT018  # as keep_mask; apply_mask gives NaN


def test_jit_vmap_and_scan(key):
    keys = jax.random.split(key, 3)
    drop = jax.jit(lambda k, u, v, rate: dropjax.drop_edge(k, u, v, rate, undirected=True))
    one = [dropjax.drop_edge(k, SENDERS, RECEIVERS, RATE, undirected=True) for k in keys]
    many = jax.vmap(drop, (0, None, None, None))(keys, SENDERS, RECEIVERS, jnp.float32(RATE))
    _, scanned = jax.lax.scan(lambda c, k: (c, drop(k, SENDERS, RECEIVERS, RATE)), 0, keys)
    graphs = jnp.stack([SENDERS, RECEIVERS]), jnp.stack([RECEIVERS, RECEIVERS])
    over_graphs = jax.vmap(drop, (None, 0, 0, None))(key, *graphs, RATE)
    for i in range(3):
        np.testing.assert_array_equal(many[i], one[i])
        np.testing.assert_array_equal(scanned[i], one[i])
    np.testing.assert_array_equal(over_graphs[0], drop(key, SENDERS, RECEIVERS, RATE))
    with jax.enable_x64(True):
        wide = dropjax.drop_edge(keys[0], EDGES[0].astype(np.int64), EDGES[1].astype(np.uint8), RATE, undirected=True)
    np.testing.assert_array_equal(wide, one[0])


def test_pieces_and_shards_of_the_edges_decide_as_the_whole(key):
    whole = dropjax.drop_edge(key, SENDERS, RECEIVERS, RATE, undirected=True)
    nodes, edges = dropjax.drop_node(key, 12, SENDERS, RECEIVERS, RATE)
    part = slice(20, 45)
    np.testing.assert_array_equal(
        dropjax.drop_edge(key, SENDERS[part], RECEIVERS[part], RATE, undirected=True), whole[part]
    )
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(u, v, dims):
        mask = dropjax.drop_edge(key, u, v, RATE, undirected=True, sharded_dims=dims)
        return mask, *dropjax.drop_node(jax.random.clone(key), 12, u, v, RATE, sharded_dims=dims)

    for check in (True, False):
        cut = jax.shard_map(
            lambda u, v: step(u, v, {0: "data"}),
            mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P(), P("data")), check_vma=check,
        )  # fmt: skip
        for found, expected in zip(jax.jit(cut)(SENDERS, RECEIVERS), (whole, nodes, edges), strict=True):
            np.testing.assert_array_equal(found, expected)
    sharding.assert_masks_differ(cut, SENDERS, RECEIVERS)
    for check, message in [
        (True, "drop_edge: x must be accounted for"),
        (False, "drop_edge: sharded_dims must be given"),
    ]:
        plain = jax.shard_map(
            lambda u, v: step(u, v, None), mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check
        )
        with pytest.raises(ValueError, match=message):
            plain(SENDERS, RECEIVERS)


def test_empty_graphs(key):
    none = jnp.zeros(0, jnp.int32)
    assert dropjax.drop_edge(key, none, none, RATE, undirected=True).shape == (0,)
    assert [mask.shape for mask in dropjax.drop_node(key, 0, none, none, RATE)] == [(0,), (0,)]
    assert [mask.shape for mask in dropjax.drop_node(key, none, none, none, RATE)] == [(0,), (0,)]
    assert dropjax.drop_node(key, 5, none, none, RATE).nodes.shape == (5,)
    assert dropjax.mask_feature(key, jnp.ones((0, 3)), RATE).shape == (0, 3)


@pytest.mark.parametrize(("mode", "shared"), [("all", ()), ("row", (1, 2)), ("col", (0, 1))])
def test_modes_of_mask_feature(key, mode, shared):
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 2, 6)), jnp.float32)
    mask = oracle.keep(jax.random.key_data(key), x.shape, RATE, shared)
    np.testing.assert_array_equal(dropjax.mask_feature(key, x, RATE, mode=mode), np.where(mask, x, 0))
    filled = dropjax.mask_feature(key, x, RATE, mode=mode, fill_value=-2, scale=True)
    np.testing.assert_array_equal(filled, np.where(mask, x * oracle.scale(RATE), np.float32(-2)))
    gradient = jax.grad(lambda x: dropjax.mask_feature(key, x, RATE, mode=mode, fill_value=7.0).sum())(x)
    np.testing.assert_array_equal(gradient, mask.astype(np.float32))
    bad = jax.jit(lambda rate: dropjax.mask_feature(key, x, rate, mode=mode, fill_value=7.0))(jnp.nan)
    assert jnp.isnan(bad).all()
    assert dropjax.mask_feature(key, x.astype(jnp.bfloat16), RATE, fill_value=np.float32(3)).dtype == jnp.bfloat16


def test_errors_of_edges():
    def fails(kind, message, u=SENDERS, v=RECEIVERS, rate=RATE, key=KEY, **options):
        raises(kind, message, dropjax.drop_edge, key, u, v, rate, **options)

    fails(TypeError, "senders must be an integer array, got float32[3].", u=jnp.ones(3))
    fails(TypeError, "receivers must be an integer array, got [0, 1] (list).", v=[0, 1])
    fails(ValueError, "senders must have one dimension, got shape (2, 3).", u=jnp.ones((2, 3), int))
    fails(ValueError, "receivers must have the shape (64,) of senders, got shape (3,).", v=jnp.arange(3))
    fails(ValueError, "must be from 0 to 4294967295 where edges are valid, got -1. Mark padding", u=-np.ones(64, int))
    fails(TypeError, "valid must be a boolean array of the shape (64,) of senders, got int32[64].", valid=SENDERS)
    fails(TypeError, "valid must be a boolean array of the shape (64,)", valid=np.ones(63, bool))
    fails(ValueError, "edge_ids must have the shape (64,) of senders, got shape (3,).", edge_ids=jnp.arange(3))
    fails(
        ValueError, "rate must be one number, or have the shape (64,) of senders, got shape (3,).", rate=np.ones(3) / 2
    )
    fails(ValueError, "rate must be in [0, 1], got 1.5.", rate=1.5)
    fails(TypeError, "rate must be a number or a float array, got None (NoneType).", rate=None)
    fails(TypeError, "key must be a JAX random key, got 0.", key=0)
    fails(ValueError, "sharded_dims must name manual mesh axes, which here are ()", sharded_dims={0: "data"})
    with jax.enable_x64(True):
        fails(ValueError, "must be from 0 to 4294967295 where edges are valid, got 4294967296.", u=np.full(64, 2**32))


def test_errors_of_nodes_and_features():
    with pytest.raises(ValueError, match=r"mask_feature: fill_value must be finite in float16, .* got 1000000.0"):
        dropjax.mask_feature(KEY, jnp.ones((2, 3), jnp.float16), 0.5, fill_value=1e6)

    def fails(kind, message, *args, **options):
        raises(kind, message, dropjax.drop_node, KEY, *args, **options)

    fails(ValueError, "senders must be from 0 to 10 where edges are valid, got 11.", 11, SENDERS, RECEIVERS, RATE)
    fails(ValueError, "nodes must be at least 0, got -1.", -1, SENDERS, RECEIVERS, RATE)
    fails(TypeError, "nodes must be an integer, got 2.5.", 2.5, SENDERS, RECEIVERS, RATE)
    fails(TypeError, "nodes must be an integer array, got float32[3].", jnp.ones(3), SENDERS, RECEIVERS, RATE)
    fails(ValueError, "rate must be one number, got shape (12,).", 12, SENDERS, RECEIVERS, np.full(12, 0.5))
    x = jnp.ones((2, 3))
    message = "mode must be one of ('all', 'row', 'col'), got 'column' (str)."
    raises(ValueError, message, dropjax.mask_feature, KEY, x, RATE, mode="column")
    for value in (np.nan, None, True, jnp.ones(())):
        raises(ValueError, "fill_value must be a finite number", dropjax.mask_feature, KEY, x, RATE, fill_value=value)
    message = "x must have a dimension of nodes or features, got a scalar."
    raises(ValueError, message, dropjax.mask_feature, KEY, 1.0, RATE)
    message = "rate must be the same in a row"
    raises(ValueError, message, dropjax.mask_feature, KEY, x, np.full(3, 0.5), mode="row")
