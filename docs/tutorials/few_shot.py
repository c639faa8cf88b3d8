# %% [markdown]
# # Learn to learn from one image
#
# Show a network one image of each of three digits that it has never seen. Can it tell them apart? It could, if it knew
# what to look at. *Meta-learning* finds a start from which a network learns a new task from little. This tutorial
# does so by implicit MAML ([Rajeswaran et al., 2019](https://arxiv.org/abs/1909.04630)): the start is a
# hyperparameter, and its gradient a hypergradient.
#
# You need PyTorch and scikit-learn, and about ten minutes.
#
# ## Tasks
#
# Each image shows two digits side by side. The left one counts; the right one is there to distract, and nobody tells
# the network so. A task takes three digits, calls them 0, 1 and 2 in any order, and has *one* image of each to learn
# from, and ten to be judged by. Digits 0 to 6 are there to learn to learn; 7, 8 and 9 are kept for the end.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import lowrank_inverse as li
import lowrank_inverse_torch as lit

digits = load_digits()
image, target = (
    torch.tensor(digits.images).float() / 16,
    torch.tensor(digits.target),
)
generator = torch.Generator().manual_seed(0)


def shuffled(rows, number):
    return rows[torch.randperm(len(rows), generator=generator)[:number]]


def draw(classes, num_tasks):
    """Return what each task learns from, and what it is judged by."""
    images = []
    for _ in range(num_tasks):
        for digit in shuffled(torch.tensor(classes), 3):
            rows = shuffled(torch.nonzero(target == digit)[:, 0], 11)
            images.append(image[rows])
    left = torch.stack(images)  # (3 num_tasks, 11, 8, 8)
    right = image[shuffled(torch.arange(1797).repeat(20), left.shape[0] * 11)]
    both = torch.cat([left, right.reshape(left.shape)], dim=3)
    x = both.reshape(num_tasks, 3, 11, 128)
    label = torch.arange(3)[:, None].expand(num_tasks, 3, 11)
    return [
        (x[:, :, part].flatten(1, 2), label[:, :, part].flatten(1))
        for part in (slice(0, 1), slice(1, None))
    ]


seen, unseen = [0, 1, 2, 3, 4, 5, 6], [7, 8, 9]
new_tasks = draw(unseen, 100)

# %% alt="The three images of each of two tasks. Each has a 7, 8 or 9 on the left and any digit on the right."
fig, axes = plt.subplots(1, 6, figsize=(8, 1.1))
for i, ax in enumerate(axes):
    shown = new_tasks[0][0][i // 3, i % 3].reshape(8, 16)
    ax.imshow(shown.numpy(), cmap="gray_r")
    ax.set_title(f"task {i // 3}: “{i % 3}”")
    ax.axis("off")
plt.show()

# %% [markdown]
# ## The inner problem
#
# From a start φ, a task minimises `loss(θ) + λ/2 ‖θ − φ‖²` over its three images: close enough to the start not to
# forget it, far enough to fit the images. Tasks have nothing to do with each other, so they are adapted side by side:
# each parameter gets a leading axis of tasks.

# %%
torch.manual_seed(0)
meta = {
    "a": (torch.randn(128, 32) / 11).requires_grad_(),
    "b": torch.zeros(1, 32, requires_grad=True),
    "c": (torch.randn(32, 3) / 6).requires_grad_(),
}
prox = 0.3


def scores(params, x):
    return torch.tanh(x @ params["a"] + params["b"]) @ params["c"]


def loss(params, part):  # the mean over the tasks
    return cross_entropy(
        scores(params, part[0]).flatten(0, 1), part[1].flatten()
    )


def adapt(support, num_steps=12):
    n = len(support[0])
    params = {
        k: m.detach().repeat(n, 1, 1).requires_grad_() for k, m in meta.items()
    }
    for _ in range(num_steps):
        gradients = torch.autograd.grad(
            n * loss(params, support), params.values()
        )
        with torch.no_grad():
            for p, g, m in zip(
                params.values(), gradients, meta.values(), strict=True
            ):
                p -= 0.5 * (g + prox * (p - m))
    return params


def accuracy(tasks):
    support, query = tasks
    said = scores(adapt(support), query[0]).argmax(dim=2)
    return (said == query[1]).float().mean().item()


norms_before = meta["a"].detach().norm(dim=1).reshape(8, 16)
accuracy_before = accuracy(new_tasks)
print(f"accuracy on new digits from a random start: {accuracy_before:.2f}")

# %% [markdown]
# ## Learn the start
#
# The proximal term, written out, is `λ/2 ‖θ‖² − λ <θ, φ>` and a constant. Its first part is a *ridge*: hand it over
# as such, and it is treated exactly. The second goes into the inner loss. The hypergradient of the query loss
# with respect to φ then takes six conjugate gradient steps, for all tasks at once, and does not need the path of the
# adaptation.

# %%
outer, values = torch.optim.Adam(meta.values(), lr=0.01), []
for _ in range(50):
    support, query = draw(seen, 16)
    params = adapt(support)

    def inner_loss():
        pull = sum((params[name] * meta[name]).sum() for name in meta)
        return 16 * loss(params, support) - prox * pull

    out = lit.hypergradient(
        inner_loss,
        lambda: loss(params, query),
        params,
        meta,
        solver=li.CG(max_steps=6),
        ridge=prox,
    )
    outer.zero_grad()
    for name, gradient in out.grads.items():
        meta[name].grad = gradient
    outer.step()
    values.append(loss(params, query).item())

accuracy_after = accuracy(new_tasks)
print(f"accuracy on new digits from the learned start: {accuracy_after:.2f}")

# %% [markdown]
# What did it learn? How strongly the first layer looks at each pixel:

# %% alt="Two pictures of 8 by 16 pixels, before and after: at the start all pixels are alike, afterwards those of the left digit stand out."
norms = meta["a"].detach().norm(dim=1).reshape(8, 16)
fig, axes = plt.subplots(1, 2, figsize=(7, 2.2))
for ax, shown, title in zip(
    axes, (norms_before, norms), ("random start", "learned start"), strict=True
):
    ax.imshow(shown.numpy(), cmap="viridis", vmin=0)
    ax.set(title=title, xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## How to tell that it worked
#
# The query loss falls, on digits that are seen, and the accuracy on digits that never were rises. The record of the
# hypergradient says how far to trust it. Six steps leave a residual of about a tenth, which `explain()` remarks on: it
# is enough for Adam. For more, raise `max_steps`.

# %%
print(out.info.explain())

early, late = sum(values[:5]) / 5, sum(values[-5:]) / 5
print(f"query loss {early:.2f} at the start, {late:.2f} at the end")
left, right = norms[:, :8].mean(), norms[:, 8:].mean()
print(f"left pixels weigh {left / right:.1f} times as much as right ones")

assert late < 0.6 * early
assert accuracy_after > accuracy_before + 0.03
assert left > 1.1 * right
assert not out.info.negative_curvature

# %% [markdown]
# `not_stationary` would ask for more steps of adaptation, or for a larger λ. Seven digits are few to learn from: the
# gain on new ones is real and modest, and after many more outer steps it shrinks, as the start fits the seven.
#
# Next: [the guide](../guides/imaml.md), with all tasks at once by `jax.vmap`.
