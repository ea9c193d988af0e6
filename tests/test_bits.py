"""The bit contract: known answers, an independent oracle, growth, places, keys and 32-bit arithmetic."""

import inspect
import re

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pytest

import dropjax
from dropjax import bits
from tests import oracle

KNOWN = {  # version 2: words of key(20) in an array of shape (2, 3), and of key(0) at one far place
    "rank 2": [[0x1924847C, 0xF3CDD2EC, 0x83F4B4B6], [0x6FB0809C, 0x17CAFE47, 0x9983C099]],
    "far": 0xFD05ADFD,
}


def words_at(key, *index):
    """The word at one place of an array of any size."""
    shape = (1,) * len(index)
    return int(bits.random_words(key, shape, start=dict(enumerate(index))).reshape(()))


def test_version():
    assert bits.VERSION == 2  # a change of any known answer is a change of the version


def test_known_answers():
    words = bits.random_words(jax.random.key(20), (2, 3))
    np.testing.assert_array_equal(words, np.array(KNOWN["rank 2"], np.uint32))
    assert words_at(jax.random.key(0), 2**32 - 1, 12345, 2**31, 7) == KNOWN["far"]


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (2, 3, 2, 2), (2, 1, 2, 2, 2), (2, 1, 2, 1, 2, 2)])
def test_words_are_those_of_the_oracle(key, shape):
    np.testing.assert_array_equal(bits.random_words(key, shape), oracle.words(jax.random.key_data(key), shape))


@pytest.mark.parametrize(
    "index",
    [(2**32 - 1,), (2**31, 5), (5, 2**32 - 1), (2**32 - 1, 2**32 - 1), (2**32 - 1, 2**32 - 2, 2**31, 2**32 - 1)],
)
def test_far_places_of_arrays_larger_than_memory(key, index):
    """Up to 2^128 elements: only the coordinates enter, and none is combined with another."""
    expected = oracle.word([int(w) for w in jax.random.key_data(key)], index)
    assert words_at(key, *index) == expected
    traced = jax.jit(lambda start: bits.random_words(key, (1,) * len(index), start=dict(enumerate(start))))
    assert int(traced([jnp.uint32(i) for i in index]).reshape(())) == expected


def test_threefry_is_that_of_jax():
    key = np.array([0xDEADBEEF, 0x12345678], np.uint32)
    counters = np.random.default_rng(0).integers(0, 2**32, 1000, np.uint32)
    ours = bits.threefry2x32(key[0], key[1], counters[:500], counters[500:])
    theirs = jax.extend.random.threefry_2x32(key, counters)
    np.testing.assert_array_equal(np.concatenate(ours), theirs)
    assert oracle.threefry2x32((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3)) == (0xC4923A9C, 0x483DF7A0)


@pytest.mark.parametrize("seed", [0, 7, 2**31])
def test_keys_of_other_implementations_use_all_their_words(seed):
    for impl in ["rbg", "unsafe_rbg"]:
        key = jax.random.key(seed, impl=impl)
        data = [int(w) for w in jax.random.key_data(key)]
        two = oracle.threefry2x32(data[:2], data[2:])
        np.testing.assert_array_equal(bits.random_words(key, (2, 3)), oracle.words(two, (2, 3)))
    four = [np.array(w, np.uint32) for w in ([1, 2, 3, 4], [1, 2, 3, 5], [0, 2, 3, 4], [1, 2, 0, 4])]
    drawn = {tuple(np.asarray(bits.random_words(w, (4,)))) for w in four}
    assert len(drawn) == 4


def test_keys_of_one_word():
    drawn = bits.random_words(np.array([9], np.uint32), (3,))
    np.testing.assert_array_equal(drawn, oracle.words([9, 0], (3,)))


def test_rows_share_no_words_with_split_or_fold_in(key):
    ours = {int(w) for w in np.asarray(bits.random_words(key, (512, 1))).ravel()}
    a, b = (np.asarray(w) for w in bits.threefry2x32(*jax.random.key_data(key), np.arange(512, dtype=np.uint32), 0))
    theirs = [jax.random.split(key, 512), jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(512))]
    words = {int(w) for keys in theirs for w in np.asarray(jax.random.key_data(keys)).ravel()}
    rows = np.asarray(bits.random_words(key, (512, 2)))
    assert not ours & words
    assert not {int(w) for w in rows.ravel()} & words
    assert not {int(w) for w in np.concatenate([a, b])} & ours


def test_neither_row_word_alone_decides(key):
    """With one injection the words of two rows were the same set in another order."""
    words = np.asarray(bits.random_words(key, (64, 2**12)))
    for other in words[1:]:
        assert len(np.intersect1d(words[0], other)) < 8  # 2^24 pairs of 32-bit words: 0.004 expected
        assert len(np.unique(words[0] - other)) > 2**11


