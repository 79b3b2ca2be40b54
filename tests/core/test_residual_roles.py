"""The table of residual roles, held to measurements on tiny models of many families.

Every norm is made the identity, since a norm keeps channels apart. Every other module with weights returns
what it returned in a first run. A change then travels along the residual stream alone, and stays in its
channels. A module reads the stream if a change of the stream reaches its input in the same channels. It
writes the stream if a change of its output reaches its block's output in the same channels. What lies
between does neither.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from structlora_trl.core.residual_roles import RESIDUAL_ROLES

pytestmark = pytest.mark.xdist_group("residual roles")  # which measures each family once

READ, WRITE = "read", "write"


def role_of(name: str) -> str | None:
    name = name.replace("*", "0")
    return next((role for p, role in RESIDUAL_ROLES.items() if re.fullmatch(rf"(.*\.)?({p})", name)), None)


# Names that transformers does not have.
DIFFUSERS = [
    "add_[qkv]_proj",
    "to_qkv_mlp_proj",
    "linear_in",
    r"ff\.net\.0\.proj",
    "to_add_out",
    r"ff\.net\.2",
]


def tensors(values) -> list[torch.Tensor]:
    """The floating-point tensors among a call's arguments or outputs."""
    if torch.is_tensor(values):
        return [values] if values.is_floating_point() else []
    if isinstance(values, dict):
        values = list(values.values())
    return [t for value in values for t in tensors(value)] if isinstance(values, (tuple, list)) else []


