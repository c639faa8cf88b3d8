"""Kernel matrices that are never stored whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, Indices
from lowrank_inverse.arrays.checks import (
    check_count,
    check_finite,
    check_indices,
    describe,
    namespace,
    no_entries,
)
from lowrank_inverse.arrays.conversion import (
    astype,
    copied,
    is_array,
    is_traced,
    like_device,
    scalar_like,
    take,
    wide_dtype,
)
from lowrank_inverse.arrays.devices import cut, map_rows
from lowrank_inverse.arrays.graph import constant
from lowrank_inverse.arrays.spread import is_spread, local
from lowrank_inverse.operators.base import Operator
from lowrank_inverse.operators.differentiation import made_of, parts, recomputed
from lowrank_inverse.operators.kernels import spread
from lowrank_inverse.operators.kernels.distances import l1_distances, matern, squared_distances
from lowrank_inverse.operators.kernels.points import (
    check_points,
    checked_lengthscale,
    checked_number,
    in_memory,
    row_slices,
)

KERNELS = ("rbf", "laplacian", "matern", "polynomial")
NUS = (0.5, 1.5, 2.5)
CPU_CHUNK, DEVICE_CHUNK, DIAGONAL_CHUNK = 512, 8192, 32


class KernelOperator(Operator):
    """The matrix ``K[i, j] = kernel(X[i], X[j])``, computed in tiles during each product.

    Parameters
    ----------
    X : array, shape (n, d)
        Points, one per row. A ``numpy.memmap`` is read in blocks of rows. Those of a DTensor of
        placement ``Shard(0)`` are spread over processes, and so are products and columns.
    kernel : {"rbf", "laplacian", "matern", "polynomial"} or callable
        With u and v the points divided by `lengthscale`: ``exp(-norm2(u - v)**2 / 2)``,
        ``exp(-norm1(u - v))``, the Matérn kernel of order `nu` [1]_ (Eq. 4.14), or
        ``(u @ v + coef0) ** degree``. A callable maps blocks of points, of shapes (p, d) and
        (q, d), to their kernel, of shape (p, q). It must be symmetric and positive semidefinite,
        and gets the points without division.
    lengthscale : float or 0-d array, or array or list of d numbers
        One for all features, or one for each. ``1 / sqrt(2 gamma)`` in the notation of
        scikit-learn's "rbf", ``1 / gamma`` for "laplacian", ``1 / sqrt(gamma)`` for "polynomial".
    nu : {0.5, 1.5, 2.5}
        Order of the Matérn kernel.
    degree : int
        Degree of the polynomial kernel, at least 1.
    coef0 : float or 0-d array
        Constant of the polynomial kernel, 0 or more.
    chunk_size : int, optional
        Tiles have up to ``chunk_size ** 2`` entries. Default: 512, on an accelerator 8192.

    Raises
    ------
    TypeError, ValueError
        If the points are not a finite real floating array of shape (n, d), a parameter is out of
        range, or the results of a callable have another shape, dtype or library.

    Notes
    -----
    A product evaluates the kernel ``n**2 / 2`` times, since each tile also serves its mirror image,
    or ``n**2`` times while JAX traces; k columns take ``n * k`` evaluations. Memory: about four
    tiles and the result. Of spread points, each process evaluates its own rows, n times as many
    entries, and receives the points and the block of the others, n (d + m) numbers.

    Equal points have distance 0 and kernel value 1 exactly. Up to 16 features (NumPy: 32) distances
    are sums of differences. Beyond, they use inner products in float64, with a relative error of
    ``4e-12 (d + 2)``; if more digits would cancel, or without float64, they use differences. While
    JAX traces, distances below ``4e-16 (d + 2)`` times the squared norms become 0.

    In PyTorch and JAX, products and entries are differentiable with respect to the points,
    `lengthscale` and `coef0`. First and second derivatives are finite and correct for equal points
    too. "laplacian" and the Matérn kernel of order 1/2 have a kink there, at which the derivative
    of the distance is taken to be 0, the mean of both sides.

    References
    ----------
    .. [1] C. E. Rasmussen, C. K. I. Williams. Gaussian Processes for Machine Learning. MIT
       Press, 2006.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> X = np.random.default_rng(0).standard_normal((500, 3))
    >>> A, y = li.KernelOperator(X, "matern", lengthscale=2.0), X[:, 0] ** 2
    >>> solution = li.solve(A, y, solver=li.NystromCG(rank=50, damping=1e-3), rng=0)
    >>> f = A.cross(X[:5], solution.value)  # the regression function at other points
    >>> print(solution.message, bool(np.max(np.abs(f - y[:5])) < 0.1))
    converged True
    """

    _parts: tuple[str, ...] | None = ("X", "lengthscale", "coef0")
    entry_operations = 50  # of a matrix product, about: what an entry takes

    def __init__(
        self,
        X: Array,
        kernel: str | Callable[[Array, Array], Array] = "rbf",
        *,
        lengthscale: Any = 1.0,
        nu: float = 2.5,
        degree: int = 3,
        coef0: float = 1.0,
        chunk_size: int | None = None,
    ) -> None:
        check_points("X", X)
        if not callable(kernel) and kernel not in KERNELS:
            raise ValueError(
                f"`kernel` must be one of {', '.join(map(repr, KERNELS))} or a function of two "
                f"blocks of points; got {kernel!r}."
            )
        if nu not in NUS:
            raise ValueError(f"`nu` must be one of 0.5, 1.5, 2.5; got {nu!r}.")
        self.X, self.kernel, self.nu = X, kernel, nu
        if callable(kernel):
            self._parts = None  # it reads what it likes
        self.degree = check_count("degree", degree)
        n = int(X.shape[0])
        self.shape, self.dtype, empty = (n, n), X.dtype, constant(in_memory(local(X)[:0, 0]))
        self.like = no_entries(X) if is_spread(self.X) else empty
        self.coef0 = checked_number("coef0", coef0, empty)
        self.lengthscale = checked_lengthscale(lengthscale, empty, int(X.shape[1]))
        on_cpu = "cpu" in str(like_device(empty)).lower() or is_traced(X)
        default = CPU_CHUNK if on_cpu else DEVICE_CHUNK
        self.chunk_size = check_count("chunk_size", default if chunk_size is None else chunk_size)
        if is_spread(self.X):
            spread.check_points_of_all(X, self.lengthscale, self.coef0)
            return
        for rows in row_slices(n, self.chunk_size):
            check_finite("X", in_memory(X[rows, ...]))

    def columns(self, indices: Indices) -> Array:
        """Return the columns at `indices`, shape (n, k), from n k evaluations."""
        chosen = self._chosen(check_indices(indices, self.shape[0]))
        return spread.columns(self, chosen) if is_spread(self.X) else self.columns_of(chosen)

    def columns_of(self, points: Array) -> Array:
        """Return the kernel of all points and of `points` (k, d), shape (n, k)."""
        if is_traced(self.X) or is_traced(points):
            return self.evaluate(self.X, points)
        blocks = self._blocks(self.X, max(1, self.chunk_size**2 // sum(points.shape)))
        parts = [self.evaluate(x, points) for x in blocks]
        return array_namespace(self.like).concat(parts, axis=0)

    def submatrix(self, indices: Indices) -> Array:
        """Return the rows and columns at `indices`, shape (k, k), from k² evaluations."""
        chosen = self._chosen(check_indices(indices, self.shape[0]))
        if is_spread(self.X):
            return spread.entries(self, chosen)
        return self.evaluate(chosen, chosen)

    def diagonal(self) -> Array:
        """Return the diagonal, shape (n,): ones, except for polynomials and callables."""
        if is_spread(self.X):
            return spread.diagonal(self)
        xp = array_namespace(self.like)
        if self.kernel in ("rbf", "laplacian", "matern"):
            return xp.ones((self.shape[0],), dtype=self.dtype, device=like_device(self.like))
        size = DIAGONAL_CHUNK if callable(self.kernel) else self.chunk_size
        return xp.concat([self._diagonal(x) for x in self._blocks(self.X, size)], axis=0)

    def cross(self, Z: Array, block: Array) -> Array:
        """Return ``K(Z, X) @ block``: functions of the kernel's space at other points.

        Parameters
        ----------
        Z : array, shape (p, d)
            Points, one per row. A ``numpy.memmap`` is read in blocks.
        block : array, shape (n,) or (n, m)
            Coefficients, one column per function.

        Returns
        -------
        array, shape (p,) or (p, m)
        """
        check_points("Z", Z, self.X)
        self._check(block)
        if is_spread(self.X):
            return spread.cross(self, Z, block)
        if is_traced(self.X) or is_traced(Z) or is_traced(block):
            return self._mapped(Z, block)
        results, slices = [], row_slices(self.shape[0], self.chunk_size)
        for z in self._blocks(Z, self.chunk_size):
            tiles = zip(slices, self._blocks(self.X, self.chunk_size), strict=True)
            results.append(sum(self.evaluate(z, x) @ block[rows, ...] for rows, x in tiles))
        return array_namespace(block).concat(results, axis=0)

    def _about(self) -> dict[str, Any]:
        name = getattr(self.kernel, "__name__", type(self.kernel).__name__)  # a partial has no name
        name = self.kernel if isinstance(self.kernel, str) else name
        return {"kernel": name, "num_features": self.X.shape[1]}

    def _multiply(self, block: Array) -> Array:
        if is_spread(self.X):
            return spread.product(self, block)
        if is_traced(self.X) or is_traced(block):
            return self._mapped(self.X, block)
        slices = row_slices(self.shape[0], self.chunk_size)
        parts: list[Any] = [0.0 for _ in slices]
        for i, rows in enumerate(slices):
            x = in_memory(self.X[rows, ...])
            for j in range(i, len(slices)):
                y = x if i == j else in_memory(self.X[slices[j], ...])
                right, left = self._tile_products(x, y, block[slices[j], ...], block[rows, ...])
                parts[i] = parts[i] + right
                if i < j:  # the tile on the other side of the diagonal is this one, transposed
                    parts[j] = parts[j] + left
        return array_namespace(block).concat(parts, axis=0)

    def _tile_products(self, x: Array, y: Array, *blocks: Array) -> tuple[Array, Array]:
        """Return the products of a tile and of its transpose, whose derivatives compute it anew."""
        parameters = self.lengthscale, self.coef0

        def products(x: Array, y: Array, right: Array, left: Array, *own: Array) -> Any:
            lengthscale, coef0 = made_of(parameters, own)
            tile = self._with_parts({"lengthscale": lengthscale, "coef0": coef0}).evaluate(x, y)
            return tile @ right, tile.T @ left

        if callable(self.kernel):
            return products(x, y, *blocks, *parts(parameters)[0])
        return recomputed(products, x, y, *blocks, *parts(parameters)[0])

    def _mapped(self, Z: Array, block: Array) -> Array:
        """Return ``K(Z, X) @ block`` by a compiled loop over blocks of rows of `Z`."""
        xp = array_namespace(block)

        def step(rows: Array) -> Array:
            return cut(self.evaluate(xp.take(Z, rows, axis=0), self.X), 1, block) @ block

        return map_rows(step, int(Z.shape[0]), self.chunk_size**2 // self.shape[0], block)

    def _chosen(self, indices: Indices) -> Array:
        if isinstance(self.X, np.ndarray):
            return np.asarray(self.X[indices])  # reads no other rows of a file
        return take(self.X, indices)

    def _blocks(self, points: Array, size: int) -> Iterator[Array]:
        return (in_memory(points[rows, ...]) for rows in row_slices(points.shape[0], size))

    def _diagonal(self, x: Array) -> Array:
        xp = array_namespace(x)
        if callable(self.kernel):
            return xp.linalg.diagonal(self.evaluate(x, x))
        x = astype(x / self.lengthscale, wide_dtype(x))
        return self._polynomial(xp.sum(x * x, axis=1))

    def evaluate(self, x: Array, y: Array) -> Array:
        """Return the kernel of points `x` (p, d) and `y` (q, d), shape (p, q), in one piece."""
        if callable(self.kernel):
            return self._checked(self.kernel(x, y), (x.shape[0], y.shape[0]))
        xp = array_namespace(x)
        x, y = x / self.lengthscale, y / self.lengthscale
        if self.kernel == "polynomial":
            wide = wide_dtype(x)
            return self._polynomial(astype(x, wide) @ astype(y, wide).T)
        if self.kernel == "laplacian":
            return xp.exp(-l1_distances(x, y))
        squares = squared_distances(x, y)
        if self.kernel == "rbf":
            squares *= -0.5
            return xp.exp(squares)
        return matern(self.nu, squares)

    def _polynomial(self, inner: Array) -> Array:
        return astype((inner + scalar_like(self.coef0, inner)) ** self.degree, self.dtype)

    def _checked(self, block: Any, shape: tuple[int, int]) -> Array:
        if not is_array(block) or block.dtype != self.dtype or tuple(block.shape) != shape:
            raise TypeError(
                f"`kernel` must return dtype {self.dtype} and shape {shape}; got {describe(block)}."
            )
        namespace(kernel=block, X=self.like)
        return copied(block)  # the function may use its array again
