"""A Llama written out edge by edge: what a part reads is the sum of what the parts before it wrote, each one by name.

Knows nothing of mechkit but the Hub's module that a model holds. So one edge can carry something else
(``exact_effects``), and every input of a part has a gradient of its own (``attribution``). Tensors are
``[batch, pos, d_model]``; names are those of mechkit's sites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from scipy.stats import rankdata
from torch import Tensor

Edge = tuple[str, str]


@dataclass(eq=False)
class Trace:
    """One run: logits of the last position ``[batch, vocab]``, what each part wrote, and what each input read."""

    logits: Tensor
    wrote: dict[str, Tensor] = field(default_factory=dict)
    read: dict[str, Tensor] = field(default_factory=dict)
    patterns: dict[str, Tensor] = field(default_factory=dict)


class WrittenOut:
    """The parts and edges of a Hub Llama."""

    def __init__(self, hf):
        self.hf, config = hf, hf.config
        self.heads, self.groups, self.layers = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.num_hidden_layers,
        )
        self.width, self.eps, self.theta = config.head_dim, config.rms_norm_eps, config.rope_parameters["rope_theta"]

    def slots(self, layer: int, kind: str) -> list[str]:
        """Names of a layer's queries, keys or values."""
        if kind == "q" or self.groups == self.heads:
            return [f"{layer}.{head}.{kind}" for head in range(self.heads)]
        return [f"{layer}.kv{group}.{kind}" for group in range(self.groups)]

    def edges(self) -> list[Edge]:
        """Every edge, from what writes to what reads later."""
        found, before = [], ["embed"]
        for layer in range(self.layers):
            found += [(source, slot) for kind in "qkv" for slot in self.slots(layer, kind) for source in before]
            before += [f"{layer}.{head}" for head in range(self.heads)]
            found += [(source, f"m{layer}") for source in before]
            before.append(f"m{layer}")
        return found + [(source, "logits") for source in before]

    def embedded(self, tokens: Tensor) -> Tensor:
        return self.hf.model.embed_tokens.weight[tokens]

    def run(
        self,
        embedded: Tensor,
        instead: Mapping[Edge, Tensor] | None = None,
        silent: Sequence[str] = (),
        normed: bool = True,
    ) -> Trace:
        """One run.

        Args:
            embedded: token embeddings.
            instead: what edges carry in place of what their source wrote.
            silent: parts that write zeros.
            normed: False leaves the root mean square of the stream out of the norms: 2**13 in its place.
        """
        instead, trace = instead or {}, Trace(embedded, {"embed": embedded})

        def reads(name: str, norm) -> Tensor:
            carried = [instead.get((source, name), wrote) for source, wrote in trace.wrote.items()]
            trace.read[name] = total = torch.stack(carried).sum(0)  # a tensor, and a gradient, of its own
            if total.requires_grad:
                total.retain_grad()
            size = (total.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() if normed else 2.0**13
            return norm.weight * (total / size)

        def writes(made: dict[str, Tensor]) -> None:
            trace.wrote |= {name: wrote * (name not in silent) for name, wrote in made.items()}

        for layer, block in enumerate(self.hf.model.layers):
            writes(self._attend(layer, block, reads, trace))
            given = reads(f"m{layer}", block.post_attention_layernorm)
            gate, up = given @ block.mlp.gate_proj.weight.T, given @ block.mlp.up_proj.weight.T
            writes({f"m{layer}": (torch.nn.functional.silu(gate) * up) @ block.mlp.down_proj.weight.T})
        trace.logits = reads("logits", self.hf.model.norm)[:, -1] @ self.hf.lm_head.weight.T
        return trace

    def _attend(self, layer: int, block, reads, trace: Trace) -> dict[str, Tensor]:
        """What each head of a layer writes."""
        own, norm, made = block.self_attn, block.input_layernorm, {}
        projected = {}
        for kind in "qkv":
            weight = getattr(own, f"{kind}_proj").weight.unflatten(0, (-1, self.width))
            parts = [reads(slot, norm) @ rows.T for slot, rows in zip(self.slots(layer, kind), weight, strict=True)]
            projected[kind] = [self._turned(part) if kind in "qk" else part for part in parts]
        for head in range(self.heads):
            group = head * self.groups // self.heads
            q, k, v = projected["q"][head], projected["k"][group], projected["v"][group]
            scores = q @ k.transpose(1, 2) / self.width**0.5
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
            pattern = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            trace.patterns[f"{layer}.{head}"] = pattern
            out = own.o_proj.weight[:, head * self.width : (head + 1) * self.width]
            made[f"{layer}.{head}"] = pattern @ v @ out.T
        return made

    def _turned(self, part: Tensor) -> Tensor:
        """Rotary positions: dimensions i and i + d/2 turn together, theta ** (-2i/d) radians a position."""
        half = self.width // 2
        angle = torch.arange(part.shape[1])[:, None] * self.theta ** (-torch.arange(half) / half)
        first, second = part[..., :half], part[..., half:]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1
        )


