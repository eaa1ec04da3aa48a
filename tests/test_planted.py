"""The planted circuits are what they are said to be, found out with a Llama written out edge by edge."""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
from reference import planted_truth as literal

import mechkit as mk
from mechkit import planted
from mechkit.errors import OptionError
from mechkit.planted.draft import ROOMS

EXACT = 1e-5
N = 6

every_circuit = pytest.mark.parametrize("name", planted.ALL)
every_kind = pytest.mark.parametrize("grouped", [False, True], ids=["heads", "groups"])
SATURATED = ("induction", "q_composition")  # between two prompts, a softmax goes from one key to another


class Case(NamedTuple):
    circuit: planted.Planted
    graph: literal.WrittenOut


@functools.cache
def case(name: str, grouped: bool = False, seed: int = 0) -> Case:
    circuit = planted.ALL[name](seed=seed, n=N, grouped=grouped)
    return Case(circuit, literal.WrittenOut(circuit.model.hf))


@functools.cache
def exact(name: str, grouped: bool, direction: str = "noise") -> dict[literal.Edge, float]:
    circuit, graph = case(name, grouped)
    return literal.exact_effects(graph, circuit.task, direction)


def metrics(circuit: planted.Planted, **options) -> torch.Tensor:
    logits = circuit.model.run(circuit.task, **options).logits
    return mk.metrics.logit_diff(logits, circuit.task)


@every_circuit
@every_kind
@torch.no_grad()
def test_written_out_it_is_the_model(name, grouped):
    circuit, graph = case(name, grouped)
    for tokens in (circuit.task.clean, circuit.task.corrupt):
        logits = circuit.model.run(tokens).logits[:, -1]
        torch.testing.assert_close(graph.run(graph.embedded(tokens)).logits, logits, atol=EXACT, rtol=0)
    assert circuit.model.info.grouped == grouped
    assert set(circuit.edges) | set(circuit.dormant) <= set(graph.edges())
    assert not set(circuit.edges) & set(circuit.dormant)
    circuit.model.heads(circuit.nodes)


@every_circuit
@every_kind
@torch.no_grad()
def test_norms_do_nothing(name, grouped):
    circuit, graph = case(name, grouped)
    one = ROOMS["one"].start
    for tokens in (circuit.task.clean, circuit.task.corrupt):
        embedded = graph.embedded(tokens)
        trace = graph.run(embedded)
        torch.testing.assert_close(trace.logits, graph.run(embedded, normed=False).logits, atol=EXACT, rtol=0)
        for read in trace.read.values():
            assert float(read[..., :one].square().sum(-1).max()) < 256
            assert bool((read[..., one] == 2.0**16).all())
            torch.testing.assert_close(circuit.model.hf.model.norm(read)[..., :one], read[..., :one], atol=0, rtol=0)


@every_circuit
@pytest.mark.parametrize(("direction", "grouped"), [("noise", False), ("noise", True), ("denoise", True)])
def test_exactly_the_true_edges_have_an_effect(name, direction, grouped):
    circuit, effects = case(name, grouped).circuit, exact(name, grouped, direction)
    assert literal.auroc(effects, circuit.edges) == 1
    for edge, effect in effects.items():
        if edge not in circuit.edges:
            assert abs(effect) < EXACT, edge
        elif circuit.effects:
            assert effect == pytest.approx(circuit.effects[edge], abs=EXACT), edge
        else:
            assert abs(effect) > 1e-3, edge
    assert bool(circuit.effects) == (name != "linear")


@every_circuit
@every_kind
@pytest.mark.parametrize("seed", range(3))
def test_edge_attribution_with_integrated_gradients_ranks_the_true_edges_first(name, grouped, seed):
    circuit, graph = case(name, grouped, seed)
    scores = literal.attribution(graph, circuit.task)
    assert literal.auroc(scores, circuit.edges) == 1
    assert min(abs(scores[edge]) for edge in circuit.edges) > (1e-3 if name == "linear" else 0.05)
    assert max(abs(score) for edge, score in scores.items() if edge not in circuit.edges) < EXACT


