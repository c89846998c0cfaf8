"""A strict reader of the report's pages: what it finds, and what it refuses."""

import json
import pathlib
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "wbr", "br", "hr", "input", "link", "img"}
FORBIDDEN = {"script", "link", "img", "iframe", "object", "embed", "image", "use", "foreignobject"}


@dataclass
class Number:
    """A number in a table: as it is shown, exactly, and where it stands."""

    text: str
    value: float
    place: str | None


@dataclass
class Table:
    rows: list[list[str]] = field(default_factory=list)
    bare: list[str] = field(default_factory=list)  # text of cells outside of numbers and words
    numbers: list[Number] = field(default_factory=list)


class Page(HTMLParser):
    """A page read whole. AssertionError where elements do not nest, or something is loaded."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.path, self.ids, self.references, self.links = path, [], [], []
        self.tables: list[Table] = []
        self.pictures: list[tuple[str, str]] = []  # role and title
        self.headings: list[str] = []
        self._open: list[tuple[str, dict[str, str]]] = []
        text = path.read_text()
        assert text.startswith("<!DOCTYPE html>\n")
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self._begin(tag, attrs)
        if tag not in VOID:
            self._open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        assert any(open_tag == "svg" for open_tag, _ in self._open), f"<{tag}/> is no HTML"
        self._begin(tag, attrs)

    def _begin(self, tag, attrs):
        named = dict(attrs)
        assert tag not in FORBIDDEN, tag
        assert len(named) == len(attrs), f"an attribute twice: {tag} {attrs}"
        assert not any(
            name.startswith("on") or name in ("src", "srcset", "style") for name in named
        )
        self.ids += [named["id"]] if "id" in named else []
        for name in ("aria-labelledby", "aria-describedby"):
            self.references += named.get(name, "").split()
        if "href" in named:
            self.links.append(named["href"])
        if tag == "table":
            self.tables.append(Table())
        elif tag == "tr":
            self.tables[-1].rows.append([])
        elif tag in ("td", "th"):
            self.tables[-1].rows[-1].append("")
        elif tag == "svg":
            self.pictures.append((named["role"], ""))
        elif tag == "data":
            value = json.loads(named["value"])
            self.tables[-1].numbers.append(Number("", value, named.get("data-at")))
            assert (named.get("class") == "computed") == ("data-at" not in named)

    def handle_endtag(self, tag):
        assert self._open, f"</{tag}> closes nothing"
        opened, _ = self._open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data):
        tags = [tag for tag, _ in self._open]
        if not tags:
            assert not data.strip()
            return
        if tags[-1] == "style":
            assert not re.search(r"url\(|@import", data)
        if tags[-2:] == ["svg", "title"]:
            role, title = self.pictures[-1]
            self.pictures[-1] = role, title + data
        if tags[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)
        if "td" in tags or "th" in tags:
            table = self.tables[-1]
            table.rows[-1][-1] += data
            if tags[-1] == "data":
                table.numbers[-1].text += data
            elif tags[-1] == "td" and self._open[-1][1].get("class") != "words":
                table.bare.append(data)


def shown_value(text: str) -> float:
    """Return what a reader takes a shown number for."""
    number = text.replace(",", "").replace("\N{NO-BREAK SPACE}%", "").removesuffix(" %")
    return float(number) / (100 if "\N{NO-BREAK SPACE}%" in text else 1)
