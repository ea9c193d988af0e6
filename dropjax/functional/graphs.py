"""Dropout of graphs: edges, nodes and features, on arrays of fixed length with a mask of what is valid.

An edge is known by its two nodes and a node by its number, wherever they stand in the arrays, so that any order
of the edges and any piece of them gives the same decisions.
"""

import functools
import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from dropjax import _arguments, _checks, bits, masks, sharding
from dropjax._checks import Rate


@_arguments.public
def drop_edge(
    key: Array,
    senders: ArrayLike,
    receivers: ArrayLike,
    rate: ArrayLike,
    *,
    valid: ArrayLike | None = None,
    undirected: bool = False,
    edge_ids: ArrayLike | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Array:
    """Drops edges of a graph: returns which are still valid.

    mask = valid and m, m ~ Bernoulli(q), q = 1 - rate, for each pair (sender, receiver). The arrays keep their length,
    so jit compiles once. Nothing is scaled: multiply messages by the mask and count degrees with it, as the
    paper normalises the adjacency anew, or scale edge weights by `apply_mask(weights, mask, rate)`, E = weights.

    Args:
      key: one JAX key; it is consumed.
      senders: integers `[edges]`, where each edge begins, at least 0; those traced are not checked.
      receivers: integers `[edges]`, where it ends.
      rate: probability of dropping an edge, in `[0, 1]`: a number, or a float array that broadcasts against the
        edges; give both directions of an undirected edge the same. It may be traced; where it then is NaN or out
        of range the mask is as `valid` and `apply_mask` gives NaN.
      valid: bool `[edges]`, False for padding, which stays False and may hold any numbers; None for all True.
      undirected: whether (u, v) and (v, u) have one decision, wherever both stand.
      edge_ids: integers `[edges]` that tell apart parallel edges, such as relations; without them edges of the same
        nodes are dropped together. The two directions of an undirected edge have the same.
      sharded_dims: inside shard_map or pmap, `{0: axis name}` if the edges of one graph are cut, with the numbers
        of nodes those of the whole graph. For a graph on each device fold the axis into the key.

    Returns:
      bool `[edges]`, True = kept.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> senders, receivers = jnp.array([0, 1, 1, 2, 0, 2]), jnp.array([1, 0, 2, 1, 2, 0])
      >>> drop_edge(jax.random.key(3), senders, receivers, 0.5, undirected=True).tolist()
      [False, False, True, True, True, True]

    Reference:
      Rong, Huang, Xu, Huang, [DropEdge: towards deep graph convolutional networks on node
      classification](https://arxiv.org/abs/1907.10903), 2020, which removes a fixed number of edges.
    """
    known = _valid("drop_edge", senders, valid)
    u = _nodes("drop_edge", "senders", senders, known)
    v = _nodes("drop_edge", "receivers", receivers, known, u.shape)
    ids = () if edge_ids is None else (_nodes("drop_edge", "edge_ids", edge_ids, known, u.shape),)
    checked = _rate("drop_edge", rate, u.shape)
    draw = bits.draw("drop_edge", key, (u, v, ids, known, checked), u.shape, sharded_dims=sharded_dims)
    return _drop_edge(draw, (u, v, *ids), known, checked, _checks.flag("drop_edge", "undirected", undirected))


@functools.partial(jax.jit, static_argnums=4)
def _drop_edge(draw: bits.Draw, edges: tuple[Array, ...], valid: Array, rate: Rate, undirected: bool) -> Array:
    u, v, *ids = (end.astype(jnp.uint32) for end in edges)
    if undirected:
        u, v = jnp.minimum(u, v), jnp.maximum(u, v)
    return valid & masks.above(bits.words_at(draw, u, v, *ids), rate)


class DroppedNodes(NamedTuple):
    """What `drop_node` leaves."""

    nodes: Array
    """bool `[nodes]`, True = kept."""
    edges: Array
    """bool `[edges]`: valid edges both of whose nodes are kept."""


@_arguments.public
def drop_node(
    key: Array,
    nodes: ArrayLike,
    senders: ArrayLike,
    receivers: ArrayLike,
    rate: ArrayLike,
    *,
    valid: ArrayLike | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> DroppedNodes:
    """Drops nodes of a graph, and every edge that begins or ends at one.

    m ~ Bernoulli(q), q = 1 - rate, for each node: an edge (u, v) stays with probability q^2, a self loop with q. The
    arrays keep their length. Nothing is scaled; GRAND's DropNode, which drops the features of nodes, keeps all
    edges and scales, is `mask_feature(key, x, rate, mode="row", scale=True)`.

    Args:
      key: one JAX key; it is consumed.
      nodes: how many nodes there are, n; or integers `[nodes]`, the numbers of those that are asked for, such as
        the ones that lie on a device.
      senders: integers `[edges]`, where each edge begins, from 0 to n - 1; those traced are not checked.
      receivers: integers `[edges]`, where it ends.
      rate: probability of dropping a node, in `[0, 1]`: one number, or a scalar array. It may be traced; where it
        then is NaN or out of range the masks are as `valid`, and `apply_mask` gives NaN.
      valid: bool `[edges]`, False for padding, which stays False and may hold any numbers; None for all True.
      sharded_dims: inside shard_map or pmap, `{0: axis name}` if the edges of one graph are cut, with the numbers
        of nodes those of the whole graph. For a graph on each device fold the axis into the key.

    Returns:
      `DroppedNodes(nodes, edges)`, two masks.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> nodes, edges = drop_node(jax.random.key(4), 4, jnp.array([0, 1, 2]), jnp.array([1, 2, 3]), 0.5)
      >>> nodes.tolist(), edges.tolist()
      ([True, False, True, True], [False, False, True])

    Reference:
      You, Chen, Sui, Chen, Wang, Shen, [Graph contrastive learning with
      augmentations](https://arxiv.org/abs/2010.13902), 2020. Feng et al., [Graph random neural networks for
      semi-supervised learning on graphs](https://arxiv.org/abs/2005.11079), 2020 (GRAND).
    """
    count: Any = None
    if _checks.is_symbolic(nodes):
        count = nodes
    elif not (_checks.is_array(nodes) and nodes.ndim):
        count = _checks.integer("drop_node", "nodes", nodes, 0)
    known = _valid("drop_node", senders, valid)
    u = _nodes("drop_node", "senders", senders, known, below=count)
    v = _nodes("drop_node", "receivers", receivers, known, u.shape, below=count)
    every = np.ones((), np.bool_)
    asked = jnp.arange(count, dtype=jnp.uint32) if count is not None else _nodes("drop_node", "nodes", nodes, every)
    checked = _rate("drop_node", rate, ())
    draw = bits.draw("drop_node", key, (asked, u, v, known, checked), u.shape, sharded_dims=sharded_dims)
    return _drop_node(draw, asked, u, v, known, checked)


@jax.jit
def _drop_node(draw: bits.Draw, nodes: Array, u: Array, v: Array, valid: Array, rate: Rate) -> DroppedNodes:
    def kept(number: Array) -> Array:
        return masks.above(bits.words_at(draw, number, np.uint32(0)), rate)  # as mask_feature, mode "row"

    return DroppedNodes(kept(nodes), valid & kept(u) & kept(v))


@_arguments.public
def mask_feature(
    key: Array,
    x: ArrayLike,
    rate: ArrayLike,
    *,
    mode: str = "col",
    fill_value: float = 0.0,
    scale: bool = False,
    start: Mapping[int, ArrayLike] | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Array:
    """Masks features of nodes: whole columns, whole rows, or single ones.

    y = x m + fill_value (1 - m), m ~ Bernoulli(q), q = 1 - rate, for each column (a feature of all nodes), row (all
    features of a node) or element: E[y] = q x + rate * fill_value. With `scale`, what is kept is x / q, and
    with a fill_value of 0 E[y] = x and Var[y] = x^2 rate / q.

    Args:
      key: one JAX key; it is consumed.
      x: float or complex `[nodes, ..., features]`.
      rate: probability of masking, in `[0, 1]`: a number, or a float array that broadcasts against x. It may
        be traced, and is not differentiated.
      mode: `"col"`, a decision for each index of the last axis; `"row"`, for each of the first; `"all"`, for each
        element.
      fill_value: what masked features become, a number that is finite in the dtype of x.
      scale: whether what is kept is divided by q.
      start: `{dim: index}`, where this piece starts in the whole array; indices may be traced.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.

    Returns:
      Array of the shape and dtype of x. NaN where a traced rate is NaN or out of range.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> mask_feature(jax.random.key(4), jnp.ones((2, 4)), 0.5).tolist()
      [[1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0]]

    Reference:
      You, Chen, Sui, Chen, Wang, Shen, [Graph contrastive learning with
      augmentations](https://arxiv.org/abs/2010.13902), 2020. Mode "row" with `scale` is DropNode of Feng et al.,
      [Graph random neural networks for semi-supervised learning on graphs](https://arxiv.org/abs/2005.11079), 2020.
    """
    x = _checks.array("mask_feature", x)
    checked = _checks.rate("mask_feature", rate, x.shape)
    _checks.choice("mask_feature", "mode", mode)
    if (
        isinstance(fill_value, bool)
        or not isinstance(fill_value, numbers.Real)
        or not np.isfinite(_checks.floats(fill_value))
    ):
        raise ValueError(f"mask_feature: fill_value must be a finite number, got {_checks.describe(fill_value)}.")
    if abs(fill_value) > float(jnp.finfo(x.dtype).max):
        raise ValueError(f"mask_feature: fill_value must be finite in {x.dtype}, the dtype of x, got {fill_value}.")
    if x.ndim == 0:
        raise ValueError("mask_feature: x must have a dimension of nodes or features, got a scalar.")
    own = {"all": range(x.ndim), "row": [0], "col": [x.ndim - 1]}[mode]
    shared = [d for d in range(x.ndim) if d not in own]
    _checks.whole("mask_feature", checked, shared, f"a {mode}")
    draw = bits.draw("mask_feature", key, (x, checked), x.shape, shared=shared, start=start, sharded_dims=sharded_dims)
    return _mask_feature(draw, x, checked, float(fill_value), _checks.flag("mask_feature", "scale", scale))


@functools.partial(masks.redrawn, static_argnums=(3, 4))
def _mask_feature(draw: bits.Draw, x: Array, rate: Rate, fill_value: float, scale: bool) -> Array:
    kept = masks.keep(draw, x.shape, rate)
    y = masks.apply(x, kept, rate, rescale=scale)
    return jnp.where(kept, y, jnp.asarray(fill_value, x.dtype)) if fill_value else y


def _rate(function: str, rate: Any, edges: tuple[int, ...]) -> Rate:
    if _checks.is_array(rate) and rate.ndim and rate.shape not in {edges, edges and (1,)}:
        wanted = f"one number, or have the shape {edges} of senders" if edges else "one number"
        raise ValueError(f"{function}: rate must be {wanted}, got shape {rate.shape}.")
    return _checks.rate(function, rate, edges)


def _valid(function: str, senders: Any, valid: Any) -> Any:
    """Returns the mask of valid edges, one True for all where there is none."""
    if valid is None:
        return np.ones((), np.bool_)
    if not _checks.is_array(valid) or valid.dtype != jnp.bool_ or valid.shape != np.shape(senders):
        raise TypeError(
            f"{function}: valid must be a boolean array of the shape {np.shape(senders)} of senders, got "
            f"{_checks.describe(valid)}."
        )
    return jnp.asarray(valid)


def _nodes(
    function: str,
    argument: str,
    value: Any,
    valid: ArrayLike,
    shape: tuple[int, ...] | None = None,
    *,
    below: int | None = None,
) -> Array:
    """Returns numbers of nodes; known ones are checked to be in range where the edge is valid."""
    if not _checks.is_array(value) or not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{function}: {argument} must be an integer array, got {_checks.describe(value)}.")
    if value.ndim != 1 or (shape is not None and value.shape != shape):
        wanted = "have one dimension" if shape is None else f"have the shape {shape} of senders"
        raise ValueError(
            f"{function}: {argument} must {wanted}, got shape {value.shape}. For a batch of graphs use jax.vmap with "
            "a key for each, or number their nodes through."
        )
    known = not any(_checks.is_traced(v) or not getattr(v, "is_fully_addressable", True) for v in (value, valid))
    if known:
        found = np.asarray(value)[np.asarray(valid)]
        limit = _checks.MAX_INDEX if below is None or _checks.is_symbolic(below) else below
        wrong = found[(found < 0) | (found >= limit)]
        if wrong.size:
            raise ValueError(
                f"{function}: {argument} must be from 0 to {limit - 1} where edges are valid, got {wrong[0]}. Mark "
                "padding by valid."
            )
    return jnp.asarray(value)
