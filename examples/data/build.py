"""Corpus to shards: encode every document once, streaming, into a training part and a held-out part.

Two transformations of report section 4.1 happen here, on whole documents and before packing:
fill-in-the-middle (rate 0.1) and the random split of punctuation + line break tokens. Both draw from a
generator seeded by (seed, source, number of the document), so the result does not depend on batching, on
threads, or on the other sources. Held-out documents get neither, so that held-out loss measures plain text.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from examples.data.files import disk_errors, write_json
from examples.data.fim import apply_fim, fim_order
from examples.data.shards import ShardReader, ShardWriter
from examples.data.tokenizer import Tokenizer
from examples.errors import UserError

CORPUS_RECORD = "corpus.json"
_BATCH_CHARS = 1 << 20
_BATCH_DOCUMENTS = 2048
_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class SourceRow:
    """What one source became. `bytes` is UTF-8 text before fill-in-the-middle; `tokens` is what the shards
    hold."""

    source: str
    documents: int
    bytes: int
    tokens: int
    bytes_per_token: float
    val_documents: int
    val_tokens: int
    fim_documents: int
    licence: str
    package: str
    version: str | None


def _document_rng(seed: int, source: str, index: int) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed}/{source}/{index}".encode(), digest_size=8).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


class HeldOut:
    """Decides, document by document in order, which are held out: about one in `every` (0: none), by hash of
    content.

    So exact duplicates fall on the same side, and a corpus that grows keeps its split. For small sources the
    first document is always trained on and the second always held out: neither part is empty if there are two
    different texts.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._second = b""
        self._index = -1
        self._first = b""

    def __call__(self, text: str) -> bool:
        self._index += 1
        if not self._every:
            return False
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        if self._index == 0:
            self._first = digest
        elif not self._second and digest != self._first:
            self._second = digest
        if digest == self._first:
            return False
        return digest == self._second or int.from_bytes(digest, "little") % self._every == 0


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for text in documents:
        if not text:
            continue
        batch.append(text)
        chars += len(text)
        if chars >= _BATCH_CHARS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _encode_source(
    name: str,
    documents: Iterable[str],
    tokenizer: Tokenizer,
    train: ShardWriter,
    val: ShardWriter,
    fim_rate: float,
    split_share: float,
    seed: int,
    held_out_every: int,
    log: Callable[[str], None],
) -> SourceRow:
    held_out_next = HeldOut(held_out_every)
    n_bytes = n_documents = n_fim = 0
    last = time.monotonic()
    for batch in _batches(documents):
        texts: list[str] = []  # one per plain document, three per document with fill-in-the-middle
        plan: list[tuple[bool, bool, np.random.Generator | None]] = []  # held out, in the middle, generator
        for index, text in enumerate(batch, start=n_documents):
            n_bytes += len(text.encode())
            if held_out_next(text):
                texts.append(text)
                plan.append((True, False, None))
                continue
            own_rng = _document_rng(seed, name, index)
            parts = apply_fim(text, own_rng, fim_rate)
            texts.extend(parts or (text,))
            plan.append((False, parts is not None, own_rng))
        encoded = iter(tokenizer.encode_batch(texts))
        for held_out, in_the_middle, rng in plan:
            if in_the_middle:
                prefix, middle, suffix = next(encoded), next(encoded), next(encoded)
                body = fim_order(tokenizer, prefix, middle, suffix)
                n_fim += 1
            else:
                body = [*next(encoded), tokenizer.eos_id]
            ids = np.array([tokenizer.bos_id, *body], dtype=np.uint32)
            if rng is not None:
                ids = tokenizer.split_punctuation_newline(ids, split_share, rng)
            (val if held_out else train).add(ids)
        n_documents += len(batch)
        if time.monotonic() - last > _PROGRESS_SECONDS:
            last = time.monotonic()
            log(f"shards: {name}: {n_documents} documents, {n_bytes / 1e6:.1f} MB so far")
    tokens = train.tokens + val.tokens
    source = getattr(documents, "source", None)
    return SourceRow(
        source=name,
        documents=n_documents,
        bytes=n_bytes,
        tokens=tokens,
        bytes_per_token=round(n_bytes / max(1, tokens), 3),
        val_documents=val.documents,
        val_tokens=val.tokens,
        fim_documents=n_fim,
        licence=source.licence if source else "unknown",
        package=source.package if source else "",
        version=source.version if source else None,
    )


