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

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data.mnist import load_mnist
from benchmarks.harness.experiment import SEED, THREADS, Option, Run, experiment
from benchmarks.harness.processes import Found
from benchmarks.harness.report import table
from benchmarks.harness.timing import MIB, Peak, seconds

SETS: dict[str, dict[str, float]] = {
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


def write_data(path: str, set: str, size: int, seed: int, data_dir: str | None) -> Found:
    """Write training and test points and targets."""
    if set == "mnist":
        x, y, test_x, test_y = load_mnist(Path(str(data_dir)))
        np.savez(path, x=x, y=np.eye(10, dtype=x.dtype)[y], test_x=test_x, test_y=test_y)
        return {"points": len(x)}
    from sklearn.datasets import make_friedman1

    x, y = make_friedman1(size + size // 4, n_features=10, noise=1.0, random_state=seed)
    y -= y[:size].mean()
    np.savez(path, x=x[:size], y=y[:size], test_x=x[size:], test_y=y[size:])
    return {"points": size}


def make_model(method: str, alpha: float, scale: float, rank: int, seed: int) -> Any:
    """Return an estimator, not fitted."""
    from sklearn.kernel_approximation import Nystroem
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline

    from lowrank_inverse import sklearn as ours

    gamma, shared = 0.5 / scale**2, {"lengthscale": scale, "random_state": seed}
    if method == "sklearn KernelRidge":
        return KernelRidge(alpha=alpha, kernel="rbf", gamma=gamma)
    if method == "sklearn Nystroem + Ridge":
        features = Nystroem(gamma=gamma, n_components=rank, random_state=seed)
        return make_pipeline(features, Ridge(alpha, fit_intercept=False))
    if method.startswith("ours KernelRidge"):
        budget = 0 if "tiles" in method else BUDGET
        return ours.KernelRidge(alpha, rank=rank // 2, tol=1e-4, memory_budget=budget, **shared)
    return ours.NystromRidge(alpha, rank=rank, sampling=method.rsplit(" ", 1)[1], **shared)


def measure(path: str, method: str, n: int, classes: bool, **model: Any) -> Found:
    """Fit and test in this process."""
    with np.load(path) as file:
        data = dict(file)
    x, y = data["x"][:n], data["y"][:n]
    estimator, predicted = make_model(method, **model), []
    with Peak() as peak:
        fitted = seconds(lambda: estimator.fit(x, y))
        tested = seconds(lambda: predicted.append(estimator.predict(data["test_x"])))
    if classes:
        error = 100 * float(np.mean(predicted[0].argmax(axis=1) != data["test_y"]))
    else:
        error = float(np.sqrt(np.mean((predicted[0] - data["test_y"]) ** 2)))
    return {
        "n": len(x),
        "error": error,
        "fit_seconds": fitted,
        "predict_seconds": tested,
        "peak_bytes": peak.num_bytes,
        "steps": getattr(estimator, "n_iter_", None),
    }


def row(set: str, method: str, result: Found) -> dict[str, str]:
    """Format a line of the table."""
    headings = ("n", "test error", "fit, s", "predict, s", "peak, MiB", "steps")
    if "failed" in result:
        return {set: method} | dict.fromkeys(headings, "") | {"test error": result["failed"][:40]}
    error = result["error"]
    cells = (
        str(result["n"]),
        f"{error:.2f} %" if set == "mnist" else f"{error:.4f}",
        f"{result['fit_seconds']:.1f}",
        f"{result['predict_seconds']:.1f}",
        f"{result['peak_bytes'] / MIB:.0f}",
        str(result["steps"] or ""),
    )
    return {set: method, **dict(zip(headings, cells, strict=True))}


@experiment(
    *("kernel-ridge", __doc__),
    Option("sets", [], "which data (default: all that are there)", choices=list(SETS)),
    Option("data_dir", None, "folder with mnist/; without it, no MNIST", kind=Path),
    Option("size", 20000, "points to iterate on", least=8),
    Option("most", 20000, "points to factorise", least=8),
    Option("rank", 1000, "points sampled", least=2),
    Option("methods", list(METHODS), "what is compared", choices=list(METHODS)),
    *(THREADS, SEED),
    packages=("numpy", "scipy", "scikit-learn"),
)
def main(run: Run) -> None:
    options = run.options
    names = options.sets or (["friedman"] if options.data_dir is None else list(SETS))
    if "mnist" in names and options.data_dir is None:
        raise SystemExit("mnist needs --data-dir, a folder with the published files in mnist/")
    folder = options.data_dir and str(options.data_dir.resolve())
    for name in names:
        given = {"set": name, "size": options.size, "seed": options.seed, "data_dir": folder}
        data = run.file(write_data, given)
        counts = {"most": options.most, "size": options.size, "all": data["points"]}
        shared = {"rank": options.rank, "seed": options.seed, "alpha": SETS[name]["alpha"]}
        shared |= {"path": data["path"], "scale": SETS[name]["lengthscale"]}
        cells = {
            method: {"method": method, "n": counts[METHODS[method]], "classes": name == "mnist"}
            | shared
            for method in options.methods
        }
        results = run.each(measure, cells, strict=False)
        run.publish(
            table([row(name, method, result) for method, result in results.items()]),
            f"Gaussian kernel, lengthscale {shared['scale']}, alpha {shared['alpha']}; "
            f"{options.rank} points sampled, half as many columns as preconditioner.",
            name=f"kernel_ridge_{name}",
            results=results,
        )
