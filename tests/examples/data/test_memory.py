"""Memory does not grow with the corpus: the whole path in its own process, at two sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# Writes a corpus of argv[1] MB as JSON lines, shards it, reads an epoch in batches and the held-out part, and
# prints the peak resident memory. VmHWM rather than ru_maxrss: the latter survives exec, so a child would
# report its parent's peak.
PROGRAM = """
import json, random, re, sys
from pathlib import Path
import torch
from examples.data.build import build_shards, open_shards
from examples.data.corpus import load_corpus, training_sample
from examples.data.evaluation import EvalBatches
from examples.data.pack import PackedLoader
from examples.data.tokenizer import Tokenizer

torch.set_num_threads(1)
megabytes, out = int(sys.argv[1]), Path(sys.argv[2])
rng = random.Random(0)
letters = "abcdefghijklmnopqrstuvwxyz"
words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(3000)]
paragraphs = [" ".join(rng.choices(words, k=100)) + ".\\n\\n" for _ in range(500)]
written = 0
with open(out / "big.jsonl", "w") as file:
    while written < megabytes * 1_000_000:
        text = f"{written} " + "".join(rng.choices(paragraphs, k=5))
        written += file.write(json.dumps({"text": text}) + "\\n")
corpus = load_corpus([], user=[out / "big.jsonl"])
tokenizer = Tokenizer.train(training_sample(corpus, 1_000_000), 2048)
options = dict(max_tokens_per_shard=1 << 20, log=lambda line: None)
(row,) = build_shards(corpus, tokenizer, out / "shards", **options)
train, val = (open_shards(out / "shards", part, tokenizer.fingerprint) for part in ("train", "val"))
loader = PackedLoader(train, None, 1024, seed=0)
while loader.epochs["user-big"] < 1:
    loader.next_batch(8)
loss_tokens = sum(int(b.loss_mask.sum()) for b, _ in EvalBatches(val["user-big"], 1024, 8))
(peak,) = re.findall(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
result = dict(peak_mb=int(peak) / 1e3, tokens=row.tokens, bytes=row.bytes)
print(json.dumps({**result, "fed": loader.tokens_seen, "held_out": loss_tokens}))
"""


def _run(megabytes: int, folder, timeout: float) -> dict:
    folder.mkdir()
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(megabytes), str(folder)],
        capture_output=True, text=True, timeout=timeout, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["bytes"] >= 0.95e6 * megabytes
    assert result["fed"] >= 0.95 * result["tokens"] and result["held_out"] > 0.005 * result["tokens"]
    return result


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")


@needs_proc
def test_peak_memory_does_not_grow_with_the_corpus(tmp_path):
    small, large = _run(3, tmp_path / "small", 120), _run(15, tmp_path / "large", 120)
    grown = large["peak_mb"] - small["peak_mb"]
    assert grown < 6, f"12 MB more text took {grown:.1f} MB more memory ({small}, {large})"


@needs_proc
@pytest.mark.slow
def test_two_gigabytes_in_constant_memory(tmp_path):
    small, large = _run(50, tmp_path / "small", 600), _run(2000, tmp_path / "large", 7200)
    grown = large["peak_mb"] - small["peak_mb"]
    assert grown < 40, f"2 GB of text took {grown:.1f} MB more memory ({small}, {large})"
