"""A finished adapter on its base model: how two adapters' outputs differ, how informative a gate is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from ..errors import StructLoRAError, refusing
from .load_adapter import Saved
from .peft_scaling import LORA_NAME, base_is_moved_for_good, by_expert, rank_of

RANDOM, NO_PROBE = "random", "none"
# Inputs of the model, of one example: (1, ...) each; with `labels` where there is a loss.
Row = dict[str, Tensor]
_PROBE_ROWS, _PROBE_LENGTH = 4, 64  # length in tokens
_PICTURE = 224  # pixels
_PROBE_SEED = 0
# Tasks whose head is not the one that the base model's own configuration names. (Causal language models keep
# theirs: models of pictures and text have the same task type.)
HEADS = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
}


class Probe(NamedTuple):
    """Inputs to measure on: `rows` of one example each, and a `name` for them."""

    rows: list[Row]
    name: str


class Change(NamedTuple):
    """What a smaller adapter does to the output, on the inputs that `probe` names.

    `largest` is the largest difference of a logit, `divergence` the mean KL divergence of the predicted
    distributions in nats, and `agreement` the share of equal predictions, all on the first 256 positions;
    `losses` are the mean losses of all rows before and after, None where the rows have no labels.
    """

    probe: str
    largest: float
    divergence: float
    agreement: float
    losses: tuple[float, float] | None = None


def load_base(
    name: str | None,
    lora: LoraConfig,
    tensors: dict[str, Tensor],
    revision: str | None = None,
    device_map: str | None = None,
) -> PreTrainedModel:
    """The base model of an adapter, with the head that it was trained with, in the model's own precision.

    Args:
        name (`str`, *optional*): name or path.
        lora (`LoraConfig`): names the head, by its task or the model's class.
        tensors (`dict[str, Tensor]`): of the adapter; where they hold the head, they say how many classes it
            has.
        revision (`str`, *optional*): branch, tag or commit of the model; the main branch where omitted.
        device_map (`str`, *optional*): where to load it, as `from_pretrained` takes it; the CPU where
            omitted.

    Raises:
        StructLoRAError: it cannot be loaded.
    """
    if not name:
        raise StructLoRAError(
            "no base model named in adapter_config.json", "its name or path", "give `--base MODEL`"
        )
    with refusing(
        f"loading the base model {name}",
        "the model that the adapter was trained on",
        "give `--base MODEL`",
        (RuntimeError,),
    ):
        config = AutoConfig.from_pretrained(name, **_at(revision))
        named = (lora.auto_mapping or {}).get("base_model_class") or (config.architectures or [None])[0]
        model_class = HEADS.get(lora.task_type) or getattr(transformers, named or "", AutoModelForCausalLM)
        classes = _class_count(tensors)
        # The adapter brings the head: the model's own may be of another number of classes.
        labels = {"num_labels": classes, "ignore_mismatched_sizes": True} if classes else {}
        place = {"device_map": device_map} if device_map else {}
        return model_class.from_pretrained(name, dtype="auto", **labels, **place, **_at(revision))


def base_of(saved: Saved, base: str | None) -> tuple[str | None, str | None]:
    """Name and revision of the base model of an adapter.

    Args:
        saved (`Saved`): the adapter.
        base (`str`, *optional*): the one to take in place of the one that the adapter's configuration names.

    Raises:
        StructLoRAError: the run changed the base model when it began, PEFT does not repeat this, and `base`
            is not given.
    """
    lora = saved.lora
    if base_is_moved_for_good(lora) and base in (None, lora.base_model_name_or_path):
        raise StructLoRAError(
            f"an adapter initialised with '{lora.init_lora_weights}', which changed the weights of its base model when training "
            f"began, in a way that PEFT does not repeat on {lora.base_model_name_or_path}",
            "the base model as it was trained on, or an adapter that PEFT has converted",
            "in the process that trained, call `save_pretrained(folder, path_initial_model_for_weight_conversion=INITIAL)`, "
            "where INITIAL is a folder with the adapter as it was before training, saved with `init_lora_weights=True`, and "
            "export that folder; or save the changed base model (`model.unload().save_pretrained(BASE)`) and give "
            "`--base BASE`",
        )
    return (base, None) if base else (lora.base_model_name_or_path, lora.revision)


def on_base(base: PreTrainedModel, folder: Path) -> PeftModel:
    """A base model with an adapter that lies in a folder, in evaluation mode.

    Raises:
        StructLoRAError: they do not fit each other; or the adapter began from LoftQ, which PEFT repeats, and
            PEFT cannot compute it here.
    """
    if str(LoraConfig.from_pretrained(str(folder)).init_lora_weights).lower() == "loftq":
        # PEFT 0.21 computes LoftQ on accelerators alone; torch without CUDA raises an AssertionError.
        loading = refusing(
            "loading the adapter, with what LoftQ takes out of the base model,",
            "an accelerator and bitsandbytes, with which PEFT computes LoftQ",
            "run this on a machine that has them; or save the base model as training had it "
            '(`model.unload().save_pretrained(BASE)`), write `"init_lora_weights": true` to adapter_config.json, and give '
            "`--base BASE`",
            (RuntimeError, AssertionError),
        )
    else:
        loading = refusing(
            "loading the adapter onto the base model",
            "the base model as it was trained on, its vocabulary and its modules' names too",
            "save the base model after `resize_token_embeddings`, and give `--base MODEL`; an adapter that an older version of "
            "transformers wrote: `PeftModel.from_pretrained(base, folder).save_pretrained(new)`, and export that one",
            (RuntimeError,),
        )
    with loading:
        return PeftModel.from_pretrained(base, str(folder)).eval()


def _at(revision: str | None) -> dict[str, str]:
    return {"revision": revision} if revision else {}


def output_change(
    load: Callable[[], PreTrainedModel],
    before: Path,
    after: Path,
    probe_of: Callable[[PreTrainedModel], Probe],
) -> Change:
    """Compare two adapters of one model in plain PEFT.

    Args:
        load (callable): gives the model. It is asked anew for each adapter, since some change the model
            itself (`layer_replication`, `bias`).
        before, after (`Path`): folders of the adapters.
        probe_of (callable): model -> what to run it on.

    Raises:
        StructLoRAError: the model gives no logits.
    """
    measured = []
    for folder in (before, after):
        with torch.random.fork_rng():
            torch.manual_seed(0)  # weights that no file holds are drawn at random: the same ones for both
            base = load()
        probe = probe_of(base)
        measured.append(_outputs(on_base(base, folder), probe.rows))
        del base
    (logits, loss), (other, other_loss) = measured
    old, new = (part.log_softmax(-1) for part in (logits, other))
    return Change(
        probe.name,
        largest=float((logits - other).abs().max()),
        divergence=float((old.exp() * (old - new)).sum(-1).mean()),
        agreement=float((old.argmax(-1) == new.argmax(-1)).float().mean()),
        losses=None if loss is None else (loss, other_loss),
    )


@torch.no_grad()
def _outputs(model: PeftModel, rows: list[Row]) -> tuple[Tensor, float | None]:
    """Logits (n, classes) of the first positions, and the mean loss. Row by row: some classifiers take a
    batch only where a padding token is known.
    """
    found, room, losses = [], _PROBE_ROWS * _PROBE_LENGTH, []
    for row in rows:
        output = model(**_moved(row, model))
        if output.get("logits") is None:
            raise StructLoRAError(
                f"no logits in the output of {type(model.get_base_model()).__name__}",
                "a model that predicts",
                "give `--probe none`",
            )
        if room > 0:
            found.append(output["logits"].float().flatten(0, -2)[:room].cpu())
            room -= len(found[-1])
        if "labels" in row:
            losses.append(float(output["loss"]))
    return torch.cat(found), sum(losses) / len(losses) if losses else None


def _moved(row: Row, model: torch.nn.Module) -> Row:
    device = next(model.parameters()).device  # which any module tells
    return {name: value.to(device) for name, value in row.items()}


def mean_loss(model: PeftModel, rows: list[Row]) -> float:
    """Mean loss of a model over rows with labels."""
    return _outputs(model, rows)[1]


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
    for row in rows:
        with refusing("the model on a row of the data", "its inputs, with `labels`", "correct the data"):
            loss = model(**_moved(row, model)).get("loss")
        if loss is None or not loss.isfinite():
            raise StructLoRAError(
                f"a loss of {loss} on a row of the data",
                "rows with labels and a finite loss",
                "correct the data",
            )
        gradients = torch.autograd.grad(loss, [*sides.values()], allow_unused=True)
        for (module, B), gradient in zip(sides.items(), gradients, strict=True):
            # An expert that is a module of its own, and that no token of this row reaches.
            if gradient is None:
                continue
            parts = by_expert((gradient * B.detach()).float().flatten(1), experts[module]).sum(1)  # (E, r)
            found[module] += parts.square().cpu() / len(rows)
    return found


def text_probe(
    base: PreTrainedModel, base_name: str, revision: str | None, given: str, lora: LoraConfig
) -> Probe:
    """What `--probe` names: random inputs, or a text file."""
    if given == RANDOM:
        return _random_probe(base, lora.alora_invocation_tokens or [])
    with refusing(
        "reading the probe text", "a text file and the base model's tokenizer", "correct `--probe`"
    ):
        tokenizer = AutoTokenizer.from_pretrained(base_name, **_at(revision))
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
        size = getattr(base.config, "image_size", _PICTURE)  # convolutions take any
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.empty(
            _PROBE_ROWS, base.config.num_channels, height, width, dtype=torch.float32, device="cpu"
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


def _class_count(tensors: dict[str, Tensor]) -> int | None:
    """Rows of the last layer of a classification head that is saved with the adapter."""
    heads = [
        name
        for name in tensors
        if name.endswith(".weight")
        and {"classifier", "score"} & {*name.split(".")}
        and not LORA_NAME.match(name)
    ]
    return len(tensors[max(heads)]) if heads else None
