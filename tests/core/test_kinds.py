"""Which modules are found, how they are grouped into kinds, and what role they get."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from structlora_trl import StructLoRAConfig
from structlora_trl.core.expert_storage import to_nodes, to_storage
from structlora_trl.core.kinds import discover, matches, residual_role
from structlora_trl.core.mapping import compared_sides
from structlora_trl.core.residual_roles import RESIDUAL_ROLES
from tests.support.tiny import EXPERTS, FAMILIES, LAYERS, peft_model


class Adapted(nn.Module):
    """A bare module with LoRA parameters of PEFT's names: {module name: (r, k, d)}."""

    def __init__(self, modules: dict[str, tuple[int, int, int]]):
        super().__init__()
        for name, (r, k, d) in modules.items():
            holder = self
            for part in [*name.split("."), None]:
                if part is None:
                    for factor, shape in (("lora_A", (k, r)), ("lora_B", (r, d))):
                        setattr(holder, factor, nn.ModuleDict({"default": nn.Linear(*shape, bias=False)}))
                else:
                    if part not in holder._modules:
                        holder.add_module(part, nn.Module())
                    holder = holder._modules[part]


def names(model):
    return {kind.name: kind.depth_count for kind in discover(model, "default")}


READ, WRITE = "read", "write"
WRITERS = ("o_proj", "out_proj", "down_proj", "fc2", "output.dense")
PROJECTOR = ("linear_1", "linear_2")  # between LLaVA's towers, which have q, k and v each


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_known_by_name(family):
    targets = [*FAMILIES[family].linear, *FAMILIES[family].parameters]
    model = peft_model(family, targets=FAMILIES[family].linear)
    kinds = {kind.name: kind for kind in discover(model, "default")}
    assert len(kinds) == len(targets) + (3 if family == "llava" else 0)
    assert all(any(name.endswith(f".{target}") for name in kinds) for target in targets)
    for name, kind in kinds.items():
        if name.endswith(PROJECTOR):
            assert kind.depth_count == 1
        else:
            assert kind.depth_count == LAYERS
            assert residual_role(kind, None) == (WRITE if name.endswith(WRITERS) else READ), name


def test_towers_shapes_and_ranks_stay_apart():
    same = (4, 8, 8)
    assert names(Adapted({"a.layers.0.q": same, "b.layers.0.q": same, "a.layers.1.q": same})) == {
        "a.layers.*.q": 2,
        "b.layers.*.q": 1,
    }
    found = names(
        Adapted({"layers.0.q": same, "layers.1.q": (4, 8, 16), "layers.2.q": same, "layers.3.q": (4, 8, 16)})
    )
    assert found == {"layers.*.q[8x4x8]": 2, "layers.*.q[16x4x8]": 2}
    assert len(names(Adapted({"layers.0.q": same, "layers.1.q": (2, 8, 8)}))) == 2


def test_depth_is_numeric_order_and_experts_are_not_depths():
    same = (4, 8, 8)
    (kind,) = discover(Adapted({f"layers.{i}.q": same for i in (10, 9, 2)}), "default")
    assert kind.modules == ["layers.2.q", "layers.9.q", "layers.10.q"]
    experts = {f"layers.{i}.mlp.experts.{j}.w1": same for i in range(2) for j in range(2)}
    (kind,) = discover(Adapted(experts), "default")
    assert kind.name == "layers.*.mlp.experts.*.w1" and (kind.depth_count, kind.experts) == (2, 2)
    assert kind.modules == [f"layers.{i}.mlp.experts.{j}.w1" for i in range(2) for j in range(2)]
    del experts["layers.1.mlp.experts.1.w1"]
    assert names(Adapted(experts)) == {"layers.*.mlp.experts.0.w1": 2, "layers.*.mlp.experts.1.w1": 1}
    # A reader and a writer of each block.
    places = {f"blocks.{i}.ff.{j}": same for i in range(3) for j in (0, 2)}
    assert names(Adapted(places)) == {"blocks.*.ff.0": 3, "blocks.*.ff.2": 3}
    staged = {f"encoder.layers.{i}.blocks.{j}.query": same for i in range(2) for j in range(3)}
    assert names(Adapted(staged)) == {"encoder.layers.*.blocks.*.query": 6}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_directions_of_an_expert_are_its_own(family):
    """lora_A's rows are in the order (expert, r), lora_B's columns (r, expert): B_e A_e is what PEFT adds to expert e."""
    model = peft_model(family, "warm", rank=2)
    kinds = [kind for kind in discover(model, "default") if kind.experts > 1]
    assert [kind.experts for kind in kinds] == [EXPERTS, EXPERTS]
    for kind in kinds:
        assert (kind.depth_count, kind.rank) == (LAYERS, 2)
        stored = {side: torch.stack(list(getattr(kind, side))) for side in "AB"}
        nodes = {side: to_nodes(factors, side, kind) for side, factors in stored.items()}
        assert all(torch.equal(to_storage(nodes[side], side, kind), stored[side]) for side in "AB")
        A, B = (nodes[side].unflatten(0, (LAYERS, EXPERTS)).transpose(0, 1) for side in "AB")
        for depth, name in enumerate(kind.modules):
            module = model.get_submodule(name)
            ours = module.scaling["default"] * B[:, depth] @ A[:, depth]
            theirs = module.get_delta_weight("default")
            if kind.adapted.input_side == "B":
                ours = ours.mT
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
            # The side that is compared across depth lies in the residual stream.
            stream = A.shape[-1] if compared_sides(kind, StructLoRAConfig()) == ("A",) else B.shape[-2]
            assert stream == model.config.hidden_size


def test_frozen_depths_are_left_out():
    model = Adapted({f"layers.{i}.q": (4, 8, 8) for i in range(4)})
    for parameter in model.layers._modules["1"].parameters():
        parameter.requires_grad_(False)
    (kind,) = discover(model, "default")
    assert kind.modules == ["layers.0.q", "layers.2.q", "layers.3.q"]


def test_roles_of_diffusion_transformers():
    """LoRA's targets in FLUX.2, as PEFT's image suite has them, and in blocks of diffusers' older models."""
    roles = {
        "read": "attn.to_q attn.to_k attn.to_v attn.add_q_proj attn.to_qkv_mlp_proj ff.linear_in ff.net.0.proj",
        "write": "attn.to_out.0 attn.to_out attn.to_add_out ff_context.linear_out ff.net.2",
    }
    for role, names in roles.items():
        for name in names.split():
            (kind,) = discover(Adapted({f"blocks.{i}.{name}": (4, 8, 8) for i in range(2)}), "default")
            assert kind.depth_count == 2 and residual_role(kind, None) == role, name


def test_roles_of_the_user_come_first():
    (kind,) = discover(Adapted({f"h.{i}.mixer.q_proj": (4, 8, 8) for i in range(2)}), "default")
    assert residual_role(kind, None) == "read"
    assert residual_role(kind, {r"mixer\.\w+": "write"}) == "write"
    assert residual_role(kind, {next(p for p in RESIDUAL_ROLES if matches(p, kind)): "write"}) == "write"
    (odd,) = discover(Adapted({f"h.{i}.odd": (4, 8, 8) for i in range(2)}), "default")
    assert residual_role(odd, None) is None
    assert residual_role(odd, {"dd": "read"}) is None  # a pattern matches whole names from a dot on
    assert residual_role(odd, {"odd": "read"}) == "read"
