"""What each process of a group does in the tests of meshes, and one process alone to compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from array_api_compat import array_namespace
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lowrank_inverse as li
import lowrank_inverse_torch as lit
from lowrank_inverse_torch.allocations import Allocations

NUM = 60
Rows = slice


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NUM, 5, generator=generator, dtype=dtype), torch.arange(NUM) % 3


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A classifier of 57 parameters."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def own_rows(mesh: DeviceMesh | None, num: int = NUM) -> Rows:
    """Return the examples of this process: more than half in the first, all without a mesh."""
    if mesh is None:
        return slice(0, num)
    cuts = [0, *(num * (i + 2) // (mesh.size() + 1) for i in range(mesh.size()))]
    return slice(cuts[mesh.get_local_rank()], cuts[mesh.get_local_rank() + 1])


def decay(model: nn.Module) -> Tensor:
    return 0.05 * sum((p**2).sum() for p in model.parameters())


def inner(model: nn.Module, mesh: DeviceMesh | None, weights: Tensor | None = None) -> Callable:
    """The loss of a process: scaled so that the mean over processes is that over all examples."""
    rows, (x, y) = own_rows(mesh), data(next(model.parameters()).dtype)
    scale = (1 if mesh is None else mesh.size()) / NUM

    def loss() -> Tensor:
        losses = F.cross_entropy(model(x[rows]), y[rows], reduction="none")
        if weights is not None:
            own = weights.to_local() if isinstance(weights, DTensor) else weights[rows]
            losses = torch.sigmoid(own) * losses
        return scale * losses.sum() + decay(model)

    return loss


def whole(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


def spread(x: Tensor, mesh: DeviceMesh | None) -> Tensor:
    return x if mesh is None else distribute_tensor(x, mesh, [Shard(0)])


def operator(mesh: DeviceMesh | None, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    model = network(dtype)
    return lit.HessianOperator(inner(model, mesh), model, mesh=mesh, **options)


SOLVERS = {
    "CG": li.CG(damping=0.1, rtol=1e-13),
    "Nystrom": li.Nystrom(rank=20, damping=0.1),
    "columns": li.Nystrom(rank=20, damping=0.1, sampling="uniform"),
    "gaussian": li.Nystrom(rank=20, damping=0.1, sampling="gaussian"),
    "streamed": li.Nystrom(rank=20, damping=0.1, memory="streamed", chunk_size=5),
    "chunked": li.Nystrom(rank=20, damping=0.1, memory="chunked", chunk_size=5),
    "refined": li.Nystrom(rank=20, damping=0.1, refine=2, sampling="uniform"),
    "NystromCG": li.NystromCG(rank=20, damping=0.1, rtol=1e-13, sampling="uniform"),
    "auto": li.NystromCG(rank="auto", damping=0.1, rtol=1e-13),
    "Neumann": li.Neumann(damping=0.1, num_terms=30),
    "Exact": li.Exact(damping=0.1),
}


def solutions(mesh: DeviceMesh | None, names: list[str], width: int = 1) -> dict[str, Any]:
    """Solve with several settings: value, products, steps and rows held."""
    H = operator(mesh)
    generator = torch.Generator().manual_seed(2)
    b = torch.randn(H.shape[0], width, generator=generator, dtype=torch.float64)
    b = spread(b[:, 0] if width == 1 else b, mesh)
    found = {}
    for name in names:
        solution = li.solve(H, b, solver=SOLVERS[name], rng=0)
        held = solution.value.to_local().shape[0] if mesh is not None else H.shape[0]
        steps = whole(solution.num_steps).tolist()
        found[name] = whole(solution.value), solution.num_products, steps, held
    return found


def operators(mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """Products, columns, gradients and losses of both operators."""
    model = network()
    H = operator(mesh)
    rows, (x, y) = own_rows(mesh), data()
    scale = (1 if mesh is None else mesh.size()) / NUM
    G = lit.GaussNewtonOperator(
        lambda z: scale * F.cross_entropy(z, y[rows], reduction="sum"),
        lambda: model(x[rows]),
        model,
        chunk_size=4,
        mesh=mesh,
    )
    v = torch.randn(57, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = {}
    for name, A in (("hessian", H), ("ggn", G)):
        found[f"{name} vector"] = whole(A @ spread(v[:, 0].contiguous(), mesh))
        found[f"{name} block"] = whole(A @ spread(v, mesh))
        found[f"{name} whole"] = A @ v
        found[f"{name} columns"] = whole(A.columns([50, 3, 17, 4, 5, 6, 7, 8, 9, 10]))
        found[f"{name} gradient"] = whole(A.gradient)
        found[f"{name} loss"] = A.loss
    return found


def other_signs(mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """Solve where eigenvectors of the last process have other signs, as another machine may."""
    linalg = array_namespace(torch.zeros(1)).linalg
    right = linalg.eigh
    if mesh is not None and mesh.get_local_rank() > 0:

        def flipped(A: Tensor) -> tuple[Tensor, Tensor]:
            w, V = right(A)
            return w, torch.cat([V[:, :-1], -V[:, -1:]], dim=1)

        linalg.eigh = flipped
    try:
        return {"value": solutions(mesh, ["columns"])["columns"][0]}
    finally:
        linalg.eigh = right


def hypergradients(mesh: DeviceMesh | None, names: list[str], ridge: bool = False) -> dict:
    """Hypergradients by a common decay and by one weight for each example, common or spread."""
    found = {}
    for name in names:
        for kind in ("common",) if mesh is None else ("common", "spread"):
            model = network()
            log_decay = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
            weights = torch.linspace(-1, 1, NUM, dtype=torch.float64, requires_grad=True)
            if kind == "spread":
                rows = own_rows(mesh)
                own = weights.detach()[rows].clone()
                weights = DTensor.from_local(
                    own, mesh, [Shard(0)], run_check=False, shape=(NUM,), stride=(1,)
                ).requires_grad_()
            penalty = log_decay.exp()
            loss = inner(model, mesh, weights)

            def inner_loss(loss=loss, model=model, log_decay=log_decay):
                return loss() + (0 if ridge else log_decay.exp() * decay(model))

            rows, (x, y) = own_rows(mesh, 20), data()
            x, y = x.flip(0)[:20], y.flip(0)[:20]
            scale = (1 if mesh is None else mesh.size()) / 20

            def outer_loss(model=model, x=x, y=y, rows=rows, scale=scale):
                return scale * F.cross_entropy(model(x[rows]), y[rows], reduction="sum")

            out = lit.hypergradient(
                inner_loss,
                outer_loss,
                model,
                [log_decay, weights],
                solver=SOLVERS[name],
                ridge=penalty if ridge else None,
                mesh=mesh,
            )
            by_weights = out.grads[1]
            if kind == "spread":  # of uneven parts, which full_tensor would cut anew
                parts: list[Any] = [None] * mesh.size()
                torch.distributed.all_gather_object(parts, by_weights.to_local())
                by_weights = torch.cat(parts)
            info = out.info
            found[f"{name} {kind}"] = torch.cat([out.grads[0][None], by_weights])
            found[f"{name} {kind} ihvp"] = torch.cat([t.reshape(-1) for t in out.ihvp.values()])
            found[f"{name} {kind} info"] = torch.tensor(
                [info.num_products, info.inner_grad_norm, info.error_bound, info.inner_step]
            )
    if mesh is None:
        found |= {key.replace("common", "spread"): value for key, value in found.items()}
    return found


def chain(mesh: DeviceMesh | None) -> dict[str, Any]:
    """Hypergradients one after the other, each from the state of the one before."""
    model = network()
    log_decay = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    loss, found, state = inner(model, mesh), {}, None

    def inner_loss() -> Tensor:
        return loss() + log_decay.exp() * decay(model)

    for i in range(3):
        out = lit.hypergradient(
            inner_loss,
            loss,
            model,
            log_decay,
            solver=li.NystromCG(rank=5, damping=0.1, rtol=1e-12),
            state=state,
            mesh=mesh,
        )
        state = out.state
        found[str(i)] = torch.stack([out.grads, torch.tensor(float(out.info.num_products))])
        with torch.no_grad():
            log_decay += 0.1
            for parameter in model.parameters():
                parameter *= 0.99
    return found


def minimum(mesh: DeviceMesh | None, folder: str) -> dict[str, Tensor]:
    """A few outer steps for a ridge regression, and a second call that goes on."""
    rows, (x, y) = own_rows(mesh), data()
    scale = (1 if mesh is None else mesh.size()) / NUM
    w = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    h = torch.zeros((), dtype=torch.float64, requires_grad=True)
    target = x.sum(dim=1) + (y - 1)

    def residuals(shift: Tensor | float) -> Tensor:
        return scale * ((x[rows] @ w - target[rows] - shift) ** 2).sum()

    found = {}
    for most in (2, 8):  # from the same start: the second call goes on from the file
        with torch.no_grad():
            w.zero_()
            h.zero_()
        result = lit.minimize_bilevel(
            lambda: residuals(0.0) + h.exp() * (w**2).sum(),
            lambda: residuals(0.5 * x[rows, 0]),
            w,
            h,
            max_evaluations=most,
            checkpoint=f"{folder}/minimum.npz",
            mesh=mesh,
        )
        found[f"{most}"] = torch.tensor([result.value, h.item(), *w.tolist()]).double()
    return found


class Sent(TorchDispatchMode):
    """Lists how many numbers each collective takes or returns here, whichever are more."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        ours = func.namespace in ("_c10d_functional", "c10d")
        if ours and not any(part in func.__name__ for part in ("wait", "wrap", "barrier")):
            sides = [[x for x in tree_leaves(s) if torch.is_tensor(x)] for s in (*args, result)]
            self.numbers.append(max(sum(x.numel() for x in side) for side in sides))
        return result


