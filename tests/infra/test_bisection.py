"""The search for bad nodes and links names exactly those that were planted, in a bounded number of tests."""

import random
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import given

from goku_infra.checks.bisection import bisect_nodes, first_round, pair_rounds


class Cluster:
    """Nodes 0 to n-1 of which some fail alone, some fail in company, and some pairs fail together."""

    def __init__(self, alone: Sequence[int] = (), company: Sequence[int] = (), links: Sequence[tuple[int, int]] = ()):
        self.alone, self.company = set(alone), set(company)
        self.links = [set(link) for link in links]
        self.tests = 0

    def passes(self, group: Sequence[int]) -> bool:
        self.tests += 1
        members = set(group)
        assert len(members) == len(group) > 0
        in_company = len(members) > 1 and members & self.company
        return not (members & self.alone or in_company or any(link <= members for link in self.links))


def most_tests(nodes: int, found: int) -> int:
    """The most groups that may be tested before `found` bad nodes and links are known."""
    halvings = max(nodes - 1, 1).bit_length()
    # Two searches by halves and their repetition, the pair, one alone, one put aside, what is left; and the judges.
    return 1 + found * (2 * halvings + 6 + 6 * (found + 1))


@st.composite
def clusters(draw):
    """A cluster of up to 40 nodes, at least half of them sound, each with at most one bad link."""
    nodes = list(range(draw(st.integers(1, 40))))
    order = draw(st.permutations(nodes))
    # Someone must be left that tells two bad nodes from a bad link: three sound nodes.
    spare = max(len(nodes) - 3, 0)
    alone = draw(st.integers(0, min(4, spare // 2)))
    company = draw(st.integers(0, min(4, (spare - alone) // 2)))
    links = draw(st.integers(0, min(3, (spare - alone - company) // 2)))
    ends = order[alone + company : alone + company + 2 * links]
    return (
        draw(st.permutations(nodes)),
        order[:alone],
        order[alone : alone + company],
        list(zip(ends[::2], ends[1::2], strict=True)),
    )


@given(clusters())
def test_exactly_the_planted_faults_are_named_within_the_bound(planted):
    nodes, alone, company, links = planted
    cluster = Cluster(alone, company, links)
    verdict = bisect_nodes(nodes, cluster.passes)
    assert set(verdict.nodes) == {*alone, *company}
    assert {frozenset(link) for link in verdict.links} == {frozenset(link) for link in links}
    assert verdict.unresolved == ()
    assert verdict.tests == cluster.tests <= most_tests(len(nodes), len(alone) + len(company) + len(links))


@pytest.mark.parametrize("bad", [0, 1, 511, 1023])
def test_one_bad_node_of_a_thousand_takes_at_most_27_tests(bad):
    verdict = bisect_nodes(range(1024), Cluster(company=[bad]).passes)
    assert verdict.nodes == (bad,) and verdict.tests <= 27


def test_a_sound_group_takes_one_test():
    verdict = bisect_nodes(range(64), Cluster().passes)
    assert (verdict.nodes, verdict.links, verdict.unresolved, verdict.tests) == ((), (), (), 1)


def test_two_nodes_that_fail_only_together_stay_a_pair_when_nobody_can_judge():
    verdict = bisect_nodes("ab", Cluster(company=["a"]).passes)
    assert verdict.nodes == () and set(verdict.links[0]) == {"a", "b"}


def test_a_node_with_two_bad_links_is_the_bad_one():
    verdict = bisect_nodes(range(8), Cluster(links=[(2, 5), (2, 7)]).passes)
    assert (verdict.nodes, verdict.links) == ((2,), ())


@pytest.mark.parametrize("seed", range(20))
def test_a_node_that_fails_every_other_time_is_found_with_repeats(seed):
    steady, chance = Cluster(company=[11]), random.Random(seed)

    def flaky(group):
        return steady.passes(group) or chance.random() < 0.5

    assert bisect_nodes(range(32), flaky, repeats=20).nodes == (11,)


def test_a_failure_that_never_comes_back_blames_nobody():
    answers = iter([False])
    verdict = bisect_nodes(range(16), lambda group: next(answers, True))
    assert (verdict.nodes, verdict.links, verdict.unresolved) == ((), (), ())


def test_a_group_that_fails_only_as_a_whole_is_left_unresolved():
    verdict = bisect_nodes(range(8), lambda group: len(group) < 8)
    assert (verdict.nodes, verdict.links, verdict.unresolved) == ((), (), tuple(range(8)))


@given(st.integers(1, 33), st.data())
def test_two_rounds_of_pairs_name_the_bad_nodes(count, data):
    nodes = list(range(count))
    bad = data.draw(st.sets(st.sampled_from(nodes), max_size=count // 4))
    cluster = Cluster(company=sorted(bad))
    rounds = []

    def test(groups):
        rounds.append([node for group in groups for node in group])
        assert len(set(rounds[-1])) == len(rounds[-1])  # disjoint: they can run at once
        return [cluster.passes(group) for group in groups]

    named, unjudged = pair_rounds(nodes, test)
    assert len(rounds) <= 2
    assert set(named) <= bad <= {*named, *unjudged}
    assert sorted(rounds[0]) == nodes
    if 3 * len(bad) <= len(first_round(nodes)):  # enough groups pass to judge every doubtful node
        assert not unjudged