def changed(values, number: int = 1):
    """A call's arguments or output, copied, with every second channel of `number` tensors changed."""
    left = [number]

    def change(value):
        if isinstance(value, dict):
            return {key: change(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(map(change, value))
        if not torch.is_tensor(value):
            return value
        value = value.clone()
        if value.is_floating_point() and left[0] > 0:
            left[0] -= 1
            value[..., ::2] += torch.linspace(1, 2, len(range(0, value.shape[-1], 2)))
        return value

    return change(values)


def follows(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    """Whether, of the channels, exactly every second one has changed, in all tokens that changed at all."""
    change = torch.cat([(b - a).abs().flatten(0, -2) for a, b in zip(before, after, strict=True)])
    change = change[change.amax(-1) > 1e-6]
    return bool(len(change) and (change[:, ::2] > 1e-4).all() and (change[:, 1::2] < 1e-6).all())


class Probe:
    """Runs a model again and again with hooks on its blocks and on its modules with weights."""

    def __init__(self, model: PreTrainedModel, blocks: str | None, feed: Callable):
        self.model, self.feed = model.eval(), feed
        lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
        outermost = (n for n in lists if not any(n.startswith(f"{other}.") for other in lists))
        blocks = blocks or "|".join(rf"{name}\.\d+" for name in outermost)
        self.blocks = {n: m for n, m in model.named_modules() if re.fullmatch(blocks, n)}
        self.weighted = {}
        for name, module in model.named_modules():
            if re.search("(Layer|RMS|L2)Norm", type(module).__name__) and not list(module.children()):
                module.forward = lambda *args, **kwargs: tensors([args, kwargs])[0]
            elif not list(module.children()) or "Experts" in type(module).__name__:
                matrices = any(p.dim() > 1 for p in module.parameters(recurse=False))
                if matrices and not isinstance(module, nn.Embedding):
                    self.weighted[name] = module
        for parameter in model.parameters():  # scales and gates that begin at zero
            if parameter.dim() <= 1 and parameter.abs().max() < 1e-3:
                nn.init.ones_(parameter)
        self.first, self.frozen = True, defaultdict(list)
        for name, module in self.weighted.items():
            module.register_forward_hook(functools.partial(self._after_weights, name), with_kwargs=True)
        for name, block in self.blocks.items():
            block.register_forward_pre_hook(self._before_block, with_kwargs=True)
            block.register_forward_hook(functools.partial(self._after_block, name))

    def _after_weights(self, name, module, args, kwargs, output):
        self.inputs[name] += tensors([args, kwargs])[:1]
        if self.first:
            self.frozen[name].append(changed(output, 0))
            return None
        output = self.frozen[name][self.calls[name]]
        self.calls[name] += 1
        return changed(output, int(name == self.written))

    def _before_block(self, module, args, kwargs):
        return changed((args, kwargs), 1) if self.read else None

    def _after_block(self, name, module, args, output):
        self.outputs[name] += [tensors(output)[0].clone()]

    @torch.no_grad()
    def run(self, read: bool = False, written: str | None = None) -> tuple[dict, dict]:
        """The inputs of modules with weights, and the outputs of blocks.

        Args:
            read (`bool`, *optional*, defaults to `False`): change the stream before each block.
            written (`str`, *optional*): change the output of this module.
        """
        self.read, self.written = read, written
        self.inputs, self.outputs, self.calls = defaultdict(list), defaultdict(list), defaultdict(int)
        torch.manual_seed(0)
        self.feed(self.model, changed if read else lambda stream: stream)
        self.first = False
        return self.inputs, self.outputs


def measured(model: PreTrainedModel, blocks: str | None, feed: Callable) -> dict[str, set[str | None]]:
    """Module (with `*` for the layer's number) or parameter of experts -> what it does at each depth."""
    probe = Probe(model, blocks, feed)
    inputs, outputs = probe.run()
    changed_inputs, changed_outputs = probe.run(read=True)
    roles = defaultdict(set)
    for name, module in probe.weighted.items():
        block = next((b for b in probe.blocks if name.startswith(b + ".")), None)
        if not inputs[name] or block is None or not follows(outputs[block], changed_outputs[block]):
            continue  # not run, outside of blocks, or in a block that begins a new stream
        reads = follows(inputs[name], changed_inputs[name])
        writes = tensors(probe.frozen[name])[0].shape[-1] == outputs[block][0].shape[-1]
        writes = writes and follows(outputs[block], probe.run(written=name)[1][block])
        kind = re.sub(r"(?<![^.])\d+(?=\.|$)", "*", name)
        stacked = [p for p, value in module.named_parameters(recurse=False) if value.dim() == 3]
        if "Experts" in type(module).__name__ and stacked != ["weight"]:
            for p in stacked:
                done = writes if p.startswith("down") else reads
                roles[f"{kind}.{p}"].add((WRITE if p.startswith("down") else READ) if done else None)
        else:
            roles[kind].add(" and ".join([READ] * reads + [WRITE] * writes) or None)
    return roles


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


_WORDS = torch.randint(4, 60, (2, 7), generator=torch.Generator().manual_seed(0))
_GRID = torch.tensor([[1, 4, 4]])
_ONE = torch.ones(1, 1, 1, dtype=torch.long)


def feed(**inputs) -> Callable:
    return lambda model, stream: model(**inputs)


text = feed(input_ids=_WORDS)
pair = feed(input_ids=_WORDS, decoder_input_ids=_WORDS)
image = feed(pixel_values=noise(2, 3, 16, 16))
waves = feed(input_values=noise(2, 400))
sound = feed(input_features=noise(2, 40, 16))
mels = feed(input_features=noise(2, 16, 40))


def beside(name: str, *shape: int, **inputs) -> Callable:
    """Inputs and another tower's stream, which cross-attention reads."""
    return lambda model, stream: model(**inputs, **{name: stream(noise(*shape))})


def patches(model, stream):
    return model(noise(16, 96), _GRID)


class Family(NamedTuple):
    feed: Callable
    config: dict
    blocks: str | None = None  # names of its blocks where they are not the outermost lists of modules


_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
_TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {**_SIZES, **_TOKENS, "num_key_value_heads": 2, "max_position_embeddings": 64}
_HEADS = {**_DECODER, "head_dim": 8}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_ENCODER = {**_SIZES, **_TOKENS, "max_position_embeddings": 64, "type_vocab_size": 2}
_PAIR = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    **_TOKENS,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 40,
    "decoder_start_token_id": 1,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, **_TOKENS}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "n_positions": 64, **_TOKENS}
_IMAGE = {**_SIZES, "image_size": 16, "patch_size": 8}
_PATCHES = {**_SIZES, "depth": 3, "num_heads": 4, "out_hidden_size": 40, "patch_size": 4}
_WINDOWS = {
    "embed_dim": 32,
    "depths": [2, 2],
    "num_heads": [4, 4],
    "mlp_ratio": 2.0,
    "image_size": 16,
    "patch_size": 2,
    "window_size": 4,
}
_WAVES = {
    **_SIZES,
    "vocab_size": 32,
    "conv_dim": [16, 16],
    "conv_kernel": [4, 4],
    "conv_stride": [4, 4],
    "feat_extract_norm": "layer",
    "num_feat_extract_layers": 2,
    "squeeze_factor": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
_WAVE_BLOCKS = r"encoder\.(encoder\.)?(layers|layer)\.\d+"

# model type, or file and class of a tower -> family
FAMILIES = {
    # Text: decoders
    **{
        name: Family(text, _HEADS)
        for name in "llama qwen2 qwen3 gemma gemma2 gemma3_text mistral ministral3 olmo2 olmo3 granite "
        "cohere cohere2 glm glm4 smollm3 starcoder2 stablelm nemotron exaone4 seed_oss ernie4_5 "
        "hunyuan_v1_dense arcee apertus persimmon gpt_neox".split()
    },
    **{name: Family(text, _DECODER) for name in "phi phi3".split()},
    **{
        name: Family(text, {**_HEADS, **_EXPERTS})
        for name in "mixtral qwen2_moe qwen3_moe olmoe phimoe ernie4_5_moe glm4_moe granitemoe "
        "granitemoeshared gpt_oss dots1 minimax_m2".split()
    },
    **{
        name: Family(text, {**_DECODER, **_EXPERTS, **_LATENT})
        for name in "deepseek_v2 deepseek_v3 glm4_moe_lite".split()
    },
    "llama4_text": Family(text, {**_HEADS, "intermediate_size_mlp": 48, "num_local_experts": 4}),
    "gemma3n_text": Family(
        text,
        {
            **_HEADS,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 64,
            "altup_num_inputs": 2,
            "num_kv_shared_layers": 0,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma4_text": Family(
        text,
        {
            **_HEADS,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 64,
            "global_head_dim": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "falcon": Family(text, {**_SIZES, **_TOKENS}),
    "bloom": Family(text, {"hidden_size": 32, "n_layer": 3, "n_head": 4, **_TOKENS}),
    "mpt": Family(text, {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64, **_TOKENS}),
    "opt": Family(text, {**_DECODER, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt2": Family(text, _GPT2),
    "gpt2.GPT2Model": Family(
        beside("encoder_hidden_states", 2, 5, 32, input_ids=_WORDS), {**_GPT2, "add_cross_attention": True}
    ),
    "gpt_bigcode": Family(text, _GPT2),
    "gptj": Family(text, {**_GPT2, "rotary_dim": 4}),
    "codegen": Family(text, {**_GPT2, "rotary_dim": 4}),
    "gpt_neo": Family(
        text,
        {
            **_TOKENS,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    # Text: decoders without attention, or with little of it
    "mamba": Family(text, {**_SIZES, **_TOKENS, "state_size": 8, "time_step_rank": 6}),
    "falcon_mamba": Family(text, {**_SIZES, **_TOKENS, "state_size": 8, "time_step_rank": 6}),
    "mamba2": Family(
        text,
        {**_SIZES, **_TOKENS, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
    ),
    "jamba": Family(
        text,
        {
            **_DECODER,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "num_experts": 4,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 6,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": Family(text, {**_DECODER, **_MAMBA, "attn_layer_indices": [1]}),
    "falcon_h1": Family(text, {**_DECODER, **_MAMBA, "mamba_d_ssm": 64}),
    "granitemoehybrid": Family(
        text, {**_DECODER, **_EXPERTS, **_MAMBA, "layer_types": ["mamba", "attention", "mamba"]}
    ),
    "nemotron_h": Family(
        text,
        {
            **_DECODER,
            **_EXPERTS,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 4,
            "hybrid_override_pattern": "M*-E",
        },
    ),
    "qwen3_next": Family(text, {**_HEADS, **_EXPERTS, **_LINEAR}),
    "qwen3_5_text": Family(text, {**_HEADS, **_LINEAR}),
    "qwen3_5_moe_text": Family(text, {**_HEADS, **_EXPERTS, **_LINEAR}),
    "lfm2": Family(text, {**_DECODER, "layer_types": ["conv", "full_attention", "conv"]}),
    "recurrent_gemma": Family(text, {**_DECODER, "lru_width": 32, "attention_window_size": 8}),
    # Text: encoders
    **{
        name: Family(text, _ENCODER)
        for name in "bert roberta xlm-roberta roberta-prelayernorm camembert megatron-bert ernie esm mpnet "
        "deberta modernbert modernbert-decoder eurobert nomic_bert layoutlm rembert".split()
    },
    "bert.BertModel": Family(
        beside("encoder_hidden_states", 2, 5, 32, input_ids=_WORDS),
        {**_ENCODER, "is_decoder": True, "add_cross_attention": True},
    ),
    "electra": Family(text, {**_ENCODER, "embedding_size": 16}),
    "albert": Family(
        text, {**_ENCODER, "embedding_size": 16}, r"encoder\.albert_layer_groups\.\d+\.albert_layers\.\d+"
    ),
    "deberta-v2": Family(
        text, {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": False}
    ),
    "distilbert": Family(text, {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, **_TOKENS}),
    # Text: encoders with decoders
    **{name: Family(pair, _PAIR) for name in "bart mbart pegasus m2m_100 marian blenderbot led".split()},
    "nllb-moe": Family(pair, {**_PAIR, "num_experts": 4, "encoder_sparse_step": 1, "decoder_sparse_step": 1}),
    "t5": Family(pair, _T5),
    "mt5": Family(pair, {**_T5, "feed_forward_proj": "gated-gelu"}),
    "umt5": Family(pair, {**_T5, "feed_forward_proj": "gated-gelu"}),
    "switch_transformers": Family(pair, {**_T5, "num_experts": 4}),
    "t5gemma": Family(pair, {"encoder": _HEADS, "decoder": _HEADS}),
    # Vision
    **{
        name: Family(image, _IMAGE)
        for name in "vit deit beit dinov2 dinov2_with_registers dinov3_vit ijepa vit_mae vit_msn "
        "clip_vision_model siglip_vision_model aimv2_vision_model dpt".split()
    },
    "clip_text_model": Family(text, _ENCODER),
    "siglip.SiglipTextModel": Family(text, {**_ENCODER, "projection_size": 32}),
    "siglip2_vision_model": Family(
        feed(
            pixel_values=noise(2, 4, 192),
            pixel_attention_mask=torch.ones(2, 4, dtype=torch.long),
            spatial_shapes=torch.tensor([[2, 2], [2, 2]]),
        ),
        {**_IMAGE, "num_patches": 4},
    ),
    "swin": Family(image, _WINDOWS, r"encoder\.layers\.\d+\.blocks\.\d+"),
    "swinv2": Family(image, _WINDOWS, r"encoder\.layers\.\d+\.blocks\.\d+"),
    "sam_vision_model": Family(
        image,
        {
            **_IMAGE,
            "output_channels": 16,
            "window_size": 2,
            "global_attn_indexes": [1],
            "mlp_dim": 48,
            "patch_size": 2,
        },
    ),
    "sam2.Sam2HieraDetModel": Family(
        feed(pixel_values=noise(1, 3, 32, 32)),
        {
            "hidden_size": 32,
            "image_size": [32, 32],
            "blocks_per_stage": [2, 2],
            "embed_dim_per_stage": [32, 64],
            "num_attention_heads": 2,
            "num_attention_heads_per_stage": [2, 4],
            "window_size_per_stage": [4, 4],
            "global_attention_blocks": [3],
            "mlp_ratio": 2.0,
            "num_query_pool_stages": 1,
            "window_positional_embedding_background_size": [4, 4],
        },
    ),
    # Vision towers of language models
    "qwen2_vl.Qwen2VisionTransformerPretrainedModel": Family(
        patches, {**_PATCHES, "embed_dim": 32, "hidden_size": 48}
    ),
    "qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel": Family(
        patches, {**_PATCHES, "window_size": 8, "fullatt_block_indexes": [1]}
    ),
    "qwen3_vl.Qwen3VLVisionModel": Family(
        patches, {**_PATCHES, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    ),
    "qwen3_5.Qwen3_5VisionModel": Family(patches, {**_PATCHES, "num_position_embeddings": 16}),
    "glm4v.Glm4vVisionModel": Family(patches, {**_PATCHES, "out_hidden_size": 32, "image_size": 16}),
    "internvl.InternVLVisionModel": Family(image, {**_IMAGE, "image_size": [16, 16], "patch_size": [8, 8]}),
    "idefics3.Idefics3VisionTransformer": Family(image, _IMAGE),
    "pixtral": Family(
        feed(pixel_values=noise(2, 3, 16, 16), image_sizes=torch.tensor([[16, 16]] * 2)),
        {**_IMAGE, "head_dim": 8},
    ),
    "llama4.Llama4VisionModel": Family(
        image,
        {
            **_IMAGE,
            "patch_size": 4,
            "intermediate_size": 128,
            "projector_input_dim": 24,
            "projector_output_dim": 24,
        },
    ),
    "mllama.MllamaVisionModel": Family(
        feed(pixel_values=noise(1, 1, 1, 3, 16, 16), aspect_ratio_ids=_ONE[0], aspect_ratio_mask=_ONE),
        {
            **_IMAGE,
            "attention_heads": 4,
            "num_hidden_layers": 2,
            "num_global_layers": 2,
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
        },
    ),
    "mllama.MllamaTextModel": Family(
        beside(
            *("cross_attention_states", 2, 5, 32),
            input_ids=_WORDS,
            cross_attention_mask=torch.zeros(2, 1, 7, 5),
            full_text_row_masked_out_mask=torch.ones(2, 1, 7, 1),
        ),
        {**_DECODER, "cross_attention_layers": [1]},
    ),
    "gemma4_vision": Family(
        feed(
            pixel_values=noise(2, 4, 48),
            pixel_position_ids=torch.tensor([[[0, 0], [0, 1], [1, 0], [1, 1]]] * 2),
        ),
        {
            **_HEADS,
            "num_key_value_heads": 4,
            "patch_size": 4,
            "pooling_kernel_size": 1,
            "position_embedding_size": 8,
        },
    ),
    "phi4_multimodal.Phi4MultimodalVisionModel": Family(
        feed(pixel_values=noise(2, 3, 16, 16), patch_attention_mask=torch.ones(2, 2, 2, dtype=torch.bool)),
        _IMAGE,
    ),
    "blip.BlipVisionModel": Family(image, _IMAGE),
    "blip_2.Blip2QFormerModel": Family(
        beside("encoder_hidden_states", 2, 5, 40, query_embeds=noise(2, 4, 32)),
        {**_SIZES, "encoder_hidden_size": 40, "cross_attention_frequency": 2, "vocab_size": 64},
    ),
    # Audio
    **{
        name: Family(waves, _WAVES, _WAVE_BLOCKS)
        for name in "wav2vec2 hubert unispeech unispeech-sat data2vec-audio sew sew-d".split()
    },
    "wav2vec2-conformer": Family(waves, {**_WAVES, "position_embeddings_type": "rotary"}, _WAVE_BLOCKS),
    "wav2vec2-bert": Family(sound, {**_SIZES, "vocab_size": 32, "feature_projection_input_dim": 16}),
    "parakeet_encoder": Family(
        sound,
        {
            **_SIZES,
            "num_mel_bins": 16,
            "subsampling_conv_channels": 8,
            "subsampling_factor": 4,
            "conv_kernel_size": 5,
        },
    ),
    "whisper": Family(
        feed(input_features=noise(2, 16, 40), decoder_input_ids=_WORDS),
        {**_PAIR, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 64},
    ),
    "speech_to_text": Family(
        feed(input_features=noise(2, 40, 16), decoder_input_ids=_WORDS),
        {
            **_PAIR,
            "input_feat_per_channel": 16,
            "input_channels": 1,
            "conv_channels": 16,
            "max_source_positions": 64,
            "max_target_positions": 64,
        },
    ),
    "moonshine": Family(
        feed(input_values=noise(2, 2000), decoder_input_ids=_WORDS),
        {
            **_TOKENS,
            "hidden_size": 32,
            "intermediate_size": 48,
            "decoder_start_token_id": 1,
            "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
        },
    ),
    "speecht5": Family(
        feed(input_values=noise(2, 7, 32), decoder_input_values=noise(2, 7, 32)),
        {**_PAIR, "hidden_size": 32},
        r".*\.layers\.\d+",
    ),
    "audio-spectrogram-transformer": Family(
        feed(input_values=noise(2, 16, 16)),
        {
            **_SIZES,
            "patch_size": 8,
            "max_length": 16,
            "num_mel_bins": 16,
            "frequency_stride": 8,
            "time_stride": 8,
        },
    ),
    "qwen2_audio_encoder": Family(mels, {**_PAIR, "num_mel_bins": 16, "max_source_positions": 20}),
    "voxtral_encoder": Family(mels, {**_SIZES, "num_mel_bins": 16, "max_source_positions": 20}),
    "granite_speech.GraniteSpeechCTCEncoder": Family(
        lambda model, stream: model(noise(2, 16, 16)),
        {
            "input_dim": 16,
            "num_layers": 2,
            "hidden_dim": 32,
            "feedforward_mult": 2,
            "num_heads": 4,
            "dim_head": 8,
            "output_dim": 12,
            "context_size": 8,
            "max_pos_emb": 16,
            "conv_kernel_size": 3,
        },
    ),
    "phi4_multimodal.Phi4MultimodalAudioModel": Family(
        lambda model, stream: model(hidden_states=noise(2, 40, 16), mask=None),
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_blocks": 2,
            "num_attention_heads": 4,
            "input_size": 16,
            "ext_pw_out_channel": 32,
            "nemo_conv_channels": 8,
            "depthwise_separable_out_channel": 32,
        },
    ),
    "gemma4.Gemma4AudioModel": Family(
        lambda model, stream: model(noise(1, 40, 16), torch.ones(1, 40, dtype=torch.bool)),
        {**_SIZES, "subsampling_conv_channels": [16, 4], "output_proj_dims": 24},
    ),
}


@functools.cache
def roles(name: str) -> dict[str, set[str | None]] | None:
    """Of a family's modules, as measured; None where this version of transformers lacks the family."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    try:
        file, _, cls = name.partition(".")
        if cls:
            cls = getattr(importlib.import_module(f"transformers.models.{file}.modeling_{file}"), cls)
            config = cls.config_class(**family.config)
        else:
            config = AutoConfig.for_model(name, **family.config)
    except (ModuleNotFoundError, AttributeError):
        return None  # a tower's
    except ValueError as error:
        if "Unrecognized model identifier" in str(error):
            return None
        raise
    config._attn_implementation = "eager"
    return measured(cls(config) if cls else AutoModel.from_config(config), family.blocks, family.feed)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_says_what_modules_do(name):
    found = roles(name)
    if found is None:
        pytest.skip("this version of transformers lacks the family")
    assert {READ, WRITE} <= set().union(*found.values())
    assert found == {module: {role_of(module)} for module in found}


@pytest.mark.parametrize(
    ("name", "between"),
    [
        ("deepseek_v3", {"self_attn.q_b_proj", "self_attn.kv_b_proj"}),
        ("mamba", {"mixer.x_proj"}),
        ("deberta-v2", {"attention.self.pos_key_proj", "attention.self.pos_query_proj"}),
        (
            "wav2vec2-bert",
            {f"conv_module.{n}_conv{i}" for n, i in (("pointwise", 1), ("depthwise", ""), ("pointwise", 2))},
        ),
        (
            "parakeet_encoder",
            {
                "self_attn.relative_k_proj",
                "conv.pointwise_conv1",
                "conv.depthwise_conv",
                "conv.pointwise_conv2",
            },
        ),
    ],
)
def test_modules_between_are_unknown(name, between):
    found = roles(name) or pytest.skip("this version of transformers lacks the family")
    assert {module.split(".*.", 1)[1] for module, done in found.items() if done == {None}} >= between


def alternatives(pattern: str) -> list[str]:
    """'a|(b|c)d' -> ['a', '(b|c)d']."""
    parts = [""]
    for character in pattern:
        if character == "|" and parts[-1].count("(") == parts[-1].count(")"):
            parts.append("")
        else:
            parts[-1] += character
    return parts


def test_every_name_of_the_table_is_measured():
    if lacking := [name for name in FAMILIES if roles(name) is None]:
        pytest.skip(f"this version of transformers lacks {lacking}")
    found = {module.replace("*", "0") for name in FAMILIES for module in roles(name)}
    unmeasured = {
        name
        for pattern in RESIDUAL_ROLES
        for name in alternatives(pattern)
        if not any(re.fullmatch(rf"(.*\.)?({name})", module) for module in found)
    }
    assert unmeasured == set(DIFFUSERS)
