"""Kernel ridge regression: error, time and memory of ours and of scikit-learn.

* friedman: `make_friedman1` of scikit-learn (J. H. Friedman. Multivariate Adaptive Regression
  Splines. Annals of Statistics 19, 1991) with 10 features and noise 1, of which a perfect model
  would leave a root mean squared error of 1. As many points for tests as a quarter of those for
  training.
* mnist: digits from `--data-dir`, regressed on ten indicator variables; the largest output is the
  class. float32.

What factorises the kernel matrix gets `--most` points, what iterates on it `--size`, and what
samples it all. Within a set, all have the same Gaussian kernel and ridge; each runs in a process of
its own. The peak is what its fit and prediction take beyond the data and the libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks._measure import use_threads
from benchmarks._mnist import load_mnist
from benchmarks._report import machine, publish, table

SETTINGS: dict[str, dict[str, float]] = {
    "friedman": {"lengthscale": 2.5, "alpha": 1e-4},
    "mnist": {"lengthscale": 5.0, "alpha": 0.1},
}
METHODS = {
    "sklearn KernelRidge": "most",
    "ours KernelRidge": "size",
    "ours KernelRidge, in tiles": "size",
    "sklearn Nystroem + Ridge": "all",
    "ours NystromRidge, uniform": "all",
    "ours NystromRidge, rpcholesky": "all",
}
"""Each with the option that says how many points it gets."""
BUDGET = 4 * 2**30


def make_data(name: str, size: int, seed: int, data_dir: Path | None) -> dict[str, np.ndarray]:
    """Return training and test points and targets."""
    if name == "mnist":
        assert data_dir is not None
        x, y, test_x, test_y = load_mnist(data_dir)
        return {"x": x, "y": np.eye(10, dtype=x.dtype)[y], "test_x": test_x, "test_y": test_y}
    from sklearn.datasets import make_friedman1

    x, y = make_friedman1(size + size // 4, n_features=10, noise=1.0, random_state=seed)
    mean = y[:size].mean()
    return {"x": x[:size], "y": y[:size] - mean, "test_x": x[size:], "test_y": y[size:] - mean}


def make_model(method: str, settings: dict[str, Any]) -> Any:
    """Return an estimator, not fitted."""
    alpha, scale, rank = settings["alpha"], settings["lengthscale"], settings["rank"]
    seed = settings["seed"]
    if method.startswith("sklearn"):
        from sklearn.kernel_approximation import Nystroem
        from sklearn.kernel_ridge import KernelRidge
        from sklearn.linear_model import Ridge
        from sklearn.pipeline import make_pipeline

        gamma = 0.5 / scale**2
        if method == "sklearn KernelRidge":
            return KernelRidge(alpha=alpha, kernel="rbf", gamma=gamma)
        features = Nystroem(gamma=gamma, n_components=rank, random_state=seed)
        return make_pipeline(features, Ridge(alpha, fit_intercept=False))
    from lowrank_inverse.sklearn import KernelRidge as OurKernelRidge
    from lowrank_inverse.sklearn import NystromRidge

    if method.startswith("ours KernelRidge"):
        budget = 0 if "tiles" in method else BUDGET
        return OurKernelRidge(
            alpha,
            lengthscale=scale,
            rank=rank // 2,
            tol=1e-4,
            memory_budget=budget,
            random_state=seed,
        )
    sampling = method.rsplit(" ", 1)[1]
    return NystromRidge(alpha, lengthscale=scale, rank=rank, sampling=sampling, random_state=seed)


def run_one(folder: Path, name: str, method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Fit and test in this process."""
    data = {key: np.load(folder / f"{key}.npy") for key in ("x", "y", "test_x", "test_y")}
    n = {"most": settings["most"], "size": settings["size"], "all": len(data["x"])}[METHODS[method]]
    x, y = data["x"][:n], data["y"][:n]
    model = make_model(method, settings)
    before = _resident()
    start = time.perf_counter()
    model.fit(x, y)
    fitted = time.perf_counter()
    predicted = model.predict(data["test_x"])
    stop = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    if name == "mnist":
        error = 100 * float(np.mean(predicted.argmax(axis=1) != data["test_y"]))
    else:
        error = float(np.sqrt(np.mean((predicted - data["test_y"]) ** 2)))
    return {
        "n": len(x),
        "error": error,
        "fit_seconds": fitted - start,
        "predict_seconds": stop - fitted,
        "peak_bytes": max(peak, 0),
        "steps": getattr(model, "n_iter_", None),
    }


