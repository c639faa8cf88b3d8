"""KFAC, EK-FAC and subsampled Gauss-Newton matrices against dense ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_inverse as li
from lowrank_inverse_torch import KFAC, InfluenceFunction, SubsampledGaussNewton
from lowrank_inverse_torch.kronecker.output_roots import output_root
from tests.adapters.torch.models import Tied, assert_unchanged, frozen, mlp, snapshot

NUM = 12


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    losses = F.cross_entropy(output.movedim(-1, 1), target, reduction="none", ignore_index=-1)
    return losses.reshape(len(output), -1).sum(dim=1)


def squared(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).flatten(1).sum(dim=1) / 2


def dense(model: nn.Module, loss: Any, train: tuple[Tensor, Tensor]) -> Tensor:
    """Return the Gauss-Newton matrix by jacobians on a functional copy, in float64."""
    kept = {k: p.detach().double() for k, p in model.named_parameters() if p.requires_grad}
    rest = {k: p.detach().double() for k, p in model.named_parameters() if not p.requires_grad}
    flat = torch.cat([p.reshape(-1) for p in kept.values()])
    x, y = train
    x = x.double() if x.is_floating_point() else x
    y = y.double() if y.is_floating_point() else y

    def outputs(flat: Tensor, i: int) -> Tensor:
        parts = flat.split([p.numel() for p in kept.values()])
        values = {k: q.reshape(p.shape) for (k, p), q in zip(kept.items(), parts, strict=True)}
        return torch.func.functional_call(model, values | rest, (x[i : i + 1],))

    total = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for i in range(len(x)):
        z = outputs(flat, i)
        J = torch.func.jacrev(lambda v, i=i: outputs(v, i).reshape(-1))(flat)
        H = torch.func.hessian(lambda z, i=i: loss(z, y[i : i + 1]).sum())(z)
        total += J.mT @ H.reshape(z.numel(), -1) @ J
    return total / len(x)


class GPTLinear(nn.Module):
    """A linear map with its weight transposed, under the name that transformers gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.nf, self.weight = 3, nn.Parameter(torch.randn(4, 3))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


GPTLinear.__name__ = "Conv1D"


class Twice(nn.Module):
    """A layer that is called twice, and an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act, self.out = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.layer(self.act(self.layer(x)))))


def images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (3,)),
    "no bias": (lambda: mlp(bias=False), (3,)),
    "twice": (Twice, (4,)),
    "sequence": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (2, 3)),
    "transposed": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), GPTLinear()), (4,)),
    "conv": (lambda: images(nn.Conv2d(2, 3, 3, stride=2, padding=1)), (2, 5, 4)),
    "dilated": (lambda: images(nn.Conv2d(1, 2, (1, 2), dilation=2, bias=False)), (1, 3, 4)),
    "circular": (
        lambda: images(nn.Conv1d(2, 2, 3, padding="same", padding_mode="circular")),
        (2, 4),
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)


def problem(name: str, dtype: Any = None) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(NUM, *shape)
    model(x)  # so that a lazy layer has its shape
    y = torch.randint(0, 3, (NUM, *shape[:-1]) if name == "sequence" else (NUM,))
    dtype = dtype or torch.float64
    return model.to(dtype), (x.to(dtype), y)


def basis(block: Any) -> tuple[Tensor, Tensor]:
    """Return the places of a block in the vector, and its eigenvectors, column by column."""
    Q = torch.kron(block.left, block.right)
    o, i = block.eigenvalues.shape
    places = torch.arange(10_000)[None]
    return block.layer.matrices(places).reshape(-1), Q.reshape(o * i, -1)


def approximate(kfac: KFAC) -> Tensor:
    """Return the matrix that KFAC stands for."""
    C = torch.diag(kfac.diagonal)
    for block in kfac.blocks:
        places, Q = basis(block)
        C[places[:, None], places] = Q @ torch.diag(block.eigenvalues.reshape(-1)) @ Q.mT
    return C


def close(a: Tensor, b: Tensor, rtol: float = 1e-9) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= rtol * b.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("corrected", [True, False])
def test_kfac_of_a_linear_model_with_a_squared_loss_is_exact(dtype, corrected):
    torch.manual_seed(0)
    model, train = (
        nn.Linear(4, 3).to(dtype),
        (torch.randn(NUM, 4, dtype=dtype), torch.zeros(NUM, 3).to(dtype)),
    )
    kfac = KFAC(model, squared, train, eigenvalue_correction=corrected)
    H, rtol = dense(model, squared, train), 1e3 * torch.finfo(dtype).eps
    eye = torch.eye(15, dtype=torch.float64)
    exact = torch.linalg.inv(H + 0.1 * eye)
    assert close((kfac.inverse(0.1) @ eye.to(dtype)).double(), exact, rtol)
    influence = InfluenceFunction(model, squared, train, solver=kfac, damping=0.1)
    influence.scores(train)
    assert influence.info.relative_residual.max() <= rtol
    assert influence.info.message.endswith("converged")


def test_kfac_of_each_layer_of_a_deep_linear_network_is_exact():
    """The gradients by the outputs of a layer are the same for each example (Bernacchia 2018)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 3)).double()
    train = torch.randn(NUM, 3).double(), torch.zeros(NUM, 3).double()
    H, C = (
        dense(model, squared, train),
        approximate(KFAC(model, squared, train, eigenvalue_correction=False)),
    )
    for start, stop in ((0, 16), (16, 26), (26, 35)):
        assert close(C[start:stop, start:stop], H[start:stop, start:stop])


