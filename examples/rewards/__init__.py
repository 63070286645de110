"""Rewards of reinforcement learning and of rejection sampling (report section 5.2.1).

    rules.py     what a rule can decide: boxed answers, exact maths, code by its tests, format, language
    maths.py     answers that say the same; expression.py evaluates them exactly
    pairs.py     preference pairs whose better response is known
    voting.py    a majority of judgements, for questions that no rule decides
    style.py     length and style control of distillation (section 5.1)
    model.py     a judge trained from the SFT checkpoint on preference pairs with a rationale
    sandbox.py   where code of a model runs; jail.py, kernel.py and seccomp.py are its inside

A rule is a plain callable: `reward(prompt, response, reference) -> float`.
"""
