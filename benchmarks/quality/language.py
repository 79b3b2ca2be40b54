"""Instruction tuning of SmolLM2-135M-Instruct with TRL, loss on the answers alone: `SFTTrainer`, and for StructLoRA its callback.

| task | prompt | answer | figure |
|---|---|---|---|
| smollm-movie | a film-review sentence | negative or positive | accuracy of the likelier answer |
| smollm-numbers | a number below 10 000 in digits | the same in words | exact match of the greedy continuation |

`smollm-numbers-few` is the same with all linear modules adapted and 2000 test numbers.
The NLL is of the answer: between the two answers for `smollm-movie`, per token for `smollm-numbers`.
"""

from __future__ import annotations

import functools
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from structlora_trl import StructLoRACallback

from . import assets, methods
from .measures import figures
from .store import KEY, packed
from .tasks import CHAT_LINEAR, SPLIT_SEED, base_of, rated_prompts, steps_of

BATCH = 8
TARGETS = ("q_proj", "v_proj")
EVALUATION_BATCH = 25

Example = tuple[str, str]  # prompt, answer


@dataclass
class LanguageTask:
    """One task.

    Args:
        summary (`str`): what is learned, for the report.
        load (`Callable`): () -> training pool, validation and test examples.
        generates (`bool`): exact match of what the model writes, else the likelier of two answers.
        steps (`int`): length of a run.
        targets (`tuple[str, ...]`): modules that are adapted.
    """

    summary: str
    load: Callable[[], tuple[list[Example], list[Example], list[Example]]]
    generates: bool
    steps: int = 40
    targets: tuple[str, ...] = TARGETS


def _movie() -> tuple[list[Example], ...]:
    found = rated_prompts("movie")
    return found[:1000], found[1000:1100], found[1100:1300]


@functools.cache
def _numbers(validation: int = 60, test: int = 140) -> tuple[list[Example], ...]:
    numbers = random.Random(SPLIT_SEED).sample(range(1000, 10_000), 1000 + validation + test)
    found = [(f"Number: {n}\nIn words:", f" {in_words(n)}") for n in numbers]
    return found[:1000], found[1000 : 1000 + validation], found[1000 + validation :]


LANGUAGE_TASKS = {
    "smollm-movie": LanguageTask(
        "sentiment of film-review sentences, SmolLM2-135M-Instruct, TRL", _movie, False
    ),
    "smollm-numbers": LanguageTask(
        "numbers in words, written out, SmolLM2-135M-Instruct, TRL", _numbers, True
    ),
    "smollm-numbers-few": LanguageTask(
        "the same, all linear modules adapted, 2000 test numbers",
        functools.partial(_numbers, 200, 2000),
        True,
        targets=CHAT_LINEAR,
    ),
}

_ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
         "seventeen eighteen nineteen").split()  # fmt: skip
_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()


def in_words(n: int) -> str:
    """7316 -> 'seven thousand three hundred and sixteen'; 0 <= n < 10 000."""
    if n < 20:
        return _ONES[n]
    if n < 100:
        return _TENS[n // 10] + (f"-{_ONES[n % 10]}" if n % 10 else "")
    unit, word, joint = (100, "hundred", " and ") if n < 1000 else (1000, "thousand", " ")
    rest = n % unit
    if unit == 1000 and 0 < rest < 100:
        joint = " and "
    return f"{in_words(n // unit)} {word}" + (f"{joint}{in_words(rest)}" if rest else "")


class _Losses(TrainerCallback):
    """Keeps the last figures that training logs."""

    last: dict = {}  # noqa: RUF012

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.last = dict(logs)


def run(task_name: str, method_name: str, rank: int, examples: int, lr: float, seed: int) -> dict:
    """Train once and measure: the line of one cell, as `cell.run` gives it for the other tasks."""
    started, cpu_started = time.perf_counter(), time.process_time()
    task, method = LANGUAGE_TASKS[base_of(task_name)], methods.find(method_name)
    steps = steps_of(task_name, examples, BATCH, task.steps)
    if method.peft or method.optimizer or method.penalty or method.tail_average:
        raise SystemExit(f"{method_name} is not made for {task_name}: of LoRA and StructLoRA alone")
    pool, validation, test = task.load()
    training = random.Random(seed).sample(pool, examples)
    log = _Losses()
    model, tokenizer, ours = train(method, training, rank, lr, seed, steps, task.targets, [log])
    seconds = time.process_time() - cpu_started
    score = _exact_match if task.generates else _likelier
    own = sum(p.numel() for m in (ours.runtime.maps if ours else ()) for p in m.parameters())
    line = dict(zip(KEY, (task_name, method_name, rank, examples, lr, seed), strict=True))
    line |= {
        "validation": score(model, tokenizer, validation),
        "test": score(model, tokenizer, test),
        "steps": steps,
        "batch": BATCH,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad) + own,
        "head": 0,
        "structlora": method.options(),
        "diagnostics": {
            name.removeprefix("structlora/"): round(value, 4)
            for name, value in log.last.items()
            if name.startswith("structlora/") and name.split("/")[1] not in ("map_ms", "skipped_steps")
        },
        "cpu_seconds": round(seconds, 2),
    }
    return line | {"seconds": round(time.perf_counter() - started, 2)}


