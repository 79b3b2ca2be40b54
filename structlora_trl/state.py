"""What a run is between two steps beside its adapter and its optimizer, and the only place that knows how it is written down.

A state is one flat dict of tensors (`Runtime.state_dict()`), and one safetensors file beside the adapter,
written whole or not at all:

    header                       JSON: format, step, skipped_steps, options; of each kind its modules, shape, compared
                                 sides and what it adapts
    KIND/norms                   norms of lora_A and lora_B, by which weights are told that the state is not of
    KIND/offset_A, offset_B      effective less latent factors of the nodes, fp32, of the sides that are mapped
    KIND/mean_A, mean_B          running means of their gradients, where edges follow these
    KIND/...                     `state_dict()` of the kind's map: origins, graph, Θ, selection
    KIND/optimizer.NAME.MOMENT   the map's AdamW, for each parameter of the map
    /gates/MODULE                the logits of the module's gates

In the file the header is metadata that a person can read.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .config import StructLoRAConfig
from .core.kinds import SIDES, Adapted, Kind, unwrapped_name
from .core.mapping import KindMap
from .errors import StructLoRAError
from .tensor_file import write_tensors

if TYPE_CHECKING:
    from .engines.base import Layout  # the tools read states, and need no engine

logger = logging.getLogger(__name__)

STATE_NAME = "structlora.safetensors"
FORMAT = 7  # those before it were never released

# Options that shaped the weights which a state holds: other values would make other weights of them, or act
# on nothing. (`side` and `roles` are compared by the sides they resolve to.) All others may change on resume, and act
# from there on.
SHAPING = ("keep", "gate_openness", "align_init", "coordinator", "coordinator_layers", "edges")
_START_ANEW = (
    "to start StructLoRA from this adapter's weights, load it with `PeftModel.from_pretrained(..., is_trainable=True)` and "
    "train without `resume_from_checkpoint`"
)
_SAME_RUN = "resume with the configuration and the LoraConfig of the run that wrote it"
_HEADER, _GATES = "header", "/gates/"
# What a run lacks before its first gradients, or while gates are off.
_MAY_LACK = re.compile(rf"{_GATES}|.+/(mean_|optimizer\.)")
_FACTS = ("format", "step", "skipped_steps", "options", "kinds")
_BESIDE = ("norms", "offset_A", "offset_B", "mean_A", "mean_B")  # of a kind, and not in its map
_CLOSE = 1e-4  # of a norm: a dtype's rounding, and what ranks add up in another order


class Side(Protocol):
    """What a state needs of `mapped_side.MappedSide`."""

    map: KindMap
    side: str
    layout: Layout
    offset: Tensor
    mean: Tensor | None


class Run(Protocol):
    """What a state needs of `runtime.Runtime`."""

    config: StructLoRAConfig
    step: int
    skipped_steps: int
    maps: list[KindMap]

    @property
    def sides(self) -> Sequence[Side]: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer | None: ...

    @property
    def is_sharded(self) -> bool: ...

    def weight_norms(self) -> dict[str, Tensor]: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def restore(self, state: State) -> None: ...


@dataclass
class State:
    """The state of a run.

    Args:
        header (`dict`): what is no tensor, see the top of this file.
        tensors (`dict[str, Tensor]`): all else, of the whole width, by 'KIND/name'.
    """

    header: dict
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, runtime: Run, gates: dict[str, Tensor]) -> State:
        """Return the present state of a run, with the logits of its gates by module; a collective where ranks hold parts."""
        tensors = {f"{_GATES}{name}": logits for name, logits in gates.items()}
        tensors |= {f"{name}/norms": norms for name, norms in runtime.weight_norms().items()}
        moments = runtime.optimizer.state if runtime.optimizer else {}
        for m in runtime.maps:
            entries = dict(m.state_dict())
            for name, parameter in m.named_parameters():
                entries |= {f"optimizer.{name}.{key}": x for key, x in moments.get(parameter, {}).items()}
            tensors |= {f"{m.kind.name}/{name}": x for name, x in entries.items()}
        for side in runtime.sides:  # on the CPU: no device need have room for the whole of all
            name = side.map.kind.name
            tensors[f"{name}/offset_{side.side}"] = side.layout.whole(side.offset).cpu()
            if side.mean is not None:
                tensors[f"{name}/mean_{side.side}"] = side.layout.whole(side.mean).cpu()
        header = {
            "format": FORMAT,
            "step": runtime.step,
            "skipped_steps": runtime.skipped_steps,
            "options": runtime.config.options(),
            "kinds": {m.kind.name: facts_of(m) for m in runtime.maps},
        }
        return cls(header, {name: x.detach().clone().contiguous() for name, x in tensors.items()})

    @property
    def step(self) -> int:
        return self.header["step"]

    @property
    def skipped_steps(self) -> int:
        return self.header["skipped_steps"]

    @property
    def config(self) -> StructLoRAConfig:
        """The options of the run that wrote the state."""
        return StructLoRAConfig.build(self.header["options"])

    @property
    def gates(self) -> dict[str, Tensor]:
        """Logits by module."""
        return {name.removeprefix(_GATES): x for name, x in self.tensors.items() if name.startswith(_GATES)}

    def rewound(self) -> State:
        """Return the same gates and coordinators at the start of another run, whose steps are its own."""
        return State({**self.header, "step": 0, "skipped_steps": 0}, self.tensors)

    def of_kind(self, name: str) -> dict[str, Tensor]:
        """The tensors of one kind, by their names within it."""
        start = f"{name}/"
        return {key.removeprefix(start): x for key, x in self.tensors.items() if key.startswith(start)}

    def flatten(self) -> dict[str, Tensor]:
        """The state as one flat dict of tensors."""
        text = bytearray(json.dumps(self.header).encode())
        return {_HEADER: torch.frombuffer(text, dtype=torch.uint8), **self.tensors}

    @classmethod
    def parse(cls, flat: Mapping[str, Tensor]) -> State:
        """The state that `flatten` wrote down.

        Raises:
            StructLoRAError: it has no header, or is of another format; it holds NaN or infinite numbers.
        """
        return cls.checked(*_unflattened(flat), "a state")

    @classmethod
    def checked(cls, header: dict, tensors: dict[str, Tensor], where: str) -> State:
        """A state of these parts.

        Raises:
            StructLoRAError: of another format; damaged, `where` saying what.
        """
        found = header.get("format") if isinstance(header, dict) else None
        if found != FORMAT:
            raise StructLoRAError(
                f"{where} in format {found}",
                f"format {FORMAT}",
                "use the version of structlora-trl that wrote it",
            )
        for name, x in tensors.items():
            if not isinstance(x, Tensor) or not bool(x.isfinite().all()):
                raise damaged(where, f"NaN or infinite numbers in '{name}'")
        try:
            # An option that the writer's version lacked had today's default.
            header = {**header, "options": StructLoRAConfig().options() | header["options"]}
            state = cls({name: header[name] for name in _FACTS}, tensors)
            kinds = [" ".join(facts["modules"]) for facts in state.header["kinds"].values()]
            _ = state.config, kinds[0]
        except StructLoRAError as error:
            raise damaged(where, error.found) from error
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise damaged(where, f"a header that no run wrote: {error!r}") from error
        return state

    def refuse_other_run(self, ours: State) -> None:
        """Stop where this state is of other options, modules or shapes than that of the present run. Changes nothing.

        Raises:
            StructLoRAError: what differs, by name.
        """
        now, before = ours.header["options"], self.header["options"]
        changed = [name for name in SHAPING if before[name] != now[name]]
        if changed:
            then = ", ".join(f"{name}={before[name]!r}" for name in changed)
            raise StructLoRAError(
                f"a state trained with {then}, and now {', '.join(f'{name}={now[name]!r}' for name in changed)}",
                "the options that shaped the state's weights as they were",
                f"resume with {then}; or, {_START_ANEW}",
            )
        facts, theirs = ours.header["kinds"], self.header["kinds"]
        for name in sorted(facts.keys() ^ theirs.keys()):
            raise StructLoRAError(
                f"a state {'with' if name in theirs else 'without'} '{name}'",
                "the same modules as now",
                _SAME_RUN,
            )
        for name, own in facts.items():
            for fact in (fact for fact in own if own[fact] != theirs[name].get(fact, own[fact])):
                raise StructLoRAError(
                    f"a state with {fact} {theirs[name][fact]} of '{name}'",
                    f"{own[fact]}, as in this run",
                    "set `side` and `roles` as they were" if fact == "sides" else _SAME_RUN,
                )
        found, needed = self._likenesses(), ours._likenesses()
        for name in sorted(found.keys() | needed.keys()):
            if _MAY_LACK.match(name) and not (name in found and name in needed):
                continue
            if found.get(name) != needed.get(name):
                raise StructLoRAError(
                    f"a state with {found.get(name, 'nothing')} as '{name}'",
                    f"{needed.get(name, 'nothing')}, as in this run",
                    "resume from a checkpoint of this run, with the `parts` of the run that wrote it",
                )

    def _likenesses(self) -> dict[str, str]:
        """Dtype and shape of each tensor. One origin for all nodes is the same as one of each."""
        return {
            name: f"{x.dtype} of shape {[*x.shape[name.endswith('/origin_A') :]]}"
            for name, x in self.tensors.items()
        }

    def warn_of_other_weights(self, ours: State) -> None:
        """Say where other LoRA weights stand, those of the present run's state, than those that this one was saved beside."""
        other = [
            name
            for name in ours.header["kinds"]
            if not torch.allclose(ours.tensors[f"{name}/norms"], self.tensors[f"{name}/norms"], rtol=_CLOSE)
        ]
        if other:
            logger.warning(
                "Other LoRA weights stand than those that this StructLoRA state was saved beside (of %d kinds, %s among them): "
                "training goes on from those that stand. To resume a run, load its adapter first.",
                len(other),
                other[0],
            )

    def map_of(self, name: str, modules: dict[str, dict[str, nn.Parameter]]) -> KindMap:
        """Return the map of a kind over an adapter's factors.

        Args:
            modules (`dict`): module name -> {"A": lora_A, "B": lora_B}.
        """
        facts, own = self.header["kinds"][name], self.of_kind(name)
        A, B = ([modules[module][side] for module in facts["modules"]] for side in SIDES)
        kind = Kind(name, facts["modules"], A, B, Adapted(**facts["adapted"]), per_depth=facts["per_depth"])
        origin = own.get("origin_A")
        if origin is not None and list(origin.shape[1:]) != [kind.rank, kind.shape[2]]:
            raise damaged("a state", f"origin_A of '{name}' of shape {list(origin.shape)}")
        m = KindMap(kind, self.config, origin, own.get("origin_B"))
        m.load_state_dict({key: own[key] for key in m.state_dict()})
        return m

    def changes(self, config: StructLoRAConfig) -> list[str]:
        """Options that differ in a run that continues from this state, and take effect from there on."""
        theirs, ours = self.header["options"], config.options()
        return [f"{name} ({theirs[name]!r} -> {ours[name]!r})" for name in ours if theirs[name] != ours[name]]

    def load_into(self, runtime: Run) -> None:
        """Load the state into a run's maps, offsets and the optimizer of Θ."""
        for m in runtime.maps:
            own, moments = {}, {}
            for name, x in self.of_kind(m.kind.name).items():
                if name.startswith("optimizer."):
                    parameter, _, key = name.removeprefix("optimizer.").rpartition(".")
                    moments.setdefault(m.get_parameter(parameter), {})[key] = x
                else:
                    own[name] = x.to(m.kind.device)
            for side in (side for side in runtime.sides if side.map is m):
                side.offset = side.layout.own(own[f"offset_{side.side}"])
                mean = own.get(f"mean_{side.side}")
                side.mean = (
                    None if mean is None else side.layout.own(mean).clone()
                )  # which steps change in place
            m.load_state_dict({name: x for name, x in own.items() if name not in _BESIDE}, strict=True)
            for parameter in m.parameters():
                runtime.optimizer.state.pop(parameter, None)
                if parameter in moments:  # AdamW keeps `step` on the CPU
                    runtime.optimizer.state[parameter] = {
                        key: x.clone() if key == "step" else x.to(m.kind.device, copy=True)
                        for key, x in moments[parameter].items()
                    }


