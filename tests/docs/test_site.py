"""The site builds without a warning, loads nothing from elsewhere, and its links lead somewhere."""

from __future__ import annotations

import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

config_of = pytest.importorskip("mkdocs.config", reason="the site takes the extra `docs`")

ROOT = Path(__file__).resolve().parents[2]
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """What a page loads, what it links to, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value for key, value in attrs if value}
        self.anchors |= {found[key] for key in ("id", "name") if key in found}
        if tag == "link" and found.get("rel") in ("next", "prev", "canonical"):
            return
        if tag in LOADED and LOADED[tag] in found:
            self.loads.append(found[LOADED[tag]])
        elif tag == "a" and "href" in found:
            self.links.append(found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, and what MkDocs warned of."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    warned: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record):
            warned.append(record.getMessage())

    listener = Listener(logging.WARNING)
    logging.getLogger("mkdocs").addHandler(listener)
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=False))
    logging.getLogger("mkdocs").removeHandler(listener)
    return folder, warned


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path.read_text()) for path in site[0].rglob("*.html")}


def test_the_site_builds_without_a_warning(site):
    assert not site[1]


def test_no_page_loads_anything_from_elsewhere(site, pages):
    elsewhere = [f"{path.name}: {url}" for path, page in pages.items() for url in page.loads
                 if urlsplit(url).netloc]  # fmt: skip
    for path in site[0].rglob("*.css"):
        urls = re.findall(r"url\(['\"]?((?:https?:)?//[^)'\"]+)", path.read_text())
        elsewhere += [f"{path.name}: {url}" for url in urls]
    assert len(pages) > 20
    assert not elsewhere


def test_every_link_within_the_site_leads_to_a_page_and_a_place_on_it(site, pages):
    lost = []
    for path, page in pages.items():
        for url in page.links:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            if not target.exists():
                lost.append(f"{path.name}: {url}")
            elif anchor and target.suffix == ".html" and anchor not in pages[target].anchors:
                lost.append(f"{path.name}: {url} (no such place)")
    assert not lost


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_of_the_pages_at_the_top_lead_somewhere(name, site, pages):
    lost = []
    for url in re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text()):
        parts = urlsplit(url)
        if parts.scheme:
            continue
        target = ROOT / parts.path if parts.path else ROOT / name
        if not target.exists():
            lost.append(url)
        elif parts.fragment and parts.path.startswith("docs/"):
            built = site[0] / parts.path.removeprefix("docs/").replace(".md", ".html")
            if parts.fragment not in pages[built].anchors:
                lost.append(f"{url} (no such place)")
    assert not lost
