"""Likelihood, its gradient and predictions of a Gaussian process, by each library.

This module is imported by interpreters of environments with other libraries, too: what they may not
have is imported where it is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from time import process_time
from typing import Any

import numpy as np

from benchmarks.harness.timing import Peak, seconds

METHODS = {
    "sklearn": "most",
    "ours, factored": "most",
    "gpytorch, Cholesky": "most",
    "ours, held": "size",
    "ours, held, std solved": "size",
    "gpytorch, CG": "size",
    "ours, in tiles": "size",
    "gpytorch, KeOps": "size",
}
"""Each with the option that says how many points it gets at most."""
CG_TOLERANCE = 1e-3

Evaluated = tuple[float, list[float]]
Predicted = tuple[np.ndarray, np.ndarray]


def measure(
    path: str, method: str, n: int, predictions: bool = True, **settings: Any
) -> dict[str, Any]:
    """Evaluate and predict in this process; the two are timed, and the peak is of both."""
    with np.load(path) as file:
        x, y, new = file["x"][:n], file["y"][:n], file["new"]
    library, _, form = method.partition(", ")
    make = {"sklearn": by_sklearn, "ours": by_ours, "gpytorch": by_gpytorch}[library]
    evaluated: list[Evaluated] = []
    predicted: list[Predicted] = []
    with warnings.catch_warnings(record=True) as caught, Peak() as peak:
        warnings.simplefilter("always")
        evaluate, predict, about = make(x, y, form, **settings)
        likelihood_seconds = seconds(lambda: evaluated.append(evaluate()), clock=process_time)
        about_new: dict[str, Any] = {}
        if predictions:
            taken = seconds(lambda: predicted.append(predict(new)), clock=process_time)
            mean, std = (part.tolist() for part in predicted[0])
            about_new = {"mean": mean, "std": std, "predict_seconds": taken}
    kinds = ("ConvergenceWarning", "NumericalWarning")
    warned = {str(w.message)[:200] for w in caught if w.category.__name__ in kinds}
    return {
        "n": len(x),
        "value": evaluated[0][0],
        "gradient": evaluated[0][1],
        "likelihood_seconds": likelihood_seconds,
        "peak_bytes": peak.num_bytes,
        "warnings": sorted(warned),
        **about_new,
        **about(),
    }


def by_sklearn(
    x: np.ndarray, y: np.ndarray, form: str, *, nu: float | None, start: list[float], **_: Any
) -> tuple[Callable[[], Evaluated], Callable[[np.ndarray], Predicted], Callable[[], Any]]:
    """Return functions that evaluate, predict and tell more; by scikit-learn."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Matern, WhiteKernel

    signal, lengthscale, noise = start
    radial = RBF(lengthscale) if nu is None else Matern(lengthscale, nu=nu)
    kernel = ConstantKernel(signal) * radial
    theirs = GaussianProcessRegressor(kernel + WhiteKernel(noise), alpha=0, optimizer=None)
    theirs.fit(x[:2], y[:2])
    theirs.X_train_, theirs.y_train_ = x, y  # for the likelihood, without another factorisation

    def evaluate() -> Evaluated:
        value, gradient = theirs.log_marginal_likelihood(np.log(start), eval_gradient=True)
        return float(value), gradient.tolist()

    def predict(new: np.ndarray) -> Predicted:
        model = GaussianProcessRegressor(kernel, alpha=noise, optimizer=None).fit(x, y)
        return model.predict(new, return_std=True)

    return evaluate, predict, dict


