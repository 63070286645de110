"""Real text to packed batches: corpus -> tokenizer -> shards -> mixture -> packed rows (report section 4.1).

Read in this order: `corpus.py` (where text comes from), `tokenizer.py` (byte-level BPE), `fim.py`,
`shards.py` and `build.py` (tokens on disk), `mixture.py` (which document is next), `pack.py` (rows of
tokens), `evaluation.py`.
"""
