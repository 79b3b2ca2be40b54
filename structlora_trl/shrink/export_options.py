"""Options of `export`, each written once: a field's help is its manual, in Python and on the command line.

It needs no torch: the command line makes its arguments of the fields, and refuses contradictions before anything is loaded.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from ..config import share_to_keep
from ..errors import StructLoRAError, refusing

AUTO, NO_ROWS = "auto", "none"
SERVERS = ("vllm", "sglang", "lorax", "llamacpp")  # those of `servers.py`
DTYPES = ("float32", "bfloat16", "float16")


def _option(help: str, default=None, flag: str | None = None, **argument):
    """A field; its flag where it is not the field's name, and what argparse needs beside the help."""
    return field(default=default, metadata={"help": help, "flag": flag, "argument": argument})


@dataclass
class Options:
    """What `export` writes.

    Raises:
        StructLoRAError: options that contradict each other, are out of range, or act on nothing.

    Args:"""

    rank: int | Sequence[int] | None = _option(
        "One rank for all modules, which is what LoRA servers pay for. Several sizes are written to folders of their own.",
        type=int,
        nargs="+",
    )
    keep: float | str | Sequence[float | str] | None = _option(
        "The share of all directions (0.25) that matters most over the whole model, or the fewest that carry a share of what "
        "matters (99%). Ranks differ then, and a module that keeps nothing is left out, where PEFT can do without it: the "
        "smallest file for a given loss, and no smaller in a server's memory.",
        nargs="+",
    )
    prune: bool = _option(
        "Drop directions that add nothing: those that `keep` closed while training.",
        default=False,
        action="store_true",
    )
    max_rank: int | None = _option(
        "With `keep`, the most directions of a module; the best of the others take their place.", type=int
    )
    data: str | Path | Sequence[dict] | None = _option(
        "Rows: a file (.jsonl, .json, .csv, .tsv, .parquet), a folder of them, or a data set of the hub, with `messages`, "
        "`prompt` and `completion`, `text`, or `chosen` and `rejected`; for classifiers `text` and `label`. From Python also "
        "inputs of the model with `labels`. 64 choose for `keep`, up to 1,024 teach for `distil`, and the loss is of 64 others. "
        "Where omitted, those that the run held out, if its log names them; 'none': not these either."
    )
    split: str | None = _option("Split of `data`; where omitted test, validation or train.")
    distil: bool | int = _option(
        "With `rank` or `keep`: let the smaller adapter learn the outputs of the whole one on the rows, for this many steps, "
        "or 100. No labels are needed. One row in eight is held out, and the weights that are best on these are kept.",
        default=False,
        type=int,
        nargs="?",
        const=True,
    )
    scale: float | str | None = _option(
        "Multiply the update by this number, which goes into lora_B; 'auto': by the one of 1, 0.85, 0.7, 0.5 and 0.3 at which "
        "the loss is lowest on rows that were held out of the training. Weights that are saved whole stay as they are."
    )
    server: str | None = _option(
        "Write what this server loads, or say what it cannot: vllm, sglang, lorax (TGI too) or llamacpp. All but vllm need one "
        "rank: smaller modules are filled up with zeros.",
        flag="--for",
    )
    dtype: str | None = _option("float32, bfloat16 or float16; where omitted, as it is.")
    merge: bool = _option(
        "Write the base model with the adapter merged into it.", default=False, action="store_true"
    )
    base: str | None = _option(
        "Base model to measure on and to merge into; where omitted, the one that adapter_config.json names."
    )

    def __post_init__(self):
        rules = [name for name in ("rank", "keep") if getattr(self, name) is not None]
        rules += ["prune"] if self.prune else []
        self.rule = rules[0] if rules else None
        if self.rule == "keep":
            for share in self.sizes.values():
                share_to_keep(share)
        if self.scale not in (None, AUTO):
            with refusing("reading `scale`", f"'{AUTO}' or a number", "correct `scale`"):
                self.scale = float(self.scale)
        is_scale = self.scale in (None, AUTO) or 0 < self.scale < math.inf
        one_of_servers, one_of_dtypes = (f"one of {', '.join(known)}" for known in (SERVERS, DTYPES))
        problems = [
            (len(rules) > 1, "more than one of `rank`, `keep` and `prune`", "one rule for what to drop"),
            (self.max_rank is not None and self.rule != "keep", "`max_rank` without `keep`", "both"),
            (self.distil and not self.is_cut, "`distil` without `rank` or `keep`", "both"),
            (not is_scale, f"`scale` {self.scale}", f"'{AUTO}' or a number above 0"),
            (self.dtype not in (None, *DTYPES), f"a dtype {self.dtype!r}", one_of_dtypes),
            (self.server not in (None, *SERVERS), f"a server {self.server!r}", one_of_servers),
            (
                self.merge and (self.server or self.dtype),
                "`merge` beside `server` or `dtype`",
                "`merge` alone: it writes the base model's own dtype, which every server loads",
            ),
            (
                self.has_data and not self.is_cut and self.scale != AUTO,
                "`data` without `rank`, `keep` or `scale='auto'`",
                "something that its rows measure or choose",
            ),
            (self.split and not self.has_data, "`split` without `data`", "both"),
        ]
        for is_wrong, found, expected in problems:
            if is_wrong:
                raise StructLoRAError(found, expected, "correct or remove one of the options")

    @property
    def is_cut(self) -> bool:
        """True if directions are to be dropped that add something."""
        return self.rule in ("rank", "keep")

    @property
    def has_data(self) -> bool:
        """True if rows are given."""
        return self.data is not None and not (isinstance(self.data, str) and self.data == NO_ROWS)

    @property
    def sizes(self) -> dict[str, int | float | str | bool | None]:
        """Folder of each size within the output, empty if there is one size -> its rank or share."""
        values = getattr(self, self.rule) if self.rule else None
        values = values if isinstance(values, (list, tuple)) else [values]
        if len(values) == 1:
            return {"": values[0]}
        return {f"{self.rule}-{value}".replace("%", "-percent"): value for value in values}


# Dedented by hand, as Python 3.13 does it.
Options.__doc__ = inspect.cleandoc(Options.__doc__) + "".join(
    f"\n    {f.name} (`{f.type}`, *optional*, defaults to `{f.default!r}`):\n        {f.metadata['help']}"
    for f in fields(Options)
)
