"""What a run is between two steps, and the only place that knows how it is written down.

`State` holds the parts. It becomes one flat dict of tensors (`Runtime.state_dict()`), and one safetensors file beside the
adapter, written whole or not at all:

    header                                 JSON: format, seed, options; of each kind its modules, shape, sides and so on
    step, skipped_steps                    optimizer steps that counted, and those that were skipped
    schedule.largest, schedule.warms_up    where the learning rates' schedule stands (`ScheduleShare`)
    KIND/latent_A, KIND/latent_B           latent factors, fp32
    KIND/...                               what the map of the kind holds: filter, origins, Θ
    KIND/graph.semantic, graph.features    edges that training drew, running-mean gradients
    KIND/optimizer.PARAMETER.MOMENT        the map's AdamW

In the file the header is metadata that a person can read, beside a digest of all the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import StructLoRAConfig
from .core.mapping import Factors, KindMap
from .core.nodes import Adapted
from .engines.schedule import ScheduleShare
from .errors import StructLoRAError

if TYPE_CHECKING:
    from .runtime import Runtime

STATE_NAME = "structlora.safetensors"
FORMAT = 3
_FACTS = ("modules", "shape", "per_depth", "sides")  # of a kind, as the header has them

# Options that shaped the weights which a state holds: other values would make other weights of them, or act on nothing.
# (`side` and `roles` are compared by what they come to.) All others may change on resume, and act from there on.
SHAPING = (
    *("filter", "temperature", "hard_gates", "gate_init", "share_gates", "head_gates", "expert_gates", "align_init"),
    *("coordinator", "coordinator_layers", "activation", "edges"),
)
_START_ANEW = (
    "to start StructLoRA from this adapter's weights, load it with `PeftModel.from_pretrained(..., is_trainable=True)` and "
    "train without `resume_from_checkpoint`"
)
_SAME_RUN = "resume with the configuration and the LoraConfig of the run that wrote it"
_HEADER = "header"
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # of torch.optim.AdamW
_DTYPES = {torch.float32, torch.float64, torch.int64, torch.bool}


class _Damage(ValueError):
    """A state that no run can have written; the text says what is wrong with it."""


@dataclass
class KindState:
    """The state of one kind.

    Args:
        modules (`list[str]`): full module names, as `Kind` has them.
        shape (`list[int]`): [modules, rows of lora_A, k, d].
        per_depth (`int`): modules at each depth.
        sides (`list[str]`): the factors that are compared across depth.
        adapted (`Adapted`): what each module adapts.
        latent (`Factors`): latent factors, fp32.
        own (`dict[str, Tensor]`): `KindMap.state_dict()`.
        graph (`dict[str, Tensor]`): `DepthGraph.state_dict()`.
        moments (`dict[str, dict[str, Tensor]]`): parameter of the map -> its AdamW's state; empty before the first step.
    """

    modules: list[str]
    shape: list[int]
    per_depth: int
    sides: list[str]
    adapted: Adapted
    latent: Factors
    own: dict[str, Tensor]
    graph: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, m: KindMap, latent: Factors, optimizer: torch.optim.Optimizer | None = None) -> KindState:
        """The present state of a map; a collective where ranks share its factors."""
        modules = [module.replace("_orig_mod.", "") for module in m.kind.modules]  # torch.compile's
        stepped = (
            {name: optimizer.state[p] for name, p in m.named_parameters() if p in optimizer.state} if optimizer else {}
        )
        moments = {name: {key: torch.as_tensor(v) for key, v in moment.items()} for name, moment in stepped.items()}
        kind = m.kind
        return cls(modules, kind.shape, kind.per_depth, list(m.sides), kind.adapted, *m.whole_state(latent), moments)

    def entries(self) -> dict[str, Tensor]:
        """As part of a flat dict, without the kind's name."""
        found = {"latent_A": self.latent.A, "latent_B": self.latent.B, **self.own}
        found |= {f"graph.{name}": value for name, value in self.graph.items()}
        for name, moment in self.moments.items():
            found |= {f"optimizer.{name}.{key}": value for key, value in moment.items()}
        return found

    @classmethod
    def parse(cls, name: str, facts: dict, entries: dict[str, Tensor]) -> KindState:
        """From the header's facts and the flat dict's entries.

        Raises:
            _Damage: they do not make a kind.
        """
        graph, moments, own = {}, defaultdict(dict), {}
        for key, value in entries.items():
            if key.startswith("graph."):
                graph[key.removeprefix("graph.")] = value
            elif key.startswith("optimizer."):
                parameter, _, moment = key.removeprefix("optimizer.").rpartition(".")
                moments[parameter][moment] = value
            else:
                own[key] = value
        if not {"latent_A", "latent_B"} <= own.keys():
            raise _Damage(f"no latent factors of '{name}'")
        latent = Factors(own.pop("latent_A"), own.pop("latent_B"))
        adapted = Adapted(**facts["adapted"])
        header = (facts["modules"], facts["shape"], facts["per_depth"], facts["sides"], adapted)
        found = cls(*header, latent, own, graph, dict(moments))
        found._check(name)
        return found

    def _check(self, name: str) -> None:
        count, rank, columns, rows = self.shape
        experts = self.adapted.experts * self.per_depth
        lead = (experts,) if experts > 1 else ()
        nodes = self.graph["semantic"].shape[-1:] if "semantic" in self.graph else ()
        expected = {"latent_A": [(count, rank, columns)], "latent_B": [(count, rows, rank)]}
        expected |= {"origin_A": [(n, rank, columns) for n in (1, count)], "origin_B": [(count, rows, rank)]}
        expected |= {"graph.semantic": [(*lead, *nodes, *nodes)]}
        entries = self.entries()
        if ("origin_A" in self.own) != ("A" in self.sides) or set(self.graph) - {"features"} != {"semantic"}:
            raise _Damage(f"other parts of '{name}' than its header says ({', '.join(sorted(entries))})")
        for parameter, moment in self.moments.items():
            if parameter not in self.own or set(moment) != _MOMENTS:
                raise _Damage(f"an optimizer state of '{name}/{parameter}' with {', '.join(sorted(moment))}")
            shape = tuple(self.own[parameter].shape)
            expected |= {f"optimizer.{parameter}.{key}": [() if key == "step" else shape] for key in moment}
        for key, shapes in expected.items():
            if key in entries and tuple(entries[key].shape) not in shapes:
                raise _Damage(f"'{name}/{key}' of shape {tuple(entries[key].shape)} and not {shapes[-1]}")

    def refuse_other_parts(self, name: str, m: KindMap, latent: Factors, step: int) -> None:
        """Stop where a map of the same options is of other modules, or has other parts than this state.

        Args:
            name (`str`): the kind's.
            m (`KindMap`): what is to take the state over.
            latent (`Factors`): its present latent factors.
            step (`int`): steps of the run that wrote the state.

        Raises:
            StructLoRAError: what is missing, too much, or of another shape or type.
        """
        own = KindState.of(m, latent)
        for what in ("modules", "shape", "per_depth", "adapted", "sides"):
            if getattr(own, what) != getattr(self, what):
                remedy = "set `side` and `roles` as they were" if what == "sides" else _SAME_RUN
                raise StructLoRAError(
                    f"a state with {what} {getattr(self, what)} of '{name}'",
                    f"{getattr(own, what)}, as in this run",
                    remedy,
                )
        here, theirs = own.entries(), self.entries()
        trained = {n for n, _ in m.named_parameters()} if step else set()
        if not self.moments.keys() <= trained:
            raise _misfit(
                f"a state after {step} steps with an optimizer state of {sorted(self.moments)} in '{name}'",
                f"one of {sorted(trained)} only",
            )
        moments = {key for key in theirs if key.startswith("optimizer.")}
        surplus, lacking = theirs.keys() - here.keys() - moments - {"graph.features"}, here.keys() - theirs.keys()
        lacking -= {"graph.features"}
        if surplus or lacking:
            raise _misfit(
                f"a state of other parts of '{name}' (only in the state: {sorted(surplus)}; only in this run: {sorted(lacking)})",
                "the same parts as now",
            )
        shapes = {key: tuple(value.shape) for key, value in here.items() if key != "origin_A"}  # (1, r, k) or (L, r, k)
        shapes |= {"graph.features": (*own.graph["semantic"].shape[:-1], m.gradient_size)}
        for key, value in theirs.items():
            if key in shapes and tuple(value.shape) != shapes[key]:
                raise _misfit(
                    f"a state with '{name}/{key}' of shape {tuple(value.shape)}", f"{shapes[key]}, as in this run"
                )
            dtype = here[key].dtype if key in here else torch.float32
            if value.dtype != dtype:
                raise _misfit(f"a state with '{name}/{key}' of type {value.dtype}", f"{dtype}, as in this run")


