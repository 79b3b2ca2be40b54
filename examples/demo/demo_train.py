"""One row of the demo's table, in a process of its own so that its peak memory is its own: base, lora or structlora.

The two trainings are the same TRL code with the same arguments; StructLoRA is the callback, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

from datasets import Dataset
from demo_assets import load_sentences
from demo_task import ANSWERS, PROMPT, evaluate, load_base
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from structlora_trl import StructLoRACallback, save_state

RECIPE = {"steps": 60, "batch": 8, "learning_rate": 2e-3, "rank": 4, "modules": ["q_proj", "v_proj"]}
STEPS_PER_LINE = 10


class Progress(TrainerCallback):
    """Prints a line every few steps; keeps the losses and the CPU time at which each step ended.

    CPU time and not the clock's: the two runs come one after the other, and what else the machine does meanwhile would
    count for one of them.
    """

    def __init__(self):
        self.losses: list[float] = []
        self.step_ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.step_ends.append(time.process_time())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        self.losses.append(float(logs["loss"]))
        if state.global_step % STEPS_PER_LINE == 0:
            loss, seconds = statistics.mean(self.losses[-STEPS_PER_LINE:]), self.cpu_seconds_per_step()
            print(
                f"    step {state.global_step}/{state.max_steps}: loss {loss:.3f}, {seconds:.2f} CPU s per step",
                flush=True,
            )

    def cpu_seconds_per_step(self) -> float:
        """CPU seconds of all threads of this process: median over all steps but the first."""
        return statistics.median(b - a for a, b in pairwise(self.step_ends))


def rows(examples: list[tuple[str, int]]) -> Dataset:
    """Sentences and their labels as prompts and completions."""
    return Dataset.from_list(
        [{"prompt": PROMPT.format(sentence=s), "completion": ANSWERS[y]} for s, y in examples]
    )


def train(
    model,
    tokenizer,
    examples: list[tuple[str, int]],
    held_out: list[tuple[str, int]],
    seed: int,
    directory: Path,
    callbacks: list,
):
    """Fine-tune a LoRA adapter on the answers alone, score it, save it to `directory`; what to report."""
    set_seed(seed)  # the adapter's start is drawn before the trainer sets its seed
    progress = Progress()
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=rows(examples),
        peft_config=LoraConfig(
            r=RECIPE["rank"],
            lora_alpha=2 * RECIPE["rank"],
            target_modules=RECIPE["modules"],
            task_type="CAUSAL_LM",
        ),
        args=SFTConfig(
            output_dir=str(directory),
            completion_only_loss=True,
            max_steps=RECIPE["steps"],
            per_device_train_batch_size=RECIPE["batch"],
            learning_rate=RECIPE["learning_rate"],
            lr_scheduler_type="linear",
            gradient_checkpointing=False,
            seed=seed,
            use_cpu=True,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        callbacks=[progress, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    started = time.perf_counter()
    scores = evaluate(trainer.model, tokenizer, held_out)
    seconds = time.perf_counter() - started
    # The held-out loss of the report page is the NLL of the table: one measure of one set of sentences.
    speed = {"eval_runtime": seconds, "eval_samples_per_second": len(held_out) / seconds}
    trainer.log({"eval_loss": scores["nll"], **speed})
    trainer.save_model()
    trainer.save_state()  # the log, which the report page draws
    recipe = {**RECIPE, "examples": len(examples)}
    speed = {"cpu_seconds_per_step": progress.cpu_seconds_per_step()}
    return {"recipe": recipe, "losses": progress.losses, **speed, **scores}


def peak_memory() -> int:
    """The most memory this process has held at once (resident), in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=("base", "lora", "structlora"))
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    training, held_out = load_sentences()
    model, tokenizer = load_base()
    if options.method == "base":
        result = evaluate(model, tokenizer, held_out)
    else:
        callbacks = [StructLoRACallback()] if options.method == "structlora" else []
        folder = options.output / options.method
        result = train(model, tokenizer, training, held_out, options.seed, folder, callbacks)
        for callback in callbacks:
            save_state(callback.runtime, folder)
    result["peak_memory"] = peak_memory()
    (options.output / f"{options.method}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
