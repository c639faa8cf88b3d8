# %% [markdown]
# # Kernel ridge regression, and a Gaussian process
#
# One data set, two models. Kernel ridge regression gives a prediction; a Gaussian process gives a prediction with an
# error bar, and finds out which features matter.
#
# You need scikit-learn and Matplotlib, and about five minutes.
#
# ## Friedman's function
#
# Ten features, of which five matter, in ways that no line can follow:
# `y = 10 sin(π x₀ x₁) + 20 (x₂ - ½)² + 10 x₃ + 5 x₄`, and noise of standard deviation 1.

# %%
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import make_friedman1
from sklearn.linear_model import LinearRegression

from lowrank_inverse.sklearn import GaussianProcessRegressor, KernelRidgeCV

X, y = make_friedman1(600, n_features=10, noise=1.0, random_state=0)
train, test = slice(0, 300), slice(300, None)


def error(model):
    return np.sqrt(np.mean((model.predict(X[test]) - y[test]) ** 2))


line = LinearRegression().fit(X[train], y[train])
print(f"line: error {error(line):.2f}")

# %% [markdown]
# No model can do better than 1, the noise.
#
# ## Kernel ridge regression
#
# `KernelRidgeCV` tries each `alpha` by leaving out each point once. That takes one factorisation for all of them. The
# lengthscale is yours to choose:

# %% alt="Test error of kernel ridge regression against the lengthscale: a valley between errors of 3 at 0.2 and 2 at 10."
lengthscales = [0.2, 0.5, 1.0, 2.0, 4.0, 10.0]
ridge_errors = []
for lengthscale in lengthscales:
    model = KernelRidgeCV(
        alphas=np.logspace(-5, 1, 13),
        lengthscale=lengthscale,
        fit_intercept=True,
    )
    ridge_errors.append(error(model.fit(X[train], y[train])))

fig, ax = plt.subplots(figsize=(6, 2.6))
ax.semilogx(lengthscales, ridge_errors, "o-", label="kernel ridge regression")
ax.axhline(error(line), color="#d2731a", ls="--", label="line")
ax.set(xlabel="lengthscale", ylabel="test error")
ax.legend()
plt.show()
print(f"kernel ridge: error {min(ridge_errors):.2f} at best")

# %% [markdown]
# ## A Gaussian process finds the features
#
# With `lengthscale="features"` each feature has a lengthscale of its own, and `fit` maximises the likelihood over
# all of them, the noise and the signal variance. A feature of no use gets a long one: the function does not change
# along it.

# %% alt="Bars of the ten learned inverse lengthscales: features 0 to 4 stand out, features 5 to 9 are near zero."
process = GaussianProcessRegressor(lengthscale="features")
process.fit(X[train], y[train])
relevance = 1 / process.lengthscale_

fig, ax = plt.subplots(figsize=(6, 2.6))
ax.bar(range(10), relevance, color=["#2b8cab"] * 5 + ["#d2731a"] * 5)
ax.set(xlabel="feature", ylabel="1 / lengthscale", xticks=range(10))
plt.show()
noise = process.noise_**0.5 * y[train].std()
print(f"Gaussian process: error {error(process):.2f}, noise found {noise:.2f}")

# %% [markdown]
# ## Are the error bars honest?
#
# If they are, 68 % of the new observations lie within one standard deviation, 95 % within two, and so on along the
# diagonal:

# %% alt="Share of test observations within an interval against the share that should be: a curve along the diagonal."
from scipy.stats import norm

mean, std = process.predict(X[test], return_std=True, include_noise=True)
distance = abs(y[test] - mean) / std
nominal = np.linspace(0.02, 0.98, 49)
inside = [(distance < norm.ppf(0.5 + p / 2)).mean() for p in nominal]

fig, ax = plt.subplots(figsize=(3.4, 3))
ax.plot([0, 1], [0, 1], color="#7d98a5", lw=1)
ax.plot(nominal, inside)
ax.set(xlabel="share that should be inside", ylabel="share that is")
plt.show()

# %% [markdown]
# ## How to tell that it worked
#
# Look at points that were kept back: the error against that of a line, and the share inside of the error bars. And
# look at the hyperparameters: one that stands at its bound was not determined by the data, which for the
# lengthscale of a useless feature is as it should be.

# %%
one, two = (distance < 1).mean(), (distance < 2).mean()
print(f"within one standard deviation {one:.2f}, within two {two:.2f}")

assert error(process) < min(ridge_errors) < error(line)
assert relevance[:5].min() > 3 * relevance[5:].max()
assert 0.55 < one < 0.8 and 0.88 < two < 0.99
assert 0.8 < noise < 1.2

# %% [markdown]
# Three hundred points are few. The same estimators go on where the kernel matrix no longer fits into memory:
# [kernel matrices](../guides/kernels.md), [Gaussian processes](../guides/gaussian_processes.md), and
# [the figures](../benchmarks/gp.md) beside scikit-learn and gpytorch.
