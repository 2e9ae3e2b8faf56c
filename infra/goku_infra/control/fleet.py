"""The nodes and ranks of a run as their agents have last described them.

Agents send ages, not times, so clocks need not agree: when an age arrives, it is counted on by the controller's
monotonic clock.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from goku_infra.views import GpuView, NodeView, RankView, Role

OURS = {"node", "heard_age_s", "exit_code", "left_early", "last_lines"}
"""Fields of a rank that its agent does not say in its reports."""
OBSERVED = frozenset(field.name for field in fields(RankView)) - OURS


@dataclass
class Node:
    """One node: what its agent has said, and what the policy thinks of it."""

    name: str
    index: int
    """Place in the allocation: nodes are taken for training in this order."""
    address: str = ""
    slots: int = 0
    store_port: int = 0
    """Where its agent offers the store of the next generation."""
    keeper_port: int = 0
    """Where its agent's keeper answers; 0: nothing was ever heard of one."""
    connected: bool = False
    heard_at: float = 0.0
    excluded: str = ""
    """Why it may not train; empty: it may."""
    lost: str = ""
    """Why it is not here; empty: it is."""
    training: bool = False
    idle: bool = True
    """None of its ranks is left of an earlier generation."""
    brought: int | None = None
    """The generation whose ranks its agent had when it came to this controller, 0: none; None: it has not come."""
    stopping: bool = False
    """It was told to end its ranks and has not answered yet."""
    stacks: dict[int, str] | None = None
    """Its ranks' stacks; None: asked for and not there yet."""
    back_since: float | None = None
    """When its agent died while the node lived on: another agent is on its way."""
    health: tuple[str, ...] = ()
    gpus: tuple[GpuView, ...] = ()

    @property
    def critical(self) -> list[str]:
        """Findings with which a node must not begin to train."""
        return [line for line in self.health if line.startswith("critical")]

    @property
    def role(self) -> Role:
        if self.lost or not self.connected:
            return "lost"
        return "excluded" if self.excluded else "training" if self.training else "spare"

    def view(self, now: float) -> NodeView:
        return NodeView(
            name=self.name, host=self.address, role=self.role, slots=self.slots,
            heard_age_s=round(now - self.heard_at, 3), reason=self.excluded or self.lost, health=self.health,
            gpus=self.gpus,
        )  # fmt: skip