@dataclass
class State:
    """The state of a run.

    Args:
        options (`dict`): `StructLoRAConfig.options()`.
        seed (`int`): of the gate noise.
        step (`int`): optimizer steps that counted.
        skipped_steps (`int`): optimizer steps that were skipped.
        schedule (`ScheduleShare`): where the learning rates' schedule stands.
        kinds (`dict[str, KindState]`): by name.
    """

    options: dict
    seed: int
    step: int
    skipped_steps: int
    schedule: ScheduleShare
    kinds: dict[str, KindState]

    def flatten(self) -> dict[str, Tensor]:
        """One flat dict of tensors, all of them copies."""
        kinds = {
            n: {name: getattr(k, name) for name in _FACTS} | {"adapted": asdict(k.adapted)}
            for n, k in self.kinds.items()
        }
        header = {"format": FORMAT, "seed": self.seed, "config": self.options, "kinds": kinds}
        flat = {
            _HEADER: _encode(header),
            "step": torch.tensor(self.step),
            "skipped_steps": torch.tensor(self.skipped_steps),
            "schedule.largest": torch.tensor(self.schedule.largest, dtype=torch.float64),
            "schedule.warms_up": torch.tensor(self.schedule.warms_up),
        }
        for name, kind in self.kinds.items():
            flat |= {f"{name}/{key}": value for key, value in kind.entries().items()}
        return {name: value.detach().clone().contiguous() for name, value in flat.items()}

    @classmethod
    def parse(cls, flat: Mapping[str, Tensor]) -> State:
        """The state that `flatten` wrote down, checked.

        Raises:
            StructLoRAError: no run can have written it: entries that are missing, too much, of the wrong shape or type, or
                NaN.
        """
        try:
            return cls._parse(flat)
        except _Damage as damage:
            raise StructLoRAError(
                f"a damaged state ({damage})", "a state as a run wrote it", "resume from the checkpoint before"
            ) from None

    @classmethod
    def _parse(cls, flat: Mapping[str, Tensor]) -> State:
        for name, value in flat.items():
            _check_values(name, value)
        header = _decode(flat)
        run, entries = {}, defaultdict(dict)
        for name, value in flat.items():
            kind, _, key = name.rpartition("/")
            if kind:
                entries[kind][key] = value
            elif name != _HEADER:
                run[name] = value
        numbers = {"step": torch.int64, "skipped_steps": torch.int64}
        numbers |= {"schedule.largest": torch.float64, "schedule.warms_up": torch.bool}
        if run.keys() != numbers.keys():
            raise _Damage(f"entries {', '.join(sorted(run))} and not {', '.join(sorted(numbers))}")
        for name, dtype in numbers.items():
            if run[name].shape or run[name].dtype != dtype or run[name] < 0:
                raise _Damage(f"{name} is {run[name]}")
        if entries.keys() != header["kinds"].keys():
            raise _Damage(f"kinds {', '.join(sorted(entries))}, and in the header {', '.join(sorted(header['kinds']))}")
        schedule = ScheduleShare()
        schedule.largest, schedule.warms_up = run["schedule.largest"].item(), run["schedule.warms_up"].item()
        kinds = {name: KindState.parse(name, facts, entries[name]) for name, facts in header["kinds"].items()}
        return cls(header["config"], header["seed"], int(run["step"]), int(run["skipped_steps"]), schedule, kinds)

    def refuse_other_run(self, options: dict, maps: list[KindMap]) -> None:
        """Stop where this state is of other options or modules than a run.

        Args:
            options (`dict`): `StructLoRAConfig.options()` of the run.
            maps (`list[KindMap]`): its kinds' maps.

        Raises:
            StructLoRAError: what differs, by name.
        """
        changed = [name for name in SHAPING if self.options[name] != options[name]]
        if changed:
            before = ", ".join(f"{name}={self.options[name]!r}" for name in changed)
            now = ", ".join(f"{name}={options[name]!r}" for name in changed)
            raise StructLoRAError(
                f"a state trained with {before}, and now {now}",
                "the options that shaped the state's weights as they were",
                f"resume with {before}; or, {_START_ANEW}",
            )
        here = {m.kind.name: m for m in maps}
        if here.keys() != self.kinds.keys():
            surplus, lacking = sorted(self.kinds.keys() - here.keys()), sorted(here.keys() - self.kinds.keys())
            raise _misfit(
                f"a state of other modules (only in the state: {surplus[:3]}; only in this run: {lacking[:3]})",
                "the same modules as now",
            )

    def changes(self, options: dict, seed: int) -> list[str]:
        """Options that differ in a run that continues from this state, and take effect from there on."""
        theirs, here = {**self.options, "seed": self.seed}, {**options, "seed": seed}
        return [f"{name} ({theirs[name]!r} -> {here[name]!r})" for name in here if theirs[name] != here[name]]


