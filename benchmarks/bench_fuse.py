"""How long fusing spelled-out experts takes to plan: it should grow with the graph, not faster.

python -m benchmarks.bench_fuse [experts]
"""

from __future__ import annotations

import sys
import time

from qmoe_rules.rules import apply_rules, fuse_experts_rules
from tests import expert_graphs
from tests.moe_models import Graph


def main() -> None:
    """Prints the seconds for models of more and more layers."""
    experts = int(sys.argv[1]) if len(sys.argv) > 1 else 128
    layer = expert_graphs.Layer(experts=experts, hidden=4, inter=4, k=8)
    for count in (10, 20, 40, 60):
        graph = Graph()
        x = total = expert_graphs.source(graph, layer)
        for index in range(count):
            builder = expert_graphs.Builder(layer, graph, f"l{index}.")
            moe = builder.experts(total)
            moe.type, moe.shape = x.type, x.shape
            total = graph.op("Add", total, moe, out=f"residual_{index}", like=x)
        model = graph.model(total)
        nodes = len(graph.nodes)
        start = time.perf_counter()
        apply_rules(model, fuse_experts_rules())
        seconds = time.perf_counter() - start
        left = sum(1 for _ in model.graph)
        print(f"{count} layers of {experts}: {nodes} nodes -> {left} in {seconds:.2f} s")


if __name__ == "__main__":
    main()
