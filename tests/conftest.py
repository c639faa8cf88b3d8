"""Fixtures: every array library the core runs on, and both floating types."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before NumPy, PyTorch or JAX are loaded: one thread each, and JAX on the CPU.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import numpy as np
import pytest

hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")

EAGER = ["numpy", "array_api_strict", "torch", "jax"]
EAGER_JAX = pytest.param("jax", marks=pytest.mark.slow)  # compiles operation by operation
ON_DEVICE = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cupy", "cuda")]
EMULATED = pytest.param("emulated", marks=pytest.mark.slow)  # torch on a device that is not there
JAX_ON_DEVICE = pytest.param("jax_gpu", marks=pytest.mark.gpu)  # needs JAX_PLATFORMS=cuda,cpu
collect_ignore_glob = ["*/mesh_cases.py"]  # what processes of their own run; no doctests in it
COMPILED: dict[tuple[Callable[..., Any], str, bool], Callable[..., Any]] = {}


IN_ONE_PRECISION = (
    "test_block_conjugate_gradients",
    "test_both_iterations",
    "test_certificate",
    "test_conjugate_gradients",
    "test_kernel",
    "test_log_determinant",
    "test_neumann_series",
    "test_settings",
    "test_solve",
    "test_state",
    "test_trace",
)

SLOW_IN_JAX = (  # dozens of shapes, each compiled anew
    "test_a_matrix_of_zeros_whose_trace_is_known_needs_no_preconditioner",
    "test_a_ridge_treated_exactly_is_far_better_than_one_that_is_sampled",
    "test_a_run_cut_short_between_pairs_and_result_goes_on_bit_for_bit",
    "test_a_run_interrupted_and_resumed_has_the_same_trajectory_bit_for_bit",
    "test_chunk_size_changes_how_many_products_are_taken_at_once_and_not_the_answer",
    "test_columns_that_missed_nothing_but_rounding_are_enough_for_every_damping",
    "test_each_distance_is_right_to_its_own_digits",
    "test_every_form_in_chunks_gives_the_batched_inverse",
    "test_hparams_may_have_another_dtype_than_the_parameters",
    "test_in_float32_it_is_right_to_rounding",
    "test_negative_curvature_is_reported_where_the_ridge_does_not_make_up_for_it",
    "test_num_products_is_what_the_hessian_was_asked_for",
    "test_products_columns_and_diagonal_are_those_of_the_textbook_on_every_backend",
    "test_progress_bars_are_shown_when_asked_for",
    "test_seeds_reproduce_and_differ",
    "test_self_influence_is_the_diagonal_of_the_scores_of_the_training_set",
    "test_the_basis_is_orthonormal_for_the_worst_conditioned_columns",
    "test_the_inverse_product_is_that_of_the_damped_curvature",
    "test_the_level_lies_below_the_mean_of_what_was_missed",
    "test_top_k_is_the_sorted_head_of_the_scores",
    "test_where_nothing_is_to_be_flattened_the_preconditioner_is_the_identity",
    "test_with_leverage_the_curvature_of_the_removed_examples_goes_too",
    "test_without_a_trace_the_level_is_the_smallest_eigenvalue",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to the slow tests what costs jax many compilations.

    And, where no k×k algebra makes float32 a path of its own, compiled float32, and the strict
    library in float64: it is slow, and sees in float32 where precisions are mixed.
    """
    for item in items:
        arguments = getattr(item, "callspec", None)
        if arguments is None:
            continue
        chosen = arguments.params.get("backend"), arguments.params.get("dtype")
        other = ("jax_jit", "float32"), ("array_api_strict", "float64")
        twice = item.path.stem in IN_ONE_PRECISION and chosen in other
        in_jax = any(part == "jax" or part.startswith("jax-") for part in arguments._idlist)
        if twice or (in_jax and item.originalname in SLOW_IN_JAX):
            item.add_marker(pytest.mark.slow)


@dataclass(frozen=True)
class Backend:
    """An array library at one dtype; `run` calls a function as its users do."""

    name: str
    xp: Any
    dtype: str
    make: Callable[[np.ndarray], Any]
    is_narrow: bool = False

    def asarray(self, x: Any) -> Any:
        """Return `x` in this library: floating values in this dtype, others as they are."""
        x = np.asarray(x)
        return self.make(x.astype(self.dtype) if x.dtype.kind == "f" else x)

    def seen(self, x: Any) -> np.ndarray:
        """Return in float64 what this library sees of `x`: rounded to its dtype."""
        return np.asarray(host(x)).astype(self.dtype).astype(np.float64)

    def run(self, function: Callable[..., Any], *arrays: Any) -> Any:
        """Return ``function(*arrays)`` as NumPy arrays, compiled where the backend says so.

        Compilations are kept by function: hand over one of the module, not a new lambda.
        """
        arrays = tuple(self.asarray(x) for x in arrays)
        if self.name not in ("jax_jit", "jax_gpu"):
            return host(function(*arrays))
        import jax

        key = (function, self.name, bool(jax.config.jax_enable_x64))
        if key not in COMPILED:
            COMPILED[key] = jax.jit(function)
        return host(COMPILED[key](*arrays))

    @property
    def eps(self) -> float:
        """Machine epsilon."""
        return float(np.finfo(self.dtype).eps)


