"""Language models: tokens, padding, adapters, tied weights, checkpointing, logits in pieces."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank_inverse as li
from lowrank_inverse_torch import InfluenceFunction
from lowrank_inverse_torch.curvature import gauss_newton

VOCABULARY, WIDTH, LENGTH, IGNORED = 5, 4, 4, -100
DAMPING = 0.5


class Block(nn.Module):
    """Causal attention and a perceptron, each added to what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.after(x))))


class Transformer(nn.Module):
    """A causal language model whose last layer has the weights of the first."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.block = Block()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.words.weight
        self.reentrant = reentrant
        self.double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        length = input_ids.shape[1]
        x = self.words(input_ids) + self.places.weight[:length]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        mask = causal & attention_mask.bool()[:, None, None, :]
        if self.reentrant is None:
            x = self.block(x, mask)
        else:
            x = checkpoint(self.block, x, mask, use_reentrant=self.reentrant)
        return {"hidden": x, "logits": self.head(x), "mean": self.head(x).mean()}


def next_tokens(output: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of each token but the first, 0 where there is padding."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)[:, 1:]
    logits = output["logits"][:, :-1].transpose(1, 2)
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)


def sequences(output: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    return next_tokens(output, batch).sum(1)


def texts(num: int, seed: int, longest: int = LENGTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (num, longest), generator=generator)
    lengths = torch.randint(2, longest + 1, (num, 1), generator=generator)
    mask = (torch.arange(longest) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


TRAIN, QUERY = texts(6, 1), texts(2, 2)


def rows(batch: dict[str, Tensor], start: int, stop: int) -> Any:
    return {name: x[start:stop] for name, x in batch.items()}


def dense(model: nn.Module, params: list[Tensor], train: Any = TRAIN) -> tuple[Tensor, ...]:
    """Return the Gauss-Newton matrix, and the gradients of each token, by jacobians of rows."""

    def jacobian(values: Tensor) -> Tensor:
        flat = values.reshape(-1)
        grads = torch.autograd.grad(
            flat, params, torch.eye(len(flat)).double(), is_grads_batched=True
        )
        return torch.cat([g.flatten(1) for g in grads], dim=1).reshape(*values.shape, -1)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        J = jacobian(model(**train)["logits"])[:, :-1]
        p = model(**train)["logits"][:, :-1].softmax(-1).detach()
        of_train = jacobian(next_tokens(model(**train), train))
        of_query = jacobian(next_tokens(model(**QUERY), QUERY))
    middle = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    seen = train["attention_mask"][:, 1:].double()
    H = torch.einsum("it,itcn,itcd,itdm->nm", seen, J, middle, J) / len(seen)
    return H, of_train, of_query


def expected(model: nn.Module, params: Any = None) -> Tensor:
    """Return the scores of training tokens on the tokens of queries: (2, 3, 6, 3)."""
    H, of_train, of_query = dense(model, list(model.parameters() if params is None else params))
    inverse = torch.linalg.inv(H + DAMPING * torch.eye(len(H)).double())
    return torch.einsum("qsn,nm,itm->qsit", of_query, inverse, of_train)


def influence(model: nn.Module, loss: Any = next_tokens, train: Any = TRAIN, **options: Any) -> Any:
    arguments: dict[str, Any] = {"solver": li.CG(rtol=1e-10), "damping": DAMPING}
    return InfluenceFunction(model, loss, train, **{**arguments, **options})


def assert_close(actual: Tensor, wanted: Tensor, rtol: float = 1e-8) -> None:
    assert actual.shape == wanted.shape
    assert (actual - wanted).abs().max() <= rtol * wanted.abs().max()


def test_sequences_and_tokens_have_the_influence_of_the_dense_formula():
    model = Transformer()
    ours, wanted = influence(model), expected(model)
    for method in ("jvp", "gradients"):
        assert_close(ours.scores(QUERY, method=method), wanted.sum((1, 3)))
    assert_close(ours.token_scores(QUERY), wanted.sum(1))
    assert_close(ours.token_scores(QUERY, of="query"), wanted.sum(3))
    best = ours.top_k(QUERY, 2).indices[0]
    assert np.array_equal(best, wanted.sum((1, 3))[0].argsort(descending=True)[:2])
    assert_close(influence(model, sequences).scores(QUERY), wanted.sum((1, 3)))


def test_padding_and_the_length_of_a_batch_change_nothing():
    model = Transformer()
    wanted = influence(model).token_scores(QUERY)
    order = TRAIN["attention_mask"].sum(1).argsort(stable=True)
    short = {name: x[order[:4], :3] for name, x in TRAIN.items()}
    ragged = [short, {name: x[order[4:]] for name, x in TRAIN.items()}]
    found = influence(model, train=ragged).token_scores(QUERY)
    assert_close(found, wanted[:, order])
    ignored = TRAIN["attention_mask"][order, 1:] == 0
    assert ignored.any() and torch.all(found[:, ignored] == 0)
    few = influence(model).token_scores([rows(QUERY, 0, 1), rows(QUERY, 1, 2)], rows(TRAIN, 2, 4))
    assert_close(few, wanted[:, 2:4])
    narrow = influence(model, memory_budget=1).token_scores(QUERY, of="query")
    assert_close(narrow, influence(model).token_scores(QUERY, of="query"))


def test_tokens_need_a_loss_that_tells_them_apart():
    ours = influence(Transformer(), sequences)
    for of in ("train", "query"):
        with pytest.raises(ValueError, match=r"one number per token, shape \(size, tokens\)"):
            ours.token_scores(QUERY, of=of)
    with pytest.raises(ValueError, match="`of` must be one of 'train', 'query'; got 'both'"):
        ours.token_scores(QUERY, of="both")
    assert_close(
        ours.token_scores(QUERY, of="query", query_loss=next_tokens).sum(1), ours.scores(QUERY)
    )


class Adapted(nn.Module):
    """A frozen linear layer and a product of low rank beside it, as in LoRA."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.layer = layer.requires_grad_(False)
        shapes = (layer.in_features, 2), (2, layer.out_features)
        draws = [torch.randn(shape, generator=generator).to(layer.weight) for shape in shapes]
        self.down, self.up = map(nn.Parameter, draws)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down @ self.up


