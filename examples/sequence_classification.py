# /// script
# requires-python = ">=3.10"
# dependencies = ["structlora-trl"]
# [tool.uv.sources]
# structlora-trl = { path = "..", editable = true }
# ///
"""Text classification with BERT and `transformers.Trainer`; the new classifier is trained whole, beside the adapter."""

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from structlora_trl import StructLoRACallback

MODEL = "google-bert/bert-base-uncased"
tokenizer = AutoTokenizer.from_pretrained(MODEL)
dataset = load_dataset("stanfordnlp/imdb", split="train")
dataset = dataset.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=256), batched=True)

model = get_peft_model(
    AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2),
    LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS"),
)
trainer = Trainer(
    model,
    args=TrainingArguments(
        "bert-imdb", learning_rate=5e-4, per_device_train_batch_size=16, num_train_epochs=1, logging_steps=50
    ),
    train_dataset=dataset,
    processing_class=tokenizer,  # pads each batch
    callbacks=[StructLoRACallback()],
)
trainer.train()
trainer.save_model()
