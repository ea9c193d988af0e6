"""What every device draws while a function runs: the witness of `dropjax.sharding.assert_masks_differ`."""

import contextvars
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import multihost_utils

from dropjax import _checks, _tracing


class Seen(NamedTuple):
    """One draw on one device."""

    function: str
    axes: tuple[str, ...]  # mesh axes over which masks must differ
    shard: tuple[int, ...]  # the device's place along them
    words: tuple[int, ...]  # of the key
    place: tuple[int, ...]  # of the first element
    shape: tuple[int, ...]  # of the piece
    content: tuple[int, ...] | None  # a checksum of x, where masks must differ only if x does


seen: contextvars.ContextVar[list[Seen] | None] = contextvars.ContextVar("seen", default=None)


def watched(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Seen]:
    """Runs a function and returns what all devices of all processes drew in it."""
    found: list[Seen] = []
    token = seen.set(found)
    try:
        with _tracing.traced_as(object()):  # anew, with the witness in it
            jax.block_until_ready(fn(*args, **kwargs))
        jax.effects_barrier()
    finally:
        seen.reset(token)
    return _of_all_processes(found)


def record(
    found: list[Seen],
    function: str,
    key: Array,
    data: Any,
    corner: Sequence[Array | None],
    shape: tuple[int, ...],
    must: Sequence[str],
    may: Sequence[str],
) -> None:
    """Has every device tell the host what it draws: over `must` masks must differ, over `may` where x does.

    Without such an axis there is nothing that may repeat, and only the fact is recorded.
    """
    if not must and not may:
        found.append(Seen(function, (), (), (), (), (), None))
        return

    def tell(*parts: Any) -> None:
        over_must, over_may, words, place, content = (
            tuple(int(n) for n in np.ravel(np.asarray(part, np.uint32))) for part in parts
        )
        found.append(Seen(function, tuple(must), over_must, words, place, shape, None))
        found.append(Seen(function, (*must, *may), over_must + over_may, words, place, shape, content))

    index = [[lax.axis_index(name) for name in axes] for axes in (must, may)]
    words = jax.random.key_data(key) if _checks.is_typed(key) else key
    place = [jnp.uint32(0) if first is None else first for first in corner]
    content = [_checksum(x) for x in jax.tree.leaves(data) if isinstance(x, Array)]
    jax.debug.callback(tell, *index, words, place, content)


def repeated(draws: Sequence[Seen]) -> str:
    """Says which two shards drew an element under one key at one place; empty where none did."""
    alike: dict[Any, list[Seen]] = {}
    for draw in sorted(set(draws), key=str):
        alike.setdefault((draw.axes, draw.words, draw.content is None, len(draw.place)), []).append(draw)
    for of_key in alike.values():
        for one, other in itertools.combinations(of_key, 2):
            differ = one.content is None or one.content != other.content
            if one.shard != other.shard and differ and _overlap(one, other):
                return f"{_told(one)}, and {_told(other)}, under the key words {one.words}"
    return ""


def _overlap(one: Seen, other: Seen) -> bool:
    corners = zip(one.place, one.shape, other.place, other.shape, strict=True)
    return all(i < j + m and j < i + n for i, n, j, m in corners)


def _told(draw: Seen) -> str:
    elements = ", ".join(f"{i}:{i + n}" for i, n in zip(draw.place, draw.shape, strict=True))
    return f"{draw.function} on {dict(zip(draw.axes, draw.shard, strict=True))}, elements [{elements}]"


def _checksum(x: Array) -> Array:
    parts = [jnp.real(x), jnp.imag(x)] if jnp.iscomplexobj(x) else [x]
    words = [lax.bitcast_convert_type(part.astype(jnp.float32), jnp.uint32) for part in parts]
    return jnp.sum(jnp.stack(words), dtype=jnp.uint32)


def _of_all_processes(found: list[Seen]) -> list[Seen]:
    """Each process hears of its own devices only."""
    if jax.process_count() == 1:
        return found
    text = np.frombuffer(json.dumps(found).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.array(text.size)).max())
    texts = multihost_utils.process_allgather(np.pad(text, (0, longest - text.size), constant_values=ord(" ")))
    rows: list[Any] = [row for of_one in np.asarray(texts) for row in json.loads(bytes(of_one))]
    return [Seen._make(tuple(part) if isinstance(part, list) else part for part in row) for row in rows]