@every_kind
@pytest.mark.parametrize("name", ["linear", "distractor_copy"])
def test_attribution_is_exact_where_the_way_is_linear(name, grouped):
    circuit, graph = case(name, grouped)
    effects = exact(name, grouped)
    for steps in (0, 1, 5):
        assert literal.attribution(graph, circuit.task, steps) == pytest.approx(effects, abs=EXACT)
    if grouped:
        assert exact(name, grouped, "denoise") == pytest.approx(effects, abs=EXACT)


@pytest.mark.parametrize("name", SATURATED)
def test_the_gradient_of_the_clean_run_alone_is_blind_to_a_saturated_softmax(name):
    circuit, graph = case(name)
    scores = literal.attribution(graph, circuit.task, steps=0)
    blind = [edge for edge in circuit.edges if edge != ("1.0", "logits") and edge != ("embed", "1.0.v")]
    assert len(blind) >= 2
    assert all(abs(scores[edge]) < 1e-4 for edge in blind)
    assert scores["1.0", "logits"] == pytest.approx(1, abs=EXACT)


def test_everything_linear_is_linear():
    circuit, graph = case("linear")
    clean, corrupt = (graph.embedded(ids) for ids in (circuit.task.clean, circuit.task.corrupt))
    between = graph.run(0.3 * clean + 0.7 * corrupt).logits
    mixed = 0.3 * graph.run(clean).logits + 0.7 * graph.run(corrupt).logits
    torch.testing.assert_close(between, mixed, atol=EXACT, rtol=0)
    run = circuit.model.run(circuit.task, record="0.1.pattern 2.0.pattern m1")
    even = torch.ones(6, 6).tril() / torch.arange(1, 7)[:, None]
    torch.testing.assert_close(run["0.1.pattern"], even.expand(N, -1, -1))
    torch.testing.assert_close(run["2.0.pattern"], even.expand(N, -1, -1))
    assert not run["m1"].any()


@every_circuit
@every_kind
def test_the_prompts_are_told_apart(name, grouped):
    circuit = case(name, grouped).circuit
    clean = metrics(circuit)
    corrupt = mk.metrics.logit_diff(circuit.model.run(circuit.task.corrupt).logits, circuit.task)
    assert float((clean - corrupt).min()) >= 1
    if name != "linear":
        torch.testing.assert_close(clean, torch.full((N,), 3.0), atol=EXACT, rtol=0)
        torch.testing.assert_close(corrupt, torch.full((N,), -3.0), atol=EXACT, rtol=0)


@every_circuit
@every_kind
@torch.no_grad()
def test_distractors_are_active(name, grouped):
    circuit, graph = case(name, grouped)
    clean, corrupt = literal.ends(graph, circuit.task)
    own = {*circuit.nodes, "embed", *(source for source, _ in circuit.dormant)}
    others = [source for source in clean.wrote if source not in own and not (name == "linear" and source[0] == "m")]
    assert len(others) >= 9
    for source in others:
        assert float((clean.wrote[source] - corrupt.wrote[source]).norm(dim=-1).max()) > 0.02, source
    # Some of it reaches the logits, all of them alike.
    assert float((clean.logits - corrupt.logits).mean(-1).abs().max()) > 0.1


@every_circuit
@every_kind
def test_patching_nodes_and_inputs_gives_the_sums_of_their_edges(name, grouped):
    circuit, effects = case(name, grouped).circuit, exact(name, grouped)
    frame = mk.patch(circuit.model, circuit.task, "heads mlps q k v", direction="noise", progress=False).frame
    for site, kind, score in zip(frame.site, frame.kind, frame.score, strict=True):
        end = 1 if kind in ("q", "k", "v") else 0
        expected = sum(effect for edge, effect in effects.items() if edge[end] == site)
        assert score == pytest.approx(expected, abs=2 * EXACT), site
    denoised = mk.patch(circuit.model, circuit.task, "heads", progress=False)
    assert set(denoised.top(len(circuit.nodes)).site) == set(circuit.nodes)


@every_circuit
def test_the_true_heads_alone_do_the_whole_task(name):
    circuit = case(name, grouped=True).circuit
    others = circuit.model.heads() - circuit.model.heads(circuit.nodes)
    assert len(others) == 12 - len(circuit.nodes)
    for mode in ("mean", "resample"):
        edit = mk.ablate(others, mode=mode, reference=circuit.task)
        torch.testing.assert_close(metrics(circuit, edits=[edit]), metrics(circuit), atol=1e-4, rtol=0)


