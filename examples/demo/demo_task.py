"""The demo's task: is a review sentence positive or negative? Its prompt, its base model and how answers are scored.

Free of `structlora_trl`, because the check that an adapter is plain LoRA scores with it too.
"""

from __future__ import annotations

import torch
from demo_assets import MODEL
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

PROMPT = "Review: {sentence}\nSentiment:"
ANSWERS = (" negative", " positive")  # by label
BATCH = 20


def load_base():
    """The cached model, fp32 on the CPU, and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), AutoTokenizer.from_pretrained(
        MODEL
    )


@torch.inference_mode()
def evaluate(model, tokenizer: PreTrainedTokenizerBase, examples: list[tuple[str, int]]) -> dict:
    """Score the two answers at the end of each prompt, as shares of the probability that both have together.

    Returns:
        `dict`: `accuracy` (share of examples whose right answer is the likelier), `nll` (mean negative log-likelihood
        of the right answer, in nats), and both for each example, `correct` and `nlls`.
    """
    model.eval()
    answer_ids = [tokenizer(answer, add_special_tokens=False).input_ids[0] for answer in ANSWERS]
    prompts = [tokenizer(PROMPT.format(sentence=sentence)).input_ids for sentence, _ in examples]
    labels = torch.tensor([label for _, label in examples])
    log_shares = torch.empty(len(examples), len(ANSWERS))
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    for start in range(0, len(prompts), BATCH):
        chosen = by_length[start : start + BATCH]
        ids, mask = _left_pad([prompts[i] for i in chosen], tokenizer.pad_token_id)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1, use_cache=False
        ).logits[:, -1]  # (b, vocabulary)
        log_shares[chosen] = logits[:, answer_ids].float().log_softmax(1)  # (b, 2)
        done = start + len(chosen)
        if done % (len(prompts) // 4) == 0:
            print(f"    held-out sentences scored: {done}/{len(prompts)}", flush=True)
    nlls = -log_shares.gather(1, labels[:, None])[:, 0]
    correct = log_shares.argmax(1) == labels
    return {
        "accuracy": correct.double().mean().item(),
        "nll": nlls.double().mean().item(),
        "correct": correct.int().tolist(),
        "nlls": nlls.tolist(),
    }


def _left_pad(sequences: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, (b, longest); the end of each prompt is in the last column."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[pad] * (longest - len(s)) + s for s in sequences])
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences])
    return ids, mask
