"""What `goku-ops` and the status page may ask of a controller."""

from typing import Any

from goku_infra.control.allocation import Allocation
from goku_infra.control.fleet import Node
from goku_infra.control.recovery import Recovery
from goku_infra.control.run_state import RunState
from goku_infra.errors import OpsError
from goku_infra.views import Finding


class Operators:
    """Carries out commands, or refuses them in one line."""

    def __init__(self, state: RunState, recovery: Recovery, allocation: Allocation) -> None:
        self._state = state
        self._recovery = recovery
        self._allocation = allocation

    def operate(self, command: str, request: dict[str, Any]) -> dict[str, Any]:
        """
        Raises:
            OpsError: it cannot be done; one line says why.
        """
        match command:
            case "stop":
                return {"text": self.stop(save=bool(request.get("save")), requeue=bool(request.get("requeue")))}
            case "restart":
                return {"text": self._restart()}
            case "drain":
                return {"text": self._drain(self._known(str(request["node"])), str(request["reason"]))}
            case "readmit":
                self._allocation.readmit(self._known(str(request["node"])), "by the operator")
            case "unfit":
                node = self._state.fleet.node(str(request["node"]), int(request["place"]))
                self._allocation.exclude(node, str(request["reason"]))
            case "answered":
                self._note_answer(int(request["request"]), bool(request["approved"]), request["by"])
            case _:
                raise OpsError(f"the controller does not know {command!r}")
        return {}

    def stop(self, *, save: bool, requeue: bool) -> str:
        """End the run, or this start of its job."""
        reason = "asked to go back into the queue" if requeue else "stopped by the operator"
        return self._recovery.stop(save=save, requeue=requeue, reason=reason)

    def _restart(self) -> str:
        if self._state.status != "running":
            raise OpsError(f"the run is {self._state.status}; wait until it is running")
        self._recovery.open(Finding(cause="operator", detail="asked for by the operator"))
        return f"incident {self._state.incident}: restarting"

    def _drain(self, node: Node, reason: str) -> str:
        least = self._state.settings.min_nodes
        if len([other for other in self._state.fleet.ready() if other is not node]) < least:
            raise OpsError(f"without {node.name} fewer than {least} nodes are left; stop the run instead")
        was_training = node.training
        self._allocation.exclude(node, reason)
        if was_training and self._state.status in ("starting", "running"):
            finding = Finding(cause="operator", node=node.name, detail=f"drained by the operator: {reason}")
            self._recovery.open(finding)
        return f"{node.name} is drained"

    def _note_answer(self, number: int, approved: bool, by: str) -> None:
        if number not in self._state.requests:
            raise OpsError(f"there is no open request {number}")
        del self._state.requests[number]
        self._state.journal.write("request_answered", request=number, approved=approved, by=by)

    def _known(self, name: str) -> Node:
        nodes = self._state.fleet.nodes
        if name not in nodes:
            raise OpsError(f"there is no node {name}; nodes: {', '.join(sorted(nodes))}")
        return nodes[name]