def _unflattened(flat: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """The header and the tensors that `State.flatten` wrote down, whatever they hold."""
    tensors = dict(flat)
    try:
        return json.loads(tensors.pop(_HEADER).cpu().numpy().tobytes()), tensors
    except (KeyError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise damaged("a state", "no header") from error


def facts_of(m: KindMap) -> dict:
    """What a header says of a kind."""
    kind = m.kind
    return {
        "modules": [unwrapped_name(module) for module in kind.modules],
        "shape": kind.shape,
        "per_depth": kind.per_depth,
        "adapted": asdict(kind.adapted),
        "sides": list(m.sides),
        "a start other than zero": m.origin_B is not None,
    }


def save_state(runtime: Run, directory: str | os.PathLike, state: Mapping[str, Tensor] | None = None) -> Path:
    """Write the runtime's state to `directory/structlora.safetensors`, atomically.

    Under FSDP2 and ZeRO, call it on every rank; the first one writes.

    Args:
        state (`dict[str, Tensor]`, *optional*): what `runtime.state_dict()` returned, where it was asked
            before. Every rank that calls writes then.

    Returns:
        `Path` of the file.

    Raises:
        StructLoRAError: `directory` is the path of a file, or the file cannot be written; what was there before
            still is.

    Example:
        >>> runtime = attach(model, optimizer, examples=labels, batch_size=labels / len(batches))
        >>> save_state(runtime, folder).name
        'structlora.safetensors'
    """
    path = _file_in(directory)
    writes = state is not None or not runtime.is_sharded or dist.get_rank() == 0
    # Weights that hold NaN are saved, as those beside are; whoever reads the state is told.
    header, tensors = _unflattened(runtime.state_dict() if state is None else state)
    if not writes:
        return path
    write_tensors(path, tensors, {name: json.dumps(value) for name, value in header.items()})
    return path


def load_state(runtime: Run, directory: str | os.PathLike) -> None:
    """Continue from the state that `save_state` wrote to `directory`, with the weights that stand: load the adapter and the
    optimizer's state first, as in a run of plain LoRA.

    Raises:
        StructLoRAError: `directory` is the path of a file; no state file, one that is damaged, or one of other
            modules, shapes, rank or options that shaped its weights. Nothing has changed then.

    Example:
        >>> runtime = attach(model, optimizer, examples=labels, batch_size=labels / len(batches))
        >>> _ = save_state(runtime, folder)
        >>> load_state(runtime, folder)
    """
    path = _file_in(directory)
    if not path.is_file():
        whole = sorted(path.parent.parent.glob(f"checkpoint-*/{STATE_NAME}"), key=os.path.getmtime)
        raise StructLoRAError(
            f"no {STATE_NAME} in {directory}",
            "a checkpoint that StructLoRA wrote",
            f"resume from {whole[-1].parent if whole else 'another checkpoint'}; or, {_START_ANEW}",
        )
    runtime.restore(read_state(path))


def _file_in(directory: str | os.PathLike) -> Path:
    """The state's file in a folder.

    Raises:
        StructLoRAError: the path of a file is given.
    """
    folder = Path(directory)
    if folder.suffix == Path(STATE_NAME).suffix and not folder.is_dir():
        raise StructLoRAError(
            f"{folder}, the path of a file",
            f"a folder, in which the state is always called {STATE_NAME}",
            f"give the folder, such as {folder.parent}",
        )
    return folder / STATE_NAME


def read_state(path: Path) -> State:
    """The state that a file holds, checked.

    Raises:
        StructLoRAError: it is damaged or of a newer format.
    """
    try:
        with safe_open(path, "pt", device="cpu") as file:
            header = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise damaged(str(path), str(error)) from error
    return State.checked(header, tensors, str(path))


def damaged(where: str, why: str) -> StructLoRAError:
    """The error for a state that no run can have written."""
    return StructLoRAError(
        f"{where} damaged ({why})",
        "a state that StructLoRA finished writing",
        "resume from the checkpoint before",
    )
