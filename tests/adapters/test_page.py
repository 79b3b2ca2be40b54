"""`structlora inspect --html`: one page with all figures in it, also as a browser shows it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from structlora_trl.adapters.inspecting import short_names
from structlora_trl.adapters.svg import VIRIDIS, Line, Scale, chart, heat_map, legend
from structlora_trl.cli import main
from tests.support.adapters import DEPTHS, KINDS

BROWSER = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)
VOID = {"meta", "path", "circle"}


class Page(HTMLParser):
    """What a page holds; unbalanced elements are an error."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.counts, self.linked, self.rows = [], {}, [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.linked += [value for name, value in attributes if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, text):
        if "tr" in self.open:
            self.rows[-1].append(text)


@pytest.fixture
def page(runs, plain_adapter, tmp_path):
    """Of a run, beside the same adapter without its state in a folder with an awkward name."""
    other = plain_adapter.rename(tmp_path / "<b>plain & simple")
    assert main(["inspect", str(runs()), "--html", str(tmp_path / "page.html"), "--against", str(other)]) == 0
    return tmp_path / "page.html"


def test_the_page_holds_everything(page):
    text = page.read_text()
    parsed = Page(text)
    assert not parsed.linked and "http" not in text and "url(" not in text and "import" not in text
    assert "&lt;b&gt;plain &amp; simple" in text and "b" not in parsed.counts
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert titles == ["Gates", "Similarity over depth", "Singular values", "Training", "Modules"]
    maps, spectra, curves = len(KINDS), 2 * len(KINDS), 5
    similarities = len(KINDS) + 1  # without the state, where writers alone can be compared
    assert parsed.counts["svg"] >= 2 + maps + similarities + spectra + curves
    rows = [row for row in parsed.rows if row[0] in ("q_proj", "v_proj", "o_proj")]
    assert len(rows) == len(KINDS) * DEPTHS and all(len(row) == 2 + 6 * 2 for row in rows)
    # kind, layer, openness of either run
    assert all(0 < float(row[2]) < 1 and row[3] == "-" for row in rows)


def test_gates_of_heads_have_a_map_and_a_column(runs, tmp_path):
    plots = importlib.util.find_spec("matplotlib")
    given = ["--plot", str(tmp_path / "figures")] if plots else []
    assert main(["inspect", str(runs("heads")), "--html", str(tmp_path / "page.html"), *given]) == 0
    text = (tmp_path / "page.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", text)[:2] == ["Gates", "Gates of heads and experts"]
    parsed = Page(text)
    place = next(row for row in parsed.rows if row[0] == "kind").index("groups")
    rows = [row for row in parsed.rows if row[0] in ("q_proj", "v_proj", "o_proj")]
    assert len(rows) == len(KINDS) * DEPTHS and all(0 < float(row[place]) < 1 for row in rows)
    assert not plots or (tmp_path / "figures" / "groups.png").is_file()


def test_one_run_and_no_log_in_a_new_folder(plain_adapter, tmp_path):
    page = tmp_path / "a" / "new" / "page.html"
    assert main(["inspect", str(plain_adapter), "--html", str(page)]) == 0
    titles = re.findall("<h2>(.*?)</h2>", page.read_text())
    assert titles == ["Similarity over depth", "Singular values", "Modules"]


def test_another_run_needs_a_page(runs, capsys):
    assert main(["inspect", str(runs()), "--against", str(runs())]) == 2
    assert "--against needs --html" in capsys.readouterr().err


def test_colours_follow_what_happened():
    """Gates that moved by little fill the scale all the same; without any difference there is one colour."""
    gates = [[0.88, 0.89], [0.895, 0.9]]
    drawn = heat_map(gates, Scale(0.88, 0.9), ["0", "1"], "direction")
    assert {VIRIDIS[0], VIRIDIS[-1]} <= set(re.findall("#[0-9a-f]{6}", drawn))
    still = heat_map([[0.9, 0.9]], Scale(0.9, 0.9), ["0"], "direction")
    assert len(set(re.findall("#[0-9a-f]{6}", still))) == 1
    assert "start 0.9" in legend(Scale(0.8, 0.95), {"start 0.9": 0.9})
    assert "start" not in legend(Scale(0.1, 0.2), {"start 0.9": 0.9})


@pytest.mark.parametrize("values", [[], [float("nan")], [0.0, -1.0], [2.0], [1.0, 1.0], [1e-30, 1e30]])
@pytest.mark.parametrize("logarithmic", [True, False])
def test_charts_of_odd_values(values, logarithmic):
    drawn = chart([Line("a", range(len(values)), values, "#000000")], "step", logarithmic)
    assert "nan" not in drawn and "inf" not in drawn
    Page(drawn)


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
    browse(page, f"--screenshot={shot}", "--window-size=1240,2600")
    colours = {colour for _, colour in image.open(shot).convert("RGB").getcolors(1 << 24)}
    for expected in (VIRIDIS[0], VIRIDIS[-1], "#c2410c", "#1d4ed8"):
        assert tuple(bytes.fromhex(expected[1:])) in colours, expected

    for clicks, order in ((1, 1), (2, -1)):
        click = f'<script>for(let i=0;i<{clicks};i++)document.querySelectorAll(".sortable th")[2].click()</script>'
        clicked = tmp_path / "clicked.html"
        clicked.write_text(page.read_text().replace("</body>", f"{click}</body>"))
        dom = browse(clicked, "--dump-dom").partition("<tbody>")[2].rpartition("</tbody>")[0].rpartition("<tbody>")[2]
        values = [float(re.findall('data-value="(.*?)"', row)[0]) for row in dom.split("</tr>")[:-1]]
        assert len(values) == len(KINDS) * DEPTHS and values == sorted(values)[::order] and values[0] != values[-1]


def browse(page, *options: str) -> str:
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
