"""Tiny random models of every family, built offline, with a batch and a loss for each."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import partial

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, VeraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import LlamaMLP

DATA = {"examples": 64, "batch_size": 8}  # of a loop of one's own, for `attach`
WORDS = 60
VOCABULARY = WORDS + 4  # and four special tokens
LAYERS = 3
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
_DECODER = {**_SIZES, "vocab_size": VOCABULARY, "num_key_value_heads": 2, "max_position_embeddings": 64}
_VISION = {**_SIZES, "image_size": 16, "patch_size": 8}
_IMAGE_TOKEN, _IMAGE_TOKENS = 3, 4
_LABELS = 3

EXPERTS = 4
_EXPERT_PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
_ATTENTION_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]
_DECODER_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", "<image>", *(f"w{i}" for i in range(WORDS))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return fast


def sentence(index: int, length: int = 8) -> str:
    return " ".join(f"w{(7 * index + 3 * j) % WORDS}" for j in range(length))


def _tokens(seed: int, batch: int = 2, length: int = 10) -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def _pixels(seed: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def _text_batch(seed: int) -> dict:
    tokens = _tokens(seed)
    return {"input_ids": tokens, "labels": tokens}


def _class_labels(seed: int) -> torch.Tensor:
    return torch.randint(0, _LABELS, (2,), generator=torch.Generator().manual_seed(seed))


def _llava_batch(seed: int) -> dict:
    tokens = _tokens(seed)
    tokens[:, :_IMAGE_TOKENS] = _IMAGE_TOKEN
    return {"input_ids": tokens, "labels": tokens, "pixel_values": _pixels(seed)}


def built(kind: str, auto=AutoModelForCausalLM, **sizes) -> torch.nn.Module:
    """A random model of a type of Transformers."""
    return auto.from_config(AutoConfig.for_model(kind, **sizes))


decoder = partial(built, **_DECODER)


class _Mixture(torch.nn.Module):
    """Experts that are modules of their own, as transformers before 5 and models with code of their own have them; all of them
    take part, as the router weighs them.
    """

    def __init__(self, config):
        super().__init__()
        self.router = torch.nn.Linear(config.hidden_size, EXPERTS, bias=False)
        self.experts = torch.nn.ModuleList(LlamaMLP(config) for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.router(x).softmax(-1).unbind(-1)
        return sum(w[..., None] * expert(x) for w, expert in zip(weights, self.experts, strict=True))


def _mixture() -> torch.nn.Module:
    model = decoder("llama")
    for layer in model.model.layers:
        layer.mlp = _Mixture(model.config)
    return model


@dataclass
class Family:
    """How to build a family's tiny model and feed it."""

    build: callable
    batch: callable
    attention: list[str]  # LoRA targets of the paper's default
    linear: list[str]  # all linear modules
    # LoRA's `target_parameters`; PEFT knows no dropout for them.
    parameters: list[str] = field(default_factory=list)


