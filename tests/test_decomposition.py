"""Contextual decomposition: the fast form is the literal one, parts sum to the whole, and the truth is found."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from families import FAMILIES, VOCAB, plain, tiny, tiny_task
from reference.contextual import Setting, contextual
from torch import nn

import mechkit as mk
from mechkit import errors
from mechkit.backends.protocol import Read
from mechkit.decomposition.split import Rules, Split
from mechkit.decomposition.split_pass import Source, key_of, split_pass

POS, N = 7, 2
END = torch.full((N,), POS - 1)
COLUMNS = torch.tensor([[3, 4], [5, 6]])
KINDS = ("q", "k", "v", "z", "mlp")


def _tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (N, POS), generator=torch.Generator().manual_seed(seed))


def _task() -> mk.Task:
    clean, corrupt = _tokens(1), _tokens(2)
    corrupt[:, 0] = clean[:, 0]
    return mk.Task.from_tokens(clean, corrupt, torch.tensor([3, 5]), torch.tensor([4, 6]))


def _everything(model: mk.Model, rules: Rules, names: list[str], keys: list) -> tuple[dict, Split]:
    """What is at every site in a pass with zero references: copies of totals and relevant parts, and the logits."""
    backend, tokens, seen = model.backend, _tokens(), {}
    replay = backend.start(tokens, 0)

    def keep(key):
        def tap(x: Split) -> None:
            seen[key] = x.total.clone(), None if x.relevant is None else x.relevant.clone()

        return tap

    everywhere = torch.ones(N, POS, dtype=torch.bool)
    source = Source(tuple(mk.site(name) for name in names), everywhere)
    zeros = {key_of(one): torch.zeros(()) for one in source.sites}
    out = split_pass(backend, replay, rules, [source], zeros, {key: keep(key) for key in keys}, Read(END, COLUMNS))
    return seen, out


def _keys(model: mk.Model) -> list:
    keys = [(kind, layer) for layer in range(model.n_layers) for kind in KINDS]
    return keys + [("resid", layer) for layer in range(model.n_layers + 1)]


@pytest.mark.parametrize("attention", ["frozen", "product"])
@pytest.mark.parametrize("family", FAMILIES)
def test_completeness(family, attention):
    """Totals are the model's own at every site; with everything relevant and no biases, nothing is left over."""
    hub = plain(family)
    with torch.no_grad():
        for name, parameter in hub.named_parameters():
            if "bias" in name:
                parameter.zero_()
    model = mk.load((hub, None))
    names = ["embed", *map(str, model.heads()), *(f"m{layer}" for layer in range(model.n_layers))]
    # The embedding alone, so that what arrives everywhere has come through the rules; then every part set.
    for sources in (["embed"], names):
        seen, out = _everything(model, Rules(attention, stabilise=False), sources, _keys(model))
        record = [mk.Site(layer, None if kind in ("mlp", "resid") else 0, kind) for kind, layer in seen]
        own = model.backend.forward(_tokens(), record=record)
        for key, (total, relevant) in seen.items():
            torch.testing.assert_close(total, own.recorded[key], atol=1e-4, rtol=1e-4)
            if (key[0] in ("q", "k") and attention == "product") or key[0] not in ("q", "k"):
                torch.testing.assert_close(relevant[0], total, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out.relevant[0], out.total, atol=1e-4, rtol=1e-4)
        picked = own.logits[torch.arange(N), END].gather(1, COLUMNS)
        torch.testing.assert_close(out.total, picked, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_completeness_with_biases(family):
    """With the model's own biases, a head, an MLP and a token together: totals are still the model's own."""
    model = mk.load((plain(family), None))
    seen, out = _everything(model, Rules("product"), ["embed", "1.2", "m1"], _keys(model))
    record = [mk.Site(layer, None if kind in ("mlp", "resid") else 0, kind) for kind, layer in seen]
    own = model.backend.forward(_tokens(), record=record)
    for key, (total, relevant) in seen.items():
        torch.testing.assert_close(total, own.recorded[key], atol=1e-4, rtol=1e-4)
        assert relevant is None or bool(relevant.isfinite().all())
    torch.testing.assert_close(out.relevant + out.irrelevant, out.total[None], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stabilise", [True, False])
@pytest.mark.parametrize("biases", ["shared", "irrelevant"])
@pytest.mark.parametrize("activation", ["remainder", "shapley"])
@pytest.mark.parametrize("attention", ["frozen", "product"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_fast_is_literal(family, attention, activation, biases, stabilise):
    """Every site, sets that begin in several layers, at all positions and at some, joined in one pass."""
    hub, tokens = plain(family), _tokens()
    generator = torch.Generator().manual_seed(3)
    model = mk.load((plain(family), None))
    some = torch.zeros(N, POS, dtype=torch.bool)
    some[:, 2:5] = True
    sets = [
        (("embed",), some),
        (("0.1",), some | True),
        (("0.3", "m1"), some),
        (("1.2",), some),
        (("2.0",), some | True),
    ]
    width = {"z": (N, POS, 4, 8), "mlp": (N, POS, 32), "resid": (N, POS, 32)}
    sources = [Source(tuple(map(mk.site, names)), where) for names, where in sets]
    keys = {key_of(one) for source in sources for one in source.sites}
    references = {key: 0.1 * torch.randn(*width[key[0]], generator=generator) for key in sorted(keys)}
    rules = Rules(attention, activation, biases, stabilise)
    seen: dict = {}

    def keep(key):
        return lambda x: seen.update({key: None if x.relevant is None else x.relevant.clone()})

    replay = model.backend.start(tokens, 0)
    taps = {key: keep(key) for key in _keys(model)}
    out = split_pass(model.backend, replay, rules, sources, references, taps, Read(END, COLUMNS))
    short = split_pass(model.backend, replay, rules, sources, references, {}, Read(END, COLUMNS))
    torch.testing.assert_close(out.relevant, short.relevant, atol=1e-4, rtol=1e-4)  # the last block at its ends alone
    how = {"attention": attention, "activation": activation, "biases": biases, "stabilise": stabilise}
    for row, source in enumerate(sources):
        settings = {
            key_of(one): Setting(source.where, references[key_of(one)], None if one.head is None else (one.head,))
            for one in source.sites
        }
        literal = contextual(hub, tokens, settings, **how)
        for key, relevant in seen.items():
            expected = literal[key][0]
            got = torch.zeros_like(expected) if relevant is None or row >= len(relevant) else relevant[row]
            if attention == "frozen" and key[0] in ("q", "k") and relevant is None:
                continue  # nobody reads it
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4, msg=lambda text, k=key: f"{k}: {text}")
        logits = literal["logits", model.n_layers][0][torch.arange(N), END].gather(1, COLUMNS)
        torch.testing.assert_close(out.relevant[row], logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("grouped", [False, True])
def test_linear_model_has_exact_path_effects(grouped):
    """No MLP, no norm, constant patterns: relevance is what patching the source from its twin takes away."""
    made = mk.planted.linear(grouped=grouped)
    how = {"stabilise": False, "biases": "irrelevant", "reference": "corrupt", "progress": False}
    ours = mk.decompose(made.model, made.task, "heads", **how).frame.set_index("site")["score"]
    patched = mk.patch(made.model, made.task, "heads", direction="noise", progress=False)
    clean, corrupt = patched.meta["options"]["base_metric"], patched.meta["options"]["source_metric"]
    taken = -patched.frame.set_index("site")["score"] * (corrupt - clean)
    np.testing.assert_allclose(ours, taken.loc[ours.index], atol=1e-5)
    assert ours.abs().max() > 0.1


@pytest.mark.parametrize("reference", ["corrupt", "mean"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", ["linear", "induction", "q_composition", "distractor_copy", "backup"])
def test_planted_circuits_are_found(name, grouped, reference):
    made = getattr(mk.planted, name)(grouped=grouped)
    how = {"size": len(made.nodes), "prune": False, "progress": False, "reference": reference}
    circuit = mk.discover(made.model, made.task, "cd-t", **how)
    assert circuit.scores.auroc(made.nodes) >= 0.99
    assert str(circuit.nodes[0]) in made.nodes


@pytest.mark.parametrize("reference", ["mean", "corrupt", "zero"])
def test_sources_do_not_know_of_each_other(reference):
    model, task = mk.load((plain("qwen3"), None)), _task()
    how = {"reference": reference, "progress": False}
    together = mk.decompose(model, task, "heads mlps embed", **how).frame.set_index("site")["score"]
    for name in ("0.0", "1.3", "2.1", "m0", "m2", "embed"):
        alone = mk.decompose(model, task, name, **how).frame["score"][0]
        assert alone == pytest.approx(together[name], abs=1e-5)
    with_twin = mk.decompose(model, task, [["0.0", "m0"], ["2.1"]], **how).frame
    assert list(with_twin["site"]) == ["0.0+m0", "2.1"]
    assert with_twin["score"][1] == pytest.approx(together["2.1"], abs=1e-5)


def test_positions_and_targets():
    model, task = mk.load((plain("llama"), None)), _task()
    how = {"progress": False, "reference": "corrupt"}
    each = mk.decompose(model, task, "embed", positions="each", **how).frame
    assert list(each["position"]) == list(range(POS))
    assert each["score"][0] == 0  # the twins agree there
    shares = mk.decompose(model, task, "heads mlps embed", "2.1.q 2.1.k m2 resid.3", **how).frame
    assert {*shares["receiver"]} == {"2.1.q", "2.kv0.k", "m2", "resid.3"}
    assert not shares[(shares["receiver"] == "2.1.q") & (shares["layer"] == 2)].size
    assert shares["size"].between(0, 1).all()
    whole = mk.decompose(model, task, "embed", "resid.1 0.0", attention="product", stabilise=False, biases="shared",
                         reference="zero", progress=False).frame  # fmt: skip
    np.testing.assert_allclose(whole["signed"], 1, atol=1e-3)  # all of it came from the embedding


def test_goes_on_from_a_checkpoint(tmp_path, monkeypatch):
    from mechkit.decomposition import runs

    model, task, path = mk.load((plain("llama"), None)), _task(), tmp_path / "kept"
    whole = mk.decompose(model, task, progress=False)
    calls, real = [], runs.split_pass

    def stopping(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(runs, "split_pass", stopping)
    monkeypatch.setattr(runs, "_prompts", lambda work, tokens: [torch.tensor([0]), torch.tensor([1])])
    with pytest.raises(mk.errors.Interrupted, match="goes on from there") as stopped:
        mk.decompose(model, task, checkpoint=path, progress=False)
    assert set(stopped.value.scores.frame["n"]) == {1}
    monkeypatch.setattr(runs, "split_pass", real)
    again = mk.decompose(model, task, checkpoint=path, progress=False)
    np.testing.assert_allclose(again.frame["score"], whole.frame["score"], atol=1e-5)
    with pytest.raises(mk.errors.StorageError):
        mk.decompose(model, task, checkpoint=path, attention="product", progress=False)


class _Unknown(nn.Module):
    def forward(self, x):
        return torch.sin(x)


def test_an_operation_without_a_rule_is_named_with_its_module():
    hub = plain("llama")
    hub.model.layers[1].mlp.act_fn = _Unknown()
    model = mk.load((hub, None))
    with pytest.raises(mk.errors.UnsupportedError, match=r"aten\.sin.*layers\.1.*act_fn"):
        mk.decompose(model, _task(), "0.0", progress=False)
    before = model.run(_tokens()).logits
    torch.testing.assert_close(before, hub(_tokens()).logits)  # nothing is left hanging


@pytest.mark.parametrize(
    ("how", "kind", "told"),
    [
        ({"sources": "0.0.q"}, "SiteError", "as a source"),
        ({"sources": "9.0"}, "SiteError", "9.0"),
        ({"targets": "1.0.pattern"}, "SiteError", "as a target"),
        ({"targets": "logits 1.0.q"}, "OptionError", "different units"),
        ({"sources": "2.0", "targets": "1.0.q"}, "SiteError", "comes before none"),
        ({"attention": "soft"}, "OptionError", "attention"),
        ({"activation": "half"}, "OptionError", "activation"),
        ({"biases": "no"}, "OptionError", "biases"),
        ({"relevance": "abs"}, "OptionError", "relevance"),
        ({"reference": "median"}, "OptionError", "reference"),
        ({"positions": "IO"}, "TaskError", "IO"),
    ],
)
def test_bad_input(how, kind, told):
    model = mk.load((plain("llama"), None))
    with pytest.raises(getattr(mk.errors, kind), match=told):
        mk.decompose(model, _task(), progress=False, **how)
    with pytest.raises(mk.errors.OptionError):
        mk.discover(model, _task(), "cd-t", level="edge")


def test_pruning_takes_out_what_the_circuit_is_better_without():
    from mechkit.circuits.keep import Keeper
    from mechkit.circuits.prune import greedily_pruned

    made = mk.planted.distractor_copy()
    nodes = [mk.site(name) for name in (*made.nodes, "0.1", "2.3")]
    left = greedily_pruned(made.model, made.task, nodes, "mean")
    assert left == [one for one in nodes if one in left]
    assert left
    before, after = Keeper(made.model, made.task, "mean").metric([nodes, left]).mean(1)
    assert after >= before
    whole = mk.discover(made.model, made.task, "cd-t", size=6, min_share=0.0, progress=False)
    assert {*map(str, whole.nodes)} >= {*made.nodes}


def test_parts_that_grow_past_all_bounds_are_refused():
    from mechkit.decomposition.runs import _check_size

    with pytest.raises(mk.errors.UnsupportedError, match="stabilise=True"):
        _check_size(Split(torch.ones(2, 2), torch.full((1, 2, 2), 1e9), Rules()))
    with pytest.raises(mk.errors.UnsupportedError):
        _check_size(Split(torch.ones(2, 2), torch.full((1, 2, 2), torch.nan), Rules()))


@pytest.mark.parametrize("sites", ["heads", "heads mlps"])
def test_the_search_is_its_steps(sites):
    """Found in one sweep, step by step what decomposing each step's targets gives."""
    model, task = tiny("llama"), tiny_task()
    circuit = mk.discover(model, task, "cd-t", sites=sites, size=7, min_share=0.0, prune=False, progress=False)
    first = mk.decompose(model, task, sites, "logits", progress=False).frame
    relevance = first.set_index("site")["score"].abs()
    found: list[str] = []
    while len(found) < 7:
        new = [one for one in relevance.sort_values(ascending=False).index if relevance[one] > 0 and one not in found][
            :2
        ]
        found += new[: 7 - len(found)]
        targets = []
        for one in map(mk.site, new):
            slots = [one] if one.kind == "mlp" else model.graph().slots(one)
            targets += [slot for slot in slots if slot.layer > 0 or slot.kind == "mlp"]
        if not targets:
            break
        rows = mk.decompose(model, task, sites, targets, relevance="size", progress=False).frame
        sums = rows.groupby("site")["score"].sum()
        layers = pd.Series({one: mk.site(one).layer for one in sums.index})
        relevance = sums / sums.groupby(layers).transform("sum").clip(lower=1e-12)
    assert [str(one) for one in circuit.nodes] == found


def test_a_target_after_no_source_is_named():
    with pytest.raises(errors.SiteError, match=r"0\.0\.q"):
        mk.decompose(tiny("llama"), tiny_task(), "heads", "0.0.q 2.1.q", progress=False)
