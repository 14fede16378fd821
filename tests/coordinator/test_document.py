"""A document says the same as HTML and as Markdown, whatever devices call themselves."""

from html.parser import HTMLParser

import pytest

from coordinator.charts import Axis, Line, line_chart
from coordinator.document import Bullets, Code, Document, Figure, Section, Table, Words, markdown
from coordinator.document_html import html

EVIL = '<script src="https://evil.example/x.js"></script> | `rm` *b* [a](http://evil.example)'
CHART = line_chart("Loss", [Line(EVIL, [(0, 1), (1, 2)])], Axis("rounds"), Axis("loss"))


def document(name=EVIL):
    table = Table(f"Losses of {name}.", ("device", "loss"), ((name, "1.000"), ("b", "2.000")))
    return Document(f"Run {name}", f"Of {name}", (
        Section("First", (Words(name), Bullets((name, "two")), table)),
        Section("Second", (Figure(f"Loss of {name}", CHART, table),
                           Table("Again", ("a", "b\nc"), (("x", "y"),)), Code("All", name))),
    ))  # fmt: skip


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closes another"

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def test_a_page_is_whole_and_asks_for_nothing_from_outside() -> None:
    page = Page(html(document()))
    assert page.open == [], "every tag is closed"
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    policy = next(m for m in page.all("meta") if "http-equiv" in m)["content"]
    assert policy.startswith("default-src 'none'")
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") or name == "src" for name in attrs), (tag, attrs)
        assert attrs.get("href", "#").startswith("#")
    assert EVIL in "".join(page.words), "a name is shown as it is"


def test_tables_and_figures_have_names_for_those_who_do_not_see_them() -> None:
    page = Page(html(document()))
    assert all(t.get("aria-label") for t in page.all("table"))
    assert all(d.get("tabindex") == "0" for d in page.all("div") if d.get("class") == "scroll")
    assert all(s["role"] == "img" and s["aria-labelledby"] for s in page.all("svg"))
    assert {h.get("scope") for h in page.all("th")} == {"col", "row"}
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.tags:
        for reference in ("aria-labelledby", "aria-describedby"):
            assert attrs.get(reference, ids[0]) in ids
    assert page.all("html")[0]["lang"] == "en" and page.words.count("Run " + EVIL) == 2


@pytest.mark.parametrize("render", [html, markdown])
def test_tables_and_figures_are_numbered_apart(render) -> None:
    text = render(document("pi"))
    places = [text.index(f"{name}.") for name in ("Table 1", "Figure 1", "Table 2")]
    assert places == sorted(places)


def test_markdown_tables_keep_their_columns_whatever_a_cell_holds() -> None:
    lines = markdown(document()).splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 4 + 4 + 3
    for row in rows:
        assert row.replace("\\|", "").count("|") == 3, row
    assert rows[1] == "| :-- | --: |"
    assert not any("](http" in line.replace("\\]", "").replace("\\[", "") and "`rm`" not in line
                   for line in lines)  # fmt: skip
    assert "| a | b c |" in rows


def test_code_in_markdown_cannot_end_its_own_block() -> None:
    text = markdown(Document("t", "l", (Section("s", (Code("c", "a\n```\n# not a title"),)),)))
    fences = [line for line in text.splitlines() if line.startswith("````")]
    assert len(fences) == 2
