"""The effect of an edit, prompt by prompt, with nothing shared between runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import mechkit as mk
from mechkit.edits import Edit


def metric(model: mk.Model, task: mk.Task, edits: Sequence[Edit]) -> torch.Tensor:
    """The metric of each prompt ``[n]``: a whole run each, every logit of it."""
    return torch.stack([_one(model, task[[i]], edits) for i in range(len(task))])


def _one(model: mk.Model, prompt: mk.Task, edits: Sequence[Edit]) -> torch.Tensor:
    edited, own = (model.run(prompt, edits=some).logits[:, -1] for some in (edits, ()))
    rows = edited.gather(1, prompt.answers) if prompt.metric.reads == "answers" else edited
    return prompt.metric(rows, prompt, own)[0]


def text_loss(model: mk.Model, ids: Sequence[int], edits: Sequence[Edit]) -> float:
    """Mean over the tokens of a text after the first, of minus the log-probability that the model gave it, in nats."""
    logits = model.run(torch.tensor([list(ids)]), edits=edits).logits[0]
    each = [-logits[i - 1].log_softmax(-1)[ids[i]] for i in range(1, len(ids))]
    return float(torch.stack(each).mean())


def interval(differences: Sequence[float], seed: int, draws: int = 10_000) -> tuple[float, float]:
    """2.5% and 97.5% of the means of prompts drawn with replacement."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.as_tensor(differences, dtype=torch.float64)
    means = values[torch.randint(len(values), (draws, len(values)), generator=draw)].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
