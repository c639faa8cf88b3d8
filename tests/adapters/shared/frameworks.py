"""One face for both adapters, so that what both must do is written once.

Trees are dicts (keys in order), lists and tuples of arrays; losses are functions of trees, written
with the array API.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.conftest import host, x64

Tree = Any


def leaves(tree: Tree) -> list[Any]:
    """Return the arrays of a tree in order; None holds none."""
    if tree is None:
        return []
    if not isinstance(tree, (dict, list, tuple)):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree
    return [leaf for child in children for leaf in leaves(child)]


def mapped(function: Callable[..., Any], tree: Tree) -> Tree:
    """Apply a function to each array of a tree."""
    if isinstance(tree, dict):
        return {name: mapped(function, child) for name, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(mapped(function, child) for child in tree)
    return None if tree is None else function(tree)


def flat(tree: Tree) -> np.ndarray:
    """Return the arrays of a tree one after the other, in NumPy's float64."""
    return np.concatenate([np.asarray(host(leaf), float).reshape(-1) for leaf in leaves(tree)])


def rebuilt(vector: Any, like: Tree) -> Tree:
    """Cut a vector into arrays of the shapes of those of a tree."""
    start = 0

    def part(leaf: Any) -> Any:
        nonlocal start
        shape = tuple(getattr(leaf, "shape", ()))
        begin, start = start, start + math.prod(shape)
        return vector[begin:start].reshape(shape)

    return mapped(part, like)


def relative(found: Tree, wanted: Tree) -> float:
    """Return the relative error of one tree or flat vector against another."""
    found, wanted = flat(found), flat(wanted)
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