def save_state(runtime: Runtime, directory: str | os.PathLike, state: Mapping[str, Tensor] | None = None) -> Path:
    """Write the runtime's state to `directory/structlora.safetensors`, atomically.

    Under FSDP2 and ZeRO, call it on every rank; the first one writes.

    Args:
        state (`dict[str, Tensor]`, *optional*): what `runtime.state_dict()` returned, where it was asked before. Every rank that
            calls writes then.

    The header holds the configuration, and for each kind its modules, shape [L, rows, k, d], compared sides and what it adapts.

    Raises:
        StructLoRAError: the file cannot be written; what was there before still is.

    Example:
        >>> runtime = attach(model, optimizer)
        >>> save_state(runtime, folder).name
        'structlora.safetensors'
    """
    path = Path(directory) / STATE_NAME
    unfinished = path.with_suffix(".unfinished")
    writes = state is not None or not runtime.is_sharded or dist.get_rank() == 0
    state = runtime.state_dict() if state is None else state
    if not writes:
        return path
    tensors = {name: value.cpu() for name, value in state.items()}
    metadata = {name: json.dumps(value) for name, value in _decode(tensors).items()}
    del tensors[_HEADER]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, unfinished, {**metadata, "digest": _digest(tensors, metadata)})
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise StructLoRAError(
            f"that {path} cannot be written ({error})",
            "room and permission for the StructLoRA state",
            "free space or fix permissions, then resume from the last complete checkpoint",
        ) from error
    return path


