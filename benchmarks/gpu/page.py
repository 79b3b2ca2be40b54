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
    machine, on_gpu = report["machine"], report["machine"]["device"] == "cuda"
    lines = (
        ["# StructLoRA on a GPU", ""] if on_gpu else ["# StructLoRA, rehearsed on a CPU", "", REHEARSAL, ""]
    )
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(report["outcomes"].items()))
    lines += [f"{outcomes}, in {report['seconds']:.0f} seconds.", ""]
    lines += [f"* {gpu}" for gpu in machine.get("gpus", [])]
    lines += [f"* {name} {machine[name]}" for name in ("cuda", "nccl", "python", "system") if name in machine]
    lines += ["* " + ", ".join(f"{name} {version}" for name, version in machine["packages"].items()), ""]
    for part, found in report["parts"].items():
        lines += [f"## {TITLES[part]}", "", f"{found['seconds']:.0f} seconds of {found['at most']:.0f}.", ""]
        lines += [
            "| what | outcome | figures | seconds |",
            "|---|---|---|---|",
            *map(_line, found["rows"]),
            "",
        ]
        for row in found["rows"]:
            if row["outcome"] == rows.FAILED:
                reason = row["reason"].replace("```", "'''")
                lines += [f"`{row['name']}` failed:", "", "```text", reason, "```", ""]
    return "\n".join(lines)


def _line(row: dict) -> str:
    outcome = f"skipped: {row['reason']}" if row["outcome"] == rows.SKIPPED else row["outcome"]
    figures = "; ".join(f"{name} {_value(value)}" for name, value in row["figures"].items())
    cells = (row["name"], outcome, figures, f"{row['seconds']:.1f}")
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _value(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return " to ".join(map(_value, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
