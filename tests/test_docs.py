"""The examples in README.md, CONTRIBUTING.md and docs/*.md run as they are printed.

Every fenced block marked `python` is run, those of one file in one namespace and in order. A block whose first line is
`# not run` is left out. The documents may change freely: nothing here knows what is in them.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import sys
import textwrap
import traceback
import types
from collections.abc import Iterator
from typing import Any

import pytest

from esper_jax.kasmina.blueprints import get_blueprint

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}) *(?P<language>[\w+-]*)")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the document its text begins on (from 1)."""

    language: str
    text: str
    line: int

    @property
    def runs(self) -> bool:
        return self.language == "python" and not self.text.lstrip().startswith("# not run")


def blocks(document: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown text; ValueError with the line for a fence that is never closed."""
    opened: re.Match[str] | None = None
    begin, inside = 0, []
    for number, line in enumerate(document.splitlines(), start=1):
        fence = _FENCE.match(line)
        if opened is None:
            if fence is not None:
                opened, begin, inside = fence, number + 1, []
        elif fence is not None and fence["fence"].startswith(opened["fence"]) and not fence["language"]:
            yield Block(opened["language"], textwrap.dedent("\n".join(inside)), begin)
            opened = None
        else:
            inside.append(line)
    if opened is not None:
        raise ValueError(f"the code block that begins on line {begin - 1} is never closed")


def run(path: pathlib.Path) -> int:
    """Run a document's blocks; how many ran. Fails with the document's name and line."""
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    module = types.ModuleType(f"examples_in_{path.stem}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)  # a class in an example looks its module up
        return _run(path, str(name), module.__dict__)


def _run(path: pathlib.Path, name: str, namespace: dict[str, Any]) -> int:
    count = 0
    for block in blocks(path.read_text(encoding="utf-8")):
        if not block.runs:
            continue
        count += 1
        try:
            # Padded with empty lines, so that line numbers are those of the document.
            exec(compile("\n" * (block.line - 1) + block.text, str(path), "exec"), namespace)
        except Exception as error:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
            line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else block.line
            pytest.fail(f"{name}:{line}: the example fails with {type(error).__name__}: {error}", pytrace=False)
    return count


@pytest.fixture(autouse=True)
def clean_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """Examples write their files elsewhere, and the blueprints that they register are gone after them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(get_blueprint.__globals__, "_REGISTRY", dict(get_blueprint.__globals__["_REGISTRY"]))


@pytest.mark.slow
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_run_as_printed(path: pathlib.Path) -> None:
    run(path)


def test_documents_are_there() -> None:
    assert [path.name for path in DOCUMENTS if not path.is_file()] == []


def test_only_python_blocks_run_and_share_one_namespace(tmp_path: pathlib.Path) -> None:
    text = (
        "```python\nx = 1\n```\n\n```\nnot python\n```\n- in a list:\n\n  ```python\n  x += 1\n  ```\n"
        "```python\n# not run\nraise ValueError\n```\n````text\n```python\nraise ValueError\n```\n````\n"
        "```python\nassert x == 2\n```\n"
    )
    (tmp_path / "page.md").write_text(text)
    assert run(tmp_path / "page.md") == 3


@pytest.mark.parametrize(
    ("block", "line"),
    [("x = 1\nx.nothing", 4), ("x = 1\n\nx = (", 5), ("import json\n\n\njson.loads('{')", 6)],
    ids=["error", "syntax", "error in a library"],
)
def test_failure_names_document_and_line(block: str, line: int, tmp_path: pathlib.Path) -> None:
    (tmp_path / "page.md").write_text(f"# Title\n\n```python\n{block}\n```\n".replace("# Title\n\n", "# Title\n"))
    with pytest.raises(pytest.fail.Exception, match=rf"page\.md:{line}: the example fails with \w+"):
        run(tmp_path / "page.md")


def test_unclosed_block_is_named_by_its_line() -> None:
    with pytest.raises(ValueError, match="line 2 is never closed"):
        list(blocks("text\n```python\nx = 1\n"))
