"""The meaning of every op in pure PyTorch: the specification, the CPU backend, and the oracle of the kernels.

A module here has the same name as the public module it defines, and its functions take the op's schema
arguments positionally. Nothing in it checks arguments (the public function did) or knows about autograd.
"""
