"""Find out which of many changes work together, by halves."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["largest_fitting"]


def largest_fitting(
    clusters: list[list[int]], problem_of: Callable[[list[int]], str]
) -> tuple[list[list[int]], dict[int, str]]:
    """As many clusters as work together: those of a half that does not are tried by halves again.

    Args:
        clusters: of what is changed together.
        problem_of: what is wrong when all these are changed; "" where nothing is.

    Returns:
        The clusters that work, and for every member of the others what is wrong with it.
    """
    accepted: list[list[int]] = []
    wrong: dict[int, str] = {}

    def visit(part: list[list[int]]) -> None:
        if not part:
            return
        problem = problem_of([group for cluster in (*accepted, *part) for group in cluster])
        if not problem:
            accepted.extend(part)
        elif len(part) == 1:
            wrong.update(dict.fromkeys(part[0], problem))
        else:
            visit(part[: len(part) // 2])
            visit(part[len(part) // 2 :])

    visit(clusters)
    return accepted, wrong
