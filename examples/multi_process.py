"""Dropout in several processes: the same masks as in one, also when a process is killed in the middle.

Local processes train a small network together: jax.distributed over gloo, the batch cut over all their devices, and a
loss that knows nothing of it. Without --processes this tells the whole story: one process trains; two train, and one
of them is killed; four go on from the last checkpoint, and one process ends it. The masks of all steps must be those
of one process to the bit, the parameters to the order in which float32 sums are taken:

    pip install '.[train]'
    python examples/multi_process.py
    python examples/multi_process.py --processes 2 --kill-at 25
"""

import argparse
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dropjax
from dropjax import training

BATCH, FEATURES, WIDTH, RATE = 64, 16, 32, 0.3
HEARTBEAT = 10  # seconds after which jax.distributed takes a silent process for dead, and ends the others
PATIENCE = 60  # seconds that the parent gives the others after the first one failed, before it kills them
TELLING = re.compile(r"[\w.]+(Error|Interrupt): |fit: |F\d{4} .*?\] ")  # the lines of a worker that say why it ended


def loss(state: dict[str, Any], batch: tuple[Array, Array], key: Array) -> tuple[Array, dict[str, Array]]:
    """Returns the squared error, and the checksum of the masks of all steps, which is carried from step to step."""
    (x, y), weights = batch, state["params"]
    mask = dropjax.keep_mask(key, (len(x), WIDTH), RATE)
    hidden = dropjax.apply_mask(jnp.tanh(x @ weights["first"]), mask, RATE)
    return jnp.mean((hidden @ weights["last"] - y) ** 2), {"masks": state["masks"] * 31 + checksum(mask)}


def checksum(mask: Array) -> Array:
    """Returns a sum of weights of the places that are kept, modulo 2^32: sums of pieces add up in any order."""
    places = jnp.arange(1, mask.size + 1, dtype=jnp.uint32).reshape(mask.shape)
    return jnp.sum(jnp.where(mask, places * (places ^ np.uint32(0x9E3779B1)), 0), dtype=jnp.uint32)


def initial(key: Array) -> dict[str, Any]:
    """Returns the state before training."""
    first, last = jax.random.split(key)
    weights = {"first": jax.random.normal(first, (FEATURES, WIDTH)) / 4, "last": jax.random.normal(last, (WIDTH,)) / 6}
    return {"params": weights, "masks": jnp.uint32(0)}


def work(args: argparse.Namespace) -> None:
    """What one worker does: trains with the others, and writes what it saw into `args.out`."""
    threading.Thread(target=lambda: os.read(0, 1) or os._exit(1), daemon=True).start()  # does not outlive its parent
    if args.processes > 1:
        jax.distributed.initialize(
            args.coordinator, args.processes, args.worker, heartbeat_timeout_seconds=HEARTBEAT,
            initialization_timeout=PATIENCE, shutdown_timeout_seconds=PATIENCE,
        )  # fmt: skip
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    whole, cut = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))
    victim = args.processes - 1 if args.kill_worker is None else args.kill_worker
    first, seen = args.steps, []

    def spread(values: np.ndarray) -> Array:
        return jax.make_array_from_callback(values.shape, cut, values.__getitem__)

    def data(step: int) -> tuple[Array, Array]:
        nonlocal first
        first = min(first, step)
        if (step, args.worker) == (args.kill_at, victim):
            os.kill(os.getpid(), signal.SIGKILL)
        x = np.random.default_rng([args.seed, step]).normal(size=(BATCH, FEATURES)).astype(np.float32)
        return spread(x), spread(np.sin(x.sum(-1)))

    @functools.partial(jax.jit, out_shardings=whole)
    def flat(weights: dict[str, Array]) -> Array:
        return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(weights)])

    def evaluate(state: dict[str, Any]) -> dict[str, float]:
        seen.append(np.asarray(flat(state["params"])))
        return {"masks": float(state["masks"])}

    draw = jax.jit(lambda key: dropjax.keep_mask(key, (BATCH, WIDTH), RATE), out_shardings=cut)
    mine = np.zeros((BATCH, WIDTH), bool)
    for shard in draw(jax.random.key(args.seed)).addressable_shards:
        mine[shard.index] = shard.data
    np.save(args.out / f"{args.worker:02}.npy", mine)
    placed = {"params": cut if args.shard_parameters else whole, "masks": whole}
    result = training.fit(
        loss, jax.jit(initial, out_shardings=placed)(jax.random.key(args.seed)), optax.sgd(0.05), data,
        seed=args.seed, steps=args.steps, evaluate=evaluate, evaluate_every=args.checkpoint_every,
        checkpoint_dir=args.checkpoint_dir, checkpoint_every=args.checkpoint_every,
        progress=False if args.quiet else None,
    )  # fmt: skip
    if not seen:  # nothing was left to do
        evaluate(result.state)
    np.savez(
        args.out / f"{args.worker}.npz", first=first, losses=result.losses, parameters=np.array(seen),
        evaluated=[step for step, _ in result.history], masks=[int(of["masks"]) for _, of in result.history],
    )  # fmt: skip


