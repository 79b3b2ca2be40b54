"""`structlora inspect --html`: one page with all figures in it."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
from safetensors.torch import load_file

from structlora_trl.cli import main
from structlora_trl.core.kinds import short_names
from structlora_trl.shrink.load_adapter import read_saved
from structlora_trl.shrink.trial import information_curves
from structlora_trl.state import STATE_NAME
from tests.support.adapters import DEPTHS, KINDS, RANK, on_base
from tests.support.data import texts, write_rows
from tests.support.tiny import FAMILIES

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from structlora_trl.shrink.figures import Run, charts

VOID = {"meta", "img"}


class Page(HTMLParser):
    """What a page holds; unbalanced elements are an error."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.images, self.rows = [], set(), [], []
        self.feed(text)
        assert not self.open
        self.facts = {row[0]: row[1:] for row in self.rows}

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.images += [value for name, value in attributes if name == "src"]
        assert not {"href", "xlink:href"} & dict(attributes).keys()
        if tag == "tr":
            self.rows.append([])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, text):
        if "tr" in self.open and text.strip():
            self.rows[-1].append(text.strip())


def test_the_page_holds_everything(runs, plain_adapter, tmp_path):
    """Of a run, beside the same adapter without its state in a folder with an awkward name."""
    other, path = plain_adapter.rename(tmp_path / "<b>plain & simple"), tmp_path / "page.html"
    assert main(["inspect", str(runs()), "--html", str(path), "--against", str(other)]) == 0
    text = path.read_text()
    parsed = Page(text)
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert "&lt;b&gt;plain &amp; simple" in text and "b" not in parsed.tags
    assert "test_split_size: 0.1" in text  # what would give a held-out loss
    titles = ["What the gates let through", "Training", *WITHOUT_STATE]
    assert re.findall("<h2>(.*?)</h2>", text) == titles and len(parsed.images) == len(titles) - 2
    for image in parsed.images:
        kind, _, content = image.partition(",")
        assert kind == "data:image/svg+xml;base64" and b"<svg" in base64.b64decode(content)
    rows = [row for row in parsed.rows if row[0].startswith("model.layers.")]
    assert len(rows) == len(KINDS) * DEPTHS * 2


WITHOUT_STATE = ["What a smaller adapter keeps", "Norm", "Similarity over depth", "Facts", "Modules"]


def test_one_run_and_no_log_in_a_new_folder(plain_adapter, tmp_path):
    page = tmp_path / "a" / "new" / "page.html"
    assert main(["inspect", str(plain_adapter), "--html", str(page)]) == 0
    assert re.findall("<h2>(.*?)</h2>", page.read_text()) == WITHOUT_STATE


