# %% [markdown]
# # Clean a noisy data set
#
# Someone typed labels with the hand one key off: four in ten are wrong, and you do not know which. You do have a few examples that someone has
# checked. This tutorial gives every training example a weight, and learns all weights from the checked examples,
# so that the wrong labels lose theirs. It is known as *hyper-cleaning*: the weights are hyperparameters, one for
# each example.
#
# You need PyTorch and scikit-learn, and about five minutes.
#
# ## Data with wrong labels
#
# scikit-learn ships 1797 images of handwritten digits, 8 by 8 pixels. Take 500 to train on, 100 that are checked,
# and keep the rest for the end. Four in ten of the 500 labels
# become the next digit.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import lowrank_inverse_torch as lit

torch.manual_seed(0)
digits = load_digits()
order = torch.randperm(1797)
x = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
truth = torch.tensor(digits.target)[order]
train, checked, test = slice(0, 500), slice(500, 600), slice(600, None)

y = truth.clone()
wrong = torch.rand(500) < 0.4
y[train][wrong] = (y[train][wrong] + 1) % 10
print(f"{wrong.sum()} of 500 labels are wrong")

# %% [markdown]
# ## Two losses
#
# The *inner* loss trains the model. Each example counts as much as its weight, a number between 0 and 1. The
# *outer* loss judges the trained model by the checked examples, and depends on the weights only through the model.

# %%
model = torch.nn.Linear(64, 10)
logit = torch.zeros(500, requires_grad=True)  # weights of 1/2 for all


def inner_loss():
    losses = cross_entropy(model(x[train]), y[train], reduction="none")
    decay = 0.005 * sum((p**2).sum() for p in model.parameters())
    return (torch.sigmoid(logit) * losses).mean() + decay


def outer_loss():
    return cross_entropy(model(x[checked]), y[checked])


def accuracy():
    return (model(x[test]).argmax(dim=1) == truth[test]).float().mean().item()


# %% [markdown]
# ## Learn the weights
#
# `minimize_bilevel` trains the model, differentiates the outer loss *through the training* with respect to all 500
# weights, takes a step, and repeats. The first entry of its history is the model with equal weights.

# %%
before = []


def first(evaluation, params, hparams):
    if not before:
        before.append(accuracy())


found = lit.minimize_bilevel(
    inner_loss,
    outer_loss,
    model,
    logit,
    bounds=(-6.0, 6.0),
    tol=1e-2,
    max_evaluations=40,
    callback=first,
)
print(f"loss on the checked examples {found.history[0].value:.2f},")
print(f"with learned weights         {found.value:.2f}")

# %% [markdown]
# ## What became of the weights?
#
# Nobody told the method which labels are wrong. The checked examples did.

# %% alt="Histogram of the learned weights. Most wrong labels have a weight near 0, most right ones a weight near 1."
weight = torch.sigmoid(logit.detach())
fig, ax = plt.subplots(figsize=(6, 2.6))
ax.hist(
    [weight[~wrong].numpy(), weight[wrong].numpy()],
    bins=12,
    stacked=True,
    label=["right label", "wrong label"],
)
ax.set(xlabel="learned weight", ylabel="examples")
ax.legend()
plt.show()

# %% [markdown]
# Here are twelve of the examples with the smallest weights, each with the label that it was given:

# %% alt="Twelve images of digits with their given labels; nearly all of the labels are visibly wrong."
suspects = weight.argsort()[:12]
fig, axes = plt.subplots(1, 12, figsize=(8, 1.1))
for ax, i in zip(axes, suspects, strict=True):
    ax.imshow(x[train][i].numpy().reshape(8, 8), cmap="gray_r")
    ax.set_title(f"“{y[i]}”")
    ax.axis("off")
plt.show()

# %% [markdown]
# ## How to tell that it worked
#
# On your own data you do not know which labels are wrong. Three things tell all the same: the outer loss fell, the
# accuracy on data that took no part rose, and the examples with the smallest weights look wrong.

# %%
right_weight, wrong_weight = weight[~wrong].mean(), weight[wrong].mean()
print(f"mean weight: right labels {right_weight:.1f}, wrong {wrong_weight:.1f}")
print(f"test accuracy: {before[0]:.2f} before, {accuracy():.2f} after")
print(f"{wrong[suspects].sum()} of the 12 suspects are wrong")

assert right_weight > wrong_weight + 0.3
assert accuracy() > before[0] + 0.02
assert wrong[suspects].sum() >= 9

# %% [markdown]
# Next: [the same with an outer loop of your own, and in JAX](../guides/hypercleaning.md),
# [all options of `minimize_bilevel`](../guides/minimize.md), and the same problem on
# [20 000 images of MNIST beside seven other solvers](../guides/minimize.md#did-it-work).
