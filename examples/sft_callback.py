# /// script
# requires-python = ">=3.10"
# dependencies = ["structlora-trl"]
# [tool.uv.sources]
# structlora-trl = { path = "..", editable = true }
# ///
"""Supervised fine-tuning with TRL, where one line makes LoRA StructLoRA."""

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from structlora_trl import StructLoRACallback

trainer = SFTTrainer(
    model="Qwen/Qwen3-0.6B",
    args=SFTConfig("qwen3-sft", learning_rate=2e-4, per_device_train_batch_size=4, num_train_epochs=20),
    train_dataset=load_dataset("trl-lib/Capybara", split="train[:250]"),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[StructLoRACallback()],  # <- this line
)
trainer.train()
trainer.save_model()  # a plain LoRA adapter: see serve.py
