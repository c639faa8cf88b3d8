# %% [markdown]
# # Which passages made this word?
#
# A language model completes a sentence. Where did it get that from? This tutorial builds a small transformer, trains
# it on the texts by which scikit-learn describes its data sets, and asks an influence function for the passages
# behind a word.
#
# You need PyTorch and scikit-learn, and about ten minutes. Nothing is downloaded.
#
# ## Texts
#
# Six data sets come with a description. Cut each into passages of 12 words.

# %%
import re
from collections import Counter

import matplotlib.pyplot as plt
import torch
from sklearn import datasets
from torch.nn.functional import cross_entropy

import lowrank_inverse as li
import lowrank_inverse_torch as lit

names = ["iris", "diabetes", "wine", "breast_cancer", "linnerud", "digits"]
passages, documents = [], []
for name in names:
    text = getattr(datasets, f"load_{name}")().DESCR.lower()
    words = re.findall(r"[a-z]+", text)
    for start in range(0, len(words) - 12, 6):
        passages.append(words[start : start + 12])
        documents.append(name)
counts = Counter(word for passage in passages for word in passage)
vocabulary = ["?", *sorted(word for word, count in counts.items() if count > 3)]
number = {word: i for i, word in enumerate(vocabulary)}
tokens = torch.tensor([[number.get(word, 0) for word in p] for p in passages])
print(f"{len(passages)} passages, {len(vocabulary)} words")

# %% [markdown]
# ## A transformer
#
# One block: embeddings of words and places, causal attention, a layer of tanh, and scores for the next word.


# %%
class Transformer(torch.nn.Module):
    def __init__(self, num_words, width=16, length=11):
        super().__init__()
        self.word = torch.nn.Embedding(num_words, width)
        self.place = torch.nn.Parameter(0.1 * torch.randn(length, width))
        self.query_key_value = torch.nn.Linear(width, 3 * width)
        self.hidden = torch.nn.Linear(width, 2 * width)
        self.back = torch.nn.Linear(2 * width, width)
        self.next = torch.nn.Linear(width, num_words)

    def forward(self, tokens):
        n = tokens.shape[1]
        h = self.word(tokens) + self.place[:n]
        q, k, v = self.query_key_value(h).chunk(3, dim=-1)
        weight = q @ k.mT / q.shape[-1] ** 0.5
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        h = h + weight.masked_fill(future, -1e9).softmax(dim=-1) @ v
        h = h + self.back(torch.tanh(self.hidden(h)))
        return self.next(h)


def loss(scores, target):  # one number for each passage
    known = target > 0  # words that are in the vocabulary
    losses = cross_entropy(scores.mT, target, reduction="none")
    return (losses * known).sum(dim=1) / known.sum(dim=1).clamp(min=1)


decay = 2e-3


def fit(kept):
    torch.manual_seed(0)
    model = Transformer(len(vocabulary))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        losses = loss(model(tokens[:, :-1]), tokens[:, 1:])
        penalty = decay / 2 * sum((p**2).sum() for p in model.parameters())
        ((kept * losses).mean() + penalty).backward()
        optimizer.step()
    return model


model = fit(torch.ones(len(passages)))
print(f"{sum(p.numel() for p in model.parameters())} parameters")

# %% [markdown]
# ## A word, and what is behind it
#
# Take a beginning from the description of the breast cancer data, and let the model go on.

# %%
beginning = "copy of uci ml breast cancer wisconsin".split()
asked = torch.tensor([[number.get(word, 0) for word in beginning]])
with torch.no_grad():
    likely = model(asked)[0, -1].softmax(dim=0)
best = likely.argmax()
print(" ".join(beginning), "→", vocabulary[best], f"({likely[best]:.2f})")

# %% [markdown]
# The question to the influence function is the loss of that one word. `query_loss` says so; the training loss stays
# that of all words. The curvature is that of Gauss and Newton, which is never negative, so that a network that is not
# trained to the last digit does no harm.


# %%
def next_word(scores, target):
    return cross_entropy(scores[:, -1], target[:, -1], reduction="none")


training = (tokens[:, :-1], tokens[:, 1:])
query = (asked, torch.cat([asked[:, 1:], best[None, None]], dim=1))
influence = lit.InfluenceFunction(
    model, loss, training, ridge=decay, damping=3e-3, solver=li.CG(rtol=1e-2)
)
scores = influence.scores(query, query_loss=next_word)[0]
for i in scores.topk(4).indices:
    print(f"{scores[i]:+.1f} {documents[i]}: {' '.join(passages[i])}")

# %% [markdown]
# The passages that helped the most are those where these words stand, though nobody searched for a string: the scores
# come from gradients alone. Where do the helpful passages come from, all in all?

# %% alt="Bars: how many of the 20 most helpful passages come from each of six texts. That on breast cancer has the most."
top = Counter(documents[i] for i in scores.topk(20).indices)
fig, ax = plt.subplots(figsize=(6, 2.6))
ax.bar(names, [top[name] for name in names])
ax.set(ylabel="of the 20 most helpful")
plt.show()

# %% [markdown]
# ## How to tell that it worked
#
# Train again without the ten most helpful passages, and without ten at random. The word should lose more of
# its probability in the first case.


# %%
def probability(removed):
    kept = torch.ones(len(passages))
    kept[removed] = 0
    model = fit(kept)
    with torch.no_grad():
        return model(asked)[0, -1].softmax(dim=0)[best].item()


helpful = scores.topk(10).indices
others = torch.randperm(
    len(passages), generator=torch.Generator().manual_seed(0)
)[:10]
without_helpful, without_others = probability(helpful), probability(others)
print(f"probability of “{vocabulary[best]}”: {likely[best]:.2f}")
print(f"without the ten most helpful passages: {without_helpful:.2f}")
print(f"without ten at random: {without_others:.2f}")

assert top["breast_cancer"] == max(top.values())
assert without_helpful < 0.5 * likely[best]
assert without_helpful < 0.5 * without_others

# %% [markdown]
# Next: [the guide](../guides/influence.md). It takes models of Hugging Face as they come, with their tokenizers'
# batches.
