"""What the paper's experiments compare is what it is said to be, and they are kept and judged."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the experiments need the extra `torch`")

import torch

import lowrank_inverse as li
from benchmarks import __main__ as command
from benchmarks.harness import claims
from benchmarks.harness.experiment import DATA, DEVICE, QUICK, WORKERS, experiment
from benchmarks.paper import everything, figure1, methods
from benchmarks.paper.weight_decay import choices, curves, figure2
from benchmarks.paper.weight_decay import problem as decay
from lowrank_inverse.low_rank.column_sampling import sample_columns
from tests.benchmarks.conftest import text, written
from tests.conftest import assert_picture

N = 12
TINY = decay.Setting(
    dimension=24, examples=60, inner_steps=20, early=2, outer_steps=3, control_steps=2
)


@pytest.fixture
def system() -> tuple[torch.Tensor, torch.Tensor]:
    """A definite matrix in float64, and a right-hand side."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=torch.float64))[0]
    b = torch.randn(N, generator=generator, dtype=torch.float64)
    return (basis * torch.logspace(0, -2, N, dtype=torch.float64)) @ basis.T, b


def solve(method: str, A: Any, b: torch.Tensor, k: int, alpha: float = 0.1) -> li.Solution:
    return methods.solvers(k, alpha, alpha)[method].prepare(A, rng=3).solve(b)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> list[Any]:
    """Settings that are tiny; the settings of each call that would have its own process."""
    monkeypatch.setattr(decay, "SETTING", TINY)
    return calls


# The methods.


@pytest.mark.parametrize("alpha", [0.01, 1.0])
def test_the_first_step_of_the_papers_cg_is_steepest_descent_at_every_alpha(system, alpha):
    A, b = system
    for solver, damping in (
        (methods.PaperCG(1, alpha), 0.0),
        (li.CG(damping=alpha, max_steps=1), alpha),
    ):
        expected = (b @ b) / (b @ (A @ b) + damping * (b @ b)) * b
        torch.testing.assert_close(solver.prepare(A).solve(b).value, expected)


def test_the_second_step_of_the_papers_cg_goes_the_first_way_again(system):
    A, b = system
    for alpha in (0.1, 1.0):
        step = (b @ b) / (alpha * (b @ (A @ b)))
        r = b - step * (A @ b)
        # Along b again, (1 + β) b, with the length that its own rule gives it.
        second = (r @ r) / (alpha * (b @ (A @ b))) / (1 + (r @ r) / (b @ b))
        found = solve(methods.PAPER_CG, A, b, 2, alpha).value
        torch.testing.assert_close(found, alpha * (step + second) * b)
    exact = torch.linalg.solve(A + 0.1 * torch.eye(N, dtype=A.dtype), b)
    cg = solve(methods.CG, A, b, 2).value
    assert abs(float(cg @ b / (cg.norm() * b.norm()))) < 0.99
    first = li.cg(A, b, damping=0.1, rtol=0.0, max_steps=1).value
    assert (cg - exact).norm() < (first - exact).norm()


def test_cg_is_exact_after_n_steps_and_the_papers_is_not(system):
    A, b = system
    exact = torch.linalg.solve(A + 0.1 * torch.eye(N, dtype=A.dtype), b)
    torch.testing.assert_close(solve(methods.CG, A, b, N).value, exact)
    undamped = torch.linalg.solve(A, b)
    for alpha in (0.01, 1.0):
        found = solve(methods.PAPER_CG, A, b, N, alpha).value
        assert (found - undamped).norm() > 0.1 * undamped.norm()


@pytest.mark.parametrize("method", [methods.PAPER_NYSTROM, methods.NYSTROM])
def test_both_forms_of_nystrom_are_the_dense_inverse_in_float64(system, method):
    A, b = system
    K = sample_columns(A, 5, rng=3)
    H, C = A.numpy(), A.numpy()[:, K]
    low_rank = C @ np.linalg.inv(H[np.ix_(K, K)]) @ C.T
    expected = np.linalg.inv(low_rank + 0.1 * np.eye(N)) @ b.numpy()
    np.testing.assert_allclose(solve(method, A, b, 5).value.numpy(), expected, rtol=1e-9)


