"""What a mesh of eight devices computes, beside one device: run apart, it prints a record.

``python -m tests.adapters.jax.mesh_cases NAME ...`` runs the functions of these names.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import lowrank_inverse as li
import lowrank_inverse_jax as lij

RANK, DAMPING = 12, 0.3
SOLVERS = {
    "CG": li.CG(damping=DAMPING, rtol=1e-13, recycle=0),
    "recycling CG": li.CG(damping=DAMPING, rtol=1e-13),
    "Nystrom": li.Nystrom(rank=RANK, damping=DAMPING, sampling="uniform"),
    "Krylov": li.Nystrom(rank=RANK, damping=DAMPING),
    "Gaussian": li.Nystrom(rank=RANK, damping=DAMPING, sampling="gaussian"),
    "chunked": li.Nystrom(rank=RANK, damping=DAMPING, memory="chunked", chunk_size=5),
    "streamed": li.Nystrom(rank=RANK, damping=DAMPING, memory="streamed"),
    "refined": li.Nystrom(rank=RANK, damping=DAMPING, sampling="uniform", refine=2),
    "NystromCG": li.NystromCG(
        rank=RANK, damping=DAMPING, rtol=1e-13, sampling="uniform", recycle=0
    ),
    "recycling NystromCG": li.NystromCG(rank=RANK, damping=DAMPING, rtol=1e-13),
    "Neumann": li.Neumann(damping=DAMPING, num_terms=30),
    "Exact": li.Exact(damping=DAMPING),
}


def mesh_of(devices: Any = None, shape: tuple[int, ...] = (-1,)) -> Mesh:
    devices = np.array(jax.devices() if devices is None else devices).reshape(shape)
    return Mesh(devices, ("x", "y")[: devices.ndim])


class Problem:
    """A network with a weight for each of its examples, on one device and on a mesh."""

    def __init__(self, hidden: int, classes: int, mesh: Mesh, *, examples: int = 16) -> None:
        rng = np.random.default_rng(0)
        self.mesh, self.hidden, axes = mesh, hidden, mesh.axis_names
        w = {"a": rng.standard_normal((4, hidden)) / 3, "b": rng.standard_normal((hidden, classes))}
        x, y = rng.standard_normal((examples, 4)), rng.integers(0, classes, examples)
        self.n, self.num = 4 * hidden + hidden * classes, examples
        dtype = jnp.zeros(()).dtype
        self.one = jax.tree.map(lambda v: jnp.asarray(v, dtype), w), jnp.zeros(examples), (x, y)
        even = hidden % mesh.size == 0
        cut = {"a": (None, axes), "b": (axes,)} if even else {"a": (), "b": ()}
        params = {name: self.put(np.asarray(w[name], dtype), *cut[name]) for name in w}
        rows = (axes,) if examples % mesh.size == 0 else ()
        weights = self.put(np.zeros(examples, dtype), *rows)
        self.spread = params, weights, (self.put(x, *rows), self.put(y, *rows))

    def put(self, x: Any, *spec: Any) -> jax.Array:
        sharding = NamedSharding(self.mesh, PartitionSpec(*spec))
        x = np.asarray(x, jnp.zeros(()).dtype) if np.asarray(x).dtype.kind == "f" else np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

    @staticmethod
    def outputs(w: Any, batch: Any) -> jax.Array:
        return jnp.tanh(batch[0] @ w["a"]) @ w["b"]

    @staticmethod
    def losses(outputs: jax.Array, batch: Any) -> jax.Array:
        return -jnp.take_along_axis(jax.nn.log_softmax(outputs), batch[1][:, None], 1)[:, 0]

    def inner(self, w: Any, phi: jax.Array, batch: Any) -> jax.Array:
        decay = 0.05 * sum((v**2).sum() for v in w.values())
        return (jax.nn.sigmoid(phi) * self.losses(self.outputs(w, batch), batch)).mean() + decay

    def outer(self, w: Any, phi: jax.Array, batch: Any) -> jax.Array:
        return self.losses(self.outputs(w, batch), batch)[:5].mean()

    def loss(self, batch: Any) -> Any:
        return lambda w: self.inner(w, jnp.zeros(self.num), batch)

    def hypergradient(self, solver: Any, w: Any, phi: Any, batch: Any, **options: Any) -> Any:
        data = {"inner_args": (batch,), "outer_args": (batch,)}
        return lij.hypergradient(
            self.inner, self.outer, w, phi, solver=solver, rng=0, **data, **options
        )


def host(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def error(found: Any, wanted: Any) -> float:
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))
    squares = sum(np.sum((host(a) - host(b)) ** 2) for a, b in pairs)
    return float((squares / sum(np.sum(host(b) ** 2) for _, b in pairs)) ** 0.5)


def same_layout(found: Any, given: Any) -> bool:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(given), strict=True)
    return all(a.sharding.is_equivalent_to(b.sharding, b.ndim) for a, b in pairs)


def compiled(function: Any, *args: Any) -> tuple[Any, dict[str, float]]:
    """Return what the program returns, its largest collectives, and its bytes of scratch."""
    program = jax.jit(function).lower(*args).compile()
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    largest: dict[str, float] = {}
    for line in program.as_text().splitlines():
        if found := re.search(rf"= (.*?) ({kinds})(-start)?\(", line):
            shapes = re.findall(r"\w\d+\[([\d,]*)\]", found[1])
            sizes = [int(np.prod([int(d) for d in s.split(",") if d])) for s in shapes]
            largest[found[2]] = max([largest.get(found[2], 0), *sizes])
    largest["scratch"] = program.memory_analysis().temp_size_in_bytes
    return program(*args), largest


def dense(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Return Hessian and gradient on one device, by another way."""
    w, _, batch = problem.one
    a = w["a"].size

    def flat(v: jax.Array) -> jax.Array:
        parts = {"a": v[:a].reshape(w["a"].shape), "b": v[a:].reshape(w["b"].shape)}
        return problem.loss(batch)(parts)

    at = np.concatenate([np.ravel(leaf) for leaf in w.values()])
    found = jax.jit(lambda v: (jax.hessian(flat)(v), jax.grad(flat)(v)))(at)
    return host(found[0]), host(found[1])


