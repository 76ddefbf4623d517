"""AdamW against torch's (32-bit states); 8-bit states against bitsandbytes' maps."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_kernels import optim
from qlora_kernels.formats import nested_code

KINDS = [name for name in optim.__all__ if name != "GlobalOptimManager"]
ALL = [getattr(optim, name) for name in KINDS]
WIDE = [c for c in ALL if c.bits == 32]
SHAPES = [(64, 96), (7,), (3, 5, 2), (4096,), (9000,)]


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(s).to(dtype).requires_grad_() for s in SHAPES]


def train(
    optimizer: torch.optim.Optimizer, params: list[Tensor], steps: int, seed: int = 2
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("kind", WIDE)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_32_bits_are_torchs(kind, decay) -> None:
    mine, theirs = parameters(), parameters()
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": decay}
    train(kind(mine, **options), mine, 20)
    train(torch.optim.AdamW(theirs, **options), theirs, 20)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)  # 20 steps of a few roundings each


def test_the_maps_are_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(nested_code(), functional.create_dynamic_map(signed=True))
    assert torch.equal(optim.unsigned_code(), functional.create_dynamic_map(signed=False))


def test_rounding_of_states_is_to_the_nearest_code_and_keeps_signs() -> None:
    torch.manual_seed(0)
    for code in (nested_code(), optim.unsigned_code()):
        values = torch.randn(1000) ** 3
        if code[0] == 0:
            values = values.abs()
        codes, absmax = torch.empty(1000, dtype=torch.uint8), torch.empty(4)
        optim.quantize_state(values, code, codes, absmax)
        back = optim.dequantize_state(codes, code, absmax)
        scale = absmax.repeat_interleave(256)[:1000]
        exact = values.double() / scale.double()
        nearest = (exact[:, None] - code.double()).abs().amin(1) * scale
        off = (back - values).abs() > nearest + 2.0**-22 * values.abs()
        assert ((values[off] < 0) & (exact[off].abs() < 1e-6)).all(), "only signs differ"
        assert (back[values < 0] < 0).all() and (back[values > 0] >= 0).all()
        zeros = torch.zeros(1000)
        optim.quantize_state(zeros, code, codes, absmax)
        assert not optim.dequantize_state(codes, code, absmax).any()


@pytest.mark.parametrize("kind", [optim.AdamW8bit, optim.PagedAdamW8bit])
def test_8_bits_follow_32(kind) -> None:
    mine, theirs = parameters(), parameters()
    options = {"lr": 1e-2, "weight_decay": 0.01}
    optimizer = kind(mine, **options)
    train(optimizer, mine, 20)
    train(torch.optim.AdamW(theirs, **options), theirs, 20)
    for a, b, start in zip(mine, theirs, parameters(), strict=True):
        moved = (b - start).norm()
        limit = 2e-6 if a.numel() < optim.MIN_8BIT_SIZE else 0.05  # of how far they went
        assert (a - b).norm() <= limit * moved + 1e-6
    state = optimizer.state[mine[0]]
    bytes_a_value = sum(t.nbytes for t in state.values() if isinstance(t, Tensor)) / mine[0].numel()
    assert state["state1"].dtype == torch.uint8 and bytes_a_value < 2.05


def test_a_gradient_that_is_not_finite_spoils_its_own_value_only() -> None:
    p = torch.ones(8192, requires_grad=True)
    optimizer = optim.AdamW8bit([p], lr=0.1)
    p.grad = torch.ones(8192)
    p.grad[5], p.grad[300] = float("nan"), float("inf")
    optimizer.step()
    assert p.isfinite().all() and p[5] == 1 and p[300] == 1 and (p[6] < 1)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_is_as_if_never_stopped(kind, dtype, tmp_path) -> None:
    whole, parts = parameters(dtype), parameters(dtype)
    optimizer = kind(whole, lr=1e-2)
    train(optimizer, whole, 3)
    train(optimizer, whole, 3, seed=9)
    first = kind(parts, lr=1e-2)
    train(first, parts, 3)
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second = kind(parts, lr=1e-2)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(second, parts, 3, seed=9)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_paged_states_lie_in_a_file(tmp_path) -> None:
    params = parameters()
    optimizer = optim.PagedAdamW(params, paging_folder=tmp_path)
    train(optimizer, params, 1)
    address = optimizer.state[params[0]]["state1"].data_ptr()
    for line in open("/proc/self/maps"):
        begin, _, rest = line.partition("-")
        if int(begin, 16) <= address < int(rest.split()[0], 16):
            assert str(tmp_path) in line and "(deleted)" in line
            break
    else:
        raise AssertionError("the states are nowhere")
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    loaded = optim.PagedAdamW(parameters(), paging_folder=tmp_path)
    loaded.load_state_dict(optimizer.state_dict())


def test_no_room_to_page_is_said(tmp_path, monkeypatch) -> None:
    with pytest.raises(OSError, match="QLORA_KERNELS_PAGING names another folder"):
        train(optim.PagedAdamW(p := parameters(), paging_folder=tmp_path / "none"), p, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="no room for 0 MiB .*No space left on device"):
        train(optim.PagedAdamW(p := parameters(), paging_folder=tmp_path), p, 1)


def test_not_contiguous_parameters_and_groups() -> None:
    base = torch.randn(40, 30)
    mine, theirs = base.clone().T.requires_grad_(), base.clone().T.requires_grad_()
    other, another = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    groups = [{"params": [mine], "lr": 0.1}, {"params": [other], "weight_decay": 0.5}]
    same = [{"params": [theirs], "lr": 0.1}, {"params": [another], "weight_decay": 0.5}]
    train(optim.AdamW(groups), [mine, other], 3)
    train(torch.optim.AdamW(same), [theirs, another], 3)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(other, another, rtol=1e-6, atol=1e-6)


def test_bad_arguments_are_named() -> None:
    p = [torch.ones(3, requires_grad=True)]
    for words, options in {
        "lr must be at least 0": {"lr": -1.0},
        "betas must be in": {"betas": (0.9, 1.0)},
        "eps must be at least 0": {"eps": -1e-8},
        "weight_decay must be at least 0": {"weight_decay": -0.1},
        "optim_bits must be 8 or 32": {"optim_bits": 16},
    }.items():
        with pytest.raises(ValueError, match=words):
            optim.AdamW(p, **options)
    p[0].grad = torch.zeros(3).to_sparse()
    with pytest.raises(ValueError, match="SparseAdam"):
        optim.AdamW(p).step()


def test_closure() -> None:
    p = torch.ones(3, requires_grad=True)
    optimizer = optim.AdamW([p], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3 and p.sum() < 3


def test_an_op_without_a_kernel_names_itself() -> None:
    """On a CPU the optimizer has torch's arithmetic; who calls its op is told whose it is."""
    one = [torch.ones(3)]
    with pytest.raises(NotImplementedError, match="qlora_kernels::adamw_.*CPU"):
        torch.ops.qlora_kernels.adamw_(one, one, one, one, [], [], None, [0.5] * 8, False)
    with pytest.raises(NotImplementedError, match="qlora_kernels::adamw_capturable_.*CPU"):
        torch.ops.qlora_kernels.adamw_capturable_(
            one, one, one, one, [], [], None, one, None, [0.5] * 5, torch.ones(1, 8), False
        )


