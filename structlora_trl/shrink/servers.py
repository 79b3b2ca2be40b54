"""What LoRA servers load, as their sources have it (`docs/serving.md` cites them), and what an adapter needs of
each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from peft import LoraConfig
from torch import Tensor
from transformers import AutoConfig

from ..core.kinds import split_depth
from ..errors import StructLoRAError
from .peft_scaling import LORA_NAME, base_is_moved, factor_names, rank_of, scale_of

# Values of vLLM's `--max-lora-rank` (`vllm/config/lora.py`); it keeps room for the largest rank in every slot.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Heads of classifiers, which vLLM takes among `modules_to_save`.
_VLLM_HEADS = {"classifier", "score"}
# Features that some servers load.
_HEAD, _EXPERTS = "a classifier's head in `modules_to_save`", "experts in one parameter (`target_parameters`)"
_EMBEDDINGS, _INVOCATION = "LoRA on embeddings", "an invocation (`alora_invocation_tokens`)"
_SHARED = "LoRA on embeddings that the base model shares with its head"
_SOME_LAYERS = "a kind of module in some layers alone, which is dropped in all without a word"


class Server(NamedTuple):
    """A server: its name, whether all modules must have one rank and one scale, whether it reads `use_rslora`, which
    features it loads that not all do, and what its command needs, from the largest rank.
    """

    name: str
    one_rank: bool
    rank_stabilised: bool
    loads: tuple[str, ...]
    needs: Callable[[int], str]


def _vllm_rank(rank: int) -> str:
    return f"`--max-lora-rank {next((value for value in _VLLM_RANKS if value >= rank), rank)}`"


# LoRAX does not read `lora_embedding_A`; in llama.cpp a shared matrix has one adapter, of either shape, and its server ends.
SERVERS = {
    # Experts in one parameter depend on the model.
    "vllm": Server("vLLM", False, True, (_HEAD, _EXPERTS, _EMBEDDINGS, _SHARED, _SOME_LAYERS), _vllm_rank),
    "sglang": Server(
        "SGLang", True, False, (_EMBEDDINGS, _SHARED, _SOME_LAYERS), lambda r: f"`--max-lora-rank {r}`"
    ),
    "lorax": Server("LoRAX, TGI", True, True, (_SHARED,), lambda r: "nothing more"),
    "llamacpp": Server(
        "llama.cpp",
        True,
        False,
        (_EMBEDDINGS, _INVOCATION, _SOME_LAYERS),
        lambda r: "`convert_lora_to_gguf.py`",
    ),
}


def _features(lora: LoraConfig, tensors: dict[str, Tensor]) -> list[str]:
    """Features of an adapter that a server may be unable to load."""
    factors = [match for match in map(LORA_NAME.match, tensors) if match]
    saved_whole = {*(lora.modules_to_save or ())}
    has_embeddings = any(match["embedding"] for match in factors)
    has_head = any(match["module"].endswith("lm_head") for match in factors)
    found = {
        "DoRA (`use_dora`)": lora.use_dora,
        _HEAD: saved_whole & _VLLM_HEADS,
        "`modules_to_save`": saved_whole - _VLLM_HEADS,
        _EMBEDDINGS: has_embeddings,
        _SHARED: (has_embeddings or has_head) and _ties_embeddings(lora),
        "trained embeddings": lora.trainable_token_indices or any(map(_is_embedding, tensors)),
        "biases (`bias`, `lora_bias`)": lora.bias != "none" or lora.lora_bias,
        "`layer_replication`": lora.layer_replication,
        _INVOCATION: lora.alora_invocation_tokens,
        "base weights in the adapter (`init_lora_weights`)": base_is_moved(lora),
        _EXPERTS: lora.target_parameters,
        "convolutions": any(x.ndim > 2 for name, x in tensors.items() if LORA_NAME.match(name)),
        _SOME_LAYERS: _is_partial(lora, [*factor_names(tensors)]),
    }
    return [what for what, has in found.items() if has]


def _is_embedding(name: str) -> bool:
    """True for the weights of embeddings or of a head, which PEFT saves where they were resized."""
    # Where LoRA adapts them, PEFT adds the weights beneath by itself, and servers pass over them.
    is_beneath = ".lora_" in name or ".base_layer." in name
    return not is_beneath and any(part in name for part in ("embed_tokens", "lm_head"))


def _is_partial(lora: LoraConfig, modules: list[str]) -> bool:
    """True if some kind of module is adapted in a part of the layers, as far as the adapter tells."""
    layers: dict[str, set[int]] = {}
    for module in modules:
        name, depth = split_depth(module)
        if depth:  # a head or embeddings lie in no layer
            # Of several numbers, as T5 has them, the first is the layer's.
            layers.setdefault(name.rpartition(".")[2], set()).add(depth[0])
    every = {*range(1 + max((max(of) for of in layers.values()), default=-1))}
    return lora.layers_to_transform is not None or any(of != every for of in layers.values())


def _ties_embeddings(lora: LoraConfig) -> bool:
    """True if the base model's configuration lies on this machine, and says that embeddings and head are one matrix."""
    name, at = lora.base_model_name_or_path, {"revision": lora.revision, "local_files_only": True}
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **at).tie_word_embeddings
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _instead(lora: LoraConfig) -> str:
    if lora.layer_replication or lora.alora_invocation_tokens:
        return "serve it with PEFT, since it cannot be merged"
    return "merge it (`structlora export ADAPTER MERGED --merge`)"


def refuse_for(server: str, lora: LoraConfig, tensors: dict[str, Tensor]) -> None:
    """Stop where a server cannot load an adapter whatever its ranks.

    Raises:
        StructLoRAError: the message names what it cannot load.
    """
    if refused := [what for what in _features(lora, tensors) if what not in SERVERS[server].loads]:
        raise StructLoRAError(
            f"an adapter with {', '.join(refused)}", f"what {SERVERS[server].name} loads", _instead(lora)
        )


def told(lora: LoraConfig, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Server -> what an adapter needs there, in words."""
    modules, features = [*factor_names(tensors)], _features(lora, tensors)
    ranks = {rank_of(lora, module) for module in modules}
    scales = {round(scale_of(lora, module), 9) for module in modules}
    lines = {}
    for key, server in SERVERS.items():
        differs = {
            f"ranks differ ({min(ranks)} to {max(ranks)})": server.one_rank and len(ranks) > 1,
            "scales differ": len(scales) > 1,
            "rank-stabilised scale": lora.use_rslora and not server.rank_stabilised,
        }
        reasons = "; ".join(reason for reason, is_so in differs.items() if is_so)
        if refused := [what for what in features if what not in server.loads]:
            line = f"cannot load {', '.join(refused)}: {_instead(lora)}"
        elif reasons:
            line = f"{reasons}: `structlora export ADAPTER NEW --for {key}`"
        else:
            line = f"loads it, with {server.needs(max(ranks))}"
        is_open = lora.target_parameters and not refused  # of vLLM alone
        lines[server.name] = line + ("; only where it knows this model's experts" if is_open else "")
    return lines
