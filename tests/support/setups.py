"""Set-ups that people train LoRA in, one a row: what StructLoRA must serve, and what it must refuse by name.

`tests/test_setups.py` runs each row; docs/what-runs.md is made from the names (`python docs/what_runs.py`). A new
set-up is a new row. A row names what it does otherwise than the first: a tiny LLaMA, LoRA on three modules, AdamW, no
schedule, a bare loop.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import peft.optimizers
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim import lr_scheduler
from torch.overrides import TorchFunctionMode

from tests.support import jobs, loops
from tests.support.tiny import (
    CLASSIFIER,
    FAMILIES,
    LAYERS,
    VOCABULARY,
    base_model,
    built,
    decoder,
    lora_parameters,
    warm_up,
)

TARGETS = ["q_proj", "v_proj", "o_proj"]
WHOLE = {"semantic_threshold": 0.0}  # all parts, as by default, and semantic edges wherever there may be some
WRITE, BOTH = {**WHOLE, "side": "write"}, {**WHOLE, "side": "both"}
GATES_ALONE = {"coordinator": "none"}
BNB = ("bitsandbytes",)
KEEP = {**WHOLE, "keep": 0.25, "select_at": 10}


@dataclass(frozen=True)
class Setup:
    """One row."""

    name: str  # what docs/what-runs.md calls it
    # The base model, the same one each time, and a batch from its number.
    base: Callable[[], nn.Module] = partial(base_model, "llama")
    batch: Callable[[int], dict] = FAMILIES["llama"].batch
    # Options of `LoraConfig` beside rank, alpha and targets; or what makes the PEFT model of a base model.
    lora: dict = field(default_factory=dict)
    wrap: Callable[[nn.Module], PeftModel] | None = None
    dtype: torch.dtype | None = None  # of base and adapter
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = lambda model: adamw(model)
    schedule: Callable[[torch.optim.Optimizer], object] | None = None
    loop: type = loops.Loop
    trainer: Callable | None = None  # for `loops.InTrainer`, from its output folder and callbacks
    method: dict = field(default_factory=lambda: WHOLE)  # options of StructLoRA
    refused: str | None = None  # pattern of the error that a set-up stops with; None where it is served
    remedy: dict | None = None  # options that the error names, with which the set-up is served
    quiet: str = ""  # pattern of why some modules have no gates
    steps: int = loops.STEPS  # of a run, which is resumed from the state after `half`
    half: int = loops.HALF
    moves_base: bool = False  # the saved adapter belongs on base weights as `wrap` leaves them
    adapter: str = "default"  # name of the adapter that is trained
    tolerance: float = 1e-6  # in logits, between the trained model and its saved adapter in plain PEFT
    needs: tuple[str, ...] = ()  # requirements without which the row is skipped
    slow: bool = False  # takes many seconds

    def model(self) -> PeftModel:
        base = self.base()
        torch.manual_seed(1)
        return self._cast(
            self.wrap(base) if self.wrap else get_peft_model(base, lora(**self.lora), self.adapter)
        )

    def load(self, folder: Path) -> PeftModel:
        """The saved adapter, in plain PEFT."""
        base = self.base()
        torch.manual_seed(1)
        path = folder / ("" if self.adapter == "default" else self.adapter)
        if self.moves_base:
            model = self.wrap(base)
            peft.set_peft_model_state_dict(model, peft.load_peft_weights(path))
            return self._cast(model)
        return self._cast(PeftModel.from_pretrained(base, path, self.adapter))

    def on(self, device: str) -> Setup:
        """The same on another device."""
        return replace(
            self,
            base=lambda: _moved(self.base(), device),
            batch=lambda seed: {name: values.to(device) for name, values in self.batch(seed).items()},
        )

    def _cast(self, model):
        return model if self.dtype is None else model.to(self.dtype)


def _moved(model: nn.Module, device: str) -> nn.Module:
    # Quantised models are made there, and refuse to be moved.
    there = next(model.parameters()).device.type == device
    return model if there else model.to(device)


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options})


def parameters(model) -> list[nn.Parameter]:
    return list(lora_parameters(model).values())


def adamw(model, **options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters(model), **{"lr": 1e-2, **options})


def by(name: str, lr: float | None = 1e-2, module: str = "torch.optim", **options):
    """An optimizer of some module, over what is trainable."""
    return lambda model: getattr(importlib.import_module(module), name)(parameters(model), lr=lr, **options)


def family(name: str, targets: str = "linear") -> dict:
    """A family of `tests/support/tiny.py`, with LoRA on all its linear modules."""
    it = FAMILIES[name]
    return {
        "base": partial(base_model, name),
        "batch": it.batch,
        "lora": {"target_modules": getattr(it, targets)},
    }


def other_family(build: Callable[[], nn.Module], targets, **options) -> dict:
    def base():
        torch.manual_seed(0)
        return build()

    return {"base": base, "lora": {"target_modules": targets, **options}}


def invoking(seed: int) -> dict:
    """A batch with the tokens that switch an aLoRA on."""
    batch = FAMILIES["llama"].batch(seed)
    batch["input_ids"][:, 2:4] = torch.tensor([7, 8])
    return batch


gpt2 = partial(
    built,
    "gpt2",
    **{"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY},
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
)
t5 = partial(
    built,
    "t5",
    transformers.AutoModelForSeq2SeqLM,
    **{"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4, "dropout_rate": 0.0},
    vocab_size=VOCABULARY,
    decoder_start_token_id=0,
)
roberta = partial(built, "roberta", **CLASSIFIER, max_position_embeddings=64, pad_token_id=0)


def llama(**options):
    torch.manual_seed(0)
    return decoder("llama", **options)


class Blocks(nn.Module):
    """A residual stack of one kind of layer."""

    def __init__(self, layer: Callable[[], nn.Module]):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(layer() for _ in range(LAYERS))

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return SimpleNamespace(loss=x.square().mean(), logits=x)


class Between(nn.Module):
    """A layer with a module between the one that reads the residual stream and the one that writes it."""

    def __init__(self):
        super().__init__()
        self.fc1, self.mixing, self.fc2 = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.fc2(torch.tanh(self.mixing(self.fc1(x))))


def blocks(layer: Callable[[], nn.Module], *shape: int, **options) -> dict:
    def batch(seed):
        return {"x": torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))}

    return {
        "base": partial(Blocks, layer),
        "batch": batch,
        "lora": {"target_modules": r"blocks\.\d", **options},
    }


def with_(change: Callable[[PeftModel], None], **options):
    """LoRA, and something done to the model before the optimizer is built."""

    def wrap(base):
        model = get_peft_model(base, lora(**options))
        change(model)
        return model

    return wrap


def freeze(part: str):
    def change(model):
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.requires_grad_(False)

    return change


def eva(base):
    model = get_peft_model(base, lora(init_lora_weights="eva"))
    batches = [FAMILIES["llama"].batch(seed) for seed in range(200, 204)]
    peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return model


def lora_ga(base):
    config = lora(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())

    def step():
        base(**FAMILIES["llama"].batch(200)).loss.backward()

    importlib.import_module("peft.tuners.lora.loraga").preprocess_loraga(base, config, step)
    return get_peft_model(base, config)


def corda(base):
    config = lora(
        init_lora_weights="corda", corda_config=peft.tuners.lora.config.CordaConfig(corda_method="kpm")
    )

    @torch.no_grad()
    def run():
        for seed in range(200, 208):
            base(input_ids=FAMILIES["llama"].batch(seed)["input_ids"][:1])  # PEFT takes a row at a time

    importlib.import_module("peft.tuners.lora.corda").preprocess_corda(base, config, run_model=run)
    return get_peft_model(base, config)


class OnCPU(TorchFunctionMode):
    """What is to go to CUDA stays on the CPU: PEFT's LoftQ computes on accelerators alone (0.21)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def stay(value):
            return "cpu" if value == "cuda" else value

        args = [stay(a) if isinstance(a, str) else a for a in args]
        return function(
            *args, **{name: stay(v) if isinstance(v, str) else v for name, v in (kwargs or {}).items()}
        )


