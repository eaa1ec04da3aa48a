# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Does a probe that works within its prompts work on fresh ones, and does tempering heads change a disposition?
#
# Sadasivan 2026, *Disposition distillation*, arXiv 2604.11867, a negative result. Making single heads louder or
# quieter ("tempering") moved no disposition, such as owning up to uncertainty, without harm to the rest; and a linear
# probe with an AUC of 0.683 in cross-validation fell to 0.516 on fresh prompts.
#
# Here: SmolLM2-135M instead of five models of 0.6B to 2.3B. The probe is asked whether the model is about to give a
# right answer to a small sum, from what heads have at the last token; fresh prompts ask for a difference in other
# words. Tempering should make the model answer "Maybe" instead of "Yes". The paper's judge is not there.

# %%
import matplotlib.pyplot as plt
import pandas as pd
import torch

import mechkit as mk

pd.set_option("display.max_colwidth", None)
model = mk.load("smollm2-135m")
ADD = ("If you add {} and {}, you get ", "When you add {} to {}, the result is ")
TAKE = ("If you have {} apples and eat {}, you are left with ",)
sums = [(a, b, a + b) for a in range(1, 9) for b in range(1, 9) if a + b < 10]
differences = [(a, b, a - b) for a in range(2, 10) for b in range(1, a)]


def asked(templates, items):
    """Prompts, and whether the likeliest next token is the right digit."""
    texts = [template.format(a, b) for template in templates for a, b, _ in items]
    ids, ends = model.tokens(texts), model.run(texts).lengths - 1
    said = [model.to_text(token) for token in model.read(ids, ends, None).argmax(-1).tolist()]
    return texts, [int(word == str(c)) for word, (*_, c) in zip(said, items * len(templates), strict=True)]


order = torch.randperm(len(sums), generator=torch.Generator().manual_seed(0)).tolist()
train_texts, train_labels = asked(ADD, [sums[i] for i in order[:24]])
within_texts, within_labels = asked(ADD, [sums[i] for i in order[24:]])
fresh_texts, fresh_labels = asked(TAKE, differences)
for name, labels in (("train", train_labels), ("same templates", within_labels), ("fresh", fresh_labels)):
    print(f"{name}: right on {sum(labels)} of {len(labels)}")

# %% [markdown]
# A probe of every head at the last token, in cross-validation on the training prompts.

# %%
scores = mk.score(model, train_texts, how="probe", labels=train_labels, folds=4)
frame = scores.frame
print(f"best {frame.score.max():.2f}, mean {frame.score.mean():.2f}; shuffled labels: mean {frame.shuffled.mean():.2f}")
scores.plot()

# %% [markdown]
# One probe on the nine best heads together (3% of all), learned from the training prompts: ridge regression by its
# closed form. Its AUC on other sums in the same words, and on fresh prompts, beside a probe of shuffled labels.

# %%
heads = model.heads(list(frame.nlargest(9, "score").site))


def vectors(texts):
    run = model.run(texts, record=heads)
    rows = torch.arange(len(texts))
    return torch.cat([run[str(head)][rows, run.lengths - 1] for head in heads], dim=-1)


def learned(x, labels):
    signs = 2.0 * torch.tensor(labels) - 1
    return torch.linalg.solve(x.T @ x / len(x) + torch.eye(x.shape[1]), x.T @ signs / len(x))


def auc(values, labels):
    labels = torch.tensor(labels).bool()
    return (values[labels][:, None] > values[~labels]).float().mean().item()


x, within, fresh = (vectors(texts) for texts in (train_texts, within_texts, fresh_texts))
mean, scale = x.mean(0), x.std(0)
x, within, fresh = ((one - mean) / scale for one in (x, within, fresh))
weights = learned(x, train_labels)
draws = [
    [train_labels[i] for i in torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(s))]
    for s in range(50)
]
shuffled = [learned(x, labels) for labels in draws]
table = pd.DataFrame(
    [
        (name, auc(one @ weights, labels), *pd.Series([auc(one @ w, labels) for w in shuffled]).quantile([0.05, 0.95]))
        for name, one, labels in (("same words", within, within_labels), ("fresh", fresh, fresh_labels))
    ],
    columns=["prompts", "AUC", "shuffled, 5%", "shuffled, 95%"],
).set_index("prompts")
table.round(2)

