"""One of two processes that look for repeated masks: `python -m tests.watch_me PORT PROCESS`."""

import sys

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import dropjax
from dropjax.sharding import assert_masks_differ

jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
for by in (1, 2):  # a key for each device, and one for both

    def draw(by=by):
        key = jax.random.fold_in(jax.random.key(0), jax.lax.axis_index("data") // by)
        return dropjax.dropout(key, jnp.ones((2, 4)) + jax.lax.axis_index("data"), 0.5)

    try:
        assert_masks_differ(jax.jit(jax.shard_map(draw, mesh=mesh, in_specs=(), out_specs=P("data"))))
        print("all differ")
    except AssertionError as error:
        print(error)
