"""Write when-refused.md: every error of the package with its remedy, read from the source (`python docs/refusals.py`).

Each call of `StructLoRAError(found, expected, remedy)` gives a row. What a message fills in when it is raised stands as
`<placeholder>`; text that only some cases have, in `[brackets]`; either of two texts, `one / other`. Names that hold text are
looked up: in the branches of the function around the call (a row for each branch), and, where they are the function's
parameters, at its callers (a row for each).
"""

from __future__ import annotations

import ast
import re
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
HOMES = [ROOT / "structlora_trl", ROOT / "integrations"]
PAGE = ROOT / "docs" / "when-refused.md"
INTRODUCTION = """# Error messages

StructLoRA never falls back to plain LoRA in silence. Where it cannot act as asked it stops with a `StructLoRAError`:

    StructLoRA found <what it met>. Expected <what it needs>. Fix: <what to do>.

All of them stand here, by what you were doing. Under each heading, **search words** are the names that its messages
use. To look up a message, search this page for a few words of it that are not names of your own: `<...>` is filled in
when it happens, `[...]` is not in every message, and `one / other` is either of two. Where another library failed, the
message quotes it in brackets. `STRUCTLORA_TRACEBACK=1` in the environment shows where an error of the command line
comes from. The page is made from the source by `python docs/refusals.py`.
"""
# What a user was doing -> paths of the source, by their beginnings. The longest beginning wins.
GROUPS = {
    "Starting a command: arguments, files, model": ("structlora_trl/cli/", "structlora_trl/errors"),
    "Giving it data": (
        "structlora_trl/cli/data",
        "structlora_trl/adapters/rows",
        "structlora_trl/adapters/cells",
    ),
    "Choosing options": (
        "structlora_trl/config",
        "structlora_trl/yaml_block",
        "structlora_trl/trainers/mixin",
    ),
    "Attaching to a model and its optimizer": (
        "structlora_trl/attachment",
        "structlora_trl/core/",
        "structlora_trl/engines/",
    ),
    "Training": ("structlora_trl/", "structlora_trl/trainers/"),
    "Training in several processes, with DeepSpeed or FSDP": (
        "structlora_trl/rank_check",
        "structlora_trl/engines/deepspeed",
        "structlora_trl/engines/fsdp2",
        "structlora_trl/engines/sharded",
        "structlora_trl/engines/slic",
        "structlora_trl/engines/replicated",
    ),
    "Saving, resuming, checkpoints": ("structlora_trl/state",),
    "Looking into an adapter, or making it smaller (`inspect`, `export`)": (
        "structlora_trl/adapters/",
        "structlora_trl/cli/export",
        "structlora_trl/cli/inspect",
    ),
    "Axolotl, LLaMA-Factory, ms-swift": ("integrations/",),
}
# Of functions that serve another purpose than the file they stand in.
OF_FUNCTION = {
    "last_checkpoint": "Saving, resuming, checkpoints",
    "local_data": "Giving it data",
    "form_of": "Giving it data",
    "count_rows": "Giving it data",
    "_read": "Giving it data",
    "refuse_unwritable": "Saving, resuming, checkpoints",
    "refuse_unwritable_file": "Looking into an adapter, or making it smaller (`inspect`, `export`)",
    "writing": "Looking into an adapter, or making it smaller (`inspect`, `export`)",
    "_looking_at": "Looking into an adapter, or making it smaller (`inspect`, `export`)",
    "refuse_used": "Looking into an adapter, or making it smaller (`inspect`, `export`)",
}
COMMON = {"structlora", "class", "key", "NAME", "super"}  # words that nobody searches for


class Refusal(NamedTuple):
    """One row: the three parts of an error."""

    found: str
    expected: str
    remedy: str
    group: str  # of `GROUPS`


