"""The Markdown page of a report."""

from __future__ import annotations

from . import rows

TITLES = {
    "promises": "Promises",
    "engines": "Several processes",
    "around": "What LoRA is trained with",
    "cost": "Time and memory",
}
REHEARSAL = (
    "**A rehearsal on a CPU** (gloo for NCCL, the CPU's autocast and GradScaler, tiny shapes). Nothing on "
    "this page was measured on a GPU."
)


def write(report: dict) -> str:
    """Markdown of a report as `benchmarks.gpu` writes it to JSON."""
    machine = report["machine"]
    lines = [
        "# StructLoRA on a GPU"
        if machine["device"] == "cuda"
        else "# StructLoRA on a CPU, as a rehearsal for a GPU",
        "",
    ]
    if machine["device"] != "cuda":
        lines += [REHEARSAL, ""]
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(report["outcomes"].items()))
    lines += [f"{outcomes}, in {report['seconds']:.0f} seconds.", ""]
    lines += [f"* {gpu}" for gpu in machine.get("gpus", [])]
    lines += [f"* {name} {machine[name]}" for name in ("cuda", "nccl", "python", "system") if name in machine]
    lines += ["* " + ", ".join(f"{name} {version}" for name, version in machine["packages"].items()), ""]
    for part, found in report["parts"].items():
        lines += [f"## {TITLES[part]}", "", f"{found['seconds']:.0f} seconds of {found['at most']:.0f}.", ""]
        lines += ["| what | outcome | figures | seconds |", "|---|---|---|---|"]
        lines += [_line(row) for row in found["rows"]] + [""]
        for row in found["rows"]:
            if row["outcome"] == rows.FAILED:
                lines += [
                    f"`{row['name']}` failed:",
                    "",
                    "```text",
                    row["reason"].replace("```", "'''"),
                    "```",
                    "",
                ]
    return "\n".join(lines)


def _line(row: dict) -> str:
    outcome = row["outcome"]
    if outcome == rows.SKIPPED:
        outcome += f": {row['reason']}"
    figures = "; ".join(f"{name} {_value(value)}" for name, value in row["figures"].items())
    return (
        "| "
        + " | ".join(_cell(text) for text in (row["name"], outcome, figures, f"{row['seconds']:.1f}"))
        + " |"
    )


def _value(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return " to ".join(map(_value, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
