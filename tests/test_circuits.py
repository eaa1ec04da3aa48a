"""Discovery and evaluation: the fast forms against the literal ones, and what must hold whatever the numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from families import FAMILIES, plain, tiny, tiny_task
from reference import patching as literal

import mechkit as mk
from mechkit.circuits.keep import Keeper
from mechkit.errors import MetricError, OptionError, StorageError, UnsupportedError
from mechkit.sites import HeadSet


def _circuit(model: mk.Model, nodes: str, task: mk.Task) -> mk.Circuit:
    scores = mk.patch(model, task, "heads", progress=False)
    return mk.Circuit(tuple(model.heads(nodes)), scores, {})


@pytest.mark.parametrize("ablation", ["mean", "zero", "resample"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_keeping_some_heads_equals_one_hooked_forward_a_set(family, ablation):
    model, hf, task = tiny(family), plain(family), tiny_task(n=5)
    z = [literal.value_of(hf, task.corrupt, "z", layer) for layer in range(model.n_layers)]
    values = {
        "mean": lambda: [one.mean(0, keepdim=True) for one in z],
        "zero": lambda: [torch.zeros_like(one) for one in z],
        "resample": lambda: z,
    }[ablation]()
    sets = ["", "0.1", "1.0 2.3", "2.2", "0.0 0.3 1.1 2.0"]
    kept = Keeper(model, task, ablation, task).metric([HeadSet(text, model.n_heads) for text in sets])
    for text, row in zip(sets, kept, strict=True):
        heads = {(head.layer, head.head) for head in HeadSet(text)}
        logits = literal.keep_only(hf, task.clean, heads, values)
        np.testing.assert_allclose(row, mk.metrics.logit_diff(logits, task), atol=1e-4)


def test_means_are_taken_for_each_template():
    model, task = tiny("llama"), tiny_task(n=6)
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    grouped = mk.Task.from_tokens(task.clean, task.corrupt, task.correct, task.wrong, templates=groups)
    kept = HeadSet("1.1", model.n_heads)
    together = Keeper(model, grouped, "mean", grouped).metric([kept])[0]
    apart = [Keeper(model, grouped[rows], "mean", grouped[rows]).metric([kept])[0] for rows in ([0, 1, 2], [3, 4, 5])]
    np.testing.assert_allclose(together, np.concatenate(apart), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_circuit_of_every_head_is_the_model(family):
    model, task = tiny(family), tiny_task(n=6)
    evaluation = _circuit(model, str(model.heads()), task).evaluate(
        model, task, controls=2, curve=False, progress=False
    )
    assert evaluation.faithfulness == pytest.approx(1, abs=1e-5)
    assert evaluation.circuit_metric == pytest.approx(evaluation.model_metric, abs=1e-5)
    assert evaluation.control.faithfulness.tolist() == pytest.approx([1, 1], abs=1e-5)


def test_evaluation_reports_curve_control_and_interval():
    model, task = tiny("gpt2"), tiny_task(n=12)
    circuit = _circuit(model, "2.1 0.0 1.3", task)
    evaluation = circuit.evaluate(model, task, controls=5, progress=False)
    assert evaluation.curve["size"].tolist() == [1, 2, 3]
    assert evaluation.curve.node.tolist() == ["2.1", "0.0", "1.3"]
    assert evaluation.curve.faithfulness.iloc[-1] == pytest.approx(evaluation.faithfulness)
    assert evaluation.interval[0] <= evaluation.faithfulness <= evaluation.interval[1]
    assert {tuple(mk.heads(text).per_layer().items()) for text in evaluation.control.heads} == {
        ((0, 1), (1, 1), (2, 1))
    }
    again = circuit.evaluate(model, task, controls=5, progress=False)
    assert evaluation.frame.equals(again.frame)
    assert evaluation.frame.random_sets[0] == 5
    assert "faithfulness" in evaluation._repr_html_()


def test_discover_keeps_the_largest_effects_of_either_sign():
    model, task = tiny("llama"), tiny_task(n=6)
    circuit = mk.discover(model, task, size=4, min_share=0.0, progress=False)
    frame = circuit.scores.frame
    best = frame.loc[frame.score.abs().sort_values(ascending=False).index].site[:4].tolist()
    assert [str(node) for node in circuit.nodes] == best
    strict = mk.discover(model, task, size=12, min_share=0.5, progress=False)
    assert strict.frame.score.abs().min() >= 0.5 * frame.score.abs().max()
    assert circuit.meta["task"]["n"] == 6
    assert circuit.meta["weights"] == model.weights_hash


def test_saved_and_loaded_is_the_same_circuit(tmp_path):
    model, task = tiny("gpt2"), tiny_task()
    circuit = mk.discover(model, task, size=3, progress=False)
    again = mk.Circuit.from_json(circuit.to_json(tmp_path / "deep" / "circuit.json"))
    assert again.nodes == circuit.nodes
    assert dict(again.meta) == json.loads(json.dumps(dict(circuit.meta)))
    assert again.scores.frame.equals(circuit.scores.frame)
    assert again.heads.random_like(1) == circuit.heads.random_like(1)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"method": "guess"}, "guess"),
        ({"size": 0}, "0"),
        ({"size": 2.5}, "2.5"),
        ({"min_share": 2}, "2"),
        ({"direction": "up"}, "up"),
    ],
)
def test_discover_names_the_bad_option(options, names):
    with pytest.raises(OptionError, match=names):
        mk.discover(tiny("gpt2"), tiny_task(), progress=False, **options)


def test_evaluating_what_cannot_be_evaluated_is_refused():
    model, task = tiny("gpt2"), tiny_task()
    streams = mk.discover(model, task, sites="resid.1 resid.2", size=1, progress=False)
    with pytest.raises(UnsupportedError, match="resid"):
        streams.evaluate(model, task, progress=False)
    circuit = _circuit(model, "0.0", task)
    with pytest.raises(OptionError, match="shuffle"):
        circuit.evaluate(model, task, ablation="shuffle", progress=False)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="-1"):
        circuit.evaluate(model, task, controls=-1, progress=False)
    flat = task.with_metric(lambda logits, task: torch.arange(float(len(task))))
    with pytest.raises(MetricError, match="with none"):
        circuit.evaluate(model, flat, progress=False)


@pytest.mark.parametrize("content", ["", "{}", '{"format": "other", "version": 1}', '{"format": "mechkit circuit"}'])
def test_a_file_that_holds_no_circuit_is_refused(tmp_path, content):
    path = tmp_path / "circuit.json"
    path.write_text(content)
    with pytest.raises(StorageError, match=r"circuit\.json"):
        mk.Circuit.from_json(path)


def test_a_place_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path):
    circuit = mk.discover(tiny("gpt2"), tiny_task(), size=1, progress=False)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        circuit.to_json(tmp_path / "file" / "circuit.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
