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
# # Can a step of reasoning be made to look at the rule it cites?
#
# Nguyen, Dang and Inoue 2026, *Attention-aware intervention* (AAI), arXiv 2601.09805. In prompts with numbered rules,
# some heads show a diagonal pattern. The method keeps heads by the shape of their pattern, and adds to the scores
# between a step of reasoning and the text of the rule it cites, so that the step looks there. The paper reports
# better logical reasoning of models of 14B to 32B.
#
# Here: SmolLM2-135M and prompts of two rules and one worked step. The amount added is the head's median score, as in
# the paper, and for comparison a plain bias; heads are kept on training prompts, results are of other words.

# %%
import math

import matplotlib.pyplot as plt
import pandas as pd
import torch

import mechkit as mk

pd.set_option("display.max_colwidth", None)
model = mk.load("smollm2-135m")
PAIRS = [("big", "nice"), ("red", "cold"), ("young", "kind"), ("green", "quiet"), ("round", "rough"), ("blue", "smart")]


def rules(pairs, names, label):
    """Two rules, a step that cites one, and a second step that cites the other, up to its conclusion."""
    rows, spans = [], {"rule": [], "cite": []}
    for (a, b), (c, d) in [(one, other) for one in pairs for other in pairs if one != other]:
        for cited in (0, 1):
            facts = [(a, b), (c, d)]
            (p, q), (r, s) = facts[cited], facts[1 - cited]
            parts = [f"Rule{i + 1}: If someone is {x} then they are {y}.\n" for i, (x, y) in enumerate(facts)]
            parts.append(f"{names[0]} is {r}. By Rule{2 - cited}, {names[0]} is {s}.\n{names[1]} is {p} and {r}. By")
            parts += [f" Rule{cited + 1}", f", {names[1]} is"]
            ids = [model.encode(part) for part in parts]
            starts = [sum(map(len, ids[:i])) for i in range(len(ids) + 1)]
            spans["rule"].append((starts[cited], starts[cited + 1]))
            spans["cite"].append((starts[3], starts[5]))
            rows.append(([token for part in ids for token in part], model.encode(f" {q}")[0], model.encode(f" {s}")[0]))
    clean, correct, wrong = (torch.tensor(column) for column in zip(*rows, strict=True))
    spans = {name: torch.tensor(where) for name, where in spans.items()}
    corrupt = clean[torch.arange(len(clean)) ^ 1]  # the twin cites the other rule
    return mk.Task.from_tokens(clean, corrupt, correct, wrong, spans=spans, name=label)


train = rules(PAIRS[:3], ["Anne", "Bob"], "train")
held_out = rules(PAIRS[3:], ["Paul", "Mary"], "held-out")
print(model.to_text(held_out.clean[0]))
difference = mk.metrics.logit_diff(model.run(held_out).logits, held_out)
print(f"logit difference {difference.mean():.2f}, right on {(difference > 0).float().mean():.0%}")

# %% [markdown]
# The shapes of each head's pattern: of its large entries, how many have a large neighbour along the diagonal, below
# and beside. The tenth of the heads that is most diagonal is kept.

# %%
shapes = mk.score(model, train, how=["diagonal", "vertical", "horizontal"])
kept = shapes["diagonal"].heads(model.n_layers * model.n_heads // 10)
over = (shapes["diagonal"].frame.score > 0.3).sum()
print(f"{over} heads above the paper's threshold of 0.3; kept: {kept}")
shapes["diagonal"].plot()

# %% [markdown]
# The edits: what is added to the scores between the citing tokens (from "Rule" to the end) and the text of the cited
# rule. One is neutral.


# %%
def look(heads, median=None, bias=None):
    return mk.attend(heads, median=median, bias=bias, keys="rule", positions="cite")


def attention(edits=()):
    """From the citing tokens to the cited rule, mean over prompts, by kept head."""
    run = model.run(held_out, record=[f"{head}.pattern" for head in kept], edits=edits)
    (rule, cite), rows = (held_out.spans[name].tolist() for name in ("rule", "cite")), range(len(held_out))
    return pd.Series(
        {
            str(head): sum(
                run[f"{head}.pattern"][i, slice(*cite[i]), slice(*rule[i])].sum(-1).mean().item() for i in rows
            )
            / len(held_out)
            for head in kept
        }
    )


assert torch.allclose(model.run(held_out, edits=[look(kept, bias=0.0)]).logits, model.run(held_out).logits, atol=1e-3)
tries = {"median": look(kept, median=1.0), "minus the median": look(kept, median=-1.0)}
tries |= {"bias log 4": look(kept, bias=math.log(4))}
shares = pd.DataFrame({"none": attention(), **{name: attention([edit]) for name, edit in tries.items()}})
shares.plot.box(figsize=(6, 2.6), ylabel="attention to the cited rule")
plt.show()
shares.mean().round(3)

# %% [markdown]
# What that does to the answer: the logit of the cited rule's conclusion less that of the other's, beside random heads
# of the same layers.

# %%
reports = {name: mk.evaluate(model, held_out, edit, controls=6, progress=False) for name, edit in tries.items()}
table = pd.concat({name: one.summary.drop(columns="split") for name, one in reports.items()}).droplevel(1)
table.round(2)

# %%
reports["bias log 4"].plot()


# %%
def told(name):
    one, drawn = reports[name], reports[name].frame[reports[name].frame.condition == "random"].effect
    low, high = one.interval
    return {
        "this model shows": f"{name}: {one.effect:+.2f} logits ({low:+.2f} to {high:+.2f})",
        "control": f"random heads of the same layers: {drawn.min():+.2f} to {drawn.max():+.2f}",
        "reproduced": "yes" if low > 0 and one.effect > drawn.max() else "partly" if low > 0 else "no",
    }


MEDIAN, BIAS = "median", "bias log 4"
looked = shares.mean()
by_heads = {name: (shares[name] > shares["none"]).mean() for name in (MEDIAN, BIAS)}
summary = pd.DataFrame(
    [
        {
            "claim": "the median score draws the step to its rule",
            "the paper reports": "more attention to the cited rule in the kept heads",
            "this model shows": f"attention {looked['none']:.3f} to {looked[MEDIAN]:.3f}, more in "
            f"{by_heads[MEDIAN]:.0%} of {len(kept)} heads",
            "control": f"minus the median {looked['minus the median']:.3f}; bias log 4 {looked[BIAS]:.3f}",
            "reproduced": "yes" if by_heads[MEDIAN] > 0.9 else "partly" if looked[MEDIAN] > looked["none"] else "no",
        },
        {"claim": "adding the median makes the answer better", "the paper reports": "better logical reasoning"}
        | told(MEDIAN),
        {"claim": "looking more at the cited rule makes the answer better", "the paper reports": "the same, by its aim"}
        | told(BIAS),
    ]
)
summary

# %% [markdown]
# Adding the median takes attention away from the rule in most of the kept heads, where the median score is below 0; a
# bias does draw the step to its rule, and does not help the answer. The model is right on half of these prompts,
# which is chance, so that there is little reasoning here to help.