def host(x: Any) -> Any:
    """Return `x`, an array or a tuple of them, in NumPy."""
    if isinstance(x, tuple):
        parts = [host(part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if x is None or isinstance(x, (bool, int, float)):
        return x
    if type(x).__module__.startswith("torch"):
        return x.detach().cpu().numpy()
    if hasattr(x, "held"):
        return x.held.detach().numpy()
    return x.get() if hasattr(x, "get") else np.asarray(x)


@pytest.fixture(autouse=True, scope="module")
def types_of_jax_as_they_were() -> Iterator[None]:
    """Put back what a benchmark run in this process sets for all of jax."""
    yield from kept_types_of_jax()


def kept_types_of_jax() -> Iterator[None]:
    """Put back at the end whether jax has 64-bit types."""
    before = "jax" in sys.modules and sys.modules["jax"].config.jax_enable_x64
    yield
    jax = sys.modules.get("jax")
    if jax is not None and jax.config.jax_enable_x64 != before:
        jax.config.update("jax_enable_x64", before)


def x64(enabled: bool) -> Any:
    """Return a context in which jax has, or has not, 64-bit types."""
    import jax

    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(enabled)
    from jax.experimental import disable_x64, enable_x64

    return enable_x64() if enabled else disable_x64()


def on_gpu() -> Any:
    """Return a context in which jax makes arrays on a GPU, or skip the test."""
    import jax

    try:
        return jax.default_device(jax.devices("gpu")[0])
    except RuntimeError:
        pytest.skip("jax has no GPU")


@contextlib.contextmanager
def open_backend(name: str, dtype: str, *, wide: bool | None = None) -> Iterator[Backend]:
    """Yield a backend; `wide` says whether jax has 64-bit types, by default only for float64."""
    if name == "numpy":
        yield Backend(name, np, dtype, np.array)
    elif name == "array_api_strict":
        xp = pytest.importorskip("array_api_strict")
        if np.lib.NumpyVersion(np.__version__) < "2.0.0":
            pytest.skip("array_api_strict copies as NumPy 2 does")
        # As an accelerator: no operation mixes devices, and nothing but `get`, as CuPy calls it,
        # brings an array to the host.
        here, away = xp.Device("CPU_DEVICE"), xp.Device("device1")
        type(xp.ones(1)).get = lambda self: np.asarray(self.to_device(here))
        yield Backend(name, xp, dtype, lambda x: xp.asarray(x, device=away))
    elif name == "emulated":
        torch = pytest.importorskip("torch")
        from tests.adapters.torch.accelerator import Away, Transfers

        with Transfers():
            yield Backend(name, torch, dtype, lambda x: Away(torch.tensor(x)))
    elif name in ("torch", "cuda"):
        torch = pytest.importorskip("torch")
        torch.set_num_threads(1)
        if name == "cuda" and not torch.cuda.is_available():
            pytest.skip("torch finds no CUDA device")
        device = "cuda" if name == "cuda" else "cpu"
        yield Backend(name, torch, dtype, lambda x: torch.tensor(x, device=device))
    elif name == "cupy":
        cupy = pytest.importorskip("cupy")
        if not cupy.cuda.is_available():
            pytest.skip("cupy finds no CUDA device")
        yield Backend(name, cupy, dtype, cupy.asarray)
    else:
        jnp = pytest.importorskip("jax.numpy")
        wide = dtype == "float64" if wide is None else wide
        with x64(wide), on_gpu() if name == "jax_gpu" else contextlib.nullcontext():
            yield Backend(name, jnp, dtype, jnp.asarray, is_narrow=not wide)


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> str:
    """Both floating types. jax has float32 with 64-bit types switched off, as it comes."""
    return request.param


@pytest.fixture(params=[*EAGER[:-1], "jax_jit", EAGER_JAX, EMULATED, *ON_DEVICE, JAX_ON_DEVICE])
def backend(request: pytest.FixtureRequest, dtype: str) -> Iterator[Backend]:
    """Every library; jax with the function under test in ``jax.jit``, and, slow, without."""
    with open_backend(request.param, dtype) as opened:
        yield opened


@pytest.fixture(params=[*EAGER[:-1], EAGER_JAX, EMULATED, *ON_DEVICE])
def library(request: pytest.FixtureRequest, dtype: str) -> Iterator[Backend]:
    """Every library, not compiled; jax, slow: for what needs concrete arrays and much work."""
    with open_backend(request.param, dtype) as opened:
        yield opened


@pytest.fixture(params=[*EAGER, EMULATED, *ON_DEVICE])
def eager(request: pytest.FixtureRequest, dtype: str) -> Iterator[Backend]:
    """Every library, not compiled: for errors and what is quick."""
    with open_backend(request.param, dtype) as opened:
        yield opened


@pytest.fixture(params=[pytest.param("float32", marks=pytest.mark.slow), "float64"])
def jax_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The library jax, for tests of its transformations."""
    with open_backend("jax", request.param) as opened:
        yield opened


def assert_picture(path: Path) -> None:
    """The file is a picture in which something is drawn."""
    from matplotlib import image

    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > 300
    assert len(np.unique(pixels[::5, ::5, 0])) > 20
