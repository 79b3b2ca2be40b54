"""What modules of many model families do with the residual stream, measured on tiny models of each.

`python -m benchmarks.residual_roles` writes it to `tests/core/residual_roles.json`, which the table of roles
(`structlora_trl/core/residual_roles.py`) is held to. A new family is a row of `FAMILIES`.

Every norm is made the identity, since a norm keeps channels apart. Every other module with weights returns
what it returned in a first run. A change then travels along the residual stream alone, and stays in its
channels. A module reads the stream if a change of the stream reaches its input in the same channels. It
writes the stream if a change of its output reaches its block's output in the same channels. What lies
between does neither.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

MEASURED = Path(__file__).parents[1] / "tests" / "core" / "residual_roles.json"
READ, WRITE = "read", "write"


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
    config: dict  # beside `SIZES`
    blocks: str | None  # names of its blocks where they are not the outermost lists of modules


def family(feed: Callable, blocks: str | None = None, **config) -> Family:
    return Family(feed, config, blocks)


# Of all families: each takes the options that its configuration knows.
_SIZES = """
0: pad_token_id num_kv_shared_layers
1: bos_token_id n_shared_experts n_group topk_group n_groups first_k_dense_replace decoder_start_token_id mamba_n_groups
    attn_layer_offset expert_layer_offset num_query_pool_stages max_num_tiles input_channels
2: eos_token_id num_key_value_heads type_vocab_size num_experts_per_tok altup_num_inputs num_layers encoder_layers
    decoder_layers encoder_num_hidden_layers decoder_num_hidden_layers attn_layer_period expert_layer_period
    linear_num_key_heads num_global_layers cross_attention_frequency squeeze_factor num_conv_pos_embedding_groups
    feedforward_mult num_blocks
3: num_hidden_layers n_layer n_layers depth conv_kernel_size
4: num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads
    encoder_num_attention_heads decoder_num_attention_heads linear_num_value_heads num_experts num_local_experts
    n_routed_experts rotary_dim chunk_size mamba_chunk_size num_patches window_size num_conv_pos_embeddings subsampling_factor
8: head_dim global_head_dim d_kv dim_head qk_nope_head_dim qk_rope_head_dim laurel_rank hidden_size_per_layer_input state_size
    mamba_d_state mamba_n_heads mamba_d_head mamba_num_heads mamba_head_dim ssm_state_size linear_key_head_dim
    linear_value_head_dim attention_window_size patch_size position_embedding_size subsampling_conv_channels frequency_stride
    time_stride context_size nemo_conv_channels
16: kv_lora_rank embedding_size image_size num_mel_bins output_channels num_position_embeddings max_length
    feature_projection_input_dim input_feat_per_channel conv_channels input_dim input_size max_pos_emb
32: hidden_size d_model n_embd dim embed_dim word_embed_proj_dim lru_width projection_size ext_pw_out_channel
    depthwise_separable_out_channel
48: intermediate_size intermediate_size_mlp ffn_dim n_inner d_ff hidden_dim mlp_dim encoder_ffn_dim
64: vocab_size max_position_embeddings max_seq_len n_positions vocab_size_per_layer_input mamba_d_ssm vision_output_dim
    max_target_positions
6: time_step_rank mamba_dt_rank
12: q_lora_rank v_head_dim output_dim
20: max_source_positions
24: moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size projector_input_dim projector_output_dim
    output_proj_dims
