# /// script
# requires-python = ">=3.10"
# dependencies = ["structlora-trl", "pillow", "torchvision"]
# [tool.uv.sources]
# structlora-trl = { path = "..", editable = true }
# ///
"""Visual instruction tuning of LLaVA with TRL: adapters in the language model and in the vision tower.

Depths are compared within each tower. `max_length=None` keeps every image token.
"""

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from structlora_trl import StructLoRACallback

trainer = SFTTrainer(
    model="llava-hf/llava-1.5-7b-hf",
    args=SFTConfig(
        "llava-sft",
        learning_rate=1e-4,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        max_length=None,
        model_init_kwargs={"dtype": torch.bfloat16},
    ),
    train_dataset=load_dataset("trl-lib/llava-instruct-mix", split="train"),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    callbacks=[StructLoRACallback()],
)
trainer.train()
trainer.save_model()
