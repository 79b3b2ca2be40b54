"""What `export` is asked for, and what of it contradicts or acts on nothing. It needs no torch: the command line looks
here before anything is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Number, Real
from pathlib import Path

from ..config import share_to_keep
from ..errors import StructLoRAError

RANDOM, NO_PROBE = "random", "none"  # what a smaller adapter's cost is measured on without rows
AUTO = "auto"  # the scale that rows choose
SERVERS = ("vllm", "sglang", "lorax", "llamacpp")  # what `servers.py` knows of
DTYPES = ("float32", "bfloat16", "float16")
# Folder of a size within the output, empty where there is one -> its rule ("rank", "keep" or "prune") and value.
Sizes = dict[str, tuple[str, int | float | str | bool]]


def sizes_of(
    rank: int | Sequence[int] = (),
    keep: float | str | Sequence[float | str] = (),
    prune: bool = False,
    named: bool = False,
) -> Sizes:
    """The sizes that are asked for: "rank-4", "keep-0.25".

    Args:
        rank, keep, prune: as for `export.export_sizes` and `export.export`; one size may stand for itself.
        named (`bool`, *optional*, defaults to False): whether each has a folder of its own; else there is one.

    Raises:
        StructLoRAError: more than one rule.
    """
    rank, keep = ([sizes] if isinstance(sizes, (str, Number)) else sizes for sizes in (rank, keep))
    given = [("rank", value) for value in rank] + [("keep", value) for value in keep]
    given += [("prune", True)] if prune else []
    rules = [*dict.fromkeys(rule for rule, _ in given)]
    if len(rules) > 1:
        raise StructLoRAError(
            f"both `{rules[0]}` and `{rules[1]}`", "one rule for what to drop", "give one of them"
        )
    return {
        f"{rule}-{str(value).replace('%', '-percent')}" if named else "": (rule, value)
        for rule, value in given
    }


@dataclass(frozen=True)
class Options:
    """What holds for every size of one call: see `export.export`."""

    max_rank: int | None = None
    data: str | Path | Sequence[dict] | None = None
    split: str | None = None
    distil: bool | int = False
    scale: float | str | None = None
    server: str | None = None
    dtype: str | None = None
    merge: bool = False
    base: str | None = None
    probe: str = RANDOM

    def refuse_contradictions(self, sizes: Sizes) -> None:
        """Stop at options that contradict each other, are out of range, or act on nothing beside the others.

        Raises:
            StructLoRAError: it names the option.
        """
        rules = {rule for rule, _ in sizes.values()}
        is_smaller = bool(rules & {"rank", "keep"})
        for rule, value in sizes.values():
            if rule == "keep":
                share_to_keep(value)
        whole = [(rule, value) for rule, value in sizes.values() if rule == "rank"]
        for name, value in [*whole, ("max_rank", self.max_rank), ("distil", self.distil)]:
            if value is not None and not isinstance(value, Integral):
                raise StructLoRAError(
                    f"`{name}` {value!r} ({type(value).__name__})",
                    "a whole number; of ranks, `export_sizes` takes several",
                    f"correct `{name}`",
                )
        if self.max_rank is not None and rules != {"keep"}:
            raise StructLoRAError(
                "`max_rank` without `keep`", "`keep`, whose ranks it limits", "give `keep`, or `rank` alone"
            )
        if self.distil and not is_smaller:
            raise StructLoRAError(
                "`distil` without `rank` or `keep`", "a smaller adapter, which learns", "give one of them"
            )
        if (self.distil or 0) < 0:
            raise StructLoRAError(f"{self.distil} steps of `distil`", "a number of steps above 0", "try 100")
        is_number = isinstance(self.scale, Real) and math.isfinite(self.scale) and self.scale > 0
        if self.scale not in (None, AUTO) and not is_number:
            raise StructLoRAError(
                f"`scale` {self.scale!r}", f"'{AUTO}', or a number above 0", "try 'auto', with rows, or 0.7"
            )
        if self.dtype not in (None, *DTYPES):
            raise StructLoRAError(
                f"a dtype {self.dtype!r}", f"one of {', '.join(DTYPES)}", "correct `--dtype`"
            )
        if self.server not in (None, *SERVERS):
            raise StructLoRAError(
                f"a server {self.server!r}", f"one of {', '.join(SERVERS)}", "correct `--for`"
            )
        for name in ("server", "dtype"):
            if self.merge and getattr(self, name) is not None:
                raise StructLoRAError(
                    f"both `merge` and `{name}`",
                    "one of them: a merged model has the base model's own dtype, and every server loads it",
                    "give one of them",
                )
        if self.data is not None and not is_smaller and self.scale != AUTO:
            raise StructLoRAError(
                "`data` without `rank`, `keep` or `scale='auto'`",
                "a smaller adapter, whose loss its rows tell, or a scale that they choose",
                "give one of them, or remove `data`",
            )
        if self.split is not None and self.data is None:
            raise StructLoRAError(
                "`split` without `data`", "rows that have splits", "give `data`, or remove `split`"
            )
        if self.probe != RANDOM and self.data is not None:
            raise StructLoRAError(
                "both `data` and `probe`",
                "one of them: with `data`, its rows are what the change is measured on",
                "remove `probe`",
            )
        if self.probe not in (RANDOM, NO_PROBE) and not rules:
            raise StructLoRAError(
                "`probe` without `rank`, `keep` or `prune`",
                "a smaller adapter, whose cost it measures",
                "give one of them, or remove `probe`",
            )

    def loads_base(self, sizes: Sizes) -> bool:
        """Whether the base model is needed: to merge, or to measure on."""
        is_measured = bool(sizes) and (self.data is not None or self.probe != NO_PROBE)
        return self.merge or self.scale == AUTO or is_measured
