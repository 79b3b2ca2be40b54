# /// script
# requires-python = ">=3.10"
# dependencies = ["structlora-trl", "bitsandbytes"]
# [tool.uv.sources]
# structlora-trl = { path = "..", editable = true }
# ///
"""QLoRA: a base model in 4 bit (bitsandbytes), a StructLoRA adapter on top."""

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from structlora_trl import StructLoRACallback

model = AutoModelForCausalLM.from_pretrained(
    "Qwen/Qwen3-8B",
    dtype=torch.bfloat16,
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
)
trainer = SFTTrainer(
    model=model,
    args=SFTConfig("qwen3-qlora", learning_rate=2e-4, per_device_train_batch_size=4, num_train_epochs=20),
    train_dataset=load_dataset("trl-lib/Capybara", split="train[:250]"),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[StructLoRACallback()],
)
trainer.train()
trainer.save_model()
