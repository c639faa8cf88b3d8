"""Figure 1 of the paper: the inverse of a 40×40 matrix of rank 20, plus 0.1 I, approximated.

The paper does not give the matrix. Two are shown: a product of Gaussian factors, whose twenty
eigenvalues are of one order, and one whose eigenvalues fall as ``1 / i**2``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import lowrank_inverse as li
from benchmarks.harness.claims import IN_PART, NOT_SUPPORTED, SUPPORTED, claim
from benchmarks.harness.experiment import Run, experiment, seeds
from benchmarks.harness.processes import Found
from benchmarks.harness.report import table

SIZE, RANK, DAMPING = 40, 20, 0.1
SAMPLED = (5, 10, 20)
ACCURATE = 0.1
"""The relative error up to which a picture of the inverse looks like it."""

Errors = dict[str, dict[str, list[float]]]


def matrices(seed: int) -> dict[str, np.ndarray]:
    """Draw the two matrices."""
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((SIZE, RANK)) / np.sqrt(SIZE)
    basis = np.linalg.qr(rng.standard_normal((SIZE, RANK)))[0]
    return {
        "Gaussian factors": factor @ factor.T,
        "eigenvalues 1/i²": (basis / np.arange(1, RANK + 1) ** 2.0) @ basis.T,
    }


def approximations(seed: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Ways to write out an inverse."""
    identity = np.eye(SIZE)

    drawn = {"sampling": "uniform", "rng": seed}

    def nystrom(rank: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda A: li.nystrom(A, rank, **drawn).inverse(DAMPING) @ identity

    def neumann(terms: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda A: li.neumann(A, identity, damping=DAMPING, num_terms=terms).value

    return {
        **{f"Nyström, k = {rank}": nystrom(rank) for rank in SAMPLED},
        **{f"Neumann, l = {terms}": neumann(terms) for terms in SAMPLED},
    }


def inverses(seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Return the inverse of each matrix, "exact" and approximated."""
    ways = approximations(seed)
    return {
        kind: {
            "exact": np.linalg.inv(A + DAMPING * np.eye(SIZE)),
            **{name: invert(A) for name, invert in ways.items()},
        }
        for kind, A in matrices(seed).items()
    }


def errors(seed: int) -> dict[str, dict[str, float]]:
    """Relative errors in the Frobenius norm, by matrix and method."""
    found = {}
    for kind, by_name in inverses(seed).items():
        exact = by_name.pop("exact")
        norm = np.linalg.norm(exact)
        found[kind] = {n: float(np.linalg.norm(B - exact) / norm) for n, B in by_name.items()}
    return found


def judge(found: Errors) -> list[Found]:
    """Hold the paper's claims against the errors.

    Supported where it holds for both matrices, in part for one of them.
    """
    means = {kind: {n: np.mean(e) for n, e in by_name.items()} for kind, by_name in found.items()}
    pairs = {k: (f"Nyström, k = {k}", f"Neumann, l = {k}") for k in SAMPLED}
    verdicts = [NOT_SUPPORTED, IN_PART, SUPPORTED]
    accurate = sum(mean[pairs[5][0]] <= ACCURATE for mean in means.values())
    closer = sum(all(mean[a] < mean[b] for a, b in pairs.values()) for mean in means.values())
    five = "; ".join(
        f"{kind}: {mean[pairs[5][0]]:.2f} (Neumann series of 5 terms: {mean[pairs[5][1]]:.2f})"
        for kind, mean in means.items()
    )
    equal = "; ".join(
        f"{kind}: "
        + ", ".join(f"{mean[a]:.1e} against {mean[b]:.1e} at {k}" for k, (a, b) in pairs.items())
        for kind, mean in means.items()
    )
    return [
        claim(
            "five columns give an accurate inverse of a matrix of rank 20 plus 0.1 I",
            f"relative error of five columns, accurate up to {ACCURATE:g}: {five}",
            verdicts[accurate],
        ),
        claim(
            "the Nyström method is closer to the inverse than the Neumann series",
            f"mean errors at k = l: {equal}",
            verdicts[closer],
        ),
    ]


@experiment("figure1", __doc__, seeds(20))
def main(run: Run) -> None:
    runs = run.repeated(errors, {"matrices": {}}, apart=False)["matrices"]
    found = {kind: {n: [one[kind][n] for one in runs] for n in runs[0][kind]} for kind in runs[0]}
    rows = [
        {"relative error": name}
        | {
            kind: f"{np.mean(by_name[name]):.1e} ± {np.std(by_name[name]):.0e}"
            for kind, by_name in found.items()
        }
        for name in approximations(0)
    ]
    run.publish(
        table(rows),
        f"Mean and deviation over {run.options.seeds} matrices.",
        claims=judge(found),
        relative_errors=found,
    )
    draw(run, inverses(seed=0))


def draw(run: Run, rows: dict[str, dict[str, np.ndarray]]) -> None:
    """Draw the inverse and its approximations for one seed, one row a matrix."""
    shown = [name for name in next(iter(rows.values())) if not name.endswith("10")]
    figure, axes = run.figure(len(rows), len(shown), 12.5, 5.4)
    for line, (kind, pictures) in zip(axes, rows.items(), strict=True):
        exact = pictures["exact"]
        largest = np.abs(exact).max()
        for axis, name in zip(line, shown, strict=True):
            image = axis.imshow(pictures[name], cmap="RdBu", vmin=-largest, vmax=largest)
            error = np.linalg.norm(pictures[name] - exact) / np.linalg.norm(exact)
            axis.set(title=name, xticks=[], yticks=[], xlabel=f"error {error:.1e}")
        line[0].set_ylabel(kind)
        figure.colorbar(image, ax=line, shrink=0.8)
    run.draw(figure)
