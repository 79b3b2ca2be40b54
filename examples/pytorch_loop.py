# /// script
# requires-python = ">=3.10"
# dependencies = ["structlora-trl"]
# [tool.uv.sources]
# structlora-trl = { path = "..", editable = true }
# ///
"""A bare PyTorch loop: one line attaches StructLoRA, the loop stays as it is."""

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from structlora_trl import attach, save_gates, save_state

MODEL, OUTPUT, EPOCHS = "HuggingFaceTB/SmolLM2-135M", "smollm2-quotes", 15
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(MODEL)
tokenizer.pad_token = tokenizer.eos_token


def collate(rows):
    batch = tokenizer([row["quote"] for row in rows], return_tensors="pt", padding=True, truncation=True)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch.to(device)


loader = DataLoader(
    load_dataset("Abirate/english_quotes", split="train[:250]"), 8, shuffle=True, collate_fn=collate
)
base = AutoModelForCausalLM.from_pretrained(MODEL).to(device)
model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-4)
scheduler = get_linear_schedule_with_warmup(optimizer, 0, EPOCHS * len(loader))
# Once the optimizer is built. The loss is a mean over the labels, whose number sets the price of what gates let through.
labels = sum((batch["labels"] != -100).sum().item() for batch in loader)
runtime = attach(model, optimizer, examples=labels, batch_size=labels / len(loader))

model.train()
for epoch in range(EPOCHS):
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    print(epoch + 1, loss.item(), runtime.metrics())

model.save_pretrained(OUTPUT)  # a plain LoRA adapter
save_gates(runtime, OUTPUT)  # what each direction is worth, for `structlora export --keep`
# What resuming needs beside adapter, optimizer and scheduler; `load_state(runtime, OUTPUT)` reads it.
save_state(runtime, OUTPUT)
