"""Every variant under JAX's transformations: the same masks, and nothing kept that can be drawn again."""

import itertools
import re

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest

import dropjax
from tests.test_variants import RATE, assert_same, draw, every, having, inputs
from tests.variants import VARIANTS


@having("residuals")
def test_residuals_are_the_key_and_an_array_rate(variant, key, capsys):
    x = inputs((64, 8, 32))

    def kept(rate):
        jax.ad_checkpoint.print_saved_residuals(lambda x: draw(variant, key, x, rate), x)
        return [line.split()[0] for line in capsys.readouterr().out.splitlines()]

    assert kept(RATE) == ["key<fry>[]"]
    assert sorted(kept(jnp.float32(RATE))) == ["f32[]", "key<fry>[]"]
    examples = 1 if variant.whole_rate == (1, 1, 1) else 64
    assert sorted(kept(jnp.full((examples, 1, 1), RATE))) == [f"f32[{examples},1,1]", "key<fry>[]"]


@every
def test_no_array_lives_from_forward_to_backward(variant, key):
    x = inputs((64, 8, 32))
    _, backward = jax.vjp(lambda x: draw(variant, key, x), x)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(backward) if hasattr(leaf, "nbytes"))
    assert kept == (0 if "residuals" in variant.not_for else 8)


@pytest.mark.slow
@having("linear")
def test_jvp_and_hessian_vector_product(variant, key):
    x, v = inputs(), inputs() * 0.5
    y, tangent = jax.jvp(lambda x: draw(variant, key, x), (x,), (v,))
    assert_same(variant, y, draw(variant, key, x), x)
    assert_same(variant, tangent, draw(variant, key, v), v)
    noise = draw(variant, key, jnp.ones_like(x))
    _, product = jax.jvp(jax.grad(lambda x: (draw(variant, key, x) ** 3).sum()), (x,), (v,))
    np.testing.assert_allclose(product, 6 * noise**3 * x * v, rtol=1e-5)
    _, product = jax.jvp(jax.grad(lambda x: (draw(variant, key, x, jnp.float32(RATE)) ** 3).sum()), (x,), (v,))
    np.testing.assert_allclose(product, 6 * noise**3 * x * v, rtol=1e-5)


COMBINATIONS = [c for n in range(1, 5) for c in itertools.combinations(range(4), n)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "batched"),
    [
        pytest.param(row, batched, id=f"{name}-{batched}")
        for name, row in VARIANTS.items()
        for batched in (COMBINATIONS if name in ("dropout", "gaussian_dropout") else [(0,), (1, 3), (0, 1, 2, 3)])
    ],
)
def test_vmap_means_a_loop(variant, key, batched):
    """Over any combination of key, x, rate and start: what is not batched is the same in every row."""
    one = (key, inputs(), jnp.float32(RATE), jnp.uint32(7))
    many = (
        jax.random.split(key, 3),
        jnp.stack([inputs(), inputs() + 1, inputs() * 2]),
        jnp.array([0.1, 0.3, 0.5]),
        jnp.array([0, 5, 9], jnp.uint32),
    )
    arguments = [many[i] if i in batched else one[i] for i in range(4)]
    axes = [0 if i in batched else None for i in range(4)]

    def call(key, x, rate, start):
        return draw(variant, key, x, rate, start={0: start})

    rows = jax.vmap(call, in_axes=axes)(*arguments)
    for row in range(3):
        single = [many[i][row] if i in batched else one[i] for i in range(4)]
        assert_same(variant, rows[row], call(*single), single[1])


@every
def test_scan(variant, key):
    x, keys = inputs(), jax.random.split(key, 4)
    _, scanned = jax.jit(lambda: jax.lax.scan(lambda c, key: (c, draw(variant, key, x)), 0, keys))()
    for row, one in zip(scanned, keys, strict=True):
        assert_same(variant, row, draw(variant, one, x), x)


@pytest.mark.slow
@every
def test_remat_and_cond(variant, key):
    x = inputs()

    def loss(x):
        return (draw(variant, key, jnp.sin(x)) ** 2).sum()

    gradient = jax.grad(loss)(x)
    for policy in [None, jax.checkpoint_policies.dots_saveable]:
        np.testing.assert_allclose(jax.grad(jax.checkpoint(loss, policy=policy))(x), gradient, rtol=1e-5)
    chosen = jax.jit(lambda train: jax.lax.cond(train, lambda x: draw(variant, key, x), lambda x: x, x))
    assert_same(variant, chosen(True), draw(variant, key, x), x)
    np.testing.assert_array_equal(chosen(False), x)


@every
def test_donated_buffers(variant, key):
    x = inputs((64, 32, 8))
    expected = draw(variant, key, x)
    step = jax.jit(lambda x: draw(variant, key, x), donate_argnums=0)
    assert_same(variant, step(x), expected, inputs((64, 32, 8)))
    assert x.is_deleted()


