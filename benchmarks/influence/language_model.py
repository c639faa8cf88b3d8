"""A small language model, trained on Python's documentation and tuned to some of it."""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness.processes import Found

BATCH, CHUNK = 64, 100
"""Sequences of a step of the first training, and those taken at a time by all that follows."""
SHAPE = ("vocabulary", "length", "width", "layers")
FIRST = 16.0
"""The curvature along the first step, times the damping, as it is taken to be at most."""
HEAD = 64
"""Width of a head of attention."""


class Block(nn.Module):
    """Causal attention and a perceptron, each added to its normalised input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map states of shape (sequences, length, width)."""
        size, length, width = x.shape
        parts = self.qkv(self.norms[0](x)).reshape(size, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        mixed = logits.masked_fill(later, -torch.inf).softmax(dim=-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(size, length, width))
        return x + self.down(functional.gelu(self.up(self.norms[1](x)), approximate="tanh"))


class GPT(nn.Module):
    """A decoder with the layers and the initial values of GPT-2."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int) -> None:
        super().__init__()
        heads = max(1, width // HEAD)
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                ends_block = name.endswith(("out.weight", "down.weight"))
                deviation = 0.02 / math.sqrt(2 * layers) if ends_block else 0.02
                nn.init.normal_(parameter, std=deviation)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of the next token, shape (sequences, length, vocabulary)."""
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        return self.norm(self.blocks(x)) @ self.words.weight.T


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the losses of all tokens but the first of each sequence."""
    return functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


def sequences(vocabulary: int, length: int, seed: int) -> Tensor:
    """Return Python's documentation as sequences of token numbers, in random order.

    Tokens are words, numbers and signs; those that are rare are number 0.
    """
    from pydoc_data.topics import topics

    text = " ".join(topics[name] for name in sorted(topics)).lower()
    words = re.findall(r"[a-z_]+|\d+|[^\sa-z_\d]", text)
    common = Counter(words).most_common(vocabulary - 1)
    numbers = {word: i for i, (word, _) in enumerate(common, start=1)}
    ids = np.array([numbers.get(word, 0) for word in words])
    whole = ids[: len(ids) // length * length].reshape(-1, length)
    return torch.tensor(np.random.default_rng(seed).permutation(whole))


def parts(sizes: Found, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sequences to tune to, the queries, and all others."""
    every = sequences(sizes["vocabulary"], sizes["length"], seed)
    ends = sizes["train"], sizes["train"] + sizes["queries"]
    if ends[1] >= len(every):
        raise ValueError(f"the text has {len(every)} sequences; {ends[1] + 1} are needed")
    return every[: ends[0]], every[ends[0] : ends[1]], every[ends[1] :]


def pretrain(model: nn.Module, ids: Tensor, epochs: int) -> None:
    """Train from the start by AdamW, with a learning rate that rises and falls."""
    count = epochs * math.ceil(len(ids) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=count)
    for _ in range(epochs):
        for batch in ids[torch.randperm(len(ids))].split(BATCH):
            optimizer.zero_grad()
            token_losses(model(batch), batch).mean().backward()
            optimizer.step()
            schedule.step()


def tune(
    model: nn.Module, ids: Tensor, start: np.ndarray, centre: np.ndarray, damping: float, steps: int
) -> dict[str, float]:
    """Minimise ``mean loss + damping / 2 * norm(params - centre)**2`` from `start`.

    By gradients, with the step lengths of Barzilai and Borwein: no search along a line, in which
    the rounding of float32 would be lost.
    """
    x, params = start, list(model.parameters())

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        write(model, x)
        model.zero_grad()
        value = 0.0
        for batch in ids.split(CHUNK):
            loss = token_losses(model(batch), batch).sum() / len(ids)
            loss.backward()
            value += float(loss.detach())
        moved = x - centre
        gradient = torch.cat([p.grad.reshape(-1) for p in params if p.grad is not None])
        return value + damping / 2 * moved @ moved, gradient.numpy() + damping * moved

    value, gradient = objective(x)
    length = 1 / (FIRST * damping)
    for _ in range(steps):
        change = -length * gradient
        x = x + change
        value, latest = objective(x)
        length = float(change @ change / (change @ (latest - gradient)))
        gradient = latest
    return {"objective": value, "gradient": float(np.linalg.norm(gradient))}


def read(model: nn.Module) -> np.ndarray:
    """Return all parameters as one vector, in float64."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double().numpy()


def write(model: nn.Module, values: np.ndarray) -> None:
    """Undo `read`."""
    given = torch.from_numpy(values).float()
    nn.utils.vector_to_parameters(given, list(model.parameters()))


def losses(model: nn.Module, ids: Tensor) -> np.ndarray:
    """Return the loss of each sequence."""
    with torch.no_grad():
        return torch.cat([token_losses(model(x), x).sum(dim=1) for x in ids.split(CHUNK)]).numpy()


def write_model(
    path: str, sizes: Found, epochs: int, damping: float, steps: int, seed: int, threads: int
) -> Found:
    """Train and tune, and write where the network was and came to."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    train, query, rest = parts(sizes, seed)
    model = GPT(*(sizes[name] for name in SHAPE))
    pretrain(model, rest, epochs)
    start = read(model)
    given = {"train": train, "query": query}
    before = {name: float(losses(model, ids).mean()) for name, ids in given.items()}
    ended = tune(model, train, start, start, damping, steps)
    np.savez(path, start=start, tuned=read(model))
    after = {name: float(losses(model, ids).mean()) for name, ids in given.items()}
    return {"parameters": len(start), "others": len(rest), "before": before, "after": after} | ended


def load(path: str, sizes: Found, seed: int) -> tuple[GPT, Tensor, Tensor, dict[str, np.ndarray]]:
    """Return the tuned network, the sequences it was tuned to, and the queries."""
    train, query, _ = parts(sizes, seed)
    with np.load(path) as file:
        arrays = dict(file)
    model = GPT(*(sizes[name] for name in SHAPE))
    write(model, arrays["tuned"])
    return model, train, query, arrays


def half(num: int, number: int, seed: int) -> np.ndarray:
    """Return which sequences are in a random half."""
    chosen = np.random.default_rng([seed, number]).permutation(num)[: num // 2]
    return np.isin(np.arange(num), chosen)


def retrain(
    path: str, number: int, sizes: Found, damping: float, steps: int, seed: int, threads: int
) -> Found:
    """Tune to a half, from where all sequences led; return the losses of the queries then."""
    torch.set_num_threads(threads)
    model, train, query, arrays = load(path, sizes, seed)
    chosen = torch.from_numpy(half(len(train), number, seed))
    ended = tune(model, train[chosen], arrays["tuned"], arrays["start"], damping, steps)
    return {"losses": losses(model, query).tolist(), "gradient": ended["gradient"]}
