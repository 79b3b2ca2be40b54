"""Ranks and scales of an adapter: where PEFT reads them, how to write them so that others read the same.

A module's update is s·B·A. PEFT takes s from `lora_alpha`, `alpha_pattern`, `rank_pattern` and `use_rslora`;
vLLM and SGLang take `lora_alpha / r` for every module, whatever its rank; llama.cpp divides `lora_alpha` by
each module's own rank. What they do not read goes into lora_B.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from copy import deepcopy
from typing import NamedTuple

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor
from torch.nn.functional import pad

from ..core.kinds import Adapted
from ..errors import StructLoRAError
from ..peft_adapter import start_of

# With or without the adapter's name, as it stands in a model or in a file; `lora_B.bias` is not matched.
LORA_NAME = re.compile(
    r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.(?P<adapter>(?!bias$)[^.]+))?(\.weight)?$"
)
# `nn.MultiheadAttention` is adapted as a whole: this part lies in it, and PEFT looks up both by its name.
_OUT_PROJ = ".base_layer.out_proj"
_BIAS = re.compile(r"^(?P<module>.+)\.lora_B(\.[^.]+)?\.bias$")


class Directions(NamedTuple):
    """A module's update as a sum of rank-one parts, the largest first: A (..., r, k), B (..., d, r), and the
    singular values `sigma` (..., r) that order them. The norm of each part is shared equally between A and B.
    """

    A: Tensor
    B: Tensor
    sigma: Tensor


def singular_directions(A: Tensor, B: Tensor, weight: Tensor | None = None) -> Directions:
    """Factors of the same product BA along left singular vectors; the product is not formed.

    Args:
        A (`Tensor`): (..., r, k).
        B (`Tensor`): (..., d, r).
        weight (`Tensor`, *optional*): (r,), of each direction as it is. The vectors and `sigma` are then those of
            B diag(weight) A; where omitted, of BA, whose parts are its singular ones.
    """
    left, right = torch.linalg.qr(B if weight is None else B * weight), torch.linalg.qr(A.mT)
    U, sigma, _ = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    U = left.Q @ U
    parts = U.mT @ B @ A
    root = parts.norm(dim=-1).sqrt()
    lacking = A.shape[-2] - sigma.shape[-1]  # a module narrower than r has fewer
    return Directions(
        pad(parts / root.clamp(min=torch.finfo(root.dtype).tiny)[..., None], (0, 0, 0, lacking)),
        pad(U * root[..., None, :], (0, lacking)),
        pad(sigma, (0, lacking)),
    )


def with_singular_directions(
    lora: LoraConfig, tensors: dict[str, Tensor], openness: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Replace each module's directions by the singular ones of its update; the adapter computes the same.

    Args:
        lora (`LoraConfig`): of the adapter.
        tensors (`dict[str, Tensor]`): of its file.
        openness (`dict[str, Tensor]`, *optional*): of modules with gates, (r,). There the directions are those of
            B diag(√openness) A: openness is the share of signal in what a gate lets through, and so counts a
            direction's squared norm.

    Returns:
        Tensors of the new adapter's file, and module -> (E or 1, r) singular values of its update as it is
        added to the weight, each direction counted by its openness.
    """
    written, values = dict(tensors), {}
    for module, names in factor_names(tensors).items():
        A, B = tensors[names["A"]], tensors[names["B"]]
        experts = len(A) // rank_of(lora, module)
        open_share = (openness or {}).get(module)
        parts = singular_directions(
            A.double().unflatten(0, (experts, -1)).flatten(2),
            by_expert(B.double().flatten(1), experts),  # lora_B of a convolution is 1 x 1
            None if open_share is None else open_share.double().sqrt(),
        )
        written[names["A"]] = parts.A.reshape(A.shape).to(A.dtype)
        written[names["B"]] = parts.B.movedim(0, 2).reshape(B.shape).to(B.dtype)
        values[module] = scale_of(lora, module) * parts.sigma
    return written, values


def by_expert(B: Tensor, experts: int) -> Tensor:
    """lora_B of a module, (d, r·E, ...), as that of each of its experts, (E, d, r, ...)."""
    return B.unflatten(1, (-1, experts)).movedim(2, 0)


def base_is_moved_for_good(lora: LoraConfig) -> bool:
    """Whether the run changed base weights, when it began, in a way that PEFT does not repeat on loading."""
    return base_is_moved(lora) and not start_of(lora).is_repeated


def base_is_moved(lora: LoraConfig) -> bool:
    """Whether the adapter holds part of the base weights that it was trained on."""
    return start_of(lora).moves_base