def test_the_papers_neumann_series_has_one_term_more_than_steps_and_no_damping(system):
    A, b = system
    contraction = np.eye(N) - 0.1 * A.numpy()
    series = 0.1 * sum(np.linalg.matrix_power(contraction, j) for j in range(6))
    found = solve(methods.PAPER_NEUMANN, A, b, 5).value
    np.testing.assert_allclose(found.numpy(), series @ b.numpy(), rtol=1e-12)


def test_the_safe_neumann_series_and_nystrom_cg_approach_the_damped_inverse(system):
    A, b = system
    exact = torch.linalg.solve(A + 0.1 * torch.eye(N, dtype=A.dtype), b)
    for method in (methods.NEUMANN, methods.NYSTROM_CG):
        errors = [float((solve(method, A, b, k).value - exact).norm()) for k in (2, 6, 18)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.2 * exact.norm()
    torch.testing.assert_close(solve(methods.IDENTITY, A, b, 5).value, b)


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_has_k_products_and_at_most_one_to_judge_itself(system, method):
    A, b = system
    k, count = 6, 0

    def product(v: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1 if v.ndim == 1 else v.shape[1]
        return A @ v

    solve(method, li.FunctionOperator(product, N, like=b), b, k)
    if method == methods.IDENTITY:
        assert count <= 1
    elif method == methods.NEUMANN:  # finds its step by eight more
        assert count <= k + 9
    else:
        assert k <= count <= k + 1
    assert set(methods.PAPER_METHODS) <= set(methods.METHODS)


# Figure 1.


@pytest.fixture(scope="module")
def figure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figure")
    assert figure1.main(["--seeds", "3", "--output", str(folder)]) == 0
    return folder


def test_figure_1_draws_two_matrices_of_order_40_and_rank_20():
    for kind, A in figure1.matrices(0).items():
        assert A.shape == (40, 40)
        assert np.allclose(A, A.T, rtol=0, atol=1e-15), kind
        assert np.linalg.matrix_rank(A, tol=1e-10) == 20
        assert np.linalg.eigvalsh(A)[0] > -1e-14
        assert not np.array_equal(A, figure1.matrices(1)[kind])
    eigenvalues = np.linalg.eigvalsh(figure1.matrices(0)["eigenvalues 1/i²"])
    assert np.allclose(eigenvalues[:-21:-1], 1 / np.arange(1, 21) ** 2.0)


def test_in_figure_1_nystrom_with_the_rank_of_the_matrix_gives_its_exact_inverse(figure):
    errors = written(figure, "figure1")["relative_errors"]
    assert len(errors) == 2
    for by_name in errors.values():
        assert all(len(by_seed) == 3 for by_seed in by_name.values())
        assert max(by_name["Nyström, k = 20"]) < 1e-12
        for method in ("Nyström, k", "Neumann, l"):
            means = [np.mean(by_name[f"{method} = {size}"]) for size in (5, 10, 20)]
            assert means == sorted(means, reverse=True)
            assert means[0] < 1


def test_in_figure_1_the_errors_written_are_those_of_the_formulas(figure):
    errors = written(figure, "figure1")["relative_errors"]
    for kind, A in figure1.matrices(2).items():
        exact = np.linalg.inv(A + 0.1 * np.eye(40))
        step = 1 / (np.linalg.eigvalsh(A)[-1] + 0.1)  # what 8 power iterations estimate
        contraction = np.eye(40) - step * (A + 0.1 * np.eye(40))
        series = step * sum(np.linalg.matrix_power(contraction, j) for j in range(20))
        wanted = np.linalg.norm(series - exact) / np.linalg.norm(exact)
        assert errors[kind]["Neumann, l = 20"][2] == pytest.approx(wanted, rel=0.1)


def test_figure_1_has_its_picture_and_its_table(figure):
    assert_picture(figure / "figure1.png")
    lines = text(figure, "figure1")
    assert all(name in lines for name in figure1.approximations(0))
    assert "Mean and deviation over 3 matrices" in lines


def test_the_verdict_on_figure_1_counts_the_matrices():
    def errors(five: float) -> dict[str, list[float]]:
        names = figure1.approximations(0)
        return {n: [five if n.startswith("Nyström") else 0.5] for n in names}

    both = figure1.judge({"a": errors(0.01), "b": errors(0.02)})
    assert [c["verdict"] for c in both] == [claims.SUPPORTED] * 2
    one = figure1.judge({"a": errors(0.01), "b": errors(0.9)})
    assert [c["verdict"] for c in one] == [claims.IN_PART] * 2
    none = figure1.judge({"a": errors(0.2), "b": errors(0.9)})
    assert [c["verdict"] for c in none] == [claims.NOT_SUPPORTED, claims.IN_PART]


# Figures 2, 3 and 4.


def test_the_inner_problem_is_descended_along_its_own_gradient():
    problem = decay.Problem(1, TINY)
    with torch.no_grad():
        problem.phi.copy_(torch.linspace(0, 2, TINY.dimension))
    losses = problem.descend()
    found = problem.theta.detach().clone()
    assert losses[0] == pytest.approx(np.log(2), rel=1e-5)
    assert losses[-1] == pytest.approx(problem.cross_entropy().item())
    with torch.no_grad():
        problem.theta.zero_()
    for _ in range(TINY.inner_steps):
        (gradient,) = torch.autograd.grad(problem.inner(), problem.theta)
        with torch.no_grad():
            problem.theta -= TINY.inner_rate * gradient
    torch.testing.assert_close(found, problem.theta.detach())


def test_the_exact_hypergradient_is_that_of_autograd_with_the_ridge_inside_or_outside():
    problem = decay.Problem(2, TINY)
    problem.descend()
    q, exact = problem.exact()
    found = decay.hypergradient(problem, decay.EXACT, 5, 0.01, 0)
    torch.testing.assert_close(found.grads, exact.float(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.ihvp, q.float(), rtol=1e-4, atol=1e-7)
    # With all columns and hardly a damping, what is left is the ridge, which has to be φ.
    closed = decay.hypergradient(problem, decay.KNOWN_RIDGE, TINY.dimension, 1e-6, 0)
    torch.testing.assert_close(closed.grads, exact.float(), rtol=1e-3, atol=1e-6)


def test_a_controlled_step_has_the_length_it_is_said_to_have():
    setting = decay.Setting(
        dimension=8, examples=30, outer_steps=1, control_steps=1, least_decay=-10.0
    )
    problem = decay.Problem(0, setting)

    def length(method: str, control: str | float) -> tuple[float, Any]:
        curve = decay.follow(problem, method, 5, 0.1, control, 0)
        return float((problem.phi.detach() - 1).norm()), curve

    identity = methods.IDENTITY
    moved, own = length(identity, decay.OWN)
    assert moved == pytest.approx(own.norms[0], rel=1e-4)
    assert length(identity, 0.3)[0] == pytest.approx(0.3, rel=1e-4)
    moved, exact = length(identity, decay.AS_EXACT)
    assert moved == pytest.approx(exact.exact_norms[0], rel=1e-4)
    _, nystrom = length(methods.PAPER_NYSTROM, decay.OWN)
    moved, _ = length(identity, decay.AS_NYSTROM)
    assert moved == pytest.approx(nystrom.norms[0], rel=1e-4)
    assert nystrom.norms[0] != pytest.approx(own.norms[0], rel=0.05)


def test_a_run_that_diverges_is_cut_short_and_said_to():
    problem = decay.Problem(0, decay.Setting(dimension=8, examples=30))
    curve = decay.follow(problem, methods.IDENTITY, 5, 0.01, 1e6, 0)
    assert len(curve.validation) < 10
    assert np.isfinite(curve.validation).all()
    losses = curves.losses([vars(curve), {"validation": [0.5] * 20}], 10)
    assert losses == [np.inf, 0.5]
    assert curves.entry(losses) == "diverges, 1 of 2"
    assert curves.entry([0.5, 0.7], ".1f") == "0.6 ± 0.1"


def test_a_loss_is_lower_where_it_is_by_more_than_both_deviations():
    lower = curves.lower
    assert lower([1.0, 1.2], [[2.0, 2.2], [np.inf, 1.0]]) == claims.SUPPORTED
    assert lower([1.0, 2.0], [[1.1, 2.2], [9.0, 9.0]]) == claims.IN_PART
    assert lower([1.0, 2.0], [[1.0, 1.0], [9.0, 9.0]]) == claims.NOT_SUPPORTED
    assert lower([1.0, np.inf], [[5.0, 5.0]]) == claims.NOT_SUPPORTED


@pytest.mark.parametrize(
    ("second", "verdict"),
    [
        (0.32, claims.SUPPORTED),
        (0.38, claims.IN_PART),
        (0.6, claims.NOT_SUPPORTED),
        (np.inf, claims.NOT_SUPPORTED),
    ],
)
def test_a_choice_makes_no_difference_within_a_tenth_of_the_gain(second, verdict):
    values = {"k = 5": [0.3, 0.3], "k = 10": [second, second]}
    assert curves.steady("paper", values, [0.7, 0.7])["verdict"] == verdict


@pytest.mark.slow
def test_figure_2_runs_from_end_to_end_and_is_not_run_twice(tmp_path, tiny):
    arguments = ["--quick", "--seeds", "2", "--workers", "1", "--output", str(tmp_path)]
    assert figure2.main(arguments) == 0
    assert [settings["seed"] for settings in tiny] == [0, 1]
    results = written(tmp_path, "figure2")
    lines = text(tmp_path, "figure2")
    assert len(results["claims"]) == 3
    assert claims.told(results["claims"]) in lines
    assert_picture(tmp_path / "figure2.png")
    assert len(results["curves"]) == len(decay.METHODS) * len(figure2.CONTROLS)
    own = results["curves"][decay.label(methods.CG, 5, 0.01)]
    assert [len(curve["validation"]) for curve in own] == [TINY.outer_steps + 1] * 2
    assert own[0]["validation"] != own[1]["validation"]
    assert all(lines.count(f"\n{method} ") >= 2 for method in decay.METHODS[1:])
    assert figure2.main(arguments) == 0
    assert len(tiny) == 2
    assert written(tmp_path, "figure2")["claims"] == results["claims"]


@pytest.mark.parametrize("name", ["figure3", pytest.param("figure4", marks=pytest.mark.slow)])
def test_figures_3_and_4_have_a_curve_for_every_choice(tmp_path, tiny, name):
    assert getattr(choices, name)(["--quick", "--seeds", "1", "--output", str(tmp_path)]) == 0
    results = written(tmp_path, name)
    assert len(results["curves"]) == 3 * len(decay.METHODS)
    exact = [curves for key, curves in results["curves"].items() if key.startswith("exact")]
    assert exact[0] == exact[1] == exact[2]
    assert all(c["verdict"] and c["ours"] for c in results["claims"])
    assert_picture(tmp_path / f"{name}.png")
    assert len(tiny) == 1


def test_figure_3_counts_the_pairs_in_which_nystrom_is_lower(monkeypatch):
    def judged(nystrom: float) -> Any:
        found = {}
        for method in decay.METHODS:
            for alpha in choices.ALPHAS:
                last = nystrom if method == methods.PAPER_NYSTROM and alpha < 1 else 0.5
                curve = {"validation": [0.7, last], "norms": [2.0], "exact_norms": [1.0]}
                found[decay.label(method, 5, alpha)] = [curve]
        return choices.judge_dampings(found)

    monkeypatch.setattr(decay, "SETTING", decay.Setting(early=1))
    most, robust = judged(0.3)
    assert most["verdict"] == claims.SUPPORTED
    assert "in 4 of 6 pairs" in most["ours"]
    assert robust["verdict"] == claims.NOT_SUPPORTED
    most, robust = judged(0.5)
    assert (most["verdict"], robust["verdict"]) == (claims.NOT_SUPPORTED, claims.SUPPORTED)


# All of them.


class Fakes:
    """Experiments that write what they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.called: list[tuple[str, Any]] = []
        self.outcomes: dict[str, Any] = {}
        names = ("one", "two", "three")
        monkeypatch.setattr(everything, "EXPERIMENTS", {name.title(): name for name in names})
        for name in names:
            module = types.ModuleType(f"benchmarks.fake_{name}")
            options = (QUICK, DATA, DEVICE, WORKERS)
            module.main = experiment(name, "a fake", *options)(self.run)
            monkeypatch.setitem(sys.modules, module.__name__, module)
            monkeypatch.setitem(command.COMMANDS, name, (f"fake_{name}", "a fake"))

    def run(self, run: Any) -> int:
        self.called.append((run.name, run.options))
        outcome = self.outcomes.get(run.name, 0)
        if isinstance(outcome, BaseException):
            raise outcome
        one = claims.claim(f"{run.name} holds", f"it does, {'very ' * 30}", claims.SUPPORTED)
        run.publish("text", claims=[] if outcome == "no claims" else [one])
        return outcome if isinstance(outcome, int) else 0

    def names(self) -> list[str]:
        found = [name for name, _ in self.called]
        self.called.clear()
        return found


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(monkeypatch)


def test_all_experiments_end_in_one_summary_and_are_not_run_again(tmp_path, fakes, capsys):
    arguments = ["--quick", "--data-dir", "there", "--output", str(tmp_path)]
    assert command.main(["paper", *arguments]) == 0
    given = fakes.called[0][1]
    assert (given.quick, given.data_dir, given.workers) == (True, Path("there"), 2)
    assert fakes.names() == ["one", "two", "three"]
    summary = written(tmp_path, "paper")["experiments"]
    assert list(summary) == ["One", "Two", "Three"]
    assert summary["Two"]["claims"][0]["verdict"] == "supported"
    assert all(found["seconds"] > 0 for found in summary.values())
    lines = text(tmp_path, "paper")
    assert "Verdicts: 3 supported, 0 in part, 0 not supported." in lines
    assert max(map(len, lines.split("\n\nVerdicts")[0].splitlines())) < 135
    assert everything.main(arguments) == 0
    assert fakes.names() == []
    assert written(tmp_path, "paper")["experiments"] == summary
    (tmp_path / "two.json").unlink()
    assert everything.main(arguments) == 0
    assert fakes.names() == ["two"]
    assert everything.main(["--output", str(tmp_path)]) == 0
    assert fakes.names() == ["one", "two", "three"]  # the full setting is another one


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (SystemExit("put the data there"), "put the data there"),
        (SystemExit(2), "it ended with 2"),
        (ValueError("no such thing"), "no such thing"),
        (3, "it ended with 3"),
        ("no claims", "has no claims"),
    ],
)
def test_one_that_fails_is_named_and_the_next_one_begins(tmp_path, fakes, capsys, outcome, reason):
    fakes.outcomes["two"] = outcome
    assert everything.main(["--output", str(tmp_path)]) == 1
    assert fakes.names() == ["one", "two", "three"]
    assert "Failed: Two." in capsys.readouterr().out
    summary = written(tmp_path, "paper")["experiments"]
    assert reason in summary["Two"]["failed"]
    assert "claims" in summary["Three"]
    assert "failed" in (tmp_path / "paper.txt").read_text(encoding="utf-8")
    fakes.outcomes.clear()
    assert everything.main(["--output", str(tmp_path)]) == 0
    assert fakes.names() == ["two"]


def test_an_older_result_is_not_taken_for_that_of_a_run_that_failed(tmp_path, fakes):
    (tmp_path / "two.json").write_text('{"claims": []}', encoding="utf-8")
    fakes.outcomes["two"] = ValueError("no")
    assert everything.main(["--output", str(tmp_path)]) == 1
    assert not (tmp_path / "two.json").exists()


def test_an_interruption_says_what_is_left_and_is_taken_up_there(tmp_path, fakes, capsys):
    fakes.outcomes["two"] = KeyboardInterrupt()
    assert everything.main(["--output", str(tmp_path)]) == everything.INTERRUPTED
    assert fakes.names() == ["one", "two"]
    assert "Interrupted. Left: Two, Three." in capsys.readouterr().out
    assert not (tmp_path / "paper.json").exists()
    fakes.outcomes.clear()
    assert everything.main(["--output", str(tmp_path)]) == 0
    assert fakes.names() == ["two", "three"]


def test_the_experiments_of_the_paper_are_commands_and_take_their_options(tmp_path):
    options = types.SimpleNamespace(
        quick=True, data_dir=Path("d"), device="cpu", workers=2, output=tmp_path
    )
    for title, name in everything.EXPERIMENTS.items():
        arguments = everything.arguments_of(name, options)
        assert ("--data-dir" in arguments) == (
            title in ("Table 2", "Table 3", "Table 4", "Table 6")
        )
        assert ("--quick" in arguments) == (title != "Figure 1")
        assert ("--workers" in arguments) == (title not in ("Figure 1", "Table 5"))
    assert everything.arguments_of("figure1", options) == ["--output", str(tmp_path)]


def test_one_experiment_of_the_paper_can_be_asked_for(tmp_path, capsys):
    assert everything.main(["--only", "Figure 1", "--output", str(tmp_path)]) == 0
    assert list(written(tmp_path, "paper")["experiments"]) == ["Figure 1"]
    assert_picture(tmp_path / "figure1.png")