class Run(NamedTuple):
    """What became of the workers of one run; lists have an entry for each of them."""

    codes: list[int]
    """Their exit codes; the negative of the signal that ended them."""
    outputs: list[str]
    """All that they wrote."""
    failed: int | None
    """The worker that failed first."""
    masks: list[np.ndarray]
    """One batch's mask, bool `[BATCH, WIDTH]`: the piece that lay in the worker, False elsewhere."""
    results: list[dict[str, np.ndarray]]
    """How training went, see `work`; empty where one failed."""


def launch(processes: int, args: argparse.Namespace, **changes: Any) -> Run:
    """Runs workers with the options and their changes, and waits until all have ended, one way or another.

    Never longer than `args.timeout`, and `PATIENCE` after the first of them failed: what then still runs is killed.
    """
    args = argparse.Namespace(**(vars(args) | {"processes": processes} | changes))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={args.devices_per_process}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo", "XLA_FLAGS": flags,
        "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    command = [sys.executable, __file__, "--coordinator", coordinator]
    for name, value in vars(args).items():
        if value is not None and value is not False and name not in ("coordinator", "worker", "out"):
            command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    workers: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory() as out:
        logs = [Path(out) / f"{worker}.log" for worker in range(processes)]
        try:
            for worker, log in enumerate(logs):
                own = [*command, "--worker", str(worker), "--out", out]
                with log.open("wb") as to:
                    process = subprocess.Popen(own, stdin=subprocess.PIPE, stdout=to, stderr=to, env=environment)
                workers.append(process)
            failed = _wait(workers, logs[0], args)
        finally:
            for process in workers:
                process.kill()
                process.communicate()
        codes, outputs = [process.returncode for process in workers], [log.read_text(errors="replace") for log in logs]
        masks = [np.load(path) for path in sorted(Path(out).glob("*.npy"))]
        results = []
        for worker in range(0 if any(codes) else processes):
            with np.load(Path(out) / f"{worker}.npz") as result:
                results.append(dict(result))
    return Run(codes, outputs, failed, masks, results)


def _wait(workers: list[subprocess.Popen], log: Path, args: argparse.Namespace) -> int | None:
    """Shows the first worker's progress bar until all have ended or time is up; returns which worker failed first."""
    end, failed = time.monotonic() + args.timeout, None
    while any(process.poll() is None for process in workers) and time.monotonic() < end:
        if failed is None and (failed := _failed(workers)) is not None:
            end = min(end, time.monotonic() + PATIENCE)
        if not args.quiet and sys.stderr.isatty():
            lines = log.read_bytes().decode(errors="replace").split("\r")
            bar = (lines[-1].splitlines() or [""])[0] if len(lines) > 1 else "starting"
            print(f"\r{_named(len(workers)) + ', ' + bar:<100.100}", end="", file=sys.stderr)
        time.sleep(0.05)
    if not args.quiet and sys.stderr.isatty():
        print(f"\r{'':<100}\r", end="", file=sys.stderr)
    return failed if failed is not None else _failed(workers)


def _failed(workers: list[subprocess.Popen]) -> int | None:
    return next((worker for worker, process in enumerate(workers) if process.poll()), None)


def explain(run: Run) -> str:
    """Returns which worker failed first and how, and the lines of all of them that say why."""
    text = ["no worker failed, but they took too long and were killed"]
    if run.failed is not None:
        text = [f"worker {run.failed} of {len(run.codes)} ended first, {_how(run.codes[run.failed])}"]
    for worker, (code, output) in enumerate(zip(run.codes, run.outputs, strict=True)):
        lines = [line for line in re.split(r"[\r\n]+", output) if line]
        lines = [line for line in lines if TELLING.match(line)] or (lines[-3:] if code > 0 else ["(nothing)"])
        text += [f"worker {worker}, {_how(code)}, wrote:", *(f"  {textwrap.shorten(line, 230)}" for line in lines[:4])]
    return "\n".join(text)


