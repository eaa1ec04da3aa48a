"""Scores of heads, what they cost beside one forward pass and beside their definitions: ``python -m benchmarks.heads``.

1. Every score of patterns that one pass gives, of all heads, on 512 tokens: beside a forward pass alone (whose row has
   no difference to report), and beside a run that keeps all patterns and sums them afterwards.
2. Every head taken out by itself, on repeated random tokens: beside one run of the model a head.
"""

from __future__ import annotations

from functools import partial

import torch

import mechkit as mk
from mechkit.head_scores.attention import IN_ONE_PASS
from mechkit.head_scores.looking import LINEAR, Seen, weights
from mechkit.head_scores.repeated import repeated_tokens

from . import measure

SUMS = [name for name in LINEAR if name != "share"]


def main() -> None:
    """Measure, print a table, and write it as JSON where asked."""
    parser = measure.parser("heads", __doc__)
    parser.add_argument("--length", type=int, default=512, help="tokens (default: %(default)s)")
    parser.add_argument("--literal", type=int, default=9, help="heads that the loop takes out (default: %(default)s)")
    options = parser.parse_args()
    model = mk.load(options.model, device=options.device)
    print(f"{model}\n{measure.machine()}\n\n{measure.table([])}", flush=True)
    rows: list[measure.Row] = []
    ids = repeated_tokens(model, n=1, length=options.length // 2)[:, : options.length]
    ours = partial(_in_one_pass, model, ids)
    found = ours()
    measure.compare(
        f"{len(IN_ONE_PASS)} scores of {len(model.heads())} heads, {ids.shape[1]} tokens",
        options.rounds,
        ours,
        {"a forward pass": partial(_forward, model, ids, found), "all patterns kept": partial(_kept, model, ids)},
        device=options.device,
        done=rows,
    )
    some = repeated_tokens(model, n=4, length=20)
    heads = [str(head) for head in model.heads()]
    heads = heads[:: len(heads) // options.literal][: options.literal]
    measure.compare(
        f"{len(model.heads())} heads taken out, 4 x {some.shape[1]} tokens (loop: {len(heads)} of them)",
        options.rounds,
        partial(_taken_out, model, some, heads),
        {"a run a head": partial(_one_by_one, model, some, heads)},
        device=options.device,
        done=rows,
        part=len(heads) / len(model.heads()),
    )
    if options.out:
        measure.save(rows, options.out)


def _in_one_pass(model: mk.Model, ids: torch.Tensor) -> torch.Tensor:
    scores = mk.score(model, ids, "attention")
    return torch.tensor([scores[name].frame.score.to_numpy() for name in SUMS])


def _forward(model: mk.Model, ids: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    model.run(ids)
    return found


def _kept(model: mk.Model, ids: torch.Tensor) -> torch.Tensor:
    run = model.run(ids, record=[f"{layer}.0.pattern" for layer in range(model.n_layers)])
    queries = torch.ones_like(ids, dtype=torch.bool)
    queries[:, 0] = False
    seen = Seen(ids, queries)
    patterns = torch.stack([run[f"{head}.pattern"][0] for head in model.heads()])
    return torch.stack([(patterns * weights(name, seen).to(patterns)).sum((1, 2)) for name in SUMS])


def _taken_out(model: mk.Model, ids: torch.Tensor, heads: list[str]) -> torch.Tensor:
    scores = mk.score(model, ids, "leave_one_out", progress=False).frame.set_index("site").score
    return torch.tensor(scores.loc[heads].to_numpy())


def _one_by_one(model: mk.Model, ids: torch.Tensor, heads: list[str]) -> torch.Tensor:
    def loss(*edits: mk.edits.Edit) -> float:
        logits = model.run(ids, edits=list(edits)).logits[:, :-1].float()
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().to(logits.device)))

    clean = loss()
    return torch.tensor([loss(mk.ablate(head)) - clean for head in heads])


if __name__ == "__main__":
    main()