def loftq(base):
    config = lora(init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4))
    with contextlib.nullcontext() if torch.cuda.is_available() else OnCPU():
        return get_peft_model(base, config)


def loaded(base: nn.Module, **options) -> nn.Module:
    """The model as `from_pretrained` quantises or shards it. From no folder, which one of several processes alone would write."""
    return type(base).from_pretrained(None, config=base.config, state_dict=base.state_dict(), **options)


def torchao_int8():
    how = transformers.TorchAoConfig(importlib.import_module("torchao.quantization").Int8WeightOnlyConfig())
    return loaded(llama(), quantization_config=how, dtype=torch.float32, device_map="cpu")


def variant(config: str, option: str, **options):
    return lambda base: get_peft_model(base, lora(**{option: getattr(peft, config)(**options)}))


def second_adapter(model):
    model.add_adapter("other", lora(target_modules=["q_proj"]))
    warm_up(model.base_model.model.model.layers[0])


def quantised(bits: int, device: str = "cpu", storage: torch.dtype = torch.uint8):
    """A base in 4 bits (NF4, constants quantised too, as in the QLoRA paper) or 8, made ready as PEFT's guide says.

    `storage`: what 4-bit weights lie in; FSDP shards those that lie in a floating dtype.
    """
    four = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
        "bnb_4bit_quant_storage": storage,
    }
    how = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **(four if bits == 4 else {}))
    # On CPUs with AVX-512, bitsandbytes cannot lay out rows shorter than a block of 64.
    base = llama(hidden_size=64, intermediate_size=64, num_key_value_heads=4)
    model = loaded(base, quantization_config=how, dtype=torch.float32, device_map=device)
    for module in model.modules():
        # An evaluation would repack the weights into a layout that no gradient passes (bitsandbytes 0.50, AVX512-BF16).
        module.support_avx512bf16_for_cpu = False
    return peft.prepare_model_for_kbit_training(model)


