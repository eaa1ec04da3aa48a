"""Edge attribution beside TransformerLens and beside the literal code: ``python -m benchmarks.attribution``.

The model has the size of GPT-2 small (12 layers of 12 heads, 768 wide), random weights and a small vocabulary, and so
needs no download; TransformerLens' edge attribution serves no grouped-query model. All pairs have the same answers, as
its metric is not told which pair it is of. It scores every edge at every position; these are added up.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

import mechkit as mk
from mechkit.patching.edges import edges
from tests.reference import attribution as literal

from . import measure

VOCAB = 1024


def main() -> None:
    """Measure, print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attribution", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of the work on one pair (default: %(default)s)")
    parser.add_argument("--rounds-many", type=int, default=2, help="of the work on 8 pairs (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    model, hub = _models(options.layers, options.device)
    print(f"{model}, {len(model.graph())} edges\n{measure.machine()}\n", flush=True)
    print(measure.table([]), flush=True)
    rows: list[measure.Row] = []
    compare = partial(measure.compare, device=options.device, done=rows)
    for n, first, rounds in ((1, 9, options.rounds), (8, 9, options.rounds_many), (8, 0, options.rounds_many)):
        task = pairs(n, 15, first)
        others = {"TransformerLens": partial(_lens, model, task)}
        if n == 1:
            others["literal"] = partial(_literal, hub, task)
        compare(_told(n, first), rounds, partial(_ours, model, task), others)
    task = pairs(8, 15, 9)
    forward = {"one forward pass of the base prompts": partial(_forward, hub, task)}
    compare(_told(8, 9) + ", costs", options.rounds, partial(_ours, model, task), forward)
    if options.out:
        measure.save(rows, options.out, model="gpt2 size, random", device=options.device)


def _told(n: int, first: int) -> str:
    return f"EAP, {n} pair{'s' * (n > 1)} of 15 tokens that differ from token {first + 1} on"


def pairs(n: int, length: int, first: int, seed: int = 0) -> mk.Task:
    """Random prompts whose twins differ at one token."""
    draw = torch.Generator().manual_seed(seed)
    clean = torch.randint(3, VOCAB, (n, length), generator=draw)
    corrupt = clean.clone()
    corrupt[:, first] = (clean[:, first] + 1) % VOCAB
    return mk.Task.from_tokens(clean, corrupt, torch.full((n,), 5), torch.full((n,), 6), name="random")


def _models(layers: int, device: str) -> tuple[mk.Model, Any]:
    """The model as mechkit serves it, and the Hub's own."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config: Any = GPT2Config(vocab_size=VOCAB, n_layer=layers, n_positions=64, bos_token_id=1, eos_token_id=2)
    config._attn_implementation = "eager"
    found: list[Any] = []
    for _ in range(2):
        torch.manual_seed(0)
        own: Any = GPT2LMHeadModel(config)
        found.append(own.eval().to(device))
    return mk.load((found[0], None), device=device), found[1]


def _ours(model: mk.Model, task: mk.Task) -> torch.Tensor:
    """Scores ``[sources, targets]`` in the metric's unit, zero where there is no edge."""
    found = edges(model, task, direction="denoise", progress=False)
    gap = found.meta["options"]["source_metric"] - found.meta["options"]["base_metric"]
    return torch.from_numpy(found.matrix()).nan_to_num() * gap


def _lens(model: mk.Model, task: mk.Task) -> torch.Tensor:
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, Node, attribution_patch

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, task.correct[0]] - logits[0, -1, task.wrong[0]]

    clean, corrupt = task.clean.to(model.info.device), task.corrupt.to(model.info.device)
    found = attribution_patch(model.bridge, clean, corrupt, metric, EdgeAttributionConfig("edge")).edge_scores
    graph = model.graph()
    total = torch.zeros(graph.exists.shape, dtype=torch.float64)
    kinds = {"q_input": "q", "k_input": "k", "v_input": "v", "mlp_in": "mlp", "mlp_out": "mlp", "attn_head_out": "z"}

    def place(node: Node, index: dict) -> int:
        if node.kind in ("embed", "logits"):
            return index[mk.site(node.kind)]
        return index[mk.sites.Site(int(node.layer or 0), node.head, kinds[node.kind])]

    for (source, target), score in found.items():
        total[place(source, graph.source_index), place(target, graph.target_index)] += score
    return total


def _literal(hub: Any, task: mk.Task) -> torch.Tensor:
    device = next(hub.parameters()).device
    graph = mk.graph.Graph(hub.config.n_layer, hub.config.n_head, hub.config.n_head)
    scores = literal.edge_scores(hub, task.corrupt.to(device), task.clean.to(device), partial(_metric, task))
    return scores.mean(0) * torch.from_numpy(graph.exists).to(device)


def _metric(task: mk.Task, logits: torch.Tensor) -> torch.Tensor:
    return mk.metrics.logit_diff(logits, task)


@torch.inference_mode()
def _forward(hub: Any, task: mk.Task) -> torch.Tensor:
    return hub(task.clean.to(next(hub.parameters()).device), use_cache=False).logits.mean()


if __name__ == "__main__":
    main()
