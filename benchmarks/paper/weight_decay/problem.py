"""Section 5.1 of the paper, which Figures 2, 3 and 4 share: a weight decay for each parameter.

Logistic regression on synthetic data. The inner loss is ``mean cross-entropy + θᵀ diag(φ) θ / 2``,
descended from θ = 0 after every outer step; the outer problem lowers the cross-entropy on other
data by φ. The half, the noise and the bound below φ are those of the paper's code
(https://github.com/moskomule/hypergrad, examples/logistic_regression.py); its text has no half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

import lowrank_inverse as li
import lowrank_inverse_torch as lit
from benchmarks.harness.experiment import DEVICE, QUICK, WORKERS, Run, seeds
from benchmarks.harness.processes import Found
from benchmarks.paper import methods as known

EXACT = "exact"
KNOWN_RIDGE = "Nyström, ridge in closed form"
METHODS = [*known.METHODS, KNOWN_RIDGE, EXACT]
OWN, AS_EXACT, AS_NYSTROM = "own length", "length of the exact one", "length of Nyström"
"""How long a step is: as it comes, or with the length that another method would give it."""
FIRST_STEPS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Or at a constant rate which gives the first step of every method this length."""


@dataclass(frozen=True)
class Setting:
    """The paper's numbers, and the lengths of the curves, which it does not give."""

    dimension: int = 100
    examples: int = 500  # for the inner problem, and as many for the outer one
    noise: float = 0.1
    inner_steps: int = 100
    inner_rate: float = 0.1
    outer_rate: float = 1.0
    momentum: float = 0.9
    least_decay: float = 1e-8
    early: int = 10  # outer steps: what the 1000 inner ones of the paper's code come to
    outer_steps: int = 30
    control_steps: int = 15  # of the runs that are not the paper's own


SETTING = Setting()
"""The paper's own takes a minute or two on two cores; there is nothing for `--quick` to cut."""
OPTIONS = (QUICK, seeds(5), DEVICE, WORKERS)


class Problem:
    """The data of one seed, the parameters θ and the weight decays φ."""

    def __init__(self, seed: int, setting: Setting, device: str = "cpu") -> None:
        self.setting = setting
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        truth = normal(setting.dimension)

        def data() -> tuple[Tensor, Tensor]:
            x = normal(setting.examples, setting.dimension)
            y = x @ truth + setting.noise * normal(setting.examples) > 0
            return x.to(device), y.to(device, x.dtype)

        (self.x, self.y), (self.outer_x, self.outer_y) = data(), data()
        self.theta = torch.zeros(setting.dimension, device=device, requires_grad=True)
        self.phi = torch.ones(setting.dimension, device=device, requires_grad=True)

    def cross_entropy(self) -> Tensor:
        return cross_entropy(self.x @ self.theta, self.y)

    def inner(self) -> Tensor:
        return self.cross_entropy() + 0.5 * (self.phi * self.theta**2).sum()

    def outer(self) -> Tensor:
        return cross_entropy(self.outer_x @ self.theta, self.outer_y)

    @torch.no_grad()
    def descend(self, record: int = 10) -> list[float]:
        """Descend from zero; return the inner cross-entropy at every `record`-th step, and last."""
        losses = []
        self.theta.zero_()
        for step in range(self.setting.inner_steps):
            logits = self.x @ self.theta
            if step % record == 0:
                losses.append(cross_entropy(logits, self.y).item())
            gradient = self.x.T @ (torch.sigmoid(logits) - self.y) / len(self.y)
            self.theta -= self.setting.inner_rate * (gradient + self.phi * self.theta)
        return [*losses, self.cross_entropy().item()]

    @torch.no_grad()
    def exact(self) -> tuple[Tensor, Tensor]:
        """Return the inverse Hessian times the outer gradient, and the hypergradient, as formulas.

        In float64: where the decays have come to nothing, the Hessian is nearly singular.
        """
        x, theta, phi = self.x.double(), self.theta.double(), self.phi.double()
        p = torch.sigmoid(x @ theta)
        H = (x.T * (p * (1 - p))) @ x / len(x) + phi.diag()
        outer_x = self.outer_x.double()
        residual = torch.sigmoid(outer_x @ theta) - self.outer_y
        q = torch.linalg.solve(H, outer_x.T @ residual / len(outer_x))
        return q, -q * theta


def inverse(method: str, k: int, alpha: float) -> Any:
    """Return the solver of a method, the paper's α and ρ both `alpha`."""
    if method == EXACT:
        return li.Exact()
    name = known.NYSTROM if method == KNOWN_RIDGE else method
    return known.solvers(k, alpha, alpha)[name]