def scale_of(lora: LoraConfig, module: str) -> float:
    """s of a module's ΔW = s·B·A, as PEFT has it."""
    rank = rank_of(lora, module)
    return _looked_up(lora, module, lora.alpha_pattern, lora.lora_alpha) / (
        math.sqrt(rank) if lora.use_rslora else rank
    )


def rank_of(lora: LoraConfig, module: str) -> int:
    """PEFT's rank of a module; where experts are one parameter, the rank of each."""
    return _looked_up(lora, module, lora.rank_pattern, lora.r)


def ties_adapted(lora: LoraConfig, tensors: Iterable[str]) -> bool:
    """Whether embeddings and a head share their LoRA factors (`ensure_weight_tying`, PEFT 0.18)."""
    names = [match for match in map(LORA_NAME.match, tensors) if match]
    adapted = any(match["embedding"] or match["module"].endswith("lm_head") for match in names)
    return adapted and getattr(lora, "ensure_weight_tying", False)


def parameters_of(lora: LoraConfig, module: str) -> list[str]:
    """Full names of the parameters that a module may wrap (`target_parameters`), with factors for each expert
    in one matrix; several where wrappers are nested, none of other modules.
    """
    name = module.removeprefix("base_model.model.").replace(".base_layer", "")
    names = {target: f"{name}.{target.rpartition('.')[-1]}" for target in lora.target_parameters or ()}
    return [full for target, full in names.items() if full == target or full.endswith(f".{target}")]


def shares_pattern(lora: LoraConfig, module: str, modules: Iterable[str]) -> bool:
    """Whether PEFT has no pattern for the rank of this module alone: experts in one parameter, where a
    pattern names parameters and the file does not say which is which, and the two parts of torch's attention.
    """
    is_attention = module.endswith(_OUT_PROJ) or module + _OUT_PROJ in modules
    return is_attention or bool(parameters_of(lora, module))


