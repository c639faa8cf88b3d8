"""The measurements of speed: each method does what it is said to, and the commands run."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="speed is measured in torch: extra `torch`")

import torch

from benchmarks.harness import claims, processes
from benchmarks.speed import measure, mesh, peers, scaling, table5, table5_claims, torch_methods
from benchmarks.speed.networks import network
from benchmarks.speed.torch_methods import num_products
from tests.benchmarks.conftest import refused, text, written
from tests.conftest import assert_picture

K = 3


@pytest.fixture(scope="module")
def problem() -> Any:
    return measure.build("mlp", 6, seed=0, device="cpu", small=True)


def dense(problem: Any) -> np.ndarray:
    """The Hessian, from its rows in float64."""
    from torch.func import functional_call

    names, shapes = problem.names, [p.shape for p in problem.params]
    flat = torch.cat([p.detach().reshape(-1) for p in problem.params]).double()

    def loss(flat: Any) -> Any:
        parts = torch.split(flat, [shape.numel() for shape in shapes])
        params = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        outputs = functional_call(problem.model, params, (problem.x.double(),))
        return problem.weighted(outputs, problem.w.detach().double())

    return torch.func.hessian(loss)(flat).numpy()


def test_the_networks_have_the_sizes_of_the_paper():
    sizes = {}
    for name in ("mlp", "lenet", "wrn"):
        model, shape = network(name)
        sizes[name] = sum(p.numel() for p in model.parameters())
        small, small_shape = network(name, small=True)
        assert small(torch.zeros(2, *small_shape)).shape == (2, 10)
        assert len(shape) == len(small_shape)
    assert sizes == {"mlp": 1267530, "lenet": 61706, "wrn": 1467610}
    with pytest.raises(ValueError, match="`name` must be 'mlp', 'lenet', 'wrn' or 'wrn10'; got 'v"):
        network("vgg")


def test_the_product_of_the_floor_is_that_of_the_hessian(problem):
    torch.manual_seed(0)
    product = problem.products()()
    torch.manual_seed(0)
    v = torch.cat([torch.randn_like(p).reshape(-1) for p in problem.params])
    found = torch.cat([p.reshape(-1) for p in product]).numpy()
    np.testing.assert_allclose(found, dense(problem) @ v.double().numpy(), rtol=0, atol=1e-5)


def test_the_damping_makes_the_system_definite_and_the_step_makes_neumann_converge(problem):
    eigenvalues = np.linalg.eigvalsh(dense(problem))
    damping, step = measure.damping_and_step(*measure.spectrum(problem), least=1e-3)
    assert eigenvalues[0] < 0 < eigenvalues[0] + damping
    assert 0 < step * (eigenvalues[-1] + damping) < 2


def test_every_method_of_ours_gives_the_hypergradient_of_its_inverse(problem):
    import lowrank_inverse as li
    import lowrank_inverse_torch as lit

    found = {
        name: measure.gradient(run())
        for name, run in torch_methods.ours(problem, 0.5, 0.1, K).items()
    }
    arguments = (problem.inner, problem.outer, problem.model, problem.w)
    for name, gradient in found.items():
        if name.startswith("Nyström"):
            np.testing.assert_allclose(gradient, found["Nyström, stored"], rtol=1e-3, atol=1e-6)
    solver = li.CG(damping=0.5, rtol=0.0, max_steps=K)
    expected = lit.hypergradient(*arguments, solver=solver, accumulate_grad=False).grads
    np.testing.assert_allclose(found["CG"], expected.numpy(), rtol=1e-5, atol=1e-8)
    assert list(found) == table5.OURS


@pytest.mark.parametrize("method", table5.OURS)
def test_no_method_has_more_products_than_the_table_says(problem, method):
    info = torch_methods.ours(problem, 0.5, 0.1, K)[method]().info
    # The mixed derivative is counted there too, which `info` leaves out.
    assert info.num_products + 1 <= torch_methods.num_products(method, K)


@pytest.mark.parametrize(
    ("package", "source"),
    [("hypergrad", "hypergrad"), ("betty", "betty"), ("torchopt", "TorchOpt")],
)
@pytest.mark.filterwarnings("ignore")
def test_a_converged_method_of_a_peer_gives_the_exact_hypergradient(problem, package, source):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; `python -m benchmarks peers --help` says how")
    import lowrank_inverse as li
    import lowrank_inverse_torch as lit

    arguments = (problem.inner, problem.outer, problem.model, problem.w)
    exact = lit.hypergradient(*arguments, solver=li.Exact(damping=2.0), accumulate_grad=False).grads
    methods = torch_methods.SOURCES[source](problem, 2.0, 0.3, 60)
    name = next(name for name in methods if "Neumann" in name)
    np.testing.assert_allclose(measure.gradient(methods[name]()), exact, rtol=1e-3, atol=1e-5)


def test_table_5_runs_and_is_taken_up_where_it_ended(tmp_path, calls, capsys):
    options = ["--quick", "--models", "mlp", "--methods", "Nyström, stored", "CG"]
    options += ["--repeats", "1", "--output", str(tmp_path), "--ranks"]
    assert table5.main([*options, "3"]) == 0
    assert len(calls) == 3
    assert table5.main([*options, "3", "4"]) == 0
    assert len(calls) == 5
    stored = written(tmp_path, "table5")["measurements"]["mlp, Nyström, stored, k = 4"]
    assert stored["products"] == 5
    assert stored["seconds"] > 0
    assert stored["finite"]
    lines = text(tmp_path, "table5")
    assert "Nyström, stored" in lines
    assert "of the floor" in lines
    assert_picture(tmp_path / "table5.png")
    refused(table5.main, [*options, "0"], "must be at least 1", capsys)


def test_the_peers_are_compared_with_the_converged_answer(tmp_path, monkeypatch, calls):
    monkeypatch.setattr(peers, "interpreter", lambda package, candidates: (None, "not installed"))
    options = ["--quick", "--batch", "8", "--rank", "12", "--repeats", "1"]
    assert peers.main([*options, "--output", str(tmp_path)]) == 0
    found = written(tmp_path, "peers")["measurements"]
    assert found["CG"]["error"] < 0.1 * found["Neumann"]["error"]
    assert "hypergrad CG" not in found
    assert "hypergrad CG: hypergrad is not installed" in text(tmp_path, "peers")
    assert_picture(tmp_path / "peers.png")


@pytest.mark.slow
def test_the_same_problem_in_jax_has_the_same_hypergradient(tmp_path):
    pytest.importorskip("jax")
    from benchmarks.speed import jax_methods

    path = str(tmp_path / "problem.npz")
    found = measure.write_problem(path, batch=8, seed=0, small=True, training=20)
    shared = {"path": path, "k": 40, "damping": found["damping"], "step": found["step"]}
    entry = jax_methods.measure(method="CG (jax)", repeats=1, limit=60.0, **shared)
    assert entry["error"] < 1e-2
    assert entry["seconds"] > 0


def test_the_slope_of_a_power_is_its_exponent():
    sizes = [10, 100, 1000, 10_000]
    assert scaling.slope(sizes, [float(n) ** 1.5 for n in sizes]) == pytest.approx(1.5)


@pytest.mark.slow
@pytest.mark.slow
def test_scaling_says_what_a_budget_chose(tmp_path, monkeypatch, calls):
    monkeypatch.setattr(scaling, "DAMPING", 10.0)
    options = ["--sizes", "500", "1000", "--ranks", "2", "4", "--size", "1000", "--rank", "4"]
    assert scaling.main([*options, "--repeats", "1", "--output", str(tmp_path)]) == 0
    lines = text(tmp_path, "scaling")
    assert "stored: slope" in lines
    assert "`memory` must be at least" in lines
    assert_picture(tmp_path / "scaling.png")
    choices = [
        f["chose"] for f in written(tmp_path, "scaling")["measurements"].values() if "chose" in f
    ]
    assert choices[0] == "stored"
    assert "streamed" in choices


# The claims of the paper's Table 5.


def measurement(method: str, k: int, per_product: float, graph: float = 10.0) -> dict[str, Any]:
    """A measurement of a method that needs its products' time and as much memory as it holds."""
    held = {table5_claims.TOGETHER: graph * k, table5_claims.STORED: graph + k}.get(method, graph)
    return {"seconds": num_products(method, k) * per_product, "mib": held}