@pytest.mark.parametrize("kind", [optim.AdamW, optim.AdamW8bit])
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_capturable_is_the_same_step(kind, tensor, tmp_path) -> None:
    """t, and the learning rate, in tensors: nothing is read of them, and a checkpoint goes from one
    to the other."""
    mine, theirs = parameters(), parameters()
    lr = torch.tensor(1e-2) if tensor else 1e-2
    options = {"weight_decay": 0.1, "betas": (0.9, 0.99)}
    ours = kind(mine, lr=lr, capturable=True, **options)
    plain = kind(theirs, lr=float(lr), **options)
    train(ours, mine, 3)
    train(plain, theirs, 3)
    step = ours.state[mine[0]]["step"]
    address = step.data_ptr()
    assert step == 3 and step.dtype == torch.float32
    if tensor:
        lr.fill_(1e-3)
    for group in (*plain.param_groups, *([] if tensor else ours.param_groups)):
        group["lr"] = float(torch.tensor(1e-3))
    train(ours, mine, 2, seed=5)
    train(plain, theirs, 2, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert ours.state[mine[0]]["step"].data_ptr() == address, "where a graph finds it"

    torch.save(ours.state_dict(), tmp_path / "optimizer.pt")
    again = kind(mine, lr=lr)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert again.param_groups[0]["capturable"]  # as torch's: groups come with the checkpoint
    again.param_groups[0]["capturable"] = False
    train(again, mine, 1, seed=6)
    train(plain, theirs, 1, seed=6)
    assert again.state[mine[0]]["step"] == 6
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_checkpoint_of_before_capturable() -> None:
    params = parameters()
    optimizer = optim.AdamW(params)
    train(optimizer, params, 1)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["capturable"]
    optimizer.load_state_dict(saved)
    train(optimizer, params, 1)
    assert optimizer.state[params[0]]["step"] == 2


def test_a_learning_rate_elsewhere_is_named() -> None:
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    for lr, words in ((torch.ones(2), "2 values on cpu"), (torch.ones((), device="meta"), "meta")):
        optimizer = optim.AdamW([p], lr=1.0, capturable=True)
        optimizer.param_groups[0]["lr"] = lr
        with pytest.raises(ValueError, match=f"tensor of one .*device, cpu; got .*{words}"):
            optimizer.step()


def test_powers_are_powers() -> None:
    for base in (0.0, 0.9, 0.999, 1 - 2.0**-24):
        for n in (0, 1, 2, 3, 10, 1000, 12_345):
            assert optim.power(base, n) == pytest.approx(base**n, rel=1e-13)


def test_the_page(capsys, monkeypatch, tmp_path) -> None:
    """The code of docs/optimizer.md prints what stands there. (The graph: test_adamw.py.)"""
    monkeypatch.setenv("QLORA_KERNELS_PAGING", str(tmp_path))
    page = Path(__file__).parents[1] / "docs" / "optimizer.md"
    text = page.read_text()
    blocks = [b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "CUDAGraph" not in b]
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    first, *where, m, v = capsys.readouterr().out.splitlines()
    assert first == "torch.uint8 2.03125" and f"# {first}; 32-bit states: 8\n" in text
    said = re.findall(r"\*\*\w+\)\)  # (\w+)", text)
    assert where == said and len(said) == 3
    assert f"\n    {m}\n    {v}\n" in text, (m, v)
