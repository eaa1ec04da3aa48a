"""Edge attribution: fast = literal, parts sum to the whole, and exact where the model is linear."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCAB, plain, tiny, tiny_task, untouched
from reference import attribution as literal
from reference.taps import tapped

import mechkit as mk
from mechkit.edge_scores import EdgeScores
from mechkit.patching.edges import edges
from mechkit.sites import Site

every_family = pytest.mark.parametrize("family", FAMILIES)


GROUPED = [family for family in FAMILIES if family not in "gpt2 gpt-neo gpt-j neox opt bloom falcon-alibi".split()]


IN_SINGLE = ("mixtral", "gpt-oss")  # their experts multiply nothing in double precision


@functools.cache
def exact(family: str) -> torch.nn.Module:
    """The Hub's own model, in double precision where it has it: the literal form is not what is inexact."""
    return untouched(family) if family in IN_SINGLE else plain(family, dtype=torch.float64)


def measure(task: mk.Task) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda logits: mk.metrics.logit_diff(logits, task)


def gap_of(hub: torch.nn.Module, task: mk.Task, metric: Callable) -> float:
    """Of clean to corrupt."""
    with torch.no_grad():
        return float((metric(hub(task.corrupt).logits) - metric(hub(task.clean).logits)).mean())


def own_gap(found: EdgeScores) -> float:
    options = found.meta["options"]
    return options["source_metric"] - options["base_metric"]


def without_groups() -> torch.nn.Module:
    """The Llama of ``families`` with a key and a value head of its own for every query head, to the same results."""
    from transformers import LlamaForCausalLM

    own = plain("llama")
    config = type(own.config)(**{**own.config.to_dict(), "num_key_value_heads": own.config.num_attention_heads})
    config._attn_implementation = "eager"
    copied = LlamaForCausalLM(config).eval()
    weights = own.state_dict()
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            weights[name] = weights[name].unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    copied.load_state_dict(weights)
    return copied


def check(found: EdgeScores, expected: torch.Tensor, gap: float) -> None:
    """Scores and their standard errors against literal ones ``[batch, sources, targets]`` in the metric's unit."""
    graph, each = found.graph, expected.detach().double().numpy()
    assert len(found) == len(graph)
    largest = np.abs(each[:, graph.exists]).max()
    assert largest > 1e-3
    # Gaps of random models are small: what is exact is the effect, before it becomes a share of one.
    assert own_gap(found) == pytest.approx(gap, abs=2e-5)
    for column, want in (("score", each.mean(0)), ("se", each.std(0, ddof=1) / len(each) ** 0.5)):
        size = own_gap(found) if column == "score" else abs(own_gap(found))
        off = np.abs(found.matrix(column) * size - want)[graph.exists]
        assert off.max() <= 1e-5 * max(1.0, largest), column


@every_family
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_scores_are_those_of_autograd_with_an_input_for_every_slot(family, direction):
    task, hub = tiny_task(), exact(family)
    runs = (task.clean, task.corrupt) if direction == "noise" else (task.corrupt, task.clean)
    sign = 1 if direction == "noise" else -1
    expected = literal.edge_scores(hub, *runs, measure(task))
    found = edges(tiny(family), task, direction=direction, progress=False)
    check(found, expected, sign * gap_of(hub, task, measure(task)))
    assert found.meta["method"] == "eap"
    assert found.meta["options"]["direction"] == direction


@pytest.mark.parametrize("family", ["gpt2", "bloom", "phi", "llama", "gemma2", "qwen3", "mixtral"])
@pytest.mark.parametrize("method", ["eap-ig", "eap-ig-activations"])
def test_integrated_gradients_are_those_of_autograd_at_every_point(family, method):
    task, hub, steps = tiny_task(n=3), exact(family), 3
    between = literal.between_inputs if method == "eap-ig" else literal.between_activations
    points = between(hub, task.clean, task.corrupt, steps)
    expected = literal.edge_scores(hub, task.clean, task.corrupt, measure(task), points)
    found = edges(tiny(family), task, method, steps=steps, progress=False)
    check(found, expected, gap_of(hub, task, measure(task)))


