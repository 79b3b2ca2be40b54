"""What the README and the integrations' pages tell users, as far as it can be read without other trainers."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from importlib.metadata import entry_points

import pytest
import yaml

from structlora_trl import StructLoRAConfig
from structlora_trl.cli import main
from structlora_trl.yaml_block import read_switch
from tests.support.launching import ROOT
from tests.support.readme import code_blocks, readme_block

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = {
    line
    for page in ("README.md", "docs/quickstart.md", "docs/guide.md", "docs/serving.md")
    for block in code_blocks(page, "bash")
    for line in block.splitlines()
    if line.startswith("structlora ")
}


def test_the_site_opens_with_the_commands_of_the_readme():
    """And with its tables, which `make bench-report` writes into both."""
    landing = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    blocks = code_blocks("README.md", "bash")
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("structlora")]
    marks = re.findall(r"^<!-- .* -->$", README, re.MULTILINE)
    assert marks and all(line in landing for line in (*commands, *marks))


def test_readme_is_short():
    assert len(README.split()) <= 800


@pytest.mark.parametrize("command", sorted({line.split()[1] for line in COMMANDS}))
def test_commands_take_the_arguments_that_the_pages_give_them(command, capsys):
    main([command, "--help"])
    known = capsys.readouterr().out
    for line in (line for line in COMMANDS if line.split()[1] == command):
        options = [word for word in shlex.split(line, comments=True) if word.startswith("--")]
        assert all(re.search(rf"{option}\b", known) for option in options), line


PAGE_OF_RUNS = "docs/benchmarks.md"
WITH_FIGURES = [
    (line, anchor)
    for text in (README, (ROOT / "docs" / "guide.md").read_text(encoding="utf-8"))
    for line in text.splitlines()
    for anchor in re.findall(rf"\]\((?:{PAGE_OF_RUNS}|benchmarks\.md)#([\w-]+)\)", line)
]


@pytest.mark.parametrize("line, anchor", WITH_FIGURES)
def test_figures_stand_where_they_link(line, anchor):
    sections = re.split(r"^## ", (ROOT / PAGE_OF_RUNS).read_text(encoding="utf-8"), flags=re.MULTILINE)
    (section,) = (
        s for s in sections if re.sub(r"[^\w -]", "", s.split("\n")[0]).lower().replace(" ", "-") == anchor
    )
    before = line.partition(f"#{anchor})")[0].rpartition("](")[0]
    missing = [figure for figure in re.findall(r"\d+\.\d+", before) if figure not in section]
    assert not missing


def test_a_release_has_absolute_links(tmp_path):
    """The README as the release workflow rewrites it for PyPI."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
    (rewrite,) = (
        step["run"]
        for step in workflow["jobs"]["build"]["steps"]
        if "sed" in step.get("run", "") and "README" in step["run"]
    )
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    named = {"GITHUB_SERVER_URL": "https://host", "GITHUB_REPOSITORY": "us/it", "GITHUB_REF_NAME": "v1"}
    subprocess.run(["bash", "-ec", rewrite], cwd=tmp_path, env={**os.environ, **named}, check=True)
    links = re.findall(r"\]\(([^)]+)\)", (tmp_path / "README.md").read_text(encoding="utf-8"))
    assert all(link.startswith("https://") for link in links)
    assert "https://host/us/it/blob/v1/README.md#results" in links
    assert "https://host/us/it/raw/v1/docs/map.svg" in links


def test_axolotl_finds_the_plugin_that_its_page_names():
    page = (ROOT / "integrations" / "axolotl" / "README.md").read_text(encoding="utf-8")
    (plugin,) = (plugin for plugin in entry_points(group="axolotl.plugins") if plugin.name == "structlora")
    assert f"plugins: [{plugin.value.replace(':', '.')}]" in page


def test_ms_swift_command_names_what_the_plugin_registers():
    command = shlex.split(readme_block("ms-swift", "bash").replace("\\\n", " "))
    variable, options = command[0].split("=", 1)
    assert isinstance(read_switch(yaml.safe_load(options)), StructLoRAConfig)
    source = (ROOT / "integrations" / "ms_swift" / "__init__.py").read_text(encoding="utf-8")
    callback = command[command.index("--callbacks") + 1]
    assert f'callbacks_map["{callback}"]' in source and f'"{variable}"' in source
    assert readme_block("ms-swift", "python").strip() == "import structlora_trl.integrations.ms_swift"