def build_shards(
    corpus: Mapping[str, Iterable[str]],
    tokenizer: Tokenizer,
    out_dir: str | Path,
    *,
    fim_rate: float = 0.1,
    split_share: float = 0.1,
    seed: int = 0,
    held_out_every: int = 50,
    max_tokens_per_shard: int = 1 << 24,
    log: Callable[[str], None] = print,
) -> list[SourceRow]:
    """Write `out_dir/train/<source>` and `out_dir/val/<source>`, and the table as `out_dir/corpus.json`.

    Each document is bos, its tokens, eos. `held_out_every=50` holds out about one document in fifty (0:
    none). Memory does not grow with the corpus. An error leaves no complete-looking folder of the source
    under way, and no corpus.json.
    """
    for argument, value in (("fim_rate", fim_rate), ("split_share", split_share)):
        if not 0 <= value <= 1:
            raise UserError(f"{argument} must be between 0 and 1, got {value}")
    if held_out_every < 0 or held_out_every == 1:
        raise UserError(f"held_out_every must be 0 (hold out nothing) or at least 2, got {held_out_every}")
    out = Path(out_dir)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / CORPUS_RECORD).unlink(missing_ok=True)
    rows: list[SourceRow] = []
    for name, documents in corpus.items():
        started = time.monotonic()
        with ExitStack() as stack:
            train, val = (
                stack.enter_context(
                    ShardWriter(
                        out / part / name,
                        name,
                        tokenizer.fingerprint,
                        max_tokens_per_shard,
                        token_bytes=tokenizer.token_bytes,
                    )
                )
                for part in ("train", "val")
            )
            row = _encode_source(
                name, documents, tokenizer, train, val, fim_rate, split_share, seed, held_out_every, log
            )
            if not row.documents:
                raise UserError(f"corpus: source {name} holds no text; leave it out")
        rows.append(row)
        log(
            f"shards: {name}: {row.documents} documents, {row.bytes / 1e6:.2f} MB, {row.tokens} tokens, "
            f"{row.bytes_per_token:.2f} bytes/token ({time.monotonic() - started:.1f} s)"
        )
        if held_out_every and not row.val_documents:
            log(f"shards: {name}: a single text cannot be held out; it has no held-out loss")
    record = {
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "fim_rate": fim_rate,
        "split_share": split_share,
        "seed": seed,
        "held_out_every": held_out_every,
        "sources": [asdict(row) for row in rows],
    }
    write_json(out / CORPUS_RECORD, record)
    return rows


def open_shards(
    out_dir: str | Path, part: str = "train", tokenizer_fingerprint: str | None = None
) -> dict[str, ShardReader]:
    """The readers of every source that `build_shards` wrote, in the order of their names; sources without
    documents in this part are left out."""
    folder = Path(out_dir) / part
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    readers = {name: ShardReader(folder / name, tokenizer_fingerprint) for name in names}
    readers = {name: reader for name, reader in readers.items() if len(reader)}
    if not readers:
        raise UserError(f"{folder}: no token shards there; build them first")
    return readers


def format_table(rows: Sequence[SourceRow]) -> str:
    """The table that the demo prints: one line per source, and the sum."""

    def line(name: str, sizes_of: Sequence[SourceRow], licence: str) -> str:
        documents, n_bytes, tokens, held_out = (
            sum(getattr(row, field) for row in sizes_of)
            for field in ("documents", "bytes", "tokens", "val_documents")
        )
        ratio = n_bytes / max(1, tokens)
        sizes = f"{documents:>10}{n_bytes / 1e6:>9.2f}{tokens:>11}{ratio:>13.2f}{held_out:>10}"
        return f"{name:<16}{sizes}  {licence}".rstrip()

    head = (
        f"{'source':<16}{'documents':>10}{'MB':>9}{'tokens':>11}{'bytes/token':>13}{'held out':>10}  licence"
    )
    return "\n".join([head, *(line(row.source, [row], row.licence) for row in rows), line("total", rows, "")])
