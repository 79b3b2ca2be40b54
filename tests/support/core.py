"""What the tests of the core share: inputs of any value, a kind's map, graphs."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from structlora_trl import StructLoRAConfig
from structlora_trl.core.coordinator import COORDINATORS
from structlora_trl.core.graph import DepthGraph
from structlora_trl.core.kinds import Kind

settings.register_profile("tests", deadline=None, max_examples=60)
settings.load_profile("tests")

depth_counts = st.integers(2, 9)
seeds = st.integers(0, 2**31 - 1)


def floats(*shape):
    elements = st.floats(-8, 8, width=32)
    return hnp.arrays("float32", shape, elements=elements).map(torch.from_numpy)


@st.composite
def graphs(draw):
    count = draw(depth_counts)
    upper = draw(hnp.arrays(bool, (count, count))).copy()
    edges = torch.from_numpy(upper).triu(1)
    return edges | edges.T


def graph_over(depths, experts=1, **options):
    nodes = [nn.Parameter(torch.zeros(1, 1)) for _ in range(experts * depths)]
    names = [f"layers.{i}.experts.{j}.w1" for i in range(depths) for j in range(experts)]
    kind = Kind("layers.*.experts.*.w1", names, nodes, nodes, per_depth=experts)
    return DepthGraph.over_depth(kind, StructLoRAConfig(**options))


def graph_of(edges):
    graph = graph_over(len(edges), edges="similarity")
    graph.load_state_dict({"semantic": edges[None]})
    return graph


def build_coordinator(name, rank, layers, seed):
    coordinator = COORDINATORS[name](rank, layers)
    generator = torch.Generator().manual_seed(seed)
    for parameter in coordinator.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return coordinator
