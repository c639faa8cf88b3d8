"""The most influential of 50 000 training images for 20 queries, with a million parameters.

A perceptron with tanh on MNIST, trained by Adam. The images lie in a file, of which batches are
read. What a plan said before the work is set beside what the work took, in a process with
``MALLOC_MMAP_THRESHOLD_=1000000``, where glibc gives back arrays as they are freed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import lowrank_inverse as li
from benchmarks.data.mnist import load_mnist
from benchmarks.harness.experiment import DATA, SEED, THREADS, Option, Run, experiment
from benchmarks.harness.processes import Found, return_freed_memory
from benchmarks.harness.report import table
from benchmarks.harness.timing import MIB, Peak
from benchmarks.influence.methods import network
from lowrank_inverse_torch import InfluenceFunction

BATCH, NUM_CLASSES, K = 500, 10, 10


class Batches:
    """Images and labels in a file, a batch at a time."""

    def __init__(self, path: str, size: int) -> None:
        self.path, self.size = path, size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Read from the start."""
        rows = np.load(self.path, mmap_mode="r")
        for start in range(0, len(rows), self.size):
            part = torch.from_numpy(np.array(rows[start : start + self.size]))
            yield part[:, 1:].float() / 255, part[:, 0].long()


def write_problem(
    path: str, data_dir: str, width: int, images: int, queries: int, epochs: int, seed: int
) -> Found:
    """Train a network; write it, its training images and the queries with the largest loss."""
    train_x, train_y, test_x, test_y = load_mnist(Path(data_dir))
    rows = np.hstack([train_y[:, None], np.round(train_x * 255)]).astype(np.uint8)[:images]
    images_path = str(Path(path).with_suffix(".npy"))
    np.save(images_path, rows)
    torch.manual_seed(seed)
    model = network(train_x.shape[1], width, NUM_CLASSES)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for x, y in Batches(images_path, 100):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    x, y = torch.tensor(test_x), torch.tensor(test_y)
    with torch.no_grad():
        losses = cross_entropy(model(x), y, reduction="none")
        accuracy = (model(x).argmax(dim=1) == y).float().mean().item()
    hardest = losses.topk(queries).indices
    arrays = {f"p{i}": p.detach().numpy() for i, p in enumerate(model.parameters())}
    np.savez(path, x=x[hardest].numpy(), y=y[hardest].numpy(), **arrays)
    return {"images": images_path, "parameters": sum(p.size for p in arrays.values())} | {
        "accuracy": accuracy
    }


def measure(
    path: str, images: str, width: int, damping: float, rtol: float, memory: int, threads: int
) -> Found:
    """Find the top k of each query; return what the plan said and what it took."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    with np.load(path) as file:
        query = torch.tensor(file["x"]), torch.tensor(file["y"])
        model = network(query[0].shape[1], width, NUM_CLASSES)
        for i, parameter in enumerate(model.parameters()):
            parameter.data = torch.tensor(file[f"p{i}"])
    loss = partial(cross_entropy, reduction="none")
    start = time.process_time()
    with Peak() as peak:
        influence = InfluenceFunction(
            model,
            loss,
            Batches(images, BATCH),
            solver=li.CG(damping=damping, rtol=rtol, recycle=10),
            memory_budget=memory * MIB,
        )
        plan = influence.plan(query)
        planned = time.process_time()
        best = influence.top_k(query, K)
    done = time.process_time()
    residual = influence.info.relative_residual
    assert residual is not None
    same = query[1].numpy()[:, None] == _labels(images)[best.indices]
    return {
        "plan": {"bytes": plan.num_bytes, "products": plan.num_products, "width": plan.width}
        | {"seconds": sum(v for name, v in plan.seconds.items() if name != "product")},
        "planning": planned - start,
        "seconds": done - planned,
        "products": influence.info.num_products,
        "residual": float(residual.max()),
        "peak_mib": peak.num_bytes / MIB,
        "same label": float(same.mean()),
    }


def _labels(images: str) -> np.ndarray:
    return np.asarray(np.load(images, mmap_mode="r")[:, 0])


@experiment(
    *("influence-scale", __doc__, DATA, THREADS, SEED),
    Option("width", 1258, "hidden units", least=1),
    Option("images", 50_000, "of the training set", least=1),
    Option("queries", 20, "test images with the largest loss", least=1),
    Option("epochs", 5, "of the training", least=1),
    Option("damping", 1e-2, "of the mean curvature"),
    Option("rtol", 1e-2, "largest relative residual"),
    Option("memory", 1024, "MiB to work with, the library's default", least=1),
    packages=("torch", "numpy"),
)
def main(run: Run) -> None:
    options = run.options
    return_freed_memory()
    problem = run.file(
        write_problem,
        {
            "data_dir": str(options.data_dir.resolve()),
            "width": options.width,
            "images": options.images,
            "queries": options.queries,
            "epochs": options.epochs,
            "seed": options.seed,
        },
    )
    settings = {"damping": options.damping, "rtol": options.rtol, "memory": options.memory}
    settings |= {"path": problem["path"], "images": problem["images"], "width": options.width}
    found = run.each(measure, {"top k": settings | {"threads": options.threads}})["top k"]
    planned = sum(found["plan"]["bytes"].values()) / MIB
    rows = [
        {
            "": "plan",
            "products": str(found["plan"]["products"]),
            "CPU seconds": f"{found['plan']['seconds']:.0f}",
            "MiB": f"{planned:.0f}",
        },
        {
            "": "used",
            "products": str(found["products"]),
            "CPU seconds": f"{found['seconds']:.0f}",
            "MiB": f"{found['peak_mib']:.0f}",
        },
    ]
    stages = ", ".join(f"{name} {size / MIB:.0f}" for name, size in found["plan"]["bytes"].items())
    run.publish(
        table(rows),
        f"The {K} most helpful of {options.images} images for each of {options.queries} queries; "
        f"{problem['parameters']} parameters, damping {options.damping:g}.\nLargest relative "
        f"residual: {found['residual']:.1e}. Of the images found, {found['same label']:.0%} have "
        f"the label of the query.\nMiB: growth of the process at its peak; in the plan {stages}."
        f"\nTo make the influence function and its plan took {found['planning']:.0f} CPU seconds "
        "more.",
        parameters=problem["parameters"],
        accuracy=problem["accuracy"],
        found=found,
    )
