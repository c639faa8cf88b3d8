"""Files for Nyström approximations: npz or safetensors, never pickle."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._io import replace_file
from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.checks import describe
from lowrank_inverse.arrays.conversion import is_array, is_traced, like_device, to_host, wide_dtype
from lowrank_inverse.arrays.conversion import like as make_like
from lowrank_inverse.low_rank.approximation import NystromApproximation
from lowrank_inverse.low_rank.nystrom_columns import nystrom

FORMAT, VERSION = "lowrank-inverse", 1


SUFFIXES = (".npz", ".safetensors")
HEADER = "lowrank_inverse"
DERIVED = ("dtype", "like")
"""Attributes that follow from the columns."""
OPTIONAL = {"_map", "asymmetry"}
"""Attributes that not every form of a factor has."""


def save(path: str | os.PathLike[str], approx: NystromApproximation) -> None:
    """Write a Nyström approximation to a file, all at once or not at all.

    Parameters
    ----------
    path : str or path
        Ends in ``.npz``, or in ``.safetensors`` (which needs the package safetensors).
    approx : NystromApproximation
        Of any library. It is read back bit for bit, into any library.

    Raises
    ------
    TypeError
        If `approx` is none, or its values are unknown because jax traces.
    ValueError
        For another ending.
    ImportError
        Without safetensors, for a file of that kind.

    Notes
    -----
    About ``n k + 4 k²`` numbers. The file is written under another name in the same folder and
    then takes the place of `path`: an interrupted save leaves the file that was there.

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
    path = _checked_path(path)
    if not isinstance(approx, NystromApproximation):
        raise TypeError(f"`approx` must be a NystromApproximation; got {describe(approx)}.")
    arrays: dict[str, np.ndarray] = {}
    state = {
        name: _encoded(name, value, arrays)
        for name, value in vars(approx).items()
        if name not in DERIVED
    }
    header = json.dumps({"format": FORMAT, "version": VERSION, "state": state})
    replace_file(path, _writer(path, arrays, header))


def load(path: str | os.PathLike[str], *, like: Array | None = None) -> NystromApproximation:
    """Read the Nyström approximation that :func:`save` wrote.

    Parameters
    ----------
    path : str or path
    like : array, optional
        An array of the library and device wanted. Default: NumPy.

    Returns
    -------
    NystromApproximation

    Raises
    ------
    ValueError
        If the file is cut short or damaged, was not written by :func:`save`, or was written by
        a version with another layout.
    TypeError
        If `like` has no float64 and the file needs it (jax as it comes).

    Notes
    -----
    Nothing in the file is executed. Memory: that of the arrays, twice while they are converted.
    """
    path = _checked_path(path)
    header, arrays = _read(path)
    try:
        content = json.loads(header)
        known = isinstance(content, dict) and content.get("format") == FORMAT
    except json.JSONDecodeError:
        known = False
    if not known:
        raise ValueError(f"{path} is no file of lowrank_inverse.save: it has no header of that.")
    state = content.get("state")
    most = vars(nystrom(np.eye(1), indices=[0])).keys() - set(DERIVED)
    fits = isinstance(state, dict) and most - OPTIONAL <= state.keys() <= most
    if content.get("version") != VERSION or not fits:
        raise ValueError(
            f"{path} was written by another version of lowrank-inverse, with another layout. Load "
            "it with that version, or make the approximation again."
        )
    approx = object.__new__(NystromApproximation)
    try:
        for name, value in state.items():
            setattr(approx, name, _decoded(value, arrays, like))
    except KeyError as error:
        raise ValueError(f"{path} is damaged: it lacks the array {error}.") from None
    approx.dtype, approx.like = approx.columns.dtype, approx.columns[:0, 0]
    return approx


def _encoded(name: str, value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Return `value` as JSON, its arrays moved to `arrays`."""
    if is_traced(value):
        raise TypeError(
            "`approx` must have values to save; they are unknown while jax traces. Save it "
            "outside of the transformation."
        )
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return {"tuple": [_encoded(name, part, arrays) for part in value]}
    if not is_array(value):
        raise TypeError(f"`approx.{name}` cannot be saved: it is {describe(value)}.")
    host, key = to_host(value), f"array{len(arrays)}"
    # Sums depend on the order in memory in their last digit, and safetensors knows one alone.
    transposed = host.flags.f_contiguous and not host.flags.c_contiguous
    arrays[key] = np.array(host.T if transposed else host, order="C", copy=None)
    return {"array": key, "transposed": transposed, "host": name == "indices"}


def _decoded(value: Any, arrays: dict[str, np.ndarray], like: Array | None) -> Any:
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_decoded(part, arrays, like) for part in value["tuple"])
    host = arrays[value["array"]]
    host = host.T if value["transposed"] else host
    if like is None or value["host"]:
        return host
    return make_like(host, like, _dtype_of(host, like))


def _dtype_of(host: np.ndarray, like: Array) -> Any:
    xp = array_namespace(like)
    if host.dtype == np.float64 and wide_dtype(like) != xp.float64:
        raise TypeError(
            "the file has numbers in float64, which `like` has not here: "
            f"{type(like).__module__.split('.')[0]} on {like_device(like)}. Switch 64-bit types on "
            "(jax_enable_x64), or load on another device or into another library."
        )
    return getattr(xp, host.dtype.name)


def _checked_path(path: Any) -> Path:
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"`path` must end in {' or '.join(SUFFIXES)}, which says the format; got {str(path)!r}."
        )
    return path


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise ImportError(
            'files that end in .safetensors need safetensors: pip install "lowrank-inverse'
            '[safetensors]". Files that end in .npz need nothing.'
        ) from None
    return safetensors


def _writer(path: Path, arrays: dict[str, np.ndarray], header: str) -> Callable[[BinaryIO], Any]:
    if path.suffix == ".safetensors":
        content = _safetensors().numpy.save(arrays, metadata={HEADER: header})
        return lambda file: file.write(content)
    return lambda file: np.savez(file, allow_pickle=False, **arrays, **{HEADER: np.array(header)})


def _read(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """Return the header, empty if there is none, and all arrays."""
    if path.suffix == ".safetensors":
        safetensors = _safetensors()
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                header, names = (file.metadata() or {}).get(HEADER, ""), list(file.keys())
                return header, {key: file.get_tensor(key) for key in names}
        except safetensors.SafetensorError as error:
            raise ValueError(_damaged(path, error)) from None
    try:
        # np.load leaves a file open that it opened itself and cannot read.
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (zipfile.BadZipFile, EOFError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(_damaged(path, error)) from None
    header = arrays.pop(HEADER, np.array(""))
    return str(header), arrays


def _damaged(path: Path, error: Exception) -> str:
    return (
        f"{path} cannot be read: it is cut short, damaged, or no {path.suffix} file of "
        f"lowrank_inverse.save ({error}). Save it again."
    )
