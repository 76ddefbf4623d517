"""Formats: the codebooks in use, how NF4 is derived, thresholds, ties, and what is refused."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from qlora_kernels import formats, reference
from qlora_kernels.formats import FORMATS, Format, FormatError, get_format


def test_nf4_is_the_derivation_to_a_rounding_in_the_seventh_digit():
    derived = np.array(formats.derive_nf4())
    assert np.abs(derived - np.array(formats.NF4.codebook)).max() < 2.5e-7
    assert derived[7] == 0 and derived[0] == -1 and derived[15] == 1
    assert (np.diff(derived) > 0).all()


def test_nf4_offset_is_the_mean_of_the_outermost_bins_middles():
    # QLoRA section 3; 0.9677083 is the constant that the field's code carries.
    assert 0.5 * ((1 - 1 / 30) + (1 - 1 / 32)) == pytest.approx(0.9677083, abs=5e-8)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codebooks_are_the_peers_bit_for_bit(name):
    peer = pytest.importorskip("bitsandbytes.functional")
    ours = get_format(name).tensors()[0]
    theirs = peer.get_4bit_type(name, device="cpu")
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


def test_nested_code_is_the_peers_bit_for_bit():
    peer = pytest.importorskip("bitsandbytes.functional")
    ours, theirs = formats.nested_code(), peer.create_dynamic_map()
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


def test_bits_a_weight():
    assert formats.NF4.bits_per_weight(64, nested=True) == pytest.approx(4.127, abs=5e-4)
    assert formats.NF4.bits_per_weight(64, nested=False) == 4.5


def test_e2m1_is_the_standard_one_and_fp4_is_not():
    magnitudes = sorted({abs(v) * 6 for v in formats.FP4_E2M1.codebook})
    assert magnitudes == pytest.approx([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert sorted(formats.FP4.codebook) != sorted(formats.FP4_E2M1.codebook)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_a_value_gets_the_nearest_code_and_ties_go_down(fmt):
    book, thresholds, codes = fmt.tables
    ranked = book[codes]
    assert (np.diff(ranked) >= 0).all()
    for value in np.linspace(-1, 1, 4001, dtype=np.float32):
        rank = int((value > thresholds).sum())
        distance = np.abs(ranked.astype(np.float64) - value)
        assert distance[rank] <= distance.min() + 1e-7
    for i, t in enumerate(thresholds):
        assert int((t > thresholds).sum()) <= i  # the tie itself goes to the lower neighbour


def test_ties_can_go_up():
    book = np.linspace(-1, 1, 16)
    down, up = Format("t_down", book), Format("t_up", book, ties=[True] * 15)
    tie = torch.from_numpy(down.tables[1].copy())  # each midpoint, as values of a block
    w = torch.cat([tie, torch.ones(1)])
    q_down, _ = reference.quantize(w, down, 16)
    q_up, _ = reference.quantize(w, up, 16)
    unpack = lambda q: torch.stack([q >> 4, q & 15], 1).view(-1)[:15]  # noqa: E731
    assert unpack(q_down).tolist() == list(range(15))
    assert unpack(q_up).tolist() == list(range(1, 16))


def test_given_thresholds_are_used():
    book = np.linspace(-1, 1, 16)
    floor = Format("t_floor", book, thresholds=book[1:], ties=[True] * 15)
    w = torch.tensor([-1.0, -0.9, 0.0, 0.99, 1.0] + [0.0] * 11)
    q, _ = reference.quantize(w, floor, 16)
    codes = torch.stack([q >> 4, q & 15], 1).view(-1)
    assert codes[:5].tolist() == [0, 0, 7, 14, 15]


@pytest.mark.parametrize(
    ("book", "message"),
    [
        ([0.0] * 15, "16 values, got 15"),
        ([0.0] * 17, "16 values, got 17"),
        ([float("nan")] + [0.0] * 15, "finite"),
        ([float("inf")] + [0.0] * 15, "finite"),
        ([1e300] + [0.0] * 15, "finite in fp32"),
        ([0.5] * 16, "equal values"),
    ],
)
def test_bad_codebooks(book, message):
    with pytest.raises(FormatError, match=message):
        Format("bad", book)


def test_bad_thresholds_ties_names():
    book = np.linspace(-1, 1, 16)
    with pytest.raises(FormatError, match="ascending"):
        Format("bad", book, thresholds=-book[1:])
    with pytest.raises(FormatError, match="15"):
        Format("bad", book, ties=[True])
    with pytest.raises(FormatError, match="name"):
        Format("no spaces", book)
    with pytest.raises(FormatError, match="did you mean 'nf4'"):
        get_format("nf5")
    with pytest.raises(ValueError, match="got 48"):
        formats.check_blocksize(48)
    with pytest.raises(FormatError, match="already registered"):
        formats.register_format(Format("nf4", book))


def test_formats_travel():
    own = Format("t_own", np.linspace(-1, 1, 16))
    assert pickle.loads(pickle.dumps(formats.NF4)) is formats.NF4
    for twin in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert all(np.array_equal(a, b) for a, b in zip(twin.tables, own.tables, strict=True))


def test_tables_made_under_inference_mode_or_fake_tensors_do_not_spoil_later_use(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    from qlora_kernels import functional as F4

    monkeypatch.setattr(formats, "_KEPT", {})
    with FakeTensorMode():
        packed, state = F4.quantize_4bit(
            torch.empty(64, 64), quant_type="nf4", compress_statistics=True
        )
        assert isinstance(packed, FakeTensor) and packed.shape == (2048, 1)
        assert isinstance(state.code, FakeTensor)
    with torch.inference_mode():
        packed, state = F4.quantize_4bit(
            torch.randn(64, 64), quant_type="nf4", compress_statistics=True
        )
    assert not state.code.is_inference() and not formats.nested_code().is_inference()


def test_formats_that_the_peer_cannot_read_are_not_written_under_its_name():
    from qlora_kernels import functional as F4

    for fmt, blocksize, key in (
        ("nf4", 64, "quant_state.bitsandbytes__nf4"),
        ("nf4", 16, "quant_state.qlora_kernels__nf4"),
        ("int4", 64, "quant_state.qlora_kernels__int4"),
    ):
        w = torch.randn(64, 64)
        packed, state = F4.quantize_4bit(w, quant_type=fmt, blocksize=blocksize)
        entries = state.as_dict(packed=True)
        assert key in entries
        again = F4.QuantState.from_dict(entries)
        assert torch.equal(F4.dequantize_4bit(packed, again), F4.dequantize_4bit(packed, state))