def operators(shapes: Any = ((2, 4),), eager: bool = False) -> Any:
    """Products and columns, on a mesh of one or of two axes."""
    record = {}
    for shape in shapes:
        problem = Problem(16, 4, mesh_of(shape=shape))
        spread_w, _, spread_batch = problem.spread
        H, gradient = dense(problem)
        v = np.sin(np.arange(problem.n))
        K = [0, 5, problem.n - 1]

        def both(w: Any, batch: Any, v: Any = v, K: Any = K, problem: Any = problem) -> Any:
            H = lij.HessianOperator(problem.loss(batch), w, chunk_size=1, mesh=problem.mesh)
            return H @ jnp.asarray(v), H.columns(K), H.gradient

        wanted = H @ v, H[:, K], gradient
        found, largest = compiled(both, spread_w, spread_batch)
        all_found = [*found, *(both(spread_w, spread_batch) if eager else ())]
        rows = problem.put(np.zeros(problem.n), problem.mesh.axis_names)
        record[f"{shape}"] = {
            "errors": [error(found, wanted) for found in (all_found[:3], all_found[-3:])],
            "rows": all(x.sharding.is_equivalent_to(rows.sharding, x.ndim) for x in all_found),
            "gathered": max(largest.get("all-gather", 0), largest.get("collective-permute", 0)),
            "weights": 4 * problem.hidden,
        }
    return record


def hypergradients(names: Any = ("Nystrom",), hidden: int = 320) -> Any:
    """Compiled: right, laid as given, nothing large gathered, and little memory."""
    problem, record = Problem(hidden, 4, mesh_of()), {}
    for name in names:
        solver = SOLVERS[name]
        wanted = jax.jit(partial(problem.hypergradient, solver))(*problem.one)

        def call(*args: Any, solver: Any = solver) -> Any:
            out = problem.hypergradient(solver, *args, chunk_size=1, mesh=problem.mesh)
            return out.grads, out.ihvp, out.solution.value

        (grads, ihvp, value), largest = compiled(call, *problem.spread)
        itemsize = value.dtype.itemsize
        record[name] = {
            "grads": error(grads, wanted.grads),
            "ihvp": error(ihvp, wanted.ihvp),
            "laid": same_layout((ihvp, grads), problem.spread[:2]),
            "rows": max(s.data.size for s in value.addressable_shards) / problem.n,
            "gathered": max(largest.get("all-gather", 0), largest.get("collective-permute", 0)),
            "weights": 4 * hidden,
            "memory": largest["scratch"] / itemsize / (problem.n * RANK / 8),
        }
    return record