def scheduled(name: str, warmup: int = 2, **options):
    """A schedule of Transformers, by its name in `lr_scheduler_type`."""

    def build(optimizer):
        return transformers.get_scheduler(
            name, optimizer, warmup, loops.STEPS, scheduler_specific_kwargs=options
        )

    return build


def loraplus(model):
    return peft.optimizers.create_loraplus_optimizer(
        model, optimizer_cls=torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0
    )


def lorafa(model):
    return peft.optimizers.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)


def sft_with_lorafa(output, callbacks, **options):
    trainer = jobs.sft(output, callbacks, **options)
    trainer.optimizer = lorafa(trainer.model)
    return trainer


def riemannian(model):
    return peft.optimizers.create_riemannian_optimizer(model, optimizer_cls=torch.optim.AdamW, lr=1e-2)


def two_groups(model, rate_of_A: float = 1e-4):
    of = lambda part: [p for name, p in lora_parameters(model).items() if part in name]  # noqa: E731
    groups = [
        {"params": of("lora_A"), "lr": rate_of_A},
        {"params": of("lora_B"), "lr": 1e-2, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups)


def schedule_free(model):
    optimizer = adamw(model)
    optimizer.param_groups[0]["train_mode"] = False  # the mark of schedulefree's optimizers
    return optimizer


def layer_wise(model):
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # as Trainer's LayerWiseDummyOptimizer


def over_half(model):
    return torch.optim.AdamW(parameters(model)[::2], lr=1e-2)


def of_type(name: str, **options):
    """A PEFT method that is not LoRA."""
    return lambda base: get_peft_model(base, getattr(peft, name)(**options))


def xlora(base):
    base.config.use_cache = False
    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(llama(), lora()).save_pretrained(folder)
        return get_peft_model(
            base, peft.XLoraConfig(hidden_size=32, adapters={"0": folder}, task_type="CAUSAL_LM")
        )


def bd_lora(base):
    blocks_of = peft.BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2)
    return get_peft_model(base, lora(target_modules=["q_proj", "o_proj"], use_bdlora=blocks_of))


