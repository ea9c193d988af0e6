"""The batteries, where they are installed: PractRand (`RNG_test` on PATH), TestU01 (libtestu01) and dieharder.

Each reads a stream from standard input and returns what it found; a finding is a line of the battery's own.
"""

import contextlib
import ctypes
import ctypes.util
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

UNITS = {"MB": 2**20, "GB": 2**30}
LIMIT = 1e-6  # TestU01: p outside [LIMIT, 1 - LIMIT]
WIDTH = {"high halves": 16, "low halves": 16, **{f"byte {k}": 8 for k in range(4)}}  # else 32 bits


def _feed(pipe: IO[bytes], stream: Iterator[memoryview], failures: list[Exception]) -> None:
    """Writes the stream until the reader has enough."""
    try:
        for block in stream:
            pipe.write(block)
    except BrokenPipeError:
        pass
    except Exception as failure:
        failures.append(failure)
    finally:
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


def _run(command: list[str], stream: Iterator[memoryview]) -> list[str]:
    """The lines that a program prints that reads the stream."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdin is not None
    assert process.stdout is not None
    failures: list[Exception] = []
    feeder = threading.Thread(target=_feed, args=(process.stdin, stream, failures))
    feeder.start()
    lines = process.stdout.read().decode(errors="replace").splitlines()
    feeder.join()
    if failures:
        raise failures[0]
    if process.wait() not in (0, 1):  # PractRand says 1 where a test failed
        raise RuntimeError(f"{command[0]} ended with {process.returncode}: {lines[-3:]}")
    return lines


def practrand(stream: Iterator[memoryview], order: str, amount: str) -> dict[str, Any]:
    """The core tests with standard folding, up to an amount such as 64GB, at every doubling."""
    lines = _run(["RNG_test", f"stdin{WIDTH.get(order, 32)}", "-tlmax", amount, "-tlmin", "1MB"], stream)
    version = lines[0].rpartition(" ")[2]
    findings, read, power, tests = [], "", 0, 0
    for line in lines:
        if found := re.match(r"length= (.*?) \(2\^(\d+)", line):
            read, power, tests = found[1], int(found[2]), 0
        if found := re.search(r"(\d+) test result\(s\)", line):  # those without anomalies
            tests += int(found[1])
        if re.search(r"unusual|suspicious|SUSPICIOUS|FAIL", line):
            findings.append(f"{read}: {' '.join(line.split())}")
            tests += 1
    bad = [line for line in findings if not line.endswith(("unusual", "mildly suspicious"))]
    if not tests or (not bad and 2**power != int(amount[:-2]) * UNITS[amount[-2:]]):
        raise RuntimeError(f"PractRand did not read {amount}: {lines[-3:]}")
    return {
        "battery": f"PractRand {version} core",
        "amount": read,
        "tests": tests,
        "findings": findings,
        "bad": len(bad),
    }


def testu01(stream: Iterator[memoryview], battery: str) -> dict[str, Any]:
    """SmallCrush, Crush or BigCrush, in a process of its own that reads 32 bits at a time, high byte first."""
    program = "from benchmarks.mask_quality import batteries; batteries.testu01_child()"
    swapped = (np.frombuffer(block, np.uint32).byteswap().data.cast("B") for block in stream)
    lines = _run([sys.executable, "-c", program, battery], swapped)
    results = [line.split("\t") for line in lines if line.startswith("p-value\t")]
    if not results:
        raise RuntimeError(f"TestU01 gave no result: {lines[-3:]}")
    outside = [(name, p) for _, name, p in results if not LIMIT <= float(p) <= 1 - LIMIT]
    unusual = [f"{name}: p = {p}" for _, name, p in results if not 1e-3 <= float(p) <= 1 - 1e-3]
    return {
        "battery": f"TestU01 1.2.3 {battery}",
        "amount": "",
        "tests": len(results),
        "findings": unusual,
        "bad": len(outside),
    }


def testu01_child() -> None:
    """Runs the battery named on the command line over standard input; prints a line for each p-value."""
    library = ctypes.CDLL(ctypes.util.find_library("testu01") or "libtestu01.so.0", mode=ctypes.RTLD_GLOBAL)
    library.ufile_CreateReadBin.restype = ctypes.c_void_p
    library.ufile_CreateReadBin.argtypes = [ctypes.c_char_p, ctypes.c_long]
    ctypes.c_int.in_dll(library, "swrite_Basic").value = 0
    run = getattr(library, f"bbattery_{sys.argv[1]}")
    run.argtypes, run.restype = [ctypes.c_void_p], None
    run(library.ufile_CreateReadBin(b"/dev/stdin", 2**16))
    count = ctypes.c_int.in_dll(library, "bbattery_NTests").value
    values = (ctypes.c_double * 256).in_dll(library, "bbattery_pVal")
    names = (ctypes.c_char_p * 256).in_dll(library, "bbattery_TestNames")
    for test in range(count):
        name = names[test]
        print(f"p-value\t{name.decode() if name else test}\t{values[test]:.6g}")


def dieharder(stream: Iterator[memoryview]) -> dict[str, Any]:
    """All of dieharder's tests; what it calls FAILED has p below 1e-6."""
    lines = _run(["dieharder", "-a", "-g", "200"], stream)
    results = [[cell.strip() for cell in line.split("|")] for line in lines if re.search(r"PASSED|WEAK|FAILED", line)]
    if not results:
        raise RuntimeError(f"dieharder gave no result: {lines[-3:]}")
    findings = [" ".join(cells) for cells in results if cells[-1] != "PASSED"]
    return {
        "battery": "dieharder 3.31.1",
        "amount": "",
        "tests": len(results),
        "findings": findings,
        "bad": sum(line.endswith("FAILED") for line in findings),
    }