@each_model
def test_corrected_eigenvalues_are_the_diagonal_in_the_kronecker_basis(name):
    """No other diagonal there is closer in the norm of Frobenius (George et al. 2018)."""
    model, train = problem(name)
    H, kfac = dense(model, cross_entropy, train), KFAC(model, cross_entropy, train)
    plain = KFAC(model, cross_entropy, train, eigenvalue_correction=False)
    assert len(kfac.blocks) == 2
    assert kfac.names == []
    for block, without in zip(kfac.blocks, plain.blocks, strict=True):
        places, Q = basis(block)
        own = H[places[:, None], places]
        assert close(block.eigenvalues.reshape(-1), torch.diagonal(Q.mT @ own @ Q))
        assert close(block.left.abs(), without.left.abs(), 1e-6)
        error = own - Q @ torch.diag(block.eigenvalues.reshape(-1)) @ Q.mT
        worse = own - Q @ torch.diag(without.eigenvalues.reshape(-1)) @ Q.mT
        assert error.norm() <= worse.norm() * (1 + 1e-9)
        # The trace is that of the matrix; of KFAC it is where positions are not shared.
        assert close(block.eigenvalues.sum()[None], own.trace()[None])


@each_model
def test_the_inverse_is_an_inverse_and_positive_definite(name):
    model, train = problem(name)
    kfac = KFAC(model, cross_entropy, train)
    C, n = approximate(kfac), len(kfac.diagonal)
    inverse = kfac.inverse(0.05)
    P = inverse @ torch.eye(n, dtype=torch.float64)
    assert close(P, torch.linalg.inv(C + 0.05 * torch.eye(n).double()))
    assert close(P, P.mT)
    assert torch.linalg.eigvalsh((P + P.mT) / 2).min() > 0
    assert close(inverse @ P[:, 0], P @ P[:, 0])
    shifts = torch.rand(n).double() + 0.1
    M = kfac.inverse(shifts) @ torch.eye(n, dtype=torch.float64)
    for block in kfac.blocks:  # a vector is replaced by its mean
        shifts[basis(block)[0]] = shifts[basis(block)[0]].mean()
    assert close(M, torch.linalg.inv(C + torch.diag(shifts)))


def test_random_vectors_at_the_outputs_have_the_exact_factors_in_the_mean():
    model, train = problem("mlp")
    exact = approximate(KFAC(model, cross_entropy, train))
    found = KFAC(model, cross_entropy, train, num_samples=400)
    assert found.num_vectors == 400
    assert close(approximate(found), exact, 0.2)
    assert not close(approximate(found), exact, 1e-3)
    again = KFAC(model, cross_entropy, train, num_samples=400)
    assert torch.equal(approximate(found), approximate(again))