def sent(mesh: DeviceMesh) -> dict[str, Any]:
    """What a product sends, and what two solves that differ by ten steps of CG send."""
    H = operator(mesh)
    b, found = H.gradient, {}
    with Sent() as counts:
        _ = H @ b
    found["product"] = counts.numbers
    for steps in (2, 4):
        with Sent() as counts:
            solution = li.solve(H, b, solver=li.CG(damping=0.1, rtol=0.0, max_steps=steps))
        assert int(whole(solution.num_steps)) == steps
        found[f"{steps} steps"] = counts.numbers
    with Sent() as counts:
        approx = li.nystrom(H, 20, sampling="uniform")
    found["columns"], found["held"] = counts.numbers, tuple(approx.columns.to_local().shape)
    return found


def parallel_module(mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """The Hessian of a DistributedDataParallel module with a buffer, and the training after it."""
    model = network()
    model[1].register_buffer("count", torch.zeros(()))
    rows, (x, y) = own_rows(mesh), data()
    scale = (1 if mesh is None else mesh.size()) / NUM
    if mesh is not None:
        model = nn.parallel.DistributedDataParallel(model)

    def loss() -> Tensor:
        return scale * F.cross_entropy(model(x[rows]), y[rows], reduction="sum")

    loss().backward()
    H = lit.HessianOperator(loss, model, mesh=mesh)
    product = H @ torch.linspace(0, 1, 57, dtype=torch.float64)
    if mesh is not None:  # forward passes that the other processes do not take part in
        closures = [loss] * (1 + mesh.get_local_rank())
        lit.HessianOperator(closures, model, mesh=mesh)
    model.zero_grad()
    loss().backward()
    grads = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    return {"product": product, "training": grads}


def sharded_module(mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """All that is asked of a fully sharded module, and the training after it."""
    model, (x, y), rows = network(), data(), own_rows(mesh)
    model[0].bias.requires_grad_(False)
    if mesh is not None:
        for part in (model[0], model[2], model):
            fully_shard(part, mesh=mesh)
    scale = (1 if mesh is None else mesh.size()) / NUM
    h = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        return scale * F.cross_entropy(model(x[rows]), y[rows], reduction="sum")

    def inner_loss() -> Tensor:
        weights = torch.cat([p.reshape(-1) for p in model.parameters() if p.requires_grad])
        return loss() + h * (weights**2).sum()

    H = lit.HessianOperator(loss, model, mesh=mesh)
    found = {"product": whole(H @ H.gradient), "columns": whole(H.columns([3, 44]))}
    out = lit.hypergradient(inner_loss, loss, model, h, solver=SOLVERS["CG"], mesh=mesh)
    found["hypergradient"] = out.grads[None]
    for name, value in out.ihvp.items():
        if name == "0.bias":
            assert value is None
            continue
        found[f"ihvp {name}"] = whole(value)
        live = dict(model.named_parameters())[name]
        assert mesh is None or value.placements == live.placements
    made = lit.InfluenceFunction(
        model, losses, (x[rows], y[rows]), ridge=0.1, solver=SOLVERS["CG"], mesh=mesh
    )
    found["scores"] = scores_of_all(made, mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss().backward()
    optimizer.step()
    found["training"] = torch.cat([whole(p.detach()).reshape(-1) for p in model.parameters()])
    after = lit.HessianOperator(loss, model, mesh=mesh)
    found["product after"] = after @ torch.linspace(0, 1, 51, dtype=torch.float64)
    return found


# What goes wrong.


def empty_process(mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """Three closures on the first process, none on the others."""
    model, (x, y) = network(), data()
    parts = [slice(0, 20), slice(20, 40), slice(40, 60)]
    closures = [lambda r=r: F.cross_entropy(model(x[r]), y[r]) for r in parts]
    if mesh is not None and mesh.get_local_rank() > 0:
        closures = []
    H = lit.HessianOperator(closures, model, mesh=mesh)
    h = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    inner_closures = [lambda c=c: c() + h.exp() * decay(model) for c in closures]
    out = lit.hypergradient(inner_closures, closures, model, h, solver=SOLVERS["CG"], mesh=mesh)
    return {
        "product": H @ torch.linspace(0, 1, 57, dtype=torch.float64),
        "hypergradient": out.grads[None],
    }


def wrong(mesh: DeviceMesh, what: str) -> Any:
    """Let the last process differ from the others in one thing."""
    last = mesh.get_local_rank() == mesh.size() - 1
    model = network()
    loss = inner(model, mesh)
    solver = li.Nystrom(rank=10, damping=0.1, sampling="uniform")
    calls = 0

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        if last and calls == int(what[-1]):
            raise MemoryError("no memory for that")
        return loss()

    def hypergradient(**options: Any) -> Any:
        options = {"solver": solver, "mesh": mesh} | options
        h = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        return lit.hypergradient(lambda: loss() + h * decay(model), loss, model, h, **options)

    if what == "parameters":
        model[0].weight.data += 1e-9 * last
        return operator_of(model, loss, mesh)
    if what == "shapes":
        model = nn.Sequential(nn.Linear(5, 6 + last), nn.Tanh(), nn.Linear(6 + last, 3)).double()
        return operator_of(model, inner(model, mesh), mesh)
    if what == "columns":
        return operator_of(model, loss, mesh).columns([0, 1 + last])
    if what == "vector":
        return operator_of(model, loss, mesh) @ torch.full((57,), 1.0 + last, dtype=torch.float64)
    if what == "rng":
        return hypergradient(rng=int(last))
    if what == "no rng":
        return hypergradient(rng=None)
    if what == "rtol":
        return hypergradient(solver=li.CG(damping=0.1, rtol=1e-3 if last else 1e-4))
    if what.startswith("raises"):
        H = lit.HessianOperator([failing, loss], model, mesh=mesh)
        return H @ H.gradient
    if what == "nan":
        H = operator_of(model, loss, mesh)
        b = H.gradient.to_local().clone()
        b[-1:] = float("nan") if last else b[-1:]
        return li.solve(H, H.processes.spread(b), solver=solver)
    if what == "no data":
        return lit.HessianOperator([], model, mesh=mesh)
    raise ValueError(what)


def operator_of(model: nn.Module, loss: Callable, mesh: DeviceMesh) -> Any:
    return lit.HessianOperator(loss, model, mesh=mesh)


def dies(mesh: DeviceMesh) -> None:
    """End the last process in the middle of a solve."""
    import os

    def step(num_steps: Tensor, residual_norm: Tensor) -> None:
        if mesh.get_local_rank() == mesh.size() - 1 and int(whole(num_steps)) == 3:
            os._exit(7)

    H = operator(mesh)
    li.solve(H, H.gradient, solver=li.CG(damping=0.1, rtol=1e-12), callback=step)


# Influence.


def losses(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


def influence_of(mesh: DeviceMesh | None, **options: Any) -> Any:
    rows, (x, y) = own_rows(mesh), data()
    options = {"ridge": 0.05, "solver": li.NystromCG(rank=20, rtol=1e-13)} | options
    return lit.InfluenceFunction(network(), losses, (x[rows], y[rows]), mesh=mesh, **options)


def queries() -> tuple[Tensor, Tensor]:
    x, y = data()
    return x[:4] + 0.1, y[:4]


def scores_of_all(influence: Any, mesh: DeviceMesh | None, **options: Any) -> Tensor:
    """Return the scores of all processes side by side."""
    own = influence.scores(queries(), **options)
    if mesh is None:
        return own
    parts: list[Any] = [None] * mesh.size()
    torch.distributed.all_gather_object(parts, own)
    return torch.cat(parts, dim=1)


INFLUENCES: dict[str, dict[str, Any]] = {
    "NystromCG": {},
    "default": {"solver": None},
    "dense": {"solver": li.Exact()},
    "auto": {"ridge": 0.0, "damping": "auto"},
    "hessian": {"curvature": "hessian", "ridge": torch.linspace(0.2, 0.3, 57)},
    "fisher": {"curvature": "empirical_fisher", "batch_size": 7},
}


def influence(mesh: DeviceMesh | None, names: list[str]) -> dict[str, Tensor]:
    found = {}
    for name in names:
        made = influence_of(mesh, **INFLUENCES[name])
        found[f"{name} jvp"] = scores_of_all(made, mesh, method="jvp")
        found[f"{name} gradients"] = scores_of_all(made, mesh, method="gradients")
        found[f"{name} sum"] = scores_of_all(made, mesh, reduction="sum")
        best = made.top_k(queries(), 5, "absolute")
        found[f"{name} best"] = torch.from_numpy(best.indices).double()
        found[f"{name} best scores"] = best.scores
        groups = np.arange(NUM)[own_rows(mesh)] // 20  # some in one process alone
        found[f"{name} groups"] = made.group_scores(queries(), groups)
        info = made.info
        found[f"{name} info"] = torch.tensor(
            [info.num_train, info.loss, info.gradient_norm, info.damping], dtype=torch.float64
        )
        G = torch.linspace(0, 1, 57, dtype=torch.float64)
        found[f"{name} product"] = made.inverse_product(G)
    return found


def resumed(mesh: DeviceMesh | None, folder: str) -> dict[str, Tensor]:
    """Scores that are interrupted, and gone on with where one process has lost its directions."""
    import os
    import shutil

    made = influence_of(mesh)
    first = scores_of_all(made, mesh, checkpoint=folder)
    before = made.info.num_products
    again = influence_of(mesh)
    found = {"first": first, "again": scores_of_all(again, mesh, checkpoint=folder)}
    if mesh is not None:
        assert again.info.message == "read from the checkpoint" and before > 0
        own = os.path.join(folder, f"{mesh.get_local_rank()}-of-{mesh.size()}")
        assert os.path.isdir(own)
        torch.distributed.barrier()
        if mesh.get_local_rank() == 0:
            shutil.rmtree(own)
    found["after a loss"] = scores_of_all(influence_of(mesh), mesh, checkpoint=folder)
    return found


def wrong_influence(mesh: DeviceMesh, what: str) -> Any:
    """Let the last process differ from the others in one thing."""
    last = mesh.get_local_rank() == mesh.size() - 1
    rows, (x, y) = own_rows(mesh), data()
    x, y = x[rows].clone(), y[rows].clone()
    if what == "nan" and last:
        x[3] = float("nan")
    if what == "no examples" and last:
        x, y = x[:0], y[:0]
    seed = int(last and what == "rng")
    model = network()
    made = lit.InfluenceFunction(model, losses, (x, y), ridge=0.05, rng=seed, mesh=mesh)
    if what == "changed" and last:
        y[:] = 0
        model[0].weight.data.mul_(1.1)
    query_x, query_y = queries()
    if what == "self":
        return made.self_influence()
    return made.scores((query_x + (0.1 if last and what == "queries" else 0), query_y))


class OwnMemory(Allocations):
    """The memory of this process: that of the parts of its DTensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        return super().__torch_dispatch__(func, types, args, kwargs)


def taken(mesh: DeviceMesh, rank: int = 40) -> dict[str, tuple[float, float]]:
    """What each solver holds here, in n k / P numbers, and the most it sends at once, in n."""
    torch.manual_seed(1)
    model = nn.Linear(1500, 3).double()
    x, y = torch.randn(6, 1500).double(), torch.arange(6) % 3
    rows, found = own_rows(mesh, 6), {}

    def loss() -> Tensor:
        losses = F.cross_entropy(model(x[rows]), y[rows], reduction="sum")
        return mesh.size() / 6 * losses + decay(model)

    H = lit.HessianOperator(loss, model, mesh=mesh)
    n, b = H.shape[0], H.gradient
    for name, solver in SOLVERS.items():
        if name == "Exact":  # holds the whole matrix
            continue
        auto = getattr(solver, "rank", None) == "auto"
        if hasattr(solver, "rank") and not auto:
            solver = replace(solver, rank=rank)
        with OwnMemory() as memory, Sent() as counts:
            inverse = solver.prepare(H, rng=0, b=b)
            _ = inverse.solve(b)
        k = inverse.rank if auto else rank
        found[name] = memory.peak / (8 * n * k / mesh.size()), max(counts.numbers) / n
    return found


KERNELS = {
    "matern": {"kernel": "matern", "lengthscale": [1.0, 2.0, 3.0]},
    "polynomial": {"kernel": "polynomial", "degree": 2, "chunk_size": 7},
    "callable": {"kernel": lambda x, y: x @ y.T},
}


def kernel(mesh: DeviceMesh | None, num: int = NUM, **options: Any) -> li.KernelOperator:
    points = torch.randn(num, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return li.KernelOperator(spread(points, mesh), **options)


def kernels(mesh: DeviceMesh | None, num: int = NUM) -> dict[str, Tensor]:
    """What kernel matrices are asked for."""
    generator = torch.Generator().manual_seed(5)
    v, other = (torch.randn(size, 3, generator=generator).double() for size in (num, 4))
    found = {}
    for name, options in KERNELS.items():
        K = kernel(mesh, num, **options)
        found |= {
            f"{name}, plain": K @ v[:, 0],
            f"{name}, spread": whole(K @ spread(v, mesh)),
            f"{name}, columns": whole(K.columns([num - 1, 0])),
            f"{name}, entries": whole(K.submatrix([1, num - 2])),
            f"{name}, diagonal": whole(K.diagonal()),
            f"{name}, cross": whole(K.cross(other, spread(v, mesh))),
        }
    return found


KERNEL_SOLVERS = {
    "none": None,
    "pivoted": li.Nystrom(rank=30, damping=0.01, sampling="rpcholesky"),
    "NystromCG": li.NystromCG(rank=20, damping=0.01, rtol=1e-13, sampling="rpcholesky"),
    "auto": li.NystromCG(rank="auto", damping=0.01, rtol=1e-13, sampling="greedy"),
}


def kernel_solutions(mesh: DeviceMesh | None, num: int = NUM) -> dict[str, Tensor]:
    """Solve a kernel system with the solvers that read its entries."""
    K = kernel(mesh, num, **KERNELS["matern"])
    b = spread(torch.randn(num, generator=torch.Generator().manual_seed(6)).double(), mesh)
    found = {}
    for name, solver in KERNEL_SOLVERS.items():
        options = {"damping": 0.01} if solver is None else {"solver": solver}
        solution = li.solve(K, b, **options)
        assert mesh is None or isinstance(solution.value, DTensor)
        found[name] = whole(solution.value)
    return found
