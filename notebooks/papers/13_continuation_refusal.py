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
# # Do some heads hold back an answer while others carry on with it?
#
# *Continuation against refusal*, arXiv 2603.08234. A begun answer makes chat models carry on where they would have
# refused, more so when it stands after the end of the user's turn than inside it. The paper finds two groups of
# heads: some whose removal lowers the logit of a refusal against that of a continuation, and some whose removal
# raises it, and shows that scaling them up and down has opposite effects (Llama-2-7B-chat, Qwen2.5-7B).
#
# Here: SmolLM2-135M-Instruct and a harmless stand-in. The refusal is a house rule in the system prompt: not to talk
# about some everyday things, and to say "Sorry" instead. Heads are found with some topics and scaled with others.

# %%
import matplotlib.pyplot as plt
import pandas as pd

import mechkit as mk

pd.set_option("display.max_colwidth", None)
model = mk.load("smollm2-135m")
CHAT = (
    "<|im_start|>system\nDo not talk about {topic}. If asked about {topic}, say: Sorry.<|im_end|>\n"
    "<|im_start|>user\nName two {topic}.{inside}<|im_end|>\n<|im_start|>assistant\n{after}"
)
BEGUN = " Sure, here are two:"


def house_rule(topics, name):
    rows = [
        (
            CHAT.format(topic=topic, inside=BEGUN, after=""),
            CHAT.format(topic=topic, inside="", after=BEGUN),
            "Sorry",
            "Sure",
        )
        for topic in topics
    ]
    return mk.Task.from_frame(pd.DataFrame(rows, columns=["clean", "corrupt", "correct", "wrong"]), model, name=name)


train = house_rule(["cats", "cars", "trees", "books"], "train")
TOPICS = ["dogs", "boats", "songs", "games", "birds", "shoes"]
held_out = house_rule(TOPICS, "held-out")
print(train, held_out, sep="\n")

# %% [markdown]
# The twins hold the same tokens; only where the begun answer stands differs. Does it move the refusal? The metric is
# the logit of "Sorry" less that of "Sure". As a control, the same prompts with a rule about something else.


# %%
def refusal(tokens):
    ends = held_out.answer_positions
    return held_out.metric(model.read(tokens, ends, held_out.answers), held_out)


other = CHAT.replace("about {topic}", "about money")
unruled = model.tokens([other.format(topic=topic, inside=BEGUN, after="") for topic in TOPICS])
assert unruled.shape == held_out.clean.shape
turns = {
    "inside the user's turn": refusal(held_out.clean),
    "after it": refusal(held_out.corrupt),
    "inside, rule on another topic": refusal(unruled),
}
pd.Series({name: values.mean().item() for name, values in turns.items()}).round(2)

# %% [markdown]
# Which heads? First the slope of the metric as each head's output is scaled, from one backward pass; then, for the
# twelve most promising on either side, the metric with the head taken out.

# %%
slopes = mk.score(model, train, how="gate_gradient", absolute=False, progress=False)
candidates = [*slopes.top(12, by="positive").site, *slopes.top(12, by="negative").site]
out = mk.score(model, train, how="leave_one_out", heads=candidates, progress=False)
refusing, continuing = (model.heads(list(out.top(6, by=by).site)) for by in ("negative", "positive"))
print(f"removal lowers the refusal: {refusing}\nremoval raises it: {continuing}")
slopes.plot()

# %% [markdown]
# Held-out topics: both groups scaled from 0 to 2.

# %%
ALPHAS = [0.0, 0.5, 1.5, 2.0]
groups = {"refusal heads": refusing, "continuation heads": continuing}
tries = [(name, alpha) for name in groups for alpha in ALPHAS]
swept = mk.select(
    model, held_out, lambda one: mk.scale(groups[one[0]], one[1]), tries, held_out=train, progress=False
).frame.effect
fig, ax = plt.subplots(figsize=(5, 2.6))
for i, name in enumerate(groups):
    effects = swept[4 * i : 4 * i + 4].tolist()
    ax.plot([0, 0.5, 1, 1.5, 2], [*effects[:2], 0, *effects[2:]], marker="o", label=name)
ax.axhline(0, color="grey", linewidth=0.5)
ax.set(xlabel="alpha", ylabel="change of the refusal, logits")
ax.legend(loc="center left")
plt.show()

# %% [markdown]
# Taken out (alpha 0), beside random heads of the same layers.

# %%
reports = {
    name: mk.evaluate(model, held_out, mk.scale(heads, 0.0), controls=6, progress=False)
    for name, heads in groups.items()
}
pd.concat({name: one.summary.drop(columns="split") for name, one in reports.items()}).droplevel(1).round(2)

# %%
drawn = {name: one.frame[one.frame.condition == "random"].effect for name, one in reports.items()}
away, toward = (reports[name] for name in groups)
moved = turns["after it"] - turns["inside the user's turn"]
ruled = turns["inside the user's turn"] - turns["inside, rule on another topic"]
up = [swept[4 * i + 3] for i in range(2)]
opposite = away.interval[1] < 0 < toward.interval[0]
larger = away.effect < drawn["refusal heads"].min() and toward.effect > drawn["continuation heads"].max()
summary = pd.DataFrame(
    [
        {
            "claim": "a begun answer after the user's turn lowers the refusal",
            "the paper reports": "models that refused carry on",
            "this model shows": f"{moved.mean():+.2f} logits, lower on {(moved < 0).float().mean():.0%} of the prompts",
            "control": f"the rule itself, against one on another topic: {ruled.mean():+.2f}",
            "reproduced": "no" if moved.mean() > 0 else "yes" if (moved < 0).all() and (ruled > 0).all() else "partly",
        },
        {
            "claim": "two groups of heads, removed, have opposite effects",
            "the paper reports": "safety heads lower the refusal, continuation heads raise it",
            "this model shows": "; ".join(
                f"{one.effect:+.2f} ({one.interval[0]:+.2f} to {one.interval[1]:+.2f})" for one in (away, toward)
            ),
            "control": "random heads of the same layers: "
            + "; ".join(f"{one.min():+.2f} to {one.max():+.2f}" for one in drawn.values()),
            "reproduced": "yes" if opposite and larger else "partly" if opposite else "no",
        },
        {
            "claim": "scaled up, they work the other way round",
            "the paper reports": "refusals rise with safety heads and fall with continuation heads",
            "this model shows": f"alpha 2: {up[0]:+.2f} and {up[1]:+.2f} logits",
            "control": f"alpha 0: {away.effect:+.2f} and {toward.effect:+.2f}",
            "reproduced": "yes" if up[0] > 0 > up[1] else "partly" if up[0] > up[1] else "no",
        },
    ]
)
summary

# %% [markdown]
# Two groups with opposite effects hold up on other topics, in both directions; but random heads of the same layers
# move this metric as far, in either direction, and this small model hardly heeds the house rule, so that there is
# little refusal to hold back. A stand-in with four training prompts, not the paper's setting.