MOVED = {"quiet": "init_lora_weights='.*' keeps base weights in the adapter", "tolerance": 1e-5}
MOVES_BASE = {"moves_base": True, **MOVED}
VERA = {"wrap": of_type("VeraConfig", r=4, target_modules=TARGETS), "quiet": "VeRA"}
NO_KEEP = {"method": KEEP, "remedy": {"keep": None, "select_at": 0.5}}
STACKED_EXPERTS = other_family(
    FAMILIES["mixtral"].build, ["q_proj"], target_parameters=FAMILIES["mixtral"].parameters
)
TIED = {
    "base": partial(llama, tie_word_embeddings=True),
    "method": {**WHOLE, "roles": {"lm_head": "read", "embed_tokens": "write"}},
}
TIED_TARGETS = {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}
ADAPTERS = [
    Setup("LoRA"),
    Setup("lora_dropout", lora={"lora_dropout": 0.2}),
    Setup("rsLoRA", lora={"use_rslora": True}),
    Setup("DoRA", lora={"use_dora": True, "lora_dropout": 0.1}),
    Setup("PiSSA", lora={"init_lora_weights": "pissa"}, **MOVED),
    Setup("OLoRA", lora={"init_lora_weights": "olora"}, **MOVED),
    Setup("Gaussian init", lora={"init_lora_weights": "gaussian"}),
    Setup("random init of both factors", lora={"init_lora_weights": False}),
    Setup("orthogonal init", lora={"init_lora_weights": "orthogonal"}),
    Setup("EVA", wrap=eva, slow=True),
    Setup(
        "PiSSA by fast SVD",
        wrap=lambda base: get_peft_model(base, lora(init_lora_weights="pissa_niter_2")),
        **MOVES_BASE,
    ),
    Setup("CorDA", wrap=corda, **MOVES_BASE),
    Setup("LoftQ", wrap=loftq, **MOVES_BASE, needs=("scipy", *BNB), slow=True),
    Setup("LoRA-GA", wrap=lora_ga, **MOVES_BASE, needs=("peft>=0.19",)),
    Setup(
        "MiCA", lora={"init_lora_weights": "mica"}, method={**WHOLE, "side": "read"}, needs=("peft>=0.20",)
    ),
    Setup("KaSA", wrap=variant("KasaConfig", "kasa_config"), tolerance=1e-5, needs=("peft>=0.21",)),
    Setup(
        "VeLoRA",
        wrap=variant("VeloraConfig", "velora_config", num_groups=4),
        quiet="VeLoRA.*",
        needs=("peft>=0.21",),
    ),
    Setup("warm starts", wrap=with_(warm_up)),
    Setup("lora_bias", lora={"lora_bias": True}),
    Setup(
        "biases of the base",
        needs=("peft>=0.19",),
        **{**family("bert"), "lora": {"target_modules": ["query", "value"], "bias": "lora_only"}},
    ),
    Setup(
        "rank_pattern and alpha_pattern",
        lora={"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.*.v_proj": 3}},
    ),
    Setup("a rank per layer", lora={"rank_pattern": {r"layers\.0\..*": 2}}),
    Setup("rank 1", lora={"r": 1}),
    Setup("layers_to_transform", lora={"layers_to_transform": [0, 2]}),
    Setup("one layer", lora={"layers_to_transform": [1]}, method=GATES_ALONE),
    Setup("exclude_modules", lora={"exclude_modules": ["o_proj"]}),
    Setup("target_modules='all-linear'", lora={"target_modules": "all-linear"}),
    Setup("target_modules by pattern", lora={"target_modules": r".*\.(q|o)_proj"}),
    Setup("modules_to_save", lora={"modules_to_save": ["lm_head"]}),
    Setup("trainable_token_indices", lora={"trainable_token_indices": [4, 5, 6]}),
    Setup("layer_replication", lora={"layer_replication": [[0, 2], [1, 3]]}),
    Setup(
        "embeddings",
        lora={"target_modules": ["embed_tokens", "q_proj"]},
        method={**WHOLE, "roles": {"embed_tokens": "write"}},
        quiet="embeddings",
    ),
    Setup(
        "lm_head",
        lora={"target_modules": ["lm_head", "q_proj"]},
        method={**WHOLE, "roles": {"lm_head": "read"}},
    ),
    Setup("tied embeddings with both as targets", **TIED, lora=TIED_TARGETS, quiet="embeddings"),
    Setup("Conv2d", **blocks(lambda: nn.Conv2d(8, 8, 3, padding=1), 8, 6, 6), method=BOTH),
    Setup("Conv1d", **blocks(lambda: nn.Conv1d(8, 8, 3, padding=1), 8, 6), method=BOTH),
    Setup("Conv3d", **blocks(lambda: nn.Conv3d(4, 4, 3, padding=1), 4, 3, 3, 3), method=BOTH),
    Setup(
        "modules of unknown role beside known ones",
        **blocks(Between, 4, 8, target_modules=["fc1", "mixing", "fc2"]),
    ),
    Setup("several adapters with one trained", wrap=with_(second_adapter)),
    Setup("an adapter of another name", adapter="mine"),
    Setup("lora_A frozen", wrap=with_(freeze("lora_A")), method=WRITE),
    Setup("frozen layers", wrap=with_(freeze("layers.0"))),
    Setup("aLoRA", lora={"alora_invocation_tokens": [7, 8], "task_type": "CAUSAL_LM"}, batch=invoking),
    Setup("MoE experts by target_parameters", **STACKED_EXPERTS, quiet="experts in one parameter"),
    Setup(
        "MoE experts that are modules",
        **other_family(FAMILIES["mixture"].build, ["q_proj", "up_proj", "down_proj"]),
    ),
    Setup("VeRA", **VERA),
    Setup("directions selected in training", method=KEEP, steps=14, half=7),
    Setup("resumed after the selection", method={**KEEP, "coordinator": "gat"}, steps=14, half=12),
    Setup(
        "directions selected without a coordinator",
        method={**GATES_ALONE, "keep": "90%", "select_at": 10},
        steps=14,
    ),
    Setup(
        "directions of VeRA selected in training",
        **{**VERA, **NO_KEEP},
        refused="keep=0.25 and no gates to select by .VeRA",
    ),
    Setup(
        "directions of PiSSA selected in training",
        lora={"init_lora_weights": "pissa"},
        **{**MOVED, **NO_KEEP},
        refused="init_lora_weights='pissa'",
    ),
    Setup(
        "MoE layers by 'all-linear'",
        **other_family(FAMILIES["qwen3_moe"].build, "all-linear"),
        quiet="(experts in one parameter)?",  # which PEFT 0.18 leaves out
    ),
]
# Starts that take a part out of the base model: PEFT does not take these again when it loads an adapter, and takes those.
# (LoftQ, which it takes again too, leaves a quantised base, and its adapter cannot be converted to one of the original.)
NOT_REPEATED = ["LoRA-GA", "CorDA", "PiSSA by fast SVD"]
REPEATED = ["PiSSA", "OLoRA"]