@dataclass
class Fleet:
    """All nodes by name, and the ranks of the present generation by number."""

    nodes: dict[str, Node] = field(default_factory=dict)
    ranks: dict[int, RankView] = field(default_factory=dict)
    seen_at: dict[int, float] = field(default_factory=dict)
    """When each rank was last described, on the controller's clock."""
    exited: dict[int, RankView] = field(default_factory=dict)
    """Those of the ranks that have ended, in the order in which that was heard."""
    first_end_at: float = 0.0
    """When the first of them was heard of; 0: none."""
    early_ends: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Node and word of ends in a generation whose ranks have not been taken over yet."""

    def node(self, name: str, index: int = 0) -> Node:
        """The node of that name, made if it is new."""
        node = self.nodes.setdefault(name, Node(name, index))
        node.index = index or node.index
        return node

    def recall(self, name: str, joined: dict[str, Any]) -> Node:
        """A node as the journal's event `node_joined` knows it."""
        node = self.node(name, joined["place"])
        node.address, node.keeper_port = joined["host"], joined["keeper_port"]
        return node

    def welcome(self, name: str, hello: dict[str, Any], now: float) -> Node:
        """An agent has come, for the first time or again."""
        node = self.node(name, hello["index"])
        node.address, node.slots = hello["address"], hello["slots"]
        node.store_port, node.keeper_port = hello["store_port"], hello["keeper_port"]
        node.connected, node.lost, node.back_since, node.heard_at = True, "", None, now
        node.brought, node.idle, node.stopping = hello["generation"], not hello["generation"], False
        return node

    def hear(self, name: str, message: dict[str, Any], generation: int, now: float) -> None:
        """What an agent says; of ranks only what belongs to the present `generation`."""
        node = self.nodes[name]
        node.heard_at = now
        kind = message["kind"]
        if kind == "stopped":
            node.idle, node.store_port = not message["stuck"], message["store_port"]
            node.stopping = False
        elif kind == "ranks":
            node.health = tuple(message["health"])  # also of a spare, which has no ranks of this generation
            node.gpus = tuple(message["gpus"])
        if message.get("generation") != generation:
            return
        if kind == "ranks":
            self.observe(message["ranks"], now)
        elif kind == "ended" and message["rank"] not in self.ranks:
            self.early_ends.append((name, message))
        elif kind == "ended":
            self.ended(message["rank"], message["exit_code"], message["last_lines"], message["record_left"])
            self.first_end_at = self.first_end_at or now
        elif kind == "started":
            node.idle = False
        elif kind == "stacks":
            node.stacks = {int(rank): text for rank, text in message["stacks"].items()}

    def begin(self, order: list[Node], ranks_per_node: int) -> None:
        """A new generation: ranks in the order of nodes, nothing known of them yet."""
        chosen = {node.name for node in order}
        for node in self.nodes.values():
            node.training = node.name in chosen
        places = [(node.name, local) for node in order for local in range(ranks_per_node)]
        self.ranks = {
            rank: RankView(rank=rank, node=name, local_rank=local) for rank, (name, local) in enumerate(places)
        }
        self.seen_at, self.exited, self.first_end_at, self.early_ends = {}, {}, 0.0, []

    def observe(self, observations: list[dict[str, Any]], now: float) -> None:
        """What an agent says of its ranks; a rank that has ended stays as it was."""
        for observed in observations:
            rank = observed["rank"]
            if rank in self.ranks and rank not in self.exited:
                for name in observed.keys() - OBSERVED:
                    del observed[name]
                self.ranks[rank] = _changed(self.ranks[rank], observed)
                self.seen_at[rank] = now

    def ended(self, rank: int, exit_code: int, last_lines: list[str], record_left: bool = False) -> None:
        """record_left: it has not taken its heartbeat record with it, as a rank does that ends well."""
        if rank in self.ranks and rank not in self.exited:
            left_early = record_left and exit_code == 0
            end = {
                "exit_code": exit_code, "left_early": left_early, "process_state": "-", "last_lines": tuple(last_lines),
            }  # fmt: skip
            self.ranks[rank] = self.exited[rank] = _changed(self.ranks[rank], end)

    def rank_views(self, now: float) -> list[RankView]:
        """Every rank as of now, in order: its ages have grown since its agent described it."""
        return [self._aged(view, now) for view in self.ranks.values()]

    def _aged(self, view: RankView, now: float) -> RankView:
        if view.exit_code is not None or view.rank not in self.seen_at:
            return view
        passed = now - self.seen_at[view.rank]
        aged = {
            "phase_age_s": view.phase_age_s + passed, "alive_age_s": view.alive_age_s + passed, "heard_age_s": passed,
        }  # fmt: skip
        return _changed(view, aged)

    def ready(self) -> list[Node]:
        """Nodes that can train now, in the order of the allocation; a sick one only where it trains already."""
        usable = (
            node
            for node in self.nodes.values()
            if node.connected and not node.excluded and not node.lost and (node.training or not node.critical)
        )
        return sorted(usable, key=lambda node: node.index)

    def startable(self) -> list[Node]:
        """Nodes that can train and have ended all of their ranks: a busy one still offers the store of before."""
        return [node for node in self.ready() if node.idle]

    def all_silent(self, *, except_at: str, now: float, limit_s: float) -> bool:
        """Whether nothing is heard of any node but those at one address, which may be that address's own fault."""
        others = [node for node in self.nodes.values() if node.connected and node.address != except_at]
        return bool(others) and all(now - node.heard_at > limit_s for node in others)

    def step(self) -> int:
        """The step that every rank of the generation has reached."""
        return min((view.step for view in self.ranks.values()), default=0)

    def committed_step(self) -> int:
        return max((view.committed_step for view in self.ranks.values()), default=-1)


def _changed(view: RankView, changes: dict[str, Any]) -> RankView:
    """The view with some fields changed: `dataclasses.replace` at a fraction of its cost, for thousands of ranks."""
    made = object.__new__(RankView)
    object.__setattr__(made, "__dict__", {**vars(view), **changes})
    return made
