"""Where the text comes from, and what the tokenizer makes of it."""

from __future__ import annotations

from examples.report import plots
from examples.report.folder import RunFolder
from examples.report.page import Part

STAGE = "tokenize"
TITLE = "Text and tokenizer (section 4.1)"
ASKS = (
    "The report trains a byte-level BPE on a multilingual corpus rich in mathematics and code, splits some joined punctuation again, "
    "and hides a tenth of the documents' middles (fill-in-the-middle)."
)


def write(run: RunFolder, part: Part) -> None:
    """Sources, and how many bytes a token holds."""
    result = run.results[STAGE]
    sources = result["sources"]
    tokens, size = sum(r["tokens"] for r in sources), sum(r["bytes"] for r in sources)
    part.find("bytes_per_token", "bytes per token of the tokenizer", size / max(1, tokens))
    vocabulary = f"{result['vocab_size']} tokens" if "vocab_size" in result else "Tokens"
    part.text(
        f"{vocabulary} learnt from {len(sources)} sources; {size / 1e6:.2f} MB became {tokens / 1e6:.2f}M tokens."
    )
    path = part.folder / "bytes_per_token.png"
    plots.bars(
        path,
        "what a token holds",
        "bytes per token",
        {r["source"]: r["bytes_per_token"] for r in sources},
        form="{:.2f}",
    )
    part.pictures([(path.name, "Bytes per token of each source: the more, the better the tokenizer fits it")])
    rows = [
        [
            r["source"],
            str(r["documents"]),
            f"{r['bytes'] / 1e6:.2f}",
            str(r["tokens"]),
            f"{r['bytes_per_token']:.2f}",
            r["licence"],
            f"{r['package']} {r['version'] or ''}".strip(),
        ]
        for r in sources
    ]
    part.table(["source", "documents", "MB", "tokens", "bytes/token", "licence", "package"], rows)
