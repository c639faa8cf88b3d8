# %% [markdown]
# # Tune 64 penalties
#
# A grid search over one penalty takes ten trainings, over two a hundred, and over 64 it is out of the question. A
# gradient does not mind: this tutorial tunes a penalty for *each pixel* of an image, by a few dozen trainings.
#
# You need PyTorch and scikit-learn, and about five minutes.
#
# ## Few images, many pixels
#
# Train a linear classifier on only 60 images of digits, 8 by 8 pixels each. A second set of 400 images is there to
# choose penalties by. The rest is for the end.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import lowrank_inverse_torch as lit

torch.manual_seed(0)
digits = load_digits()
order = torch.randperm(1797)
x = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
y = torch.tensor(digits.target)[order]
train, held_out, test = slice(0, 60), slice(60, 460), slice(460, None)

# %% [markdown]
# ## Two losses
#
# `log_penalty` has one entry for all pixels, or one for each: the losses are the same.

# %%
w = torch.zeros(64, 10, requires_grad=True)


def tune(log_penalty):
    def inner_loss():
        penalty = (log_penalty.exp() * (w**2).mean(dim=1)).sum()
        return cross_entropy(x[train] @ w, y[train]) + penalty

    def outer_loss():
        return cross_entropy(x[held_out] @ w, y[held_out])

    return lit.minimize_bilevel(
        inner_loss,
        outer_loss,
        w,
        log_penalty,
        bounds=(-7.0, 1.0),
        tol=2e-2,
    )


def accuracy():
    return ((x[test] @ w).argmax(dim=1) == y[test]).float().mean().item()


# %% [markdown]
# ## One penalty, then 64
#
# `minimize_bilevel` finds the penalty at which the loss on the held-out images is least. First one for all pixels;
# then, from there, one for each.

# %%
one = tune(torch.tensor([-3.0], requires_grad=True))
accuracy_of_one = accuracy()
each = tune(one.hparams.repeat(64).requires_grad_())
for name, found in {"one penalty": one, "64 penalties": each}.items():
    print(f"{name}: held-out loss {found.value:.2f}, {found.reason}")

# %% [markdown]
# ## What was learned?
#
# Blank pixels at the edges keep the penalty that they started with, as nothing depends on it. Of the others, some are
# set free and some are all but switched off.

# %% alt="Two pictures of 8 by 8 pixels. Left: the mean image. Right: the learned penalties, small at most pixels and large at a few."
fig, axes = plt.subplots(1, 2, figsize=(6, 2.6))
axes[0].imshow(x[train].mean(dim=0).numpy().reshape(8, 8), cmap="gray_r")
axes[0].set_title("mean image")
shown = axes[1].imshow(
    each.hparams.detach().numpy().reshape(8, 8), cmap="viridis"
)
axes[1].set_title("log of the penalty")
fig.colorbar(shown, ax=axes[1])
for ax in axes:
    ax.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## What did it cost?
#
# The gradient with respect to 64 penalties takes one linear system with the Hessian of the inner loss, like the
# gradient with respect to one. The system is harder here, because free pixels make it ill-conditioned. But 64 times as
# many products it does not take:

# %% alt="Held-out loss against the number of evaluations: with one penalty it ends higher than with 64."
fig, ax = plt.subplots(figsize=(6, 2.6))
for name, found in {"one penalty": one, "64 penalties": each}.items():
    values = np.array(
        [step.value for step in found.history if not step.rejected]
    )
    ax.plot(np.minimum.accumulate(values), label=name)
    per_step = found.products / len(found.history)
    print(f"{name}: {len(found.history)} steps, {per_step:.0f} products each")
ax.set(xlabel="evaluations", ylabel="held-out loss")
ax.legend()
plt.show()

# %% [markdown]
# ## How to tell that it worked
#
# `found.reason` says that the gradient vanished, or how far it fell. And as the penalties were chosen by the
# held-out images, only images that took no part tell whether the choice was good: 64 penalties can overfit 400
# images, and would not forgive 40.

# %%
print(f"test accuracy: one penalty {accuracy_of_one:.3f}")
print(f"test accuracy: 64 penalties {accuracy():.3f}")

assert one.converged and each.value < one.value - 0.02
assert accuracy() > accuracy_of_one

# %% [markdown]
# Next: [a weight decay for each parameter](../guides/weight_decay.md) of a network, and
# [all options of `minimize_bilevel`](../guides/minimize.md).
