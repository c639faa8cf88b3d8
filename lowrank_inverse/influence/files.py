"""Influence functions as files of plain arrays."""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

import numpy as np

from lowrank_inverse._io import replace_file
from lowrank_inverse.arrays.conversion import to_host
from lowrank_inverse.influence.damped_solver import from_record


class Saved(NamedTuple):
    """What a file holds: settings and a fingerprint, and columns where there are any."""

    record: dict[str, Any]
    columns: Any
    indices: np.ndarray | None

    @property
    def settings(self) -> dict[str, Any]:
        """Return the arguments that an influence function is made with."""
        record = self.record
        return {
            "solver": from_record(record["solver"]),
            "curvature": record["curvature"],
            "ridge": record["ridge"],
            "damping": record["damping"],
            "rng": record["seed"],
        }


def read_saved(path: str | os.PathLike[str]) -> Saved:
    """Read a file that `InfluenceBase.save` wrote."""
    with np.load(path, allow_pickle=False) as file:
        if "record" not in file:
            raise ValueError(f"{str(path)!r} was not written by InfluenceFunction.save.")
        record = json.loads(str(file["record"]))
        return Saved(record, file.get("columns"), file.get("indices"))


def save_file(path: str | os.PathLike[str], saved: Saved) -> None:
    """Write a file, whole or not at all."""
    arrays = {"record": np.asarray(json.dumps(saved.record))}
    if saved.columns is not None and saved.indices is not None:
        arrays |= {"columns": to_host(saved.columns), "indices": saved.indices}
    replace_file(path, lambda file: np.savez(file, allow_pickle=False, **arrays))
