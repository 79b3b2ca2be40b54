"""Tables from the store, written into the pages that show them, between their marks.

python -m benchmarks.quality.report                    write them
python -m benchmarks.quality.report --check            fail where they are not what the store gives
python -m benchmarks.quality.report --results FOLDER   print another store's runs
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

from . import store
from .tables import markdown, tables

ROOT = Path(__file__).resolve().parents[2]
OVERHEAD = ROOT / "benchmarks" / "cost" / "overhead.json"
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "benchmarks-by-place", "index")),
)


def written(lines: list[dict]) -> dict[Path, str]:
    """Return what each page should hold."""
    found = tables(lines, json.loads(OVERHEAD.read_text()))
    return {page: fill(page.read_text(), found) for page in PAGES}


def fill(page: str, found: dict[str, str]) -> str:
    """Return the page with each table between its marks renewed; a mark without an end gets one."""
    for name, text in found.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if start in page:
            before, rest = page.split(start)
            after = rest.split(end)[1] if end in rest else rest
            page = f"{before}{start}\n\n{text.strip()}\n\n{end}{after}"
    return page


def shown(lines: list[dict]) -> str:
    """Return all runs as a table: test figures, mean over seeds."""
    key = [name for name in store.KEY if name != "seed"]
    runs = pd.json_normalize([{**line, "structlora": None} for line in lines]).groupby(key)
    found = runs[["test.accuracy", "test.nll"]].mean().assign(seeds=runs.size()).reset_index()
    return markdown(list(found), found.round(4).to_numpy().tolist())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where something would change"
    )
    parser.add_argument("--results", type=Path, help="print another store's runs instead")
    options = parser.parse_args()
    lines = store.read(options.results or store.RESULTS)
    if not lines:
        raise SystemExit(f"no runs in {options.results}")
    if options.results:
        print(shown(lines))
        return
    wanted = written(lines)
    stale = [path for path, text in wanted.items() if path.read_text() != text]
    names = ", ".join(str(path.relative_to(ROOT)) for path in stale) or "nothing"
    if options.check and stale:
        raise SystemExit(f"not what the store gives: {names}. Run `make bench-report`.")
    for path in stale:
        path.write_text(wanted[path])
    print(f"{len(lines)} runs; wrote {names}")


if __name__ == "__main__":
    main()