class Framework:
    """An adapter with the arrays of its framework."""

    name: str
    device: Any = None

    def __init__(self) -> None:
        self.framework = pytest.importorskip(self.name)
        self.adapter = importlib.import_module(f"lowrank_inverse_{self.name}")

    def array(self, x: Any, dtype: str | None = None) -> Any:
        """Return an array; of floats in `dtype`, by default as they are."""
        raise NotImplementedError

    def variables(self, tree: Tree, dtype: str | None = None) -> Tree:
        """Return arrays to differentiate by."""
        return mapped(lambda x: self.array(x, dtype), tree)

    def dtype_of(self, x: Any) -> str:
        """Return the name of a dtype."""
        return str(x.dtype).removeprefix("torch.")

    def narrow(self) -> Any:
        """Return a context for float32 as the framework comes."""
        return contextlib.nullcontext()

    def wide(self) -> Any:
        """Return a context for float64."""
        return contextlib.nullcontext()

    def counted(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """Return the Hessians of hypergradients from now on, each with a count of its products."""
        made: list[Any] = []

        class Counted(self.adapter.HessianOperator):  # type: ignore[misc,name-defined]
            def __init__(self, *args: Any, **options: Any) -> None:
                self.count = 0
                super().__init__(*args, **options)
                made.append(self)

            def __matmul__(self, v: Any) -> Any:
                self.count += 1 if v.ndim == 1 else v.shape[1]
                return super().__matmul__(v)

            def columns(self, indices: Any) -> Any:
                self.count += len(indices)
                return super().columns(indices)

        module = sys.modules[self.adapter.hypergradient.__module__]
        monkeypatch.setattr(module, "HessianOperator", Counted)
        return made


class Torch(Framework):
    """Live tensors; losses are closures over them."""

    name = "torch"

    def array(self, x: Any, dtype: str | None = None) -> Any:
        x = np.asarray(x)
        x = x.astype(dtype or x.dtype) if x.dtype.kind == "f" else x
        return self.framework.tensor(x, device=self.device)

    def variables(self, tree: Tree, dtype: str | None = None) -> Tree:
        return mapped(lambda x: self.array(x, dtype).requires_grad_(), tree)

    def to_host(self) -> None:
        """Put arrays on the CPU from now on."""
        self.device = "cpu"

    def to_accelerator(self) -> None:
        """Put arrays on an accelerator from now on, or skip the test."""
        if not self.framework.cuda.is_available():
            pytest.skip("no CUDA device")
        self.device = "cuda"

    def is_on_accelerator(self, x: Any) -> bool:
        return bool(x.is_cuda)

    def run(self, function: Callable[..., Any], *args: Any, eager: bool = False) -> Any:
        """Call a function as users do."""
        return function(*args)

    def hypergradient(
        self,
        inner: Any,
        outer: Any,
        params: Tree,
        hparams: Tree,
        *,
        ridge: Any = None,
        eager: bool = False,
        **options: Any,
    ) -> Any:
        """Return the hypergradient of two functions (params, hparams) -> scalar."""
        return self.adapter.hypergradient(
            lambda: inner(params, hparams),
            lambda: outer(params, hparams),
            params,
            hparams,
            ridge=ridge(hparams) if callable(ridge) else ridge,
            **options,
        )

    def hessian(self, loss: Any, params: Tree, **options: Any) -> Any:
        """Return the HessianOperator of a function of the parameters, or of the mean of several."""
        losses = [lambda f=f: f(params) for f in loss] if isinstance(loss, list) else None
        return self.adapter.HessianOperator(losses or (lambda: loss(params)), params, **options)

    def gauss_newton(self, loss: Any, outputs: Any, params: Tree, **options: Any) -> Any:
        """Return the GaussNewtonOperator of a loss of outputs, functions of the parameters."""
        if isinstance(outputs, list):
            closed: Any = [lambda f=f: f(params) for f in outputs]
        else:
            closed = lambda: outputs(params)  # noqa: E731
        return self.adapter.GaussNewtonOperator(loss, closed, params, **options)

    def hvp(self, loss: Any, params: Tree, v: Any) -> Any:
        return self.adapter.hvp(lambda: loss(params), params, v)

    def hessian_columns(self, loss: Any, params: Tree, indices: Any, **options: Any) -> Any:
        return self.adapter.hessian_columns(lambda: loss(params), params, indices, **options)

    def network(self, outputs: Any, params: dict[str, Any]) -> Any:
        """Return a module of a function (params, x) -> outputs."""
        nn = self.framework.nn

        class Network(nn.Module):  # type: ignore[misc,name-defined]
            def __init__(self) -> None:
                super().__init__()
                for name, value in params.items():
                    setattr(self, name, nn.Parameter(value.detach().clone()))

            def forward(self, x: Any) -> Any:
                return outputs({name: getattr(self, name) for name in params}, x)

        return Network()

    def influence(
        self, outputs: Any, loss: Any, params: Tree, train: Any, *, load: Any = None, **options: Any
    ) -> Any:
        """Return the InfluenceFunction of a loss (outputs, targets), or read it from a file."""
        function, model = self.adapter.InfluenceFunction, self.network(outputs, params)
        if load is not None:
            return function.load(load, model, loss, train, **options)
        return function(model, loss, train, **options)

    def gradients(self, function: Callable[..., Any], *args: Any) -> Any:
        """Differentiate a scalar function by all its arguments."""
        return self.framework.func.grad(function, argnums=tuple(range(len(args))))(*args)

    def vmap(self, function: Callable[..., Any]) -> Any:
        return self.framework.func.vmap(function)


class Jax(Framework):
    """Pure functions, compiled unless called eager."""

    name = "jax"

    def array(self, x: Any, dtype: str | None = None) -> Any:
        x = np.asarray(x)
        x = x.astype(dtype or x.dtype) if x.dtype.kind == "f" else x
        return self.framework.device_put(self.framework.numpy.asarray(x), self.device)

    def to_host(self) -> None:
        self.device = self.framework.devices("cpu")[0]

    def to_accelerator(self) -> None:
        try:
            self.device = self.framework.devices("gpu")[0]
        except RuntimeError:
            pytest.skip("jax has no GPU")

    def is_on_accelerator(self, x: Any) -> bool:
        return next(iter(x.devices())).platform == "gpu"

    def narrow(self) -> Any:
        return x64(False)

    def wide(self) -> Any:
        return x64(True)

    def run(self, function: Callable[..., Any], *args: Any, eager: bool = False) -> Any:
        return function(*args) if eager else self.framework.jit(function)(*args)

    def hypergradient(
        self,
        inner: Any,
        outer: Any,
        params: Tree,
        hparams: Tree,
        *,
        eager: bool = False,
        **options: Any,
    ) -> Any:
        def call(params: Tree, hparams: Tree) -> Any:
            return self.adapter.hypergradient(inner, outer, params, hparams, **options)

        return self.run(call, params, hparams, eager=eager)

    def hessian(self, loss: Any, params: Tree, **options: Any) -> Any:
        return self.adapter.HessianOperator(loss, params, **options)

    def gauss_newton(self, loss: Any, outputs: Any, params: Tree, **options: Any) -> Any:
        return self.adapter.GaussNewtonOperator(loss, outputs, params, **options)

    def hvp(self, loss: Any, params: Tree, v: Any) -> Any:
        return self.adapter.hvp(loss, params, v)

    def hessian_columns(self, loss: Any, params: Tree, indices: Any, **options: Any) -> Any:
        return self.adapter.hessian_columns(loss, params, indices, **options)

    def influence(
        self, outputs: Any, loss: Any, params: Tree, train: Any, *, load: Any = None, **options: Any
    ) -> Any:
        def by_batch(z: Any, batch: Any) -> Any:
            return loss(z, batch[1])

        function = self.adapter.InfluenceFunction
        options["outputs"] = lambda params, batch: outputs(params, batch[0])
        if load is not None:
            return function.load(load, by_batch, params, train, **options)
        return function(by_batch, params, train, **options)

    def gradients(self, function: Callable[..., Any], *args: Any) -> Any:
        grad = self.framework.grad(function, argnums=tuple(range(len(args))))
        return self.framework.jit(grad)(*args)

    def vmap(self, function: Callable[..., Any]) -> Any:
        return self.framework.vmap(function)


FRAMEWORKS = {"torch": Torch, "jax": Jax}


def each(argument: str, table: dict[str, Any], *, quick: Any = None) -> Any:
    """Run a table of cases in both frameworks; slow are those of jax that are not `quick`."""
    quick = table if quick is None else quick
    return pytest.mark.parametrize(
        ("framework", argument),
        [
            pytest.param(
                name,
                case,
                id=f"{name}-{label}",
                marks=[pytest.mark.slow] if name == "jax" and label not in quick else [],
            )
            for label, case in table.items()
            for name in FRAMEWORKS
        ],
        indirect=["framework"],
    )


slow_in_jax = pytest.mark.parametrize(
    "framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)], indirect=True
)
"""For what takes jax many compilations."""