def test_table_5_is_measured_kept_and_judged(tmp_path, monkeypatch):
    called = []

    def apart(target: str, settings: dict[str, Any], **_: Any) -> Any:
        called.append(target)
        if target.endswith(":prepare"):
            graph = {"n": 100, "mib": 10.0, "product": [0.1, 0.1, 0.3]}
            return graph | {"lowest": -0.1, "highest": 1.0}
        if settings["method"] == table5_claims.SPARING and settings["k"] == 20:
            return {"left out": "too long", "n": 100}
        return measurement(settings["method"], settings["k"], 0.1)

    monkeypatch.setattr(processes, "apart", apart)
    monkeypatch.setattr(table5, "has_peers", lambda: False)
    assert table5.paper(["--quick", "--output", str(tmp_path)]) == 0
    assert len(called) == 1 + 3 * 6
    results = written(tmp_path, "paper_table5")
    faster, memory, sparing = results["claims"]
    # As many products as CG's take as long as CG.
    assert faster["verdict"] == claims.NOT_SUPPORTED
    assert "1 x (2.20 s against 2.20 s)" in faster["ours"]
    assert memory["verdict"] == claims.SUPPORTED
    assert "all columns at a time: 20 x; one column at a time: 3 x" in memory["ours"]
    assert sparing["verdict"] == claims.IN_PART
    assert "23 s, left out, by its 233 products" in sparing["ours"]
    lines = text(tmp_path, "paper_table5")
    assert "left out, too long" in lines
    assert "hypergrad Nyström" not in lines
    assert not (tmp_path / "table5.json").exists()
    assert_picture(tmp_path / "paper_table5.png")
    assert table5.paper(["--quick", "--output", str(tmp_path)]) == 0
    assert len(called) == 1 + 3 * 6


