"""A file of MIB's circuit track as EAP-IG writes it, node by node and edge by edge. Knows nothing of mechkit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def graph_file(
    n_layers: int,
    n_heads: int,
    parallel: bool,
    score: Callable[[str], float],
    inside: Callable[[str], bool],
    node_score: Callable[[str], float] | None = None,
) -> dict[str, Any]:
    """What the ``.json`` holds.

    Args:
        n_layers, n_heads, parallel: of the model.
        score: of an edge, by its name.
        inside: whether a node or edge is in the circuit, by its name.
        node_score: of a node, by its name; left out, nodes have none.
    """
    nodes, edges, stream = ["input"], [], ["input"]
    for layer in range(n_layers):
        heads, mlp = [f"a{layer}.h{head}" for head in range(n_heads)], f"m{layer}"
        nodes += [*heads, mlp]
        edges += [f"{source}->{head}<{slot}>" for source in stream for head in heads for slot in "qkv"]
        if parallel:
            edges += [f"{source}->{mlp}" for source in stream]
            stream += [*heads, mlp]
        else:
            stream += heads
            edges += [f"{source}->{mlp}" for source in stream]
            stream.append(mlp)
    edges += [f"{source}->logits" for source in stream]
    described = {name: {"in_graph": inside(name)} for name in nodes}
    if node_score:
        for name in nodes:
            described[name]["score"] = node_score(name)
    return {
        "cfg": {"n_layers": n_layers, "n_heads": n_heads, "parallel_attn_mlp": parallel, "d_model": 32},
        "nodes": {**described, "logits": {"in_graph": True}},
        "edges": {name: {"score": score(name), "in_graph": inside(name)} for name in edges},
    }
