"""Lines of code (neither blank, nor comment, nor docstring), and how many comments stand beside them.

python -m benchmarks.cost.lines
"""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "structlora_trl"
OF_A_STEP = [f"{PACKAGE}/{name}" for name in ("core", "engines", "runtime.py", "mapped_side.py", "gating.py")]
PARTS = {
    PACKAGE: [PACKAGE],
    "  core, engines, runtime, mapped side, gating": OF_A_STEP,
    **{folder: [folder] for folder in ("tests", "benchmarks", "integrations")},
}
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def main() -> None:
    print(f"{'':46}{'code':>8}{'comments per line':>20}")
    for part, places in PARTS.items():
        files = [file for place in places for file in ([ROOT / place, *(ROOT / place).rglob("*.py")])]
        found = [count(file.read_text(encoding="utf-8")) for file in files if file.suffix == ".py"]
        code, comments = map(sum, zip(*found, strict=True))
        print(f"{part:46}{code:8,}{comments / code:20.3f}")


def count(source: str) -> tuple[int, int]:
    """Return how many lines of code and how many comments a file has."""
    lines, comments = set(), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments += 1
        elif token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines.difference_update(range(docstring.lineno, docstring.end_lineno + 1))
    return len(lines), comments


if __name__ == "__main__":
    main()
