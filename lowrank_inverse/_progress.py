"""Progress bars."""

from __future__ import annotations

from typing import Any


def progress_bar(*items: Any, **options: Any) -> Any:
    """Return a bar of tqdm, whose positional argument and keywords it takes."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            'progress=True needs tqdm. Install it with: pip install "lowrank-inverse[plot]"'
        ) from error
    return tqdm(*items, mininterval=0.5, **options)
