"""Figure 1 of the paper: the inverse of a 40×40 matrix of rank 20, plus 0.1 I, approximated.

The paper does not give the matrix. Two are shown: a product of Gaussian factors, whose twenty
eigenvalues are of one order, and one whose eigenvalues fall as ``1 / i**2``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

import lowrank_inverse as li
from benchmarks._measure import Found
from benchmarks._report import machine, publish, pyplot, table
from benchmarks.paper import _runs

SIZE, RANK, DAMPING = 40, 20, 0.1
SAMPLED = (5, 10, 20)
TERMS = (5, 10, 20)
ACCURATE = 0.1
"""The relative error up to which a picture of the inverse looks like it."""


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

    def nystrom(rank: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda A: li.nystrom(A, rank, rng=seed).inverse(DAMPING) @ identity

    def neumann(terms: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda A: li.neumann(A, identity, damping=DAMPING, num_terms=terms).value

    return {
        **{f"Nyström, k = {rank}": nystrom(rank) for rank in SAMPLED},
        **{f"Neumann, l = {terms}": neumann(terms) for terms in TERMS},
    }


def errors(num_seeds: int) -> dict[str, dict[str, list[float]]]:
    """Relative errors in the Frobenius norm, by matrix and method, one for each seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for seed in tqdm(range(num_seeds), desc="figure 1", unit="seed"):
        for kind, A in matrices(seed).items():
            exact = np.linalg.inv(A + DAMPING * np.eye(SIZE))
            for name, invert in approximations(seed).items():
                error = np.linalg.norm(invert(A) - exact) / np.linalg.norm(exact)
                found.setdefault(kind, {}).setdefault(name, []).append(float(error))
    return found


def judge(found: dict[str, dict[str, list[float]]]) -> list[Found]:
    """Hold the paper's claims against the errors.

    Supported where it holds for both matrices, in part for one of them.
    """
    verdicts = [_runs.NOT_SUPPORTED, _runs.IN_PART, _runs.SUPPORTED]

    def count(holds: Callable[[dict[str, list[float]]], bool]) -> str:
        return verdicts[sum(map(holds, found.values()))]

    five, series = "Nyström, k = 5", "Neumann, l = 5"
    errors = "; ".join(
        f"{kind}: {np.mean(by_name[five]):.2f} (Neumann series of 5 terms: "
        f"{np.mean(by_name[series]):.2f})"
        for kind, by_name in found.items()
    )
    return [
        _runs.claim(
            "five columns give an accurate inverse of a matrix of rank 20 plus 0.1 I",
            f"relative error of five columns, accurate up to {ACCURATE:g}: {errors}",
            count(lambda by_name: np.mean(by_name[five]) <= ACCURATE),
        ),
        _runs.claim(
            "the Nyström method is closer to the inverse than the Neumann series",
            "mean errors at k = l: "
            + "; ".join(
                f"{kind}: "
                + ", ".join(
                    f"{np.mean(by_name[f'Nyström, k = {k}']):.1e} against "
                    f"{np.mean(by_name[f'Neumann, l = {k}']):.1e} at {k}"
                    for k in SAMPLED
                )
                for kind, by_name in found.items()
            ),
            count(
                lambda by_name: all(
                    np.mean(by_name[f"Nyström, k = {k}"]) < np.mean(by_name[f"Neumann, l = {k}"])
                    for k in SAMPLED
                )
            ),
        ),
    ]


def draw(path: Path, seed: int) -> None:
    """Draw the inverse and its approximations for one seed, one row a matrix."""
    plt = pyplot()
    ways = approximations(seed)
    shown = [name for name in ways if not name.endswith("10")]
    rows = matrices(seed)
    figure, axes = plt.subplots(
        len(rows), len(shown) + 1, figsize=(12.5, 5.4), layout="constrained"
    )
    for line, (kind, A) in zip(axes, rows.items(), strict=True):
        exact = np.linalg.inv(A + DAMPING * np.eye(SIZE))
        pictures = {"exact": exact, **{name: ways[name](A) for name in shown}}
        for axis, (name, picture) in zip(line, pictures.items(), strict=True):
            largest = np.abs(exact).max()
            image = axis.imshow(picture, cmap="RdBu", vmin=-largest, vmax=largest)
            error = np.linalg.norm(picture - exact) / np.linalg.norm(exact)
            axis.set(title=name, xticks=[], yticks=[], xlabel=f"error {error:.1e}")
        line[0].set_ylabel(kind)
        figure.colorbar(image, ax=line, shrink=0.8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    """Print the table, write JSON and the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks figure1", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="matrices drawn (default: 20)")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for results")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1; got {options.seeds}")
    found = errors(options.seeds)
    rows = [
        {
            "relative error": name,
            **{
                kind: f"{np.mean(by_name[name]):.1e} ± {np.std(by_name[name]):.0e}"
                for kind, by_name in found.items()
            },
        }
        for name in approximations(0)
    ]
    about = machine("numpy", seeds=f"0…{options.seeds - 1}")
    claims = judge(found)
    text = f"{table(rows)}\n\nMean and deviation over {options.seeds} matrices."
    text += f"\n\n{_runs.told(claims)}"
    publish(options.output, "figure1", text, about, claims=claims, relative_errors=found)
    draw(options.output / "figure1.png", seed=0)
    print(f"Picture: {options.output / 'figure1.png'}")
    return 0
