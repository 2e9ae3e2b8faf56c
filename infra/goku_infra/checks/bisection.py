"""From "this group of nodes fails" to the nodes or links at fault, in few tests. Pure: the test itself is an argument.

Two ways. `pair_rounds` needs two rounds of tests whatever the number of nodes, since the groups of a round run at once,
but only names nodes. `bisect_nodes` tests one group after another and also finds links: two nodes that work, but not
with each other.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Node = TypeVar("Node", bound=Hashable)
RESTARTS = 3
"""How often a search that met a contradiction, so a test that changed its mind, starts again."""


@dataclass(frozen=True)
class Verdict(Generic[Node]):
    """What a search has found."""

    nodes: tuple[Node, ...] = ()
    """Nodes that fail alone, or with more than one other node."""
    links: tuple[tuple[Node, Node], ...] = ()
    """Pairs that fail together though both pass with others; or that nobody was left to tell apart."""
    unresolved: tuple[Node, ...] = ()
    """A group that failed, but no part of it would fail again."""
    tests: int = 0
    """Groups tested, repetitions counted."""


def bisect_nodes(nodes: Sequence[Node], test: Callable[[Sequence[Node]], bool], *, repeats: int = 1) -> Verdict[Node]:
    """Find what makes `nodes` fail, in about 2 log2(nodes) tests a fault, times `repeats`, if `test` is steady.

    Args:
        test: whether this group passes. A group with a failing part must fail, too.
        repeats: a group passes only if it passes so many times in a row, for faults that come and go.
    """
    return _Search(test, repeats).run(list(nodes))


class _Search(Generic[Node]):
    def __init__(self, test: Callable[[Sequence[Node]], bool], repeats: int) -> None:
        self._test = test
        self._repeats = repeats
        self._tests = 0

    def run(self, nodes: list[Node]) -> Verdict[Node]:
        bad: list[Node] = []
        links: list[tuple[Node, Node]] = []
        rest, restarts = nodes, 0
        while not self._passes(rest):
            found = self._find(rest)
            if not found:
                restarts += 1
                if restarts > RESTARTS:
                    return Verdict(tuple(bad), tuple(links), tuple(rest), self._tests)
            elif len(found) == 2 and found[0] != found[1]:
                links.append((found[0], found[1]))
                rest = [node for node in rest if node != found[0]]
            else:
                bad.append(found[0])
                rest = [node for node in rest if node != found[0]]
        sound: list[tuple[Node, Node]] = []
        for aside, partner in links:
            # One end of a bad link was put aside. If it fails without the other end, too, the node itself is at fault.
            others = [node for node in rest if node != partner]
            if others and not self._passes([*others, aside]):
                bad.append(aside)
            else:
                sound.append((aside, partner))
        ends = Counter(node for link in sound for node in link)
        bad += [node for node, count in ends.items() if count > 1]
        return Verdict(tuple(bad), tuple(link for link in sound if not {*link} & {*bad}), (), self._tests)

    def _find(self, nodes: list[Node]) -> tuple[Node, ...]:
        """A bad node `(x,)`, a bad link `(x, y)`, or `()` if what failed passes now."""
        size = self._shortest_failing(nodes, ())
        if size is None:
            return ()
        before, suspect = nodes[: size - 1], nodes[size - 1]
        if not before or not self._passes([suspect]):
            return (suspect,)
        size = self._shortest_failing(before, (suspect,))
        if size is None:
            return ()
        partner = before[size - 1]
        if self._passes([suspect, partner]):
            return ()
        if len(before) > 1:  # they passed together, so the partner is sound, and so is any other of them
            judge = next(node for node in before if node != partner)
            return (suspect, partner) if self._passes([suspect, judge]) else (suspect,)
        return self._tell_apart(suspect, partner, [node for node in nodes if node not in (suspect, partner)])

    def _shortest_failing(self, nodes: list[Node], with_: tuple[Node, ...]) -> int | None:
        """How many of the first `nodes` it takes to fail together with `with_`; None if all of them pass.

        The whole is known to fail, and none of them to pass.
        """
        low, high = 0, len(nodes)
        while high - low > 1:
            middle = (low + high) // 2
            if self._passes([*nodes[:middle], *with_]):
                low = middle
            else:
                high = middle
        if high == len(nodes) and len(nodes) > 1 and self._passes([*nodes, *with_]):
            return None
        return high

    def _tell_apart(self, first: Node, second: Node, judges: list[Node]) -> tuple[Node, ...]:
        """Which of two nodes that fail together is at fault, by a third."""
        doubtful: list[Node] = []
        for judge in judges:
            first_passes, second_passes = self._passes([first, judge]), self._passes([second, judge])
            if first_passes and second_passes:
                return (first, second)
            if first_passes or second_passes:
                return (second,) if first_passes else (first,)
            # Both fail: either this judge is bad, or both of them are. Two judges that pass together are sound.
            if any(self._passes([judge, other]) for other in doubtful[-1:]):
                return (first,)
            doubtful.append(judge)
        return (first, second)

    def _passes(self, group: list[Node]) -> bool:
        for _ in range(self._repeats if group else 0):
            self._tests += 1
            if not self._test(group):
                return False
        return True


def first_round(nodes: Sequence[Node]) -> list[tuple[Node, ...]]:
    """All nodes in pairs, the last one as three if their number is odd."""
    pairs = [tuple(nodes[start : start + 2]) for start in range(0, len(nodes), 2)]
    if len(pairs) > 1 and len(pairs[-1]) == 1:
        pairs[-2:] = [pairs[-2] + pairs[-1]]
    return pairs


def second_round(groups: Sequence[tuple[Node, ...]], passed: Sequence[bool]) -> list[tuple[Node, ...]]:
    """Each node of a group that failed, with one of a group that passed, as far as there are enough of those."""
    sound = [node for group, ok in zip(groups, passed, strict=True) if ok for node in group]
    doubtful = [node for group, ok in zip(groups, passed, strict=True) if not ok for node in group]
    return list(zip(doubtful, sound, strict=False))


def pair_rounds(
    nodes: Sequence[Node], test: Callable[[Sequence[tuple[Node, ...]]], Sequence[bool]]
) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """The nodes whose group failed in both of two rounds, and those that nobody was left to judge.

    The two rounds of DLRover's network check. `test` takes disjoint groups, which it can run at once.
    """
    groups = first_round(nodes)
    passed = test(groups)
    doubtful = [node for group, ok in zip(groups, passed, strict=True) if not ok for node in group]
    again = second_round(groups, passed)
    bad = tuple(pair[0] for pair, ok in zip(again, test(again) if again else (), strict=True) if not ok)
    return bad, tuple(doubtful[len(again) :])