@pytest.mark.parametrize("metric", ["prob", "loss", "kl"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_metrics_of_the_whole_vocabulary(family, metric):
    task, hub = tiny_task(n=3).with_metric(metric), exact(family)
    with torch.no_grad():
        clean = hub(task.clean).logits

    def values(logits: torch.Tensor) -> torch.Tensor:
        return mk.metrics.kl(logits, task, clean) if metric == "kl" else getattr(mk.metrics, metric)(logits, task)

    # At the clean run, the divergence from it has no gradient.
    expected = literal.edge_scores(hub, task.corrupt, task.clean, values)
    found = edges(tiny(family), task, direction="denoise", progress=False)
    check(found, expected, -gap_of(hub, task, values))


def test_prompts_of_different_lengths_and_first_differences():
    tasks = [
        tiny_task(n=2, length=9, seed=3),
        tiny_task(n=1, length=7, seed=4, first=1),
        tiny_task(n=2, length=5, seed=5),
    ]
    model = tiny("llama")
    together = edges(model, tasks, "eap-ig", steps=2, progress=False)
    total, gap = 0.0, 0.0
    for task in tasks:
        alone = edges(model, task, "eap-ig", steps=2, progress=False)
        total += alone.matrix() * own_gap(alone) * len(task)
        gap += own_gap(alone) * len(task)
    np.testing.assert_allclose(together.matrix(), total / gap, atol=2e-5)
    assert set(together.frame["n"]) == {5}


@pytest.mark.parametrize("family", ["gpt2", "neox", "llama without groups"])  # it serves no grouped queries
def test_scores_are_those_of_transformerlens(family):
    """Its edges are taken apart by position, its gradient is that of the corrupt run, its unit the metric's."""
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, Node, attribution_patch

    model = tiny(family) if family in FAMILIES else mk.load((without_groups(), None), device="cpu")
    task, graph = tiny_task(n=1), model.graph()
    kinds = {"q_input": "q", "k_input": "k", "v_input": "v", "mlp_in": "mlp", "mlp_out": "mlp", "attn_head_out": "z"}

    def site(node: Node) -> Site:
        if node.kind in ("embed", "logits"):
            return mk.site(node.kind)
        return Site(int(node.layer or 0), node.head, kinds[node.kind])

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return mk.metrics.logit_diff(logits, task)[0]

    config = EdgeAttributionConfig("edge")
    theirs = attribution_patch(model.bridge, task.clean, task.corrupt, metric, config).edge_scores
    total = np.zeros(graph.exists.shape)
    seen = np.zeros(graph.exists.shape, dtype=bool)
    for (source, target), score in theirs.items():
        at = graph.source_index[site(source)], graph.target_index[site(target)]
        total[at] += score
        seen[at] = True
    found = edges(model, task, direction="denoise", progress=False)
    assert (seen == graph.exists).all()
    assert np.abs(total).max() > 1e-2
    np.testing.assert_allclose(np.nan_to_num(found.matrix()) * own_gap(found), total, atol=1e-5)


@every_family
def test_the_edges_that_leave_a_node_sum_to_its_own_attribution(family):
    """The node's own: the gradient at what it puts out, of the Hub's own model, times the change of that."""
    task, hub = tiny_task(n=2), exact(family)
    parts = [("resid", 0), *((kind, layer) for layer in range(3) for kind in ("z", "mlp"))]

    def gradients(tokens: torch.Tensor) -> tuple[dict, dict]:
        kept: dict = {}
        with torch.enable_grad():
            with ExitStack() as stack:
                for part in parts:

                    def keep(own: torch.Tensor, part=part) -> torch.Tensor:
                        kept[part] = own if own.requires_grad else own.detach().requires_grad_()
                        return kept[part].clone()

                    stack.enter_context(tapped(hub, *part, keep))
                total = measure(task)(hub(tokens, use_cache=False).logits).sum()
            return kept, dict(zip(kept, torch.autograd.grad(total, list(kept.values())), strict=True))

    (base, at), (source, _) = gradients(task.clean), gradients(task.corrupt)
    expected = []
    for part in parts:
        own = (source[part] - base[part]) * at[part]
        expected += (own.sum((0, 1, 3)) if part[0] == "z" else own.sum()[None]).tolist()
    found = edges(tiny(family), task, progress=False)
    effects = found.nodes().frame["score"] * own_gap(found)
    np.testing.assert_allclose(effects, np.array(expected) / len(task), atol=1e-5 * max(1.0, *map(abs, expected)))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_many_points_of_the_embedding_account_for_the_whole_gap(family):
    """Integrated gradients are complete, but for the steps."""
    task = tiny_task(n=3)
    off = [
        abs(edges(tiny(family), task, "eap-ig", steps=steps, progress=False).nodes().frame["score"][0] - 1)
        for steps in (8, 64)
    ]
    assert off[1] < 0.05
    assert off[1] < off[0] / 2


# -- linear models ----------------------------------------------------------------------------------------------------


def linear_model(seed: int = 0) -> torch.nn.Module:
    """A GPT-2 without a bend in it: even attention, no activation, norms whose scale hardly depends on the stream."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=16,
        activation_function="linear",
        layer_norm_epsilon=1e10,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" in name:
                parameter.copy_(torch.zeros(()) if name.endswith("bias") else 1e5 * (1 + 0.2 * torch.randn(32)))
            elif parameter.ndim > 1:
                parameter.normal_(0, 0.2)
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, :32] = 0
            block.attn.c_attn.bias[:32] = 0
    return model


@pytest.mark.parametrize("method", ["eap", "eap-ig"])
def test_a_linear_models_scores_are_exact_effects(method):
    import copy

    hub, task = linear_model(), tiny_task(n=2)
    model = mk.load((copy.deepcopy(hub), None), device="cpu")
    graph, double = model.graph(), hub.double()
    change = literal.written(double, task.clean, task.corrupt)
    separate = literal.SeparateInputs(double)
    exact_effects = np.zeros(graph.exists.shape)
    with torch.no_grad():
        before = measure(task)(double(task.clean).logits).mean()
        for i, j in np.argwhere(graph.exists):
            target = graph.targets[j]
            layer = 2 if target.kind == "logits" else target.layer
            added = {(target.kind, layer, target.head): change[i]}
            exact_effects[i, j] = float(measure(task)(separate.run(task.clean, added=added)).mean() - before)
    found = edges(model, task, method, progress=False)
    np.testing.assert_allclose(np.nan_to_num(found.matrix()) * own_gap(found), exact_effects, atol=1e-5)
    assert np.abs(exact_effects).max() > 0.1


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("options", [{}, {"method": "eap-ig"}, {"correction": "atp*"}])
def test_a_planted_linear_models_scores_are_those_of_exact_patching(options, grouped):
    planted = mk.planted.linear(n=4, grouped=grouped)
    first_order, exactly = (
        edges(planted.model, planted.task, progress=False, **how) for how in (options, {"method": "exact"})
    )
    np.testing.assert_allclose(first_order.matrix(), exactly.matrix(), atol=1e-5)
    assert set(map(str, first_order.ranked()[: len(planted.edges)])) == {str(mk.edge(one)) for one in planted.edges}
