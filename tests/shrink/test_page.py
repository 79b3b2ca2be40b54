"""`structlora inspect --html`: one page with all figures in it, also as a browser shows it."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from safetensors.torch import load_file, save_file

from structlora_trl.cli import main
from structlora_trl.core.kinds import short_names
from structlora_trl.shrink.inspecting import report
from structlora_trl.shrink.load_adapter import read_saved
from structlora_trl.shrink.trial import information_curves
from structlora_trl.state import STATE_NAME
from tests.support.adapters import DEPTHS, KINDS, RANK, STEPS, on_base
from tests.support.data import texts, write_rows
from tests.support.tiny import FAMILIES

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
from matplotlib.figure import Figure

from structlora_trl.shrink.figures import Run, charts, write

BROWSER = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)
VOID = {"meta"}
VIRIDIS = ("#440154", "#fde725")  # the ends of its scale


class Page(HTMLParser):
    """What a page holds; unbalanced elements are an error."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.counts, self.linked, self.rows = [], {}, [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.linked += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
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


@pytest.fixture
def page(runs, plain_adapter, tmp_path):
    """Of a run, beside the same adapter without its state in a folder with an awkward name."""
    other = plain_adapter.rename(tmp_path / "<b>plain & simple")
    assert main(["inspect", str(runs()), "--html", str(tmp_path / "page.html"), "--against", str(other)]) == 0
    return tmp_path / "page.html"


def test_the_page_holds_everything(page):
    text = page.read_text()
    parsed = Page(text)
    assert {link.partition(":")[0] for link in parsed.linked if not link.startswith("#")} <= {"data"}
    assert "http" not in text and "url(" not in text.replace("url(#", "") and "@import" not in text
    assert "&lt;b&gt;plain &amp; simple" in text and "b" not in parsed.counts
    assert "<code>test_split_size: 0.1</code>" in text  # what would give a held-out loss
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert titles == ["What the gates let through", "Training", *WITHOUT_STATE]
    maps_of_nats, spectra, sizes, curves = 1, 2 * len(KINDS), 2, 5
    similarities = len(KINDS) + 1  # without the state, where writers alone can be compared
    scales = 2
    assert parsed.counts["svg"] == scales + maps_of_nats + similarities + spectra + sizes + curves
    assert "plain &amp; simple: no map of q_proj, v_proj: no structlora.safetensors beside it" in text
    rows = [row for row in parsed.rows if row[0] in ("q_proj", "v_proj", "o_proj")]
    assert len(rows) == len(KINDS) * DEPTHS and all(len(row) == 2 + 9 * 2 for row in rows)
    # kind, layer; of either run effective rank, norm, rank, directions that add something
    assert all(row[8] == row[9] for row in rows) and any(int(row[8]) < RANK for row in rows)


WITHOUT_STATE = [
    "What a smaller adapter keeps",
    "Similarity over depth",
    "Singular values",
    "Facts",
    "Modules",
]


