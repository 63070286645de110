"""lm-eval's tasks on our model: its three methods, each a few lines over `TextModel`.

    from lm_eval import simple_evaluate
    simple_evaluate(model=lm_eval_model(TextModel(model, tokenizer)), tasks=["arc_easy"])

lm-eval is an optional package (extra "evals"). `Adapter` has the methods without it: a request is anything with `.args`, as
lm-eval's Instance is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from examples.errors import UserError
from examples.evals.text_model import TextModel, cut

_GREEDY = {"temperature": 0.0, "top_p": 1.0}


class Adapter:
    """loglikelihood: args (context, continuation) -> (log-probability, is greedy). loglikelihood_rolling: args (text,) ->
    log-probability. generate_until: args (context, {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}) -> text."""

    def __init__(self, text_model: TextModel) -> None:
        super().__init__()
        self.text_model = text_model

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """An empty context is the beginning of a text."""
        return self.text_model.loglikelihood([request.args for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Texts of any length, in windows."""
        return self.text_model.loglikelihood_rolling([request.args[0] for request in requests])

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy unless a request says do_sample or a temperature; requests with the same settings run together."""
        groups: dict[tuple, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(self._settings(request.args[1]), []).append(number)
        texts = [""] * len(requests)
        for (new, temperature, top_p), numbers in groups.items():
            contexts = [requests[number].args[0] for number in numbers]
            said = self.text_model.generate_until(contexts, (), new, temperature=temperature, top_p=top_p)
            for number, text in zip(numbers, said, strict=True):
                until = requests[number].args[1].get("until") or ()
                texts[number] = cut(text, [until] if isinstance(until, str) else until)
        return texts

    def _settings(self, options: dict[str, Any]) -> tuple[int, float, float]:
        known = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
        if unknown := sorted(options.keys() - known):
            raise UserError(
                f"generate_until: options must be of {', '.join(sorted(known))}; got {', '.join(unknown)}"
            )
        new = int(options.get("max_gen_toks") or self.text_model.max_new_tokens)
        new = min(new, self.text_model.limit - 1)
        sampled = options.get("do_sample", float(options.get("temperature") or 0) > 0)
        if not sampled:
            return new, _GREEDY["temperature"], _GREEDY["top_p"]
        return new, float(options.get("temperature") or 1.0), float(options.get("top_p") or 1.0)


def lm_eval_model(text_model: TextModel) -> Any:
    """An instance of lm-eval's LM class."""
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise UserError(f"lm-eval: is not installed (pip install 'lm-eval==0.4.13'); got {error}") from None
    return type("DeepSeekOpsLM", (Adapter, LM), {})(text_model)
