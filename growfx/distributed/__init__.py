"""Ranks of a distributed run: who they are, what they exchange, and tensors of which each holds a part.

Import its modules: the command line needs `launch` before torch is there.
"""