def test_which_run_did_better(runs, tmp_path):
    """Facts of both runs from their logs, the lower losses marked; a plain LoRA run has steps too."""
    folders = {}
    for name, losses in {"first": (2.5, 2.25), "second": (2.0, 2.75)}.items():
        folders[name] = tmp_path / name
        shutil.copytree(runs(), folders[name], ignore=shutil.ignore_patterns("checkpoint-*"))
        if name == "second":
            (folders[name] / STATE_NAME).unlink()
        entries = [{"step": 8, "loss": losses[0], "learning_rate": 0.5}, {"step": 9, "eval_loss": losses[1]}]
        (folders[name] / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
        (folders[name] / "README.md").write_text("---\ndatasets:\n- some/rows\n---\n# A card")
    given = [str(folders["first"]), "--against", str(folders["second"])]
    assert main(["inspect", *given, "--html", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    facts = {row[0]: row[1:] for row in Page(text).rows if len(row) == 3}
    assert facts["training loss at the end"] == ["2.5", "2"] and facts["held-out loss at the end"] == [
        "2.25",
        "2.75",
    ]
    assert (
        facts["steps"] == [str(STEPS), "9"]
        and facts["r"] == [str(RANK)] * 2
        and facts["data"] == ["some/rows"] * 2
    )
    tensors = load_file(folders["first"] / "adapter_model.safetensors").values()
    numbers = sum(tensor.numel() for tensor in tensors)
    assert facts["parameters"] == [f"{numbers:,}"] * 2 and facts["bytes"] == [f"{4 * numbers:,}"] * 2
    base = json.loads((folders["first"] / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert facts["base model"] == ["base"] * 2 and base not in text  # a folder of this machine
    assert re.search(r"first is lower by 0\.5\b", text)
    log = folders["second"] / "trainer_state.json"
    log.write_text(json.dumps({"log_history": [{"step": 9, "eval_loss": 2.25001}]}))
    assert main(["inspect", *given, "--html", str(tmp_path / "page.html")]) == 0
    assert "2.25 in both runs" in (tmp_path / "page.html").read_text()  # not "lower (2.25 against 2.25)"
    log.write_text(json.dumps({"log_history": [{"step": 7, "eval_loss": 2.0}]}))
    assert main(["inspect", *given, "--html", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "second 2 after 7 steps. Runs of different lengths cannot be compared" in text


def test_one_run_and_no_log_in_a_new_folder(plain_adapter, tmp_path):
    page = tmp_path / "a" / "new" / "page.html"
    assert main(["inspect", str(plain_adapter), "--html", str(page)]) == 0
    assert re.findall("<h2>(.*?)</h2>", page.read_text()) == WITHOUT_STATE


def test_adapters_without_a_log(plain_adapter, tmp_path):
    """Nobody is told to train anew: the page says what was cut, and how to see losses. A column has one number of decimals."""
    small, page = tmp_path / "small", tmp_path / "page.html"
    cut = ["export", str(plain_adapter), str(small), "--rank", str(RANK // 2)]
    assert main(cut) == 0
    assert main(["inspect", str(small), "--html", str(page), "--against", str(plain_adapter)]) == 0
    text, modules = page.read_text(), len(KINDS) * DEPTHS
    assert (
        f"plain_adapter has {RANK * modules} directions in {modules} modules, small has {RANK // 2 * modules} directions in "
        f"{modules} modules: 50\N{NO-BREAK SPACE}% of the directions, 50\N{NO-BREAK SPACE}% of the parameters."
        in text
    )
    assert "give <code>--data ROWS.jsonl</code>" in text and "test_split_size" not in text
    rows = [row for row in Page(text).rows if row[0] in ("q_proj", "v_proj", "o_proj")]
    for column in (2, 3, 4, 5):  # effective rank and norm of either
        assert len({len(row[column].partition(".")[2]) for row in rows}) == 1
    kinds = charts([Run.of(folder.name, read_saved(folder)) for folder in (small, plain_adapter)])
    for panels in next(chart for chart in kinds if chart.key == "singular_values").by_name():
        axes = [Figure().subplots() for _ in panels]
        for panel, axis in zip(panels, axes, strict=True):
            panel.draw(axis)
        assert len(axes) == 2 and len({(axis.get_xlim(), axis.get_ylim()) for axis in axes}) == 1


def test_a_spectrum_of_one_value_has_one_tick(plain_adapter, tmp_path):
    assert main(["export", str(plain_adapter), str(tmp_path / "one"), "--rank", "1"]) == 0
    drawn = charts([Run.of("one", read_saved(tmp_path / "one"))])
    for panel in next(chart for chart in drawn if chart.key == "singular_values").panels:
        axis = Figure().subplots()
        panel.draw(axis)
        low, high = axis.get_xlim()
        assert [tick for tick in axis.get_xticks() if low <= tick <= high] == [1]


def test_why_there_is_no_map(plain_adapter, tmp_path, capsys):
    """Without state, of modules that read the residual stream alone, there is a reason in place of a map."""
    weights = plain_adapter / "adapter_model.safetensors"
    tensors = {name: x for name, x in load_file(weights).items() if ".o_proj." not in name}
    save_file(tensors, weights)
    options = json.loads((plain_adapter / "adapter_config.json").read_text())
    options["target_modules"].remove("o_proj")
    (plain_adapter / "adapter_config.json").write_text(json.dumps(options))
    page, figures = tmp_path / "page.html", tmp_path / "figures"
    assert main(["inspect", str(plain_adapter), "--html", str(page), "--plot", str(figures)]) == 0
    assert "No similarity map" in capsys.readouterr().out and not (figures / "similarity.png").exists()
    section = page.read_text().partition("<h2>Similarity over depth</h2>")[2].partition("</section>")[0]
    assert "no map of q_proj, v_proj: no structlora.safetensors" in section and "<svg" not in section


def test_sizes_are_measured_on_rows(plain_adapter, runs, tmp_path):
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
    chart = next(chart for chart in charts([Run.of("run", saved, curves)]) if chart.key == "size")
    assert [panel.title for panel in chart.panels] == [
        "share of the information",
        "loss",
        "share of the updates' squared norm",
    ]


def test_the_page_shows_sizes_on_the_rows_of_a_file(plain_adapter, runs, tmp_path):
    write_rows(tmp_path / "rows.jsonl", texts())
    given = ["--data", str(tmp_path / "rows.jsonl"), "--base", str(runs().parent / "base")]
    assert main(["inspect", str(plain_adapter), "--html", str(tmp_path / "page.html"), *given]) == 0
    text = (tmp_path / "page.html").read_text()
    assert {"share of the information", "loss"} <= {*re.findall("<figcaption.*?>(.*?)<", text)}
    assert re.search(
        r"Loss on the rows of <code>--data</code>: plain_adapter [\d.]+, base model [\d.]+\.", text
    )


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
    saved = read_saved(plain_adapter)
    drawn = charts([Run(name, saved, {kind.name: kind for kind in report(saved)}, ODD[name])] * 2)
    panels = {panel.name: html.unescape(panel.svg()) for chart in drawn for panel in chart.panels}
    assert name in panels["share of the updates' squared norm"]
    assert write(tmp_path / "figures", drawn) == [chart.key for chart in drawn]


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


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium (Debian: `apt install chromium`)")
def test_in_a_browser(page, tmp_path):
    """A screenshot shows the colours of the maps and of both runs; a click on a head sorts, a second one turns the order."""
    image = pytest.importorskip("PIL.Image")
    shot = tmp_path / "page.png"
    browse(page, f"--screenshot={shot}", "--window-size=1240,4200")
    colours = {colour for _, colour in image.open(shot).convert("RGB").getcolors(1 << 24)}
    for expected in (VIRIDIS[0], VIRIDIS[-1], "#c2410c", "#1d4ed8"):
        assert tuple(bytes.fromhex(expected[1:])) in colours, expected

    for clicks, order in ((1, 1), (2, -1)):
        click = f'<script>for(let i=0;i<{clicks};i++)document.querySelectorAll(".sortable th")[2].click()</script>'
        clicked = tmp_path / "clicked.html"
        clicked.write_text(page.read_text().replace("</body>", f"{click}</body>"))
        dom = (
            browse(clicked, "--dump-dom")
            .partition("<tbody>")[2]
            .rpartition("</tbody>")[0]
            .rpartition("<tbody>")[2]
        )
        values = [float(re.findall('data-value="(.*?)"', row)[0]) for row in dom.split("</tr>")[:-1]]
        assert (
            len(values) == len(KINDS) * DEPTHS
            and values == sorted(values)[::order]
            and values[0] != values[-1]
        )


def browse(page, *options: str) -> str:
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        *options,
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