def refusals() -> list[Refusal]:
    """Every error of the package, by what the user was doing; within a group, in the order of its first words.

    Raises:
        ValueError: a call that does not name all three parts.
    """
    paths = [
        path
        for home in HOMES
        for path in sorted(home.rglob("*.py"))
        if "tests" not in path.relative_to(ROOT).parts
    ]
    modules = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    constants = {
        name: text
        for module in modules.values()
        for name, text in _texts(module.body, {}).items()
        if name.isupper()
    }
    rows: dict[Refusal, None] = {}  # no row twice, in order
    for path, module in modules.items():
        known = {**constants, **_texts(module.body, {})}
        for function, call in _calls(module, "StructLoRAError"):
            parts = _arguments(call, ("found", "expected", "remedy"))
            if len(parts) != 3:
                raise ValueError(f"{path}:{call.lineno}: cannot tell found, expected and remedy apart")
            for parameters, caller in _bindings(function, path, modules):
                for names in _branches(function, parts.values(), {**known, **parameters}):
                    texts = [_text(part, names) for part in parts.values()]
                    rows[Refusal(*texts, _group(caller, function))] = None
    order = [*GROUPS]
    return sorted(rows, key=lambda row: (order.index(row.group), [_plain(part) for part in row[:3]]))


def page() -> str:
    """The whole page, Markdown: a table for each group, under its search words."""
    lines = [INTRODUCTION.rstrip()]
    for group, rows in ((group, [*rows]) for group, rows in groupby(refusals(), lambda row: row.group)):
        lines += [f"\n## {group}\n", f"**Search words:** {', '.join(f'`{word}`' for word in _names(rows))}\n"]
        lines += ["| found | expected | fix |", "|---|---|---|"]
        lines += [f"| {' | '.join(map(_escape, row[:3]))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _group(path: Path, function: ast.FunctionDef | None) -> str:
    """What a user was doing who meets an error of this file and function."""
    if function is not None and function.name in OF_FUNCTION:
        return OF_FUNCTION[function.name]
    name = path.relative_to(ROOT).as_posix()
    fitting = [
        (len(start), group) for group, starts in GROUPS.items() for start in starts if name.startswith(start)
    ]
    return max(fitting)[1]


def _names(rows: list[Refusal]) -> list[str]:
    """Names of arguments, options and functions in the messages, in the order of the alphabet."""
    text = " ".join(" ".join(row[:3]) for row in rows)
    marked = re.findall(r"`-*([A-Za-z_][\w.-]*)(?:[(:=]|`| )", text)
    given = re.findall(r"(?<![\w<])([a-z]+(?:_[a-z]+)+)=", text)
    return sorted({word.rstrip(".") for word in (*marked, *given)} - COMMON, key=str.lower)


def _plain(text: str) -> str:
    """A message as it is looked up: without marks of code, in small letters."""
    return text.lstrip("`-[ ").lower()


def _calls(module: ast.Module, name: str) -> list[tuple[ast.FunctionDef | None, ast.Call]]:
    """Calls of a function or method of that name, each with the innermost function it stands in."""
    found = []

    def visit(node: ast.AST, function: ast.FunctionDef | None) -> None:
        if isinstance(node, ast.Call) and name in (
            getattr(node.func, "id", None),
            getattr(node.func, "attr", None),
        ):
            found.append((function, node))
        for child in ast.iter_child_nodes(node):
            visit(child, node if isinstance(node, ast.FunctionDef) else function)

    visit(module, None)
    return found


def _arguments(call: ast.Call, names: tuple[str, ...]) -> dict[str, ast.expr]:
    given = dict(zip(names, call.args, strict=False)) | {k.arg: k.value for k in call.keywords}
    return {name: given[name] for name in names if name in given and not isinstance(given[name], ast.Starred)}


def _bindings(
    function: ast.FunctionDef | None, path: Path, modules: dict[Path, ast.Module]
) -> list[tuple[dict[str, str], Path]]:
    """What the callers of a function pass it as text, and the callers' files: one for each caller, or one without text."""
    if function is None:
        return [({}, path)]
    positional = [a.arg for a in function.args.args if a.arg not in ("self", "cls")]
    defaults = dict(zip(positional[::-1], function.args.defaults[::-1], strict=False))
    names = (*positional, *(a.arg for a in function.args.kwonlyargs))
    callers = [(call, path) for call in _calls(modules[path], function.name)]
    callers = callers or [(call, p) for p, other in modules.items() for call in _calls(other, function.name)]
    bound = []
    for (caller, call), home in callers:
        there = _branches(caller, [], {})[0]
        given = {**defaults, **_arguments(call, names)}
        texts = {name: _text(value, there) for name, value in given.items() if _is_text(value, there)}
        bound.append((texts, home if texts else path))
    return bound or [({}, path)]


def _branches(function: ast.FunctionDef | None, parts, parameters: dict[str, str]) -> list[dict[str, str]]:
    """Texts that names hold in a function: a dict for each branch that sets one of the parts, or one for all."""
    blocks = [
        block
        for node in (ast.walk(function) if function else ())
        for block in (getattr(node, "body", None), getattr(node, "orelse", None))
        if isinstance(block, list)
    ]
    wanted = {part.id for part in parts if isinstance(part, ast.Name)}
    common, cases = dict(parameters), []
    for block in blocks:
        texts = _texts(block, common)
        if wanted & texts.keys():
            cases.append(texts)
        if not wanted & texts.keys() or block is function.body:
            common |= texts
    whole = [{**common, **case} for case in cases if wanted <= {*common, *case}]
    return whole or [common]


def _texts(block: list[ast.stmt], known: dict[str, str]) -> dict[str, str]:
    """Names that a block sets to texts."""
    texts: dict[str, str] = {}
    for statement in block:
        if not isinstance(statement, (ast.Assign, ast.AnnAssign)):
            continue
        target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
        several = isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple)
        for name, value in (
            zip(target.elts, statement.value.elts, strict=True) if several else [(target, statement.value)]
        ):
            if isinstance(name, ast.Name) and _is_text(value, {**known, **texts}):
                texts[name.id] = _text(value, {**known, **texts})
    return texts


