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
# # Does a chat template draw attention away from what the user says?
#
# Wang et al. 2024, *On the loss of context awareness in general instruction fine-tuning*, arXiv 2411.02688. Models
# tuned for chat give less attention to the user's tokens when the chat template is there, and use what the user tells
# them less. The paper fixes this in training, and afterwards by steering: scores of all keys outside the user's span
# get log alpha, with alpha a little below 1.
#
# Here: SmolLM2-135M-Instruct instead of models of 1B to 8B. The user states a wrong capital and asks for it; an
# answer in context repeats it. Heads and alpha are picked with some countries, and all results are of other
# countries.

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy.stats import bootstrap

import mechkit as mk

pd.set_option("display.max_colwidth", None)
model = mk.load("smollm2-135m")
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
AFTER = "<|im_end|>\n<|im_start|>assistant\n"
FILLER = "Here is a thing that somebody wrote down in an old notebook, and left:\n\n", ", who knows.\n A:"
before, after = model.encode(BEFORE), model.encode(AFTER)
first = before[:1]  # of every prompt, and in no span: heads give the first token much attention whatever it is
filled = [*first, *model.encode(FILLER[0])[1 - len(before) :]], model.encode(FILLER[1])[-len(after) :]
FORMS = {"no template": (first, model.encode(" A:")), "chat template": (before, after), "plain text, as long": filled}
assert [len(part) for part in filled] == [len(before), len(after)]
countries = list(mk.tasks.known_capitals(model))[:24]

# %% [markdown]
# "The capital of France is the city of Rome. Q: What is the capital of France?" is what the user says, "The capital
# of France is the city of" the begun answer. The same in three forms: without a template, within the chat template,
# and within plain text of the same length, as a control.


# %%
def conversations(form, countries, n):
    task = mk.tasks.capitals_conflict(model, n=n, countries=countries, known=False, check=False)
    end = int(task.spans["X3"][0, 0]) - 5  # before " A: The capital of"
    left, right = (torch.tensor(part, dtype=torch.long).expand(n, -1) for part in FORMS[form])
    start = int(task.clean[0, 0] == first[0])
    user = len(left[0]), len(left[0]) + end - start
    clean, corrupt = (
        torch.cat([left, ids[:, start:end], right, ids[:, end + 2 :]], 1) for ids in (task.clean, task.corrupt)
    )
    spans = {"user": torch.tensor(user).expand(n, 2)}
    spans["answer"] = torch.tensor([user[1] + len(right[0]), clean.shape[1]]).expand(n, 2)
    return mk.Task.from_tokens(clean, corrupt, task.correct, task.wrong, spans=spans, metric="prob", name=form)


held_out = {form: conversations(form, countries[12:], 12) for form in FORMS}
train = conversations("chat template", countries[:12], 8)
print(model.to_text(held_out["chat template"].clean[0]))

# %% [markdown]
# The share of attention that tokens of the answer give to the user's span, mean over all heads, of each prompt.

# %%
shares = {
    form: mk.score(model, task, how="share", span="user", queries="answer", each=True).frame
    for form, task in held_out.items()
}
by_layer = pd.DataFrame({form: frame.groupby("layer").score.mean() for form, frame in shares.items()})
by_prompt = pd.DataFrame({form: frame.groupby("prompt").score.mean() for form, frame in shares.items()})
by_layer.plot(figsize=(6, 2.6), ylabel="share on the user's span")
plt.show()
by_prompt.mean().round(3)

# %% [markdown]
# How often the answer is the city that the user states, the likeliest token of all, and its probability.


# %%
def rate(task, name):
    task = task.with_metric(name)
    return task.metric(model.read(task.clean, task.answer_positions, None), task).mean().item()


rates = pd.DataFrame(
    {name: {form: rate(task, name) for form, task in held_out.items()} for name in ("correct_rate", "prob")}
)
rates.round(2)

# %% [markdown]
# Steering: the tenth of the heads that look most at the user's span in the training prompts; scores of all keys
# outside it get log alpha, for queries of the answer. Alpha is chosen on the training prompts.

# %%
ranking = mk.score(model, train, how="share", span="user", queries="answer")
heads = ranking.heads(model.n_layers * model.n_heads // 10)


def steer(alpha):
    return mk.attend(heads, bias=math.log(alpha), keys="user", outside=True, positions="answer")


ALPHAS = [0.95, 0.9, 0.7, 0.5, 0.25]
chosen = mk.select(model, train, steer, ALPHAS, held_out=held_out["chat template"], progress=False)
chosen.frame[["candidate", "metric", "effect", "chosen"]].round(3)

# %% [markdown]
# The probability of the stated city on held-out countries, with the template; beside it random heads of the same
# layers and the heads that look least at the user's span.

# %%
task = held_out["chat template"]
assert torch.allclose(model.run(task, edits=[steer(1.0)]).logits, model.run(task).logits, atol=1e-3)
report = mk.evaluate(model, task, chosen.edit, controls=6, ranking=ranking, progress=False)
report

# %%
report.plot()

# %%
chat, plain, long = (by_prompt[form] for form in ("chat template", "no template", "plain text, as long"))


def interval(values):
    low, high = bootstrap((values,), np.mean, random_state=0, method="percentile").confidence_interval
    return low, high


lost, beyond = interval(chat - plain), interval(chat - long)
low, high = report.interval
drawn = report.frame[report.frame.condition == "random"].effect
summary = pd.DataFrame(
    [
        {
            "claim": "with a chat template less attention goes to the user's tokens",
            "the paper reports": "lower shares in tuned models with the template",
            "this model shows": f"{plain.mean():.3f} to {chat.mean():.3f}, difference {lost[0]:+.3f} to {lost[1]:+.3f}",
            "control": f"against plain text, as long ({long.mean():.3f}): {beyond[0]:+.3f} to {beyond[1]:+.3f}",
            "reproduced": "yes" if max(lost[1], beyond[1]) < 0 else "partly" if lost[1] < 0 else "no",
        },
        {
            "claim": "and the context is used less",
            "the paper reports": "worse in tasks that need the context",
            "this model shows": "stated city: rate {:.2f} to {:.2f}, probability {:.2f} to {:.2f}".format(
                *(rates.loc[form, name] for name in rates for form in ("no template", "chat template"))
            ),
            "control": "plain text, as long: rate {:.2f}, probability {:.2f}".format(*rates.loc["plain text, as long"]),
            "reproduced": "yes"
            if (rates.loc["chat template"] < rates.drop("chat template").min()).all()
            else "partly"
            if rates.prob["chat template"] < rates.prob["no template"]
            else "no",
        },
        {
            "claim": "steering attention to the user's span brings it back",
            "the paper reports": "better, with alpha 0.9 to 0.95",
            "this model shows": f"alpha {chosen.chosen}: probability {report.effect:+.3f} ({low:+.3f} to {high:+.3f})",
            "control": f"random heads of the same layers: {drawn.min():+.3f} to {drawn.max():+.3f}",
            "reproduced": "yes" if low > 0 and report.effect > drawn.max() else "partly" if low > 0 else "no",
        },
    ]
)
summary

# %% [markdown]
# The template does take attention from the user's span, but so does plain text of the same length; it costs one of
# twelve answers here and a little probability, while plain text costs nothing. The heads that look most at the user's
# span do not help the answer by looking more. One small tuned model, and a context of one sentence that it nearly
# always follows.