def load_state(runtime: Runtime, directory: str | os.PathLike) -> None:
    """Continue from the state that `save_state` wrote to `directory`.

    Raises:
        StructLoRAError: no state file, one that is damaged, or one of other modules, shapes, rank or options that shaped its
            weights. Nothing has changed then.

    Example:
        >>> runtime = attach(model, optimizer)
        >>> _ = save_state(runtime, folder)
        >>> load_state(runtime, folder)
    """
    path = Path(directory) / STATE_NAME
    if not path.is_file():
        raise StructLoRAError(
            f"no {STATE_NAME} in {directory}",
            "a checkpoint that StructLoRA wrote",
            f"resume from another checkpoint; or, {_START_ANEW}",
        )
    runtime.restore(read_state(path))


def read_state(path: Path) -> State:
    """What a state file holds, checked.

    Raises:
        StructLoRAError: it is damaged or of another format.
    """
    try:
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise _Damage(str(error)) from error
        if metadata.get("format") != str(FORMAT):
            raise StructLoRAError(
                f"{path} in format {metadata.get('format')}",
                f"format {FORMAT}",
                "use the version of structlora-trl that wrote it",
            )
        if metadata.pop("digest", None) != _digest(tensors, metadata):
            raise _Damage("its contents are not those that were written")
        tensors[_HEADER] = _encode({name: _json(value) for name, value in metadata.items()})
        return State._parse(tensors)
    except _Damage as damage:
        raise StructLoRAError(
            f"{path} damaged ({damage})", "a file that StructLoRA finished writing", "resume from the checkpoint before"
        ) from damage.__cause__


