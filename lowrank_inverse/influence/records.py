"""Influence functions in files, checkpoints and pickles."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from lowrank_inverse._io import Format
from lowrank_inverse.arrays.conversion import is_array, like, rows_like, to_host
from lowrank_inverse.arrays.linalg import column_norm
from lowrank_inverse.influence.checkpoint import Store, differences, digest
from lowrank_inverse.influence.damped_solver import from_record, to_record
from lowrank_inverse.influence.dataset import Examples
from lowrank_inverse.influence.engine import Workings
from lowrank_inverse.solvers.direct import Exact
from lowrank_inverse.solvers.low_rank import Nystrom
from lowrank_inverse.solvers.preconditioned import NystromCG

FILE = Format("InfluenceFunction.save")


class Recorded(Workings):
    """An influence function that can be saved and restored."""

    _arguments: tuple[tuple[Any, ...], dict[str, Any]]
    """What the subclass was called with, apart from `_settings`."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write settings, columns and fingerprints of model and data to one file.

        Parameters
        ----------
        path : path
            Ends in ``.npz`` or ``.safetensors``. The file holds plain arrays, without pickle.

        Notes
        -----
        The fingerprints are hashes of all weights, buffers and the training set, the loss of each
        training example, and a product with the curvature. Loading compares them.
        """
        self._alone("save")
        self._check_unchanged()
        settings = self._settings() | {"solver": to_record(self._settings()["solver"])}
        _ = self._factor.inverse  # computes the columns
        FILE.save(path, {"settings": settings, "key": self._key(), "kept": self._kept()})

    @classmethod
    def _loaded(cls: Any, path: str | os.PathLike[str], *arguments: Any, **options: Any) -> Any:
        """Return what was saved, with its columns, after a check that it is about the same."""
        saved = FILE.load(path)
        settings = saved["settings"] | {"solver": from_record(saved["settings"]["solver"])}
        influence = cls(*arguments, **(settings | options))
        if other := differences(saved["key"], influence._key()):
            raise ValueError(
                f"{str(path)!r} was saved with other {' and '.join(other)} than those passed. "
                "Restore those first, or create a new influence function."
            )
        return influence._with_columns(*saved["kept"])

    def __copy__(self) -> Any:
        """Return another on the same factor."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __reduce__(self) -> Any:
        """Pickle what it was made of, and the columns; it is made anew on the other side."""
        self._alone("pickle")
        self._check_unchanged()
        arguments, options = self._arguments
        limits = {
            "batch_size": self._batch_size,
            "memory_budget": self._memory_budget,
            "progress": self._progress,
        }
        return _rebuilt, (type(self), arguments, options | limits | self._settings(), self._kept())

    def _alone(self, name: str) -> None:
        """Raise where there is a mesh, for what is not taken over processes."""
        if self._group.size > 1:
            raise ValueError(
                f"`{name}` is for an influence function of one process; this one has a `mesh`. "
                "Create one without it, with all training examples."
            )

    def _settings(self) -> dict[str, Any]:
        undecided = self._is_default and not isinstance(self._solver, Exact)
        return {
            "solver": None if undecided else self._solver,
            "curvature": self._curvature,
            "ridge": to_host(self._ridge) if is_array(self._ridge) else self._ridge,
            "damping": self._damping,
            "rng": self._seed,
        }

    def _kept(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Return the columns and their indices, as far as they were computed."""
        kept = self._factor.A
        return None if kept.kept is None else to_host(kept.kept), kept.indices

    def _with_columns(self, columns: np.ndarray | None, indices: np.ndarray | None) -> Any:
        if columns is not None:
            kept = self._factor.A
            kept.indices, kept.kept = indices, like(columns, self._backend.like)
        return self

    def _key(self) -> dict[str, Any]:
        """Return what the columns depend on, beside the settings."""
        signs = np.random.default_rng(0).integers(0, 2, self._backend.n) * 2.0 - 1
        probe = rows_like(signs, self._backend.like)
        return {
            "parameters": self._backend.fingerprint(),
            "training set": self._train.digest(),
            "training losses": self._train.losses,
            "curvature": float(column_norm(self._operator @ probe)),
        }

    def _store(self, folder: str | os.PathLike[str] | None, *about: Any, **data: Examples) -> Store:
        """Return a store whose key is all that the results depend on."""
        if folder is None:
            return Store(None, {})
        if self._group.size > 1:
            folder = os.path.join(folder, f"{self._group.rank}-of-{self._group.size}")
        sampled = isinstance(self._solver, (Nystrom, NystromCG))
        if sampled and not self._seeded and self._solver.indices is None:
            raise ValueError(
                "`checkpoint` needs a seed, so that a later run draws the same columns: pass `rng`."
            )
        settings = self._settings() | {"solver": to_record(self._solver)}
        key = self._key() | {
            "kind": digest(*about),
            "settings": digest(*settings, *settings.values()),
            "batches": digest([(self._width(), one.sizes) for one in data.values()]),
        }
        for name, one in data.items():
            if one is not self._train:
                key |= {name: one.digest(), f"{name} losses": one.losses}
        return self._group.together(lambda: Store(folder, key, self._group, self._backend.n))


def _rebuilt(
    kind: Any, arguments: tuple[Any, ...], options: dict[str, Any], kept: tuple[Any, Any]
) -> Any:
    return kind(*arguments, **options)._with_columns(*kept)
