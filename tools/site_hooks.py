"""What MkDocs does beside its own: pages from outside docs/, and links to files that are no pages.

The pages are written to be read in the repository too, where `../SECURITY.md` is a link that works.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
GUESTS = {"CONTRIBUTING.md": "contributing.md", "SECURITY.md": "reporting.md"}
_LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./|docs/)[^)#]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that lie at the top of the repository."""
    for source, page in GUESTS.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Points links at the site's pages; a file that is none of them is named, not linked."""

    def placed(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if target.startswith("docs/"):
            return f"[{text}]({target.removeprefix('docs/')}{anchor})"
        inside = target.removeprefix("../")
        if inside in GUESTS:
            return f"[{text}]({GUESTS[inside]}{anchor})"
        if not (ROOT / inside).exists():
            return link[0]  # for MkDocs to complain of
        return text if inside in text else f"{text} (`{inside}`)"

    return _LINK.sub(placed, markdown)
