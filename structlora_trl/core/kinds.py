"""Kinds: the LoRA modules of a model, grouped by what is comparable across depth and ordered by depth.

A kind is a set of modules with the same name except for the layer's number, the same tower, the same shapes.
Modules are found by the names PEFT gives its parameters, so this file needs torch alone.

A VeRA module trains a scale for each direction, λ_d of (r,), over matrices that all modules share and that
stay frozen. It is a node without a lora_A of its own, whose lora_B is one row: λ_d.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import StructLoRAError
from .residual_roles import RESIDUAL_ROLES

# What torch's wrapper for activation checkpointing adds to names.
CHECKPOINTED = "_checkpoint_wrapped_module."
# What PEFT calls the factors of a module, LoRA's and VeRA's.
FACTOR = r"(lora_(embedding_)?(?P<factor>[AB])|vera_lambda_d)"
_PARAMETER = re.compile(rf"^(?P<module>.+)\.{FACTOR}\.(?P<adapter>[^.]+)(\.weight)?$")
# Numbers that tell experts apart: experts of one layer are not depths.
_EXPERT = re.compile(r"(?<=experts\.)\d+(?=\.|$)")
_NUMBER = re.compile(r"(?<![^.])\d+(?=\.|$)")


class Factors(NamedTuple):
    """Stacked factors of a kind's nodes, or what has their shapes: A (N, r, k), B (N, d, r), ΔW = s·B·A.

    A node is a module, or one expert of a mixture: N = L·E nodes in the order (depth, expert). Of VeRA, k is
    0 and d is 1.
    """

    A: Tensor
    B: Tensor


SIDES = Factors._fields


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """A parameter's whole shape; under ZeRO-3 DeepSpeed keeps it, and its own is an empty placeholder's."""
    return getattr(parameter, "ds_shape", parameter.shape)


def matrix_shape(parameter: nn.Parameter) -> tuple[int, int]:
    """Rows and columns of a factor: a convolution's (r, k·kernel); of a vector, which is one row, (1, r)."""
    rows, *columns = full_shape(parameter)
    return (rows, math.prod(columns)) if columns else (1, rows)


@dataclass(frozen=True)
class Adapted:
    """What a LoRA module adapts, where that is a parameter and no module (PEFT's `target_parameters`).

    Experts that a mixture keeps in one parameter share one LoRA module. Its rows of lora_A are in the order
    (expert, r), its columns of lora_B in the order (r, expert).

    Args:
        parameter (`str`): the parameter's name; empty for a module.
        experts (`int`, *optional*, defaults to 1): E, how many the parameter stacks.
        input_side (`str`, *optional*, defaults to 'A'): the factor that meets the input. 'B' where PEFT takes
            a stack's first axis for the input and the model keeps its outputs there (PEFT before 0.19).
    """

    parameter: str = ""
    experts: int = 1
    input_side: str = "A"


