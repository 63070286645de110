"""The reference with the bits of the kernels: backend "modelled".

Only ops whose kernel rounds elsewhere than the fast PyTorch expression have a function here, one module per family with
the names of `deepseek_ops/reference/`. Slower, exact to the bit, and what `emulated` and `checked` are compared with.
"""
