# %% [markdown]
# # A system, and a certificate for its solution
#
# A solver hands you a vector. Is it the solution? The residual is small, you say; but on an ill-conditioned system a
# small residual can hide a large error. This tutorial solves such a system in several ways, one of them bad, and
# shows a bound of the error that you can compute *without knowing the solution*.
#
# You need NumPy and Matplotlib, and about five minutes.
#
# ## An ill-conditioned system
#
# A smooth kernel between 1500 points has eigenvalues that fall to nothing. With a damping of 0.01 the condition
# number is in the tens of thousands.

# %%
import matplotlib.pyplot as plt
import numpy as np

import lowrank_inverse as li

rng = np.random.default_rng(0)
points = rng.random((1500, 2))
squares = ((points[:, None] - points) ** 2).sum(axis=2)
A = np.exp(-squares / 0.08)
b = np.sin(6 * points[:, 0]) + rng.standard_normal(1500)
damping = 0.01

values, vectors = np.linalg.eigh(A)  # for this tutorial, to know the truth
exact = vectors @ (vectors.T @ b / (np.maximum(values, 0) + damping))
print(f"condition number {(values[-1] + damping) / damping:.0e}")

# %% [markdown]
# ## Solve it, with a certificate
#
# The matrix A is positive semidefinite, so no eigenvalue of `A + damping I` is below the damping, and the inverse
# magnifies a residual by at most 1 / damping. That is a bound already. `certify=True` sharpens it by the
# approximation of A that the solver has made.


# %%
def error(x):
    return np.linalg.norm(x - exact)


solution = li.solve(A, b, damping=damping, certify=True)
print(solution.method)
print(f"{solution.message} after {solution.num_steps} steps")
print(f"error {error(solution.value):.0e}, at most {solution.error_bound:.0e}")

# %% [markdown]
# ## Plain conjugate gradients, step by step
#
# Give it ever more steps and look at three curves: the true error, which you would not know in practice, the
# residual, which every solver reports, and the bound.

# %% alt="Error, bound and residual of conjugate gradients against steps, on a logarithmic scale. The bound stays above the error and falls with it; the residual stays ten to a hundred times below the error."
steps = [1, 3, 10, 30, 100, 200, 400]
found = [li.cg(A, b, damping=damping, rtol=1e-12, max_steps=n) for n in steps]
errors = [error(one.value) for one in found]
bounds = [
    li.certify(A, b, one.value, damping=damping).error_bound for one in found
]
fig, ax = plt.subplots(figsize=(6, 3))
ax.loglog(steps, bounds, "--", label="bound")
ax.loglog(steps, errors, label="error")
ax.loglog(steps, [one.residual_norm for one in found], ":", label="residual")
ax.set(xlabel="steps", title="conjugate gradients")
ax.legend()
plt.show()

# %% [markdown]
# Whoever trusts the residual thinks the error ten to a hundred times smaller than it is. The bound errs on the other
# side.
#
# ## A bad solver is found out
#
# A Nyström inverse from 20 columns drawn at random is cheap: 20 columns, no steps. It inverts what the columns missed
# as if it were zero. How good is it? Ask the certificate, for ever more columns:

# %% alt="Error and bound of the Nyström inverse against the number of columns. With 20 columns the bound is above the norm of the solution; with 160 both have fallen far below."
ranks = [20, 40, 80, 120, 160]
low_rank_errors, low_rank_bounds = [], []
for rank in ranks:
    inverse = li.nystrom(A, rank, sampling="rpcholesky", rng=0).inverse(damping)
    x = inverse @ b
    certificate = li.certify(A, b, x, damping=damping, inverse=inverse)
    low_rank_errors.append(error(x))
    low_rank_bounds.append(certificate.error_bound)

fig, ax = plt.subplots(figsize=(6, 3))
ax.semilogy(ranks, low_rank_bounds, "--", label="bound")
ax.semilogy(ranks, low_rank_errors, label="error")
ax.axhline(
    np.linalg.norm(exact), color="#7d98a5", lw=1, label="norm of the solution"
)
ax.set(xlabel="columns", title="Nyström inverse")
ax.legend()
plt.show()

# %% [markdown]
# While the bound is above the grey line, nothing shows that the answer is better than zero. The effective dimension,
# about the number of eigenvalues above the damping, tells how many columns it takes.

# %%
approximation = li.nystrom(A, 160, sampling="rpcholesky", rng=0)
print(f"effective dimension {approximation.effective_dimension(damping):.0f}")

# %% [markdown]
# ## How to tell that it worked
#
# Read `solution.error_bound` beside the norm of `solution.value`. The bound holds for every positive semidefinite A
# and every x, wherever x comes from. In this tutorial the truth is known, so it can be checked:

# %%
assert error(solution.value) <= solution.error_bound
assert all(e <= b for e, b in zip(errors, bounds, strict=True))
assert all(
    e <= b for e, b in zip(low_rank_errors, low_rank_bounds, strict=True)
)
ratio = np.median(np.array(bounds) / errors)
print(
    f"bounds of conjugate gradients: {ratio:.0f} times the error, at the median"
)
relative = error(solution.value) / np.linalg.norm(exact)
print(f"relative error of solve: {relative:.0e}")

# %% [markdown]
# If a matrix is *not* semidefinite the bound does not hold. Solvers that meet negative curvature say so
# (`solution.message` is `negative_curvature`), and [troubleshooting](../troubleshooting.md) says what to do.
#
# Next: [solve a system](../guides/systems.md), and [which solver when](../guides/choosing.md).
