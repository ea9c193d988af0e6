"""Streams dropjax's words into batteries of tests and records every run: `python -m benchmarks.mask_quality`.

    python -m benchmarks.mask_quality practrand column-major --amount 8GB
    python -m benchmarks.mask_quality Crush --seed 2
    python -m benchmarks.mask_quality masks
    python -m benchmarks.mask_quality table

Every run adds a line to `benchmarks/results/mask_quality.jsonl`, whatever came out; `table` prints them,
and `speed` times the mixers that were tried.
"""

import argparse
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dropjax
from benchmarks.mask_quality import batteries, contingency, mixers, orders

RECORDS = Path(__file__).parents[1] / "results" / "mask_quality.jsonl"
LIMIT = batteries.LIMIT


def masks(seed: int) -> dict[str, Any]:
    """The statistics of masks at several rates, of a training run, and of words that lines share."""
    found: dict[str, float] = {}
    for name, rate, dropped in contingency.runs(seed):
        found |= {f"{name}, rate {rate}, {test}": p for test, p in contingency.p_values(dropped, rate).items()}
    key = jax.random.key(seed)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(1024))
    lines = {
        "rows": dropjax.bits.random_words(key, (1024, 4096)),
        "keys": jax.vmap(lambda key: dropjax.bits.random_words(key, (4096,)))(keys),
    }
    found |= {f"words that {name} share": contingency.shared_words(np.asarray(w)) for name, w in lines.items()}
    return {
        "battery": "statistics of masks",
        "amount": "",
        "tests": len(found),
        "findings": [f"{name}: p = {p:.2g}" for name, p in found.items() if p < 1e-3],
        "bad": sum(p < LIMIT for p in found.values()),
    }


def table(records: list[dict[str, Any]]) -> str:
    """The records as Markdown."""
    lines = ["| date | battery | order | mixer | seed | amount | results | clean | unusual |", "|---" * 9 + "|"]
    for r in sorted(records, key=lambda r: (r["mixer"] != "contract", r["battery"], r["order"], r["seed"])):
        clean = "yes" if r["bad"] == 0 else f"**no**: {r['bad']} at {r['amount'] or 'the end'}"
        unusual = r["unusual"] if r["bad"] == 0 else ""
        cells = (r["date"], r["battery"], r["order"], r["mixer"], r["seed"], r["amount"], r["tests"], clean, unusual)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs one battery on one order of words, and adds a line to the record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mask_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = ["practrand", "SmallCrush", "Crush", "BigCrush", "dieharder", "masks", "stream", "speed", "table"]
    parser.add_argument("battery", choices=commands)
    parser.add_argument("order", nargs="?", default="row-major", choices=orders.ORDERS)
    parser.add_argument("--seed", type=int, default=1, help="of the key (default: %(default)s)")
    parser.add_argument("--amount", default="8GB", help="PractRand stops there (default: %(default)s)")
    parser.add_argument("--mixer", default="contract", choices=mixers.MIXERS, help="a bad one must be caught")
    options = parser.parse_args()
    if options.battery == "table":
        print(table([json.loads(line) for line in RECORDS.read_text().splitlines()]))
        return
    if options.battery == "speed":
        print(mixers.speed())
        return
    mixers.install(options.mixer)
    stream = orders.stream(options.order, options.seed)
    if options.battery == "stream":
        for block in stream:
            sys.stdout.buffer.write(block)
    begin = time.monotonic()
    if options.battery == "practrand":
        result = batteries.practrand(stream, options.order, options.amount)
    elif options.battery == "dieharder":
        result = batteries.dieharder(stream)
    elif options.battery == "masks":
        result = masks(options.seed)
    else:
        result = batteries.testu01(stream, options.battery)
    result |= {"unusual": len(result["findings"]), "findings": result["findings"][:12]}  # a bad mixer has hundreds
    record = {
        "date": datetime.date.today().isoformat(),
        "order": "" if options.battery == "masks" else options.order,
        "seed": options.seed,
        "mixer": options.mixer,
        **result,
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "versions": {"dropjax": dropjax.__version__, "bits": dropjax.bits.VERSION, "jax": jax.__version__},
    }
    line = json.dumps(record)
    with RECORDS.open("a") as file:
        file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