def _encode(header: dict) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)


def _decode(flat: Mapping[str, Tensor]) -> dict:
    """The header, checked as far as it can be by itself."""
    if _HEADER not in flat:
        raise _Damage("no header")
    header = _json(flat[_HEADER].cpu().numpy().tobytes())
    if not isinstance(header, dict) or header.keys() != {"format", "seed", "config", "kinds"}:
        raise _Damage("a header without format, seed, config and kinds")
    if header["format"] != FORMAT or type(header["seed"]) is not int:
        raise _Damage(f"a header of format {header['format']} and seed {header['seed']}")
    options, known = header["config"], StructLoRAConfig().options()
    if not isinstance(options, dict) or options.keys() != known.keys():
        raise _Damage("a header with other options than this version of structlora-trl has")
    try:
        StructLoRAConfig.build(options)
    except StructLoRAError as error:
        raise _Damage(error.found) from error
    if not isinstance(header["kinds"], dict) or not header["kinds"]:
        raise _Damage("a header without kinds")
    for name, facts in header["kinds"].items():
        if not _is_kind(facts):
            raise _Damage(f"a header with {facts} for '{name}'")
    return header


def _is_adapted(facts, rows: int) -> bool:
    if not isinstance(facts, dict) or facts.keys() != asdict(Adapted()).keys() or type(facts["experts"]) is not int:
        return False
    experts = facts["experts"]
    return (
        isinstance(facts["parameter"], str)
        and facts["input_side"] in ("A", "B")
        and experts > 0
        and rows % experts == 0
    )


def _is_kind(facts) -> bool:
    if not isinstance(facts, dict) or facts.keys() != {*_FACTS, "adapted"}:
        return False
    modules, shape, per_depth, sides = (facts[name] for name in _FACTS)
    return (
        all(isinstance(part, list) for part in (modules, shape, sides))
        and all(isinstance(module, str) for module in modules)
        and len(shape) == 4
        and all(type(size) is int and size > 0 for size in shape)
        and len(modules) == shape[0]
        and type(per_depth) is int
        and per_depth > 0
        and shape[0] % per_depth == 0
        and sides in (["A"], ["B"], ["A", "B"])
        and _is_adapted(facts["adapted"], shape[1])
    )


def _json(text: str | bytes):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Damage(f"a header that is no JSON ({error})") from error


def _check_values(name, value) -> None:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise _Damage(f"'{name}' is no tensor")
    expected = {torch.uint8} if name == _HEADER else _DTYPES
    if value.dtype not in expected:
        raise _Damage(f"'{name}' of type {value.dtype}")
    if not value.isfinite().all():
        raise _Damage(f"NaN or infinite numbers in '{name}'")


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 of everything that a state file holds."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _misfit(found: str, expected: str) -> StructLoRAError:
    return StructLoRAError(found, expected, _SAME_RUN)
