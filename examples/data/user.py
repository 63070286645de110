"""The user's own text as documents, streamed: a corpus of any size in memory bounded by one document.

Three formats, because they cover what people have: JSON lines with a `text` field, parquet with a `text`
column (needs pyarrow), and plain text. Every failure names the file, and the line where there is one.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from examples.data.files import disk_errors
from examples.errors import UserError

# A plain-text file up to this size is one document; a larger one is cut at blank lines into pieces of at most
# this.
TEXT_CHARS = 64_000
# A document of another format is cut likewise, at a size that only a damaged or unusual corpus reaches.
DOCUMENT_CHARS = 1_000_000
# A JSON line longer than this is refused: it would have to be held in memory whole.
LINE_BYTES = 64 << 20
_READ_BYTES = 1 << 16
_BLANK_LINE = re.compile(r"\n[ \t]*\r?\n(?![ \t]*\r?\n)")


def _cut(text: str, limit: int, border: re.Pattern[str]) -> int:
    """Where to cut `text` (longer than `limit`): after the last border, else newline, else at the limit."""
    cut = 0
    for match in border.finditer(text, 0, limit):
        cut = match.end()
    return cut or text.rfind("\n", 0, limit) + 1 or limit


def split_text(text: str, limit: int, border: re.Pattern[str] = _BLANK_LINE) -> Iterator[str]:
    """Pieces of at most `limit` characters, cut at borders where possible; joined, they are `text` again."""
    while len(text) > limit:
        cut = _cut(text, limit, border)
        yield text[:cut]
        text = text[cut:]
    if text:
        yield text


def _without_surrogates(text: str) -> str:
    """JSON escapes can carry half a surrogate pair, which is not text: replace it by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _jsonl(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(LINE_BYTES):
            number += 1
            where = f"{path}:{number}"
            if len(line) == LINE_BYTES:
                raise UserError(f"{where}: a line may have at most {LINE_BYTES} bytes")
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{where}: not UTF-8 ({error.reason} at byte {error.start} of the line)"
                ) from error
            except ValueError as error:
                raise UserError(
                    f"{where}: not valid JSON ({error}); the line starts with {line[:40]!r}"
                ) from error
            except RecursionError as error:
                raise UserError(f"{where}: the JSON is nested too deeply") from error
            if not isinstance(record, dict) or "text" not in record:
                found = f"fields {sorted(record)}" if isinstance(record, dict) else type(record).__name__
                raise UserError(f"{where}: a line must be an object with a field 'text', got {found}")
            if not isinstance(record["text"], str):
                raise UserError(
                    f"{where}: field 'text' must be a string, got {type(record['text']).__name__}"
                )
            yield from split_text(_without_surrogates(record["text"]), DOCUMENT_CHARS)


def _parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: reading parquet needs pyarrow (pip install pyarrow)") from error
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=False, pre_buffer=False) as file:
            schema = file.schema_arrow
            if "text" not in schema.names:
                raise UserError(
                    f"{path}: there must be a column 'text', got {', '.join(schema.names) or 'none'}"
                )
            kind = schema.field("text").type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f"{path}: column 'text' must hold strings, got {kind}")
            for batch in file.iter_batches(batch_size=64, columns=["text"]):
                for scalar in batch.column(0):
                    yield from split_text(scalar.as_py() or "", DOCUMENT_CHARS)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error


def _text(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    pending, offset = "", 0
    with open(path, "rb") as file:
        while True:
            chunk = file.read(_READ_BYTES)
            try:
                pending += decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: not UTF-8 near byte {offset} ({error.reason})") from error
            offset += len(chunk)
            while len(pending) > TEXT_CHARS:
                cut = _cut(pending, TEXT_CHARS, _BLANK_LINE)
                yield pending[:cut]
                pending = pending[cut:]
            if not chunk:
                break
    if pending:
        yield pending


_READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".txt": _text,
    ".md": _text,
}


def user_documents(path: Path) -> Iterator[str]:
    """The documents of one file, or of all readable files below a folder in the order of their names."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _READERS and file.is_file())
        if not files:
            raise UserError(f"{path}: the folder holds no file that ends in {', '.join(_READERS)}")
    else:
        files = [path]
    for file in files:
        if file.suffix.lower() not in _READERS:
            raise UserError(
                f"{file}: the name must end in {', '.join(_READERS)}, got {file.suffix or 'no ending'!r}"
            )
        with disk_errors(file, "reading"):
            for text in _READERS[file.suffix.lower()](file):
                if text.strip():
                    yield text


def user_name(path: Path) -> str:
    """The source name of a user path: `user-` and the stem, in characters that are safe in a folder name."""
    stem = path.resolve().stem if path.suffix else path.resolve().name
    return "user-" + (re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-.") or "data")
