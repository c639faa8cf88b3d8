"""A bilevel problem of live tensors, and steps of optimizers, in flat vectors of the host."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, autograd

from lowrank_inverse.arrays.spread import gathered
from lowrank_inverse.bilevel.evaluation import Differentiated, tolerant_solver
from lowrank_inverse_torch.bilevel.hypergradient import hypergradient
from lowrank_inverse_torch.bilevel.ridge import Ridge
from lowrank_inverse_torch.curvature.mean_operator import Modules
from lowrank_inverse_torch.model_guard import evaluate_loss, explained, untouched
from lowrank_inverse_torch.parameters import Parameters

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from lowrank_inverse_torch.mesh.processes import Processes


class Problem:
    """A bilevel problem of live tensors in flat vectors of the host."""

    def __init__(
        self,
        inner_loss: Any,
        outer_loss: Any,
        theta: Parameters,
        phi: Parameters,
        solver: Any,
        ridge: Any,
        seed: int,
        chunk_size: int,
        module: Modules | None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        for part, name in ((theta, "params"), (phi, "hparams")):
            for tensor, place in zip(part.tensors, part.names, strict=True):
                if not tensor.is_leaf:
                    raise ValueError(
                        f"`{name}` must be leaf tensors, which receive the result; {place!r} is "
                        "not. Pass the tensors it was computed from, and compute it in the loss."
                    )
        self._theta, self._phi, self.seed = theta, phi, seed
        self._losses = [
            loss if isinstance(loss, (list, tuple)) else [loss] for loss in (inner_loss, outer_loss)
        ]
        self._ridge = ridge if callable(ridge) else lambda: ridge
        self._solver = solver
        self._options: dict[str, Any] = {"rng": seed, "chunk_size": chunk_size, "module": module}
        self._processes: Processes | None = None
        if mesh is not None:
            from lowrank_inverse_torch.mesh.processes import Processes

            self._processes, self._options["mesh"] = Processes(mesh, theta), mesh
        modules = [module] if isinstance(module, torch.nn.Module) else list(module or ())
        self._modules = [*theta.modules, *phi.modules, *modules]
        self.params, self.hparams = host(theta), host(phi)
        self.eps = float(torch.finfo(theta.dtype).eps)

    def write(self, x: np.ndarray, h: np.ndarray) -> None:
        """Write to the live tensors."""
        _write(self._theta, x)
        _write(self._phi, h)

    def inner(self, x: np.ndarray, h: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the inner loss with its ridge, and the gradient by the parameters."""
        self.write(x, h)
        theta = self._theta

        def sums() -> np.ndarray:
            total = np.zeros(2 + x.size)
            with untouched(theta.tensors, self._modules), explained():
                for loss in self._losses[0]:
                    scalar = _value(loss, "inner_loss")
                    if scalar is None:
                        return np.full_like(total, np.nan)
                    # Retained, for closures may share what was computed outside of them.
                    grads = autograd.grad(
                        scalar, theta.tensors, retain_graph=True, allow_unused=True
                    )
                    total[:2] += 1, scalar.item()
                    total[2:] += _host(theta.flatten(grads))
            return total

        num, value, *_ = total = self._total(sums, 2 + x.size)
        known = self._coefficients()
        return value / num + 0.5 * float(np.sum(known * x**2)), total[2:] / num + known * x

    def differentiate(
        self, x: np.ndarray, h: np.ndarray, state: Any, rtol: float
    ) -> Differentiated:
        """Return the outer loss and its hypergradient."""
        self.write(x, h)

        def sums() -> np.ndarray:
            with untouched(self._theta.tensors, self._modules), torch.no_grad():
                values = [_value(loss, "outer_loss") for loss in self._losses[1]]
            found = [np.nan if value is None else value.item() for value in values]
            return np.array([len(found), np.sum(found)])

        num, total = self._total(sums, 2)
        if not np.isfinite(total):
            return Differentiated(np.nan, h, x, None, state, 0.0)
        ridge = self._ridge()
        try:
            out = hypergradient(
                self._losses[0],
                self._losses[1],
                self._theta,
                self._phi,
                solver=tolerant_solver(self._solver, rtol),
                ridge=ridge,
                state=state,
                **self._options,
            )
        except ValueError as error:
            if "must be finite" not in str(error):
                raise
            return Differentiated(np.nan, h, x, None, state, 0.0)
        return Differentiated(
            float(total / num),
            _host(self._phi.flatten(self._phi.collect(out.grads))),
            _host(gathered(out.solution.value)),
            out.info,
            out.state,
            float(np.mean(self._coefficients())),
        )

    def restore(self, x: np.ndarray, h: np.ndarray) -> tuple[Any, Any]:
        """Write to the live tensors, and return copies in the structures of the user."""
        self.write(x, h)
        return tuple(
            part.restore([tensor.detach().clone() for tensor in part.tensors])
            for part in (self._theta, self._phi)
        )

    def _total(self, function: Callable[[], np.ndarray], size: int) -> np.ndarray:
        """Return `size` numbers, summed over the processes if there are several."""
        if self._processes is None:
            return function()
        return self._processes.total_of(function, size)

    def _coefficients(self) -> Any:
        ridge = self._ridge()
        return 0.0 if ridge is None else _host(Ridge(ridge, self._theta).coefficients)


