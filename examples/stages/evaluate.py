"""What the trained model knows: bits per byte of each source, with the trained weights and with their EMA."""

from __future__ import annotations

from typing import Any

from examples.evals.perplexity import HeldOut
from examples.stages.stage import Context
from examples.stages.tokenize import open_data
from examples.train.loop import Trainer

TOKENS = 32768  # of each source, at most


def run(context: Context) -> dict[str, Any]:
    """Evaluate the last checkpoint of `pretrain`."""
    _tokenizer, train, val = open_data(context.root)
    trainer = Trainer(context.config, context.root / "pretrain", train, val)
    result = trainer.evaluate(TOKENS)
    params = dict(trainer.model.named_parameters())
    with trainer.ema.swap(params):
        average = trainer.evaluate(TOKENS)
    print(table({"trained": result, "EMA": average}), flush=True)
    return {"trained": result.to_dict(), "ema": average.to_dict()}


def table(results: dict[str, HeldOut]) -> str:
    """Loss and bits per byte by source."""
    lines = [f"  {'source':14}" + "".join(f"{name:>10} nats  bits/byte" for name in results)]
    names = list(next(iter(results.values())).sources)
    for source in names:
        cells = "".join(
            f"{r.sources[source].loss:15.4f}{r.sources[source].bits_per_byte:11.3f}" for r in results.values()
        )
        lines.append(f"  {source:14}{cells}")
    total = "".join(f"{r.loss:15.4f}{r.bits_per_byte:11.3f}" for r in results.values())
    return "\n".join([*lines, f"  {'all':14}{total}"])
