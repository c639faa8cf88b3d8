"""The measurements of speed: each method does what it is said to, and the commands run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="speed is measured in torch: extra `torch`")
pytest.importorskip("tqdm", reason="the experiments need the extra `plot`: tqdm is missing")

import torch

from benchmarks import _measure, _torch_peers, _torch_speed, peers, scaling, table5
from benchmarks._networks import network
from tests.conftest import assert_picture

K = 3


@pytest.fixture(scope="module")
def problem() -> Any:
    return _torch_speed.build("mlp", 6, seed=0, device="cpu", small=True)


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


def written(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def test_the_networks_have_the_sizes_of_the_paper():
    sizes = {}
    for name in ("mlp", "lenet", "wrn"):
        model, shape = network(name)
        sizes[name] = sum(p.numel() for p in model.parameters())
        small, small_shape = network(name, small=True)
        assert small(torch.zeros(2, *small_shape)).shape == (2, 10)
        assert len(shape) == len(small_shape)
    assert sizes == {"mlp": 1267530, "lenet": 61706, "wrn": 1467610}
    with pytest.raises(ValueError, match="`name` must be 'mlp', 'lenet' or 'wrn'; got 'vgg'"):
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
    damping, step = _torch_speed.damping_and_step(*_torch_speed.spectrum(problem), least=1e-3)
    assert eigenvalues[0] < 0 < eigenvalues[0] + damping
    assert 0 < step * (eigenvalues[-1] + damping) < 2


def test_every_method_of_ours_gives_the_hypergradient_of_its_inverse(problem):
    import lowrank_inverse as li
    import lowrank_inverse_torch as lit

    found = {
        name: _torch_speed.gradient(run())
        for name, run in _torch_speed.ours(problem, 0.5, 0.1, K).items()
    }
    arguments = (problem.inner, problem.outer, problem.model, problem.w)
    for name, gradient in found.items():
        if name.startswith("Nyström"):
            torch.testing.assert_close(gradient, found["Nyström, stored"], rtol=1e-3, atol=1e-6)
    solver = li.CG(damping=0.5, rtol=0.0, max_steps=K)
    expected = lit.hypergradient(*arguments, solver=solver, accumulate_grad=False).grads
    torch.testing.assert_close(found["CG"], expected)
    assert list(found) == table5.OURS


@pytest.mark.parametrize("method", table5.OURS)
def test_no_method_has_more_products_than_the_table_says(problem, method):
    info = _torch_speed.ours(problem, 0.5, 0.1, K)[method]().info
    # The mixed derivative is counted there too, which `info` leaves out.
    assert info.num_products + 1 <= _torch_speed.num_products(method, K)


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
    methods = _torch_speed.SOURCES[source](problem, 2.0, 0.3, 60)
    name = next(name for name in methods if "Neumann" in name)
    torch.testing.assert_close(_torch_speed.gradient(methods[name]()), exact, rtol=1e-3, atol=1e-5)


def test_table_5_runs_and_is_taken_up_where_it_ended(tmp_path, monkeypatch, capsys):
    calls = []

    def here(target: str, settings: dict[str, Any], **_: Any) -> Any:
        calls.append(target)
        return getattr(_torch_speed, target.split(":")[1])(**settings)

    monkeypatch.setattr(table5, "apart", here)
    options = ["--quick", "--models", "mlp", "--methods", "Nyström, stored", "CG"]
    options += ["--repeats", "1", "--output", str(tmp_path), "--ranks"]
    assert table5.main([*options, "3"]) == 0
    assert len(calls) == 3
    assert table5.main([*options, "3", "4"]) == 0
    assert len(calls) == 5
    results = written(tmp_path, "table5")
    stored = results["measurements"]["mlp, Nyström, stored, k = 4"]
    assert stored["products"] == 5
    assert stored["seconds"] > 0
    assert stored["finite"]
    text = (tmp_path / "table5.txt").read_text(encoding="utf-8")
    assert "Nyström, stored" in text
    assert "of the floor" in text
    assert_picture(tmp_path / "table5.png")
    with pytest.raises(SystemExit, match="2"):
        table5.main([*options, "0"])
    assert "must be at least 1" in capsys.readouterr().err


def test_the_peers_are_compared_with_the_converged_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(
        peers,
        "interpreter",
        lambda package, candidates: (candidates[0] if package is None else None, "not installed"),
    )

    def here(target: str, settings: dict[str, Any], **_: Any) -> Any:
        return getattr(_torch_peers, target.split(":")[1])(**settings)

    monkeypatch.setattr(peers, "apart", here)
    options = ["--quick", "--batch", "8", "--rank", "12", "--repeats", "1"]
    assert peers.main([*options, "--output", str(tmp_path)]) == 0
    found = written(tmp_path, "peers")["measurements"]
    assert found["CG"]["error"] < 0.1 * found["Neumann"]["error"]
    assert "hypergrad CG" not in found
    text = (tmp_path / "peers.txt").read_text(encoding="utf-8")
    assert "hypergrad CG: hypergrad is not installed" in text
    assert_picture(tmp_path / "peers.png")


def test_a_measurement_has_a_process_of_its_own_and_says_what_went_wrong():
    assert _measure.apart("operator:add", {}) == {
        "failed": "TypeError: add expected 2 arguments, got 0"
    }
    assert _measure.apart("os:getcwd", {}) == str(_measure.ROOT)


def test_the_peak_of_memory_counts_what_was_freed_again():
    size = 64 * _measure.MIB
    with _measure.Peak() as peak:
        np.ones(size // 8).sum()
    assert 0.9 * size < peak.num_bytes < 1.5 * size


def test_the_slope_of_a_power_is_its_exponent():
    sizes = [10, 100, 1000, 10_000]
    assert scaling.slope(sizes, [float(n) ** 1.5 for n in sizes]) == pytest.approx(1.5)


def test_scaling_says_what_a_budget_chose(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra `plot` is missing: no matplotlib")

    def here(target: str, settings: dict[str, Any]) -> Any:
        return getattr(scaling, target.split(":")[1])(**settings)

    monkeypatch.setattr(scaling, "apart", here)
    monkeypatch.setattr(scaling, "DAMPING", 10.0)
    options = ["--sizes", "1000", "4000", "--ranks", "2", "4", "--size", "2000", "--rank", "4"]
    assert scaling.main([*options, "--repeats", "1", "--output", str(tmp_path)]) == 0
    text = (tmp_path / "scaling.txt").read_text(encoding="utf-8")
    assert "stored: slope" in text
    assert "`memory` must be at least" in text
    assert_picture(tmp_path / "scaling.png")
    choices = [
        f["chose"] for f in written(tmp_path, "scaling")["measurements"].values() if "chose" in f
    ]
    assert choices[0] == "stored"
    assert "streamed" in choices
