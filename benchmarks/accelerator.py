"""Dropout on an accelerator, as a share of the bandwidth that `x * 2` reaches: `python -m benchmarks.accelerator`.

Forward and backward at 2^28 elements and more, against Flax, PyTorch and a Triton kernel that draws its mask by
seed, where they are installed; fused programs; and whether words and masks are those of the CPU, bit for bit.
"""

import argparse
import functools
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import dropjax
from benchmarks import dropout, programs, timing

RATE = dropout.RATE
Run = Callable[[], Any]


def torch_runs(n: int, dtype: str) -> dict[str, Run]:
    """PyTorch's dropout on the GPU, and a seeded Triton kernel."""
    if not importlib.util.find_spec("torch"):
        return {}
    import torch

    if not torch.cuda.is_available():
        return {}
    x = torch.ones(n, dtype=getattr(torch, dtype), device="cuda")

    def synchronised(step: Callable[[], Any]) -> Run:
        def run() -> None:
            step()
            torch.cuda.synchronize()

        return run

    runs = {"torch": synchronised(lambda: torch.nn.functional.dropout(x, RATE, training=True))}
    if importlib.util.find_spec("triton"):
        import triton
        import triton.language as tl

        @triton.jit
        def kernel(x, y, n, rate, seed, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
            place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(x + place, mask=place < n)
            kept = tl.rand(seed, place) >= rate
            tl.store(y + place, tl.where(kept, value / (1 - rate), 0.0), mask=place < n)

        y = torch.empty_like(x)
        runs["triton, seeded"] = synchronised(lambda: kernel[(triton.cdiv(n, 1024),)](x, y, n, RATE, 0, BLOCK=1024))
    return runs


def bandwidth(elements: int, dtype: Any, rounds: int) -> dict[str, Any]:
    """GB/s of a read and a write by each, and the share of what `x * 2` reaches."""
    shape, name = (elements // 4096, 4096), jnp.dtype(dtype).name
    key, x = jax.random.key(0), jnp.ones(shape, dtype)
    steps = dropout.dropjax_steps(key) | {k: v for k, v in dropout.peer_steps(key).items() if k.startswith("flax")}
    runs: dict[str, Run] = {k: functools.partial(jax.jit(step), x) for k, step in steps.items()}
    seconds = timing.alternate(runs | torch_runs(elements, name), rounds)
    moved = 2 * x.nbytes
    return {
        "elements": elements,
        "dtype": name,
        "GB/s": {k: moved / statistics.median(v) / 1e9 for k, v in seconds.items()},
        "share of x * 2": {k: 1 / ratio for k, ratio in timing.ratios(seconds, "x * 2").items()},
    }


def same_bits() -> dict[str, bool]:
    """Whether this device draws the words and masks that the CPU draws, and scales as it does."""
    cpu = jax.devices("cpu")[0]
    x = np.linspace(-3, 3, 999 * 4097, dtype=np.float32).reshape(999, 4097)

    def drawn() -> list[np.ndarray]:
        key = jax.random.key(5)
        far = {0: np.uint32(2**31), 1: np.uint32(2**32 - 5000)}
        return [
            np.asarray(dropjax.bits.random_words(key, x.shape)),
            np.asarray(dropjax.bits.random_words(key, x.shape, start=far)),
            np.asarray(dropjax.keep_mask(key, x.shape, 0.3)),
            np.asarray(dropjax.dropout(key, x, 0.3)),
            np.asarray(dropjax.dropout(key, x.astype(jnp.bfloat16), jnp.float32(0.3))),
        ]

    here = drawn()
    with jax.default_device(cpu):
        there = drawn()
    names = ["words", "words far away", "mask", "dropout float32", "dropout bfloat16, traced rate"]
    return {n: bool(np.array_equal(a, b)) for n, a, b in zip(names, here, there, strict=True)}


def table(rows: list[dict[str, Any]]) -> str:
    """Shares of the bandwidth of `x * 2`, in percent, as Markdown."""
    names = list(rows[0]["GB/s"])
    lines = ["| elements | dtype | `x * 2`, GB/s | " + " | ".join(names[1:]) + " |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        shares = " | ".join(f"{100 * row['share of x * 2'][name]:.0f} %" for name in names[1:])
        lines.append(f"| {row['elements']} | {row['dtype']} | {row['GB/s']['x * 2']:.0f} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the table, and writes benchmarks/results/accelerator.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21, help="rounds of alternating calls (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="2^16 elements, nothing written: tries the runner")
    options = parser.parse_args()
    sizes = [2**16] if options.small else [2**28, 2**30]
    cases = [(size, dtype) for size in sizes for dtype in (jnp.float32, jnp.bfloat16)]
    rows = [bandwidth(size, dtype, options.rounds) for size, dtype in tqdm(cases, desc="sizes")]
    bits, fused = same_bits(), programs.fusion(options.rounds)
    print(timing.environment(), table(rows), f"as on the CPU: {bits}", f"over no dropout: {fused}", sep="\n\n")
    if not options.small:
        path = timing.save("accelerator", {"bandwidth": rows, "as on the CPU": bits, "over no dropout": fused})
        print(f"wrote {path.relative_to(path.parent.parent.parent)}")


if __name__ == "__main__":
    main()
