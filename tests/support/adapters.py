"""Finished adapters to look into: runs of the command line, and adapters of other models out of a bare loop."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from structlora_trl import attach, save_state
from structlora_trl.cli import main
from tests.support import tiny
from tests.support.cli_runs import SFT, command_line
from tests.support.data import save_base, texts, write_rows

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KINDS = [f"model.layers.*.self_attn.{leaf}_proj" for leaf in "qvo"]
DEPTHS, RANK = 3, 4
RUNS = {
    "plain": {},
    "rslora": {"use_rslora": "true"},
    "dora": {"use_dora": "true"},
}
STEPS, HALF = (
    12,
    6,
)  # of a run of the command line, and of its first checkpoint; directions are selected at 10


EXPERTS = {"target_parameters": tiny.FAMILIES["mixtral"].parameters}
ATTENTION = {"target_modules": tiny.FAMILIES["llama"].attention}


def train(folder: Path, **options) -> Path:
    """A run that has closed half of its directions; its output folder."""
    save_base(folder / "base")
    write_rows(folder / "data.jsonl", texts())
    paths = {"model_name_or_path": str(folder / "base"), "dataset_name": str(folder / "data.jsonl")}
    settings = {
        "output_dir": str(folder / "out"),
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": HALF,
        "structlora.keep": 0.5,
        "structlora.select_at": 10,
    }
    assert main(["sft", *command_line({**SFT, **paths, **settings, **options})]) == 0
    return folder / "out"


def on_base(adapter: Path, base: Path):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def only_adapter(run: Path, folder: Path) -> None:
    """Copy an adapter without what else is in its folder."""
    folder.mkdir(parents=True)
    for name in (ADAPTER, CONFIG):
        shutil.copy(run / name, folder)


def take_steps(model, optimizer, batch, steps: int = 3) -> None:
    model.train()
    for step in range(steps):
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def peft_run(model: PreTrainedModel, out: Path, batch, **lora) -> Path:
    """An adapter that PEFT alone has trained; its folder."""
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**{"r": RANK, "lora_alpha": 2 * RANK, **lora}))
    tiny.warm_up(model)
    take_steps(model, tiny.adamw(model), batch)
    model.save_pretrained(out)
    return out


def as_it_is(build):
    """How to load a model that is saved as it was built, from a family's name or a callable."""

    def load(folder):
        model = tiny.base_model(build) if isinstance(build, str) else build()
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder)

    return load


def bare_run(model: PreTrainedModel, out: Path, batch, method: dict | None = None, **lora) -> Path:
    """An adapter of any model, half of whose directions are closed, as `keep` closes them.

    Args:
        model (`PreTrainedModel`): loaded from a folder.
        out (`Path`): folder of the adapter and its state.
        batch (callable): number of a step -> its batch.
        method (`dict`, *optional*): StructLoRA's options.
        **lora: of the `LoraConfig`.
    """
    model = get_peft_model(model, LoraConfig(**{"r": RANK, "lora_alpha": 2 * RANK, **lora}))
    optimizer = tiny.adamw(model)
    closes = lora.get("init_lora_weights", True) is True  # others have no directions to close
    is_gated = lora.get("target_modules", True)  # experts in one parameter, alone, have no gates to select by
    keep = {"keep": 0.5, "select_at": 100} if closes and is_gated else {}
    runtime = attach(model, optimizer, {"coordinator": "none", **keep, **(method or {})}, **tiny.DATA)
    take_steps(model, optimizer, batch)
    generator = torch.Generator().manual_seed(4)
    for m in runtime.maps if keep else ():
        m.selection.close(torch.rand(m.selection.kept.shape, generator=generator) < 0.5)
    for name, parameter in model.named_parameters() if closes and not keep else ():
        if "lora_B" in name:
            parameter.data *= torch.rand(parameter.shape[1], generator=generator) < 0.5
    for side in runtime.sides:  # what the mask leaves
        side.write(lambda parameter: False)
    model.save_pretrained(out)
    save_state(runtime, out)
    return out


def llama_run(folder: Path, config: dict | None = None, change=None, **lora) -> Path:
    """`bare_run` of a tiny LLaMA with settings of its own, in "out" beside its "base".

    Args:
        config (`dict`, *optional*): options of the `LlamaConfig`.
        change (callable, *optional*): done to the model before training.
    """
    torch.manual_seed(0)
    settings = LlamaConfig(**{**tiny.base_model("llama").config.to_dict(), **(config or {})})
    model = as_it_is(lambda: LlamaForCausalLM(settings))(folder / "base")
    model = change(model) if change else model
    return bare_run(model, folder / "out", tiny.FAMILIES["llama"].batch, **{**ATTENTION, **lora})
