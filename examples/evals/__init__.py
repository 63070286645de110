"""What a model can do, with an interval and the chance level beside each score.

perplexity.py        held-out loss, bits per byte, expert load
text_model.py        a model as three questions about text; everything below is made of them
arithmetic.py        exact answers            multiple_choice.py   by log-likelihood
humaneval.py         pass@k in the sandbox    needle.py            a fact hidden in a long context
statistics.py        intervals, pass@k, "near chance"
lm_eval_adapter.py   lm-eval's tasks on the same code
"""
