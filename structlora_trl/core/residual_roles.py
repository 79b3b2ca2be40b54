"""Which LoRA modules read the residual stream of a transformer, and which write it, by the end of their names.

Only the residual stream is one space at all depths: modules that read it share their input side, modules that write it
their output side. Patterns are as in PEFT's `rank_pattern`; `StructLoRAConfig.roles` adds to them.
"""

RESIDUAL_ROLES = {
    # LLaMA, Mistral, Qwen, Gemma, Phi, CLIP, SigLIP, ViT
    r"q_proj|k_proj|v_proj|qkv_proj|gate_proj|up_proj|gate_up_proj|fc1": "read",
    r"o_proj|out_proj|down_proj|fc2": "write",
    # BERT, RoBERTa, ViT before transformers 5
    r"query|key|value|intermediate\.dense": "read",
    r"output\.dense": "write",
    # DeBERTa, DistilBERT
    r"query_proj|key_proj|value_proj|q_lin|k_lin|v_lin|lin1": "read",
    r"out_lin|lin2": "write",
    # Falcon, BLOOM, GPT-NeoX, MPT, GPT-2
    r"query_key_value|dense_h_to_4h|Wqkv|c_attn|c_fc": "read",
    r"dense_4h_to_h|(self_)?attention\.dense|c_proj": "write",
    # T5, Mixtral, DeepSeek
    r"q|k|v|wi|wi_0|wi_1|w1|w3|q_a_proj|kv_a_proj_with_mqa": "read",
    r"o|wo|w2": "write",
    # FLUX.2 and other diffusion transformers of diffusers
    r"to_[qkv]|add_[qkv]_proj|to_qkv_mlp_proj|linear_in|ff\.net\.0\.proj": "read",
    r"to_out(\.0)?|to_add_out|linear_out|ff\.net\.2": "write",
    # Routers of mixtures of experts
    r"(mlp|moe|block_sparse_moe|feed_forward)\.(gate|router)|shared_expert_gate": "read",
}
