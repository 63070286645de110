"""Programs from their docstrings: pass@k on problems in HumanEval's public format, run in the sandbox.

A user's JSONL (or .jsonl.gz) has on each line task_id, prompt (a function's head and docstring), entry_point, test (a function
`check(candidate)`) and canonical_solution. A few problems of our own stand below, so that the evaluation runs everywhere; they
are easier than HumanEval's and their score must not be read as one.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.data.files import disk_errors
from examples.errors import UserError
from examples.evals.statistics import pass_at_k
from examples.evals.text_model import cut
from examples.rewards.rules import run_tests
from examples.rewards.sandbox import Sandbox

# Where a completion has left the function that it was to write.
STOPS = (
    "\nclass ",
    "\ndef ",
    "\nif ",
    "\nprint(",
    "\n#",
    "\n@",
    "\n```",
    "\nassert ",
    "\nimport ",
    "\nfrom ",
)
FIELDS = ("task_id", "prompt", "entry_point", "test", "canonical_solution")
Complete = Callable[
    [Sequence[str], int], list[str]
]  # prompts, number of the sample (its seed) -> completions


@dataclass(frozen=True)
class Problem:
    """One line of the format."""

    task_id: str
    prompt: str
    entry_point: str
    test: str
    canonical_solution: str

    def passes(self, sandbox: Sandbox, completion: str) -> bool:
        """Whether the tests pass with this completion."""
        return run_tests(sandbox, self.prompt + completion, f"{self.test}\ncheck({self.entry_point})\n")[0]


def _own(name: str, arguments: str, about: str, solution: str, *checks: str) -> Problem:
    test = "def check(candidate):\n" + "".join(f"    assert candidate{check}\n" for check in checks)
    prompt = f'def {name}({arguments}):\n    """{about}"""\n'
    return Problem(f"own/{name}", prompt, name, test, f"    {solution}\n")


OWN = (
    _own("add", "a, b", "Return the sum of a and b.", "return a + b", "(2, 3) == 5", "(-4, 4) == 0"),
    _own("largest", "numbers", "Return the largest of the numbers.", "return max(numbers)", "([3, 9, 2]) == 9", "([-5, -7]) == -5"),
    _own("is_even", "n", "Return True if n is even.", "return n % 2 == 0", "(4) is True", "(7) is False", "(0) is True"),
    _own("backwards", "text", "Return the text backwards.", "return text[::-1]", "('abc') == 'cba'", "('') == ''"),
    _own("count_vowels", "text", "Return how many of a, e, i, o, u are in text.",
         "return sum(c in 'aeiou' for c in text)", "('banana') == 3", "('xyz') == 0"),
    _own("factorial", "n", "Return n factorial.",
         "result = 1\n    for i in range(2, n + 1):\n        result *= i\n    return result", "(0) == 1", "(5) == 120"),
)  # fmt: skip


def read_problems(path: Path) -> list[Problem]:
    """From .jsonl or .jsonl.gz; an error names the line."""
    try:
        with disk_errors(path, "reading"):
            content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (UnicodeDecodeError, EOFError, zlib.error, UserError) as error:
        raise UserError(
            f"{path}: must be JSON lines, packed by gzip if it ends in .gz; got {error}"
        ) from None
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error})") from None
        missing = [
            name for name in FIELDS if not isinstance(record, dict) or not isinstance(record.get(name), str)
        ]
        if missing:
            raise UserError(
                f"{path}:{number}: needs the strings {', '.join(FIELDS)}; missing {', '.join(missing)}"
            )
        problems.append(Problem(**{name: record[name] for name in FIELDS}))
    if not problems:
        raise UserError(f"{path}: there is no problem in it")
    return problems


def evaluate(
    complete: Complete,
    problems: Sequence[Problem],
    sandbox: Sandbox,
    *,
    samples: int = 1,
    ks: Sequence[int] = (1,),
    workers: int | None = None,
) -> dict[str, Any]:
    """pass@k of each k, estimated from `samples` completions of each problem.

    Returns {"pass@1": ..., "samples": ..., "problems": ..., "passed": {task_id: how many}}.
    """
    if not problems:
        raise UserError("HumanEval: there is no problem")
    for k in ks:
        if not 1 <= k <= samples:
            raise UserError(f"HumanEval: k must be 1 to samples = {samples}; got {k}")
    prompts = [problem.prompt for problem in problems]
    jobs = []
    for number in range(samples):
        completions = complete(prompts, number)
        jobs += [(problem, cut(text, STOPS)) for problem, text in zip(problems, completions, strict=True)]
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        outcomes = list(pool.map(lambda job: job[0].passes(sandbox, job[1]), jobs))
    passed = dict.fromkeys((problem.task_id for problem in problems), 0)
    for (problem, _), ok in zip(jobs, outcomes, strict=True):
        passed[problem.task_id] += ok
    result: dict[str, Any] = {
        f"pass@{k}": sum(pass_at_k(samples, count, k) for count in passed.values()) / len(passed) for k in ks
    }
    return result | {"samples": samples, "problems": len(problems), "passed": passed}
