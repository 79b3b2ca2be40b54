"""Which LoRA modules read a transformer's residual stream and which write it, by the end of their names.

Only the residual stream is one space at all depths: modules that read it share their input side, modules
that write it their output side. An encoder's last state, which cross-attention reads, is one space too.
Patterns are as in PEFT's `rank_pattern`, and the first that matches counts; `StructLoRAConfig.roles` adds
to them.

What lies between is left out on purpose: convolutions, `kv_b_proj` (it reads a latent space of its own
layer), and the like. A name that means something else in other models has its parent's in front.
`tests/core/residual_roles.json` says what the modules of each family do; of diffusers it says nothing.
"""

RESIDUAL_ROLES = {
    # LLaMA, Mistral, Qwen, Gemma, Phi-3, CLIP, SigLIP, ViT
    r"q_proj|k_proj|v_proj|qkv_proj|gate_proj|up_proj|gate_up_proj|fc1": "read",
    r"o_proj|out_proj|down_proj|fc2": "write",
    # BERT, RoBERTa, ViT before transformers 5; BLIP-2's Q-Former
    r"query|key|value|intermediate(_query)?\.dense": "read",
    r"output(_query)?\.dense": "write",
    # DeBERTa, DistilBERT, ALBERT
    r"query_proj|key_proj|value_proj|q_lin|k_lin|v_lin|lin1|self\.in_proj|albert_layers\.\d+\.ffn": "read",
    r"out_lin|lin2|albert_layers\.\d+\.ffn_output": "write",
    # Falcon, BLOOM, GPT-NeoX, MPT, GPT-2, GPT-J, Phi
    r"query_key_value|dense_h_to_4h|Wqkv|c_attn|q_attn|c_fc|mlp\.fc_in": "read",
    r"dense_4h_to_h|((self_)?attention|self_attn)\.dense|c_proj|mlp\.fc_out": "write",
    # ModernBERT
    r"mlp\.Wi": "read",
    r"(attn|mlp)\.Wo": "write",
    # T5, Mixtral, DeepSeek, LED
    r"q|k|v|wi|wi_0|wi_1|w1|w3|q_a_proj|kv_a_proj_with_mqa": "read",
    r"o|wo|w2|self_attn\.output": "write",
    # Mamba, Jamba, Bamba, Qwen3-Next, Qwen3.5, LFM2, RecurrentGemma
    r"(mixer|mamba|conv)\.in_proj|linear_attn\.in_proj_\w+|temporal_block\.linear_[xy]": "read",
    # Granite's mixtures
    r"(shared_mlp|block_sparse_moe)\.input_linear": "read",
    r"(shared_mlp|block_sparse_moe)\.output_linear": "write",
    # Gemma 3n and Gemma 4, with the layers of their towers, which clip
    r"per_layer_input_gate|laurel\.linear_left|altup\.modality_router": "read",
    r"per_layer_projection|laurel\.linear_right": "write",
    r"([qkv]|gate|up)_proj\.linear|ffw_layer_1\.linear|lconv1d\.linear_start\.linear": "read",
    r"(o|down)_proj\.linear|ffw_layer_2\.linear|self_attn\.post\.linear|lconv1d\.linear_end\.linear": "write",
    # Towers: Qwen-VL, GLM-V, SAM, SAM 2, InternVL, BLIP
    r"(self_)?attn\.qkv|mlp\.(linear_fc1|proj_in)": "read",
    r"attn\.proj|mlp\.(linear_fc2|proj_out)|attention\.projection_layer|self_attn\.projection": "write",
    # Wav2Vec2, HuBERT, Wav2Vec2-BERT and other conformers
    r"linear_[qkv]|intermediate_dense|feed_forward[12]\.linear1": "read",
    r"output_dense|feed_forward[12]\.linear2": "write",
    # FLUX.2 and other diffusion transformers of diffusers; Granite Speech
    r"to_[qkv]|attn\.to_kv|add_[qkv]_proj|to_qkv_mlp_proj|linear_in|ff\.net\.0\.proj": "read",
    r"to_out(\.0)?|to_add_out|linear_out|ff\.net\.2": "write",
    # Routers of mixtures of experts
    r"(mlp|ffn|moe|block_sparse_moe|feed_forward|mixer)\.(gate|router(\.(layer|classifier|gate))?)": "read",
    r"shared_expert_gate": "read",
}
