"""Nyström approximations in npz or safetensors files, without pickle."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._io import Format
from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.checks import describe
from lowrank_inverse.arrays.conversion import is_array, is_traced, like_device, to_host, wide_dtype
from lowrank_inverse.arrays.conversion import like as make_like
from lowrank_inverse.low_rank.approximation import NystromApproximation
from lowrank_inverse.low_rank.nystrom_columns import nystrom

FILE = Format("lowrank_inverse.save")
DERIVED = {"dtype", "like", "_gram"}
"""Attributes that follow from the columns."""
OPTIONAL = {"_map", "asymmetry"}
"""Attributes that not every form of an approximation has."""


def save(path: str | os.PathLike[str], approx: NystromApproximation) -> None:
    """Write a Nyström approximation to a file.

    Parameters
    ----------
    path : str or path
        Ends in ``.npz``, or in ``.safetensors`` (which needs the package safetensors).
    approx : NystromApproximation
        From any library. :func:`load` reads it without loss into any library.

    Raises
    ------
    TypeError
        If `approx` is no Nyström approximation, or its values are unknown because JAX traces.
    ValueError
        If `path` has another ending.
    ImportError
        If `path` ends in ``.safetensors`` and the package is missing.

    Notes
    -----
    The file holds about ``n k + 4 k²`` numbers. It is written under a temporary name in the same
    folder and then renamed, so an interrupted save leaves an existing file unchanged.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> approx = li.nystrom(np.diag([3.0, 2.0, 1.0]), 2, rng=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     li.save(pathlib.Path(folder) / "factor.npz", approx)
    ...     again = li.load(pathlib.Path(folder) / "factor.npz")
    >>> print(again, np.array_equal(again @ np.ones(3), approx @ np.ones(3)))
    NystromApproximation(n=3, columns=2, rank=2, dropped=0, negative=0) True
    """
    if not isinstance(approx, NystromApproximation):
        raise TypeError(f"`approx` must be a NystromApproximation; got {describe(approx)}.")
    state = {name: _host(value) for name, value in vars(approx).items() if name not in DERIVED}
    FILE.save(path, state)


def load(path: str | os.PathLike[str], *, like: Array | None = None) -> NystromApproximation:
    """Read a Nyström approximation that :func:`save` wrote.

    Parameters
    ----------
    path : str or path
        The file.
    like : array, optional
        Load into the library and onto the device of this array. Default: NumPy.

    Returns
    -------
    NystromApproximation

    Raises
    ------
    ValueError
        If the file is truncated or damaged, was not written by :func:`save`, or was written by a
        version with another layout.
    TypeError
        If the file needs float64 and the library of `like` does not have it (JAX by default).

    Notes
    -----
    Loading never executes code. Memory: that of the arrays, and twice that during conversion.
    """
    state = FILE.load(path)
    most = vars(nystrom(np.eye(1), indices=[0])).keys() - DERIVED
    if not most - OPTIONAL <= state.keys() <= most:
        raise ValueError(
            f"{path} was written by another version of lowrank-inverse, with other attributes. "
            "Load it with that version, or compute the approximation again."
        )
    approx = object.__new__(NystromApproximation)
    for name, value in state.items():
        setattr(approx, name, value if name == "indices" or like is None else _moved(value, like))
    approx.dtype, approx.like = approx.columns.dtype, approx.columns[:0, 0]
    return approx


def _host(value: Any) -> Any:
    if is_traced(value):
        raise TypeError(
            "`approx` must have values to save; they are unknown while jax traces. Save it "
            "outside of the transformation."
        )
    if isinstance(value, tuple):
        return tuple(map(_host, value))
    return to_host(value) if is_array(value) and not isinstance(value, np.generic) else value


def _moved(value: Any, like: Array) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(part, like) for part in value)
    if not isinstance(value, np.ndarray):
        return value
    xp = array_namespace(like)
    if value.dtype == np.float64 and wide_dtype(like) != xp.float64:
        raise TypeError(
            "the file has numbers in float64, which `like` does not support here: "
            f"{type(like).__module__.split('.')[0]} on {like_device(like)}. Enable 64-bit types "
            "(jax_enable_x64), or load on another device or into another library."
        )
    return make_like(value, like, getattr(xp, value.dtype.name))