_QV = ["q_proj", "v_proj"]
_WITH_ROUTER = [*_ATTENTION_MODULES, "mlp.gate"]
_QWEN3_MOE = {"moe_intermediate_size": 16, "num_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 8}
_BERT_MODULES = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
_LLAVA_MODULES = [*_DECODER_MODULES, "out_proj", "fc1", "fc2", "linear_1", "linear_2"]
_LLAVA = {
    "vision_config": {"model_type": "clip_vision_model", **_VISION},
    "text_config": {"model_type": "llama", **_DECODER},
    "image_token_index": _IMAGE_TOKEN,
    "vision_feature_layer": -1,
}
CLASSIFIER = {
    "auto": AutoModelForSequenceClassification,
    **_SIZES,
    "vocab_size": VOCABULARY,
    "num_labels": _LABELS,
}
FAMILIES = {
    "llama": Family(partial(decoder, "llama"), _text_batch, _QV, _DECODER_MODULES),
    "qwen3": Family(partial(decoder, "qwen3", head_dim=8), _text_batch, _QV, _DECODER_MODULES),
    "gemma3": Family(
        partial(decoder, "gemma3_text", head_dim=8, sliding_window=4), _text_batch, _QV, _DECODER_MODULES
    ),
    "mixtral": Family(
        partial(decoder, "mixtral", num_local_experts=EXPERTS),
        _text_batch,
        ["q_proj"],
        _WITH_ROUTER,
        _EXPERT_PARAMETERS,
    ),
    "qwen3_moe": Family(
        partial(decoder, "qwen3_moe", **_QWEN3_MOE), _text_batch, ["q_proj"], _WITH_ROUTER, _EXPERT_PARAMETERS
    ),
    "mixture": Family(_mixture, _text_batch, ["q_proj", "up_proj"], [*_DECODER_MODULES, "router"]),
    "llava": Family(
        partial(built, "llava", AutoModelForImageTextToText, **_LLAVA), _llava_batch, _QV, _LLAVA_MODULES
    ),
    "bert": Family(
        partial(built, "bert", **CLASSIFIER),
        lambda seed: {"input_ids": _tokens(seed), "labels": _class_labels(seed)},
        ["query", "value"],
        _BERT_MODULES,
    ),
    "vit": Family(
        partial(built, "vit", AutoModelForImageClassification, **_VISION, num_labels=_LABELS),
        lambda seed: {"pixel_values": _pixels(seed), "labels": _class_labels(seed)},
        _QV,
        ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
    ),
}

# Names of earlier versions.
if "q_proj" not in str([name for name, _ in FAMILIES["vit"].build().named_modules()]):
    FAMILIES["vit"].attention = ["query", "value"]
    FAMILIES["vit"].linear = FAMILIES["bert"].linear

INITS = {
    "fresh": {},
    "warm": {},
    "pissa": {"init_lora_weights": "pissa"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "vera": {},
}


MIXTURES = ("mixtral", "qwen3_moe")  # of experts


def base_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    if family in MIXTURES and Version(peft.__version__) < Version("0.19"):
        pytest.skip(f"PEFT {peft.__version__} adapts neither routers nor two parameters of the experts")
    torch.manual_seed(seed)
    return FAMILIES[family].build().to(dtype)


def peft_model(
    family: str = "llama",
    init: str = "fresh",
    targets: list[str] | None = None,
    rank: int = 4,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    **options,
) -> torch.nn.Module:
    """A tiny model with a LoRA adapter, or VeRA's. Adapter weights are in `dtype` too."""
    parameters = FAMILIES[family].parameters
    if init == "vera":
        targets = targets or FAMILIES[family].attention
        config = VeraConfig(r=rank, vera_dropout=dropout, target_modules=targets, **options)
        model = get_peft_model(base_model(family, dtype), config, autocast_adapter_dtype=False).to(dtype)
        warm_up(model)  # where λ_b is zero, λ_d has no gradient
        return model
    config = LoraConfig(
        r=rank,
        lora_alpha=options.pop("lora_alpha", 2 * rank),
        lora_dropout=0.0 if parameters else dropout,
        target_modules=targets or FAMILIES[family].attention,
        **{**({"target_parameters": parameters} if parameters else {}), **INITS[init], **options},
    )
    base = base_model(family, torch.float32 if init == "pissa" else dtype)
    torch.manual_seed(1)
    model = get_peft_model(base, config, autocast_adapter_dtype=False).to(dtype)
    if init == "warm":
        warm_up(model)
    return model


@torch.no_grad()
def warm_up(model: torch.nn.Module, scale: float = 0.05) -> None:
    """Give lora_B (of VeRA λ_b) values, as if the adapter had been trained before."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "vera_lambda_b" in name:
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def lora_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the adapter's weights, as they stand."""
    return {name: p.detach().clone() for name, p in lora_parameters(model).items()}


def tensors_of(runtime) -> dict[str, torch.Tensor]:
    """The state without its header, where options and counts stand."""
    return {name: value for name, value in runtime.state_dict().items() if name != "header"}


def differing(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Names that one of the two lacks, or whose tensors are not the same bit for bit."""
    return sorted(left.keys() ^ right.keys()) + [
        name for name in left.keys() & right.keys() if not torch.equal(left[name], right[name])
    ]


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert differing(left, right) == []


def batch_of(model: torch.nn.Module, family: str, seed: int) -> dict:
    """A batch where the model is."""
    device = next(model.parameters()).device
    return {name: values.to(device) for name, values in FAMILIES[family].batch(seed).items()}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    """torch's default dtype, as a script sets it at its top."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def casting(model: torch.nn.Module, autocast: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Autocast to a dtype, or nothing."""
    if autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(next(model.parameters()).device.type, autocast)


def loss_of(
    model: torch.nn.Module, family: str, seed: int, autocast: torch.dtype | None = None
) -> torch.Tensor:
    with casting(model, autocast):
        return model(**batch_of(model, family, seed)).loss


@torch.no_grad()
def logits_of(
    model: torch.nn.Module, family: str, seed: int = 99, autocast: torch.dtype | None = None
) -> torch.Tensor:
    model.eval()
    with casting(model, autocast):
        logits = model(**batch_of(model, family, seed)).logits
    model.train()
    return logits.float()


def step_with(optimizer, scaler: torch.amp.GradScaler | None) -> None:
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def train(
    model,
    family: str,
    optimizer,
    steps: int,
    first: int = 0,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> list[float]:
    """A bare loop: one batch a step, told apart by its number."""
    model.train()
    losses = []
    for step in range(first, first + steps):
        torch.manual_seed(step)  # dropout and gates draw from it
        loss = loss_of(model, family, step, autocast)
        (loss if scaler is None else scaler.scale(loss)).backward()
        step_with(optimizer, scaler)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model, lr: float = 1e-2) -> torch.optim.AdamW:
    return torch.optim.AdamW(lora_parameters(model).values(), lr=lr)


def attached(model=None, optimizer=adamw, **options):
    """A model (a tiny LLaMA under LoRA by default), its optimizer, and StructLoRA's runtime on both."""
    from structlora_trl import attach  # here, since tests without the package use the rest of this file

    model = peft_model() if model is None else model
    optimizer = optimizer(model)
    return model, optimizer, attach(model, optimizer, options, **DATA)


def standing(runtime) -> list:
    """The factors that stand in the model, one per kind, whole and fp32, of a run that is detached too."""
    from structlora_trl.engines.base import Layout

    runtime._layouts = runtime._layouts or [
        {side: Layout(runtime.engine, kind, side) for side in kind.sides} for kind in runtime.kinds
    ]
    return list(runtime._factors())


def latents_of(runtime) -> list:
    """What stands less its offset, one per kind, whole and fp32."""
    found = standing(runtime)
    for side in runtime.sides:
        at = runtime.maps.index(side.map)
        found[at] = found[at]._replace(**{side.side: side.layout.whole(side.layout.standing() - side.offset)})
    return found


def evaluation_factors(runtime) -> list:
    """What each kind's map makes of its latents, one per kind, whole and fp32."""
    from structlora_trl.map_context import map_context

    with map_context(runtime.device), torch.no_grad():
        return [
            f._replace(A=m("A", f.A), B=m("B", f.B))
            for m, f in zip(runtime.maps, latents_of(runtime), strict=True)
        ]


def trained(steps: int = 3, optimizer=adamw, dtype: torch.dtype = torch.float32):
    """`attached` after some steps, with LoRA on all linear modules."""
    model = peft_model(targets=FAMILIES["llama"].linear, dtype=dtype)
    model, optimizer, runtime = attached(model, optimizer)
    train(model, "llama", optimizer, steps)
    return model, optimizer, runtime