40: decoder_ffn_dim encoder_hidden_size out_hidden_size
"""
SIZES = {name: int(size) for size, names in re.findall(r"(\d+): (\D+)", _SIZES) for name in names.split()}
_WAVES = {"vocab_size": 32, "conv_dim": [16, 16], "conv_kernel": [4, 4], "conv_stride": [4, 4]}
_WAVES |= {"feat_extract_norm": "layer", "num_feat_extract_layers": 2}
_WAVE_BLOCKS = r"encoder\.(encoder\.)?(layers|layer)\.\d+"
_LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_TOWER = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size"
_TOWER = {name: SIZES[name] for name in _TOWER.split()}

# model type, or file and class of a tower -> family
FAMILIES = {
    # Text
    **dict.fromkeys(
        "llama qwen2 qwen3 gemma gemma2 gemma3_text mistral ministral3 olmo2 olmo3 granite cohere cohere2 "
        "glm glm4 smollm3 starcoder2 stablelm nemotron exaone4 seed_oss ernie4_5 hunyuan_v1_dense arcee "
        "apertus persimmon gpt_neox phi phi3 mixtral qwen2_moe qwen3_moe olmoe phimoe ernie4_5_moe glm4_moe "
        "granitemoe granitemoeshared gpt_oss dots1 minimax_m2 llama4_text falcon bloom mpt opt gpt2 "
        "gpt_bigcode gptj codegen mamba falcon_mamba jamba falcon_h1 recurrent_gemma bert roberta "
        "xlm-roberta roberta-prelayernorm camembert megatron-bert ernie esm mpnet deberta modernbert "
        "modernbert-decoder eurobert nomic_bert layoutlm rembert electra distilbert clip_text_model "
        "siglip.SiglipTextModel".split(),
        family(text),
    ),
    **dict.fromkeys("deepseek_v2 deepseek_v3 glm4_moe_lite".split(), family(text, num_key_value_heads=4)),
    **dict.fromkeys("qwen3_next qwen3_5_text qwen3_5_moe_text".split(), family(text, **_LINEAR)),
    "gemma3n_text": family(
        text,
        activation_sparsity_pattern=[0.0] * 3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gemma4_text": family(text, layer_types=["sliding_attention", "sliding_attention", "full_attention"]),
    "gpt_neo": family(text, attention_types=[[["global", "local"], 1]]),
    "mamba2": family(text, num_heads=8, n_groups=2),
    "bamba": family(text, attn_layer_indices=[1]),
    "granitemoehybrid": family(text, layer_types=["mamba", "attention", "mamba"]),
    "nemotron_h": family(text, hybrid_override_pattern="M*-E"),
    "lfm2": family(text, layer_types=["conv", "full_attention", "conv"]),
    "albert": family(text, r"encoder\.albert_layer_groups\.\d+\.albert_layers\.\d+"),
    "deberta-v2": family(text, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=False),
    # Text: encoders with decoders
    **dict.fromkeys(
        "bart mbart pegasus m2m_100 marian blenderbot led t5 switch_transformers".split(), family(pair)
    ),
    **dict.fromkeys(["mt5", "umt5"], family(pair, feed_forward_proj="gated-gelu")),
    "nllb-moe": family(pair, encoder_sparse_step=1, decoder_sparse_step=1),
    "t5gemma": family(pair, encoder=_TOWER, decoder=_TOWER),
    # Text: cross-attention
    "gpt2.GPT2Model": family(
        beside("encoder_hidden_states", 2, 5, 32, input_ids=_WORDS), add_cross_attention=True
    ),
    "bert.BertModel": family(
        beside("encoder_hidden_states", 2, 5, 32, input_ids=_WORDS), is_decoder=True, add_cross_attention=True
    ),
    "mllama.MllamaTextModel": family(
        beside(
            *("cross_attention_states", 2, 5, 32),
            input_ids=_WORDS,
            cross_attention_mask=torch.zeros(2, 1, 7, 5),
            full_text_row_masked_out_mask=torch.ones(2, 1, 7, 1),
        ),
        cross_attention_layers=[1],
    ),
    "blip_2.Blip2QFormerModel": family(
        beside("encoder_hidden_states", 2, 5, 40, query_embeds=noise(2, 4, 32))
    ),
    # Vision
    **dict.fromkeys(
        "vit deit beit dinov2 dinov2_with_registers dinov3_vit ijepa vit_mae vit_msn clip_vision_model "
        "siglip_vision_model aimv2_vision_model dpt blip.BlipVisionModel".split(),
        family(image),
    ),
    "siglip2_vision_model": family(
        feed(
            pixel_values=noise(2, 4, 192),
            pixel_attention_mask=torch.ones(2, 4, dtype=torch.long),
            spatial_shapes=torch.tensor([[2, 2], [2, 2]]),
        )
    ),
    **dict.fromkeys(
        ["swin", "swinv2"],
        family(
            image,
            r"encoder\.layers\.\d+\.blocks\.\d+",
            depths=[2, 2],
            num_heads=[4, 4],
            mlp_ratio=2.0,
            patch_size=2,
        ),
    ),
    "sam_vision_model": family(image, window_size=2, global_attn_indexes=[1], mlp_ratio=2.0, patch_size=2),
    "sam2.Sam2HieraDetModel": family(
        feed(pixel_values=noise(1, 3, 32, 32)),
        image_size=[32, 32],
        blocks_per_stage=[2, 2],
        embed_dim_per_stage=[32, 64],
        num_attention_heads=2,
        num_attention_heads_per_stage=[2, 4],
        window_size_per_stage=[4, 4],
        global_attention_blocks=[3],
        mlp_ratio=2.0,
        window_positional_embedding_background_size=[4, 4],
    ),
    # Vision towers of language models
    "qwen2_vl.Qwen2VisionTransformerPretrainedModel": family(patches, hidden_size=48, patch_size=4),
    "qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel": family(
        patches, patch_size=4, window_size=8, fullatt_block_indexes=[1]
    ),
    "qwen3_vl.Qwen3VLVisionModel": family(patches, patch_size=4, deepstack_visual_indexes=[0]),
    "qwen3_5.Qwen3_5VisionModel": family(patches, patch_size=4),
    "glm4v.Glm4vVisionModel": family(patches, patch_size=4, out_hidden_size=32),
    "internvl.InternVLVisionModel": family(image, image_size=[16, 16], patch_size=[8, 8]),
    "idefics3.Idefics3VisionTransformer": family(image),
    "pixtral": family(feed(pixel_values=noise(2, 3, 16, 16), image_sizes=torch.tensor([[16, 16]] * 2))),
    "llama4.Llama4VisionModel": family(image, patch_size=4, intermediate_size=128),
    "mllama.MllamaVisionModel": family(
        feed(pixel_values=noise(1, 1, 1, 3, 16, 16), aspect_ratio_ids=_ONE[0], aspect_ratio_mask=_ONE),
        num_hidden_layers=2,
        supported_aspect_ratios=[[1, 1]],
        intermediate_layers_indices=[0],
    ),
    "gemma4_vision": family(
        feed(
            pixel_values=noise(2, 4, 48),
            pixel_position_ids=torch.tensor([[[0, 0], [0, 1], [1, 0], [1, 1]]] * 2),
        ),
        num_key_value_heads=4,
        patch_size=4,
        pooling_kernel_size=1,
    ),
    "phi4_multimodal.Phi4MultimodalVisionModel": family(
        feed(pixel_values=noise(2, 3, 16, 16), patch_attention_mask=torch.ones(2, 2, 2, dtype=torch.bool))
    ),
    # Audio
    **dict.fromkeys(
        "wav2vec2 hubert unispeech unispeech-sat data2vec-audio sew sew-d".split(),
        family(waves, _WAVE_BLOCKS, **_WAVES),
    ),
    "wav2vec2-conformer": family(waves, _WAVE_BLOCKS, **_WAVES, position_embeddings_type="rotary"),
    "wav2vec2-bert": family(sound, vocab_size=32),
    "parakeet_encoder": family(sound, conv_kernel_size=5),
    "whisper": family(feed(input_features=noise(2, 16, 40), decoder_input_ids=_WORDS)),
    "speech_to_text": family(
        feed(input_features=noise(2, 40, 16), decoder_input_ids=_WORDS), max_source_positions=64
    ),
    "moonshine": family(feed(input_values=noise(2, 2000), decoder_input_ids=_WORDS)),
    "speecht5": family(
        feed(input_values=noise(2, 7, 32), decoder_input_values=noise(2, 7, 32)), r".*\.layers\.\d+"
    ),
    "audio-spectrogram-transformer": family(feed(input_values=noise(2, 16, 16))),
    **dict.fromkeys(["qwen2_audio_encoder", "voxtral_encoder"], family(mels)),
    "granite_speech.GraniteSpeechCTCEncoder": family(
        lambda model, stream: model(noise(2, 16, 16)), hidden_dim=32
    ),
    "phi4_multimodal.Phi4MultimodalAudioModel": family(
        lambda model, stream: model(hidden_states=noise(2, 40, 16), mask=None)
    ),
    "gemma4.Gemma4AudioModel": family(
        lambda model, stream: model(noise(1, 40, 16), torch.ones(1, 40, dtype=torch.bool)),
        subsampling_conv_channels=[16, 4],
    ),
}


def roles(name: str) -> dict[str, list[str]]:
    """Of a family's modules: those that 'read' the stream, that 'write' it, and those 'between'.

    Raises:
        LookupError: a family that this version of transformers lacks; a module of several roles.
    """
    feed, config, blocks = FAMILIES[name]
    torch.manual_seed(0)
    file, _, cls = name.partition(".")
    if cls:
        cls = getattr(importlib.import_module(f"transformers.models.{file}.modeling_{file}"), cls)
    config_class = cls.config_class if cls else CONFIG_MAPPING[name]
    known = {*inspect.signature(config_class).parameters, *inspect.signature(PreTrainedConfig).parameters}
    sizes = {option: size for option, size in SIZES.items() if option in known}
    config = config_class(**{**sizes, **config})
    config._attn_implementation = "eager"
    model = cls(config) if cls else AutoModel.from_config(config)
    found = defaultdict(list)
    for module, done in sorted(measured(model, blocks, feed).items()):
        if len(done) > 1:
            raise LookupError(f"{module} of {name} does {done} at different depths")
        found[done.pop() or "between"].append(module)
    return dict(sorted(found.items()))


def main():
    """One line for all families whose modules are the same."""
    alike = defaultdict(list)
    for name in FAMILIES:
        alike[json.dumps(roles(name))].append(name)
    lines = ",\n".join(f'  "{" ".join(names)}": {text}' for text, names in alike.items())
    version = json.dumps(transformers.__version__)
    MEASURED.write_text(f'{{"transformers": {version}, "families": {{\n{lines}\n}}}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