MODELS = [
    Setup("LLaMA", **family("llama")),
    Setup("Qwen 3", **family("qwen3")),
    Setup("Gemma 3", **family("gemma3")),
    Setup("LLaVA", **family("llava", "attention")),
    Setup("BERT", **family("bert")),
    Setup("RoBERTa", **{**other_family(roberta, FAMILIES["bert"].linear), "batch": FAMILIES["bert"].batch}),
    Setup("ViT", **family("vit")),
    Setup("GPT-2", **other_family(gpt2, ["c_attn", "c_proj"], fan_in_fan_out=True)),
    Setup("T5", **other_family(t5, ["q", "v", "o"])),
]

QLORA = {"base": partial(quantised, 4), "needs": BNB}
PRECISIONS = [
    Setup("bf16", dtype=torch.bfloat16),
    Setup("VeRA in bf16", **VERA, dtype=torch.bfloat16),
    Setup("bf16 base under an fp32 adapter", base=partial(base_model, "llama", torch.bfloat16)),
    Setup("4-bit base (QLoRA)", **QLORA),
    Setup("8-bit base", base=partial(quantised, 8), needs=BNB),
    Setup("8-bit base by torchao", base=torchao_int8, tolerance=1e-5, needs=("torchao",)),
    Setup("VeRA on a 4-bit base", **VERA, **QLORA, slow=True),
    Setup("DoRA on a 4-bit base", **QLORA, lora={"use_dora": True}, slow=True),
    Setup("LoRA-FA on a 4-bit base", **QLORA, optimizer=lorafa, method=WRITE, slow=True),
]