@dataclass
class Kind:
    """LoRA modules that differ in depth alone, in its order; experts of a mixture are several at each depth.

    Args:
        name (`str`): the modules' name with `*` for the layer's number, and for the expert's.
        modules (`list[str]`): full module names, one per depth; experts that are modules of their own are in
            the order (depth, expert).
        A (`list[nn.Parameter]`): of each module, r x k entries (convolutions count as r x (k·kernel)); E·r x
            k where it holds all experts of a layer; empty for VeRA.
        B (`list[nn.Parameter]`): of each module, d x r entries; d x r·E where it holds all experts of a
            layer; λ_d of (r,) for VeRA.
        adapted (`Adapted`, *optional*): what each adapts, where that is not a whole module.
        per_depth (`int`, *optional*, defaults to 1): modules at each depth: E where experts are modules of
            their own.
    """

    name: str
    modules: list[str]
    A: list[nn.Parameter]
    B: list[nn.Parameter]
    adapted: Adapted = Adapted()
    per_depth: int = 1

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """All its factors: lora_A of each module, then lora_B."""
        return [*self.A, *self.B]

    @cached_property
    def depth_count(self) -> int:
        return len(self.modules) // self.per_depth

    @cached_property
    def experts(self) -> int:
        """E, of each depth; 1 for what is no mixture."""
        return self.adapted.experts * self.per_depth

    @cached_property
    def node_count(self) -> int:
        """N = L·E: its modules, or all experts of all of them."""
        return self.depth_count * self.experts

    @cached_property
    def is_vera(self) -> bool:
        """Whether its modules train VeRA's λ_d, and have no lora_A of their own."""
        return not self.A

    @cached_property
    def sides(self) -> tuple[str, ...]:
        """The factors that its modules have of their own: 'A' and 'B', or 'B' alone (VeRA)."""
        return ("B",) if self.is_vera else SIDES

    @cached_property
    def rank(self) -> int:
        """r, of each expert."""
        return matrix_shape(self.B[0])[1] // self.adapted.experts

    @cached_property
    def shape(self) -> list[int]:
        """[modules, rows of lora_A, k, d]."""
        d, rows = matrix_shape(self.B[0])
        return [len(self.modules), rows, 0 if self.is_vera else matrix_shape(self.A[0])[1], d]

    @property
    def device(self) -> torch.device:
        return self.B[0].device

    @property
    def target(self) -> str:
        """What the module of the first depth adapts, as the model without PEFT names it."""
        return _target(self.modules[0], self.adapted)