def eager(names: Any = ("CG",)) -> Any:
    """Outside jit, on rows that the devices divide and on others."""
    record = {}
    for hidden, classes in ((16, 4), (17, 3)):
        problem = Problem(hidden, classes, mesh_of())
        for name in names:
            wanted = jax.jit(partial(problem.hypergradient, SOLVERS[name]))(*problem.one)
            found = problem.hypergradient(SOLVERS[name], *problem.spread, mesh=problem.mesh)
            record[f"{name} {problem.n}"] = {
                "grads": error(found.grads, wanted.grads),
                "ihvp": error(found.ihvp, wanted.ihvp),
                "laid": same_layout((found.ihvp, found.grads), problem.spread[:2]),
            }
    return record


def uneven(names: Any = ("NystromCG",)) -> Any:
    """Compiled, where the devices divide neither parameters nor examples."""
    problem, record = Problem(61, 3, mesh_of(), examples=13), {}
    for name in names:

        def call(*args: Any, solver: Any = SOLVERS[name]) -> Any:
            out = problem.hypergradient(solver, *args, chunk_size=1, mesh=problem.mesh)
            return out.grads, out.ihvp

        wanted = jax.jit(partial(problem.hypergradient, SOLVERS[name]))(*problem.one)
        (grads, ihvp), largest = compiled(call, *problem.spread)
        record[name] = {
            "grads": error(grads, wanted.grads),
            "ihvp": error(ihvp, wanted.ihvp),
            "laid": same_layout((ihvp, grads), problem.spread[:2]),
            "memory": largest["scratch"] / ihvp["a"].dtype.itemsize / (problem.n * RANK / 8),
        }
    return record


def indivisible() -> Any:
    """Products of every number of rows, eager and compiled, as the last thing of a program."""
    mesh, record = mesh_of(), {}
    where = NamedSharding(mesh, PartitionSpec())
    for n in (6, 10, 12):
        w, v = jax.device_put(1 + np.arange(n) / n, where), jnp.ones(n)

        def both(w: Any, v: Any) -> Any:
            H = lij.HessianOperator(lambda w: (w**4).sum(), w, mesh=mesh)
            return H @ v, H.columns([0, 5])

        H = np.diag(12 * (1 + np.arange(n) / n) ** 2)
        wanted = H.sum(axis=1), H[:, [0, 5]]
        record[n] = [error(both(w, v), wanted), error(jax.jit(both)(w, v), wanted)]
    return record


def influence(curvatures: Any = ("ggn",)) -> Any:
    """Scores, the largest of them, and self-influence, of examples in any number."""
    problem, record = Problem(8, 3, mesh_of(), examples=21), {}
    w, _, (x, y) = problem.one
    train, query = (x, y), (x[:5] + 0.1, y[:5])
    for curvature in curvatures:
        settings = {
            "outputs": problem.outputs,
            "curvature": curvature,
            "ridge": 1.0,
            "solver": li.CG(rtol=1e-13),
            "batch_size": 11,
        }
        one = lij.InfluenceFunction(problem.losses, w, train, **settings)
        many = lij.InfluenceFunction(
            problem.losses, problem.spread[0], train, mesh=problem.mesh, **settings
        )
        best = many.top_k(query, 4)
        wanted = one.scores(query)
        order = np.argsort(-host(wanted), axis=1, kind="stable")[:, :4]
        record[curvature] = {
            "scores": error(many.scores(query), wanted),
            "top": np.array_equal(best.indices, order),
            "self": error(many.self_influence(), one.self_influence()),
            "counted": many.info.num_train == 21 and many.info.num_products > 0,
            "rows": max(s.data.size for s in many._operator.gradient.addressable_shards)
            / problem.n,
        }
    return record


