"""docs/scaling.md: the coordinate functions at 10^13 elements, 10^5 devices and 10^6 steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from dropjax import bits
from tests import oracle

pytestmark = pytest.mark.slow
SHAPE = (10**6, 10**4, 10**3)  # 10^13 elements
DEVICES = 10**5


@pytest.mark.parametrize("device", [0, 1, DEVICES // 2, DEVICES - 1])
def test_words_at_far_places_are_the_contracts(device):
    """The last step's key, and the corner of a device's piece of ten rows."""
    key = jax.random.fold_in(jax.random.key(0), 10**6 - 1)
    first = (device * (SHAPE[0] // DEVICES) + 9, SHAPE[1] - 1, SHAPE[2] - 2)
    words = bits.random_words(key, (1, 1, 2), start=dict(enumerate(first)))
    key_words = [int(word) for word in jax.random.key_data(key)]
    assert words.ravel().tolist() == [oracle.word(key_words, [*first[:2], first[2] + i]) for i in range(2)]


def traced(shape, devices, **more):
    """The shape of the words of a whole array over a mesh that nobody has."""
    mesh = AbstractMesh((devices,), ("data",))

    def piece(key):
        return bits.random_words(key, shape, sharded_dims={0: "data"}, **more)

    run = jax.shard_map(piece, mesh=mesh, in_specs=P(), out_specs=P("data"))
    return jax.eval_shape(run, jax.eval_shape(lambda: jax.random.key(0))).shape


def test_a_hundred_thousand_devices():
    assert traced((10, *SHAPE[1:]), DEVICES) == SHAPE
    assert traced((42_949, 4), DEVICES) == (4_294_900_000, 4)
    with pytest.raises(ValueError, match=r"random_words: indices must be below 2\^32, got 0 to 4294999999"):
        traced((42_950, 4), DEVICES)
    with pytest.raises(ValueError, match=r"random_words: indices must be below 2\^32"):
        traced((42_949, 4), DEVICES, start={0: 10**5})


def test_the_place_wraps_where_start_is_traced(key):
    near = jax.jit(lambda first: bits.random_words(key, (1, 4), start={0: first}))
    np.testing.assert_array_equal(near(jnp.uint32(2**32 - 1) + 1), bits.random_words(key, (1, 4)))


def test_row_words_of_one_key_never_coincide_and_their_halves_do_by_chance():
    """Among n = 2^21 rows 2^41 / 2^33 pairs share one word of two: Poisson, within 6 standard deviations."""
    i0 = jnp.arange(2**11, dtype=jnp.uint32)[:, None] * np.uint32(SHAPE[0] // 2**11) + np.uint32(7)
    i1 = jnp.arange(2**10, dtype=jnp.uint32)[None] * np.uint32(SHAPE[1] // 2**10) + np.uint32(3)
    a, b = (np.asarray(word).ravel().astype(np.uint64) for word in bits.threefry2x32(5, 6, i0, i1))
    n, both = a.size, a << np.uint64(32) | b
    assert np.unique(both).size == n
    for word in (a, b):
        count = np.unique(word, return_counts=True)[1]
        pairs, expected = (count * (count - 1) // 2).sum(), n * (n - 1) / 2**33
        assert abs(pairs - expected) < 6 * np.sqrt(expected)


def test_row_words_of_rank_four_coincide_by_chance_only():
    """The second pair of indices goes in under the words of the first: another permutation for each first pair."""
    key = bits.threefry2x32(5, 6, jnp.arange(2**10, dtype=jnp.uint32)[:, None], 10**6)
    a, b = (np.asarray(w).ravel().astype(np.uint64) for w in bits.threefry2x32(*key, jnp.arange(2**10)[None], 10**4))
    assert np.unique(a << np.uint64(32) | b).size == a.size  # expected pairs: 2^40 / 2^65
    count = np.unique(a, return_counts=True)[1]
    expected = a.size * (a.size - 1) / 2**33
    assert abs((count * (count - 1) // 2).sum() - expected) < 6 * np.sqrt(expected)


def test_keys_of_a_million_steps_differ():
    """64-bit words of 10^6 keys: all differ, and their halves coincide as often as chance has it."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(10**6))
    words = np.asarray(jax.random.key_data(keys)).astype(np.uint64)
    assert np.unique(words[:, 0] << np.uint64(32) | words[:, 1]).size == 10**6
    count = np.unique(words[:, 0], return_counts=True)[1]
    expected = 10**12 / 2**33
    assert abs((count * (count - 1) // 2).sum() - expected) < 6 * np.sqrt(expected)
