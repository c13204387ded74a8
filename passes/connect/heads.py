"""Which units make up one head of an attention: its queries and keys, and the values that their product weighs."""

from __future__ import annotations

import numpy as np

from growfx.passes.connect.signals import LED, MIX, Ints, Signals

__all__ = ["find_heads"]


def find_heads(signals: Signals, of_group: Ints) -> list[Ints]:
    """Return for every head the groups of its units, ascending.

    Queries and keys of a head are what one product of two activations sums over. Its values are what the mix of these
    leads, and nothing else: a mix over several heads ties its values to none of them.

    Args:
        signals: all signals of a run.
        of_group: signal -> group, 0 for none.
    """
    rows = [row for block in signals.summed for row in block]
    found = [np.unique(groups[groups > 0]) for groups in (of_group[signals.plain(row)] for row in rows)]
    heads = _joined([row for row in found if len(row)])
    if not heads:
        return []
    head_of = {int(group): number for number, head in enumerate(heads) for group in head}
    led = np.flatnonzero(signals.kind == LED)
    led = led[signals.kind[signals.right[led]] == MIX]
    known: dict[int, int | None] = {}
    values: list[list[int]] = [[] for _ in heads]
    for unit, mix in zip(signals.plain(led).tolist(), signals.right[led].tolist(), strict=True):
        if mix not in known:
            members = of_group[_units_in(signals, mix)].tolist()
            owners = {head_of.get(group) for group in members if group}
            known[mix] = owners.pop() if len(owners) == 1 else None
        number, group = known[mix], int(of_group[unit])
        if number is not None and group:
            values[number].append(group)
    return _joined([np.union1d(head, np.array(more, np.int64)) for head, more in zip(heads, values, strict=True)])


def _units_in(signals: Signals, mix: int) -> Ints:
    """Everything with a place of its own in a mix, those inside its mixes included."""
    waiting, seen = np.array([mix]), np.array([mix])
    found: list[Ints] = [np.zeros(0, np.int64)]
    while len(waiting):
        found.append(signals.leading(waiting))
        listed = [signals.members[item] for item in waiting.tolist() if item in signals.members]
        inner = np.isin(signals.kind[waiting], (LED, MIX))
        parts = np.concatenate([signals.left[waiting[inner]], signals.right[waiting[inner]], *listed])
        waiting = np.setdiff1d(parts[parts > 0], seen)
        seen = np.union1d(seen, waiting)
    return np.unique(np.concatenate(found))


def _joined(sets: list[Ints]) -> list[Ints]:
    """The sets, those that share an element as one, in the order of their smallest elements."""
    if not sets:
        return []
    from scipy.sparse import coo_array  # loaded where it is needed: it is slow to import
    from scipy.sparse.csgraph import connected_components

    elements, place = np.unique(np.concatenate(sets), return_inverse=True)
    owner = np.repeat(np.arange(len(sets)), [len(one) for one in sets])
    links = coo_array((np.ones(len(place), np.int32), (owner, place.reshape(-1))), shape=(len(sets), len(elements)))
    _, label = connected_components(links @ links.T, directed=False)
    members = label[owner]
    joined = [np.unique(elements[place.reshape(-1)[members == number]]) for number in np.unique(label)]
    return sorted(joined, key=lambda one: int(one[0]))