def by_ours(
    x: np.ndarray,
    y: np.ndarray,
    form: str,
    *,
    nu: float | None,
    start: list[float],
    rank: int,
    probes: int,
    seed: int,
) -> tuple[Callable[[], Evaluated], Callable[[np.ndarray], Predicted], Callable[[], Any]]:
    """Return the same by ours; `form` says how the covariance is dealt with."""
    from lowrank_inverse.sklearn import GaussianProcessRegressor

    matrix = 8 * len(x) ** 2
    signal, lengthscale, noise = start
    model = GaussianProcessRegressor(
        "rbf" if nu is None else "matern",
        nu=2.5 if nu is None else nu,
        signal_variance=signal,
        lengthscale=lengthscale,
        noise=noise,
        normalize_y=False,
        optimizer=None,
        memory_budget={"factored": 8 * matrix, "in tiles": 0}.get(form, matrix),
        exact_variance="solved" in form,
        rank=rank,
        num_probes=probes,
        random_state=seed,
    )

    told: dict[str, Any] = {}

    def predict(new: np.ndarray) -> Predicted:
        mean, std = model.fit(x, y).predict(new, return_std=True)
        told["steps"] = model.n_iter_
        return mean, std

    def evaluate() -> Evaluated:
        value, gradient, told["claimed"] = model._likelihood(np.log(start))
        return float(value), gradient.tolist()

    model.fit(x[:2], y[:2])
    model.X_fit_, model._y = x, y[:, None]  # as above
    return evaluate, predict, lambda: told


def by_gpytorch(
    x: np.ndarray,
    y: np.ndarray,
    form: str,
    *,
    nu: float | None,
    start: list[float],
    rank: int,
    probes: int,
    seed: int,
) -> tuple[Callable[[], Evaluated], Callable[[np.ndarray], Predicted], Callable[[], Any]]:
    """Return the same by gpytorch: with "CG" or "KeOps", of the same rank and number of probes."""
    import contextlib

    import gpytorch
    import torch
    from linear_operator import settings

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    points, targets = torch.from_numpy(x), torch.from_numpy(y)
    signal, lengthscale, noise = start

    class Model(gpytorch.models.ExactGP):
        def __init__(self) -> None:
            likelihood = gpytorch.likelihoods.GaussianLikelihood(
                noise_constraint=gpytorch.constraints.Positive()
            )
            super().__init__(points, targets, likelihood)
            self.mean_module = gpytorch.means.ZeroMean()
            kernels = gpytorch.kernels.keops if form == "KeOps" else gpytorch.kernels
            radial = kernels.RBFKernel() if nu is None else kernels.MaternKernel(nu=nu)
            self.covar_module = gpytorch.kernels.ScaleKernel(radial)
            self.covar_module.outputscale = signal
            radial.lengthscale = lengthscale
            likelihood.noise = noise

        def forward(self, x: Any) -> Any:
            return gpytorch.distributions.MultivariateNormal(
                self.mean_module(x), self.covar_module(x)
            )

    def ways() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        if form == "Cholesky":
            stack.enter_context(settings.fast_computations(False, False, False))
            return stack
        for way in (
            settings.fast_computations(True, True, True),
            settings.max_cholesky_size(16),  # KeOps has no diagonal below it
            settings.cg_tolerance(CG_TOLERANCE),
            gpytorch.settings.eval_cg_tolerance(CG_TOLERANCE),
            settings.max_preconditioner_size(rank),
            settings.min_preconditioning_size(1),
            settings.num_trace_samples(probes),
        ):
            stack.enter_context(way)
        return stack

    def evaluate() -> Evaluated:
        model = Model()
        model.train()
        likelihood = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
        with ways():
            value = likelihood(model(points), targets) * len(x)
            value.backward()
        scale = model.covar_module
        raws = (
            (scale.outputscale, scale.raw_outputscale),
            (scale.base_kernel.lengthscale, scale.base_kernel.raw_lengthscale),
            (model.likelihood.noise, model.likelihood.noise_covar.raw_noise),
        )
        # Of p = log(1 + exp(raw)): dp / draw = 1 - exp(-p).
        gradient = [float(p * raw.grad / (1 - torch.exp(-p))) for p, raw in raws]
        return float(value.detach()), gradient

    def predict(new: np.ndarray) -> Predicted:
        model = Model()
        model.eval()
        with ways(), torch.no_grad():
            found = model(torch.from_numpy(new))
            return found.mean.numpy(), found.variance.clamp_min(0).sqrt().numpy()

    return evaluate, predict, dict
