"""Run examples/quickstart.ipynb and store its outputs, which the site shows (`python docs/run_notebook.py`, half an hour)."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


# What the libraries of this environment log, which IPython gives as output of a `!command`.
LOGGED = (sys.prefix, "[WARNING]", "Failed to load", "_pytree.py", "Loading weights:")


# A progress bar; and times, which other work on the same processor changes.
BAR = re.compile(r"\d+%\|")
TIME = re.compile(r"'(?:eval|train)_(?:runtime|\w+_per_second)': '[^']*', ")


def _is_read(output: dict) -> bool:
    text = output.get("text", "")
    return (
        output.get("name") != "stderr" and not BAR.search(text) and not any(part in text for part in LOGGED)
    )


def clean(cell: dict) -> None:
    """Leave what readers need of a cell's outputs: no warnings of libraries, no progress bars, no times."""
    cell.outputs = [output for output in cell.outputs if _is_read(output)]
    for output in cell.outputs:
        if "text" in output:
            output.text = TIME.sub("", output.text)


def run() -> None:
    """Execute every cell in a folder that is thrown away, and store what `clean` leaves of its outputs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    # For the notebook's `!structlora`, as in an environment that is activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "demo").symlink_to(ROOT / "examples" / "demo")
        NotebookClient(notebook, timeout=None, resources={"metadata": {"path": folder}}).execute()
    count = 0
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type != "code":
            continue
        clean(cell)
        if cell.execution_count:
            count += 1
            cell.execution_count = count
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    run()
    print(f"{NOTEBOOK}: outputs stored")