def discover(model: nn.Module, adapter_name: str) -> list[Kind]:
    """The kinds of an adapter's trainable LoRA modules, in order of appearance.

    Args:
        model (`nn.Module`): any model whose LoRA parameters have PEFT's names.
        adapter_name (`str`): the adapter to look for.

    Raises:
        StructLoRAError: no LoRA parameter of that adapter, all of them inside `modules_to_save`, or all
            frozen; a module whose lora_A and lora_B do not have the same directions; or two that share
            memory.
    """
    modules: dict[str, dict[str, nn.Parameter]] = defaultdict(dict)
    adapters, copies = set(), 0
    # A module that stands in two places is one; a factor that stands in two modules is seen in both.
    first_names = {name for name, _ in model.named_modules()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        match = _PARAMETER.match(name)
        if match is None or match["module"] not in first_names:
            continue
        adapters.add(match["adapter"])
        if match["adapter"] != adapter_name:
            continue
        if ".modules_to_save." in name or ".original_module." in name:
            copies += 1
        else:
            modules[match["module"]][match["factor"] or "B"] = parameter

    if not modules and copies:
        raise StructLoRAError(
            f"all LoRA modules of adapter '{adapter_name}' inside `modules_to_save`, where whole weights are trained",
            "LoRA modules that are not also saved in full",
            "take them out of `modules_to_save`, or out of `target_modules`",
        )
    if not modules:
        others = f" (adapters with LoRA: {', '.join(sorted(adapters))})" if adapters else ""
        raise StructLoRAError(
            f"no LoRA module of adapter '{adapter_name}' in the model{others}",
            "at least one",
            "check `target_modules` of the LoraConfig and `adapter_name`",
        )
    trainable = {m: f for m, f in modules.items() if any(p.requires_grad for p in f.values())}
    if not trainable:
        raise StructLoRAError(
            f"all {len(modules)} LoRA modules of adapter '{adapter_name}' frozen",
            "trainable LoRA parameters",
            "load the adapter with `is_trainable=True`, or set `requires_grad` on its parameters",
        )
    _refuse_unpaired(trainable)
    _refuse_shared(trainable)
    layers = {module: model.get_submodule(module) for module in trainable}
    scales = {module: getattr(layer, "scaling", {}).get(adapter_name) for module, layer in layers.items()}
    return group(trainable, {module: _adapted(layer) for module, layer in layers.items()}, scales)


def group(
    modules: dict[str, dict[str, nn.Parameter]],
    adapted: dict[str, Adapted] | None = None,
    scales: dict[str, float | None] | None = None,
) -> list[Kind]:
    """The kinds of some LoRA modules, in order of appearance. Experts that are modules of their own are one
    kind where every expert is there at the same depths.

    Args:
        modules (`dict`): module name -> {"A": lora_A, "B": lora_B}, of VeRA {"B": λ_d}.
        adapted (`dict`, *optional*): module name -> what it adapts, where that is not a whole module.
        scales (`dict`, *optional*): module name -> s of ΔW = s·B·A: only with one s are directions comparable.
    """
    groups = defaultdict(list)
    for module, factors in modules.items():
        what = (adapted or {}).get(module, Adapted())
        pattern, depth = split_depth(_target(module, what))
        likeness = tuple((side, full_shape(p), p.requires_grad) for side, p in sorted(factors.items()))
        groups[pattern, likeness, what, (scales or {}).get(module)].append((depth, module, factors))
    for nodes in groups.values():
        nodes.sort(key=lambda node: node[0])
    mixtures = defaultdict(list)
    for key in groups:
        mixtures[(_EXPERT.sub("*", key[0]), *key[1:])].append(key)
    joined = {}  # key -> the nodes of each expert, or of what is no mixture
    for key, members in mixtures.items():
        members.sort(key=lambda member: [int(number) for number in _EXPERT.findall(member[0])])
        depths = {tuple(depth for depth, *_ in groups[member]) for member in members}
        joined |= (
            {key: [groups[m] for m in members]} if len(depths) == 1 else {m: [groups[m]] for m in members}
        )
    patterns = [key[0] for key in joined]
    kinds = []
    for (pattern, _, what, scale), experts in joined.items():
        nodes = [node for of_depth in zip(*experts, strict=True) for node in of_depth]
        _, names, factors = zip(*nodes, strict=True)
        A, B = ([of_node[side] for of_node in factors if side in of_node] for side in SIDES)
        # Gemma's and others' alternating layers differ in shape: comparable among themselves only.
        sizes = (*full_shape(B[0]), *(full_shape(A[0])[1:] if A else ()))
        shapes = f"[{'x'.join(map(str, sizes))}]" if patterns.count(pattern) > 1 else ""
        is_scaled = len({key[3] for key in joined if key[0] == pattern}) > 1  # `alpha_pattern`
        name = pattern + shapes + (f"(scale {scale:g})" if is_scaled else "")
        kinds.append(Kind(name, list(names), A, B, what, per_depth=len(experts)))
    repeated = {kind.name for kind in kinds if sum(other.name == kind.name for other in kinds) > 1}
    for kind in kinds:
        if kind.name in repeated:
            kind.name += (
                f"({'+'.join(side for side in kind.sides if getattr(kind, side)[0].requires_grad)} trained)"
            )
    return kinds


def _refuse_unpaired(modules: dict[str, dict[str, nn.Parameter]]) -> None:
    for module, factors in modules.items():
        columns = matrix_shape(factors["B"])[1]
        rows = full_shape(factors["A"])[0] if "A" in factors else columns
        if rows != columns:
            raise StructLoRAError(
                f"LoRA on '{_target(module)}' with {rows} rows of lora_A and {columns} columns of lora_B, as a grouped "
                "convolution has",
                "as many of one as of the other, since a direction is one of each",
                "take the module out of `target_modules`",
            )


def _refuse_shared(modules: dict[str, dict[str, nn.Parameter]]) -> None:
    """PEFT's `ensure_weight_tying` makes a head's factors views of an embedding's; users tie some by hand."""
    owner: dict[int, str] = {}
    for module, factors in modules.items():
        for parameter in factors.values():
            # 0: sharded, so that nothing is shared.
            address = parameter.data_ptr() if parameter.numel() else 0
            if address and owner.setdefault(address, module) != module:
                raise StructLoRAError(
                    f"LoRA of '{_target(owner[address])}' and '{_target(module)}' in one memory (`ensure_weight_tying`, or "
                    "a tie by hand)",
                    "factors of its own for each module, since each is mapped in its own way",
                    "set `ensure_weight_tying=False`, untie them, or adapt neither",
                )


def _adapted(module: nn.Module) -> Adapted:
    """Read from a LoRA module. PEFT's `ParamWrapper` alone has a `parameter_name`."""
    name = getattr(module, "parameter_name", None)
    if name is None:
        return Adapted()
    if module.num_experts == 1:
        return Adapted("" if name == "weight" else name)
    inputs_first = getattr(module.get_base_layer(), "is_transposed", False)
    follows_layout = getattr(module, "_did_swap_in_out_features", False)  # PEFT 0.19 and later
    return Adapted(name, module.num_experts, "A" if inputs_first or follows_layout else "B")


def unwrapped_name(name: str) -> str:
    """A module's or a parameter's name without what torch's wrappers put into it: `torch.compile`, and
    activation checkpointing of FSDP.
    """
    return name.replace("_orig_mod.", "").replace(CHECKPOINTED, "")


def _target(module: str, adapted: Adapted = Adapted()) -> str:
    name = unwrapped_name(module).removeprefix("base_model.model.")
    # PEFT nests the wrappers of one module's parameters, and a LoRA layer inside one of another method.
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return f"{name}.{adapted.parameter}" if adapted.parameter else name


def split_depth(module: str) -> tuple[str, tuple[int, ...]]:
    """A module's name with `*` for the layer's number, and that number.

    'layers.3.mlp.experts.7.w1' -> ('layers.*.mlp.experts.7.w1', (3,)). Where names have several numbers, one
    at the end is a place inside the layer (`nn.Sequential`) and no depth: 'blocks.3.ff.0' ->
    ('blocks.*.ff.0', (3,)).
    """
    others = {match.start() for match in _EXPERT.finditer(module)}
    depth = []
    numbers = [match for match in _NUMBER.finditer(module) if match.start() not in others]
    if len(numbers) > 1 and numbers[-1].end() == len(module):
        others.add(numbers[-1].start())

    def star(match: re.Match) -> str:
        if match.start() in others:
            return match[0]
        depth.append(int(match[0]))
        return "*"

    return _NUMBER.sub(star, module), tuple(depth)


def short_names(names: list[str]) -> dict[str, str]:
    """Return each name's shortest end that no other name shares; of a long end, its first and last part where these tell
    it apart.
    """
    ends = {name: _own_end(name, [other for other in names if other != name]) for name in names}
    brief = {name: ".".join(end) if len(end) < 3 else f"{end[0]}…{end[-1]}" for name, end in ends.items()}
    taken = [*brief.values()]
    return {name: short if taken.count(short) == 1 else ".".join(ends[name]) for name, short in brief.items()}


def _own_end(name: str, others: list[str]) -> list[str]:
    parts = name.split(".")
    count = next(
        (n for n in range(1, len(parts)) if all(o.split(".")[-n:] != parts[-n:] for o in others)), len(parts)
    )
    return parts[-count:]


def residual_role(kind: Kind, roles: dict[str, str] | None) -> str | None:
    """'read', 'write', or None where neither the user's patterns nor the built-in table know the kind."""
    for pattern, role in (*(roles or {}).items(), *RESIDUAL_ROLES.items()):
        if matches(pattern, kind):
            return role
    return None


def residual_side(kind: Kind, roles: dict[str, str] | None) -> str | None:
    """The factor that meets the residual stream, 'A' or 'B'; None where the kind's role is unknown."""
    role = residual_role(kind, roles)
    if role is None:
        return None
    return "A" if (role == "read") == (kind.adapted.input_side == "A") else "B"


def matches(pattern: str, kind: Kind) -> bool:
    """Whether a pattern of `roles` is the end of the name of what the kind adapts."""
    return re.fullmatch(rf"(.*\.)?({pattern})", kind.target) is not None
