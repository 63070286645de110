"""DeepSeek-V3 in Hugging Face form, in and out: names, config.json, shards, FP8 scales, tokenizer, official names.

    names       our tensors under the released names; state dicts in memory
    config      config.json, both ways
    tensors     one safetensors file: read by ranges, written in a stream
    folder      a folder of shards: read with every tensor accounted for, written atomically and resumably
    fp8         which weights are FP8 in the released files, and their scales
    checkpoint  our checkpoints, read by ranges
    export      checkpoint -> folder
    load        folder -> model, or -> checkpoint
    official    folder <-> rank files of deepseek-ai/DeepSeek-V3's inference code
    tokenizer   the tokenizer's files

Nothing here holds more than a block of some megabytes of any tensor, so a model of any size goes through; nothing
unpickles; nothing is downloaded. The command line is `python -m examples.hf`.
"""

from examples.model.hf.config import hf_config
from examples.model.hf.names import hf_views, load_hf_state_dict, to_hf_state_dict

__all__ = ["hf_config", "hf_views", "load_hf_state_dict", "to_hf_state_dict"]