class OptimizerStep:
    """Steps of an optimizer of torch on a flat vector; ``.grad`` comes back as it was."""

    def __init__(self, optimizer: torch.optim.Optimizer, params: Parameters, name: str) -> None:
        held = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        missing = [
            place
            for tensor, place in zip(params.tensors, params.names, strict=True)
            if id(tensor) not in held
        ]
        if missing:
            kind = "params" if name == "inner" else "hparams"
            raise ValueError(
                f"`{name}` must be an optimizer of `{kind}`; it does not hold "
                f"{', '.join(map(repr, missing))}."
            )
        self._optimizer, self._params = optimizer, params
        self._start = copy.deepcopy(optimizer.state_dict())

    def reset(self) -> None:
        """Forget what it has seen."""
        self._optimizer.load_state_dict(copy.deepcopy(self._start))

    def __call__(self, x: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """Return where a step leads."""
        tensors = self._params.tensors
        kept = [tensor.grad for tensor in tensors]
        _write(self._params, x)
        grads = torch.as_tensor(gradient, dtype=self._params.dtype, device=self._params.device)
        try:
            for tensor, grad in zip(tensors, self._params.unflatten(grads), strict=True):
                tensor.grad = grad
            self._optimizer.step()
        finally:
            for tensor, before in zip(tensors, kept, strict=True):
                tensor.grad = before
        return host(self._params)


def host(params: Parameters) -> np.ndarray:
    """Return the values of live tensors in one vector of float64."""
    return _host(params.flatten(params.tensors))


def _host(vector: Tensor) -> np.ndarray:
    return vector.detach().cpu().to(torch.float64).numpy()


def _write(params: Parameters, vector: np.ndarray) -> None:
    values = torch.as_tensor(vector, dtype=params.dtype, device=params.device)
    with torch.no_grad():
        for tensor, value in zip(params.tensors, params.unflatten(values), strict=True):
            tensor.copy_(value)


def _value(loss: Any, name: str) -> Tensor | None:
    """Evaluate a loss; None where it is not finite."""
    value = loss() if callable(loss) else loss
    scalar = isinstance(value, Tensor) and value.is_floating_point() and value.numel() == 1
    if scalar and not torch.isfinite(value).all():
        return None
    return evaluate_loss(value, name=name)


def side(bound: Any, phi: Parameters) -> np.ndarray:
    """Return one of the bounds as a flat vector."""
    if isinstance(bound, (int, float)):
        return np.full(phi.n, float(bound))
    values = phi.collect(bound, name="bounds", expand=True)
    if any(value is None for value in values):
        raise ValueError(
            '`bounds` must have a value for each of `hparams`; use float("inf") for none.'
        )
    return _host(phi.flatten(values))