OPTIMIZERS = [
    Setup("AdamW with weight decay", optimizer=partial(adamw, weight_decay=0.5)),
    Setup("fused AdamW", optimizer=partial(adamw, fused=True)),
    Setup("foreach AdamW", optimizer=partial(adamw, foreach=True)),
    Setup("AMSGrad", optimizer=partial(adamw, amsgrad=True)),
    Setup("Adam", optimizer=by("Adam", weight_decay=0.1)),
    Setup("NAdam", optimizer=by("NAdam")),
    Setup("RAdam", optimizer=by("RAdam", 0.3)),
    Setup("Adamax", optimizer=by("Adamax")),
    Setup("Adagrad", optimizer=by("Adagrad")),
    Setup("Adadelta", optimizer=by("Adadelta", 1.0)),
    Setup("ASGD", optimizer=by("ASGD", 1.0)),
    Setup("Rprop", optimizer=by("Rprop")),
    Setup("RMSprop", optimizer=by("RMSprop", 1e-3)),
    Setup("SGD", optimizer=by("SGD", 1.0)),
    Setup("SGD with momentum", optimizer=by("SGD", 0.3, momentum=0.9, nesterov=True)),
    Setup("maximize", optimizer=by("SGD", 0.1, maximize=True)),
    Setup("Adafactor", optimizer=by("Adafactor")),
    Setup(
        "Adafactor of Transformers",
        optimizer=by("Adafactor", module="transformers", relative_step=False, scale_parameter=False),
    ),
    Setup(
        "Adafactor with relative_step",
        optimizer=by("Adafactor", None, module="transformers", relative_step=True, scale_parameter=True),
    ),
    Setup("Muon", optimizer=by("Muon"), needs=("torch>=2.9",)),
    Setup("LBFGS with `max_iter=1`", optimizer=by("LBFGS", 1.0, max_iter=1), loop=loops.WithClosure),
    Setup("8-bit AdamW", optimizer=by("AdamW8bit", module="bitsandbytes.optim", min_8bit_size=16), needs=BNB),
    Setup("paged AdamW", optimizer=by("PagedAdamW32bit", module="bitsandbytes.optim"), needs=BNB),
    Setup("Lion", optimizer=by("Lion", 1e-3, module="bitsandbytes.optim"), needs=BNB),
    Setup("LoRA+", optimizer=loraplus),
    Setup("LoRA-FA", optimizer=lorafa, method=WRITE),
    Setup("Riemannian", optimizer=riemannian, needs=("peft>=0.19",)),
    Setup("groups of unlike rates", optimizer=two_groups),
]

SCHEDULES = [
    *(
        Setup(name, schedule=scheduled(name, **options))
        for name, options in {
            "linear": {},
            "cosine": {},
            "constant": {},
            "constant_with_warmup": {},
            "inverse_sqrt": {},
            "cosine_with_restarts": {"num_cycles": 2},
            "polynomial": {"power": 2.0},
            "reduce_lr_on_plateau": {"patience": 0, "factor": 0.3, "threshold": 10.0},
            "cosine_with_min_lr": {"min_lr_rate": 0.1},
            "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
            "warmup_stable_decay": {"num_decay_steps": 2, "num_stable_steps": 2},
        }.items()
    ),
    Setup(
        "greedy",
        schedule=scheduled("greedy", patience=0, min_lr=1e-3, warmup=0),
        needs=("transformers>=5.20",),
    ),
    Setup("OneCycleLR", schedule=lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=loops.STEPS)),
    Setup(
        "CyclicLR",
        schedule=lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=2, cycle_momentum=False),
    ),
    Setup(
        "CosineAnnealingWarmRestarts", schedule=lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2)
    ),
    Setup("StepLR", schedule=lambda o: lr_scheduler.StepLR(o, 2, 0.5)),
    Setup(
        "SequentialLR",
        schedule=lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.8)], [2]
        ),
    ),
    Setup(
        "LambdaLR on a base rate of 1",
        optimizer=partial(adamw, lr=1.0),
        schedule=lambda o: lr_scheduler.LambdaLR(o, lambda i: 1e-2 * min(1, (i + 1) / 3)),
    ),
    Setup("a rate set by hand", optimizer=partial(adamw, lr=0.0), loop=loops.ByHand),
]

