"""Two processes train one model: DistributedDataParallel and FSDP2 on gloo, beside one process.

The same batch, in one process or half of it in each: gradients are averages over equal halves, so
they are one process's but for the order of fp32 sums.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qlora_kernels.nn import (
    LoraLinear4bit,
    LoraSpec,
    lora_state_dict,
    mark_only_lora_as_trainable,
    replace_linear_layers,
)

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")

WORLD, STEPS, WIDTH = 2, 3, 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 95), nn.Linear(95, WIDTH)  # odd: nothing divides it

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))


def make_model() -> nn.Sequential:
    """Two blocks, 4-bit with adapters; norms and the output layer are dense and train as well."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Linear(WIDTH, 7))
    replace_linear_layers(model, skip=["2"], lora=LoraSpec(r=4), verbose=False)
    mark_only_lora_as_trainable(model)
    for module in model.modules():
        if isinstance(module, LoraLinear4bit):
            nn.init.normal_(module.lora_B, std=0.1)
        elif isinstance(module, nn.LayerNorm):
            module.requires_grad_(True)
    model[2].requires_grad_(True)
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 5, WIDTH, generator=generator),
            torch.randn(8, 5, 7, generator=generator),
        )
        for _ in range(STEPS)
    ]


def train(model: nn.Module, rank: int | None = None) -> tuple[list[float], list[dict]]:
    """Losses of the whole batch and gradients after each backward; ``rank``: on its half of it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses, gradients = [], []
    for x, y in batches():
        if rank is not None:
            x, y = x.chunk(WORLD)[rank], y.chunk(WORLD)[rank]
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        gradients.append(
            {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.requires_grad}
        )
        optimizer.step()
        loss = loss.detach()
        if rank is not None:
            dist.all_reduce(loss)
            loss /= WORLD
        losses.append(loss.item())
    return losses, gradients


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Sums of 40 rows in another order, three steps of an optimizer on."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5 * value.abs().max(),
                                   msg=lambda text, name=name: f"{name}: {text}")  # fmt: skip


def agree(model: nn.Module, rank: int, plain: Callable[[str], str] = str) -> nn.Module:
    """Trains the wrapped model beside one process's; ``plain``: a wrapped parameter's own name."""
    alone = make_model()
    want_losses, want = train(alone)
    losses, gradients = train(model, rank)
    assert losses == pytest.approx(want_losses, rel=1e-5)
    assert losses[-1] < losses[0]
    for mine, theirs in zip(gradients, want, strict=True):
        close({plain(name): value for name, value in mine.items()}, theirs)
    return alone


def spawn(tmp_path: Path, work: Callable[..., None], *args: Any) -> None:
    """``work(rank, *args)`` in each of the processes; the first error is raised here."""
    mp.spawn(_run, (str(tmp_path / "meet"), work, args), nprocs=WORLD)


def _run(rank: int, meet: str, work: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=WORLD)
    try:
        work(rank, *args)
    finally:
        dist.destroy_process_group()


# --- DistributedDataParallel --------------------------------------------------------------------


def half(t: Tensor, rank: int) -> Tensor:
    return t.chunk(WORLD)[rank]


def _ddp(rank: int) -> None:
    for static in (False, True):
        model = make_model()
        if rank:  # what the first process has is everybody's, packed weights and scales too
            with torch.no_grad():
                for t in (model[0].up.lora_A, model[0].up.weight, model[0].up.absmax):
                    t.zero_()
        wrapped = nn.parallel.DistributedDataParallel(model, static_graph=static)
        alone = agree(wrapped, rank, lambda name: name.removeprefix("module."))
        close(model.state_dict(), alone.state_dict())
    # Two backward passes whose gradients are exchanged once; buffers are sent before each forward.
    (x, y), (more, target) = batches()[:2]
    wrapped = nn.parallel.DistributedDataParallel(model)
    for parameter in (*model.parameters(), *alone.parameters()):
        parameter.grad = None
    with wrapped.no_sync():
        first = (wrapped(half(x, rank)) - half(y, rank)).square().mean()
        first.backward()
    (wrapped(half(more, rank)) - half(target, rank)).square().mean().backward()
    ((alone(x) - y).square().mean() + (alone(more) - target).square().mean()).backward()
    want = {n: p.grad for n, p in alone.named_parameters() if p.requires_grad}
    close({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, want)


def test_ddp_is_one_process(tmp_path) -> None:
    spawn(tmp_path, _ddp)


# --- FSDP2 --------------------------------------------------------------------------------------


def shard(model: nn.Module, reshard: bool) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model[:2]:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshard)


def _fsdp(rank: int, folder: str) -> None:
    for reshard in (True, False):
        model = shard(make_model(), reshard)
        packed = model[0].up.weight
        assert isinstance(packed, DTensor) and packed.dtype == torch.uint8
        assert packed.to_local().numel() == packed.numel() // WORLD, "each has half of the bytes"
        alone = agree(model, rank)
        for module in (*model[:2], model):
            module.reshard()

    # A state dict of whole tensors is one process's, to the bit where nothing was trained.
    want, state = alone.state_dict(), model.state_dict()
    close({key: whole(value) for key, value in state.items()}, want)
    for key, value in state.items():
        if key.split(".")[2:3] == ["weight"] and "norm" not in key:
            assert torch.equal(whole(value), want[key]), key
    adapters = {key: whole(value) for key, value in lora_state_dict(model).items()}
    close(adapters, lora_state_dict(alone))
    # It makes a model for one process,
    one = make_model()
    one.load_state_dict({key: whole(value) for key, value in state.items()})
    # and is written and read in shards.
    dcp.save(state, checkpoint_id=folder)
    again = shard(make_model(), True)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.to_local().zero_()
    read = again.state_dict()
    dcp.load(read, checkpoint_id=folder)
    again.load_state_dict(read)
    x = batches()[0][0]
    with torch.no_grad():
        torch.testing.assert_close(model(x), one(x))
        assert torch.equal(again(x), model(x))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_fsdp_is_one_process(tmp_path) -> None:
    spawn(tmp_path, _fsdp, str(tmp_path / "checkpoint"))