def adapted_by(lora: LoraConfig, module: str, rows: int) -> Adapted:
    """What a module with so many rows of lora_A adapts, as far as an adapter's files tell."""
    parameters = parameters_of(lora, module)
    if not parameters:
        return Adapted()
    # Wrappers of several parameters of one module are nested, and the file does not say which is whose.
    place = "base_layer" if module.endswith(".base_layer") else ""
    parameter = parameters[0].rpartition(".")[-1] if len(parameters) == 1 else place
    return Adapted(parameter, rows // rank_of(lora, module))


def factor_names(tensors: dict[str, Tensor]) -> dict[str, dict[str, str]]:
    """Module -> "A" or "B" -> that factor's name in an adapter's file."""
    names = {}
    for name in tensors:
        if match := LORA_NAME.match(name):
            names.setdefault(match["module"], {})[match["factor"]] = name
    return names


def scaled(tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The same adapter with its update ΔW times a number, which goes into lora_B: every server reads that."""
    names = {sides["B"] for sides in factor_names(tensors).values()}
    return {name: x * scale if name in names else x for name, x in tensors.items()}


def masked(lora: LoraConfig, tensors: dict[str, Tensor], kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same adapter with zeros in place of all directions but those `kept`, as `with_one_scale` takes them:
    what that makes smaller, in tensors of the shapes that they had.
    """
    written = dict(tensors)
    for module, names in factor_names(tensors).items():
        if module in kept:
            A, B = tensors[names["A"]], tensors[names["B"]]
            # lora_A's rows are in the order (expert, r), lora_B's columns in the order (r, expert).
            written[names["A"]] = A * kept[module].flatten().view(-1, *[1] * (A.ndim - 1)).to(A)
            written[names["B"]] = B * kept[module].T.flatten().view(1, -1, *[1] * (B.ndim - 2)).to(B)
    return written


def with_one_scale(
    lora: LoraConfig, tensors: dict[str, Tensor], kept: dict[str, Tensor], one_rank: bool = False
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Keep some directions, and give every module the scale `lora_alpha / r`.

    Args:
        lora (`LoraConfig`): of the adapter.
        tensors (`dict[str, Tensor]`): of its file.
        kept (`dict[str, Tensor]`): module -> (E or 1, r) of bool, the directions to keep of each of its experts, or of
            itself; other modules keep all. A module that keeps none is left out of the adapter (`exclude_modules`).
        one_rank (`bool`, *optional*, defaults to False): fill every module, those that keep nothing too, up to
            the largest rank with zeros.

    Returns:
        `LoraConfig` and tensors of the new adapter: ranks that differ are in `rank_pattern`, and in
        `alpha_pattern` what keeps the scale in PEFT; nothing is rank-stabilised.

    Raises:
        StructLoRAError: as `refuse_other_ranks`.
    """
    refuse_other_ranks(lora)
    chosen, scales = {}, {}
    for module, names in factor_names(tensors).items():
        whole = torch.ones(len(tensors[names["A"]]), dtype=torch.bool, device="cpu")
        chosen[module] = kept.get(module, whole.view(-1, rank_of(lora, module)))
        scales[module] = scale_of(lora, module)
    ranks = {module: int(mask.sum(1).max()) for module, mask in chosen.items()}
    rank, scale = max(ranks.values()), max(scales.values())
    for module in ranks:
        if one_rank or shares_pattern(lora, module, ranks):
            ranks[module] = rank
    written = {}
    for name, value in tensors.items():
        match, bias = LORA_NAME.match(name), _BIAS.match(name)
        if match and not ranks[match["module"]]:
            continue
        if match:
            value = _chosen(value, match["factor"], chosen[match["module"]], ranks[match["module"]])
        if (match and match["factor"] == "B") or bias:
            share = scales[(match or bias)["module"]] / scale
            value = value if share == 1 else (value.float() * share).to(value.dtype)
        written[name] = value
    smaller = _configured(lora, ranks, rank, scale)
    if any(own != rank_of(lora, module) for module, own in ranks.items()):
        # How training began may ask for ranks of its own (`orthogonal` for even ones).
        smaller.init_lora_weights = True
    return smaller, written


def refuse_other_ranks(lora: LoraConfig) -> None:
    """Stop where PEFT, loading an adapter of other ranks or scales, would change base weights otherwise than in training.

    Raises:
        StructLoRAError: the adapter holds part of its base weights (PiSSA, OLoRA, LoftQ).
    """
    if base_is_moved(lora):
        raise StructLoRAError(
            f"an adapter initialised with '{lora.init_lora_weights}', which takes base weights out of the model by rank and scale",
            "the ranks and scales of training",
            "export it as it is, without `--rank`, `--keep`, `--prune` and `--for`",
        )


def _configured(lora: LoraConfig, ranks: dict[str, int], rank: int, scale: float) -> LoraConfig:
    """Each module of another rank gets an entry of its own, so that no other pattern can match first."""
    lora = deepcopy(lora)
    lora.r, lora.lora_alpha, lora.use_rslora = rank, _number(scale * rank), False
    lora.rank_pattern, lora.alpha_pattern, left_out = {}, {}, []
    for module, own in ranks.items():
        name = module.removeprefix("base_model.model.")
        if not own:
            left_out.append(re.escape(name))
        elif own != rank:
            key = f"^{re.escape(name)}"
            lora.rank_pattern[key], lora.alpha_pattern[key] = own, _number(scale * own)
    if left_out:
        lora.exclude_modules = "|".join([*_excluded(lora), *left_out])
    return lora


def _excluded(lora: LoraConfig) -> list[str]:
    """`exclude_modules` as patterns of whole names."""
    excluded = lora.exclude_modules or []
    return [excluded] if isinstance(excluded, str) else [rf"(?:.*\.)?{re.escape(name)}" for name in excluded]


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _chosen(value: Tensor, factor: str, mask: Tensor, rank: int) -> Tensor:
    """The directions of a factor that a mask (E, r) keeps of each expert, then zeros."""
    is_A = factor == "A"
    # (E, r, ...)
    parts = value.unflatten(0, mask.shape) if is_A else by_expert(value, len(mask)).transpose(1, 2)
    kept = parts.new_zeros(len(mask), rank, *parts.shape[2:])
    for expert, chosen in enumerate(mask):
        kept[expert, : int(chosen.sum())] = parts[expert, chosen]
    return kept.flatten(0, 1) if is_A else kept.transpose(0, 2).flatten(1, 2)


def _looked_up(lora: LoraConfig, module: str, pattern: dict, default):
    """What PEFT finds for a module in one of its patterns."""
    own = module.removeprefix("base_model.model.").removesuffix(_OUT_PROJ)
    names = parameters_of(lora, module) or [own]
    found = {pattern.get(get_pattern_key(pattern.keys(), name), default) for name in names}
    if len(found) > 1:
        raise StructLoRAError(
            f"patterns that differ between parameters of '{module}': the file does not say which factors are whose",
            "one rank and one alpha for all parameters of a module",
            "load or merge this adapter with PEFT itself",
        )
    return found.pop()