def _resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run_apart(folder: Path, name: str, method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Fit and test in a process of its own; what goes wrong is a result, too."""
    arguments = [str(folder), name, method, json.dumps(settings)]
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernel_ridge", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        said = finished.stderr.strip().splitlines() or [f"ended with {finished.returncode}"]
        return {"failed": said[-1]}
    return dict(json.loads(finished.stdout.strip().splitlines()[-1]))


def row(name: str, method: str, result: dict[str, Any]) -> dict[str, str]:
    """Format a line of the table."""
    if "failed" in result:
        cells = ["", result["failed"][:40], "", "", "", ""]
    else:
        unit = " %" if name == "mnist" else ""
        cells = [
            str(result["n"]),
            f"{result['error']:.{2 if unit else 4}f}{unit}",
            f"{result['fit_seconds']:.1f}",
            f"{result['predict_seconds']:.1f}",
            f"{result['peak_bytes'] / 2**20:.0f}",
            "" if result["steps"] is None else str(result["steps"]),
        ]
    headings = ("n", "test error", "fit, s", "predict, s", "peak, MiB", "steps")
    return {name: method, **dict(zip(headings, cells, strict=True))}


def main(arguments: list[str]) -> int:
    """Print the tables and write JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks kernel-ridge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sets", nargs="+", choices=SETTINGS, help="default: all that are there")
    parser.add_argument("--data-dir", type=Path, help="folder with mnist/; without it, no MNIST")
    parser.add_argument(
        "--size", type=int, default=20000, help="points to iterate on (default: 20000)"
    )
    parser.add_argument(
        "--most", type=int, default=20000, help="points to factorise (default: 20000)"
    )
    parser.add_argument("--rank", type=int, default=1000, help="points sampled (default: 1000)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--threads", type=int, default=1, help="of the processor (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for results")
    options = parser.parse_args(arguments)
    if options.size < 8 or options.rank < 2:
        parser.error(f"--size must be at least 8 and --rank 2; got {options.size}, {options.rank}")
    use_threads(options.threads)
    there = ["friedman"] if options.data_dir is None else list(SETTINGS)
    names = there if options.sets is None else options.sets
    if "mnist" in names and options.data_dir is None:
        parser.error("mnist needs --data-dir, a folder with the published files in mnist/")
    for name in names:
        extra = {key: getattr(options, key) for key in ("rank", "seed", "most", "size")}
        settings = {**SETTINGS[name], **extra}
        with tempfile.TemporaryDirectory() as folder:
            data = make_data(name, options.size, options.seed, options.data_dir)
            for key, array in data.items():
                np.save(Path(folder) / f"{key}.npy", array)
            results = {
                method: run_apart(Path(folder), name, method, settings)
                for method in tqdm(options.methods, desc=name, unit="method")
            }
        lines = table([row(name, method, result) for method, result in results.items()])
        text = (
            f"{lines}\n\nGaussian kernel, lengthscale {settings['lengthscale']}, alpha "
            f"{settings['alpha']}; {options.rank} points sampled, half as many columns as "
            "preconditioner."
        )
        about = machine(
            "numpy", "scipy", "scikit-learn", threads=options.threads, seed=options.seed
        )
        publish(options.output, f"kernel_ridge_{name}", text, about, results=results)
    return 0


if __name__ == "__main__":
    print(json.dumps(run_one(Path(sys.argv[1]), *sys.argv[2:4], json.loads(sys.argv[4]))))