def test_adapters_of_low_rank_and_parts_of_a_model_are_what_is_differentiated_by():
    model = Transformer().requires_grad_(False)
    model.block.qkv = Adapted(model.block.qkv)
    adapter = [model.block.qkv.down, model.block.qkv.up]
    assert influence(model).info.num_params == 2 * (WIDTH + 3 * WIDTH)
    wanted = expected(model, adapter).sum((1, 3))
    for method in ("jvp", "gradients"):
        assert_close(influence(model).scores(QUERY, method=method), wanted)
    whole = Transformer()
    part = influence(whole, params=whole.block.down)
    assert_close(part.scores(QUERY), expected(whole, whole.block.down.parameters()).sum((1, 3)))


def test_a_frozen_body_in_bfloat16_leaves_the_curvature_of_its_adapters_in_float32():
    wide = Transformer().float().requires_grad_(False).bfloat16()
    narrow = copy.deepcopy(wide)
    for model in (wide, narrow):
        model.block.out = Adapted(model.block.out).float()
    narrow = narrow.to(torch.bfloat16)
    found = influence(narrow, solver=li.CG(rtol=1e-6))
    assert found.info.num_params == 2 * 2 * WIDTH
    scores = found.scores(QUERY)
    assert scores.dtype == torch.float32
    reference = influence(narrow.float(), solver=li.CG(rtol=1e-6)).scores(QUERY)
    assert_close(scores, reference, 1e-5)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointed_blocks_work_without_reentry_and_are_refused_with_it():
    wanted = influence(Transformer()).scores(QUERY)
    for method in ("jvp", "gradients"):
        found = influence(Transformer(reentrant=False)).scores(QUERY, method=method)
        assert_close(found, wanted)
    for curvature in ("ggn", "hessian"):
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            influence(Transformer(reentrant=True), curvature=curvature)


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_logits_in_pieces_give_the_same_products(monkeypatch, chunk_size):
    options: dict[str, Any] = {"batch_size": 4, "chunk_size": chunk_size}
    whole = influence(Transformer(), **options)
    monkeypatch.setattr(gauss_newton, "PIECE_BYTES", 2 * LENGTH * VOCABULARY * 8)
    pieces = influence(Transformer(), **options)
    assert_close(pieces._operator.gradient, whole._operator.gradient)
    V = torch.randn(whole.info.num_params, 4, generator=torch.Generator().manual_seed(5)).double()
    assert_close(pieces._operator @ V, whole._operator @ V)
    weights = np.arange(6.0)
    found, wanted = (
        one._backend.operator(one._train, "ggn", weights) @ V for one in (pieces, whole)
    )
    assert_close(found, wanted)


def test_outputs_that_the_loss_does_not_use_take_no_part_in_a_product():
    taken: list[Tensor] = []

    class Recorded(gauss_newton.OutputCurvature):
        def __init__(self, at: Tensor, loss: Any) -> None:
            taken.append(at)
            super().__init__(at, loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gauss_newton, "OutputCurvature", Recorded)
        influence(Transformer())
    assert [at.shape for at in taken] == [(6, LENGTH, VOCABULARY)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_causal_models_of_transformers_and_adapters_of_peft_are_taken_as_they_are():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=8, n_layer=2, n_head=2, n_positions=LENGTH
    )
    model = transformers.GPT2LMHeadModel(config)
    labels = TRAIN["input_ids"].masked_fill(TRAIN["attention_mask"] == 0, IGNORED)
    train = TRAIN | {"labels": labels}  # of which the model makes a mean loss, which is not used
    query = {name: x[:2] for name, x in train.items()}

    def loss(output: Any, batch: dict[str, Tensor]) -> Tensor:
        return next_tokens({"logits": output.logits}, batch)

    def scores(model: nn.Module, **options: Any) -> Tensor:
        ours = influence(model, loss, train, **options)
        found = ours.scores(query, method="jvp")
        assert_close(ours.scores(query, method="gradients"), found, 1e-4)
        assert_close(ours.token_scores(query).sum(2), found, 1e-4)
        return found

    single = li.CG(rtol=1e-6)
    wanted = scores(copy.deepcopy(model).double()).float()
    assert_close(scores(model, solver=single), wanted, 1e-3)
    model.gradient_checkpointing_enable()
    assert_close(scores(model, solver=single), wanted, 1e-3)
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapter = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, adapter).double()
    assert influence(adapted, loss, train).info.num_params == 2 * 2 * (8 + 24)
    wanted = scores(adapted).float()
    assert_close(scores(adapted.float(), solver=single), wanted, 1e-3)