def test_table_5_does_not_judge_what_failed():
    measured = {
        f"wrn, {method}, k = {k}": measurement(method, k, 0.1)
        for method in table5_claims.METHODS
        for k in table5_claims.RANKS
    }
    assert table5_claims.judge(measured)[1]["verdict"] == claims.SUPPORTED
    for k in table5_claims.RANKS:  # three times the memory at the last
        measured[f"wrn, {table5_claims.SPARING}, k = {k}"] |= {"mib": 30.0 if k == 20 else 10.0}
        measured[f"wrn, {table5_claims.SPARING}, k = {k}"] |= {"seconds": 1e3}
    assert table5_claims.judge(measured)[2]["verdict"] == claims.IN_PART
    ours, theirs = (
        measured[f"wrn, {form}, k = 20"] for form in (table5_claims.STORED, table5_claims.TOGETHER)
    )
    for times, verdict in (
        ((2.0, 2.0), claims.NOT_SUPPORTED),
        ((0.5, 2.0), claims.IN_PART),
        ((0.5, 0.5), claims.SUPPORTED),
    ):
        ours["seconds"], theirs["seconds"] = times
        assert table5_claims.judge(measured)[0]["verdict"] == verdict
    measured["wrn, CG, k = 20"] = {"failed": "no memory"}
    with pytest.raises(SystemExit, match="CG, k = 20 failed: no memory"):
        table5_claims.judge(measured)


def test_the_model_of_many_processes_sends_two_vectors_a_product():
    row = mesh.simulated(1e9, 64)
    assert float(row["sent a product, GiB"]) == pytest.approx(2 * 63 / 64 * 4e9 / 2**30, rel=1e-2)
    assert float(row["50 columns, GiB"]) == pytest.approx(50 * 4e9 / 64 / 2**30, rel=1e-2)


@pytest.mark.slow
def test_two_processes_hold_what_one_holds_and_send_two_vectors_a_product(tmp_path):
    mesh.main(["--quick", "--processes", "2", "--output", str(tmp_path)])
    found = written(tmp_path, "mesh")["measured"]["2"]
    n, size = found["n"], 2
    assert found["rows"] == n / size and found["column bytes"] == 4 * mesh.RANK * n / size
    assert found["sent a product"] <= 2 * (n + 2 * size)
    assert found["sent a step"] <= 2 * (n + 2 * size) + 4
    assert "SIMULATED" in text(tmp_path, "mesh")
