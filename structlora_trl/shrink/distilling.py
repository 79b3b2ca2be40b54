"""Teaching a smaller adapter the outputs of the one that it was made of: some hundred steps, no labels.

Both are factors of the same shapes in one loaded model, the smaller one with zeros in place of what was
dropped: a direction that is zero in lora_A and in lora_B has no gradient, and stays zero. Which of the two acts changes
within each step, so that this is a loop of its own and no `Trainer`, which may wrap or move the parameters.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, RandomSampler
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from ..errors import StructLoRAError
from .base_model import Row, factors_of, put
from .measuring import run
from .peft_scaling import factor_names

STEPS = 100
_RATE, _BATCH = 1e-3, 16  # AdamW's learning rate, which falls to zero; rows of a step
_HELD_OUT = 8  # one row in so many is held out
_CHECKS = 10  # times at which the distance on these is looked at
_ROOM = 4096  # positions that run through the model at once
# Of both distributions, for an adapter is sure of the rows that it was trained on: their probabilities alone tell little.
_TEMPERATURE = 4.0
_IGNORED = -100  # as PyTorch's cross-entropy has it


class Distilled(NamedTuple):
    """A smaller adapter that has learned the outputs of the whole one.

    `tensors` are of its file, of the shapes of the whole one's; `start` and `end` the mean distance of the
    outputs on `held_out` rows (on those learned from, where there are too few): KL divergence in nats, or of
    hidden states and scores their squared difference over the square of the whole one's; `steps` those up to the best
    weights, which are kept.
    """

    tensors: dict[str, Tensor]
    start: float
    end: float
    steps: int
    held_out: int


def distil(
    model: PeftModel,
    whole: dict[str, Tensor],
    small: dict[str, Tensor],
    rows: list[Row],
    steps: int = STEPS,
    learning_rate: float = _RATE,
) -> Distilled:
    """Train the factors of `small` towards the outputs that the model has with those of `whole`.

    One row in eight is held out; the weights that are nearest on these are kept, those at the start too.

    Args:
        model (`PeftModel`): with one adapter; it is left in evaluation mode, with the smaller adapter.
        whole, small (`dict[str, Tensor]`): of adapter files, both of the shapes that the model has.
        rows (`list[dict[str, Tensor]]`): one example each. Where they have labels of tokens, outputs are
            learned where these are.
        steps (`int`, *optional*, defaults to 100): of 16 rows each.
        learning_rate (`float`, *optional*, defaults to 1e-3): of AdamW; it falls to zero.

    Raises:
        StructLoRAError: rows that the model does not take, a model without logits or hidden states, or a
            distance that is not finite.
    """
    model.eval().requires_grad_(False)
    factors = [parameter for sides in factors_of(model).values() for parameter in sides.values()]
    teacher, student = _values(model, factors, whole), _values(model, factors, small)
    for parameter in factors:
        parameter.requires_grad_(True)
    held_out = rows[_HELD_OUT - 1 :: _HELD_OUT]
    learned = [row for number, row in enumerate(rows, 1) if number % _HELD_OUT]
    watched = held_out or learned

    def use(values: list[Tensor]) -> None:
        for parameter, value in zip(factors, values, strict=True):
            parameter.data = value

    def distance(batch: list[Row]) -> float:
        """Mean distance of the outputs over rows; adds its gradients where these are enabled."""
        total = 0.0
        for part in _together(batch):
            inputs = _stacked(part)
            use(teacher)
            with torch.no_grad():
                wanted, is_choice = _outputs(model, inputs)
            use(student)
            found, _ = _outputs(model, inputs)
            loss = _distance(wanted, found, is_choice) * (len(part) / len(batch))
            if torch.is_grad_enabled():
                loss.backward()
            total += float(loss.detach())
        if not math.isfinite(total):
            raise StructLoRAError(
                f"a distance of {total} between the outputs of the two adapters",
                "finite outputs, and labels of tokens that the model predicts",
                "correct the data, or export without `--distil`",
            )
        return max(total, 0.0)  # rounding leaves a little less of equal outputs

    optimizer = torch.optim.AdamW(factors, lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    drawn = RandomSampler(
        learned, num_samples=steps * _BATCH, generator=torch.Generator("cpu").manual_seed(0)
    )
    with torch.no_grad():
        best = start = distance(watched)
    kept, at = [value.clone() for value in student], 0
    for step, batch in enumerate(
        tqdm(DataLoader(learned, _BATCH, sampler=drawn, collate_fn=list), "distilling"), 1
    ):
        distance(batch)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % max(1, steps // _CHECKS) == 0 or step == steps:
            with torch.no_grad():
                now = distance(watched)
            if now < best:
                best, kept, at = now, [value.clone() for value in student], step
    use(kept)
    tensors, names = dict(small), factor_names(small)
    for module, sides in factors_of(model).items():
        for side, parameter in sides.items():
            name = names[module][side]
            tensors[name] = parameter.detach().to(small[name]).clone()
    return Distilled(tensors, start, best, at, len(held_out))


def _values(model: PeftModel, factors: list[Tensor], tensors: dict[str, Tensor]) -> list[Tensor]:
    """Factors of a file as tensors that take the places of the model's."""
    put(model, tensors)
    return [parameter.detach().clone() for parameter in factors]


