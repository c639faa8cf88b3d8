"""Data reweighting on long-tailed CIFAR-10 (section 5.4 of the paper): one run.

The inner problem fits a classifier to a long-tailed training set. A perceptron φ maps the loss of
an example to its weight, ``f = mean(μ_φ(ℓ) ℓ)``, and the outer problem lowers the loss on balanced
images by φ. As with Shu et al. (2019), whose setting the paper follows, the loss that goes into μ
is a number: the inner gradient is that of weighted examples.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank_inverse_torch as lit
from benchmarks.data.cifar import balanced, load_small, long_tailed
from benchmarks.data.images import Images, augmented, batches
from benchmarks.harness.experiment import DATA, DEVICE, QUICK, WORKERS, Run, seeds
from benchmarks.harness.processes import Found
from benchmarks.paper.methods import IDENTITY, METHODS, Minres, solvers
from benchmarks.speed.networks import CLASSES, wide_resnet

OPTIONS = (QUICK, DATA, seeds(3), DEVICE, WORKERS)
BASELINE = "baseline"
FIXED = {"fixed, rising": 2.0, "fixed, falling": -2.0}
"""Weights ``sigmoid(slope * (loss - 1))`` that nobody learned: how much there is to be had."""
SLOPE = 0.01  # of the leaky ReLU, as in the paper
LOSSES = [0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0]
"""Where the weights that were learned are shown."""


@dataclass(frozen=True)
class Setting:
    """Sizes of a run."""

    network: str
    side: int
    augment: bool
    largest: int
    batch: int
    inner_steps: int
    outer_rate: float
    reference_steps: int
    outer_every: int = 10
    inner_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    hidden: int = 100

    def duration(self, seeds: int) -> str:
        """Say how long the runs are, and how many."""
        return f"{self.inner_steps // self.outer_every} outer steps a run, {seeds} seeds."


FULL = Setting("wrn-28-10", 32, True, 5000, 128, 15_000, 1e-5, reference_steps=100)
"""The paper's, where it says: the size of a batch and the augmentation are ours."""
SMALL = Setting("cnn-16", 16, False, 1000, 50, 700, 3e-3, reference_steps=300)
"""Images averaged to 16×16, a fifth of each class, three convolutions, a twentieth of the steps.

So few outer steps at the paper's rate would leave φ where it was: the rate is larger, and the same
for all methods.
"""


def small_cnn(width: int) -> nn.Module:
    """Return three convolutions with batch norm and a linear layer."""
    layers: list[nn.Module] = []
    before = 3
    for after in (width, 2 * width, 4 * width):
        layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after)]
        layers += [nn.LeakyReLU(SLOPE)]
        before = after
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, CLASSES)]
    return nn.Sequential(*layers)


def build(setting: Setting, seed: int) -> tuple[nn.Module, nn.Module]:
    """Return the classifier and the perceptron of the weights."""
    kind, *sizes = setting.network.split("-")
    with torch.random.fork_rng(devices=[]):  # layers draw from torch's own generator alone
        torch.manual_seed(seed)
        if kind == "wrn":
            depth, widen = map(int, sizes)
            model = wide_resnet(depth, widen, slope=SLOPE, running=True)
        else:
            model = small_cnn(int(sizes[0]))
        weigh = nn.Sequential(
            *(nn.Linear(1, setting.hidden), nn.LeakyReLU(SLOPE), nn.Linear(setting.hidden, 1)),
            *(nn.Sigmoid(), nn.Flatten(0)),
        )
        # All examples weigh the same at first, so that the baseline is what no outer step changed.
        nn.init.zeros_(weigh[2].weight)
        nn.init.zeros_(weigh[2].bias)
    return model, weigh


