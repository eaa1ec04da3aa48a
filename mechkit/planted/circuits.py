"""Five transformers of which the circuit is known, each with a task that runs through it.

1. The weights of a circuit's heads are set by hand; all other heads and MLPs are active distractors; see ``draft``.
2. The task's prompts come in pairs that differ in what the circuit carries, so that the metric has the same size and
   the opposite sign on the corrupt prompt: the gap is 6 logits on every pair (on ``linear``, as it comes).
3. An edge is true where a clean run in which that one edge carries what it does on the corrupt prompt has another
   metric. ``effects`` has the change as a fraction of the gap, exact to 1e-5; every other edge has the effect 0, to
   1e-5. The other way round, a corrupt run in which one edge carries what it does on the clean prompt, all is the same.
4. Edge attribution with integrated gradients ranks the true edges first on all five. The gradient of the clean run
   alone tells next to nothing of edges into a query or key (``induction``, ``q_composition``): there the softmax is
   saturated, and what is left of its gradient is about 1e-8.

Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (induction, composition); Wang et al. 2022
(arXiv 2211.00593, section 3.4) and McGrath et al. 2023 (arXiv 2307.15771) for backup; Goldowsky-Dill et al. 2023
(arXiv 2304.05969) for path effects; Syed et al. 2023 (arXiv 2310.10348) and Hanna et al. 2024 (arXiv 2403.17806) for
edge attribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import OptionError
from ..model import Model
from ..tasks.task import Task
from .draft import D_HEAD, VOCAB, Draft, content, position, same, value

Edge = tuple[str, str]

_GAIN = 3.0  # logit of a copied token
_TOKENS = range(VOCAB)
_BOS, _END = 0, 1


@dataclass(frozen=True, eq=False)
class Planted:
    """A model, a task, and the circuit that is known to do it.

    Attributes:
        model: three layers of four heads, MLPs, no tokenizer.
        task: pairs of prompts, measured by the logit difference.
        edges: the true edges, (source, target): sources ``"embed"``, ``"0.0"``; targets ``"1.0.q"``, ``"1.kv0.v"``
            on a grouped-query model, ``"logits"``.
        nodes: the true heads.
        effects: what each true edge does, as a fraction of the gap; see the module. Empty where it has no round value.
        dormant: edges that belong to the mechanism, yet do nothing as long as every true node is at work.
        about: what the circuit does.
    """

    model: Model
    task: Task
    edges: tuple[Edge, ...]
    nodes: tuple[str, ...]
    about: str
    effects: Mapping[Edge, float] = field(default_factory=dict)
    dormant: tuple[Edge, ...] = ()


def induction(seed: int = 0, n: int = 12, grouped: bool = False) -> Planted:
    """``F A B C D G A`` is continued by B: 0.0 tells each token the one before it, 1.0 looks for "after an A".

    The pairs are of three kinds in turn: A and C change places (what 0.0 carries to the key of 1.0), the last token is
    C (its query), or B and D change places (its value). So the edge to the logits has the effect 1, and every other
    one its kind's share of the pairs, a third.

    Args:
        seed: of the distractors and the prompts.
        n: number of pairs.
        grouped: grouped-query attention, two groups of two heads.

    Raises:
        OptionError: fewer than three pairs (a kind would be missing), or a seed below 0.
    """
    _check(seed, n, least=3)
    draft = Draft(seed, grouped)
    copied = value(same(_TOKENS), "tok")
    draft.head(0, 0, q={"one": position(1)}, k={"one": position(0)}, v={"tok": copied}, o={"mid": copied.T})
    looked_for = {"tok": content(same(_TOKENS), "tok")}
    draft.head(1, 0, q=looked_for, k={"mid": looked_for["tok"]}, v={"tok": copied}, o={"out": _GAIN * copied.T})
    clean, corrupt, answers = [], [], []
    for i in range(n):
        a, b, c, d, f, g = torch.randperm(VOCAB, generator=draft.random)[:6].tolist()
        first, second = ((a, b), (c, d)) if _below(2, draft) else ((c, d), (a, b))
        prompt = torch.tensor([f, *first, *second, g, a])
        twin = prompt.clone()
        if i % 3 == 0:
            twin[:6] = _exchanged(prompt[:6], a, c)
        elif i % 3 == 1:
            twin[6] = c
        else:
            twin = _exchanged(prompt, b, d)
        clean.append(prompt)
        corrupt.append(twin)
        answers.append((b, d))
    share = [len(range(kind, n, 3)) / n for kind in range(3)]
    effects = {
        ("embed", draft.slot(0, 0, "v")): share[0],
        ("0.0", draft.slot(1, 0, "k")): share[0],
        ("embed", "1.0.q"): share[1],
        ("embed", draft.slot(1, 0, "v")): share[2],
        ("1.0", "logits"): 1.0,
    }
    about = "0.0 writes the previous token, the key of 1.0 reads it, and 1.0 copies what followed the current token"
    return _planted("induction", draft, (clean, corrupt, answers), effects, ("0.0", "1.0"), about)


def q_composition(seed: int = 0, n: int = 12, grouped: bool = False) -> Planted:
    """A cue names a class: 0.0 carries it to the end, where only the query of 1.0 reads it and finds the class's item.

    Tokens: 0 begins and 1 ends a prompt; 2, 3, 4 are the cues; 5 and 6, 7 and 8, 9 and 10 the items of their classes.
    The twin has another cue. The path from 0.0 to the query of 1.0 has the effect 1, that of every other sender 0.

    Args and errors as ``induction``; one pair is enough.
    """
    _check(seed, n)
    draft = Draft(seed, grouped)
    cues, items = range(2, 5), range(5, 11)
    one, copied = content({0: 0}, "one"), value(same(items), "tok")
    cue = value({c: c - 2 for c in cues}, "tok")
    is_cue, is_class = content(dict.fromkeys(cues, 0), "tok"), content({i: (i - 5) // 2 for i in items}, "tok")
    draft.head(0, 0, q={"one": one}, k={"tok": is_cue}, v={"tok": cue}, o={"mid": value(same(range(3)), "mid").T})
    asked = content(same(range(3)), "mid")
    draft.head(1, 0, q={"mid": asked}, k={"tok": is_class}, v={"tok": copied}, o={"out": _GAIN * copied.T})
    clean, corrupt, answers = [], [], []
    for _ in range(n):
        shown = [5 + 2 * kind + _below(2, draft) for kind in range(3)]
        right, wrong = torch.randperm(3, generator=draft.random)[:2].tolist()
        middle = torch.tensor([2 + right, *shown, 11])[torch.randperm(5, generator=draft.random)]
        clean.append(torch.tensor([_BOS, *middle.tolist(), _END]))
        corrupt.append(clean[-1].where(clean[-1] != 2 + right, 2 + wrong))
        answers.append((shown[right], shown[wrong]))
    edges = [("embed", draft.slot(0, 0, "v")), ("0.0", "1.0.q"), ("1.0", "logits")]
    about = "0.0 writes a class that only the query of 1.0 reads; 1.0 copies the item of that class"
    return _planted("q_composition", draft, (clean, corrupt, answers), dict.fromkeys(edges, 1.0), ("0.0", "1.0"), about)


def distractor_copy(seed: int = 0, n: int = 12, grouped: bool = False) -> Planted:
    """Heads 0.0 and 0.2 both copy an item to the end; 1.0 and 1.2 both pass their copies on; only 1.0 is read.

    The twins 0.2 and 1.2 have the same patterns and values as 0.0 and 1.0, to the bit, and write copies as large: to a
    room that nothing reads but distractors. Tokens: 0 begins and 1 ends a prompt, 2 and 3 fill it, 4 to 11 are items.
    The twin prompt has another item.

    Args and errors as ``induction``; one pair is enough.
    """
    _check(seed, n)
    draft = Draft(seed, grouped)
    one, items, copied = content({0: 0}, "one"), content(dict.fromkeys(_items(), 0), "tok"), value(same(_TOKENS), "tok")
    itself = content({_END: 0}, "tok")
    for head, room, read in ((0, "mid", "out"), (2, "shadow", "shadow")):
        item = value(same(_items()), "tok")
        draft.head(0, head, q={"one": one}, k={"tok": items}, v={"tok": item}, o={room: copied.T})
        draft.head(1, head, q={"one": one}, k={"tok": itself}, v={room: copied}, o={read: _GAIN * copied.T})
    edges = [("embed", draft.slot(0, 0, "v")), ("0.0", draft.slot(1, 0, "v")), ("1.0", "logits")]
    about = "0.0 and 0.2 copy the item to the end, 1.0 and 1.2 pass it on; the logits read 1.0 and not 1.2"
    return _planted("distractor_copy", draft, _item_prompts(n, draft), dict.fromkeys(edges, 1.0), ("0.0", "1.0"), about)


def backup(seed: int = 0, n: int = 12, grouped: bool = False) -> Planted:
    """1.0 copies the item and raises a flag; 2.0 would copy it too, but while the flag is up it looks at token 0.

    Tokens and prompts as in ``distractor_copy``. What holds:

    * On both prompts 1.0 is at work and 2.0 writes nothing, so between clean and corrupt only the edges of 1.0 carry
      anything: ``edges`` has those two. Neither replacing one edge nor any gradient on the way tells of 2.0.
    * Take 1.0 away (set to zero) and 2.0 does all of its work: the metric stays as it was. Take both, and it is 0. So
      setting 1.0 to zero has the effect 0 although it has the whole effect, and its edges are true all the same: with
      what they carry on the corrupt prompt, the corrupt answer comes.
    * ``dormant`` has the edges of the backup: the flag (1.0 to the query of 2.0), the item and the copy. With 1.0 set
      to zero, the last two have the effect 1 each. With the flag's edge alone set to zero, both heads copy and the
      metric doubles; first-order attribution of that same change gives 0, the softmax being saturated.

    Args and errors as ``induction``; one pair is enough.
    """
    _check(seed, n)
    draft = Draft(seed, grouped)
    raised = D_HEAD - 1  # dimension of the value that says "an item"
    copied, is_item = value(same(_items()), "tok"), content(dict.fromkeys(_items(), 0), "tok")
    flagged = copied + value(dict.fromkeys(_items(), raised), "tok")
    draft.head(
        1,
        0,
        q={"one": content({0: 0}, "one")},
        k={"tok": is_item},
        v={"tok": flagged},
        o={"out": _GAIN * copied.T, "flag": value({0: raised}, "flag").T},
    )
    draft.head(
        2,
        0,
        q={"one": content({0: 0}, "one"), "flag": 2 * content({0: 1}, "flag")},
        k={"tok": is_item + content({_BOS: 1}, "tok")},
        v={"tok": copied},
        o={"out": _GAIN * copied.T},
    )
    edges = [("embed", draft.slot(1, 0, "v")), ("1.0", "logits")]
    dormant = (("1.0", "2.0.q"), ("embed", draft.slot(2, 0, "v")), ("2.0", "logits"))
    about = "1.0 copies the item; 2.0 copies it only when 1.0 is taken away"
    return _planted(
        "backup", draft, _item_prompts(n, draft), dict.fromkeys(edges, 1.0), ("1.0",), about, dormant=dormant
    )


def linear(seed: int = 0, n: int = 12, grouped: bool = False) -> Planted:
    """Every head attends evenly to every token before it, and MLPs write nothing: logits are linear in the embedding.

    So edge attribution at any point, exact replacement of an edge and path patching along it give the same number. Of
    the edges between the embedding, 0.0, 1.0, 2.0 and the logits all are true but one: 1.0 does not read the embedding.
    Twins differ in every token. The answers are the tokens whose logits rise and fall most from corrupt to clean.

    Args and errors as ``induction``; one pair is enough.
    """
    _check(seed, n)
    draft = Draft(seed, grouped)

    def weights(rooms: Sequence[str], transposed: bool = False) -> dict[str, Tensor]:
        made = {room: torch.randn(VOCAB, D_HEAD, generator=draft.random) / D_HEAD**0.5 for room in rooms}
        return {room: matrix.T for room, matrix in made.items()} if transposed else made

    for layer, (read, written) in enumerate(
        [(["tok"], ["mid", "out"]), (["mid"], ["shadow", "out"]), (["tok", "mid", "shadow"], ["out"])]
    ):
        draft.head(layer, 0, q={}, k={}, v=weights(read), o=weights(written, transposed=True))
    draft.unembed("tok", _GAIN * torch.randn(VOCAB, VOCAB, generator=draft.random) / VOCAB**0.5)
    draft.unembed("out", _GAIN * torch.eye(VOCAB))
    clean = torch.randint(VOCAB, (n, 6), generator=draft.random)
    corrupt = (clean + torch.randint(1, VOCAB, (n, 6), generator=draft.random)) % VOCAB
    model = draft.finished("planted-linear", linear=True)
    rise = model.run(clean).logits[:, -1] - model.run(corrupt).logits[:, -1]
    v = [draft.slot(layer, 0, "v") for layer in range(3)]
    edges = (
        *(("embed", end) for end in (v[0], v[2], "logits")),
        *(("0.0", end) for end in (v[1], v[2], "logits")),
        *(("1.0", end) for end in (v[2], "logits")),
        ("2.0", "logits"),
    )
    task = Task.from_tokens(clean, corrupt, rise.argmax(-1), rise.argmin(-1), name="linear")
    about = "0.0, 1.0 and 2.0 pass the tokens on; everything from the embedding to the logits is linear"
    return Planted(model, task, edges, ("0.0", "1.0", "2.0"), about)


def _planted(
    name: str,
    draft: Draft,
    prompts: tuple[list[Tensor], list[Tensor], list[tuple[int, int]]],
    effects: dict[Edge, float],
    nodes: tuple[str, ...],
    about: str,
    dormant: tuple[Edge, ...] = (),
) -> Planted:
    clean, corrupt, answers = prompts
    correct, wrong = torch.tensor(answers).T
    task = Task.from_tokens(torch.stack(clean), torch.stack(corrupt), correct, wrong, name=name)
    return Planted(draft.finished(f"planted-{name}"), task, tuple(effects), nodes, about, effects, dormant)


def _items() -> range:
    return range(4, VOCAB)


def _item_prompts(n: int, draft: Draft) -> tuple[list[Tensor], list[Tensor], list[tuple[int, int]]]:
    """Prompts with one item among fillers, and twins with another item; the items are the answers."""
    clean, corrupt, answers = [], [], []
    for _ in range(n):
        item, other = (4 + torch.randperm(VOCAB - 4, generator=draft.random)[:2]).tolist()
        prompt = torch.tensor([_BOS, *(2 + _below(2, draft) for _ in range(4)), _END])
        prompt[1 + _below(4, draft)] = item
        clean.append(prompt)
        corrupt.append(prompt.where(prompt != item, other))
        answers.append((item, other))
    return clean, corrupt, answers


def _exchanged(prompt: Tensor, one: int, other: int) -> Tensor:
    return torch.where(prompt == one, other, torch.where(prompt == other, one, prompt))


def _below(end: int, draft: Draft) -> int:
    return int(torch.randint(end, (), generator=draft.random))


def _check(seed: int, n: int, least: int = 1) -> None:
    for name, given, first in (("seed", seed, 0), ("n", n, least)):
        if isinstance(given, bool) or not isinstance(given, int) or not first <= given < 2**63:
            raise OptionError(f"{name}={given!r}", expected=f"a whole number from {first}")
