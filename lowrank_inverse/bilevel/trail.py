"""Evaluations kept in a folder, so that a minimisation goes on where it was interrupted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_inverse._io import Format
from lowrank_inverse.arrays.conversion import to_host
from lowrank_inverse.bilevel.minimum import Evaluation
from lowrank_inverse.solvers.state import HypergradientState

FILE = Format("minimize_bilevel's checkpoint")
KEPT = ("theta", "phi", "loss", "length", "curvature", "ridge", "count")
"""Of the evaluator."""


class Trail:
    """The evaluations of one minimisation, a file each, and the state after the latest.

    A call that goes on gives the evaluations in the folder to the optimizer again, whatever that
    is, and so brings it to where it was; then it evaluates anew from the state there.

    Parameters
    ----------
    folder : path or None
        Made if it is not there. With None nothing is kept.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._latest = -1
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            while self._path(self._latest + 1).exists():
                self._latest += 1

    def _path(self, number: int, what: str = "evaluation") -> Path:
        assert self.folder is not None
        return self.folder / f"{what}{number:05d}.npz"

    def replay(self, phi: np.ndarray, number: int) -> tuple[Evaluation, np.ndarray] | None:
        """Return an evaluation if it is in the folder.

        Raises
        ------
        ValueError
            It is of other hyperparameters.
        """
        if number > self._latest:
            return None
        found = FILE.load(self._path(number))
        if not np.array_equal(found["hparams"], phi):
            raise self._other(f"evaluation {number} there has other hyperparameters")
        return Evaluation(*found["record"]), found["gradient"]

    def restore(self, loop: Any) -> None:
        """Bring the evaluator to where it was after the latest evaluation, once that is met."""
        if len(loop.history) - 1 != self._latest:
            return
        kept = FILE.load(self._path(self._latest, "state"))
        evaluator = loop.evaluate
        evaluator.state = HypergradientState(*kept["state"])
        for name in KEPT:
            setattr(evaluator, name, kept[name])
        problem = evaluator.problem
        loss = problem.inner(evaluator.theta, evaluator.phi)[0]
        if not np.isclose(loss, evaluator.loss, rtol=problem.eps**0.5, atol=0.0):
            raise self._other(f"the inner loss was {evaluator.loss:.6g} and is {loss:.6g}")
        if loop.best is not None:
            loop.best = loop.best._replace(theta=kept["best_params"])

    def add(self, phi: np.ndarray, gradient: np.ndarray, record: Evaluation, loop: Any) -> None:
        """Write an evaluation, and the state after it in the place of that before."""
        if self.folder is None:
            return
        number, evaluator = len(loop.history) - 1, loop.evaluate
        kept = {
            "best_params": None if loop.best is None else loop.best.theta,
            "state": [None if x is None else to_host(x) for x in evaluator.state],
            **{name: getattr(evaluator, name) for name in KEPT},
        }
        FILE.save(self._path(number, "state"), kept)
        content = {"hparams": phi, "gradient": gradient, "record": list(record)}
        FILE.save(self._path(number), content)  # last: it counts once it is there
        if number > 0:
            self._path(number - 1, "state").unlink(missing_ok=True)

    def _other(self, why: str) -> ValueError:
        return ValueError(
            f"`checkpoint` {str(self.folder)!r} holds another minimisation: {why}. Give an empty "
            "folder, or the problem, start, optimizer and bounds of that call."
        )
