"""Markdown and HTML of one list of blocks. The HTML is a single file: pictures are in it, and nothing is loaded from anywhere.

Made for a phone first: text at reading size, pictures in as many columns as fit, wide tables scroll by themselves, dark mode.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from examples.data.files import write_atomic

STYLE = """
:root{color-scheme:light dark;--ink:#1d1f23;--soft:#5b626d;--paper:#fff;--shade:#f3f4f6;--line:#d9dce1;--link:#0b5cad}
@media(prefers-color-scheme:dark){:root{--ink:#e4e6ea;--soft:#9aa2ae;--paper:#14161a;--shade:#1f2329;--line:#343a43;--link:#7ab7ff}}
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,sans-serif;max-width:62rem;margin:auto;padding:1rem;color:var(--ink);background:var(--paper);
overflow-wrap:break-word}
h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.25rem;margin-top:2.2rem;border-top:1px solid var(--line);padding-top:1rem}
h3{font-size:1rem;margin-bottom:.2rem}.asks{color:var(--soft)}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .7rem .25rem 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
th{color:var(--soft);font-weight:600}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr));gap:1rem;margin:1rem 0}
figure{margin:0}img{width:100%;height:auto;background:#fff;border-radius:.3rem}figcaption{font-size:.85rem;color:var(--soft)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--shade);padding:.7rem;border-radius:.3rem;font-size:.85rem;margin-top:0}
pre b{color:var(--link);font-weight:normal}
.ok,.MISSED{font-weight:600;white-space:nowrap}.ok{color:#17803d}.MISSED{color:#c62828}
@media(prefers-color-scheme:dark){.ok{color:#58c77d}.MISSED{color:#ff7b72}}
nav{font-size:.9rem}nav a{color:var(--link);margin-right:.9rem;display:inline-block}
"""
VERDICTS = ("ok", "MISSED")


@dataclass(frozen=True)
class Finding:
    """A number of the summary. key: its name in the stage's result. bound: what it must be, if anything is demanded; ok: is it?"""

    key: str
    name: str
    value: float
    bound: str = ""
    ok: bool = True

    @property
    def verdict(self) -> str:
        """ "ok", "MISSED", or nothing where nothing is demanded."""
        return ("ok" if self.ok else "MISSED") if self.bound else ""


@dataclass
class Part:
    """Some blocks, each as (markdown, HTML), and the findings among them. folder: where the pictures are."""

    folder: Path
    blocks: list[tuple[str, str]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def find(self, key: str, name: str, value: float, bound: str = "", ok: bool = True) -> None:
        """A number for the top of the page."""
        self.findings.append(Finding(key, name, float(value), bound, bool(ok)))

    def heading(self, text: str, anchor: str) -> None:
        """The title of a section."""
        self.blocks.append((f"## {text}", f'<h2 id="{anchor}">{html.escape(text)}</h2>'))

    def asks(self, text: str) -> None:
        """What the report demands here."""
        self.blocks.append((f"*{text}*", f'<p class="asks">{html.escape(text)}</p>'))

    def text(self, text: str) -> None:
        """A paragraph."""
        self.blocks.append((text, f"<p>{html.escape(text)}</p>"))

    def links(self, titles: Sequence[tuple[str, str]]) -> None:
        """(title, anchor) of the sections below; markdown readers make their own."""
        links = "".join(f'<a href="#{anchor}">{html.escape(title)}</a>' for title, anchor in titles)
        self.blocks.append(("", f"<nav>{links}</nav>"))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of strings; a cell that is a verdict is coloured."""

        def plain(cell: str) -> str:
            return " ".join(cell.split()).replace("|", "\\|")

        def cell(text: str) -> str:
            kind = f' class="{text}"' if text in VERDICTS else ""
            return f"<td{kind}>{html.escape(text)}</td>"

        lines = [f"| {' | '.join(map(plain, head))} |", f"|{'---|' * len(head)}"]
        lines += [f"| {' | '.join(map(plain, row))} |" for row in rows]
        top = "".join(f'<th scope="col">{html.escape(c)}</th>' for c in head)
        body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
        self.blocks.append(
            (
                "\n".join(lines),
                f'<div class="wide" tabindex="0"><table><tr>{top}</tr>{body}</table></div>',
            )
        )

    def pictures(self, pictures: Sequence[tuple[str, str]]) -> None:
        """(file of the folder, what it shows) side by side where there is room."""
        figures = "".join(
            f'<figure><img src="{self._embed(name)}" alt="{html.escape(alt)}" loading="lazy">'
            f"<figcaption>{html.escape(alt)}</figcaption></figure>"
            for name, alt in pictures
        )
        markdown = "\n\n".join(f"![{alt}]({name})" for name, alt in pictures)
        self.blocks.append((markdown, f'<div class="pictures">{figures}</div>'))

    def _embed(self, name: str) -> str:
        return "data:image/png;base64," + base64.b64encode((self.folder / name).read_bytes()).decode()

    def sample(self, title: str, prompt: str, text: str) -> None:
        """What a model was given, and what it wrote."""
        shown, written = (t.replace("```", "'''") for t in (prompt[-300:], text))
        self.blocks.append(
            (
                f"**{title}**\n\n```\n{shown} >>> {written}\n```",
                f"<h3>{html.escape(title)}</h3><pre>{html.escape(prompt[-300:])} <b>{html.escape(text)}</b></pre>",
            )
        )


def write_page(folder: Path, title: str, parts: Sequence[Part]) -> None:
    """report.md and report.html of the parts in order."""
    blocks = [block for part in parts for block in part.blocks]
    markdown = "\n\n".join([f"# {title}", *(text for text, _ in blocks if text)])
    body = "".join(text for _, text in blocks)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><h1>{html.escape(title)}</h1>{body}</body></html>"
    )
    write_atomic(folder / "report.md", f"{markdown}\n".encode())
    write_atomic(folder / "report.html", f"{page}\n".encode())
