"""Axolotl's fused LoRA kernels on a LLaMA: its autograd functions in the place of PEFT's forwards."""

from __future__ import annotations

from types import MethodType

from axolotl.kernels.lora import apply_lora_mlp_swiglu, apply_lora_o, apply_lora_qkv


def patch(model) -> int:
    """Route every layer of a PEFT model through the kernels; how many layers."""
    layers = model.get_base_model().model.layers
    for layer in layers:
        layer.mlp.forward = MethodType(apply_lora_mlp_swiglu, layer.mlp)
        _patch_attention(layer.self_attn)
    return len(layers)


def _patch_attention(attention) -> None:
    """One call makes queries, keys and values. The attention asks for them in that order, of the same input."""
    waiting = {}

    def project(name: str, hidden):
        if name == "q_proj":
            made = apply_lora_qkv(attention, hidden, inplace=False)
            waiting.update(zip(("q_proj", "k_proj", "v_proj"), made, strict=True))
        return waiting.pop(name)

    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(attention, name).forward = lambda hidden, name=name: project(name, hidden)
    attention.o_proj.forward = lambda hidden: apply_lora_o(attention, hidden)
