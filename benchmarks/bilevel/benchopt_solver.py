"""`minimize_bilevel` in benchopt's benchmark_bilevel: copy this file to ``solvers/`` there."""

from functools import partial

from benchopt import BaseSolver
from benchopt.stopping_criterion import SufficientProgressCriterion

from lowrank_inverse_jax import minimize_bilevel


class Solver(BaseSolver):
    """Quasi-Newton outer steps on accurate hypergradients, untuned."""

    name = "lowrank-inverse"
    requirements = ("pip::lowrank-inverse[jax]",)
    stopping_criterion = SufficientProgressCriterion(patience=100, strategy="callback")

    @staticmethod
    def get_next(stop_val):
        return stop_val + 1

    def set_objective(
        self, f_inner, f_outer, n_inner_samples, n_outer_samples, inner_var0, outer_var0
    ):
        self.losses = [
            partial(loss, start=0, batch_size=count)
            for loss, count in ((f_inner, n_inner_samples), (f_outer, n_outer_samples))
        ]
        self.inner_var, self.outer_var = inner_var0, outer_var0

    def run(self, callback):
        def look(evaluation, params, hparams):
            self.inner_var, self.outer_var = params, hparams
            return not callback()

        if callback():
            minimize_bilevel(*self.losses, self.inner_var, self.outer_var, callback=look)

    def get_result(self):
        return {"inner_var": self.inner_var, "outer_var": self.outer_var}
