"""JAX adapter of ``lowrank_inverse``: there is nothing in it yet.

The package is a place kept for curvature operators and hypergradients of JAX functions. JAX arrays
need no adapter: the functions of ``lowrank_inverse`` take them as they are.
"""

from __future__ import annotations

try:
    import jax  # noqa: F401
except ImportError as error:
    raise ImportError(
        'lowrank_inverse_jax needs JAX; install it with: pip install "lowrank-inverse[jax]"'
    ) from error

__all__: list[str] = []
