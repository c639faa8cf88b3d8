# %% [markdown]
# # Which images made this prediction?
#
# A network takes an 8 for a 3, or calls it an 8 by a hair's breadth. Which of its training images led it there?
# Leave one out and train again, for each of them, and you would know. An *influence function* predicts the outcome
# without any training.
#
# You need PyTorch and scikit-learn, and about five minutes.
#
# ## A network, trained to the end
#
# The theory assumes that the training loss is at a minimum. So train by L-BFGS, in double precision, with a weight
# decay.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import lowrank_inverse_torch as lit

torch.manual_seed(0)
digits = load_digits()
order = torch.randperm(1797)
x, y = torch.tensor(digits.data)[order] / 16, torch.tensor(digits.target)[order]
train, test = (x[:400], y[:400]), (x[400:], y[400:])
model = torch.nn.Sequential(
    torch.nn.Linear(64, 12), torch.nn.Tanh(), torch.nn.Linear(12, 10)
).double()
decay = 0.01
start = {name: p.detach().clone() for name, p in model.named_parameters()}


def fit(kept):
    model.load_state_dict(start)
    parameters = list(model.parameters())
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=400,
        tolerance_grad=1e-6,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        losses = cross_entropy(model(train[0]), train[1], reduction="none")
        penalty = decay / 2 * sum((p**2).sum() for p in parameters)
        total = (kept * losses).mean() + penalty
        total.backward()
        return total

    optimizer.step(closure)


fit(torch.ones(400))
scores = model(test[0])
wrong = scores.argmax(dim=1) != test[1]
print(f"test accuracy {1 - wrong.double().mean():.2f}")

# %% [markdown]
# ## Three mistakes, and who made them
#
# Take the three test images with the largest loss. `scores` has a row for each of them and a column for each
# training image: positive where the image helped, negative where it harmed.


# %%
def loss(output, target):  # one number for each example
    return cross_entropy(output, target, reduction="none")


with torch.no_grad():
    hardest = loss(scores, test[1]).topk(3).indices
query = test[0][hardest], test[1][hardest]
influence = lit.InfluenceFunction(model, loss, train, ridge=decay, damping=1e-3)
found = influence.scores(query)
print(tuple(found.shape))

# %% alt="Three rows of digits. In each the test image comes first, then the four training images that helped its prediction the most, then the four that harmed it the most."
fig, axes = plt.subplots(3, 9, figsize=(8, 3.4))
for row, (image, label) in enumerate(zip(*query, strict=True)):
    helpful, harmful = found[row].topk(4).indices, (-found[row]).topk(4).indices
    said = model(image).argmax()
    images = [(image, f"{label}, said {said}")]
    images += [(train[0][i], f"+ {train[1][i]}") for i in helpful]
    images += [(train[0][i], f"− {train[1][i]}") for i in harmful]
    for ax, (shown, title) in zip(axes[row], images, strict=True):
        ax.imshow(shown.numpy().reshape(8, 8), cmap="gray_r")
        ax.set_title(title)
        ax.axis("off")
plt.show()

# %% [markdown]
# Most of the helpful images have the right label. Most of the harmful ones have another label and look like the test
# image, or have the right one and look like another digit.
#
# ## How to tell that it worked
#
# Ask the truth: remove the ten most harmful images, train again, and see what becomes of the loss of the test image.
# Then do the same with the ten most helpful, and with ten at random.


# %%
def change(removed, row):
    kept = torch.ones(400)
    kept[removed] = 0
    fit(kept)
    with torch.no_grad():
        after = loss(model(query[0]), query[1])
    return (after - before)[row].item()


with torch.no_grad():
    before = loss(model(query[0]), query[1])
groups = {
    "harmful": (-found[0]).topk(10).indices,
    "random": torch.randperm(400)[:10],
    "helpful": found[0].topk(10).indices,
}
predicted = {
    name: found[0][rows].sum().item() / 400 for name, rows in groups.items()
}
true = {name: change(rows, 0) for name, rows in groups.items()}
for name in groups:
    print(
        f"without ten {name}: predicted {predicted[name]:+.1f}, "
        f"true {true[name]:+.1f}"
    )

assert true["harmful"] < -0.1 < 0.1 < true["helpful"]
assert abs(true["random"]) < min(-true["harmful"], true["helpful"])

# %% [markdown]
# The signs and the order are right. The sizes are those of a first-order estimate: ten images out of 400, all of
# them extreme, move the network further than a tangent can follow.
#
# Next: [the guide](../guides/influence.md), with large data sets, long runs, and the agreement with leaving out
# each of 1437 images in turn, and [the same question for text](examples_behind_text.md).