def test_which_run_did_better(runs, tmp_path):
    """Facts of both runs from their logs; a plain LoRA run has steps too."""
    path, folders = tmp_path / "page.html", {name: tmp_path / name for name in ("first", "second")}
    for folder in folders.values():
        shutil.copytree(runs(), folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    (folders["second"] / STATE_NAME).unlink()

    def page(*ends: tuple[float, float, int]) -> str:
        for folder, (training, held_out, step) in zip(folders.values(), ends, strict=True):
            log = [{"step": 6, "loss": training, "learning_rate": 0.5}, {"step": step, "eval_loss": held_out}]
            (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
        given = [str(folders["first"]), "--against", str(folders["second"])]
        assert main(["inspect", *given, "--html", str(path)]) == 0
        return path.read_text()

    text = page((2.5, 2.25, 9), (2.0, 2.75, 9))
    assert "first 2.25 after 9 steps, second 2.75 after 9 steps. One seed each" in text
    facts = Page(text).facts
    tensors = load_file(folders["first"] / "adapter_model.safetensors").values()
    base = json.loads((folders["first"] / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base not in text  # a folder of this machine
    assert {name: facts[name] for name in facts.keys() & EXPECTED.keys()} == EXPECTED | {
        "parameters": [f"{sum(tensor.numel() for tensor in tensors):,}"] * 2
    }
    assert "second 2 after 7 steps. Runs of different lengths cannot be compared" in page(
        (2, 2, 9), (2, 2, 7)
    )


EXPECTED = {
    "base model": ["base"] * 2,
    "r": [str(RANK)] * 2,
    "directions": [str(RANK * DEPTHS * len(KINDS))] * 2,
    "parameters": [],
    "learning rate": ["0.5"] * 2,
    "steps": ["9"] * 2,
    "training loss at the end": ["2.5", "2"],
    "held-out loss at the end": ["2.25", "2.75"],
    "coordinator": ["gcn", "-"],
}


def test_sizes_are_measured_on_rows(plain_adapter, runs):
    """The page has the information and the loss at each size; all of the adapter has the loss of plain PEFT."""
    rows = [{"input_ids": x[None], "labels": x[None]} for x in FAMILIES["llama"].batch(3)["input_ids"]]
    saved = read_saved(plain_adapter)
    curves = information_curves(saved, rows, str(runs().parent / "base"))
    carried, losses = (curve.orders for curve in curves)
    assert all(points[0] == (0, 0) and points[-1] == (1, pytest.approx(1)) for points in carried.values())
    # None beats the most informative.
    best, by_norm, one_rank = carried.values()
    assert all(a[1] >= b[1] - 1e-6 for a, b in zip(best, by_norm, strict=True))
    shared = dict(best).keys() & dict(one_rank).keys()
    assert shared >= {0, 1} and all(dict(best)[x] >= dict(one_rank)[x] - 1e-6 for x in shared)
    model = on_base(plain_adapter, runs().parent / "base")
    expected = sum(float(model(**row).loss) for row in rows) / len(rows)
    assert [points[-1] for points in losses.values()] == [(1, pytest.approx(expected, abs=1e-5))] * 3
    with model.disable_adapter():
        alone = sum(float(model(**row).loss) for row in rows) / len(rows)
    assert curves[1].levels == {"base model": pytest.approx(alone, abs=1e-5)}
    assert SIZES == sizes_of(charts([Run("run", saved, curves)]))


SIZES = ["share of the information", "loss", "share of the updates' squared norm"]


def sizes_of(drawn) -> list[str]:
    figure = next(chart.figure for chart in drawn if chart.key == "size")
    return [axes.get_title() for axes in figure.axes]


def test_the_page_shows_sizes_on_the_rows_of_a_file(plain_adapter, runs, tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl", texts())
    seen = []
    monkeypatch.setattr("structlora_trl.shrink.page.charts", lambda runs: seen.extend(charts(runs)) or seen)
    given = ["--data", str(tmp_path / "rows.jsonl"), "--base", str(runs().parent / "base")]
    assert main(["inspect", str(plain_adapter), "--html", str(tmp_path / "page.html"), *given]) == 0
    assert sizes_of(seen) == SIZES


@pytest.mark.parametrize(
    "option",
    [
        ["--data", "rows.jsonl"],
        ["--html", "page.html", "--base", "model"],
        ["--json", "--against", "another"],
    ],
)
def test_an_option_without_effect_is_refused(option, runs, capsys):
    assert main(["inspect", str(runs()), *option]) == 2
    assert option[-2] in capsys.readouterr().err


def test_another_run_has_to_exist(runs, tmp_path, capsys):
    missing = str(tmp_path / "missing")
    given = ["inspect", str(runs()), "--against", missing, "--html", str(tmp_path / "page.html")]
    assert main(given) == 1
    told = capsys.readouterr()
    assert missing in told.err and not told.out  # at once, not below the first run's tables


ODD = {  # name -> the log
    "_run": [],
    "one step": [{"step": 1, "loss": 2.0}],
    "$odd$ < numbers & more": [
        {"step": step, "loss": loss} for step, loss in enumerate([math.nan, math.inf, 0.0, -1.0, 1e30])
    ],
}


@pytest.mark.parametrize("name", ODD)
def test_figures_of_odd_values_and_names(name, plain_adapter, tmp_path):
    log = json.dumps({"log_history": ODD[name]})
    (plain_adapter / "trainer_state.json").write_text(log)
    drawn = {chart.key: chart for chart in charts([Run(name, read_saved(plain_adapter))] * 2)}
    assert drawn.keys() == {"size", "norm", "similarity"} | ({"training"} if ODD[name] else set())
    for chart in drawn.values():
        chart.write(tmp_path)
        assert chart.image().startswith("data:image/svg+xml")
    (legend,) = (axes.get_legend() for axes in drawn["size"].figure.axes)
    assert [text.get_text().strip() for text in legend.get_texts()] == [name] * 2


NAMES = {
    "leaves": (["model.layers.*.self_attn.q_proj", "model.layers.*.mlp.up_proj"], ["q_proj", "up_proj"]),
    "one": (["model.layers.*.self_attn.q_proj"], ["q_proj"]),
    "parents": (["h.*.attn.c_proj", "h.*.mlp.c_proj"], ["attn.c_proj", "mlp.c_proj"]),
    "towers": (
        ["language_model.layers.*.q_proj", "vision.layers.*.q_proj"],
        ["language_model…q_proj", "vision…q_proj"],
    ),
    "both": (
        [f"{tower}.{block}.c_proj" for tower in ("vision", "text") for block in ("attn", "mlp")],
        [f"{tower}.{block}.c_proj" for tower in ("vision", "text") for block in ("attn", "mlp")],
    ),
    "one within the other": (["layers.*.q_proj", "tower.layers.*.q_proj"], ["layers…q_proj", "tower…q_proj"]),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_are_shortened_to_what_differs(case):
    names, short = NAMES[case]
    assert short_names(names) == dict(zip(names, short, strict=True))