def test_only_32_bit_operations(key):
    """No 64-bit word and no high multiply, with x64 on or off."""
    arithmetic = {"add", "mul", "xor", "or", "shift_left", "shift_right_logical"}
    layout = {"iota", "broadcast_in_dim", "slice", "squeeze", "reshape", "convert_element_type"}
    no_arithmetic = {"optimization_barrier", "div", "eq", "select_n"}  # row and column words are computed once
    allowed = arithmetic | layout | no_arithmetic | {"jit", "random_unwrap"}
    for x64 in [False, True]:
        with jax.enable_x64(x64):
            jaxpr = jax.make_jaxpr(lambda key: bits.random_words(key, (3, 4, 5), start={1: jnp.uint32(3)}))(key)
            text = str(jaxpr)
            assert "64" not in re.sub(r"stack|:\d+", "", text).replace("0x64", "")
            assert primitives(jaxpr.jaxpr) <= allowed
    assert inspect.signature(bits.random_words).parameters["start"].kind == inspect.Parameter.KEYWORD_ONLY


def primitives(jaxpr):
    found = set()
    for eqn in jaxpr.eqns:
        found.add(eqn.primitive.name)
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value if hasattr(value, "eqns") else None)
            if inner is not None:
                found |= primitives(inner)
    return found


@pytest.mark.parametrize("key_of", [lambda key: key, lambda key: jax.random.key(3)], ids=["argument", "constant"])
def test_row_and_column_words_are_computed_once(key, key_of):
    """XLA must not compute threefry again for each element: the large fusion holds none of its rotations."""
    drop = jax.jit(lambda key, x: dropjax.dropout(key_of(key), x, 0.1))
    text = drop.lower(key, jnp.ones((256, 512))).compile().as_text()
    assert not [line for line in text.splitlines() if "[256,512]" in line and " shift-left(" in line]
    assert [line for line in text.splitlines() if "[256,1]" in line and " shift-left(" in line]


def test_long_rows_repeat_words(key):
    """Of 2^22 random words 2,048 pairs are expected to be equal; one permutation of the columns would have none."""
    words = np.asarray(bits.random_words(key, (2**22,)))
    assert abs(len(words) - len(np.unique(words)) - 2**11) < 6 * 2**5.5


def test_no_two_columns_have_the_same_words(key):
    """With one word a column, two of 2^18 would agree in all rows, eight times over."""
    words = np.asarray(bits.random_words(key, (2, 2**18)))
    assert len(np.unique(words.T.copy().view(np.uint64))) == 2**18


def test_configuration_does_not_change_the_words(key):
    expected = np.asarray(bits.random_words(key, (3, 4, 5)))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(bits.random_words(key, (3, 4, 5)), expected)
    with jax.threefry_partitionable(False):
        np.testing.assert_array_equal(bits.random_words(key, (3, 4, 5)), expected)
    with jax.disable_jit():
        np.testing.assert_array_equal(bits.random_words(key, (3, 4, 5)), expected)


def test_shared_dimensions_use_index_zero(key):
    mask = dropjax.keep_mask(key, (3, 4, 5), 0.5, broadcast_dims=(1,))
    np.testing.assert_array_equal(mask, jnp.broadcast_to(mask[:, :1], mask.shape))
    np.testing.assert_array_equal(mask[:, :1], dropjax.keep_mask(key, (3, 1, 5), 0.5))


@pytest.mark.parametrize("where", ["eager", "jit", "scan"])
def test_a_key_is_used_once_under_key_reuse_checks(where):
    def twice(key):
        return dropjax.dropout(key, jnp.ones(3), 0.5), dropjax.keep_mask(key, (3,), 0.5)

    def once(key):
        first, second = jax.random.split(key)
        return dropjax.dropout(first, jnp.ones(3), 0.5), dropjax.keep_mask(second, (3,), 0.5)

    run = {
        "eager": lambda f: f,
        "jit": jax.jit,
        "scan": lambda f: lambda key: jax.lax.scan(lambda c, k: (c, f(k)), 0, jax.random.split(key, 2)),
    }[where]
    with jax.debug_key_reuse(True):
        expected = once(jax.random.key(0))
        if where != "scan":
            np.testing.assert_array_equal(run(once)(jax.random.key(0))[0], expected[0])
        with pytest.raises(jax.errors.KeyReuseError):
            run(twice)(jax.random.key(0))
        with pytest.raises(jax.errors.KeyReuseError):
            run(lambda key: (dropjax.dropout(key, jnp.ones(3), 0.5), jax.random.normal(key)))(jax.random.key(0))
    np.testing.assert_array_equal(once(jax.random.key(0))[0], expected[0])


def test_gradients_do_not_count_as_reuse():
    with jax.debug_key_reuse(True):
        gradient = jax.grad(lambda x: dropjax.dropout(jax.random.key(0), x, 0.5).sum())(jnp.ones(8))
        jax.jit(jax.grad(lambda x, key: dropjax.dropout(key, x, 0.5).sum()))(jnp.ones(8), jax.random.key(0))
    assert set(np.unique(gradient)) <= {0.0, 2.0}


@pytest.mark.parametrize("shape", [(2**33,), (2**20, 2**20), (2**31, 3, 2**30), (5, 2**16, 2**16 + 1)])
def test_linear_index_beyond_32_bits(shape):
    """The position that generator="threefry" needs, against Python integers, without the array."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        index = [int(rng.integers(0, min(n, 2**32))) for n in shape]
        high, low = bits.linear_index([jnp.uint32(i) for i in index], shape)
        expected = 0
        for i, n in zip(index, shape, strict=True):
            expected = expected * n + i
        assert (int(high) << 32) + int(low) == expected
