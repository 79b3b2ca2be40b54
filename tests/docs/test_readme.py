"""What the README and `configs/` tell users of each front door, as far as it can be read without the trainer itself."""

from __future__ import annotations

import ast
import re
import shlex

import pytest
import yaml

from structlora_trl import StructLoRAConfig
from structlora_trl.yaml_block import read_switch
from tests.support.launching import ROOT
from tests.support.readme import readme_block

INTEGRATIONS = ROOT / "integrations"
MS_SWIFT = INTEGRATIONS / "ms_swift" / "__init__.py"
README = {"axolotl": "Axolotl", "llamafactory": "LLaMA-Factory"}
FILES = {
    f"{door}/{name}": text
    for door, section in README.items()
    for name, text in (
        ("README", readme_block(section)),
        *((path.name, path.read_text(encoding="utf-8")) for path in (ROOT / "configs" / door).glob("*.yaml")),
    )
}


def names_in(module) -> set[str]:
    """Classes and functions of a module that cannot be imported here."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}


@pytest.mark.parametrize("name", FILES)
def test_yaml_asks_for_structlora(name):
    keys = yaml.safe_load(FILES[name])
    if name.startswith("axolotl"):
        assert keys["adapter"] == "structlora" or keys["structlora"]
    else:
        assert keys["finetuning_type"] == "lora"
    assert isinstance(read_switch(keys.get("structlora", True)), StructLoRAConfig)


def test_quickstart_shows_a_complete_axolotl_file():
    """The README's file, which Axolotl itself runs in the front door's tests, with options added."""
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    shown = yaml.safe_load(re.search(r"^## Axolotl\n+```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[1])
    assert isinstance(read_switch(shown.pop("structlora")), StructLoRAConfig)
    assert shown == yaml.safe_load(FILES["axolotl/README"])


def test_axolotl_plugin_is_where_the_readme_and_the_entry_point_say():
    written = re.search(r"plugins:\s+\[([\w.]+)\]", (ROOT / "README.md").read_text(encoding="utf-8"))[1]
    entry = re.search(
        r'"axolotl.plugins"\]\nstructlora = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    )[1]
    assert written == entry.replace(":", ".")
    module, name = entry.split(":")
    assert module == "structlora_trl.integrations.axolotl" and name in names_in(
        INTEGRATIONS / "axolotl" / "__init__.py"
    )


def test_ms_swift_command():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"`import structlora_trl.integrations.{MS_SWIFT.parent.name}`" in text
    command = shlex.split(readme_block("ms-swift", "bash").replace("\\\n", " "))
    variable, options = command[0].split("=", 1)
    assert variable == "STRUCTLORA" and isinstance(read_switch(yaml.safe_load(options)), StructLoRAConfig)
    source = MS_SWIFT.read_text(encoding="utf-8")
    callback = command[command.index("--callbacks") + 1]
    assert f'callbacks_map["{callback}"]' in source and f'"{variable}"' in source


def test_llamafactory_command():
    command = re.search(
        r'^structlora-llamafactory = "(.+):(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M
    )
    assert command[1] == "structlora_trl.integrations.llamafactory"
    assert command[2] in names_in(INTEGRATIONS / "llamafactory" / "__init__.py")
