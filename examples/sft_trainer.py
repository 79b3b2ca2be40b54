# /// script
# requires-python = ">=3.10"
# dependencies = ["structlora-trl"]
# [tool.uv.sources]
# structlora-trl = { path = "..", editable = true }
# ///
"""Supervised fine-tuning with the callback built in: StructLoRA's options stand in the arguments, under `structlora`."""

from datasets import load_dataset
from peft import LoraConfig

from structlora_trl import StructLoRASFTConfig, StructLoRASFTTrainer

trainer = StructLoRASFTTrainer(
    model="HuggingFaceTB/SmolLM2-360M-Instruct",
    args=StructLoRASFTConfig(
        "smollm2-sft",
        learning_rate=2e-4,
        per_device_train_batch_size=4,
        num_train_epochs=20,
        structlora={"beta": 0.5, "coordinator": "gat", "edges": "adjacency"},
    ),
    train_dataset=load_dataset("trl-lib/Capybara", split="train[:250]"),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()
