# /// script
# requires-python = ">=3.10"
# dependencies = ["structlora-trl[plot]", "gradio"]
# [tool.uv.sources]
# structlora-trl = { path = "..", editable = true }
# ///
"""A page in the browser to look into adapters: `structlora inspect --html` behind two text boxes (Gradio)."""

import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

import gradio as gr


def report(adapter: str, against: str = "") -> str:
    """The report page of one adapter, or of two side by side, as HTML for Gradio."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        command = [sys.executable, "-m", "structlora_trl.cli", "inspect", adapter, "--html", str(page)]
        done = subprocess.run(
            [*command, *(["--against", against] if against else [])], capture_output=True, text=True
        )
        if done.returncode:
            raise gr.Error(done.stderr.strip())  # what was found, what was expected, what to do
        content = escape(page.read_text(encoding="utf-8"))
    # A frame keeps the page's style to itself.
    return f'<iframe style="width:100%;height:85vh;border:0" srcdoc="{content}"></iframe>'


app = gr.Interface(
    report,
    [
        gr.Textbox(label="Adapter or checkpoint", placeholder="out"),
        gr.Textbox(label="Against", placeholder="lora"),
    ],
    gr.HTML(label="Report"),
    title="What an adapter has learned",
    flagging_mode="never",
)

if __name__ == "__main__":
    app.launch()