def logit_diff(logits: Tensor, task) -> Tensor:
    """``[batch]``, of logits ``[batch, vocab]``."""
    rows = torch.arange(len(logits))
    return logits[rows, task.correct] - logits[rows, task.wrong]


def ends(graph: WrittenOut, task) -> tuple[Trace, Trace]:
    """The clean and the corrupt run."""
    return graph.run(graph.embedded(task.clean)), graph.run(graph.embedded(task.corrupt))


@torch.no_grad()
def exact_effects(
    graph: WrittenOut,
    task,
    direction: str = "noise",
    silent: Sequence[str] = (),
    carries: str = "source",
    edges: Sequence[Edge] | None = None,
) -> dict[Edge, float]:
    """Every edge's share of the gap: one run an edge, in which it alone carries what it does on the other prompt.

    Args:
        direction: ``noise`` runs the clean prompts, ``denoise`` the corrupt ones.
        edges: which; all of them where left out.
        silent: parts that write zeros, in every run.
        carries: ``zero`` has the edge carry zeros instead; the share is of the same gap.
    """
    tokens = (task.clean, task.corrupt) if direction == "noise" else (task.corrupt, task.clean)
    base, source = (graph.run(graph.embedded(ids), silent=silent) for ids in tokens)
    start = logit_diff(base.logits, task)
    gap = (logit_diff(source.logits, task) - start).mean()
    effects = {}
    for edge in edges or graph.edges():
        carried = source.wrote[edge[0]] if carries == "source" else torch.zeros_like(source.wrote[edge[0]])
        changed = graph.run(graph.embedded(tokens[0]), {edge: carried}, silent)
        effects[edge] = float((logit_diff(changed.logits, task) - start).mean() / gap)
    return effects


def attribution(
    graph: WrittenOut, task, steps: int = 5, carries: str = "source", silent: Sequence[str] = ()
) -> dict[Edge, float]:
    """Edge attribution patching with integrated gradients of the inputs (Hanna et al. 2024, arXiv 2403.17806).

    The score of an edge is the sum over positions of (clean - corrupt) of what its source writes, times the gradient
    of the metric at its target's input. Gradients are averaged over ``steps`` points of the line from the corrupt to
    the clean embedding, the corrupt end included; ``steps=0`` is the gradient of the clean run alone (Syed et al.
    2023). Divided by the gap, as ``exact_effects``.

    Args:
        carries: ``zero`` is for edges that are to carry zeros instead: (clean - 0) is what the source writes.
        silent: parts that write zeros, in every run.
    """
    clean, corrupt = (graph.embedded(ids).detach() for ids in (task.clean, task.corrupt))
    gradients: dict[str, Tensor] = {}
    points = [k / steps for k in range(steps)] or [1.0]
    for point in points:
        at = (corrupt + point * (clean - corrupt)).requires_grad_()
        trace = graph.run(at, silent=silent)
        logit_diff(trace.logits, task).sum().backward()
        for slot, read in trace.read.items():
            given = torch.zeros_like(read) if read.grad is None else read.grad
            gradients[slot] = gradients.get(slot, 0) + given / len(points)
    with torch.no_grad():
        first, second = graph.run(clean, silent=silent), graph.run(corrupt, silent=silent)
        gap = (logit_diff(first.logits, task) - logit_diff(second.logits, task)).mean()
        scores = {}
        for source, target in graph.edges():
            change = first.wrote[source] - (second.wrote[source] if carries == "source" else 0)
            scores[source, target] = float((change * gradients[target]).sum() / len(clean) / gap)
    return scores


def auroc(scores: Mapping[Edge, float], true: Sequence[Edge]) -> float:
    """Probability that a true edge has a larger absolute score than another one, ties counting one half."""
    ranks = rankdata([abs(score) for score in scores.values()])
    positive = [edge in true for edge in scores]
    n, m = sum(positive), len(positive) - sum(positive)
    return float((sum(rank for rank, yes in zip(ranks, positive, strict=True) if yes) - n * (n + 1) / 2) / (n * m))