class Others(nn.Module):
    """An embedding, a norm, and attention whose weights are packed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.embed(x))
        return self.head(self.attend(h, h, h, need_weights=False)[0].mean(dim=1))


def test_other_parameters_have_the_diagonal():
    torch.manual_seed(0)
    model = Others().double()
    train = torch.randint(0, 5, (NUM, 3)), torch.randint(0, 3, (NUM,))
    kfac = KFAC(model, cross_entropy, train, num_samples=200)
    assert [block.layer.name for block in kfac.blocks] == ["head"]
    assert kfac.names == [
        name for name, _ in model.named_parameters() if not name.startswith("head")
    ]
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        exact = torch.diagonal(dense(model, cross_entropy, train)).clone()
    exact[basis(kfac.blocks[0])[0]] = 0
    # 400 squares, of relative variance 2 each
    assert close(kfac.diagonal, exact, 4 * (2 / 400) ** 0.5)
    assert "diagonal" in repr(kfac)


def test_a_weight_that_is_used_twice_has_the_diagonal():
    torch.manual_seed(0)
    model = Tied().double()
    train = torch.randn(NUM, 3).double(), torch.randint(0, 3, (NUM,))
    kfac = KFAC(model, cross_entropy, train)
    assert kfac.blocks == []
    assert "encode.weight" in kfac.names


def test_a_frozen_bias_is_in_no_block():
    torch.manual_seed(0)
    model = frozen().double()
    train = torch.randn(NUM, 3).double(), torch.randint(0, 3, (NUM,))
    kfac = KFAC(model, cross_entropy, train)
    assert [tuple(block.eigenvalues.shape) for block in kfac.blocks] == [(4, 3)]
    assert kfac.names == ["2.bias"]


def test_the_model_comes_back_as_it_was():
    model, train = problem("conv")
    model.train()
    before = snapshot(model)
    KFAC(model, cross_entropy, train, rng=3)
    SubsampledGaussNewton(model, cross_entropy, train, rank=3)
    assert_unchanged(model, before)


# Roots

Y = torch.tensor([[0, 2], [1, -1], [2, 2]])
WEIGHTS = torch.tensor([1.0, 2.0, 0.5]).double()
RIDGES = [0.0, 0.1, {"0.weight": 0.3, "0.bias": 0.0, "2.weight": 0.1, "2.bias": 0.2}]
LOSSES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "softmax": (lambda z: cross_entropy(z, Y), (3, 2, 3)),
    "weights": (
        lambda z: F.cross_entropy(z, Y[:, 0], WEIGHTS, reduction="none"),
        (3, 3),
    ),
    "squared": (lambda z: (z**2).flatten(1).sum(dim=1), (3, 2, 4)),
    "sigmoid": (lambda z: F.softplus(z).sum(dim=1), (3, 3)),
    "linear": (lambda z: z.sum(dim=1), (3, 3)),
    "other": (lambda z: (z**2).sum(dim=1) ** 2 + z[:, 0].exp(), (3, 3)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_root_times_its_transpose_is_the_hessian(name):
    loss, shape = LOSSES[name]
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=generator).double()
    root = output_root(loss, z, generator)
    H = torch.func.hessian(lambda z: loss(z).sum())(z).reshape(z.numel(), -1)
    S = torch.stack([root(e.reshape(shape)).reshape(-1) for e in torch.eye(z.numel()).double()], 1)
    assert close(S @ S.mT, H) if name != "linear" else not S.any()


def test_a_loss_of_many_outputs_must_have_a_known_hessian():
    z = torch.randn(2, 65).double()
    with pytest.raises(ValueError, match=r"squared error.*64 outputs.*got 65.*NystromCG"):
        output_root(lambda z: (z**2).sum(dim=1) ** 2, z, torch.Generator())


# As preconditioner and as solver


def test_settings_are_a_preconditioner():
    M = torch.diag(torch.arange(1.0, 9.0).double() ** 3)
    b = torch.ones(8).double()
    plain = li.solve(M, b, solver=li.CG(damping=0.5, rtol=1e-10))
    settings = li.CG(damping=0.5, rtol=1e-10, preconditioner=li.Nystrom(rank=8))
    found = li.solve(M, b, solver=settings)
    assert close(found.value, plain.value)
    assert found.num_steps == 1 < plain.num_steps
    assert found.num_products == 8 + 2  # the columns, a step, and the residual


@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("make", [KFAC, SubsampledGaussNewton])
def test_conjugate_gradients_end_at_the_same_answer(make, ridge):
    model, train = problem("mlp")
    settings = make(model, cross_entropy, train)
    options: dict[str, Any] = {"ridge": ridge, "damping": 0.01}
    exact = InfluenceFunction(model, cross_entropy, train, solver=li.Exact(), **options)
    solver = li.CG(preconditioner=settings, rtol=1e-11)
    influence = InfluenceFunction(model, cross_entropy, train, solver=solver, **options)
    assert close(influence.scores(train), exact.scores(train), 1e-8)
    alone = InfluenceFunction(model, cross_entropy, train, solver=settings, **options)
    alone.scores(train)
    assert alone.info.num_products == NUM  # for the residuals


def test_a_solver_without_damping_is_refused():
    model, train = problem("mlp")
    kfac = KFAC(model, cross_entropy, train)
    with pytest.raises(ValueError, match="`damping`, with the ridge, must be positive"):
        InfluenceFunction(model, cross_entropy, train, solver=kfac).scores(train)


# Subsampled


@pytest.mark.parametrize("name", ["mlp", "conv", "sequence"])
def test_all_terms_are_the_gauss_newton_matrix_and_some_are_below_it(name):
    model, train = problem(name)
    H = dense(model, cross_entropy, train)
    U = SubsampledGaussNewton(model, cross_entropy, train, rank=10_000).columns
    assert close(U @ U.mT, H)
    some = SubsampledGaussNewton(model, cross_entropy, train, rank=5).columns
    assert some.shape == (len(H), 5)
    left_out = torch.linalg.eigvalsh(H - some @ some.mT)
    assert left_out.min() >= -1e-12 * left_out.max()
    assert left_out.sum() < H.trace()


def test_the_condition_number_is_that_of_frangella_et_al():
    """Their Proposition 5.3 needs no more than that the approximation is below the matrix."""
    model, train = problem("conv")
    H = dense(model, cross_entropy, train)
    terms, damping = SubsampledGaussNewton(model, cross_entropy, train, rank=25), 0.01
    eye = torch.eye(len(H), dtype=torch.float64)
    P = terms.prepare(li.shifted(H, damping)).preconditioner @ eye
    w = torch.linalg.eigvals(P @ (H + damping * eye)).real
    error = torch.linalg.matrix_norm(H - terms.columns @ terms.columns.mT, 2)
    least = torch.linalg.eigvalsh(terms.columns.mT @ terms.columns).min()
    assert w.min() > 0
    assert w.max() / w.min() <= (least + error + damping) / damping
    assert w.max() / w.min() < torch.linalg.cond(H + damping * eye) / 2


def test_terms_of_batches_that_are_dicts():
    model, (x, y) = problem("mlp")

    def loss(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return cross_entropy(output, batch["y"])

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.inner(x)

    found = SubsampledGaussNewton(Named(), loss, {"x": x, "y": y}, rank=7, batch_size=5)
    U = SubsampledGaussNewton(model, cross_entropy, (x, y), rank=7).columns
    assert close(found.columns @ found.columns.mT, U @ U.mT)


def test_a_flat_loss_has_no_terms():
    model, (x, _) = problem("mlp")
    with pytest.raises(ValueError, match="Gauss-Newton matrix is 0"):
        SubsampledGaussNewton(model, lambda z, y: z.sum(dim=1), (x, x))
