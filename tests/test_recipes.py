"""Data, tensor, sequence and pipeline parallel, FSDP and pmap: each recipe of the example is one device's step."""

import functools
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compiler")]
PATH = Path(__file__).parent.parent / "examples" / "multi_device.py"
SPEC = importlib.util.spec_from_file_location("multi_device", PATH)
example = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(example)


@functools.cache
def one_device():
    """The step of one device, and how far the order of sums may move each of its numbers."""
    params, keys, *pair = example.make(0)
    one = example.single(params, keys, *pair)
    shaken, *others = example.shake(0, (params, *pair))
    return one, example.largest(example.single(shaken, keys, *others), one)


def run(name):
    """The step of a recipe, whose masks must be those of one device, and its numbers as near as sums can be."""
    found, (one, bounds) = example.RECIPES[name][1]()(*example.make(0)), one_device()
    for kind in example.KINDS:
        np.testing.assert_array_equal(np.reshape(found.masks[kind], one.masks[kind].shape), one.masks[kind])
    differences = example.largest(found, one)
    assert {of: differences[of] for of in differences if not differences[of] <= bounds[of]} == {}
    return found


def assert_pieces(array, alike):
    """What devices really hold, not what types say of it: the same where that is meant, else other values."""
    held = {}
    for shard in array.addressable_shards:
        held.setdefault(str(shard.index), []).append(np.asarray(shard.data))
    assert [len(values) for values in held.values()] == [alike] * (8 // alike)
    assert all(np.array_equal(value, values[0]) for values in held.values() for value in values)
    pairs = itertools.combinations([values[0] for values in held.values()], 2)
    assert not any(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("name", "alike"), [("data", 1), ("tensor", 8), ("sequence", 1), ("data × tensor", 2)])
def test_shard_map(name, alike):
    """Masks differ over data and sequence shards; over tensor shards those of the residual stream agree, as it does."""
    found = run(name)
    for kind in example.KINDS:
        assert_pieces(found.masks[kind], alike if kind == "residual" else 1)
    assert_pieces(found.output, alike)


def test_a_stage_of_the_pipeline_draws_each_microbatch_of_its_layer():
    found, (one, _) = run("pipeline × data"), one_device()
    for kind in example.KINDS:
        assert_pieces(found.masks[kind], 1)
        for shard in found.masks[kind].addressable_shards:
            stage, half = divmod(shard.device.id, 2)
            rows = 2 * np.arange(example.MICROBATCHES) + half
            np.testing.assert_array_equal(shard.data[0, :, 0], one.masks[kind][stage, rows])


@pytest.mark.parametrize("name", ["FSDP", "FSDP, explicit"])
def test_fsdp_holds_an_eighth_of_each_parameter_on_each_device(name, monkeypatch):
    held, put = [], jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda of, where: held.append(put(of, where)) or held[-1])
    found, params = run(name), example.make(0)[0]
    for tree in (held[0], found.gradients):
        assert set(tree) == set(params)
        for of, array in tree.items():
            assert [8 * shard.data.size for shard in array.addressable_shards] == [params[of].size] * 8


def test_a_train_step_under_pmap_is_that_of_one_device():
    found, (one, bounds) = run("pmap"), one_device()
    for kind in example.KINDS:
        assert_pieces(found.masks[kind], 1)
    for of, params in example.make(0)[0].items():
        ours, theirs = (params - np.float32(0.01) * np.asarray(step.gradients[of]) for step in (found, one))
        assert (theirs != params).any()
        assert np.abs(ours - theirs).max() <= 0.01 * bounds[of] + np.finfo(np.float32).eps * np.abs(theirs).max()


def test_one_other_mask_of_twelve_is_far_beyond_the_bound():
    (one, bounds), (params, keys, *pair) = one_device(), example.make(0)
    other = example.single(params, keys.at[-1, -1].set(jax.random.key(1)), *pair)
    differences = example.largest(other, one)
    assert all(differences[of] > 100 * bounds[of] for of in differences)


def test_the_command_line(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, str(PATH), "--out", str(tmp_path / "new"), "--seed", "3"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ran.returncode == 0, ran.stderr
    results = json.loads((tmp_path / "new" / "multi_device.json").read_text())["results"]
    assert set(results) == set(example.RECIPES)
    assert len({of["checksum"] for of in results.values()}) == 1
    assert all(of["equal"] and name in ran.stdout and of["checksum"] in ran.stdout for name, of in results.items())
    assert (tmp_path / "new" / "multi_device.png").stat().st_size > 50_000


@pytest.mark.parametrize("seed", ["-1", str(2**32), "one"])
def test_a_bad_seed_is_an_error(seed, capsys):
    with pytest.raises(SystemExit) as caught:
        example.main(["--seed", seed])
    assert caught.value.code == 2
    assert "argument --seed" in capsys.readouterr().err