class Fixed(nn.Module):
    """A weight that rises or falls with the loss."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, losses: Tensor) -> Tensor:
        """Map losses (n, 1) to weights (n,)."""
        return torch.sigmoid(self.slope * (losses[:, 0] - 1.0))


class Reweighting:
    """The bilevel problem: classifier, weights, and the batches they see."""

    def __init__(
        self, setting: Setting, folders: list[str], imbalance: int, seed: int, device: str
    ) -> None:
        data = load_small(*map(Path, folders), setting.side)
        self.setting, self.device = setting, device
        model, weigh = build(setting, seed)
        self.model, self.weigh = model.to(device), weigh.to(device)
        chosen, outer = long_tailed(data.labels, imbalance, setting.largest), balanced(data.labels)
        self.train = Images(data.images[chosen], data.labels[chosen], device)
        self.outer = Images(data.images[outer], data.labels[outer], device)
        self.test = Images(data.test_images, data.test_labels, device)
        # One generator each, so that every method sees the same batches.
        self.inner_batches = batches(len(self.train), setting.batch, _generator(seed, 1))
        self.outer_batches = batches(len(self.outer), 2 * setting.batch, _generator(seed, 2))
        self.noise = _generator(seed, 3)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=setting.inner_rate,
            momentum=setting.momentum,
            weight_decay=setting.weight_decay,
        )
        self.outer_optimizer = torch.optim.Adam(self.weigh.parameters(), lr=setting.outer_rate)

    def inner_step(self) -> None:
        """Take the next batch, and lower the inner loss on it."""
        x, self.y = self.train[next(self.inner_batches)]
        self.x = augmented(x, self.noise) if self.setting.augment else x
        self.optimizer.zero_grad()
        self.inner_loss().backward()
        self.optimizer.step()
        self.weigh.zero_grad()  # the backward pass reached φ too

    def inner_loss(self) -> Tensor:
        """Return the weighted loss on the batch at hand."""
        losses = F.cross_entropy(self.model(self.x), self.y, reduction="none")
        return (self.weigh(losses.detach()[:, None]) * losses).mean()

    def hypergradient(self, solver: Any, seed: int, batch: tuple[Tensor, Tensor]) -> Any:
        """Return the hypergradient at this point and of these batches."""
        x, y = batch
        return lit.hypergradient(
            *(self.inner_loss, lambda: F.cross_entropy(self.model(x), y), self.model, self.weigh),
            **{"solver": solver, "ridge": self.setting.weight_decay, "rng": seed},
        )

    def outer_batch(self) -> tuple[Tensor, Tensor]:
        """Return the next batch of the outer problem."""
        return self.outer[next(self.outer_batches)]

    def outer_step(self, found: Any) -> None:
        """Move φ along a hypergradient."""
        for name, parameter in self.weigh.named_parameters():
            parameter.grad = found.grads[name]
        self.outer_optimizer.step()
        self.weigh.zero_grad()

    @torch.no_grad()
    def accuracy(self, images: Images) -> list[float]:
        """Return the accuracy on every class, by running statistics."""
        self.model.eval()
        hits = torch.zeros(CLASSES, device=self.device)
        for start in range(0, len(images), 1000):
            x, y = images[start : start + 1000]
            right = (self.model(x).argmax(1) == y).to(hits.dtype)
            hits.index_add_(0, y, right)
        self.model.train()
        return (hits / torch.bincount(images.labels, minlength=CLASSES)).tolist()

    @torch.no_grad()
    def weights(self) -> list[float]:
        """Return the weight of an example by its loss."""
        return self.weigh(torch.tensor(LOSSES, device=self.device)[:, None]).tolist()


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(10 * seed + stream)


def flat(found: Any) -> Tensor:
    """Return a hypergradient as one vector in float64."""
    return torch.cat([grad.reshape(-1) for grad in found.grads.values()]).double()


def learn(
    setting: Found,
    folders: list[str],
    imbalance: int,
    method: str,
    seed: int,
    k: int,
    alpha: float,
    damping: float,
    device: str,
    compared: bool = False,
) -> Found:
    """Train once by one of the methods, or by none, and tell how it went.

    Where `compared`, the methods are held against each other where the run ended.
    """
    problem = Reweighting(Setting(**setting), folders, imbalance, seed, device)
    if method in FIXED:
        problem.weigh = Fixed(FIXED[method]).to(device)
    by_name = solvers(k, alpha, damping)
    infos, norms, outer_seconds, start = [], [], 0.0, time.perf_counter()
    for step in range(1, problem.setting.inner_steps + 1):
        problem.inner_step()
        if method in by_name and step % problem.setting.outer_every == 0:
            begin = time.perf_counter()
            found = problem.hypergradient(by_name[method], step, problem.outer_batch())
            problem.outer_step(found)
            infos.append(found.info)
            norms.append(flat(found).norm().item())
            outer_seconds += time.perf_counter() - begin
    classes = problem.accuracy(problem.test)
    return {
        "accuracy": float(np.mean(classes)),
        "accuracy by class": classes,
        "outer accuracy": float(np.mean(problem.accuracy(problem.outer))),
        "weights": problem.weights(),
        "norms": norms,
        "residuals": [info.relative_residual for info in infos],
        "inner gradients": [info.inner_grad_norm for info in infos],
        "negative": [float(info.negative_curvature) for info in infos],
        "products": [float(info.num_products) for info in infos],
        "seconds": time.perf_counter() - start,
        "outer seconds": outer_seconds,
        "compared": compare(problem, by_name, damping) if compared else {},
    }


def compare(problem: Reweighting, by_name: dict[str, Any], damping: float) -> Found:
    """Take the hypergradient by every method at one point, beside a longer solve there."""
    batch = problem.outer_batch()
    reference = Minres(damping, problem.setting.reference_steps)
    exact = problem.hypergradient(reference, 0, batch)
    truth = flat(exact)
    found: Found = {"residual of the reference": exact.info.relative_residual}
    plain = flat(problem.hypergradient(by_name[IDENTITY], 0, batch))
    for method in METHODS:
        vector = flat(problem.hypergradient(by_name[method], 0, batch))
        found[method] = {
            "length": (vector.norm() / truth.norm()).item(),
            "to the reference": cosine(vector, truth),
            "to the identity": cosine(vector, plain),
        }
    return found


def cosine(u: Tensor, v: Tensor) -> float:
    """Return the cosine between vectors, 0 where one is zero: CG may refuse its first step."""
    length = (u.norm() * v.norm()).item()
    return (u @ v).item() / length if length > 0 else 0.0


def prepared(run: Run, setting: Setting) -> Found:
    """Return the settings that all runs share, once the images are there in small."""
    folders = run.options.data_dir.resolve(), run.cache.resolve()
    load_small(*folders, setting.side)
    shared = {"setting": asdict(setting), "folders": list(map(str, folders))}
    return shared | {"device": run.options.device}


def brief(runs: dict[Any, list[Found]]) -> dict[str, Found]:
    """Return runs with the median of what each outer step had, for the report."""
    series = ("norms", "residuals", "inner gradients", "negative", "products")
    return {
        f"{', '.join(map(str, case))}, seed {seed}": one
        | {name: float(np.median(one[name])) for name in series if one[name]}
        for case, group in runs.items()
        for seed, one in enumerate(group)
    }
