"""What a reader finds in a Markdown page: links, blocks of code, and the commands that it tells him to type."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
USER_PAGES = sorted(p for p in (ROOT / "docs").glob("*.md") if p.name != "config.md")
PAGES = [README, ROOT / "RESULTS.md", *USER_PAGES]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def prose(page: Path) -> str:
    """The page without fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def commands(page: Path) -> list[list[str]]:
    """Every command of the indented lines, and of code in the running text that begins with make or ziprc, as words."""
    text = prose(page)
    lines = re.findall(r"^ {4}(\S.*)$", text, re.M)
    lines += [" ".join(code.split()) for code in re.findall(r"`((?:make|ziprc) [^`]+)`", text)]
    return [command for line in lines for command in split(line)]


def split(line: str) -> list[list[str]]:
    """A line of shell as commands: cut at ; and &&, without comments, quotes taken off."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= {";", "&"}:
            found.append([])
        else:
            found[-1].append(word)
    return [command for command in found if command]


def links(page: Path) -> list[str]:
    """Targets of links and pictures that are not on the web."""
    return [found for found in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if not found.startswith("http")]


def anchors(page: Path) -> set[str]:
    """What links to a heading may say after the #."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def configurations(page: Path) -> list[dict[str, object]]:
    """The YAML blocks as whole files; one without `experiments` is laid over those of config.yaml."""
    content = yaml.safe_load((ROOT / "config.yaml").read_text())
    found = []
    for block in map(yaml.safe_load, blocks(page, "yaml")):
        if "experiments" in block:
            found.append(block)
        else:
            content = {**content, "experiments": content["experiments"] | block}
            found.append(content)
    return found
