# /// script
# requires-python = ">=3.10"
# dependencies = ["structlora-trl"]
# [tool.uv.sources]
# structlora-trl = { path = "..", editable = true }
# ///
"""The mixin makes a StructLoRA trainer of any Trainer class; here a reward model with TRL."""

from datasets import load_dataset
from peft import LoraConfig
from trl import RewardConfig, RewardTrainer

from structlora_trl import StructLoRAConfig, StructLoRAMixin


class StructLoRARewardTrainer(StructLoRAMixin, RewardTrainer):
    pass


trainer = StructLoRARewardTrainer(
    model="Qwen/Qwen3-0.6B",
    args=RewardConfig("qwen3-reward", learning_rate=1e-4, per_device_train_batch_size=4, num_train_epochs=1),
    train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    peft_config=LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=["score"], task_type="SEQ_CLS"
    ),
    structlora_config=StructLoRAConfig(coordinator="gat"),
)
trainer.train()
trainer.save_model()