def checkpoint() -> Any:
    """A folder that is gone on from."""
    problem = Problem(8, 3, mesh_of(), examples=21)
    train = problem.one[2]
    many = lij.InfluenceFunction(
        problem.losses,
        problem.spread[0],
        train,
        outputs=problem.outputs,
        ridge=0.5,
        mesh=problem.mesh,
    )
    with tempfile.TemporaryDirectory() as folder:
        first, again = (many.scores(train, checkpoint=folder) for _ in range(2))
    return {"again": error(again, first), "message": many.info.message}


def minimum() -> Any:
    """A bilevel minimum: the loop on the host, all else on the mesh."""
    problem = Problem(8, 3, mesh_of())

    def inner(w: Any, phi: Any, batch: Any) -> jax.Array:
        losses = problem.losses(problem.outputs(w, batch), batch)
        return losses.mean() + 0.5 * jnp.exp(phi) * sum((v**2).sum() for v in w.values())

    def run(w: Any, batch: Any, **options: Any) -> Any:
        args = {"inner_args": (batch,), "outer_args": (batch,)}
        return lij.minimize_bilevel(
            inner, problem.outer, w, -2.0, bounds=(-4.0, 2.0), max_evaluations=4, **args, **options
        )

    wanted = run(problem.one[0], problem.one[2])
    found = run(problem.spread[0], problem.spread[2], mesh=problem.mesh)
    return {
        "hparams": abs(float(found.hparams) - float(wanted.hparams)),
        "params": error(found.params, wanted.params),
        "laid": same_layout(found.params, problem.spread[0]),
    }


def narrow() -> Any:
    """Without 64-bit types, where singular vectors come from a decomposition by rows."""
    with jax.enable_x64(False):
        return hypergradients(("NystromCG", "Nystrom"), 1280)


def refusals() -> Any:
    """Each mistake, and what is said of it."""
    mesh = mesh_of()
    problem = Problem(8, 3, mesh)
    w, phi, batch = problem.spread
    first = jax.device_put(np.ones(3), jax.devices()[0])
    half, other = mesh_of(jax.devices()[:4]), mesh_of(shape=(2, 4))
    explicit = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    there = jax.device_put(w, NamedSharding(half, PartitionSpec()))
    on_explicit = {
        "a": jax.device_put(w["a"], NamedSharding(explicit, PartitionSpec(None, "x"))),
        "b": w["b"],
    }

    def hessian(w: Any, mesh: Any) -> Any:
        return lij.HessianOperator(problem.loss(batch), w, mesh=mesh)

    def gradient(w: Any, batch: Any) -> Any:
        return problem.hypergradient(li.CG(), w, phi, batch, mesh=mesh)

    calls = {
        "kind": lambda: hessian(w, "devices"),
        "explicit mesh": lambda: hessian(w, explicit),
        "explicit arrays": lambda: hessian(on_explicit, mesh),
        "one device": lambda: hessian({"a": first, "b": w["b"]}, mesh),
        "half": lambda: hessian(there, mesh),
        "axes": lambda: hessian(w, other),
        "data": lambda: gradient(w, (first, first)),
        "examples": lambda: lij.InfluenceFunction(
            problem.losses, w, (jnp.asarray(first),), outputs=problem.outputs, mesh=mesh
        ),
    }
    record = {}
    for name, call in calls.items():
        try:
            call()
            record[name] = "no error"
        except (TypeError, ValueError) as error:
            record[name] = f"{type(error).__name__}: {error}"
    return record


