"""What LoRA servers load, as their sources have it (`docs/serving.md` cites them), and what an adapter needs of
each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from peft import LoraConfig
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from ..core.kinds import split_depth
from ..errors import StructLoRAError
from .peft_scaling import LORA_NAME, base_is_moved, factor_names, rank_of, scale_of

# Values of vLLM's `--max-lora-rank` (`vllm/config/lora.py`); it keeps room for the largest rank in every slot.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Heads of classifiers, which vLLM takes among `modules_to_save`.
_VLLM_HEADS = {"classifier", "score"}


class Server(NamedTuple):
    """A server: its name, whether all modules must have one rank and one scale, whether it reads `use_rslora`, what
    it cannot load, by what an adapter has, what its command needs, from the largest rank, and the largest that it takes.
    """

    name: str
    one_rank: bool
    rank_stabilised: bool
    refuses: tuple[str, ...]
    needs: Callable[[int], str]
    largest_rank: float = math.inf


def _vllm_rank(rank: int) -> str:
    return f"`--max-lora-rank {next(value for value in _VLLM_RANKS if value >= rank)}`"


# What an adapter may have that a server cannot load -> how it is found.
_FEATURES: dict[str, Callable[[LoraConfig, dict[str, Tensor]], object]] = {
    "DoRA (`use_dora`)": lambda lora, tensors: lora.use_dora,
    "a classifier's head in `modules_to_save`": lambda lora, tensors: (
        {*(lora.modules_to_save or ())} & _VLLM_HEADS
    ),
    "`modules_to_save`": lambda lora, tensors: {*(lora.modules_to_save or ())} - _VLLM_HEADS,
    "LoRA on embeddings": lambda lora, tensors: any(
        match["embedding"] for name in tensors if (match := LORA_NAME.match(name))
    ),
    "LoRA on embeddings that the base model shares with its head": lambda lora, tensors: (
        any(
            match["embedding"] or match["module"].endswith("lm_head")
            for name in tensors
            if (match := LORA_NAME.match(name))
        )
        and getattr(_base_config(lora), "tie_word_embeddings", False)
    ),
    "trained embeddings": lambda lora, tensors: (
        lora.trainable_token_indices or any(_is_embedding(name) for name in tensors)
    ),
    "biases (`bias`, `lora_bias`)": lambda lora, tensors: lora.bias != "none" or lora.lora_bias,
    "`layer_replication`": lambda lora, tensors: lora.layer_replication,
    "an invocation (`alora_invocation_tokens`)": lambda lora, tensors: getattr(
        lora, "alora_invocation_tokens", None
    ),
    "base weights in the adapter (`init_lora_weights`)": lambda lora, tensors: base_is_moved(lora),
    "experts in one parameter (`target_parameters`)": lambda lora, tensors: lora.target_parameters,
    "convolutions": lambda lora, tensors: any(
        LORA_NAME.match(name) and value.ndim > 2 for name, value in tensors.items()
    ),
}
# LoRAX does not read `lora_embedding_A`; in llama.cpp a shared matrix has one adapter, of either shape, and its server ends.
_ALL = tuple(feature for feature in _FEATURES if not feature.startswith("LoRA on embeddings"))
SERVERS = {
    "vllm": Server(
        "vLLM",
        one_rank=False,
        rank_stabilised=True,
        # Experts in one parameter depend on the model.
        refuses=tuple(f for f in _ALL if "head" not in f and "experts" not in f),
        needs=_vllm_rank,
        largest_rank=_VLLM_RANKS[-1],
    ),
    "sglang": Server(
        "SGLang",
        one_rank=True,
        rank_stabilised=False,
        refuses=_ALL,
        needs=lambda rank: f"`--max-lora-rank {rank}`",
    ),
    "lorax": Server(
        "LoRAX, TGI",
        one_rank=True,
        rank_stabilised=True,
        refuses=(*_ALL, "LoRA on embeddings"),
        needs=lambda rank: "nothing more",
    ),
    "llamacpp": Server(
        "llama.cpp",
        one_rank=True,
        rank_stabilised=False,
        refuses=tuple(f for f in _FEATURES if f != "LoRA on embeddings" and "invocation" not in f),
        needs=lambda rank: "`convert_lora_to_gguf.py`",
    ),
}


def _is_embedding(name: str) -> bool:
    """Whether a tensor is the weights of embeddings or of a head, which PEFT saves where they were resized."""
    # Where LoRA adapts them, PEFT adds the weights beneath by itself, and servers pass over them.
    is_beneath = ".lora_" in name or ".base_layer." in name
    return not is_beneath and any(part in name for part in ("embed_tokens", "lm_head"))


def _refused(key: str, lora: LoraConfig, tensors: dict[str, Tensor]) -> list[str]:
    """What an adapter has that a server cannot load, whatever its ranks."""
    refused = [what for what, has in _FEATURES.items() if what in SERVERS[key].refuses and has(lora, tensors)]
    if key == "lorax" and (lacking := _lacking(lora, [*factor_names(tensors)])):
        refused += [f"{', '.join(lacking)} in some layers alone (it drops them in all, without a word)"]
    return refused


def refuse_for(server: str, lora: LoraConfig, tensors: dict[str, Tensor]) -> None:
    """Stop where a server cannot load an adapter whatever its ranks.

    Raises:
        StructLoRAError: the message names what it cannot load.
    """
    if refused := _refused(server, lora, tensors):
        if why := _unmergeable(lora):
            fix = f"serve it with PEFT: {why}"
        else:
            fix = "merge it (`structlora export ADAPTER MERGED --merge`), and serve the merged model"
        raise StructLoRAError(
            f"an adapter with {', '.join(refused)}",
            f"what {SERVERS[server].name} loads: factors of linear layers alone",
            fix,
        )


def _unmergeable(lora: LoraConfig) -> str:
    """Why PEFT may not merge an adapter, empty where it does."""
    if lora.layer_replication or getattr(lora, "alora_invocation_tokens", None):
        return "it cannot be merged"
    return "`lora_bias` can be merged (`--merge`) only into layers that have a bias" if lora.lora_bias else ""


def refuse_rank_for(server: str, lora: LoraConfig, tensors: dict[str, Tensor]) -> None:
    """Stop where an adapter, as it is to be written, has a rank that a server cannot load.

    Raises:
        StructLoRAError: the message names the rank and the largest that it takes.
    """
    largest = max(rank_of(lora, module) for module in factor_names(tensors))
    most = SERVERS[server].largest_rank
    if largest > most:
        raise StructLoRAError(
            f"an adapter of rank {largest}",
            f"what {SERVERS[server].name} loads: ranks up to {most}",
            f"make it smaller: `--rank {most}` or less",
        )


def told(lora: LoraConfig, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Server -> what an adapter needs there, in words."""
    modules = [*factor_names(tensors)]
    ranks = {rank_of(lora, module) for module in modules}
    scales = {round(scale_of(lora, module), 9) for module in modules}
    experts = ""
    if lora.target_parameters:  # which all but vLLM refuse
        experts = "; only where it knows this model's experts, else merge it (`--merge`)"
    lines = {}
    for key, server in SERVERS.items():
        reasons = []
        if server.one_rank and len(ranks) > 1:
            reasons.append(f"ranks differ ({min(ranks)} to {max(ranks)})")
        if len(scales) > 1:
            reasons.append("scales differ")
        if lora.use_rslora and not server.rank_stabilised:
            reasons.append("rank-stabilised scale")
        if refused := _refused(key, lora, tensors):
            why = _unmergeable(lora)
            instead = f"serve it with PEFT: {why}" if why else "merge it (`--merge`)"
            lines[server.name] = f"cannot load {', '.join(refused)}: {instead}"
        elif max(ranks) > server.largest_rank:
            smaller = f"`structlora export ADAPTER NEW --rank {server.largest_rank}` or less"
            lines[server.name] = f"cannot load rank {max(ranks)}: {smaller}"
        elif reasons:
            lines[server.name] = f"{'; '.join(reasons)}: `structlora export ADAPTER NEW --for {key}`{experts}"
        else:
            lines[server.name] = f"loads it, with {server.needs(max(ranks))}{experts}"
    return lines


def _lacking(lora: LoraConfig, modules: list[str]) -> list[str]:
    """Kinds of modules that some layer of the base model lacks."""
    layers: dict[str, set[int]] = {}
    for module in modules:
        name, depth = split_depth(module)
        if depth:  # a head or embeddings lie in no layer
            # Of several numbers, as T5 has them, the first is the layer's.
            layers.setdefault(name.rpartition(".")[2], set()).add(depth[0])
    count = _layer_count(lora)
    every = set().union(*layers.values(), range(count))
    is_partial = not count and lora.layers_to_transform is not None
    return [name for name, of in layers.items() if is_partial or of != every]


def _layer_count(lora: LoraConfig) -> int:
    """Layers of the base model, 0 where they are not known."""
    config = _base_config(lora)
    return getattr(config.get_text_config(), "num_hidden_layers", 0) if config else 0


def _base_config(lora: LoraConfig) -> PreTrainedConfig | None:
    """The base model's configuration, where it lies on this machine."""
    try:
        return AutoConfig.from_pretrained(
            lora.base_model_name_or_path,
            revision=lora.revision,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
