"""Circuits through the files of MIB's circuit track and back, and what those files cannot hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from families import FAMILIES, tiny
from made_circuits import GRAPHS, edge_circuit, node_circuit, same_table

import mechkit as mk
from mechkit.errors import OptionError, StorageError, UnsupportedError
from mechkit.graph import edge
from mechkit.sites import site


@pytest.mark.parametrize("suffix", [".json", ".pt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_circuit_goes_through_a_file_of_mib(tmp_path, family, suffix):
    circuit = edge_circuit(tiny(family).graph(), 30)
    again = mk.Circuit.from_mib(circuit.to_mib(tmp_path / f"circuit{suffix}"))
    assert again.same_as(circuit)
    assert again.graph == circuit.graph
    same_table(again.scores.frame, circuit.scores.frame, rtol=1e-12)
    assert again.scores.unit == circuit.scores.unit
    assert again.meta == circuit.meta
    assert [str(one) for one in again.edges] == sorted(
        map(str, again.edges), key=lambda text: -abs(again.frame.score[list(map(str, again.edges)).index(text)])
    )


@pytest.mark.parametrize("suffix", [".json", ".pt"])
@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_a_circuit_of_nodes_goes_through_a_file_of_mib(tmp_path, graph, suffix):
    edges = edge_circuit(graph, 10)
    circuit = edges.as_nodes()
    again = mk.Circuit.from_mib(circuit.to_mib(tmp_path / f"circuit{suffix}"))
    assert again.same_as(circuit)
    same_table(again.scores.frame, circuit.scores.frame)
    heads = replace(circuit.scores, frame=circuit.scores.frame[circuit.scores.frame.kind == "z"])
    circuit = mk.Circuit(tuple(circuit.heads), heads)
    again = mk.Circuit.from_mib(circuit.to_mib(tmp_path / f"heads{suffix}"))
    assert again.same_as(circuit)
    assert again.graph == replace(graph)


def test_edges_that_were_not_scored_stay_so(tmp_path):
    circuit = edge_circuit(GRAPHS["grouped"], 20)
    few = replace(circuit, scores=circuit.scores.only([*circuit.edges, edge("embed->0.kv0.k")]))
    assert len(mk.Circuit.from_mib(few.to_mib(tmp_path / "few.json")).scores) == len(few.scores)
    assert len(mk.Circuit.from_mib(few.to_mib(tmp_path / "few.pt")).scores) == len(circuit.scores)


def test_what_mib_cannot_hold_is_refused(tmp_path):
    for name in ("missing.json", "missing.pt"):
        with pytest.raises(StorageError, match=name):
            mk.Circuit.from_mib(tmp_path / name)
    (tmp_path / "text.pt").write_text("no tensors")
    with pytest.raises(StorageError, match=r"text\.pt"):
        mk.Circuit.from_mib(tmp_path / "text.pt")
    circuit = edge_circuit(GRAPHS["plain"])
    with pytest.raises(OptionError, match=r"\.csv"):
        circuit.to_mib(tmp_path / "circuit.csv")
    with pytest.raises(OptionError, match=r"\.csv"):
        mk.Circuit.from_mib(tmp_path / "circuit.csv")
    path = circuit.to_mib(tmp_path / "circuit.json")
    with pytest.raises(OptionError, match="3 of 4 heads"):
        mk.Circuit.from_mib(path, n_kv_heads=3)
    with pytest.raises(OptionError, match="neuron"):
        mk.Circuit.from_mib(path, level="neuron")  # type: ignore[arg-type]
    content = json.loads(path.read_text())
    content["nodes"]["m0"]["neurons"] = [True] * 32
    path.write_text(json.dumps(content))
    with pytest.raises(UnsupportedError, match="neurons"):
        mk.Circuit.from_mib(path)
    nodes = node_circuit("0.1", n_heads=4)
    with pytest.raises(OptionError, match="model="):
        nodes.to_mib(tmp_path / "nodes.json")
    assert mk.Circuit.from_mib(nodes.to_mib(tmp_path / "nodes.json", tiny("gpt2"))).same_as(nodes)
    rows = nodes.scores.frame.iloc[:1].assign(site="embed", layer=-1, kind="embed")
    embed = mk.Circuit((site("embed"),), replace(nodes.scores, frame=rows))
    with pytest.raises(UnsupportedError, match="embed"):
        embed.to_mib(tmp_path / "embed.json", tiny("gpt2"))
    frame = circuit.scores.frame.assign(score=np.nan)
    with pytest.raises(OptionError, match="not finite"):
        replace(circuit, scores=replace(circuit.scores, frame=frame)).to_mib(tmp_path / "nan.json")
    left = sorted(Path(one).name for one in tmp_path.iterdir())
    assert left == ["circuit.json", "nodes.json", "text.pt"]
