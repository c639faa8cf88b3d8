"""Rigorous error bounds for approximate solutions."""

from __future__ import annotations

from typing import Any, NamedTuple

from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, OperatorLike, Scalar
from lowrank_inverse.arrays.checks import check_scalar
from lowrank_inverse.arrays.control_flow import quietly
from lowrank_inverse.arrays.conversion import concrete, eps, scalar_like
from lowrank_inverse.arrays.linalg import column_norm, dot
from lowrank_inverse.arrays.scale import column_scale
from lowrank_inverse.estimators.norm import frobenius_norm
from lowrank_inverse.operators.function import aslinearoperator
from lowrank_inverse.results.solution import check_system, span

ROUNDING_UNITS = 8.0


class Certificate(NamedTuple):
    """Bounds on the error ``e = x - (A + damping I)^{-1} b``, each of shape () or (m,).

    Attributes
    ----------
    residual_norm : array
        Euclidean norm of the residual ``b - (A + damping I) x``.
    error_bound : array
        Upper bound on the Euclidean norm of e.
    energy_bound : array
        Upper bound on the energy norm ``sqrt(e.T (A + damping I) e)``.
    """

    residual_norm: Array
    error_bound: Array
    energy_bound: Array

    def __repr__(self) -> str:
        lines = ["Certificate"]
        names = zip(self._fields, self, strict=True)
        lines += [f"  {name.replace('_', ' '):<15}{span(value)}" for name, value in names]
        return "\n".join(lines)


@quietly
def certify(
    A: OperatorLike, b: Array, x: Array, *, damping: Scalar, inverse: Any = None
) -> Certificate:
    """Bound the error of an approximate solution `x` of ``(A + damping * I) x = b``.

    Parameters
    ----------
    A : linear operator, shape (n, n)
        Symmetric positive semidefinite; otherwise the bounds do not hold.
    b, x : array, shape (n,) or (n, m)
        Right-hand sides, one per column, and approximate solutions.
    damping : float or 0-d array
        Positive.
    inverse : linear operator, shape (n, n), optional
        ``N = (H_k + damping I)^{-1}`` for a Nyström approximation ``H_k`` of `A` and the same
        `damping`. It tightens the bounds.

    Returns
    -------
    Certificate

    Raises
    ------
    ValueError, TypeError
        If the operands do not fit together, or `damping` is not positive.

    Notes
    -----
    Let ``r = b - (A + damping I) x`` and ``0 <= H_k <= A``. Then ``norm(e) <= norm(r) / damping``
    and ``e.T (A + damping I) e <= r.T N r``, hence ``norm(e) <= sqrt(r.T N r / damping)``. The
    smaller bound is returned. Without `inverse`, ``N = I / damping``.

    The bounds include a term for rounding, a multiple of the Frobenius norm of `A`. It is needed
    because an x near the null space of `A` may be large, so that ``A x`` is rounding only, and
    because rounded columns may give an H_k that exceeds `A`.

    Cost: one product per column; with `inverse`, one application of it per column; and two
    products to estimate the norm, unless `A` has ``A.frobenius_norm()``, as arrays do.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> A, b = np.diag([3.0, 1.0]), np.ones(2)
    >>> certificate = li.certify(A, b, np.array([0.25, 0.4]), damping=1.0)
    >>> print(certificate.error_bound.round(3))  # the error is 0.1
    0.2
    """
    A = aslinearoperator(A)
    check_system(A, b, damping, x, name="x")
    check_scalar("damping", damping, positive=True)
    xp = array_namespace(b)
    damping = scalar_like(damping, b)
    Ax = A @ x
    r = b - (Ax + damping * x)
    unit = ROUNDING_UNITS * eps(b)
    size = column_norm(b) + column_norm(Ax) + damping * column_norm(x)
    norm_of_A = frobenius_norm(A, b)
    slack = unit * (size + norm_of_A * column_norm(x))
    norm = column_norm(r) + slack
    error = norm / damping
    if inverse is None:
        return Certificate(column_norm(r), error, norm / damping**0.5)
    scale = column_scale(r)
    unit_r = r / scale
    quadratic = dot(unit_r, inverse @ unit_r)
    # N has eigenvalues in (0, 1 / damping]; its own rounding is a share of that. H_k, made of
    # rounded products, may exceed A by delta, the same share of the norm of A: then
    # N damping / (damping - delta) bounds.
    quadratic = xp.where(quadratic > 0, quadratic, xp.zeros_like(quadratic))
    rounding = unit + ROUNDING_UNITS * _rounding(inverse, b)
    quadratic = quadratic + rounding * dot(unit_r, unit_r) / damping
    share = 1 - rounding * norm_of_A / damping
    quadratic = quadratic / xp.where(share > 0, share, xp.ones_like(share))
    largest = dot(unit_r, unit_r) / damping
    quadratic = xp.where((share > 0) & (quadratic < largest), quadratic, largest)
    energy = scale * xp.sqrt(quadratic) + slack / damping**0.5
    tighter = energy / damping**0.5
    return Certificate(column_norm(r), xp.where(tighter < error, tighter, error), energy)


def _rounding(inverse: Any, b: Array) -> Any:
    """Return the rounding of N and of H_k, as a share of their norms, from the small pivots.

    For each eigenvalue w of W that was kept, with the eigenvector v, ``C v`` is multiplied by
    ``w^(-1/2)``. As ``norm(C v)**2 <= w norm(A)``, its rounding moves H_k by a multiple of ``eps
    norm(A) (norm(A) / w)^(1/2)``. In the streamed form ``C v`` is known to the precision of a
    product alone.
    """
    approx = getattr(inverse, "approx", inverse)
    w = getattr(approx, "core_eigenvalues", None)
    if w is None:
        return 0.0
    xp = array_namespace(w)
    largest = xp.max(xp.abs(w))
    smallest = xp.min(xp.where(w > eps(b) * largest, w, largest))
    precision = eps(w) if approx is not inverse else eps(b)
    ratio = largest / xp.where(smallest > 0, smallest, xp.ones_like(smallest))
    return scalar_like(precision * concrete(ratio) ** 0.5, b)
