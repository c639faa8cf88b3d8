"""Table 2 of the paper: fifty images distilled from MNIST, by the test accuracy they teach.

A network that starts from fixed, known weights takes some steps of gradient descent on fifty
images. The images are learned: the loss of the trained network on real data is differentiated by
them. Besides the eight inverses stand the images before they were learned, and as many real ones.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._measure import Found
from benchmarks._report import publish, table
from benchmarks.data.mnist import load_mnist
from benchmarks.paper import _methods as methods
from benchmarks.paper import _runs as runs
from benchmarks.paper._learned import EXPLAINED, columns, draw, mean_of, skipped
from benchmarks.paper._verdicts import below, comparable, cuts, verdict

CLASSES = 10
MEAN, DEVIATION = np.float32(0.1307), np.float32(0.3081)
"""Of the pixels of the training images."""
INITIAL, REAL = "no outer optimization", "as many real images"
PAPER_FIGURES = {
    methods.PAPER_CG: "0.17 ± 0.04",
    methods.PAPER_NEUMANN: "0.47 ± 0.03",
    methods.PAPER_NYSTROM: "0.49 ± 0.04",
}


@dataclass(frozen=True)
class Setting:
    """Sizes and rates. What the paper does not say is marked."""

    images: int = 50
    side: int = 28
    widths: tuple[int, ...] = (6, 16, 120, 84)  # not said: those of LeNet-5
    inner_steps: int = 100
    inner_rate: float = 0.01
    updates: int = 5000
    outer_rate: float = 1e-3
    outer_batch: int = 1024  # not said
    gain: float = 1.0  # not said: that of torch, uniform within 1 / sqrt(fan-in)
    k: int = 10


PAPER = Setting()
QUICK = Setting(
    side=14,
    widths=(6, 12, 32, 32),
    inner_steps=25,
    inner_rate=0.04,
    updates=120,
    outer_rate=0.02,
    outer_batch=500,
    gain=1.7,
)


def network(setting: Setting) -> Any:
    """Return LeNet-5, or a smaller one, with leaky ReLU."""
    from torch import nn

    from benchmarks.paper._inner import SLOPE

    first, second, third, fourth = setting.widths
    size = second * (setting.side // 4) ** 2
    return nn.Sequential(
        *(nn.Conv2d(1, first, 5, padding=2), nn.LeakyReLU(SLOPE), nn.MaxPool2d(2)),
        *(nn.Conv2d(first, second, 5, padding=2), nn.LeakyReLU(SLOPE), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(size, third), nn.LeakyReLU(SLOPE)),
        *(nn.Linear(third, fourth), nn.LeakyReLU(SLOPE), nn.Linear(fourth, CLASSES)),
    )


def shrink(images: np.ndarray, side: int) -> np.ndarray:
    """Return rows of 784 pixels as images of `side`, by means of squares, with usual scale."""
    step = 28 // side
    return (images.reshape(-1, 1, side, step, side, step).mean(axis=(3, 5)) - MEAN) / DEVIATION


def run(*, method: str, seed: int, data_dir: str, device: str, **sizes: Any) -> Found:
    """Learn the images with one method, and train on them."""
    import torch
    from torch import autograd
    from torch.nn import functional as F

    from benchmarks.paper._inner import against, descend, initialize, outputs
    from lowrank_inverse_torch import hypergradient

    setting = Setting(**{**sizes, "widths": tuple(sizes["widths"])})
    train_x, train_y, test_x, test_y = load_mnist(Path(data_dir))
    rng = np.random.default_rng(seed)
    labels = np.arange(setting.images) % CLASSES
    drawn = rng.standard_normal((setting.images, 1, setting.side, setting.side), np.float32)
    if method == REAL:
        rows = [rng.choice(np.flatnonzero(train_y == label)) for label in labels]
        drawn = shrink(train_x[rows], setting.side)
    few, y = torch.tensor(drawn, device=device).requires_grad_(), torch.tensor(labels).to(device)
    model = network(setting).to(device)
    start = initialize(model, seed, setting.gain)

    def inner(params: Any) -> Any:
        return F.cross_entropy(outputs(model, params, few), y)

    def trained(unroll: bool = False) -> Any:
        return descend(inner, start, setting.inner_steps, setting.inner_rate, unroll=unroll)

    optimizer = torch.optim.Adam([few], lr=setting.outer_rate)
    updates = 0 if method in (INITIAL, REAL) else setting.updates
    solver = methods.solvers(setting.k).get(method)
    checks = {0, updates // 2, updates - 1}
    found: Found = {"losses": [], "products": [], "negative": [], "checks": [], "skipped": 0}
    for update in range(updates):
        rows = rng.choice(len(train_x), setting.outer_batch, replace=False)
        x = torch.tensor(shrink(train_x[rows], setting.side), device=device)
        real_y = torch.tensor(train_y[rows], device=device)

        def outer(params: Any, x: Any = x, real_y: Any = real_y) -> Any:
            return F.cross_entropy(outputs(model, params, x), real_y)

        params = trained()
        with torch.no_grad():
            found["losses"].append(float(outer(params)))
        optimizer.zero_grad()
        try:
            out = hypergradient(
                lambda params=params: inner(params),
                lambda params=params, outer=outer: outer(params),
                params,
                few,
                solver=solver,
                rng=[seed, update],  # no state: on an indefinite Hessian, CG from it goes astray
                accumulate_grad=True,
            )
        except torch.linalg.LinAlgError:  # of Eq. (6), where a column is zero
            found["skipped"] += 1
            continue
        found["products"].append(float(out.info.num_products))
        found["negative"].append(float(out.info.negative_curvature))
        if update in checks:
            (truth,) = autograd.grad(outer(trained(unroll=True)), few)
            found["checks"].append(against([few.grad], [truth]))
        if torch.isfinite(few.grad).all():
            optimizer.step()
        else:
            found["skipped"] += 1
    params = trained()
    with torch.no_grad():
        x = torch.tensor(shrink(test_x, setting.side), device=device)
        answers = torch.cat([outputs(model, params, part).argmax(dim=1) for part in x.split(1000)])
    found["accuracy"] = float((answers.cpu().numpy() == test_y).mean())
    return found


def claims(accuracy: dict[str, list[float]], indefinite: float) -> list[Found]:
    """Judge what the paper says; "below" and "comparable" as in `_verdicts`."""
    nystrom, neumann = accuracy[methods.PAPER_NYSTROM], accuracy[methods.PAPER_NEUMANN]
    paper_cg, identity = accuracy[methods.PAPER_CG], accuracy[methods.IDENTITY]
    cg, ours = accuracy[methods.CG], accuracy[methods.NYSTROM]
    learned = below(accuracy[INITIAL], nystrom) and below(accuracy[INITIAL], neumann)

    def gained(found: list[float]) -> float:
        return float(np.mean(found) - np.mean(accuracy[INITIAL]))

    return [
        runs.claim(
            "The Nyström method is comparable to the Neumann series (0.49 and 0.47).",
            f"{runs.spread(nystrom)} and {runs.spread(neumann)}; before learning "
            f"{runs.spread(accuracy[INITIAL])}.",
            verdict([learned and comparable(nystrom, neumann)]),
        ),
        runs.claim(
            "The Nyström method shows better performance than others (caption).",
            f"{runs.spread(nystrom)}; Neumann {runs.spread(neumann)}, CG of the paper's code "
            f"{runs.spread(paper_cg)}, and the identity, a control that the paper lacks, "
            f"{runs.spread(identity)}.",
            verdict([below(other, nystrom) for other in (neumann, paper_cg, identity)]),
        ),
        runs.claim(
            "Conjugate gradients fail to learn the task (0.17).",
            f"As in the paper's code {runs.spread(paper_cg)}, Nyström {runs.spread(nystrom)}; to "
            "fail is to stay behind, and to gain less than half as much.",
            verdict([below(paper_cg, nystrom), gained(paper_cg) < gained(nystrom) / 2]),
        ),
        runs.claim(
            "That failure may be due to an ill-conditioned Hessian: then correct CG fails too, "
            "and on positive curvature.",
            f"Correct CG {runs.spread(cg)}, Nyström {runs.spread(ours)}; CG met negative "
            f"curvature in {indefinite:.0%} of the hypergradients.",
            verdict([below(cg, ours), indefinite < 0.5]),
        ),
    ]


def main(arguments: list[str]) -> int:
    """Run all methods, print the table, write JSON and the picture."""
    default = 3 if "--quick" in arguments else 5
    options = runs.parse(runs.parser("table2", __doc__, seeds=default), arguments)
    setting = QUICK if options.quick else PAPER
    load_mnist(options.data_dir)  # or say what is missing, once
    shared = {
        "data_dir": str(options.data_dir.resolve()),
        "device": options.device,
        **asdict(setting),
    }
    names = [INITIAL, REAL, *methods.METHODS]
    cells = {
        f"{name}, seed {seed}": {"method": name, "seed": seed, **shared}
        for seed in range(options.seeds)
        for name in names
    }
    done, about = runs.run_all("table2", "benchmarks.paper.table2:run", cells, options)
    found = {
        name: [done[f"{name}, seed {seed}"] for seed in range(options.seeds)] for name in names
    }
    accuracy = {name: [run["accuracy"] for run in group] for name, group in found.items()}
    rows = [
        {
            "method": name,
            "test accuracy": runs.spread(accuracy[name]),
            "paper": PAPER_FIGURES.get(name, ""),
            **columns(group),
        }
        for name, group in found.items()
    ]
    judged = claims(accuracy, mean_of(found[methods.CG], "negative"))
    about = {**about, "setting": "quick" if options.quick else "paper", "seeds": options.seeds}
    parts = [table(rows), EXPLAINED, skipped(found), cuts(PAPER, setting)]
    text = "\n\n".join([part for part in parts if part] + [runs.told(judged)])
    results = {"settings": asdict(setting), "runs": found, "claims": judged}
    publish(options.output, "table2", text, about, **results)
    draw(options.output / "table2.png", {"Fifty distilled images of MNIST": found})
    print(f"Picture: {options.output / 'table2.png'}")
    return 0
