"""What vectors, columns and matrices are divided by, so that nothing over- or underflows."""

from __future__ import annotations

from array_api_compat import array_namespace

from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.spread import reduced


def largest_entry(x: Array) -> Array:
    """Largest absolute entry of a vector, or of each column."""
    # The absolute values would be a copy.
    xp = array_namespace(x)
    return xp.maximum(reduced(xp.max(x, axis=0)), -reduced(xp.min(x, axis=0)))


def column_scale(x: Array) -> Array:
    """Largest absolute entry of each column, 1 where that is zero or not finite."""
    xp, largest = array_namespace(x), largest_entry(x)
    limit = 0.25 / float(xp.finfo(x.dtype).smallest_normal)  # beyond it XLA flushes 1 / scale to 0
    scale = xp.where(largest > limit, xp.full_like(largest, limit), largest)
    return xp.where((largest > 0) & xp.isfinite(largest), scale, xp.ones_like(largest))


def power_of_two(x: Array) -> Array:
    """Return the powers of two up to positive `x`: to divide by them rounds nothing."""
    xp = array_namespace(x)
    return 2.0 ** xp.floor(xp.log2(x))


def matrix_scale(A: Array) -> Array:
    """Return the power of two up to the largest absolute entry; 1 for zeros and what is not finite.

    And 1 below the normal numbers, where a power of two may be flushed to 0.
    """
    xp, largest = array_namespace(A), column_scale(largest_entry(A))
    normal = largest >= float(xp.finfo(A.dtype).smallest_normal)
    return power_of_two(xp.where(normal, largest, xp.ones_like(largest)))
