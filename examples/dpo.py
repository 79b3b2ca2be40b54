# /// script
# requires-python = ">=3.10"
# dependencies = ["structlora-trl"]
# [tool.uv.sources]
# structlora-trl = { path = "..", editable = true }
# ///
"""Preference optimisation with TRL. KTO, GRPO and RLOO take the callback in the same way."""

from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from structlora_trl import StructLoRACallback

trainer = DPOTrainer(
    model="Qwen/Qwen3-0.6B",  # the adapter switched off is the reference model
    args=DPOConfig("qwen3-dpo", learning_rate=1e-4, per_device_train_batch_size=4, num_train_epochs=1),
    train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[StructLoRACallback()],
)
trainer.train()
trainer.save_model()
