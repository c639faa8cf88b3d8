"""Table 3 of the paper: weights from which few images of a new alphabet are learned (iMAML).

Each task is to tell five characters of Omniglot apart after some steps of gradient descent on one
or five images of each, pulled back to the common start by λ/2 ‖θ - φ‖². The start φ is learned.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import autograd, nn
from torch.nn import functional as F

from benchmarks.data.omniglot import Task, draw_task, load_omniglot
from benchmarks.harness.claims import below, claim, comparable, verdict
from benchmarks.harness.experiment import Run, experiment, seeds
from benchmarks.harness.processes import Found
from benchmarks.harness.report import cuts, spread, table
from benchmarks.paper import methods
from benchmarks.paper.few_images import learning
from benchmarks.paper.few_images.learning import SLOPE, Log, against, descend, initialize, outputs

INITIAL = "no meta-training"
SHOTS = (1, 5)
PAPER_FIGURES = {
    methods.PAPER_CG: ("0.96 ± 0.00", "0.98 ± 0.00"),
    methods.PAPER_NEUMANN: ("0.91 ± 0.00", "0.97 ± 0.00"),
    methods.PAPER_NYSTROM: ("0.95 ± 0.00", "0.98 ± 0.00"),
}


@dataclass(frozen=True)
class Setting:
    """Sizes and rates. What the paper does not say is marked."""

    side: int = 28
    blocks: int = 4
    filters: int = 64
    pooled: bool = True  # otherwise every other pixel of a convolution is left out
    ways: int = 5  # not said
    queries: int = 5  # not said: images of each class that the outer loss is of
    pull: float = 2.0  # λ, not said: that of Rajeswaran et al. (2019)
    inner_steps: int = 10
    inner_rate: float = 0.1
    updates: int = 100_000
    tasks: int = 16  # of an update; not said, but 1.6e6 tasks in all
    outer_rate: float = 1e-3
    turned: bool = True  # characters turned by quarters are classes of their own; not said
    test_tasks: int = 600  # not said
    k: int = 10


PAPER = Setting()
QUICK = Setting(
    side=14,
    blocks=3,
    filters=16,
    pooled=False,
    updates=120,
    tasks=1,
    outer_rate=0.01,
    turned=False,
    test_tasks=100,
)
TEST_QUERIES = 5


def network(setting: Setting) -> Any:
    """Return blocks of convolution, normalization by the batch, leaky ReLU and pooling."""
    layers: list[Any] = []
    before, side = 1, setting.side
    for _ in range(setting.blocks):
        layers += [
            nn.Conv2d(before, setting.filters, 3, padding=1, stride=1 if setting.pooled else 2),
            nn.BatchNorm2d(setting.filters, track_running_stats=False),
            nn.LeakyReLU(SLOPE),
            *([nn.MaxPool2d(2)] if setting.pooled else []),
        ]
        before, side = setting.filters, side // 2 if setting.pooled else (side + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * side**2, setting.ways))


def learn(
    *, method: str, shots: int, seed: int, data_dir: str, cache: str, device: str, **sizes: Any
) -> Found:
    """Learn a start with one method, and try it on characters of other alphabets."""
    setting = Setting(**sizes)
    images = load_omniglot(Path(data_dir), Path(cache), setting.side)
    model = network(setting).to(device)
    meta = [p.detach().clone().requires_grad_() for p in initialize(model, seed)]

    def loss(params: Any, x: np.ndarray, y: np.ndarray) -> Any:
        scores = outputs(model, params, torch.tensor(x, device=device))
        return F.cross_entropy(scores, torch.tensor(y, device=device))

    def products(left: Any, right: Any) -> Any:
        return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()

    def whole(params: Any, task: Task) -> Any:
        away = [p - start for p, start in zip(params, meta, strict=True)]
        return loss(params, *task[:2]) + setting.pull / 2 * products(away, away)

    def adapted(task: Task, unroll: bool = False) -> Any:
        steps = setting.inner_steps
        return descend(lambda p: whole(p, task), meta, steps, setting.inner_rate, unroll=unroll)

    sizes = {"ways": setting.ways, "shots": shots}
    many = {**sizes, "queries": setting.queries, "turned": setting.turned}
    optimizer = torch.optim.Adam(meta, lr=setting.outer_rate)
    updates = 0 if method == INITIAL else setting.updates
    solver = methods.solvers(setting.k).get(method)
    # The paper's code knows one inner loss, pull and all. Ours is told of the pull: its square as
    # a ridge, and what is linear in the parameters in the loss.
    told = method not in methods.PAPER_METHODS
    log = Log(updates)
    rng = np.random.default_rng([seed, 0])
    for update in range(updates):
        optimizer.zero_grad()
        tasks = [draw_task(images.background, rng, **many) for _ in range(setting.tasks)]
        values = []
        for number, task in enumerate(tasks):
            params = adapted(task)

            def outer(params: Any = params, task: Task = task) -> Any:
                return loss(params, *task[2:])

            def inner(params: Any = params, task: Task = task) -> Any:
                if told:
                    return loss(params, *task[:2]) - setting.pull * products(params, meta)
                return whole(params, task)

            with torch.no_grad():
                values.append(float(outer()))
            out = log.hypergradient(
                *(inner, outer, params, meta),
                solver=solver,
                ridge=setting.pull if told else None,
                rng=[seed, update, number],  # no state: the tasks have nothing in common
            )
            if out is not None and update in log.checks and number == 0:
                truth = autograd.grad(loss(adapted(task, unroll=True), *task[2:]), meta)
                log.found["checks"].append(against(out.grads, truth))
        log.found["losses"].append(float(np.mean(values)))
        for p in meta:
            if p.grad is not None:
                p.grad /= setting.tasks
        log.step(optimizer, meta)
    right = []
    rng = np.random.default_rng([seed, 1])
    for _ in range(setting.test_tasks):
        task = draw_task(images.evaluation, rng, **sizes, queries=TEST_QUERIES)
        params = adapted(task)
        with torch.no_grad():
            scores = outputs(model, params, torch.tensor(task.query_x, device=device))
        right.append(float((scores.argmax(dim=1).cpu().numpy() == task.query_y).mean()))
    return log.found | {"accuracy": float(np.mean(right))}


def claims(accuracy: dict[int, dict[str, list[float]]]) -> list[Found]:
    """Judge what the paper says; "below" and "comparable" as in `harness.claims`.

    The paper calls 0.95 and 0.96 comparable, so a difference of 0.01 is.
    """
    least = 0.01
    cg, neumann, nystrom = (
        {shots: accuracy[shots][name] for shots in SHOTS}
        for name in (methods.PAPER_CG, methods.PAPER_NEUMANN, methods.PAPER_NYSTROM)
    )
    learned = {
        shots: all(below(accuracy[shots][INITIAL], way[shots]) for way in (cg, nystrom))
        for shots in SHOTS
    }

    def both(found: dict[int, list[float]]) -> str:
        return " and ".join(spread(found[shots]) for shots in SHOTS)

    def of(name: str) -> str:
        return both({shots: accuracy[shots][name] for shots in SHOTS})

    return [
        claim(
            "The Nyström method is comparable to conjugate gradients, 1-shot and 5-shot (0.95 "
            "and 0.98, 0.96 and 0.98).",
            f"Nyström {both(nystrom)}, CG of the paper's code {both(cg)}, correct CG "
            f"{of(methods.CG)}; without meta-training {of(INITIAL)}.",
            verdict([learned[n] and comparable(nystrom[n], cg[n], least) for n in SHOTS]),
        ),
        claim(
            "The Neumann series stays behind both in the 1-shot setting (0.91).",
            f"Neumann {spread(neumann[1])}, Nyström {spread(nystrom[1])}, CG of the "
            f"paper's code {spread(cg[1])}; the identity, a control that the paper lacks, "
            f"{spread(accuracy[1][methods.IDENTITY])}.",
            verdict([below(neumann[1], other[1], least) for other in (nystrom, cg)]),
        ),
    ]


@experiment("table3", __doc__, *learning.OPTIONS, seeds(3), packages=("torch", "numpy"))
def main(run: Run) -> None:
    setting = QUICK if run.options.quick else PAPER
    folder, cache = run.options.data_dir.resolve(), run.cache.resolve()
    load_omniglot(folder, cache, setting.side)  # decodes once, for all the runs
    shared = {"data_dir": str(folder), "cache": str(cache), "device": run.options.device}
    shared |= asdict(setting)
    names = [INITIAL, *methods.METHODS]
    cases = {
        (name, f"{shots}-shot"): {"method": name, "shots": shots, **shared}
        for shots in SHOTS
        for name in names
    }
    done = run.repeated(learn, cases)
    found = {shots: {name: done[name, f"{shots}-shot"] for name in names} for shots in SHOTS}
    accuracy = {
        shots: {name: [one["accuracy"] for one in group] for name, group in by_name.items()}
        for shots, by_name in found.items()
    }
    both = {name: [one for shots in SHOTS for one in found[shots][name]] for name in names}
    rows = [
        {
            "method": name,
            "1-shot": spread(accuracy[1][name]),
            "paper": PAPER_FIGURES.get(name, ("", ""))[0],
            "5-shot": spread(accuracy[5][name]),
            "paper ": PAPER_FIGURES.get(name, ("", ""))[1],
            **learning.columns(group),
        }
        for name, group in both.items()
    ]
    run.publish(
        *(table(rows), learning.EXPLAINED, learning.skipped(both), cuts(PAPER, setting)),
        settings=asdict(setting),
        runs={f"{shots}-shot": found[shots] for shots in SHOTS},
        claims=claims(accuracy),
    )
    learning.draw(run, {f"Omniglot, {setting.ways} ways, {n}-shot": found[n] for n in SHOTS})
