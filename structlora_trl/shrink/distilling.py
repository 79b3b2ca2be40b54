"""Teaching a smaller adapter the outputs of the one that it was made of: some hundred steps, no labels.

Both are factors of the same shapes in one loaded model, the smaller one with zeros in place of what was
dropped: a direction that is zero in lora_A and in lora_B has no gradient, and stays zero.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..errors import StructLoRAError
from .base_model import Row, factors_of, put
from .measuring import predictions, run
from .peft_scaling import factor_names

STEPS = 100
_RATE, _BATCH = 1e-3, 16  # AdamW's learning rate, which falls to zero; rows of a step
_HELD_OUT = 8  # one row in so many is held out
_CHECKS = 10  # times at which the distance on these is looked at
_ROOM = 4096  # positions that run through the model at once
# Of both distributions, for an adapter is sure of the rows that it was trained on: their probabilities alone tell little.
_TEMPERATURE = 4.0
_SEED = 0
_IGNORED = -100  # as PyTorch's cross-entropy has it


class Distilled(NamedTuple):
    """A smaller adapter that has learned the outputs of the whole one.

    `tensors` are of its file, of the shapes of the whole one's; `start` and `end` the mean distance of the
    outputs on `held_out` rows (on those learned from, where there are too few): KL divergence in nats, or of
    hidden states their squared difference over the square of the whole one's; `steps` those up to the best
    weights, which are kept, of `of` steps; and `seconds` the time that it took.
    """

    tensors: dict[str, Tensor]
    start: float
    end: float
    steps: int
    of: int
    held_out: int
    seconds: float


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
        model (`PeftModel`): with one adapter, in evaluation mode; it is left with the smaller adapter.
        whole, small (`dict[str, Tensor]`): of adapter files, both of the shapes that the model has.
        rows (`list[dict[str, Tensor]]`): one example each. Where they have labels of tokens, outputs are
            learned where these are; rows without any are left out.
        steps (`int`, *optional*, defaults to 100): of 16 rows each.
        learning_rate (`float`, *optional*, defaults to 1e-3): of AdamW; it falls to zero.

    Raises:
        StructLoRAError: rows that the model does not take or that have no labels, a model without outputs, or a
            distance that is not finite.
    """
    started = time.perf_counter()
    model.eval()
    from_the_second = _predicts_the_next(model)
    rows = [row for row in rows if _teaches(row, from_the_second)]
    if not rows:
        raise StructLoRAError(
            f"rows to learn from whose labels are all {_IGNORED}",
            "labels of the tokens to learn",
            "give other rows (`--data ROWS`), or export without `--distil`",
        )
    teacher, student = _on_device(model, whole), _on_device(model, small)
    places = [parameter for sides in factors_of(model).values() for parameter in sides.values()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in places:
        parameter.requires_grad_(True)
    generator = torch.Generator("cpu").manual_seed(_SEED)
    order = torch.randperm(len(rows), generator=generator).tolist()
    count = len(rows) // _HELD_OUT
    held_out, learned = [rows[i] for i in order[:count]], [rows[i] for i in order[count:]]
    watched, padding = held_out or learned, _padding(model)
    optimizer = torch.optim.AdamW(places, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

    def use(values: list[Tensor]) -> None:
        for parameter, value in zip(places, values, strict=True):
            parameter.data = value

    def distance(chosen: list[Row], learning: bool) -> float:
        """Mean over positions; with gradients where it is learned from."""
        total, parts = 0.0, _together(chosen, padding)
        for part in parts:
            use(teacher)
            with torch.no_grad():
                wanted, is_distribution = _wanted(model, part)
            use(student)
            with torch.set_grad_enabled(learning):
                found, _ = _wanted(model, part)
                loss = _distance(wanted, found, is_distribution) * (len(part["rows"]) / len(chosen))
                if learning:
                    loss.backward()
            total += float(loss.detach())
        return max(total, 0.0)  # rounding leaves a little less of equal outputs

    best = start = distance(watched, learning=False)
    kept, at = [value.clone() for value in student], 0
    drawn: list[int] = []
    with tqdm(range(1, steps + 1), desc="distilling", unit="step") as bar:
        for step in bar:
            while len(drawn) < _BATCH:
                drawn += torch.randperm(len(learned), generator=generator).tolist()
            batch, drawn = [learned[i] for i in drawn[:_BATCH]], drawn[_BATCH:]
            now = distance(batch, learning=True)
            if not math.isfinite(now):
                raise StructLoRAError(
                    f"a distance of {now} between the outputs of the two adapters at step {step}",
                    "finite outputs",
                    "correct the data, or export without `--distil`",
                )
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % max(1, steps // _CHECKS) == 0 or step == steps:
                now = distance(watched, learning=False)
                bar.set_postfix(distance=f"{now:.3g}", start=f"{start:.3g}")
                if now < best:
                    best, kept, at = now, [value.clone() for value in student], step
    use(kept)
    tensors = dict(small)
    names = factor_names(small)
    for module, sides in factors_of(model).items():
        for side, parameter in sides.items():
            name = names[module][side]
            tensors[name] = parameter.detach().to(small[name]).clone()
    return Distilled(tensors, start, best, at, steps, len(held_out), time.perf_counter() - started)


def _on_device(model: PeftModel, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Factors of a file as tensors that take the places of the model's."""
    put(model, tensors)
    return [
        parameter.detach().clone() for sides in factors_of(model).values() for parameter in sides.values()
    ]


def _padding(model: PeftModel) -> int | None:
    """The token that fills up shorter rows of a classifier; None where it knows none, and takes one row at a time."""
    base = model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        return 0
    token = getattr(base.config.get_text_config(), "pad_token_id", None)
    return None if token is None or token < 0 else token  # -1 in old configurations


def _together(rows: list[Row], padding: int | None) -> list[dict]:
    """Rows in as few parts as run at once: text of any length, others of equal shapes."""
    parts: list[list[Row]] = []
    for row in sorted(rows, key=_positions):
        last = parts[-1] if parts else []
        if last and _fits(last[0], row, padding) and (len(last) + 1) * _positions(row) <= _ROOM:
            last.append(row)
        else:
            parts.append([row])
    return [{"rows": part, "inputs": _stacked(part, padding)} for part in parts]


def _positions(row: Row) -> int:
    """Tokens of a row; of an encoder-decoder, of its longer side."""
    if not _is_text(row):
        return row["input_ids"].shape[-1] if "input_ids" in row else 1
    return max(row["input_ids"].shape[-1], row["labels"].numel())


def _is_text(row: Row) -> bool:
    """Whether a row is tokens with labels, of each token or of the row: such rows can be padded."""
    return {"input_ids", "labels"} <= row.keys() <= {"input_ids", "labels", "attention_mask"}


def _teaches(row: Row, from_the_second: bool) -> bool:
    """Whether any label of a row is looked at; where outputs are of the next token, none is of the first."""
    labels = row.get("labels")
    return labels is None or labels.ndim < 2 or bool((labels[:, int(from_the_second) :] != _IGNORED).any())


def _is_classified(row: Row) -> bool:
    """Whether a row of text has a label as a whole, or a share of each class; a decoder's labels are tokens, of any number."""
    labels = row["labels"]
    return labels.is_floating_point() or (labels.numel() == 1 and labels.shape != row["input_ids"].shape)


def _fits(one: Row, other: Row, padding: int | None) -> bool:
    if _is_text(one) and _is_text(other):
        # A classifier on a decoder looks for the last token that is no padding.
        return _is_classified(one) == _is_classified(other) and not (_is_classified(one) and padding is None)
    return {n: x.shape for n, x in one.items()} == {n: x.shape for n, x in other.items()}


def _stacked(rows: list[Row], padding: int | None) -> Row:
    if len(rows) == 1:
        return rows[0]
    if not _is_text(rows[0]):
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    rows = [{"attention_mask": torch.ones_like(row["input_ids"]), **row} for row in rows]
    if _is_classified(rows[0]):
        fills, stacked = {"input_ids": padding}, {"labels": torch.cat([row["labels"] for row in rows])}
    else:
        fills, stacked = {"input_ids": 0, "labels": _IGNORED}, {}
    for name, fill in {**fills, "attention_mask": 0}.items():
        stacked[name] = pad_sequence([row[name][0] for row in rows], batch_first=True, padding_value=fill)
    return stacked


def _wanted(model: PeftModel, part: dict) -> tuple[Tensor, bool]:
    """Outputs (n, classes) of a part's rows at the positions that are learned, and whether they are logits."""
    inputs = part["inputs"]
    output, is_distribution = predictions(run(model, inputs), model)
    labels, mask = inputs.get("labels"), inputs.get("attention_mask")
    if labels is not None and labels.shape == output.shape[:-1] and labels.ndim > 1:
        chosen = labels != _IGNORED
        if _predicts_the_next(model):
            chosen = pad(chosen[:, 1:], (0, 1), value=False)
        output = output[chosen.to(output.device)]
    elif mask is not None and mask.shape == output.shape[:-1]:
        output = output[mask.bool().to(output.device)]
    return output.float().flatten(0, -2), is_distribution


def _predicts_the_next(model: PeftModel) -> bool:
    """Whether a model's output at a position is of the next one's label."""
    base = model.get_base_model()
    name = type(base).__name__
    is_language = "CausalLM" in name or "LMHead" in name or "ConditionalGeneration" in name
    return is_language and not getattr(base.config, "is_encoder_decoder", False)


def _distance(wanted: Tensor, found: Tensor, is_distribution: bool) -> Tensor:
    if is_distribution:
        wanted, found = (x.div(_TEMPERATURE).log_softmax(-1) for x in (wanted, found))
        return (wanted.exp() * (wanted - found)).sum(-1).mean() * _TEMPERATURE**2
    return (wanted - found).square().sum() / wanted.square().sum()