def _is_text(node: ast.expr, names: dict[str, str]) -> bool:
    if isinstance(node, ast.IfExp):
        return _is_text(node.body, names) and _is_text(node.orelse, names)
    if isinstance(node, ast.Name):
        return node.id in names
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _text(node: ast.expr, names: dict[str, str]) -> str:
    """What an expression puts into a message."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, names) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, names)
    if isinstance(node, ast.IfExp):
        one, other = _text(node.body, names), _text(node.orelse, names)
        return f"{one} / {other}" if one and other else f"[{one or other}]"
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    return f"<{_words(node)}>"


def _words(node: ast.AST) -> str:
    """A readable name for a value that is known only when the error is raised."""
    match node:
        case ast.Name():
            return node.id.strip("_").replace("_", " ").lower()
        case ast.Attribute(attr="__name__") | ast.Subscript():
            return _words(node.value)
        case ast.Attribute():
            owner = "" if getattr(node.value, "id", None) in ("self", "cls") else f"{_words(node.value)} "
            return owner + node.attr.strip("_").replace("_", " ")
        case ast.Call(func=ast.Name(id="type")):
            return f"type of {_words(node.args[0])}"
        case ast.Call(func=ast.Name(id="len")):
            return f"number of {_words(node.args[0])}"
        case ast.Call(func=ast.Attribute(attr="join"), args=[several]):
            return f"{_words(several)}, ..."
        case ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant(value=key), *_]):
            return key
        case ast.Call(func=ast.Name(id="map"), args=[_, values]):
            return _words(values)
        case ast.Call(func=ast.Attribute(value=owner)) if getattr(owner, "id", None) not in ("self", "cls"):
            return _words(node.args[0] if node.args and not isinstance(node.args[0], ast.Constant) else owner)
        case ast.Call():
            return _words(node.args[0] if node.args else node.func)
        case ast.BinOp():
            return _words(node.left)
        case ast.BoolOp():
            return _words(node.values[0])
        case ast.JoinedStr():
            return "".join(_words(part) for part in node.values)
        case ast.Constant():
            return str(node.value).replace("`", "")
        case ast.GeneratorExp() | ast.ListComp():
            each, source = _words(node.elt), node.generators[0]
            return _words(source.iter) if each == _words(source.target) else each
        case ast.FormattedValue():
            return _words(node.value)
    return ast.unparse(node)


def _escape(text: str) -> str:
    """For a cell of a Markdown table: outside code, `<` and `*` are escaped."""
    pieces = text.replace("|", r"\|").split("`")
    pieces[::2] = [piece.replace("<", r"\<").replace("*", r"\*") for piece in pieces[::2]]
    return "`".join(pieces)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {len(refusals())} errors")