# %%
fig, axes = plt.subplots(1, 2, figsize=(6, 2.2), sharex=True)
for ax, one, labels, title in zip(
    axes, (within, fresh), (within_labels, fresh_labels), ("same words", "fresh"), strict=True
):
    values, right = one @ weights, torch.tensor(labels).bool()
    ax.hist([values[~right].tolist(), values[right].tolist()], bins=12, label=["wrong", "right"])
    ax.set(title=title, xlabel="probe")
axes[1].legend(loc="upper left")
plt.show()

# %% [markdown]
# Tempering: the output of the same heads times alpha. The metric is the logit of " Maybe" less that of " Yes" after a
# question with no sure answer; alpha is chosen on training questions.


# %%
def questions(nouns, name):
    rows = [
        (f"Q: Will the {noun} be {word} tomorrow? A:", f"Q: Will the {other} be {word} tomorrow? A:", " Maybe", " Yes")
        for noun, other in zip(nouns, nouns[1:] + nouns[:1], strict=True)
        for word in ("open", "late", "cold")
    ]
    return mk.Task.from_frame(pd.DataFrame(rows, columns=["clean", "corrupt", "correct", "wrong"]), model, name=name)


train = questions(["train", "shop", "road", "film"], "train")
held_out = questions(["school", "park", "bank", "river"], "held-out")
ALPHAS = [0.0, 0.5, 0.8, 1.0, 1.25, 1.5, 2.0]
tempered = mk.select(model, train, lambda alpha: mk.scale(heads, alpha), ALPHAS, held_out=held_out, progress=False)
tempered.frame[["candidate", "metric", "effect", "chosen"]].round(3)

# %% [markdown]
# Held-out questions; random heads of the same layers beside it, and what plain English loses.

# %%
report = mk.evaluate(model, held_out, tempered.edit, controls=15, ranking=scores, progress=False)
maybe = held_out.with_metric("correct_rate")
said = [
    maybe.metric(model.read(maybe.clean, maybe.answer_positions, None, edits), maybe).mean().item()
    for edits in ([], [tempered.edit])
]
print(f"answers that begin with Maybe: {said[0]:.2f}, tempered {said[1]:.2f}")
report

# %%
report.plot()

# %%
within_auc, fresh_auc = table.AUC["same words"], table.AUC["fresh"]
drawn = report.frame[report.frame.condition == "random"].effect
summary = pd.DataFrame(
    [
        {
            "claim": "a probe works within its prompts",
            "the paper reports": "AUC 0.683 in cross-validation",
            "this model shows": f"best head told right {frame.score.max():.2f} in cross-validation; nine heads on "
            f"held-out sums: AUC {within_auc:.2f}",
            "control": f"shuffled labels: best head {frame.shuffled.max():.2f}; "
            + "AUC {:.2f} to {:.2f}".format(*table.iloc[0, 1:]),
            "reproduced": "yes"
            if within_auc > table.iloc[0, 2]
            else "partly"
            if frame.score.max() > frame.shuffled.max()
            else "no",
        },
        {
            "claim": "it fails on fresh prompts",
            "the paper reports": "AUC 0.516",
            "this model shows": f"AUC {fresh_auc:.2f} on differences",
            "control": "shuffled labels, 5 to 95%: {:.2f} to {:.2f}".format(*table.iloc[1, 1:]),
            "reproduced": "no"
            if fresh_auc > table.iloc[1, 2]
            else "yes"
            if within_auc > table.iloc[0, 2]
            else "partly",
        },
        {
            "claim": "tempering heads does not move the disposition without harm",
            "the paper reports": "no operator moved it without harm",
            "this model shows": f"alpha {tempered.chosen}: {report.effect:+.2f} logits; said Maybe {said[0]:.2f} to "
            f"{said[1]:.2f}; neutral text {report.side_effect:+.2f} nats",
            "control": f"random heads of the same layers: {drawn.min():+.2f} to {drawn.max():+.2f} logits",
            "reproduced": "yes"
            if said[1] <= said[0] + 0.1 or not report.beats_controls
            else "partly"
            if report.side_effect > 0.1
            else "no",
        },
    ]
)
summary

# %% [markdown]
# What looks well in cross-validation, as the best of 270 heads, is at chance on other sums and on fresh prompts
# alike; and tempering moves a logit without changing what is said. A negative result like the paper's, at a smaller
# size: with 48 training prompts a weak signal would be missed.
