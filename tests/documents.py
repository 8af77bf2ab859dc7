"""The documents and their code blocks, read by a parser of CommonMark.

A block is run unless an HTML comment in front of it says otherwise:

* `<!-- not run: REASON -->`: the block is only checked to be code of its language;
* `<!-- before: CODE -->`: Python that is run first, for what readers bring themselves.

A block of text that follows one that is run is its output. `...` stands for whatever is there, and
after `<!-- figures vary -->` numbers need not agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

__all__ = ["DOCUMENTS", "ROOT", "Block", "blocks", "code_spans"]

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_MARKS = re.compile(r"<!--\s*(not run|before|figures vary)(?::\s*(.*?))?\s*-->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        path: The document.
        line: Of the fence, from 1.
        language: What follows the fence.
        code: The lines in it.
        not_run: Why it is not run, None where it is.
        before: Python to run first.
        figures_vary: Whether the numbers in it need not agree.
    """

    path: Path
    line: int
    language: str
    code: str
    not_run: str | None = None
    before: str = ""
    figures_vary: bool = False

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} ({self.language or 'no language'})"


def blocks(path: Path) -> Iterator[Block]:
    """Yields the fenced blocks of a document; directives of the documents' builder are none."""
    marks: dict[str, str] = {}
    for token in MarkdownIt("commonmark").parse(path.read_text(encoding="utf-8")):
        if token.type == "html_block":
            marks |= {name: text or "" for name, text in _MARKS.findall(token.content)}
        elif token.type in ("fence", "code_block"):
            language = token.info.strip()
            if not language.startswith("{"):
                yield Block(
                    path,
                    (token.map or [0])[0] + 1,
                    language,
                    token.content,
                    marks.get("not run"),
                    marks.get("before", ""),
                    "figures vary" in marks,
                )
            marks = {}
        else:
            marks = {}


def code_spans(path: Path) -> Iterator[str]:
    """Yields what a document has between backticks within its text."""
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
        for child in token.children or ():
            if child.type == "code_inline":
                yield child.content
