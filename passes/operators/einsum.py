"""Equations of `einsum`, written out."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["spelled"]


def spelled(equation: str, dims: Sequence[int]) -> tuple[list[str], str]:
    """Index letters of every operand and of the result, ellipses and the result written out.

    Args:
        equation: as of `torch.einsum`, as a string.
        dims: number of axes of every operand.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    spare = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in equation]
    hidden = [dim - len(term.replace("...", "")) if "..." in term else 0 for term, dim in zip(terms, dims, strict=True)]
    longest = max(hidden)
    written = ["".join(spare[longest - count : longest]) for count in hidden]
    if not arrow:
        letters = inputs.replace("...", "").replace(",", "")
        output = "..." + "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    terms = [term.replace("...", letters) for term, letters in zip(terms, written, strict=True)]
    return terms, output.replace("...", "".join(spare[:longest]))
