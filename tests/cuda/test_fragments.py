"""The small headers of the GEMMs: copies and swizzles (copy.cuh), fragments (fragments.cuh)
and decoding (gemm_weight.cuh), each alone, against what its comment says."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from qlora_kernels.emulator import Module, emulate, toolchain, uninitialized

from .gemm_launchers import OPTIONS, SOURCES

pytestmark = pytest.mark.skipif(
    toolchain.available() is not None, reason=str(toolchain.available())
)

SOURCE = r"""
#include "copy.cuh"
#include "fragments.cuh"
#include "gemm_weight.cuh"
using namespace qlk::cuda;

template <int kChunks>
__device__ void touch(int* where, int rows) {
  __shared__ __align__(128) uint4 tile[64 * kChunks];
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < rows * kChunks; i += 32)
    where[i] = tile_chunk<kChunks>(i / kChunks, i % kChunks);
  for (int i = lane; i < 64 * kChunks; i += 32) tile[i] = uint4{};
  __syncwarp();
  const uint32_t at = shared_address(tile);
  uint32_t sum = 0;
  // Along a row, down a column, lanes' runs: the three ways of copy.cuh.
  for (int i = 0; i < 2 * kChunks; i += 32) {
    const int chunk = (lane + i) % kChunks, row = (lane + i) / kChunks;
    sum += load_shared(at + tile_chunk<kChunks>(row, chunk) * 16).x;
  }
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    uint32_t m[4];
    load_matrices(m, at + tile_chunk<kChunks>(lane, chunk) * 16);
    sum += m[0];
  }
  for (int w = 0; w < kChunks / 4; ++w)
    sum += load_shared(at + tile_chunk<kChunks>(g, t * (kChunks / 4) + w) * 16).x;
  if (sum) where[0] = -1;
}
extern "C" __global__ void touch4(int* where) { touch<4>(where, 64); }
extern "C" __global__ void touch8(int* where) { touch<8>(where, 64); }
extern "C" __global__ void touch16(int* where) { touch<16>(where, 64); }
extern "C" __global__ void touch32(int* where) { touch<32>(where, 64); }

template <class T>
__device__ void product(const T* a, const T* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto pair = [](const T* from, int stride) {
    uint16_t low, high;
    memcpy(&low, from, 2), memcpy(&high, from + stride, 2);
    return low | uint32_t{high} << 16;
  };
  FragA fa;
  FragB fb;
  FragC fc{};
  for (int i = 0; i < 4; ++i) fa.a[i] = pair(a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8, 1);
  for (int i = 0; i < 2; ++i) fb.b[i] = pair(b + (2 * t + i * 8) * 8 + g, 8);
  multiply_add<T>(fc, fa, fb);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fc.c[i];
}
extern "C" __global__ void product_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  product(a, b, c);
}
extern "C" __global__ void product_f16(const __half* a, const __half* b, float* c) {
  product(a, b, c);
}

