"""Generation from the latent cache, and speculative decoding with MTP."""

from __future__ import annotations

from examples.report import plots
from examples.report.folder import RunFolder
from examples.report.page import Part

STAGE = "generate"
TITLE = "Generation and speculative decoding (sections 2.2, 5.4.3)"
ASKS = (
    "The report's MTP module drafts the second next token, 85 to 90 % of its drafts are accepted, and decoding is 1.8 times as fast. "
    "Here 60 % must be accepted, and what comes out must be what greedy decoding gives."
)
WANTED = 0.6


def write(run: RunFolder, part: Part) -> None:
    """Acceptance by source, and samples."""
    r = run.results[STAGE]
    if "acceptance" in r:
        accepted = r["acceptance"]
        bound = f"> {WANTED} (tiny)" if run.config["name"] == "tiny" else ""
        part.find("mtp_acceptance", "share of MTP drafts accepted", accepted, bound, accepted > WANTED)
        equal = r["equals_greedy"]
        part.find("speculative_equals_greedy", "speculative equals greedy decoding", equal, "1", equal)
        part.text(
            f"{accepted:.1%} of the drafts are accepted: {r['new_tokens']} tokens for {r['prompts']} prompts, {r['tokens_per_pass']:.2f} "
            f"tokens a pass instead of 1 ({r['plain_tokens_per_second']:.0f} tokens/s without and "
            f"{r['speculative_tokens_per_second']:.0f} with drafts on this machine). The output "
            f"{'equals that of greedy decoding, token by token' if equal else 'DIFFERS from greedy decoding'}."
        )
        if "difference" in r:
            d = r["difference"]
            part.text(
                f"{d['prompts']} of {r['prompts']} prompts differ, the first at token {d['token']} of prompt {d['prompt']}, where greedy's and "
                f"the other choice have the logits {' and '.join(f'{v:g}' for v in d['logits'])}."
            )
        shares = {**r["acceptance_by_source"], "all": accepted}
        plots.bars(part.folder / "acceptance.png", "MTP drafts accepted", "share", shares, form="{:.1%}")
        part.pictures([("acceptance.png", "Share of MTP drafts accepted, by source of the prompt")])
    if r.get("samples"):
        part.text(
            "Samples at temperature 0.8; at this size the text has the form of its source and little sense:"
        )
    for sample in r.get("samples", []):
        part.sample(sample["source"], sample["prompt"], sample["text"])
