"""Run an experiment by name."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "hypercleaning": ("benchmarks.hypercleaning", "data hyper-cleaning on handwritten digits"),
    "accuracy": ("benchmarks.accuracy", "float32 accuracy of each form of the damped inverse"),
    "certificate": ("benchmarks.certificate", "how tight the error bounds are"),
    "psd": ("benchmarks.psd", "steps and time to solve positive semidefinite systems"),
    "kernel-ridge": ("benchmarks.kernel_ridge", "kernel ridge regression: error, time, memory"),
    "state": ("benchmarks.state", "state over outer steps: errors at equal products"),
    "minibatch": (
        "benchmarks.minibatch",
        "a fresh minibatch in each product, against a frozen one",
    ),
    "jax-cg": ("benchmarks.jax_cg", "a step of conjugate gradients in JAX, against its peers"),
    "table5": ("benchmarks.table5", "Table 5 of the paper: time and memory of a hypergradient"),
    "peers": ("benchmarks.peers", "a hypergradient against those of other packages"),
    "scaling": ("benchmarks.scaling", "time and memory against n and k, and under a budget"),
    "influence": ("benchmarks.influence", "influence functions, ours beside other libraries"),
    "leaveoneout": ("benchmarks.leaveoneout", "influence against training without each image"),
    "table2": (
        "benchmarks.paper.table2",
        "Table 2 of the paper: images distilled from MNIST",
    ),
    "table3": ("benchmarks.paper.table3", "Table 3 of the paper: iMAML on Omniglot"),
    "figure1": ("benchmarks.paper.figure1", "Figure 1 of the paper: inverses of a low-rank matrix"),
    "figure2": ("benchmarks.paper.figure2", "Figure 2: a weight decay for each parameter"),
    "figure3": ("benchmarks.paper.figure3", "Figure 3: the same, by α and ρ"),
    "figure4": ("benchmarks.paper.figure4", "Figure 4: the same, by the rank k"),
    "paper-table5": ("benchmarks.paper.table5", "Table 5 on its network: the paper's claims"),
    "paper": ("benchmarks.paper.everything", "all figures and tables of the paper, and a summary"),
    "table4": ("benchmarks.paper.table4", "Table 4 of the paper: data reweighting"),
    "table6": ("benchmarks.paper.table6", "Table 6 of the paper: the same, by ρ and k"),
}


def main(arguments: list[str]) -> int:
    """Hand the arguments after the name to the experiment of that name."""
    if arguments and arguments[0] in COMMANDS:
        module = importlib.import_module(COMMANDS[arguments[0]][0])
        return int(module.main(arguments[1:]) or 0)
    print("usage: python -m benchmarks NAME [options]   (NAME --help for its options)\n")
    for name, (_, summary) in COMMANDS.items():
        print(f"  {name:<16} {summary}")
    return 0 if arguments in ([], ["--help"], ["-h"]) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
