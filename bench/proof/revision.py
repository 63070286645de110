"""Which source was proven: the commit, and a digest of the files that decide a result.

A lent machine often gets the files without `.git`: then the digest alone tells, and `--commit` may name the commit.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_SOURCES = ("csrc", "deepseek_ops", "bench", "tests", "CMakeLists.txt", "setup.py")
_KINDS = {".py", ".cu", ".cuh", ".h", ".cpp", ".txt"}


@dataclass(frozen=True)
class Revision:
    """commit: full hash or "" when unknown; dirty: files differ from it; tree: digest of the sources."""

    commit: str
    dirty: bool
    tree: str

    @property
    def slug(self) -> str:
        """Short and unambiguous, for file names: a commit alone only when the files are exactly it."""
        if self.commit and not self.dirty:
            return self.commit[:12]
        return f"{self.commit[:12]}+{self.tree}" if self.commit else f"tree-{self.tree}"

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def tree_digest(root: Path = ROOT, sources: Sequence[str] = _SOURCES) -> str:
    """12 hex digits over names and contents of the sources under `root`."""
    digest = hashlib.sha256()
    for name in sources:
        top = root / name
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.suffix in _KINDS and path.is_file() and "__pycache__" not in path.parts:
                digest.update(str(path.relative_to(root)).encode() + b"\0")
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def current(commit: str | None = None, root: Path = ROOT, sources: Sequence[str] = _SOURCES) -> Revision:
    """The revision of `root`; `commit` overrides what git says (for a copy without `.git`)."""
    tree = tree_digest(root, sources)
    head = _git(root, "rev-parse", "HEAD")
    if commit:
        return Revision(commit, False if head is None else head != commit or _is_dirty(root, sources), tree)
    return Revision(head or "", _is_dirty(root, sources) if head else False, tree)


def _is_dirty(root: Path, sources: Sequence[str]) -> bool:
    return bool(_git(root, "status", "--porcelain", "--", *sources))


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