def hypergradient(problem: Problem, method: str, k: int, alpha: float, rng: int) -> Any:
    """Return the hypergradient of a method; nothing is accumulated."""
    closed = method == KNOWN_RIDGE
    return lit.hypergradient(
        problem.cross_entropy if closed else problem.inner,
        problem.outer,
        problem.theta,
        problem.phi,
        solver=inverse(method, k, alpha),
        ridge=problem.phi if closed else None,  # (ridge / 2) θ², the same half
        rng=rng,
        chunk_size=problem.setting.dimension if method == EXACT else 1,
    )


@dataclass
class Curve:
    """What one run recorded, one entry for each outer step; shorter where it diverged."""

    validation: list[float] = field(default_factory=list)  # one more, after the last step
    training: list[list[float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # of the hypergradient
    exact_norms: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)  # with the exact hypergradient
    errors: list[float] = field(default_factory=list)  # of the inverse product, relative
    rate: float = 1.0
    products: float = 0.0


def follow(
    problem: Problem, method: str, k: int, alpha: float, control: str | float, seed: int
) -> Curve:
    """Optimize the weight decays by one method, until the end or until it diverges."""
    setting, curve = problem.setting, Curve(rate=problem.setting.outer_rate)
    with torch.no_grad():
        problem.phi.fill_(1.0)
    velocity = torch.zeros_like(problem.phi)
    last = setting.outer_steps if control == OWN else setting.control_steps
    for step in range(last + 1):
        training = problem.descend()
        reached = problem.outer().item()
        if not np.isfinite([reached, problem.inner().item()]).all():
            break
        curve.training.append(training)
        curve.validation.append(reached)
        if step == last:
            break
        rng = 1000 * seed + step
        out = hypergradient(problem, method, k, alpha, rng)
        found, length = out.grads, float(out.grads.norm())
        q, exact = problem.exact()
        curve.norms.append(length)
        curve.exact_norms.append(float(exact.norm()))
        curve.cosines.append(float(found.double() @ exact / (length * exact.norm())))
        curve.errors.append(float((out.ihvp.double() - q).norm() / q.norm()))
        curve.products = float(out.info.num_products)
        if control == AS_EXACT:
            found = found * (curve.exact_norms[-1] / length)
        elif control == AS_NYSTROM:
            other = hypergradient(problem, known.PAPER_NYSTROM, k, alpha, rng)
            found = found * (other.grads.norm() / length)
        elif control != OWN and step == 0:
            curve.rate = float(control) / length
        with torch.no_grad():
            velocity = setting.momentum * velocity + found
            problem.phi.sub_(curve.rate * velocity).clamp_(min=setting.least_decay)
    return curve


def follow_all(
    seed: int,
    ks: list[int],
    alphas: list[float],
    controls: list[str | float],
    setting: Found,
    device: str,
) -> Found:
    """Follow every method, k, α = ρ and control on the data of one seed."""
    problem = Problem(seed, Setting(**setting), device)
    found: Found = {}
    for method, k, alpha, control in product(METHODS, ks, alphas, controls):
        name = label(method, k, alpha, control)
        # Those two know neither k nor α.
        same = method in (EXACT, known.IDENTITY) and label(method, ks[0], alphas[0], control)
        if same in found:
            found[name] = found[same]
        else:
            curve = follow(problem, method, k, alpha, control, seed)
            found[name] = asdict(curve, dict_factory=rounded)
    return found


def rounded(items: Sequence[tuple[str, Any]]) -> Found:
    """Keep six digits, which is more than a curve shows."""

    def cut(value: Any) -> Any:
        return [cut(v) for v in value] if isinstance(value, list) else float(f"{value:.6g}")

    return {name: cut(value) for name, value in items}


def label(method: str, k: int, alpha: float, control: str | float = OWN) -> str:
    """Name a run."""
    return f"{method}, k = {k}, α = ρ = {alpha:g}, {control}"


def measure(
    run: Run, *, ks: list[int], alphas: list[float], controls: Sequence[str | float] = (OWN,)
) -> dict[str, list[Found]]:
    """Follow all of them on all seeds; return a list of curves for each label."""
    choices = {"ks": ks, "alphas": alphas, "controls": list(controls)}
    shared = {"setting": asdict(SETTING), "device": run.options.device}
    found = run.repeated(follow_all, {"curves": choices | shared})["curves"]
    return {name: [one[name] for one in found] for name in found[0]}