@pytest.mark.slow
@every
def test_linearize_and_transpose_use_the_same_mask(variant, key):
    x = inputs()
    _, pushforward = jax.linearize(lambda x: draw(variant, key, x), x)
    _, pullback = jax.vjp(lambda x: draw(variant, key, x), x)
    assert_same(variant, pushforward(x), pullback(x)[0], x)


def test_four_microbatches_draw_the_masks_of_the_full_batch(key):
    """Accumulated gradients are those of the full batch: integers, so that no order of sums matters."""
    batch = jnp.asarray(np.random.default_rng(0).integers(-8, 8, (16, 6)), jnp.float32)
    weights = jnp.asarray(np.random.default_rng(1).integers(-8, 8, (6,)), jnp.float32)

    def loss(weights, x, start):
        return (dropjax.dropout(key, x * weights[None], 0.5, start={0: start}) ** 2).sum()

    gradient = jax.jit(jax.grad(loss))
    parts = [gradient(weights, batch[i : i + 4], i) for i in range(0, 16, 4)]
    np.testing.assert_array_equal(sum(parts), gradient(weights, batch, 0))


def test_reverse_mode_through_a_scan_keeps_no_masks(key):
    """A thousand steps of a recurrent net with dropout store keys, not masks: bytes grow by 8 a step."""

    def bytes_kept(steps, rate):
        keys = jax.random.split(key, steps)

        def loss(x):
            return jax.lax.scan(lambda x, key: (dropjax.dropout(key, x, rate), None), x, keys)[0].sum()

        _, backward = jax.vjp(loss, jnp.ones((128, 128)))
        return sum(leaf.nbytes for leaf in jax.tree.leaves(backward) if hasattr(leaf, "nbytes"))

    assert bytes_kept(40, 0.5) - bytes_kept(20, 0.5) == 20 * 8


@pytest.mark.parametrize("width", [4, 16, 64, 256])
def test_a_compiled_step_keeps_at_most_the_words_of_rows_and_columns(width, key):
    """XLA may keep two words a row, where rows are long, and two a column, for each layer: not a word an element."""

    def temporary(drop):
        def loss(x, key):
            for i in range(6):
                x = jnp.tanh(drop(jax.random.fold_in(key, i), x) @ jnp.ones((width, width)))
            return x.sum()

        step = jax.jit(jax.grad(loss)).lower(jnp.ones((2**12, width)), key).compile()
        return step.memory_analysis().temp_size_in_bytes

    words = 8 * (2**12 * (width >= 32) + width) + 2**12
    assert (
        temporary(lambda key, x: dropjax.dropout(key, x, 0.5)) <= temporary(lambda key, x: x) + 6 * words + 16 * width
    )


@pytest.mark.slow
@every
@pytest.mark.parametrize(("where", "dtype"), [("dense", jnp.float32), ("attention", jnp.bfloat16)])
def test_compiled_backward_pass_stores_no_masks(variant, dtype, where, key):
    """Four layers with dropout hold no mask and no words, and as many arrays as four layers with a select.

    Gaussian noise is kept from being stored by a barrier, which in some versions of XLA costs an array a layer.
    """

    def dense(x, drop):
        return drop(jax.nn.relu(jnp.einsum("bqd,de->bqe", x, jnp.ones((256, 256), dtype))))

    def attention(x, drop):
        return x + jnp.einsum("bqk,bkd->bqd", drop(jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", x, x))), x)

    def arrays(drop):
        def loss(x, key):
            for i in range(4):
                x = {"dense": dense, "attention": attention}[where](
                    x, lambda y, i=i: drop(jax.random.fold_in(key, i), y)
                )
            return (x.astype(jnp.float32) ** 2).sum()

        x = jnp.ones((4, 256, 256 if where == "dense" else 16), dtype)
        text = jax.jit(jax.grad(loss)).lower(x, key).compile().as_text()
        return re.findall(r"^  (?:ROOT )?%[^ ]+ = \(?(\w+)\[(?:4,256|1024),256\]", text[text.index("\nENTRY") :], re.M)

    ours, theirs = arrays(lambda key, y: draw(variant, key, y)), arrays(lambda key, y: jnp.where(y > 0.1, y * 2, 0))
    assert {"pred", "u32", "s32"}.isdisjoint(ours)
    assert len(theirs) > 4
    assert len(ours) <= len(theirs) + (0 if variant.exact else 4)


@every
def test_gradient_has_the_dtype_of_the_input(variant, key):
    gradient = jax.grad(lambda x: draw(variant, key, x).astype(jnp.float32).sum())
    for dtype in [jnp.float16, jnp.bfloat16]:
        assert jax.eval_shape(gradient, inputs(dtype=dtype)).dtype == dtype