LOOPS = [
    Setup("gradient accumulation", loop=loops.Accumulating, lora={"lora_dropout": 0.1}),
    Setup("base model left in eval() by from_pretrained", loop=loops.AsLoaded),
    Setup("zero_grad(set_to_none=False)", loop=loops.KeptGradients),
    Setup("clipping by norm", loop=loops.Clipping),
    Setup("bf16 autocast", loop=loops.Autocast),
    Setup("bf16 autocast around the optimizer's step too", loop=loops.WholeAutocast),
    Setup("torch.set_default_dtype(bfloat16)", loop=loops.DefaultDtype),
    Setup("torch.set_default_dtype(float64)", loop=loops.DefaultDouble),
    Setup("the PEFT model inside another module", loop=loops.Inside),
    Setup("GradScaler", loop=loops.Scaling),
    Setup("step(closure)", loop=loops.WithClosure),
    Setup("Accelerate", loop=loops.Accelerated),
    Setup("accelerator.save_state and load_state", loop=loops.AcceleratedState),
    Setup("gradient checkpointing", loop=loops.Checkpointing, lora={"lora_dropout": 0.1}),
    Setup(
        "gradient checkpointing, base model left in eval()",
        loop=loops.CheckpointingAsLoaded,
        lora={"lora_dropout": 0.1},
    ),
    Setup("reentrant checkpointing", loop=loops.ReentrantCheckpointing, lora={"lora_dropout": 0.1}),
    Setup("torch.compile", loop=loops.Compiled, slow=True),
    Setup("torch.compile of the optimizer's step", loop=loops.CompiledStep),
    Setup("SAM", loop=loops.SharpnessAware),
    Setup("moving averages swapped in for evaluation", loop=loops.Swapping),
    Setup("deepcopy, torch.save and AveragedModel of the model", loop=loops.Copying),
    Setup("reference logits under disable_adapter()", loop=loops.ReferencePass),
    Setup("freezing layers for a while", loop=loops.Freezing),
]

ADALORA = {"target_modules": TARGETS, "total_step": 20, "tinit": 1, "tfinal": 2}
REFUSED = [
    # Each of them: `tests/test_attachment.py`.
    Setup(
        "AdaLoRA and every other PEFT type but LoRA and VeRA",
        wrap=of_type("AdaLoraConfig", **ADALORA),
        refused="PEFT type ADALORA.*`LoraConfig`",
    ),
    Setup(
        "LoRA-FA without side='write'",
        optimizer=lorafa,
        refused="lora_A of '.*q_proj' frozen.*`side='write'`",
        remedy={"side": "write"},
    ),
    Setup(
        "ensure_weight_tying with both as targets",
        **TIED,
        lora={**TIED_TARGETS, "ensure_weight_tying": True},
        refused="embed_tokens' and 'lm_head' in one memory.*`ensure_weight_tying=False`",
        needs=("peft>=0.19",),
    ),
    Setup("XLoRA", wrap=xlora, refused="an X-LoRA model.*`LoraConfig`"),
    Setup("BD-LoRA", wrap=bd_lora, refused="`use_bdlora`.*remove", needs=("peft>=0.19",)),
    Setup(
        "grouped Conv2d",
        **blocks(lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2), 8, 6, 6),
        refused="'blocks.0'.*as a grouped convolution has.*`target_modules`",
    ),
    Setup(
        "full fine-tuning",
        wrap=lambda base: base,
        refused="type LlamaForCausalLM.*a PEFT model with a LoRA adapter",
    ),
    Setup("schedule-free optimizers", optimizer=schedule_free, refused="schedule-free optimizer"),
    Setup("layer-wise optimizers", optimizer=layer_wise, refused="missing from the optimizer.*layer-wise"),
    Setup("LoRA spread over two optimizers", optimizer=over_half, refused="missing from the optimizer"),
    Setup(
        "two adapters active at once, without `adapter_name`",
        wrap=with_(lambda model: (second_adapter(model), model.base_model.set_adapter(["default", "other"]))),
        refused="2 active adapters.*`adapter_name`",
    ),
]