def train(
    method: methods.Method,
    training: list[Example],
    rank: int,
    lr: float,
    seed: int,
    steps: int,
    targets: tuple[str, ...] = TARGETS,
    callbacks: list[TrainerCallback] | None = None,
):
    """The trained model in evaluation mode, its tokenizer and, for StructLoRA, its callback."""
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(assets.smollm(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(assets.smollm())
    ours = None if method.structlora is None else StructLoRACallback(parts=method.parts, **method.structlora)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt": p, "completion": a} for p, a in training]),
            peft_config=LoraConfig(
                r=rank,
                lora_alpha=2 * rank,
                target_modules=list(targets),
                task_type="CAUSAL_LM",
                **method.lora,
            ),
            args=SFTConfig(
                output_dir=scratch,
                completion_only_loss=True,
                max_steps=steps,
                per_device_train_batch_size=BATCH,
                learning_rate=lr,
                weight_decay=methods.WEIGHT_DECAY,
                warmup_steps=round(0.06 * steps),
                lr_scheduler_type="linear",
                gradient_checkpointing=False,
                seed=seed,
                use_cpu=True,
                bf16=False,
                logging_steps=steps,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            callbacks=[*(callbacks or []), *([ours] if ours else [])],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.model.eval(), tokenizer, ours


@torch.inference_mode()
def _likelier(model, tokenizer, examples: list[Example]) -> dict[str, float | str]:
    """`figures` of the two answers where both share the probability."""
    answers = sorted({answer for _, answer in examples})
    ids = [tokenizer(answer).input_ids[0] for answer in answers]
    logits, labels = [], []
    for batch in _batches(examples):
        found = model(**_left_padded(tokenizer, [p for p, _ in batch]), logits_to_keep=1).logits[:, -1, ids]
        logits.append(found.float())
        labels += [answers.index(answer) for _, answer in batch]
    return figures(torch.cat(logits), torch.tensor(labels))


@torch.inference_mode()
def _exact_match(model, tokenizer, examples: list[Example]) -> dict[str, float | str]:
    """Share of prompts whose greedy continuation, up to the end token, is the answer; NLL per answer token."""
    right, nll, tokens = [], 0.0, 0
    for batch in _batches(examples):
        prompts = _left_padded(tokenizer, [p for p, _ in batch])
        written = model.generate(
            **prompts, do_sample=False, max_new_tokens=20, pad_token_id=tokenizer.pad_token_id
        )
        texts = tokenizer.batch_decode(written[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        right += [text.strip() == answer.strip() for text, (_, answer) in zip(texts, batch, strict=True)]
        for prompt, answer in batch:
            start, whole = tokenizer(prompt).input_ids, tokenizer(prompt + answer).input_ids
            logits = model(input_ids=torch.tensor([whole])).logits[0, len(start) - 1 : -1].float()
            nll += torch.nn.functional.cross_entropy(
                logits, torch.tensor(whole[len(start) :]), reduction="sum"
            ).item()
            tokens += len(whole) - len(start)
    return {
        "accuracy": round(100 * sum(right) / len(examples), 3),
        "nll": round(nll / tokens, 5),
        "right": packed(right),
    }


def _batches(examples: list[Example]) -> list[list[Example]]:
    ordered = sorted(examples, key=lambda example: len(example[0]))  # little padding
    return [ordered[i : i + EVALUATION_BATCH] for i in range(0, len(ordered), EVALUATION_BATCH)]


def _left_padded(tokenizer, prompts: list[str]) -> dict[str, torch.Tensor]:
    tokenizer.padding_side = "left"
    encoded = tokenizer(prompts, padding=True, return_tensors="pt")
    return {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask}
