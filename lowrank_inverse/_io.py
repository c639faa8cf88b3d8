"""One versioned record of arrays and plain values, in a file that is there whole or not at all."""

from __future__ import annotations

import json
import os
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

SUFFIXES = (".npz", ".safetensors")
HEADER = "lowrank_inverse"


class Format(NamedTuple):
    """A kind of record, under the name of the function that writes it.

    A record is a NumPy array, None, a bool, a number or text, or a list, tuple or dict of records.
    The file is one of NumPy's ``.npz`` or of safetensors, whichever `path` ends in: arrays, and a
    header in JSON. Nothing in it is executed.
    """

    name: str
    version: int = 1

    def save(self, path: str | os.PathLike[str], content: Any) -> None:
        """Write a record in the place of the file that may be there."""
        path = _checked(path)
        arrays: dict[str, np.ndarray] = {}
        state = _encoded("content", content, arrays)
        about = {"format": self.name, "version": self.version, "content": state}
        replace_file(path, _writer(path, arrays, json.dumps(about)))

    def load(self, path: str | os.PathLike[str]) -> Any:
        """Read a record.

        Raises
        ------
        ValueError
            The file is cut short or damaged, holds another kind of record, or one of another
            version.
        """
        path = _checked(path)
        header, arrays = _read(path, self.name)
        try:
            about = json.loads(header)
            found = about["format"]
        except (ValueError, TypeError, KeyError):
            found = None
        if found != self.name:
            holds = f"was written by {found}" if found else f"holds {', '.join(arrays)}"
            raise ValueError(
                f"`path` must be a file of {self.name}; {path} is no file of {self.name}: it "
                f"{holds}."
            )
        if about["version"] != self.version:
            raise ValueError(
                f"{path} was written by another version of lowrank-inverse: its layout is number "
                f"{about['version']}, and {self.version} is read here. Load it with that version, "
                "or make it again."
            )
        try:
            return _decoded(about["content"], arrays)
        except KeyError as error:
            raise ValueError(f"{path} is damaged: it lacks the array {error}.") from None


def replace_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], Any]) -> None:
    """Write a new file beside `path`, and put it in its place when it is whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _encoded(place: str, value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Return `value` as JSON, its arrays moved to `arrays`."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [_encoded(f"{place}[{i}]", part, arrays) for i, part in enumerate(value)]
        return {type(value).__name__: items}
    if isinstance(value, dict):
        return {"dict": {key: _encoded(f"{place}.{key}", value[key], arrays) for key in value}}
    if not isinstance(value, np.ndarray) or value.dtype.hasobject:
        kind = f"{type(value).__module__.split('.')[0]}.{type(value).__name__}"
        raise TypeError(f"`{place}` cannot be saved: it is {kind}.")
    # Sums depend on the order in memory in their last digit, and safetensors knows one alone.
    transposed = value.flags.f_contiguous and not value.flags.c_contiguous
    key = f"array{len(arrays)}"
    arrays[key] = np.asarray(value.T if transposed else value, order="C")
    return {"array": key, "transposed": transposed}


def _decoded(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if not isinstance(value, dict):
        return value
    if "dict" in value:
        return {key: _decoded(part, arrays) for key, part in value["dict"].items()}
    for kind in (list, tuple):
        if kind.__name__ in value:
            return kind(_decoded(part, arrays) for part in value[kind.__name__])
    array = arrays[value["array"]]
    return array.T if value["transposed"] else array


def _checked(path: Any) -> Path:
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


def _read(path: Path, name: str) -> tuple[str, dict[str, np.ndarray]]:
    """Return the header, empty if there is none, and all arrays."""
    errors: Any = (zipfile.BadZipFile, EOFError, ValueError, TypeError, AttributeError)
    try:
        if path.suffix == ".safetensors":
            safetensors = _safetensors()
            errors = (safetensors.SafetensorError,)
            with safetensors.safe_open(path, framework="numpy") as file:
                header = (file.metadata() or {}).get(HEADER, "")
                return header, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        # np.load leaves a file open that it opened itself and cannot read.
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except errors as error:
        raise ValueError(
            f"{path} cannot be read: it is cut short, damaged, or no {path.suffix} file of {name} "
            f"({error}). Save it again."
        ) from None
    return str(arrays.pop(HEADER, "")), arrays
