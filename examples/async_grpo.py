# /// script
# requires-python = ">=3.10"
# dependencies = ["structlora-trl"]
# [tool.uv.sources]
# structlora-trl = { path = "..", editable = true }
# ///
"""Asynchronous GRPO with TRL: a vLLM server samples while the adapter trains, and gets each new adapter alone.

Start the server first, on a GPU of its own, where it can read this script's output folder:

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 VLLM_SERVER_DEV_MODE=1 vllm serve Qwen/Qwen3-0.6B --port 8000 \
        --enable-lora --max-lora-rank 8 --max-loras 8 --logprobs-mode processed_logprobs \
        --weight-transfer-config '{"backend": "nccl"}'
"""

from datasets import load_dataset
from peft import LoraConfig
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
from trl.rewards import accuracy_reward

from structlora_trl import StructLoRACallback

if __name__ == "__main__":  # the process that collects samples imports this file
    trainer = AsyncGRPOTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=accuracy_reward,
        args=AsyncGRPOConfig(
            "qwen3-async-grpo", vllm_server_base_url="http://localhost:8000", learning_rate=1e-5
        ),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[StructLoRACallback()],
    )
    trainer.train()
    trainer.save_model()
