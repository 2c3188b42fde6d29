"""Templates: none lets text through unescaped, none fetches anything, and an installed package has them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError, nodes
from setuptools.dist import Distribution

from ziprc.pages import html
from ziprc.pages.html import fill

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "ziprc" / "pages" / "templates"
NAMES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", NAMES)
def test_no_template_switches_escaping_off(name: str):
    tree = html._TEMPLATES.parse((FOLDER / name).read_text())
    assert not [f.name for f in tree.find_all(nodes.Filter) if f.name in ("safe", "xmlattr", "urlize")]
    assert not list(tree.find_all((nodes.MarkSafe, nodes.MarkSafeIfAutoescape, nodes.ScopedEvalContextModifier)))
    assert html._TEMPLATES.autoescape is True


@pytest.mark.parametrize("name", NAMES)
def test_values_stand_in_text_or_in_quotes_and_in_scripts_as_json_alone(name: str):
    text = (FOLDER / name).read_text()
    assert not re.search(r"=\s*{{", re.sub(r"{%.*?%}", "", text)), "an attribute without quotes ends at a space"
    assert not re.search(r"\son\w+=|javascript:|\s(href|src)=", text)
    assert "http" not in text and "@import" not in text and "url(" not in text
    for script in re.findall(r"<script[^>]*>(.*?)</script>", text, re.S):
        assert re.fullmatch(r"\s*({{ \w+ \| tojson }}|{% include \"[\w.]+\" %})\s*", script)
    if name.endswith((".css", ".js")):
        assert not re.search(r"{[{%#]", text), "style sheets and scripts are included as they are"


def test_only_filled_templates_and_drawings_are_taken_as_html():
    marked = {str(p.relative_to(ROOT / "ziprc")) for p in (ROOT / "ziprc").rglob("*.py") if "Markup(" in p.read_text()}
    assert marked == {"pages/html.py", "pages/figures.py"}


def test_templates_were_found():
    assert {"page.html", "report.html", "inspect.js", "style.css", "tree.svg", "zip_rc/sampling.html"} <= set(NAMES)


def test_a_value_that_is_missing_is_an_error_and_no_gap():
    with pytest.raises(UndefinedError, match="findings"):
        fill("findings.html")


def test_data_of_a_script_cannot_end_it():
    page = fill("inspect.html", note="", title="</title>", data={"x": "</script><b>&'\u2028"})
    assert page.count("</script>") == 2 and "<b>" not in page and "</title></title>" not in page


def test_an_installed_package_has_every_template(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files()
    build = distribution.get_command_obj("build_py")
    build.finalize_options()
    build.manifest_files = {}  # nothing besides `package-data` may be what brings them along
    packed = build.find_data_files("ziprc.pages", "ziprc/pages")
    assert {str(Path(path).relative_to("ziprc/pages/templates")) for path in packed if Path(path).is_file()} == set(
        NAMES
    )
