"""Options, runs that are kept, tables, records, processes and verdicts of all experiments."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks.harness import claims, processes, timing
from benchmarks.harness.experiment import QUICK, WORKERS, Option, Run, experiment, seeds
from benchmarks.harness.report import machine, table
from tests.benchmarks.conftest import refused, text, written


def trial(body: Any, *options: Option) -> Any:
    return experiment("a-trial", "about", *options, packages=("numpy", "no-such-package"))(body)


def run_all(folder: Any, cells: dict[str, Any], *more: str, strict: bool = True) -> Any:
    """Return what one call of an experiment with these cells found."""
    found: dict[str, Any] = {}

    def twice(x: int) -> dict[str, int]:
        raise AssertionError("it has a process of its own")

    def body(run: Run) -> None:
        found.update(run.each(twice, cells, strict=strict))

    assert trial(body, WORKERS)(["--workers", "1", "--output", str(folder), *more]) == 0
    return found


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Processes that double x, unless an outcome is set for it."""
    made: list[int] = []

    def apart(target: str, settings: dict[str, Any]) -> Any:
        made.append(settings["x"])
        outcome = OUTCOMES.get(settings["x"], {"twice": 2 * settings["x"]})
        if outcome is KeyboardInterrupt:
            raise KeyboardInterrupt
        return outcome

    OUTCOMES.clear()
    monkeypatch.setattr(processes, "apart", apart)
    return made


OUTCOMES: dict[int, Any] = {}


def test_runs_that_are_done_are_not_run_again_and_changed_ones_are(tmp_path, called, capsys):
    cells = {"a": {"x": 1}, "b": {"x": 2}}
    found = run_all(tmp_path, cells)
    assert found == {"a": {"twice": 2}, "b": {"twice": 4}}
    assert "kept" not in capsys.readouterr().out
    assert (run_all(tmp_path, cells), called) == (found, [1, 2])
    assert "2 of 2 kept from an earlier call" in capsys.readouterr().out
    changed = run_all(tmp_path, cells | {"b": {"x": 5}})
    assert (changed["b"], called) == ({"twice": 10}, [1, 2, 5])
    assert (run_all(tmp_path, cells, "--anew"), called) == (found, [1, 2, 5, 1, 2])


def test_a_run_that_fails_or_is_interrupted_loses_none_that_is_done(tmp_path, called):
    cells = {name: {"x": x} for x, name in enumerate("abc", 1)}
    OUTCOMES[2] = {"failed": "ValueError: no"}
    with pytest.raises(SystemExit, match=r"1 of 3 runs failed\. b: ValueError: no"):
        run_all(tmp_path, cells)
    called.clear()
    assert run_all(tmp_path, cells, strict=False)["b"] == {"failed": "ValueError: no"}
    OUTCOMES[2] = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run_all(tmp_path, cells)
    assert called == [2, 2]
    OUTCOMES.clear()
    found = run_all(tmp_path, cells)
    assert (list(found), called) == (["a", "b", "c"], [2, 2, 2])


def test_options_have_defaults_those_of_quick_and_a_least_value(capsys):
    seen: list[Any] = []
    rank = Option("max_rank", 3, "columns", least=2)
    many = Option("sizes", [1, 2], "sizes", least=1)
    called = trial(lambda run: seen.append(run.options), seeds(5, quick=3), QUICK, rank, many)
    assert called([]) == called(["--quick"]) == called(["--quick", "--seeds", "5"]) == 0
    assert [options.seeds for options in seen] == [5, 3, 5]
    assert (seen[0].max_rank, seen[0].sizes, seen[0].quick) == (3, [1, 2], False)
    refused(called, ["--seeds", "0"], "--seeds must be at least 1; got 0", capsys)
    refused(called, ["--max-rank", "1"], "--max-rank must be at least 2; got 1", capsys)
    refused(called, ["--sizes", "4", "0"], "--sizes must be at least 1; got [4, 0]", capsys)


def test_results_are_written_with_where_they_were_measured(tmp_path, capsys):
    about = machine("numpy", "no-such-package")
    assert about["versions"]["numpy"] == np.__version__
    assert about["versions"]["no-such-package"] == "not installed"
    assert about["cores"] == os.cpu_count()
    one = claims.claim("it is so", "it is", claims.SUPPORTED)
    body = trial(lambda run: run.publish("the text", "", claims=[one], figures=[1, 2]), seeds(5))
    assert body(["--output", str(tmp_path / "new")]) == 0
    content = written(tmp_path / "new", "a_trial")
    assert content["machine"] == about | {"threads": 1, "seeds": "0…4"}
    assert (content["figures"], content["claims"]) == ([1, 2], [one])
    lines = text(tmp_path / "new", "a_trial").splitlines()
    assert lines[:4] == ["the text", "", "Paper: it is so", "Here:  it is"]
    assert f"numpy {np.__version__}" in lines[-1] and lines[-1].endswith("seeds 0…4")
    assert "the text" in capsys.readouterr().out
    assert [path.suffix for path in sorted((tmp_path / "new").iterdir())] == [".json", ".txt"]


