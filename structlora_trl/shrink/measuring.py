"""What an adapter does to its base model's outputs, what its directions are worth on some rows, and which size of the
update rows choose."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from ..errors import StructLoRAError, refusing
from .base_model import Row, at_revision, moved, put
from .export_options import RANDOM
from .peft_scaling import LORA_NAME, by_expert, rank_of, scaled

_PROBE_ROWS, _PROBE_LENGTH = 4, 64  # length in tokens
_PICTURE = 224  # pixels
_PROBE_SEED = 0
# What an update may be multiplied by. None is above 1: what rows of the training would choose.
SCALES = (1.0, 0.85, 0.7, 0.5, 0.3)


class Probe(NamedTuple):
    """Inputs to measure on: `rows` of one example each, and a `name` for them."""

    rows: list[Row]
    name: str


class Outputs(NamedTuple):
    """What a model makes of some rows: `predicted` (n, classes), or hidden states (n, d) of a model without a
    head, of the first 256 positions, and the mean `loss` of all rows, None without labels.
    """

    predicted: Tensor
    is_distribution: bool
    loss: float | None


class Losses(NamedTuple):
    """Mean losses of the same rows: of the `base` model alone (None where it cannot be had from the loaded
    one), of the adapter `before`, and of the smaller one, `after`; `cut`: before it was distilled.
    """

    base: float | None
    before: float
    after: float
    cut: float | None = None

    @property
    def gain_kept(self) -> float | None:
        """Share of what the adapter had gained over the base model that the smaller one keeps; None where the
        adapter gained nothing, or the base model's loss is unknown.
        """
        gain = None if self.base is None else self.base - self.before
        return (self.base - self.after) / gain if gain and gain > 0 else None


class Scaled(NamedTuple):
    """An update ΔW times a number: `scale`, and the mean losses of the rows that `probe` names at 1, `before`, and at the
    scale, `after`, each row at the one that the other rows choose; None where the scale was given and not chosen.
    """

    scale: float
    probe: str = ""
    before: float | None = None
    after: float | None = None


class Change(NamedTuple):
    """What a smaller adapter does to the output, on the inputs that `probe` names.

    `largest` is the largest difference of an output, `divergence` the mean KL divergence of the predicted
    distributions in nats, and `agreement` the share of equal predictions, all on the first 256 positions
    (NaN where the model predicts no choice among classes); `losses` are of all rows, None where they have no labels.
    """

    probe: str
    largest: float
    divergence: float
    agreement: float
    losses: Losses | None = None


def change_of(probe: str, before: Outputs, after: Outputs, losses: Losses | None) -> Change:
    """How the outputs of two adapters differ on the same rows."""
    largest = float((before.predicted - after.predicted).abs().max())
    if not before.is_distribution:
        return Change(probe, largest, math.nan, math.nan, losses)
    old, new = (outputs.predicted.log_softmax(-1) for outputs in (before, after))
    divergence = float((old.exp() * (old - new)).sum(-1).mean())
    agreement = float((old.argmax(-1) == new.argmax(-1)).float().mean())
    return Change(probe, largest, divergence, agreement, losses)


@torch.no_grad()
def outputs_of(model: PeftModel, rows: list[Row]) -> Outputs:
    """Outputs and loss of rows, one by one: some classifiers take a batch only where a padding token is known.

    Raises:
        StructLoRAError: rows that the model does not take, or whose loss is not finite, or a model without any output to
            compare.
    """
    found, room, losses = [], _PROBE_ROWS * _PROBE_LENGTH, []
    for row in _told(rows, "outputs"):
        output = run(model, row)
        predicted, is_distribution = predictions(output, model)
        if room > 0:
            found.append(predicted.float().flatten(0, -2)[:room].cpu())
            room -= len(found[-1])
        if output.get("loss") is not None:
            losses.append(float(_finite(output["loss"])))
    return Outputs(torch.cat(found), is_distribution, sum(losses) / len(losses) if losses else None)


def predictions(output, model: PeftModel) -> tuple[Tensor, bool]:
    """What a model predicts: logits (n, ..., classes), of question answering (2, n, positions), or where there
    are none the last hidden state; and whether it is logits of one choice among classes, and no score or several labels.

    Raises:
        StructLoRAError: none of these.
    """
    if output.get("logits") is not None:
        problem = getattr(getattr(model.get_base_model(), "config", None), "problem_type", None)
        is_choice = problem in (None, "single_label_classification") and output["logits"].shape[-1] > 1
        return output["logits"], is_choice
    if output.get("start_logits") is not None:
        return torch.stack([output["start_logits"], output["end_logits"]]), True
    if output.get("last_hidden_state") is not None:
        return output["last_hidden_state"], False
    raise StructLoRAError(
        f"neither logits nor hidden states in the output of {type(model.get_base_model()).__name__}",
        "a model that predicts",
        "give `--probe none`",
    )


def _told(rows: list[Row], what: str) -> Iterable[Row]:
    """The rows, with a progress bar where they take more than two seconds."""
    return tqdm(rows, desc=what, unit="row", leave=False, delay=2)


def run(model: PeftModel, row: Row):
    """A model's output of a row, or of several stacked.

    Raises:
        StructLoRAError: inputs that the model does not take.
    """
    with refusing(
        "the model on a row of the data", "its inputs, with `labels`", "correct the data", (RuntimeError,)
    ):
        return model(**moved(row, model))


def _loss_of(model: PeftModel, row: Row) -> Tensor:
    return _finite(run(model, row).get("loss"))


def _finite(loss: Tensor | None) -> Tensor:
    if loss is None or not loss.isfinite():
        raise StructLoRAError(
            f"a loss of {loss} on a row of the data",
            "rows with labels and a finite loss",
            "correct the data (a label of a text's first token alone counts as none); where it is right, give another `--dtype`",
        )
    return loss


def gate_information(model: PeftModel, rows: list[Row]) -> dict[str, Tensor]:
    """What the labels tell about a gate m_j on each direction: its Fisher information I_j = E[(m_j ∂L/∂m_j)²]
    at m_j = 1, the mean over rows of ⟨∂L/∂B_j, B_j⟩².

    It belongs to the directions as they stand in lora_A and lora_B: load an adapter
    `with_singular_directions` for those that `select` chooses from.

    Args:
        model (`PeftModel`): with one adapter; it is left in evaluation mode, its gradients cleared.
        rows (`list[dict[str, Tensor]]`): one example each, with `labels`; some tens are enough to start with.

    Returns:
        Module -> (E or 1, r), in fp32 on the CPU.

    Raises:
        StructLoRAError: rows that the model does not take, without a loss, or with one that is not finite.
    """
    model.eval()
    sides, (lora,) = {}, model.peft_config.values()
    for name, parameter in model.named_parameters():
        match = LORA_NAME.match(name)
        parameter.requires_grad_(bool(match) and match["factor"] == "B")
        if parameter.requires_grad:
            sides[match["module"]] = parameter
    ranks = {module: rank_of(lora, module) for module in sides}
    experts = {module: B.shape[1] // ranks[module] for module, B in sides.items()}
    found = {
        module: torch.zeros(experts[module], ranks[module], dtype=torch.float32, device="cpu")
        for module in sides
    }
    for row in _told(rows, "information"):
        loss = _loss_of(model, row)
        gradients = torch.autograd.grad(loss, [*sides.values()], allow_unused=True)
        for (module, B), gradient in zip(sides.items(), gradients, strict=True):
            # An expert that is a module of its own, and that no token of this row reaches.
            if gradient is None:
                continue
            parts = by_expert((gradient * B.detach()).float().flatten(1), experts[module]).sum(1)  # (E, r)
            found[module] += parts.square().cpu() / len(rows)
    return found


@torch.no_grad()
def choose_scale(model: PeftModel, tensors: dict[str, Tensor], probe: Probe) -> Scaled:
    """The one of `SCALES` at which the mean loss of rows is lowest; 1 where it is no help to a row that did not choose.

    Each row is held against the scale that all others choose (leave-one-out), so that the loss after it is of rows
    that had no part in the choice, and a choice that is chance is not taken.

    Args:
        model (`PeftModel`): with one adapter, in evaluation mode; it is left at the last scale.
        tensors (`dict[str, Tensor]`): of an adapter's file, of the shapes that the model has.
        probe (`Probe`): rows with labels that the adapter was not trained on.

    Raises:
        StructLoRAError: rows that the model does not take, without a loss, or with one that is not finite.
    """
    found = []
    for scale in SCALES:
        put(model, scaled(tensors, scale))
        found.append([float(_loss_of(model, row)) for row in probe.rows])
    losses = torch.tensor(found, dtype=torch.float64, device="cpu")  # (scales, n)
    of_others = (losses.sum(1, keepdim=True) - losses).argmin(0)  # (n,)
    before, after = float(losses[0].mean()), float(losses.gather(0, of_others[None]).mean())
    if after >= before:
        return Scaled(1.0, probe.name, before, before)
    return Scaled(SCALES[int(losses.sum(1).argmin())], probe.name, before, after)


def text_probe(
    base: PreTrainedModel, base_name: str, revision: str | None, given: str, lora: LoraConfig
) -> Probe:
    """What `--probe` names: random inputs, or a text file."""
    if given == RANDOM:
        with refusing(
            f"making random inputs of {type(base).__name__}",
            "a model of tokens or of pictures, whose configuration tells their size",
            "give rows (`--data`), or `--probe none`",
            (AttributeError, NotImplementedError),
        ):
            return _random_probe(base, lora.alora_invocation_tokens or [])
    with refusing(
        "reading the probe text",
        "a text file and the base model's tokenizer",
        "correct `--probe`",
        (Exception,),  # of tokenizers, bare ones
    ):
        tokenizer = AutoTokenizer.from_pretrained(base_name, **at_revision(revision))
        ids = tokenizer(Path(given).read_text(encoding="utf-8"))["input_ids"][: _PROBE_ROWS * _PROBE_LENGTH]
    if not ids:
        raise StructLoRAError(f"no text in {given}", "a text of some words", "correct `--probe`")
    return Probe(
        [_of_tokens(base, torch.tensor([ids], dtype=torch.int64, device="cpu"))],
        f"1 x {len(ids)} tokens of {given}",
    )


def _random_probe(base: PreTrainedModel, invocation: list[int]) -> Probe:
    """Random inputs; of tokens, each row begins with those from which on an adapter acts (aLoRA)."""
    generator = torch.Generator("cpu").manual_seed(_PROBE_SEED)
    if base.main_input_name == "input_ids":
        settings = base.config.to_dict()
        special = {
            v for k, v in settings.items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)
        }
        usable = [i for i in range(base.get_input_embeddings().num_embeddings) if i not in special]
        usable = torch.tensor(usable, dtype=torch.int64, device="cpu")
        drawn = torch.empty(_PROBE_ROWS, _PROBE_LENGTH, dtype=torch.int64, device="cpu")
        tokens = usable[drawn.random_(len(usable), generator=generator)]
        tokens[:, : len(invocation)] = torch.tensor(invocation, dtype=torch.int64, device="cpu")
        rows = [_of_tokens(base, row) for row in tokens.split(1)]
        return Probe(rows, f"{_PROBE_ROWS} x {_PROBE_LENGTH} random tokens")
    if base.main_input_name == "pixel_values":
        config = getattr(base.config, "vision_config", base.config)
        size = getattr(config, "image_size", _PICTURE)  # convolutions take any
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.empty(
            _PROBE_ROWS, config.num_channels, height, width, dtype=torch.float32, device="cpu"
        ).normal_(generator=generator)
        rows = [{"pixel_values": picture} for picture in pixels.to(base.dtype).split(1)]
        return Probe(rows, f"{_PROBE_ROWS} random pictures")
    raise StructLoRAError(
        f"a base model whose input is `{base.main_input_name}`",
        "one of tokens or pictures, to measure pruning on",
        "give `--probe none`",
    )


def _of_tokens(base: PreTrainedModel, tokens: Tensor) -> Row:
    return {"input_ids": tokens, **({"decoder_input_ids": tokens} if base.config.is_encoder_decoder else {})}