def _how(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def _named(processes: int) -> str:
    return f"{processes} process" + "es" * (processes > 1)


def rounding(steps: int) -> float:
    """Returns how far float32 sums in another order may lead apart, to first order.

    Two orders of summing n numbers differ by at most n eps times the sum of their magnitudes. A gradient is made of
    sums over features, width and batch, n in all, and moves a parameter by the learning rate, 0.05, times a mean of
    magnitudes which are below 20 here: by less than 1 in sum. Steps add up, and descent that converges does not
    magnify what was before.
    """
    return steps * (FEATURES + WIDTH + BATCH) * float(np.finfo(np.float32).eps)


def sums(run: Run) -> list[int]:
    """Returns the checksums of the workers' pieces of one batch's mask."""
    return [int(checksum(mask)) for mask in jnp.asarray(run.masks)]


def same(run: Run, alone: Run) -> bool:
    """Returns whether the masks are those of one process: those of all steps, and the pieces of one batch."""
    got, want = (dict(zip(of.results[0]["evaluated"], of.results[0]["masks"], strict=True)) for of in (run, alone))
    return got == {step: want[step] for step in got} and np.array_equal(sum(run.masks), alone.masks[0])


def row(run: Run, alone: Run) -> str:
    """Returns a line of the table: a run beside the uninterrupted run of one process."""
    got, want = run.results[0], alone.results[0]
    steps = len(got["losses"])
    at = list(want["evaluated"]).index(steps)
    losses = np.abs(got["losses"] - want["losses"][:steps]).max()
    parameters = np.abs(got["parameters"][-1] - want["parameters"][at]).max()
    masks = f"{got['masks'][-1]:08x}   {want['masks'][at]:08x}"
    span = f"{got['first']} to {steps}"
    return f"{_named(len(run.codes)):<12}{span:>10}   {masks}   {losses:9.1e}   {parameters:10.1e}"


def compare(args: argparse.Namespace, checkpoint_dir: Path | None) -> int:
    """Runs what was asked for, and one process beside it, and prints how they compare."""
    story = [(args.processes, args.steps, args.kill_at)]
    if args.processes is None:
        kill_at = args.steps // 2 - 1 if args.kill_at is None else args.kill_at
        later = (kill_at // args.checkpoint_every + 2) * args.checkpoint_every
        story = [(2, args.steps, kill_at), (4, min(later, args.steps), None), (1, args.steps, None)]
    print(f"{'':<12}             masks of all steps    furthest from 1 process")
    print(f"{'':<12}     steps       here   1 process      losses   parameters", flush=True)
    runs: list[Run] = []
    for processes, steps, kill_at in [(1, args.steps, None), *story]:
        folder = checkpoint_dir if runs else None
        runs.append(run := launch(processes, args, steps=steps, kill_at=kill_at, checkpoint_dir=folder))
        if run.results:
            print(row(run, runs[0]), flush=True)
        elif args.processes is None and kill_at is not None and run.failed is not None:
            print(
                f"{_named(2)}, one killed at step {kill_at}: {textwrap.indent(explain(run), '  ').lstrip()}", flush=True
            )
        else:
            print(f"multi_process: {_named(processes)}: {explain(run)}", file=sys.stderr)
            return 1
    print("\nThe mask of one batch, and its pieces in the processes:")
    for run in runs:
        pieces = sums(run)
        print(f"{_named(len(pieces)):<12} {sum(pieces) % 2**32:08x} = {' + '.join(f'{piece:08x}' for piece in pieces)}")
    print(f"Losses and parameters: float32 sums in another order, which allow {rounding(args.steps):.1e}.")
    return 0 if all(same(run, runs[0]) for run in runs if run.results) else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the checked options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--processes", type=int, help="how many to run, beside one; without it, the whole story")
    parser.add_argument("--devices-per-process", type=int, default=1, help="virtual CPU devices of each process")
    parser.add_argument("--steps", type=int, default=60, help=f"training steps of {BATCH} examples, at least 1")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything, in [0, 2^32)")
    parser.add_argument("--kill-at", type=int, help="the step at which a process is killed by SIGKILL")
    parser.add_argument("--kill-worker", type=int, help="which process that is, the last by default; 0 coordinates")
    parser.add_argument("--checkpoint-dir", type=Path, help="folder of checkpoints, from which the same run resumes")
    parser.add_argument("--checkpoint-every", type=int, default=10, help="steps from one checkpoint to the next")
    parser.add_argument("--shard-parameters", action="store_true", help="cut the parameters over all devices, too")
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which a run's processes are killed")
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    for hidden, kind in (("worker", int), ("coordinator", str), ("out", Path)):  # what a worker is told
        parser.add_argument(f"--{hidden}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, least, below in (
        ("processes", 1, 65), ("devices_per_process", 1, 65), ("steps", 1, 10**6), ("seed", 0, 2**32),
        ("kill_worker", 0, args.processes or 2), ("kill_at", 0, args.steps), ("checkpoint_every", 1, 10**6),
        ("timeout", 1, 10**6),
    ):  # fmt: skip
        if (value := getattr(args, name)) is not None and not least <= value < below:
            parser.error(f"argument --{name.replace('_', '-')}: must be in [{least}, {below}), got {value}")
    parts = FEATURES if args.shard_parameters else BATCH
    if parts % (devices := (args.processes or 4) * args.devices_per_process):
        parser.error(f"argument --processes: the devices of all must divide {parts}, got {devices} of them")
    folder = args.checkpoint_dir
    if args.processes is None and folder is not None and folder.exists() and any(folder.iterdir()):
        parser.error(f"argument --checkpoint-dir: must be empty without --processes, got {folder}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Is one of the workers, or starts them and compares."""
    args = parse(argv)
    if args.worker is not None:
        work(args)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return compare(args, args.checkpoint_dir or (Path(folder) if args.processes is None else None))


if __name__ == "__main__":
    raise SystemExit(main())
