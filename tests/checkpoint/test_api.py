"""Any torch module and optimizer: what some ranks save, any others load bit for bit and train on with."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from goku_mega.checkpoint.api import load, save
from goku_mega.checkpoint.load import load_info
from goku_mega.errors import CheckpointError
from launch import run_ranks

pytestmark = pytest.mark.slow

WIDTH = 7
"""Divides by neither 2 nor 3: shards are uneven."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu())


def build(seed: int, *, mesh: tuple[int, ...] | None = None, kind: str = "adamw") -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = Net().double()
    if mesh is not None:
        names = ("replicate", "shard")[-len(mesh) :]
        fully_shard(model, mesh=init_device_mesh("cpu", mesh, mesh_dim_names=names))
    if kind == "adamw":
        groups = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
                  {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0}]  # fmt: skip
        return model, torch.optim.AdamW(groups, lr=1e-2)
    return model, torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    """The same samples on every rank, so that every number of ranks takes the same steps."""
    for step in steps:
        x = torch.randn(8, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Whole tensors of both, by name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = dict(model.state_dict())
    for parameter, values in optimizer.state.items():
        found |= {f"{names[parameter]}/{key}": value for key, value in values.items()}
    return {name: _whole(value).clone() for name, value in found.items()}


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def train_and_save(rank: int, folder: Path, mesh: tuple[int, ...] | None) -> dict[str, Tensor]:
    model, optimizer = build(0, mesh=mesh)
    train(model, optimizer, range(3))
    for group in optimizer.param_groups:
        group["lr"] = 0.003
    state = {"model": model, "optimizer": optimizer, "extra_state": {"epoch": 2, "seen": [1, 2]}}
    assert save(folder, state, global_steps=3) == folder / "step_00000003"
    return everything(model, optimizer)


def load_all(rank: int, folder: Path, mesh: tuple[int, ...] | None) -> tuple[dict[str, Tensor], Any]:
    model, optimizer = build(1, mesh=mesh)
    state = {"model": model, "optimizer": optimizer, "extra_state": {}}
    step = load(folder, state)
    settings = [(group["lr"], group["betas"], group["weight_decay"]) for group in optimizer.param_groups]
    loaded = everything(model, optimizer)
    train(model, optimizer, range(3, 4))  # the state is of the kinds that the optimizer works with
    return loaded, (step, state["extra_state"], settings)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_two_ranks_to_one_to_three_and_back_to_plain_tensors(tmp_path: Path):
    expected = run_ranks(train_and_save, 2, tmp_path, (2,))[0]
    assert {name.split("/")[1] for name in expected if "/" in name} == {"step", "exp_avg", "exp_avg_sq"}
    about = (3, {"epoch": 2, "seen": [1, 2]}, [(0.003, (0.9, 0.999), 0.1), (0.003, (0.9, 0.999), 0.0)])
    for world, mesh in ((1, (1,)), (3, (3,)), (2, None)):
        for found, told in run_ranks(load_all, world, tmp_path, mesh):
            assert same(found, expected), (world, mesh)
            assert told == about


def test_copies_are_written_once_and_shared_between_their_ranks(tmp_path: Path):
    for world, mesh in ((4, (2, 2)), (2, None)):
        folder = tmp_path / str(world)
        expected = run_ranks(train_and_save, world, folder, mesh)[0]
        assert same(load_all_alone(folder), expected)
        sizes = [path.stat().st_size for path in sorted(folder.glob("*/*.distcp"))]
        assert len(sizes) == world and min(sizes) > 0


def load_and_save_again(rank: int, folder: Path, again: Path) -> None:
    model, optimizer = build(1, mesh=(2, 2))
    state = {"model": model, "optimizer": optimizer}
    load(folder, state)
    save(again, state)


def test_what_was_loaded_is_saved_again(tmp_path: Path):
    expected = run_ranks(train_and_save, 1, tmp_path / "first", None)[0]
    run_ranks(load_and_save_again, 4, tmp_path / "first", tmp_path / "second")
    assert same(load_all_alone(tmp_path / "second"), expected)


def load_all_alone(folder: Path) -> dict[str, Tensor]:
    return run_ranks(load_all, 1, folder, None)[0][0]


def test_without_processes_and_with_another_optimizer(tmp_path: Path):
    assert not dist.is_initialized() or dist.get_world_size() == 1
    model, optimizer = build(0, kind="sgd")
    train(model, optimizer, range(2))
    save(tmp_path, {"model": model, "optimizer": optimizer}, global_steps=2)
    expected = everything(model, optimizer)
    train(model, optimizer, range(2, 5))
    later = everything(model, optimizer)

    again = build(1, kind="sgd")
    assert load(tmp_path, {"model": again[0], "optimizer": again[1]}) == 2
    assert same(everything(*again), expected)
    train(*again, range(2, 5))
    assert same(everything(*again), later)


def test_the_model_alone_can_be_saved_and_loaded(tmp_path: Path):
    model, optimizer = build(0)
    train(model, optimizer, range(1))
    save(tmp_path / "both", {"model": model, "optimizer": optimizer})
    save(tmp_path / "model", {"model": model})
    for folder in ("both", "model"):
        other, _ = build(1)
        load(tmp_path / folder, {"model": other})
        assert same(other.state_dict(), model.state_dict())
    with pytest.raises(CheckpointError, match="holds no optimizer"):
        load(tmp_path / "model", {"model": model, "optimizer": optimizer})


def test_the_newest_is_loaded_or_the_one_named_and_old_ones_go_only_if_asked(tmp_path: Path):
    model, _ = build(0)
    for step in (1, 2, 3):
        model.last.bias.data.fill_(step)
        save(tmp_path, {"model": model, "extra_state": {"step": step}}, global_steps=step)
    state = {"model": build(1)[0], "extra_state": {}}
    assert load(tmp_path, state) == 3 and state["extra_state"] == {"step": 3}
    assert load(tmp_path / "step_00000001", state) == 1 and state["model"].last.bias.item() == 1
    save(tmp_path, {"model": model}, global_steps=4, keep=2)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000003", "step_00000004"]
    assert load_info(tmp_path / "step_00000004")["extra_state"] == {}


def unlike_extra_state(rank: int, folder: Path) -> str:
    try:
        save(folder, {"model": build(0)[0], "extra_state": {"rank": rank}})
    except CheckpointError as error:
        return str(error)
    return ""


def test_what_cannot_be_saved_is_refused_and_not_mixed_up(tmp_path: Path):
    assert all("not the same on every rank" in said for said in run_ranks(unlike_extra_state, 2, tmp_path))
    model, _ = build(0)
    with pytest.raises(CheckpointError, match="must be JSON"):
        save(tmp_path, {"model": model, "extra_state": {"generator": torch.zeros(2)}})
    with pytest.raises(CheckpointError, match="parameters that are not the model's"):
        save(tmp_path, {"model": model, "optimizer": build(1)[1]})
    assert list(tmp_path.iterdir()) == []
    save(tmp_path, {"model": model})
    with pytest.raises(CheckpointError, match="holds another model"):
        load(tmp_path, {"model": nn.Linear(2, 2)})