def test_a_file_that_processes_read_is_made_once_and_again_when_it_is_gone(tmp_path, monkeypatch):
    made = []

    def apart(target: str, settings: dict[str, Any]) -> Any:
        made.append(settings)
        with open(settings["path"], "w", encoding="utf-8") as file:
            file.write("content")
        return {"size": settings["n"]}

    def body(run: Run) -> None:
        found.append(run.file(test_a_command_is_run_by_its_name, {"n": 3}))

    found: list[Any] = []
    monkeypatch.setattr(processes, "apart", apart)
    for _ in range(2):
        trial(body)(["--output", str(tmp_path)])
    assert found[0] == found[1] == {"size": 3, "path": made[0]["path"]}
    os.remove(made[0]["path"])
    trial(body)(["--output", str(tmp_path)])
    assert len(made) == 2


def test_a_command_is_run_by_its_name(tmp_path, capsys):
    assert command.main(["figure1", "--seeds", "1", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "figure1.json").exists()
    assert command.main([]) == 0
    usage = capsys.readouterr().out
    assert all(name in usage for name in command.COMMANDS)
    assert command.main(["figure0"]) == 2


def test_every_command_says_what_its_options_are(capsys):
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    pytest.importorskip("sklearn")
    for name in command.COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            command.load(name)(["--help"])
        assert f"python -m benchmarks {name}" in capsys.readouterr().out


def test_a_table_has_its_names_to_the_left_and_its_numbers_to_the_right():
    rows = [{"name": "a", "value": "1.5"}, {"name": "longer", "value": "10.25"}]
    assert table(rows).splitlines() == [
        "name    value",
        "-------------",
        "a         1.5",
        "longer  10.25",
    ]


def test_a_measurement_has_a_process_of_its_own_and_says_what_went_wrong():
    assert processes.apart("operator:add", {}) == {
        "failed": "TypeError: add expected 2 arguments, got 0"
    }
    assert processes.apart("os:getcwd", {}) == str(processes.ROOT)
    assert processes.apart("time:sleep", {}, timeout=0.01) == {"failed": "more than 0.01 s"}


def test_what_a_process_started_ends_with_it_when_its_time_is_over(tmp_path):
    late = tmp_path / "late"
    settings = {"args": ["sh", "-c", f"sleep 2; touch {late}"]}
    found = processes.apart("subprocess:run", settings, timeout=1)
    assert found == {"failed": "more than 1 s"}
    time.sleep(2)
    assert not late.exists()


def test_the_interpreter_of_a_package_is_the_first_that_has_it(monkeypatch):
    def apart(target: str, settings: dict[str, Any], python: str) -> Any:
        return "1.2" if python == "second" else {"failed": "PackageNotFoundError"}

    monkeypatch.setattr(processes, "apart", apart)
    assert processes.interpreter("some", ["first", "second"]) == ("second", "1.2")
    assert processes.interpreter("some", ["first"]) == (None, "not installed")


def test_the_peak_of_memory_counts_what_was_freed_again():
    size = 64 * timing.MIB
    with timing.Peak() as peak:
        np.ones(size // 8).sum()
    assert 0.9 * size < peak.num_bytes < 1.5 * size


def test_functions_are_timed_in_turn_and_one_beyond_the_budget_only_once():
    made: list[str] = []
    runs = {name: lambda name=name: made.append(name) for name in "ab"}
    times = timing.in_turn(runs, repeats=2, known={"a": 0.1, "b": 0.1})
    assert made == ["a", "b"] * 2
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}
    assert timing.in_turn(runs, repeats=3, budget=1.0, known={"a": 5.0, "b": 0.1})["a"] == [5.0]
    assert timing.ratio({"a": [1.0, 9.0, 4.0], "b": [1.0, 3.0, 2.0]}, "a", "b") == 2.0


def test_methods_are_comparable_within_the_sum_of_their_deviations():
    a, b, c = [0.48, 0.52], [0.54, 0.58], [0.55, 0.60]  # deviations .02, .02, .025
    assert not claims.comparable(a, b)
    assert claims.below(a, b) and claims.above(b, a)
    assert not claims.below(b, a)
    assert claims.comparable(b, c)
    assert not claims.below(b, c)
    assert claims.comparable(a, b, 0.06 + 1e-9)
    assert not claims.below(a, b, 0.06 + 1e-9)
    assert not claims.above([0.3], [0.3]) and claims.comparable([0.3], [0.3])


def test_a_claim_holds_wholly_in_part_or_not():
    assert claims.verdict([True, True]) == claims.SUPPORTED
    assert claims.verdict([True, False]) == claims.IN_PART
    assert claims.verdict([False]) == claims.NOT_SUPPORTED
    with pytest.raises(ValueError, match="`verdict` must be one of the three"):
        claims.claim("it is so", "it is", "yes")
    assert json.dumps(claims.claim("it is so", "it is", claims.IN_PART))
