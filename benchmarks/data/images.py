"""Images as tensors: batches of them, shifted and mirrored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class Images:
    """Images as floats on the device, of about mean 0 and deviation 1, and their labels."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, device: str) -> None:
        self.bytes = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device)
        self.labels = torch.from_numpy(labels).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Any) -> tuple[Tensor, Tensor]:
        chosen = indices if isinstance(indices, slice) else indices.to(self.labels.device)
        return (self.bytes[chosen].float() - 120.0) / 64.0, self.labels[chosen]


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Go through all in random order, again and again."""
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to four pixels, and mirror one in two."""
    n, _, side, _ = x.shape
    pad = 4
    rows, columns = torch.randint(2 * pad + 1, (2, n, 1), generator=generator).to(x.device)
    mirrored = (torch.rand(n, 1, generator=generator) < 0.5).to(x.device)
    along = torch.arange(side, device=x.device)
    across = torch.where(mirrored, side - 1 - along, along) + columns
    padded = F.pad(x, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    which = torch.arange(n, device=x.device)[:, None, None]
    return padded[which, (along + rows)[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)