def in_trainer(name: str, job: Callable, *rows: dict, slow: bool = True, **options):
    """A row for a job of `tests/support/jobs.py`, with its training arguments; `rows`: what else the row says."""
    more = {name: value for row in rows for name, value in row.items()}
    return Setup(name, loop=loops.InTrainer, trainer=partial(job, **options), slow=slow, **more)


BERT = {"base": partial(base_model, "bert"), "batch": FAMILIES["bert"].batch}
REWARD = {
    "base": jobs.reward_model,
    "batch": lambda seed: {"input_ids": FAMILIES["llama"].batch(seed)["input_ids"]},
}
ON_PLATEAU = {
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "lr_scheduler_kwargs": {"patience": 0, "factor": 0.3, "threshold": 10.0, "threshold_mode": "abs"},
    "eval_strategy": "steps",
    "eval_steps": 1,
    "metric_for_best_model": "eval_loss",
}

NO_DROPOUT = {"quiet": r"\w+Trainer switches dropout off"}
OWN_SAMPLES = {"quiet": r"\w+Trainer trains on samples of its own policy"}

COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
PACKED = {"packing": True, "row_count": 384}
SINCE_TRL_1 = {"needs": ("trl>=1.0",), **NO_DROPOUT}

TRAINERS = [
    in_trainer("transformers.Trainer", jobs.plain, BERT, slow=False),
    in_trainer("Trainer with reduce_lr_on_plateau", jobs.plain, BERT, slow=False, **ON_PLATEAU),
    in_trainer("Trainer with Adafactor", jobs.plain, BERT, optim="adafactor", lr_scheduler_type="cosine"),
    in_trainer("Trainer with torch_compile", jobs.plain, BERT, **COMPILED),
    in_trainer("TRL's SFT", jobs.sft, slow=False, gradient_accumulation_steps=2),
    in_trainer("SFT with packing", jobs.sft, **PACKED),
    in_trainer("SFT with wrapped packing", jobs.sft, **PACKED, packing_strategy="wrapped"),
    in_trainer("SFT without padding", jobs.sft, padding_free=True, max_length=None),
    in_trainer("SFT with packing and without padding", jobs.sft, slow=False, **PACKED, padding_free=True),
    in_trainer(
        "SFT with gradient checkpointing", jobs.sft, gradient_checkpointing=True, lora={"lora_dropout": 0.1}
    ),
    in_trainer("SFT with NEFTune", jobs.sft, neftune_noise_alpha=5.0),
    in_trainer("SFT with VeRA", jobs.sft, {"quiet": "VeRA"}, vera={"r": 4}),
    in_trainer("SFT with LoRA-FA", sft_with_lorafa, {"method": WRITE}),
    in_trainer("DPO", jobs.JOBS["dpo"], NO_DROPOUT),
    in_trainer("KTO", jobs.JOBS["kto"], NO_DROPOUT),
    in_trainer("ORPO", jobs.of_trl("ORPO", jobs.pairs, experimental=True), SINCE_TRL_1),
    in_trainer("CPO", jobs.of_trl("CPO", jobs.pairs, experimental=True), SINCE_TRL_1),
    in_trainer("Reward", jobs.JOBS["reward"], REWARD, NO_DROPOUT),
    in_trainer("GRPO", jobs.JOBS["grpo"], OWN_SAMPLES),
    in_trainer("GRPO with several updates per generation", jobs.JOBS["grpo"], OWN_SAMPLES, num_iterations=3),
    in_trainer("RLOO", jobs.JOBS["rloo"], OWN_SAMPLES),
]

SETUPS: dict[str, list[Setup]] = {
    "Adapters": ADAPTERS,
    "Models": MODELS,
    "Precisions": PRECISIONS,
    "Optimizers": OPTIMIZERS,
    "Schedules": SCHEDULES,
    "Loops": LOOPS,
    "Trainers": TRAINERS,
    "Stop with an error": REFUSED,
}
