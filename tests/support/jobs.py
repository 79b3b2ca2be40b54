"""Small training jobs for every trainer the callback serves."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, TaskType, VeraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from tests.support.data import better_and_worse, distinct_words, labelled, prompts
from tests.support.device import ON_GPU
from tests.support.tiny import FAMILIES, base_model, sentence, tokenizer

ROWS = 48
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj"]}

_ARGUMENTS = {
    "use_cpu": not ON_GPU,
    "bf16": False,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "max_steps": 3,
    "save_strategy": "no",
    "seed": 5,
}


def from_trl(*names: str) -> list:
    """Classes of TRL. Versions before 1.0 cannot import some of their own trainers beside transformers 5."""
    try:
        return [getattr(trl, name) for name in names]
    except RuntimeError as error:
        if int(trl.__version__.split(".")[0]) >= 1:
            raise
        pytest.skip(f"TRL {trl.__version__} cannot import {names[0]} here: {error}")


def arguments(output, **options) -> dict:
    return {"output_dir": str(output), **_ARGUMENTS, **options}


def sft(
    output,
    callbacks,
    trainer_class=SFTTrainer,
    config_class=SFTConfig,
    model=None,
    peft=True,
    row_count=ROWS,
    lora=None,
    vera=None,
    **options,
):
    """A job of SFT; with VeRA where its options are given, instead of LoRA."""
    rows = Dataset.from_list([{"text": sentence(i)} for i in range(row_count)])
    adapter = LoraConfig(**{**LORA, **(lora or {})})
    if vera is not None:
        adapter = VeraConfig(target_modules=LORA["target_modules"], **vera)
    return trainer_class(
        model if model is not None else base_model("llama"),
        args=config_class(**arguments(output, **{"max_length": 32, **options})),
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        processing_class=tokenizer(),
        peft_config=adapter if peft else None,
        callbacks=callbacks,
    )


def pairs(count: int) -> list[dict]:
    texts = [sentence(i, 4) for i in range(count + 2)]
    return [
        {"prompt": texts[i], "chosen": f" {texts[i + 1]}", "rejected": f" {texts[i + 2]}"}
        for i in range(count)
    ]


def reward_model() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = LlamaConfig(**{**base_model("llama").config.to_dict(), "num_labels": 1, "pad_token_id": 0})
    return LlamaForSequenceClassification(config)


def of_trl(name, rows, options=None, model=None, lora=None, experimental=False, **more):
    """A job of one of TRL's trainers.

    Args:
        name (`str`): of the trainer, without its ending.
        rows (callable): makes as many rows as it is asked for.
        options (`dict`, *optional*): training arguments.
        model (callable, *optional*): makes the base model.
        lora (`dict`, *optional*): options of the `LoraConfig`.
        experimental (`bool`): one that TRL 1.0 moved to `trl.experimental`.
        **more: other arguments of the trainer.
    """

    def build(output, callbacks, **others):
        if experimental:
            module = importlib.import_module(f"trl.experimental.{name.lower()}")
            trainer_class, config_class = getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")
        else:
            trainer_class, config_class = from_trl(f"{name}Trainer", f"{name}Config")
        base = model() if model else base_model("llama")
        base.warnings_issued = {}  # TRL before 1.0 writes to this, which transformers 5 dropped
        return trainer_class(
            base,
            args=config_class(**arguments(output, **{**(options or {"max_length": 32}), **others})),
            train_dataset=Dataset.from_list(rows(ROWS)),
            processing_class=tokenizer(),
            peft_config=LoraConfig(**LORA, **(lora or {})),
            callbacks=callbacks,
            **more,
        )

    return build


def plain(output, callbacks, family="bert", trainer_class=Trainer, **options):
    torch.manual_seed(1)
    model = get_peft_model(
        base_model(family),
        LoraConfig(r=4, target_modules=FAMILIES[family].attention, modules_to_save=["classifier"]),
    )
    rows = [{k: v[0] for k, v in FAMILIES[family].batch(i).items()} for i in range(ROWS)]
    return trainer_class(
        model,
        args=TrainingArguments(**arguments(output, **options)),
        train_dataset=rows,
        eval_dataset=rows[:8],
        callbacks=callbacks,
    )


SAMPLES = {"max_completion_length": 6, "num_generations": 4}
HEAD = {"task_type": TaskType.SEQ_CLS, "modules_to_save": ["score"]}
JOBS = {
    "sft": sft,
    "dpo": of_trl("DPO", pairs),
    "kto": of_trl("KTO", labelled),
    "reward": of_trl("Reward", better_and_worse, model=reward_model, lora=HEAD),
    "grpo": of_trl("GRPO", prompts, SAMPLES, reward_funcs=distinct_words),
    "rloo": of_trl("RLOO", prompts, SAMPLES, reward_funcs=distinct_words),
    "trainer": plain,
}


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.at = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.at


def checkpoints(output) -> list[str]:
    return sorted(path.name for path in Path(output).glob("checkpoint-*"))
