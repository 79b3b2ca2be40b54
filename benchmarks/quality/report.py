"""Tables and the plot from the store, written into the pages that show them, between their marks.

python -m benchmarks.quality.report                    write them
python -m benchmarks.quality.report --check            fail where they are not what the store gives
python -m benchmarks.quality.report --results FOLDER   print another store's runs
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

from . import plots, store
from .selection import Runs
from .tables import markdown, tables

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OVERHEAD = ROOT / "benchmarks" / "cost" / "overhead.json"
COHERENCE = HERE / "coherence.json"
PAGES = (
    *(HERE / f"{name}.md" for name in ("README", "appendix", "smaller")),
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "index")),
)


def written(lines: list[dict]) -> dict[Path, str]:
    """What each page should hold."""
    coherence = json.loads(COHERENCE.read_text()) if COHERENCE.exists() else {}
    found = tables(lines, json.loads(OVERHEAD.read_text()), coherence)
    return {page: fill(page.read_text(), found) for page in PAGES}


def fill(page: str, found: dict[str, str]) -> str:
    """The page with each table between its marks renewed."""
    for name, text in found.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if start in page:
            before, rest = page.split(start)
            page = f"{before}{start}\n\n{text}\n\n{end}{rest.split(end)[1]}"
    return page


def shown(lines: list[dict]) -> str:
    """All runs as a table: test figures, mean over seeds."""
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
    if options.check:
        stale = [str(path.relative_to(ROOT)) for path, text in wanted.items() if path.read_text() != text]
        if stale:
            raise SystemExit(f"not what the store gives: {', '.join(stale)}. Run `make bench-report`.")
        return
    for path, text in wanted.items():
        path.write_text(text)
    plots.draw(Runs(lines), HERE / "plots")
    print(f"{len(lines)} runs; wrote {', '.join(str(p.relative_to(ROOT)) for p in wanted)} and plots/")


if __name__ == "__main__":
    main()