def _together(rows: list[Row]) -> list[list[Row]]:
    """Rows in as few parts as run at once. Rows of labelled tokens can be padded; others run one by one."""
    parts: list[list[Row]] = []
    for row in sorted(rows, key=_positions):
        if parts and (len(parts[-1]) + 1) * _positions(row) <= _ROOM:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def _positions(row: Row) -> int:
    """Positions of a row that a part has room for; all of it where the row runs alone."""
    is_tokens = {"input_ids", "labels"} <= row.keys() <= {"input_ids", "labels", "attention_mask"}
    return row["labels"].numel() if is_tokens and row["labels"].shape == row["input_ids"].shape else _ROOM


def _stacked(rows: list[Row]) -> Row:
    if len(rows) == 1:
        return rows[0]
    rows = [{"attention_mask": torch.ones_like(row["input_ids"]), **row} for row in rows]
    fills = {"input_ids": 0, "attention_mask": 0, "labels": _IGNORED}
    return {
        name: pad_sequence([row[name][0] for row in rows], batch_first=True, padding_value=fill)
        for name, fill in fills.items()
    }


def _outputs(model: PeftModel, inputs: Row) -> tuple[Tensor, bool]:
    """Outputs (n, classes) at the positions that are learned, and whether they are logits of one choice among classes."""
    output, base = run(model, inputs), model.get_base_model()
    is_choice = output.get("logits") is not None
    scores = output["logits"] if is_choice else output.get("last_hidden_state")
    if scores is None:
        raise StructLoRAError(
            f"neither logits nor hidden states in the output of {type(base).__name__}",
            "a model that predicts",
            "export without `--distil`",
        )
    # Scores and several labels at once are no distribution over classes.
    problem = getattr(getattr(base, "config", None), "problem_type", None)
    is_choice &= problem in (None, "single_label_classification") and scores.shape[-1] > 1
    labels = inputs.get("labels")
    if labels is not None and labels.ndim > 1 and labels.shape == scores.shape[:-1]:
        chosen = labels != _IGNORED
        if isinstance(base, PreTrainedModel) and base.can_generate() and not base.config.is_encoder_decoder:
            chosen = torch.cat(
                [chosen[:, 1:], torch.zeros_like(chosen[:, :1])], 1
            )  # outputs are of the next token
        scores = scores[chosen.to(scores.device)]
    return scores.float().flatten(0, -2), is_choice


def _distance(wanted: Tensor, found: Tensor, is_choice: bool) -> Tensor:
    if is_choice:
        wanted, found = (x.div(_TEMPERATURE).log_softmax(-1) for x in (wanted, found))
        return (wanted.exp() * (wanted - found)).sum(-1).mean() * _TEMPERATURE**2
    return (wanted - found).square().sum() / wanted.square().sum()
