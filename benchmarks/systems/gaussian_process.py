"""Gaussian processes: log likelihood, its gradient and predictions, at given hyperparameters.

* diabetes, digits: scikit-learn's own (442 points with 10 features; 1797 images of 64 pixels, and
  whether the digit is odd), with a Gaussian kernel.
* friedman: `make_friedman1` with 10 features and noise 1, with a Gaussian kernel.
* mnist: 32 principal components of the digits from `--data-dir`, and whether the digit is odd, with
  a Matérn kernel of order 5/2.
* rough: the points of friedman with a Matérn kernel of order 1/2 and a noise of a thousandth, where
  a low rank tells little: a negative case for all that iterates.

The hyperparameters are 1.5 times those that are likeliest for the first 500 points. What factorises
gets `--most` points, what iterates `--size`; up to `--most`, errors are those against
scikit-learn's dense factorisation: of the likelihood, in nats; of the gradient and the means,
relative to the largest entry; of the standard deviations, the largest relative one. gpytorch's CG
has the rank and the number of probes of ours, and a tolerance of 1e-3. Each runs in a process of
its own; times are of the CPU. To predict is to condition on the data, and to give means and
standard deviations at 200 points. The peak is what all of it takes beyond the data and the
libraries.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data.mnist import load_mnist
from benchmarks.harness.experiment import PEER_PYTHON, SEED, THREADS, Option, Run, experiment
from benchmarks.harness.processes import Found, interpreter
from benchmarks.harness.report import table
from benchmarks.harness.timing import MIB
from benchmarks.systems.gaussian_process_methods import METHODS, measure

SETS: dict[str, float | None] = {
    "diabetes": None,
    "digits": None,
    "friedman": None,
    "mnist": 2.5,
    "rough": 0.5,
}
"""Each with the order of its Matérn kernel; None for the Gaussian one."""
NUM_NEW, NUM_FITTED, COMPONENTS, ROUGH_NOISE = 200, 500, 32, 1e-3
ASIDE = 1.5


def write_data(path: str, set: str, size: int, seed: int, data_dir: str | None) -> Found:
    """Write points, targets of mean 0 and deviation 1, and points to predict at."""
    x, y = load_points(set, size + NUM_NEW, seed, data_dir)
    x, y = x[: size + NUM_NEW].astype(float), y[: size + NUM_NEW].astype(float)
    points = min(size, len(x) - NUM_NEW)
    y = (y - y[:points].mean()) / y[:points].std()
    np.savez(path, x=x[:points], y=y[:points], new=x[points:])
    return {"points": points, "start": start_of(x[:NUM_FITTED], y[:NUM_FITTED], set)}


def load_points(set: str, count: int, seed: int, data_dir: str | None) -> tuple[Any, Any]:
    """Return points and targets in random order."""
    from sklearn import datasets

    rng = np.random.default_rng(seed)
    if set in ("friedman", "rough"):
        return datasets.make_friedman1(count, n_features=10, noise=1.0, random_state=seed)
    if set == "diabetes":
        x, y = datasets.load_diabetes(return_X_y=True)
    elif set == "digits":
        x, y = datasets.load_digits(return_X_y=True)
        x, y = x / 16, y % 2
    else:
        x, y, _, _ = load_mnist(Path(str(data_dir)))
        chosen = rng.permutation(len(x))[:count]
        x, y = x[chosen].astype(float), y[chosen] % 2
        x -= x.mean(axis=0)
        x = x @ np.linalg.eigh(x.T @ x)[1][:, : -COMPONENTS - 1 : -1]
    order = rng.permutation(len(x))
    return x[order], y[order]


def start_of(x: np.ndarray, y: np.ndarray, set: str) -> list[float]:
    """Return signal variance, lengthscale and noise near those that a few points make likely."""
    from lowrank_inverse.sklearn import GaussianProcessRegressor

    nu = SETS[set]
    model = GaussianProcessRegressor(
        "rbf" if nu is None else "matern",
        nu=nu or 2.5,
        noise=ROUGH_NOISE if set == "rough" else 0.1,
        fixed="noise" if set == "rough" else (),
        normalize_y=False,
    ).fit(x, y)
    found = (model.signal_variance_, model.lengthscale_, model.noise_)
    return [ASIDE * float(x) for x in found]


def errors(result: Found, reference: Found | None) -> dict[str, float]:
    """Return the errors of one method against another one at the same points."""
    if reference is None or "failed" in reference or reference["n"] != result["n"]:
        return {}
    keys = ("value", "gradient", "mean", "std")
    found = {key: np.asarray(result[key]) for key in keys if key in result}
    exact = {key: np.asarray(reference[key]) for key in found}

    def relative(key: str) -> float:
        return float(np.abs(found[key] - exact[key]).max() / np.abs(exact[key]).max())

    likelihood = float(np.abs(found["value"] - exact["value"]))
    wrong = {"likelihood": likelihood, "gradient": relative("gradient")}
    if "mean" in found:
        spread = float(np.abs(found["std"] / exact["std"] - 1).max())
        wrong |= {"mean": relative("mean"), "std": spread}
    return wrong


def row(set: str, method: str, result: Found, wrong: dict[str, float]) -> dict[str, str]:
    """Format a line of the table."""
    names = ("likelihood", "gradient", "mean", "std")
    headings = ("n", *(f"error: {name}" for name in names), "likelihood, s", "predict, s", "MiB")
    if "failed" in result:
        return {set: method} | dict.fromkeys(headings, "") | {"n": result["failed"][:30]}
    claimed = result.get("claimed")
    likelihood = f"{wrong['likelihood']:.1e}" if wrong else ""
    if claimed:
        likelihood += f" ({claimed:.0e})"
    cells = (
        str(result["n"]),
        likelihood,
        *(f"{wrong[name]:.1e}" if name in wrong else "" for name in names[1:]),
        f"{result['likelihood_seconds']:.1f}",
        f"{result['predict_seconds']:.1f}" if "predict_seconds" in result else "",
        f"{result['peak_bytes'] / MIB:.0f}",
    )
    return {
        set: method + (" *" if result["warnings"] else ""),
        **dict(zip(headings, cells, strict=True)),
    }


@experiment(
    *("gp", __doc__),
    Option("sets", [], "which data (default: all that are there)", choices=list(SETS)),
    Option("data_dir", None, "folder with mnist/; without it, no MNIST", kind=Path),
    Option("size", 10000, "points to iterate on", least=16),
    Option("most", 5000, "points to factorise", least=16),
    Option("rank", 300, "columns of the preconditioner", least=1),
    Option("probes", 16, "random vectors", least=2),
    Option("methods", list(METHODS), "what is compared", choices=list(METHODS)),
    Option("likelihood_alone", False, "no predictions"),
    *(PEER_PYTHON, THREADS, SEED),
    packages=("numpy", "scipy", "scikit-learn", "torch"),
)
def main(run: Run) -> None:
    options = run.options
    names = options.sets or [name for name in SETS if name != "mnist" or options.data_dir]
    if "mnist" in names and options.data_dir is None:
        raise SystemExit("mnist needs --data-dir, a folder with the published files in mnist/")
    folder = options.data_dir and str(options.data_dir.resolve())
    python, version = interpreter("gpytorch", [sys.executable, *options.peer_python])
    run.about["versions"]["gpytorch"] = version
    methods = [m for m in options.methods if python is not None or "gpytorch" not in m]
    absent = "" if python is not None else "gpytorch is not installed: give --peer-python."
    for name in names:
        given = {"set": name, "size": options.size, "seed": options.seed, "data_dir": folder}
        data = run.file(write_data, given)
        counts = {"most": options.most, "size": options.size}
        shared = {"path": data["path"], "nu": SETS[name], "start": data["start"]}
        shared |= {"rank": options.rank, "probes": options.probes, "seed": options.seed}
        shared |= {"predictions": False} if options.likelihood_alone else {}
        least = min(options.most, data["points"])
        cells = {
            (method, n): {"method": method, "n": n, **shared}
            for n in sorted({least, min(options.size, data["points"])})
            for method in methods
            if n <= counts[METHODS[method]]
        }
        pythons = {cell: python for cell in cells if "gpytorch" in cell[0] and python}
        results = run.each(measure, cells, strict=False, pythons=pythons)
        wrong = {
            (method, n): {} if "failed" in found else errors(found, results.get(("sklearn", n)))
            for (method, n), found in results.items()
        }
        signal, lengthscale, noise = data["start"]
        run.publish(
            table([row(name, cell[0], found, wrong[cell]) for cell, found in results.items()]),
            f"Signal variance {signal:.3g}, lengthscale {lengthscale:.3g}, noise {noise:.3g}; rank "
            f"{options.rank}, {options.probes} probes. In brackets, the standard error that is "
            "claimed. *: with a warning.",
            *filter(None, [absent]),
            name=f"gp_{name}",
            results=[
                {"method": cell[0], "n": cell[1], "errors": wrong[cell], "start": data["start"]}
                | {key: found[key] for key in found if key not in ("mean", "std")}
                for cell, found in results.items()
            ],
        )
