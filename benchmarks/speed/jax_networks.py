"""The networks of `networks` in jax, on the parameters that torch has for them, in its order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

EPS = 1e-5


def perceptron(params: Sequence[jax.Array], x: jax.Array) -> jax.Array:
    """Apply a perceptron with tanh between the layers."""
    for i in range(0, len(params), 2):  # as torch stores them: (out, in)
        x = x @ params[i].T + params[i + 1]
        x = jnp.tanh(x) if i + 2 < len(params) else x
    return x


def wide_resnet(params: Sequence[jax.Array], x: jax.Array) -> jax.Array:
    """Apply a WideResNet of three stages, without running statistics."""
    rest = iter(params)
    x = convolution(x, next(rest), 1)
    shortcuts = sum(p.ndim == 4 and p.shape[2] == 1 for p in params)
    count = (len(params) - 5 - shortcuts) // 6
    for stage in range(3):
        x = residual(x, rest, 2 if stage > 0 else 1)
        blocks = [tuple(next(rest) for _ in range(6)) for _ in range(count // 3 - 1)]
        if blocks:  # of one shape, compiled once
            stacked = [jnp.stack(one) for one in zip(*blocks, strict=True)]
            x, _ = jax.lax.scan(lambda x, block: (residual(x, iter(block), 1), None), x, stacked)
    x = jax.nn.relu(batch_norm(x, next(rest), next(rest))).mean(axis=(2, 3))
    return x @ next(rest).T + next(rest)


def residual(x: jax.Array, rest: Iterator[jax.Array], stride: int) -> jax.Array:
    """Apply a block, with a convolution beside it where the shape changes."""
    y = jax.nn.relu(batch_norm(x, next(rest), next(rest)))
    first, *norm, second = (next(rest) for _ in range(4))
    z = convolution(y, first, stride)
    z = convolution(jax.nn.relu(batch_norm(z, *norm)), second, 1)
    same = x.shape[1] == z.shape[1] and stride == 1
    return z + (x if same else convolution(y, next(rest), stride))


def convolution(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolve, with zeros around for a kernel of 3x3."""
    padding = kernel.shape[2] // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
    )


def batch_norm(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    """Normalise each channel over the batch."""
    mean, variance = x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3))
    scale = weight / jnp.sqrt(variance + EPS)
    return x * scale[:, None, None] + (bias - mean * scale)[:, None, None]


OUTPUTS = {"mlp": perceptron, "wrn": wide_resnet}
