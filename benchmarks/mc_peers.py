"""Monte Carlo dropout against other libraries on an equal network: baal, torch-uncertainty, probly, plain PyTorch.

python -m benchmarks.mc_peers [--rounds 5]

T = 100 samples of 784-1200-1200-10 with dropout before every layer (probly's leaves the first without), for one example
and for a thousand, on the CPU. Those that are not installed are left out. Ours gives the summary `mc.classify`, the
others all samples.
"""

import argparse
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import numpy as np

from benchmarks import timing
from benchmarks.mc import T, network
from dropjax import mc


def peers(batch: int) -> dict[str, Callable[[], Any]]:
    """Returns a run of T samples for each peer that is installed."""
    import torch

    def model(dropout: bool) -> Any:
        layers: list[Any] = []
        for i, (m, n) in enumerate(((784, 1200), (1200, 1200), (1200, 10))):
            layers += [torch.nn.Dropout(0.5)] * dropout + [torch.nn.Linear(m, n)] + [torch.nn.ReLU()] * (i < 2)
        return torch.nn.Sequential(*layers)

    x = torch.rand(batch, 784)
    looped, runs = model(True).train(), {}

    def torch_loop() -> Any:
        with torch.no_grad():
            return [looped(x) for _ in range(T)]

    runs["PyTorch, a loop"] = torch_loop
    try:
        from baal import ModelWrapper
        from baal.bayesian.dropout import MCDropoutModule
        from baal.modelwrapper import TrainingArgs

        for copies in (True, False):
            args = TrainingArgs(use_cuda=False, replicate_in_memory=copies)
            wrapper = ModelWrapper(MCDropoutModule(model(True)), args)
            name = f"baal {metadata.version('baal')}, {'copies of the batch' if copies else 'a loop'}"
            runs[name] = lambda wrapper=wrapper: wrapper.predict_on_batch(x, T)  # type: ignore[misc]
    except ImportError as error:
        print("without baal:", error)
    try:
        from torch_uncertainty.methods.mc_dropout import mc_dropout

        for copies in (True, False):
            wrapped = mc_dropout(model(True), num_estimators=T, on_batch=copies).eval()

            def run(wrapped: Any = wrapped) -> Any:
                with torch.no_grad():
                    return wrapped(x)

            how = "copies of the batch" if copies else "a loop"
            runs[f"torch-uncertainty {metadata.version('torch_uncertainty')}, {how}"] = run
    except ImportError as error:
        print("without torch-uncertainty:", error)
    try:
        from probly.representation.dropout import Dropout

        converted = Dropout(model(False), 0.5)
        converted.eval()

        def probly() -> Any:
            with torch.no_grad():
                return converted.predict_representation(x, T)

        runs[f"probly {metadata.version('probly')}"] = probly
    except ImportError as error:
        print("without probly:", error)
    return runs


def ours(batch: int) -> Callable[[], Any]:
    """Returns a run of the streamed summary."""
    one_pass, weights, x = network(batch)
    key = jax.random.key(0)

    def summary(key: Any, weights: Any, x: Any) -> Any:
        return mc.classify(lambda key: one_pass(key, weights, x), key, T, chunk_size=T if batch == 1 else 4)

    compiled: Any = jax.jit(summary)
    return lambda: compiled(key, weights, x)


def main() -> None:
    """Measures, prints, and writes benchmarks/results/mc_peers.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    results: dict[str, Any] = {}
    for batch in (1, 1000):
        seconds = timing.alternate(
            {"dropjax": ours(batch)} | peers(batch), rounds if batch > 1 else 5 * rounds, rest=0.3
        )
        ratios = timing.ratios(seconds, "dropjax")
        results[str(batch)] = {
            name: {"milliseconds": 1000 * float(np.median(of)), "ratio": ratios[name]} for name, of in seconds.items()
        }
        print(f"batch {batch}, T = {T}")
        for name, of in results[str(batch)].items():
            print(f"  {name:<48}{of['milliseconds']:10.1f} ms{of['ratio']:8.2f} times ours")
    print(timing.save("mc_peers", {"rounds": rounds, "samples": T, "rows": results}))


if __name__ == "__main__":
    main()
