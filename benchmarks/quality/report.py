"""Tables and plots from the store, written into README.md here and docs/benchmarks.md, between their marks.

python -m benchmarks.quality.report                    write them
python -m benchmarks.quality.report --check            fail where they are not what the store gives
python -m benchmarks.quality.report --results FOLDER   print a table of another store's runs
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import plots, store
from .selection import OURS, Runs, test_runs
from .settings import SETTINGS
from .tables import comparison, describe, tables

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DEFAULTS = HERE / "defaults.json"
OVERHEAD = ROOT / "benchmarks" / "cost" / "overhead.json"
COHERENCE = HERE / "coherence.json"
PAGES = (HERE / "README.md", HERE / "smaller.md", ROOT / "docs" / "benchmarks.md")


def written(lines: list[dict]) -> dict[Path, str]:
    """What each file should hold: the pages with their tables, and the defaults with what they are worth."""
    coherence = json.loads(COHERENCE.read_text()) if COHERENCE.exists() else {}
    found = tables(lines, json.loads(OVERHEAD.read_text()), coherence)
    return {
        **{page: fill(page.read_text(), found) for page in PAGES},
        DEFAULTS: json.dumps(earned_defaults(lines), indent=2) + "\n",
    }


def fill(page: str, found: dict[str, str]) -> str:
    """The page with each table between its marks renewed."""
    for name, text in found.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if start in page:
            before, rest = page.split(start)
            page = f"{before}{start}\n\n{text}\n\n{end}{rest.split(end)[1]}"
    return page


def earned_defaults(lines: list[dict]) -> dict:
    """The options that the runs called StructLoRA were made with, and what they are worth against LoRA."""
    ours = [line for line in lines if line["method"] == OURS]
    options = ours[0]["structlora"]
    for line in ours:
        if line["structlora"] != options:
            raise SystemExit(f"runs called StructLoRA with other options than the rest: {store.key_of(line)}")
    runs = test_runs(lines)
    worth = {}
    for setting in SETTINGS:
        accuracy, nll = (runs.differences(setting, OURS, figure) for figure in ("accuracy", "nll"))
        means = {"accuracy": round(float(accuracy.mean()), 3), "nll": round(float(nll.mean()), 5)}
        worth[describe(setting)] = {"seeds": len(accuracy), **means}
    return {"options": options, "test_difference_from_lora": worth}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where something would change"
    )
    parser.add_argument("--results", type=Path, help="print a table of another store's runs instead")
    options = parser.parse_args()
    lines = store.read(options.results or store.RESULTS)
    if not lines:
        raise SystemExit(f"no runs in {options.results}")
    if options.results:
        runs = Runs(lines)
        print(comparison(runs, runs.settings, list(dict.fromkeys(line["method"] for line in lines))))
        return
    wanted = written(lines)
    if options.check:
        stale = [str(path.relative_to(ROOT)) for path, text in wanted.items() if path.read_text() != text]
        if stale:
            raise SystemExit(f"not what the store gives: {', '.join(stale)}. Run `make bench-report`.")
        return
    for path, text in wanted.items():
        path.write_text(text)
    plots.draw(test_runs(lines), HERE / "plots")
    print(f"{len(lines)} runs; wrote {', '.join(str(p.relative_to(ROOT)) for p in wanted)} and plots/")


if __name__ == "__main__":
    main()