@every_kind
def test_the_twins_of_distractor_copy_differ_in_nothing_but_who_reads_them(grouped):
    circuit = case("distractor_copy", grouped).circuit
    for one, twin in (("0.0", "0.2"), ("1.0", "1.2")):
        record = [f"{head}.{kind}" for head in (one, twin) for kind in ("pattern", "z", "result")]
        run = circuit.model.run(circuit.task, record=record)
        assert torch.equal(run[f"{one}.pattern"], run[f"{twin}.pattern"])
        assert torch.equal(run[f"{one}.z"], run[f"{twin}.z"])
        torch.testing.assert_close(run[f"{one}.result"].norm(dim=-1), run[f"{twin}.result"].norm(dim=-1))
        assert float(run[f"{twin}.result"].norm(dim=-1)[:, -1].min()) >= 1


def test_the_backup_acts_when_the_first_head_is_taken_away():
    circuit, graph = case("backup", grouped=True)
    flag, item, copy = circuit.dormant
    whole = torch.full((N,), 3.0)
    close = functools.partial(torch.testing.assert_close, atol=EXACT, rtol=0)
    close(metrics(circuit, edits=[mk.ablate("2.0")]), whole)
    close(metrics(circuit, edits=[mk.ablate("1.0")]), whole)
    close(metrics(circuit, edits=[mk.ablate("1.0 2.0")]), 0 * whole)
    # With the first head silent, the backup's edges are the whole circuit, to every method.
    effects = literal.exact_effects(graph, circuit.task, silent=["1.0"])
    scores = literal.attribution(graph, circuit.task, silent=["1.0"])
    for found in (effects, scores):
        assert {edge for edge, effect in found.items() if abs(effect) > EXACT} == {item, copy}
        assert found[item] == pytest.approx(1, abs=EXACT)
        assert found[copy] == pytest.approx(1, abs=EXACT)
    # Without its flag, the backup copies beside the first head: the metric doubles, half a gap more.
    zeroed = literal.exact_effects(graph, circuit.task, carries="zero", edges=[flag])
    assert zeroed[flag] == pytest.approx(-0.5, abs=EXACT)
    for steps in (0, 5):
        assert abs(literal.attribution(graph, circuit.task, steps, carries="zero")[flag]) < EXACT


@every_kind
def test_only_the_query_carries_in_q_composition(grouped):
    effects = exact("q_composition", grouped)
    into = {edge: effect for edge, effect in effects.items() if edge[1] == "1.0.q"}
    assert len(into) == 6
    for edge, effect in into.items():
        assert effect == pytest.approx(float(edge[0] == "0.0"), abs=EXACT), edge


@every_circuit
def test_the_same_seed_makes_the_same_and_leaves_the_worlds_random_numbers_alone(name):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (planted.ALL[name](seed=seed, n=3) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert planted.ALL[name](seed=1, n=5).model.weights_hash == first.model.weights_hash
    assert first.model.weights_hash == again.model.weights_hash != other.model.weights_hash
    for part in ("clean", "corrupt", "answers"):
        assert torch.equal(getattr(first.task, part), getattr(again.task, part))
    assert not torch.equal(first.task.clean, other.task.clean)
    assert first.edges == again.edges == other.edges


def test_shares_of_induction_are_those_of_its_kinds():
    circuit = planted.induction(n=4)
    assert sorted(circuit.effects.values()) == [0.25, 0.25, 0.5, 0.5, 1.0]
    found = literal.exact_effects(literal.WrittenOut(circuit.model.hf), circuit.task, edges=circuit.edges)
    assert found == pytest.approx(dict(circuit.effects), abs=EXACT)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("induction", {"n": 2}),
        ("linear", {"n": 0}),
        ("backup", {"n": True}),
        ("q_composition", {"n": "12"}),
        ("distractor_copy", {"seed": -1}),
    ],
)
def test_options_outside_their_range(name, options):
    with pytest.raises(OptionError, match=r"(n|seed)=.*\. Expected a whole number from \d"):
        planted.ALL[name](**options)
