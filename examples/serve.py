# /// script
# requires-python = ">=3.10"
# dependencies = ["structlora-trl"]
# [tool.uv.sources]
# structlora-trl = { path = "..", editable = true }
# ///
"""Serve what sft_callback.py saved, with plain PEFT: nothing of StructLoRA is needed any more.

vLLM:       vllm serve Qwen/Qwen3-0.6B --enable-lora --lora-modules structlora=qwen3-sft --max-lora-rank 8
llama.cpp:  python convert_lora_to_gguf.py qwen3-sft --base-model-id Qwen/Qwen3-0.6B --outfile qwen3-sft.gguf
            llama-server -m qwen3-0.6b.gguf --lora qwen3-sft.gguf

Or without an adapter: `vllm serve qwen3-sft-merged`, `python convert_hf_to_gguf.py qwen3-sft-merged`.
"""

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL, ADAPTER, MERGED = "Qwen/Qwen3-0.6B", "qwen3-sft", "qwen3-sft-merged"

tokenizer = AutoTokenizer.from_pretrained(ADAPTER)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), ADAPTER)

messages = [{"role": "user", "content": "Why is the sky blue?"}]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**prompt, max_new_tokens=64)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))

model.merge_and_unload().save_pretrained(MERGED)  # the adapter added into the weights: a model like any other
tokenizer.save_pretrained(MERGED)