def kernels() -> Any:
    """A kernel matrix whose points are cut by rows, even and not: products, and its columns."""
    mesh, record = mesh_of(), {}
    for n in (256, 252, 251):
        rows = (mesh.axis_names,) if n % 8 == 0 else ()
        where = NamedSharding(mesh, PartitionSpec(*rows))
        X = np.sin(np.arange(3.0 * n)).reshape(n, 3)
        block = np.cos(np.arange(2.0 * n)).reshape(n, 2)
        K = np.exp(-((X[:, None] - X[None]) ** 2).sum(-1) / 2)

        def both(X: Any, block: Any) -> Any:
            A = li.KernelOperator(X, chunk_size=64)
            return A @ block, A.columns([3, 5])

        found, largest = compiled(both, jax.device_put(X, where), jax.device_put(block, where))
        record[n] = {
            "errors": [error(found[0], K @ block), error(found[1], K[:, [3, 5]])],
            "sent": max(largest.get("all-gather", 0), largest.get("all-reduce", 0)),
            "held": max(s.data.size for s in found[0].addressable_shards) / block.size,
        }
    return record


def all_solvers() -> Any:
    """Every solver, compiled; and some where the devices divide nothing, and eager."""
    return {
        "jit": hypergradients([name for name in SOLVERS if name != "Exact"], 1280),
        "uneven": uneven(("Krylov", "chunked", "NystromCG", "Exact")),
        "eager": eager(("CG", "Nystrom")),
    }


def all_operators() -> Any:
    """Both meshes, eager too."""
    problem = Problem(8, 3, mesh_of())
    w, _, batch = problem.spread
    nan = {"a": problem.put(np.full((4, 8), np.nan)), "b": w["b"]}
    try:
        lij.HessianOperator(problem.loss(batch), nan, mesh=problem.mesh)
        said = "no error"
    except ValueError as error:
        said = str(error)
    return {"found": operators(((8,), (2, 4)), eager=True), "NaN": said}


def curvatures() -> Any:
    """Both curvatures that are differentiated twice, and outer products of gradients."""
    return influence(("hessian", "ggn", "empirical_fisher"))


def processes() -> Any:
    """What two processes find together, and what is said where they differ."""
    mesh, me = mesh_of(), jax.process_index()
    problem = Problem(8, 4, mesh)
    solver = SOLVERS["NystromCG"]
    wanted = jax.jit(partial(problem.hypergradient, solver))(*problem.one)
    call = partial(problem.hypergradient, solver, mesh=mesh)
    out = jax.jit(lambda *args: call(*args)[:4])(*problem.spread)
    even = {
        "grads": error(out[0], wanted.grads),
        "ihvp": error(out[3], wanted.ihvp),
        "laid": same_layout((out[3], out[0]), problem.spread[:2]),
    }
    train = problem.one[2]
    settings = {"outputs": problem.outputs, "ridge": 0.5, "solver": li.Exact()}
    one = lij.InfluenceFunction(problem.losses, problem.one[0], train, **settings)
    many = lij.InfluenceFunction(problem.losses, problem.spread[0], train, mesh=mesh, **settings)
    folder = os.environ["FOLDER"]
    scores = many.scores(train, checkpoint=folder)
    best = many.top_k(train, 3, checkpoint=folder).indices
    order = np.argsort(-host(one.scores(train)), axis=1, kind="stable")[:, :3]
    other = jax.tree.map(lambda v: np.asarray(v) + me, problem.one[0])
    H = lij.HessianOperator(lambda w: (w**2).sum(), problem.put(np.ones(16), "x"), mesh=mesh)
    said = []
    for fail in (
        lambda: lij.HessianOperator(problem.loss(train), other, mesh=mesh),
        lambda: H.columns([me, 4]),
        lambda: H @ (jnp.ones(16) + me),
    ):
        try:
            fail()
        except ValueError as wrong:
            said.append(str(wrong)[:50])
    return {
        "jit": even,
        "scores": error(scores, one.scores(train)),
        "top": np.array_equal(best, order),
        "folders": sorted(os.listdir(folder)),
        "differ": said,
        "digest": host(out[0]).tobytes().hex() + host(scores).tobytes().hex(),
    }


def join(port: str, index: str) -> None:
    """Make this process one of two."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))


def main(names: list[str]) -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    if "PORT" in os.environ:
        join(os.environ["PORT"], os.environ["INDEX"])
    print(json.dumps({name: globals()[name]() for name in names}))


if __name__ == "__main__":
    main(sys.argv[1:])
