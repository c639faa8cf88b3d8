"""Run an experiment by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

COMMANDS = {
    "hypercleaning": ("bilevel.hypercleaning", "data hyper-cleaning on handwritten digits"),
    "bilevel": ("bilevel.optimum.compare", "bilevel problems to the optimum, beside other solvers"),
    "penalties": ("bilevel.penalties", "penalties of linear models, learned by hypergradient"),
    "state": ("bilevel.state", "state over outer steps: errors at equal products"),
    "krylov": ("systems.krylov", "errors against products, by what these are spent on"),
    "minibatch": ("bilevel.minibatch", "a fresh minibatch in each product, against a frozen one"),
    "leaveoneout": ("influence.leaveoneout", "influence against training without each image"),
    "influence": ("influence.libraries", "influence functions, ours beside other libraries"),
    "influence-scale": ("influence.scale", "a million parameters, 50 000 images: plan and use"),
    "influence-language": ("influence.language", "a language model of ten million parameters"),
    "influence-truth": ("influence.truth", "influence against training again, beside libraries"),
    "accuracy": ("systems.accuracy", "float32 accuracy of each form of the damped inverse"),
    "certificate": ("systems.certificate", "how tight the error bounds are"),
    "psd": ("systems.psd", "steps and time to solve positive semidefinite systems"),
    "kernel-ridge": ("systems.kernel_ridge", "kernel ridge regression: error, time, memory"),
    "gpu": ("gpu.everything", "all that needs a GPU, in one call of minutes"),
    "gp": ("systems.gaussian_process", "Gaussian processes: error, time, memory"),
    "jax-cg": ("systems.jax_cg", "a step of conjugate gradients in JAX, against its peers"),
    "mesh-jax": ("systems.mesh_jax", "several devices in JAX: what each holds, what is sent"),
    "gradients": ("systems.gradients", "memory of a gradient through conjugate gradients"),
    "table5": ("speed.table5", "Table 5 of the paper: time and memory of a hypergradient"),
    "peers": ("speed.peers", "a hypergradient against those of other packages"),
    "mesh": ("speed.mesh", "what processes hold and send, and a model of many"),
    "scaling": ("speed.scaling", "time and memory against n and k, and under a budget"),
    "paper": ("paper.everything", "all figures and tables of the paper, and a summary"),
    "figure1": ("paper.figure1", "Figure 1 of the paper: inverses of a low-rank matrix"),
    "figure2": ("paper.weight_decay.figure2", "Figure 2: a weight decay for each parameter"),
    "figure3": ("paper.weight_decay.choices:figure3", "Figure 3: the same, by α and ρ"),
    "figure4": ("paper.weight_decay.choices:figure4", "Figure 4: the same, by the rank k"),
    "table2": ("paper.few_images.table2", "Table 2 of the paper: images distilled from MNIST"),
    "table3": ("paper.few_images.table3", "Table 3 of the paper: iMAML on Omniglot"),
    "table4": ("paper.long_tail.table4", "Table 4 of the paper: data reweighting"),
    "paper-table5": ("speed.table5:paper", "Table 5 on its network: the paper's claims"),
    "table6": ("paper.long_tail.table6", "Table 6 of the paper: the same as 4, by ρ and k"),
}
"""Module, with the name of the experiment in it unless that is `main`, and what it shows."""


def load(name: str) -> Callable[[list[str]], int]:
    """Return an experiment, to be called with its arguments."""
    module, _, attribute = COMMANDS[name][0].partition(":")
    return getattr(importlib.import_module(f"benchmarks.{module}"), attribute or "main")


def main(arguments: list[str]) -> int:
    """Hand the arguments after the name to the experiment of that name."""
    if arguments and arguments[0] in COMMANDS:
        return int(load(arguments[0])(arguments[1:]) or 0)
    print("usage: python -m benchmarks NAME [options]   (NAME --help for its options)\n")
    for name, (_, summary) in COMMANDS.items():
        print(f"  {name:<18} {summary}")
    return 0 if arguments in ([], ["--help"], ["-h"]) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