extern "C" __global__ void matrices(const uint4* in, uint16_t* plain, uint16_t* transposed) {
  __shared__ __align__(128) uint4 tile[32];
  tile[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  uint32_t p[4], q[4];
  load_matrices(p, shared_address(tile + threadIdx.x));
  load_matrices_transposed(q, shared_address(tile + threadIdx.x));
  for (int i = 0; i < 8; ++i) {
    plain[threadIdx.x * 8 + i] = p[i / 2] >> (16 * (i % 2));
    transposed[threadIdx.x * 8 + i] = q[i / 2] >> (16 * (i % 2));
  }
}

extern "C" __global__ void copies(const uint8_t* matrix, long long rows, long long row_bytes,
                                  long long row0, long long byte0, int index, uint4* out) {
  __shared__ __align__(128) uint4 tile[16 * 4];
  const TileCopy<32, 16, 4> copy(matrix, rows, row_bytes, row0, byte0);
  copy.start(shared_address(tile), index);
  commit_async();
  wait_async<0>();
  __syncthreads();
  for (int i = threadIdx.x; i < 64; i += 32) out[i] = tile[tile_chunk<4>(i / 4, i % 4)];
}

template <class T>
__device__ void decode_words(const float* codebook, const float* scales, const uint32_t* words,
                             uint32_t* out) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  RegisterTable<T> table;
  table.build(codebook, scales[i]);
  uint32_t pairs[4];
  table.decode(words[i], pairs);
  for (int j = 0; j < 4; ++j) out[4 * i + j] = pairs[j];
}
extern "C" __global__ void decode_bf16(const float* c, const float* s, const uint32_t* w,
                                       uint32_t* out) {
  decode_words<__nv_bfloat16>(c, s, w, out);
}
extern "C" __global__ void decode_f16(const float* c, const float* s, const uint32_t* w,
                                      uint32_t* out) {
  decode_words<__half>(c, s, w, out);
}
"""


@functools.cache
def module() -> Module:
    return Module.from_cuda(SOURCE, "sm_80", options=(*OPTIONS, f"-I{SOURCES}"))


@pytest.mark.parametrize("chunks", [4, 8, 16, 32])
def test_swizzle_is_a_permutation_of_lines_free_of_conflicts(chunks):
    where = np.zeros(64 * chunks, np.int32)
    result = emulate(
        module().kernel(f"touch{chunks}"), 1, 32, [uninitialized(where)], device="a100"
    )
    assert sorted(where) == list(range(64 * chunks))
    assert (where // 8 == np.arange(64 * chunks) // 8).all()  # within a line of 128 bytes
    table = result.counts.instructions
    for row, i in zip(table, result.counts.kernel.instructions, strict=True):
        if i.opcode.startswith(("ld.shared", "ldmatrix")):
            assert row["wavefronts"] == row["wavefronts_ideal"], i.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fragments_hold_what_their_picture_says(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    c = torch.zeros(16, 8)
    name = "product_bf16" if dtype == torch.bfloat16 else "product_f16"
    emulate(module().kernel(name), 1, 32, [a, b, c], device="a100")
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=0, atol=1e-5)


def test_matrices_and_their_transposes():
    values = np.arange(256, dtype=np.uint16)  # four of 8 x 8
    plain, transposed = np.zeros(256, np.uint16), np.zeros(256, np.uint16)
    emulate(module().kernel("matrices"), 1, 32, [values, plain, transposed], device="a100")
    four = values.reshape(4, 8, 8)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for m in range(4):
            for i in range(2):
                assert plain[lane * 8 + 2 * m + i] == four[m, g, 2 * t + i]
                assert transposed[lane * 8 + 2 * m + i] == four[m, 2 * t + i, g]


@pytest.mark.parametrize("row0, byte0, index", [(0, 0, 0), (3, 64, 1), (10, 0, 2), (18, 128, 0)])
def test_a_copy_repeats_the_last_row_and_pads_with_zeros(row0, byte0, index):
    """19 rows of 176 bytes: neither rows nor bytes are a multiple of the tile's 16 by 64."""
    matrix = np.random.default_rng(0).integers(1, 255, (19, 176), dtype=np.uint8)
    out = np.zeros((16, 64), np.uint8)
    emulate(
        module().kernel("copies"), 1, 32, [matrix, 19, 176, row0, byte0, index, out],
        device="a100",
    )  # fmt: skip
    first = byte0 + 64 * index
    for i in range(16):
        row = np.zeros(64, np.uint8)
        have = matrix[min(row0 + i, 18), first : first + 64]
        row[: len(have)] = have
        assert (out[i] == row).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decodes_every_byte_in_every_place_to_the_bit(dtype):
    """An unsorted codebook with both signs, zeros and a value that overflows fp16."""
    torch.manual_seed(0)
    book = torch.randn(16)
    book[3], book[11], book[12] = 0.0, -0.0, 3e5
    packed = torch.randint(0, 256, (4 * 1024,), dtype=torch.uint8)
    packed[:1024] = torch.arange(256, dtype=torch.uint8).repeat_interleave(4)
    scales = torch.rand(1024) * 2
    scales[:5] = torch.tensor([0.0, 1e-40, float("inf"), float("nan"), -1.0])
    out = torch.zeros(8 * 1024, dtype=dtype)
    name = "decode_bf16" if dtype == torch.bfloat16 else "decode_f16"
    emulate(
        module().kernel(name), 32, 32, [book, scales, packed.view(torch.int32), out],
        device="a100",
    )  # fmt: skip
    codes = torch.stack([packed >> 4, packed & 15], 1).view(-1)
    want = (book[codes.long()] * scales.repeat_interleave(8)).to(dtype)
    same = (out.view(torch.int16) == want.view(torch.int16)) | (out.isnan() & want.isnan())
    assert same.all()
