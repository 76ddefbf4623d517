"""The device table, occupancy, and the cost model: derived by hand, and against NVIDIA's own "
"header."""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from qlora_kernels.emulator import model, sass, toolchain
from qlora_kernels.emulator.devices import DEVICES, get_device, occupancy, with_figures
from qlora_kernels.emulator.model import Work, wave_bytes

MISSING = toolchain.available()
needs_tools = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


# -- devices -------------------------------------------------------------------------------------


def test_every_figure_of_every_device_is_there_with_its_source():
    wanted = {
        "a100-40", "a100-80", "rtx3090", "rtx4090", "l4", "l40s", "a10", "t4", "h100", "h100-pcie",
        "h200", "b200", "rtx5090", "gh200",
    }  # fmt: skip
    assert wanted <= set(DEVICES)
    for device in DEVICES.values():
        assert {"figures", "l2", "dram"} <= set(device.sources), device.key
        assert device.sms > 0 and 1e9 < device.clock < 3e9
        assert 0.75 * device.dram_bandwidth <= device.dram_read <= device.dram_bandwidth
        assert device.l2_bandwidth > device.dram_read
        assert device.l2_latency < device.dram_latency < 1500
        assert 0.2 < device.mma_sync <= 1
        assert device.sm.shared_optin + device.sm.shared_reserved <= device.sm.shared


@pytest.mark.parametrize(
    ("key", "tflops", "fp32"),  # dense fp16 or bf16 and fp32, TFLOP/s, of the data sheets
    [
        ("a100-80", 312, 19.5), ("h200", 989, None), ("h100", 989, None), ("h100-pcie", 756, 51.2),
        ("rtx4090", 165.2, 82.6), ("rtx3090", 71, 35.6), ("l4", 121, 30.3), ("l40s", 366, 91.6),
        ("a10", 125, 31.2), ("t4", 65, 8.1), ("rtx5090", 209.5, 104.8), ("b200", 2250, None),
    ],
)  # fmt: skip
def test_rates_are_those_of_the_data_sheets(key, tflops, fp32):
    device = get_device(key)
    assert device.tensor["fp16"] / 1e12 == pytest.approx(tflops, rel=0.01)
    if fp32:
        assert device.fp32_flops / 1e12 == pytest.approx(fp32, rel=0.01)


def test_issue_slots_for_eight_weights():
    """32 lanes × slots/s over groups of 8 weights/s: the figures that the kernels are judged by."""
    for key, slots in (("a100-80", 39), ("rtx4090", 169)):
        assert get_device(key).slots_per_8_weights() == pytest.approx(slots, rel=0.02)
    device = get_device("h100")
    by_hand = 32 * 132 * 1.83e9 * 4 / (3352e9 / 4.127)
    assert device.slots_per_8_weights() == pytest.approx(by_hand)


def test_names_in_any_spelling_and_the_nearest_for_unknown_ones():
    for spelling in ("h100", "H100", "h100-sxm", "H100 SXM5 80GB"):
        assert get_device(spelling).key == "h100"
    assert get_device("A100").key == "a100-80" and get_device("RTX 4090").key == "rtx4090"
    assert get_device(get_device("l4")).key == "l4"
    with pytest.raises(ValueError, match="did you mean h200"):
        get_device("h20")
    with pytest.raises(ValueError, match="Known: t4, a10"):
        get_device("voodoo")


# -- occupancy -----------------------------------------------------------------------------------


def test_occupancy_by_hand():
    # 256 threads of 64 registers: 8 warps of 2,048 registers; 8 fit each quarter of 16,384.
    fit = occupancy("h100", 256, 64)
    assert (fit.blocks, fit.limiter, fit.share) == (4, "registers", 0.5)
    # 48 KiB and the system's one, of 228.
    assert occupancy("h100", 128, 32, 49152).blocks == 4
    assert occupancy("h100", 128, 32, 49152).limiter == "shared"
    assert occupancy("rtx4090", 32, 16).limiter == "blocks"
    assert occupancy("a100", 1024, 65).blocks == 0
    assert occupancy("a100", 128, 32, 166912).blocks == 1
    assert occupancy("a100", 128, 32, 166913).blocks == 0
    with pytest.raises(ValueError, match="at least one"):
        occupancy("a100", 0, 32)


@needs_tools
def test_occupancy_is_that_of_cuda_occupancy_h(tmp_path):
    """NVIDIA's calculator, compiled, on 4,000 random launches of every capability."""
    draw = random.Random(5)
    keys = ["t4", "a100-80", "a6000", "rtx4090", "h100", "b200", "rtx5090"]
    cases = []
    for _ in range(4000):
        key = draw.choice(keys)
        threads = draw.choice(
            [1, 31, 32, 33, 64, 96, 128, 200, 256, 384, 512, 640, 768, 1000, 1024]
        )
        registers = draw.randint(1, 255)
        shared = draw.choice([0, 1, 1024, draw.randint(0, get_device(key).sm.shared_optin + 64)])
        cases.append((key, threads, registers, shared, draw.choice([0, 1, 2, 16])))
    lines = []
    for key, threads, registers, shared, barriers in cases:
        d, sm = get_device(key), get_device(key).sm
        lines.append(
            f"run({d.capability[0]}, {d.capability[1]}, {sm.threads}, {sm.shared}, "
            f"{sm.shared_optin}, "
            f"{sm.shared_reserved}, {threads}, {registers}, {shared}, {barriers});"
        )
    body = "\n".join(lines)
    source = tmp_path / "occ.cpp"
    source.write_text(
        r"""
        #include <cstdio>
        #include <cstring>
        #include <climits>
        #include <cuda_occupancy.h>
        static void run(int major, int minor, int threads_sm, int shared_sm, int optin,
                        int reserved, int threads, int registers, int shared, int barriers) {
          cudaOccDeviceProp p;
          p.computeMajor = major; p.computeMinor = minor; p.maxThreadsPerBlock = 1024;
          p.maxThreadsPerMultiprocessor = threads_sm;
          p.regsPerBlock = p.regsPerMultiprocessor = 65536;
          p.warpSize = 32; p.sharedMemPerBlock = 49152; p.sharedMemPerMultiprocessor = shared_sm;
          p.numSms = 1; p.sharedMemPerBlockOptin = optin; p.reservedSharedMemPerBlock = reserved;
          cudaOccFuncAttributes f;
          f.maxThreadsPerBlock = 1024; f.numRegs = registers; f.sharedSizeBytes = 0;
          f.partitionedGCConfig = PARTITIONED_GC_OFF; f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
          f.maxDynamicSharedSizeBytes = optin; f.numBlockBarriers = barriers;
          cudaOccDeviceState s; s.cacheConfig = CACHE_PREFER_NONE; s.carveoutConfig = 100;
          cudaOccResult r; memset(&r, 0, sizeof r);
          cudaOccError e = cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &f, &s, threads, shared);
          printf("%d\n", e == CUDA_OCC_SUCCESS ? r.activeBlocksPerMultiprocessor : -1);
        }
        int main() {
        """ + body + "\nreturn 0; }\n"
    )  # fmt: skip
    include = toolchain.find_tool("nvcc").resolve().parent.parent / "include"
    command = ["g++", "-O0", "-w", f"-I{include}", str(source), "-o", str(tmp_path / "occ")]
    subprocess.run(command, check=True)
    out = subprocess.run([str(tmp_path / "occ")], capture_output=True, text=True, check=True).stdout
    theirs = [int(x) for x in out.split()]
    ours = [occupancy(*case).blocks for case in cases]
    wrong = [(c, o, t) for c, o, t in zip(cases, ours, theirs, strict=True) if o != t]
    assert not wrong, wrong[:5]
    assert 0 in theirs and len(set(theirs)) > 10


# -- the model -----------------------------------------------------------------------------------


def work(**changes) -> Work:
    base = {"name": "k", "blocks": 1320, "threads": 256, "registers": 32, "shared": 0}
    return Work(**{**base, **changes})


def test_a_copy_is_bound_by_dram():
    h100 = get_device("h100")
    size = 2**30
    m = model.model(work(dram_read=size, dram_write=size, l2_bytes=2 * size), h100, launch=False)
    assert m.bottleneck == "DRAM"
    assert m.kernel == pytest.approx(2 * size / h100.dram_read)
    assert m.utilisation("DRAM") > 0.99
    assert "modelled" in str(m) and "bound by DRAM" in str(m)


@pytest.mark.parametrize(
    ("changes", "bottleneck", "seconds"),
    [
        # 132 multiprocessors of 1.83 GHz, 10 blocks each.
        ({"l2_bytes": 1e9}, "L2", 1e9 / 9.0e12),
        ({"wavefronts": 6e8, "l1_cycles": 4e8}, "shared memory and L1", 1e9 / 132 / 1.83e9),
        ({"pipes": {"uniform": 2e9, "control": 2e9}}, "issue slots", 4e9 / 132 / 4 / 1.83e9),
        ({"pipes": {"alu": 1e9}}, "issue slots (alu)", 1e9 / 132 / 2 / 1.83e9),
        ({"pipes": {"xu": 1e9}}, "issue slots (xu)", 1e9 / 132 / 0.5 / 1.83e9),
        ({"tensor": {"bf16": 1e12}}, "tensor cores", 1e12 / (989.4e12 * 0.649)),
        ({"tensor_async": {"bf16": 1e12}}, "tensor cores", 1e12 / 989.4e12),
        # 8 blocks are resident: 10 take two rounds, with a turnaround between.
        ({"cycles": 1e6}, "latency", 2 * (1e6 + 382) / 1.83e9),
    ],
)
def test_each_resource_alone_is_the_bottleneck_that_is_named(changes, bottleneck, seconds):
    m = model.model(work(**changes), "h100", launch=False)
    assert m.bottleneck == bottleneck
    assert m.terms[bottleneck] == pytest.approx(seconds, rel=1e-3)
    assert m.kernel == pytest.approx(seconds, rel=1e-3)


def test_the_multiprocessor_with_the_most_blocks_decides():
    """133 blocks on 132 multiprocessors take as long as 264, for what is a multiprocessor's."""
    one = model.model(work(blocks=132, pipes={"fma": 1e6 * 132}), "h100")
    more = model.model(work(blocks=133, pipes={"fma": 1e6 * 133}), "h100")
    full = model.model(work(blocks=264, pipes={"fma": 1e6 * 264}), "h100")
    assert more.terms["issue slots"] == pytest.approx(2 * one.terms["issue slots"])
    assert more.terms["issue slots"] == pytest.approx(full.terms["issue slots"])
    assert more.tail == pytest.approx((1 - 133 / 264) * more.kernel) and full.tail == 0
    few = model.model(work(blocks=1, dram_read=1e6, l2_bytes=1e6), "h100")
    # One multiprocessor cannot draw all of L2's bandwidth.
    assert few.bottleneck == "L2 port"


def test_launch_ramp_and_waves():
    m = model.model(work(blocks=132 * 8 * 3, cycles=1000.0), "h100")
    assert m.waves == pytest.approx(3)
    assert m.launch == get_device("h100").launch
    assert m.time == pytest.approx(m.kernel + m.launch)
    assert m.terms["latency"] == pytest.approx(3 * 1382 / 1.83e9)
    half = model.model(work(cycles=1000.0), "h100", launch=0.5)
    assert half.launch == pytest.approx(m.launch / 2)


def test_few_warps_are_bound_by_their_path_many_by_the_resource_and_it_bends_between():
    """A warp that needs 100 cycles of a resource in a path of 1,000. The oracle is the textbook's
    machine-repairman queue: busy unless empty, P0 = 1 / sum of n!/(n-k)! (d/z)^k."""
    d, z = 100.0, 900.0
    for n in (1, 2, 5, 10, 20, 64):
        ways = sum(math.perm(n, k) * (d / z) ** k for k in range(n + 1))
        speed = model._throughput(n, d, z)
        assert speed * d == pytest.approx(1 - 1 / ways)
        assert speed <= min(n / (d + z), 1 / d) * (1 + 1e-12)
    assert model._throughput(1, d, z) == pytest.approx(1 / 1000)
    assert model._throughput(500, d, z) == pytest.approx(1 / d)


def test_warps_in_lockstep_overlap_less():
    pipes, cycles = {"fma": 1e9}, 2e6
    free = model.model(work(pipes=pipes, cycles=cycles), "h100")
    march = model.model(work(pipes=pipes, cycles=cycles, lockstep=True), "h100")
    assert march.kernel > 1.02 * free.kernel
    assert march.terms == free.terms


def test_bottleneck_is_latency_until_more_warps_would_bring_nothing():
    few = model.model(work(blocks=132, dram_read=1e6, l2_bytes=1e6, cycles=5000.0), "h100")
    many = model.model(work(blocks=13200, dram_read=1e9, l2_bytes=1e9, cycles=5000.0), "h100")
    assert few.bottleneck == "latency" and many.bottleneck == "DRAM"
    assert many.ramp > 0 and many.time > many.terms["DRAM"]


def test_work_scales_with_blocks():
    once = work(blocks=4, pipes={"fma": 8.0}, dram_read=40.0, tensor={"bf16": 4.0}, cycles=9.0)
    many = once.scaled(400, dram_write=7.0)
    assert many.pipes == {"fma": 800.0} and many.dram_read == 4000.0 and many.dram_write == 7.0
    assert many.tensor == {"bf16": 400.0} and many.cycles == 9.0 and many.blocks == 400


def test_a_launch_that_does_not_fit_and_a_type_that_is_not_there():
    with pytest.raises(ValueError, match="does not fit a multiprocessor of RTX A6000.*shared"):
        model.model(work(shared=110000), "a6000")
    with pytest.raises(ValueError, match="no tensor rate for fp8"):
        model.model(work(tensor={"fp8": 1.0}), "a100")


def test_fp16_accumulation_is_twice_as_fast_where_it_is():
    for key, ratio in (("rtx4090", 2), ("rtx3090", 2), ("a100", 1), ("h100", 1), ("l40s", 1)):
        slow = model.model(work(tensor={"fp16": 1e12}), key).terms["tensor cores"]
        fast = model.model(work(tensor={"fp16_acc16": 1e12}), key).terms["tensor cores"]
        assert slow / fast == pytest.approx(ratio)


def test_a_faster_memory_makes_a_copy_faster():
    h100 = get_device("h100")
    twice = with_figures(h100, dram_read=2 * h100.dram_read)
    copy = work(dram_read=1e9, l2_bytes=1e9)
    assert model.model(copy, h100).terms["DRAM"] == 2 * model.model(copy, twice).terms["DRAM"]


# -- traffic of DRAM -----------------------------------------------------------------------------


def test_bytes_of_a_copy_are_each_blocks_own():
    assert wave_bytes(100, (1, 1, 1), (50, 4, 2), 16) == 100 * 400


def test_bytes_of_a_matrix_product_are_its_tiles_by_waves():
    """A's tile depends on the row of blocks alone, B's on the column. 64 × 64 blocks, 128 at a
    time: two rows of blocks, so A once, and all of B for every two rows."""
    assert wave_bytes(1000, (0, 1, 0), (64, 64, 1), 128) == 64 * 1000
    assert wave_bytes(1000, (1, 0, 0), (64, 64, 1), 128) == 32 * 64 * 1000
    # Half a row at a time: A's tile twice, B still a tile for each block.
    assert wave_bytes(1000, (0, 1, 0), (64, 64, 1), 32) == 2 * 64 * 1000
    assert wave_bytes(1000, (1, 0, 0), (64, 64, 1), 32) == 64 * 64 * 1000
    # If B fits in the cache, it is fetched once.
    assert wave_bytes(1000, (1, 0, 0), (64, 64, 1), 32, cache=64000) == 64000


def test_bytes_of_a_stencil_overlap_in_part():
    assert wave_bytes(110, (10 / 11, 0, 0), (1000, 1, 1), 1000) == pytest.approx(110 + 999 * 100)


# -- one warp's path -----------------------------------------------------------------------------


@needs_tools
def test_a_chain_of_fmas_takes_its_latency_and_a_chase_that_of_memory():
    source = r"""
    extern "C" __global__ void chain(float* y, int n) {
      float s = y[threadIdx.x], t = s;
    #pragma unroll 1
      for (int i = 0; i < n; ++i) {
    #pragma unroll
        for (int j = 0; j < 64; ++j) s = s * t + 1.0f;
      }
      y[threadIdx.x] = s;
    }
    extern "C" __global__ void chase(const long long* next, long long* out, int n) {
      const long long* p = next;
    #pragma unroll 1
      for (int i = 0; i < n; ++i) p = (const long long*)*p;
      *out = (long long)p;
    }
    """
    ptx = toolchain.compile_ptx(source, "sm_80").text.replace('.pragma "nounroll";', "")

    def counts(kernel, inside):
        return sass.executions_by_hand(ptx, kernel, lambda text: 1000.0 if inside in text else 1.0)

    functions = sass.load(ptx, "sm_80")
    chain = functions["chain"].dynamic(counts("chain", "fma.rn"), 1)
    chase = functions["chase"].dynamic(counts("chase", "ld.u64"), 1)
    for latency in (200.0, 600.0):
        cycles = model.warp_cycles(chain, "a100", global_latency=latency)
        assert cycles == pytest.approx(1000 * 64 * 4 + latency, rel=0.06)
        cycles = model.warp_cycles(chase, "a100", global_latency=latency)
        assert cycles == pytest.approx(1000 * latency, rel=0.05)


# -- with the emulator's counts ------------------------------------------------------------------

KERNELS = r"""
extern "C" __global__ void copy(const float4* x, float4* y) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = x[i];
}
// 32 x 32 tiles; PAD words of padding a row decide the bank conflicts.
template <int PAD> __device__ void turn(const float* x, float* y, int n) {
  __shared__ float tile[32][32 + PAD];
  int c = blockIdx.x * 32 + threadIdx.x, r = blockIdx.y * 32 + threadIdx.y;
  for (int k = 0; k < 32; k += 8) tile[threadIdx.y + k][threadIdx.x] = x[(r + k) * n + c];
  __syncthreads();
  c = blockIdx.y * 32 + threadIdx.x, r = blockIdx.x * 32 + threadIdx.y;
  for (int k = 0; k < 32; k += 8) y[(r + k) * n + c] = tile[threadIdx.x][threadIdx.y + k];
}
extern "C" __global__ void turn_plain(const float* x, float* y, int n) { turn<0>(x, y, n); }
extern "C" __global__ void turn_padded(const float* x, float* y, int n) { turn<1>(x, y, n); }
// C = A B, 32 x 32 tiles, all sizes multiples of 32.
extern "C" __global__ void product(const float* A, const float* B, float* C, int N, int K) {
  __shared__ float a[32][32], b[32][32];
  int row = blockIdx.y * 32 + threadIdx.y, col = blockIdx.x * 32 + threadIdx.x;
  float sum = 0;
  for (int k = 0; k < K; k += 32) {
    a[threadIdx.y][threadIdx.x] = A[row * K + k + threadIdx.x];
    b[threadIdx.y][threadIdx.x] = B[(k + threadIdx.y) * N + col];
    __syncthreads();
    for (int j = 0; j < 32; ++j) sum += a[threadIdx.y][j] * b[j][threadIdx.x];
    __syncthreads();
  }
  C[row * N + col] = sum;
}
extern "C" __global__ void strided(const float* x, float* y, int step) {
  y[threadIdx.x] = x[threadIdx.x * step];
}
"""


@pytest.fixture(scope="module")
def kernels():
    if MISSING:
        pytest.skip(MISSING)
    from qlora_kernels.emulator import Module

    return Module.from_cuda(KERNELS, "sm_80")


def zeros(count):
    return np.zeros(count, np.float32)


def test_a_copy_profiled_by_two_blocks_moves_each_byte_once(kernels):
    n, blocks = 2**22, 2**22 // (256 * 4)
    args = [zeros(n), zeros(n)]
    profiled, dynamic = model.profile(kernels.kernel("copy"), blocks, 256, args, "a100")
    assert profiled.dram_read == profiled.dram_write == 4 * n
    assert profiled.l2_bytes == 8 * n
    assert dynamic.unexplained == 0 and not profiled.lockstep
    opcodes = dynamic.opcodes()
    assert sum(c for o, c in opcodes.items() if o.startswith("LDG.E.128")) == 8  # a warp each
    # 16 bytes a lane, 128 a clock: 4 clocks for the load, 4 for the store, of each warp.
    assert profiled.l1_cycles == blocks * 8 * (4 + 4)
    m = model.model(profiled, "a100", launch=False)
    assert m.bottleneck == "DRAM"
    assert m.kernel == pytest.approx(8 * n / get_device("a100").dram_read, rel=0.12)


@pytest.mark.parametrize(("kernel", "reads"), [("turn_plain", 32), ("turn_padded", 1)])
def test_wavefronts_of_a_transpose_with_and_without_padding(kernels, kernel, reads):
    """32 warps' worth of rows a tile: a store of one wavefront and a load of 32, or of 1."""
    n = 256
    profiled, _ = model.profile(
        kernels.kernel(kernel), (8, 8), (32, 8), [zeros(n * n), zeros(n * n), n], "a100"
    )
    assert profiled.wavefronts == 64 * 32 * (1 + reads)
    assert profiled.dram_read == profiled.dram_write == 4 * n * n


def test_a_tiled_product_shares_its_tiles_in_a_wave(kernels):
    M, N, K = 1024, 2048, 64
    args = [zeros(M * K), zeros(K * N), zeros(M * N), N, K]
    small = with_figures("a100", l2_bytes=1024)  # nothing stays from wave to wave
    profiled, dynamic = model.profile(kernels.kernel("product"), (64, 32), (32, 32), args, small)
    wave = occupancy(small, 1024, profiled.registers, profiled.shared).blocks * small.sms
    a, b = 4 * 32 * K, 4 * K * 32  # a block's part of each
    expected = wave_bytes(a, (0, 1, 0), (64, 32, 1), wave) + wave_bytes(
        b, (1, 0, 0), (64, 32, 1), wave
    )
    assert profiled.dram_read == pytest.approx(expected)
    assert profiled.dram_write == 4 * M * N
    assert profiled.lockstep
    # Every output takes K multiply-adds: a warp does 32 of them at once.
    assert dynamic.opcodes()["FFMA"] == pytest.approx(32 * K, rel=0.01)
    big = model.profile(kernels.kernel("product"), (64, 32), (32, 32), args, "a100")[0]
    assert big.dram_read == 4 * (M * K + K * N)  # all of it fits in L2


@pytest.mark.parametrize(("step", "clocks"), [(1, 1), (2, 2), (8, 32), (33, 32)])
def test_clocks_of_l1_for_a_strided_load(kernels, step, clocks):
    """On 128 bytes a clock: neighbours take one, 32 lines take a clock each."""
    from qlora_kernels.emulator import emulate

    x, y = zeros(32 * 64), zeros(32)
    counts = emulate(kernels.kernel("strided"), 1, 32, [x, y, step], checks=("counts",)).counts
    assert model.l1_cycles_of(counts, "a100") == clocks + 1  # and the store
    if step == 1:  # half as wide
        assert model.l1_cycles_of(counts, "a6000") == 2 + 2


@pytest.fixture(scope="module")
def benchmark():
    import importlib.util
    from pathlib import Path

    path = Path(__file__).parents[2] / "benchmarks" / "emulator_model.py"
    spec = importlib.util.spec_from_file_location("emulator_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["emulator_model"] = module
    spec.loader.exec_module(module)
    return module


def test_the_validation_covers_many_kernels_and_its_rows_are_sound(benchmark):
    rows = [r for r in benchmark.ROWS if not r.what.endswith("*")]
    assert len({r.kernel for r in rows}) >= 24 and len({r.device for r in rows}) >= 8
    assert all(r.value > 0 and r.source and r.device in DEVICES for r in rows)
    assert all(r.kernel.split("_")[0] in benchmark.CASES for r in rows)
    for source in {r.source for r in rows}:
        assert f"{source} " in benchmark.__doc__, f"{source} is not named in the script's head"
    if MISSING:
        pytest.skip(MISSING)
    chosen = [r for r in rows if r.kernel in ("reduce_shuffle", "stream_triad")][-2:]
    results = benchmark.evaluate(chosen, lambda text: None)
    for r in results:
        assert r["measured_us"] > 0 and abs(r["error"]) < 0.5
        assert r["modelled_us"] == pytest.approx((1 + r["error"]) * r["measured_us"])


def test_the_errors_that_the_documentation_names_are_in_its_table(benchmark):
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "emulator_model.md").read_text()
    *prose, table = text.split("```")[:-1]
    named = set(re.findall(r"[+-]\d[\d.]*%", prose[-1]))
    assert len(named) >= 10 and named <= set(re.findall(r"[+-]\d[\d.]*%", table))
    printed = Counter(line.split()[0] for line in table.splitlines() if line.endswith("]"))
    assert printed == Counter(row.kernel for row in benchmark.ROWS)


def test_a_measured_time_and_a_measured_rate_are_compared_alike(benchmark):
    if MISSING:
        pytest.skip(MISSING)
    row = next(r for r in benchmark.ROWS if r.kernel == "transpose_padded")
    rate = 8 * 4096**2 / (row.value * 1e-6) / 1e9
    as_rate = benchmark.Row(row.kernel, row.device, rate, "GB/s", "", row.block, row.what, 1)
    time, other = benchmark.evaluate([row, as_rate], lambda text: None)
    assert time["error"] == pytest.approx(other["error"]) and time["error"] != 0
    assert time["modelled"] == pytest.approx(time["modelled_us"])


class Kernels:
    """The validation's own kernels, run on small shapes."""

    def __init__(self, source):
        from qlora_kernels.emulator import Module

        self.module = Module.from_cuda(source, "sm_80")

    def __call__(self, name, grid, block, *args, shared=0):
        from qlora_kernels.emulator import emulate

        kernel = self.module.kernel(name)
        emulate(kernel, grid, block, list(args), device="a100", shared_bytes=shared)


@needs_tools
def test_kernels_of_the_validation_compute_what_their_names_say(benchmark):
    import torch

    run = Kernels(benchmark.SOURCE)
    draw = np.random.default_rng(0)

    def some(*shape):
        return draw.standard_normal(shape, np.float32)

    x, y = some(64, 64), zeros((64, 64))
    for name, side, block in (
        ("copy", 32, (32, 8)), ("naive", 32, (32, 8)), ("shared", 32, (32, 8)),
        ("padded", 32, (32, 8)), ("scatter", 16, (16, 16)), ("gather", 16, (16, 16)),
    ):  # fmt: skip
        y[:] = 0
        run(f"transpose_{name}", (64 // side, 64 // side), block, y, x, 64)
        np.testing.assert_array_equal(y, x if name == "copy" else x.T)

    for name, n, each in (("single", 1000, 512), ("vector", 12284, 6144)):
        ints, total = draw.integers(-99, 99, n, np.int32), np.zeros(1, np.int32)
        run(f"reduce_ints_{name}", -(-n // each), 512, ints, total, n)
        assert total[0] == ints.sum()

    def norm(x, w):
        return x / np.sqrt((x.astype(float) ** 2).mean(1, keepdims=True) + 1e-5) * w

    x, y, w = some(2, 4096), zeros((2, 4096)), some(4096)
    for name in ("rmsnorm_block", "rmsnorm_block_vector"):
        y[:] = 0
        run(name, 2, 512, x, w, y, 1e-5)
        np.testing.assert_allclose(y, norm(x, w), rtol=1e-5, atol=1e-6)
    x, y, w, b = some(40, 96), zeros((40, 96)), some(96), some(96)
    for name, grid in (("rmsnorm_thread", 2), ("rmsnorm_warp", 40)):
        y[:] = 0
        run(name, grid, 32, y, x, w, b, 40, 96)
        np.testing.assert_allclose(y, norm(x, w) + b, rtol=1e-5, atol=1e-5)

    for name, threads in (("rmsnorm_residual_1", 64), ("rmsnorm_residual_2", 32)):
        x, r, w = (torch.from_numpy(some(2, 512)).bfloat16() for _ in range(3))
        both = x.float() + r.float()
        run(name, 2, threads, x, w[0].clone(), r, 1e-5)
        torch.testing.assert_close(r, both.bfloat16(), rtol=0, atol=0)
        expected = torch.from_numpy(norm(both.numpy(), w[0].float().numpy()))
        torch.testing.assert_close(x.double(), expected, rtol=1e-2, atol=1e-3)

    x, y = some(2, 1500), zeros((2, 1500))
    run("softmax_block", 2, 256, x, y, 1500)
    e = np.exp(x - x.max(1, keepdims=True).astype(float))
    np.testing.assert_allclose(y, e / e.sum(1, keepdims=True), rtol=1e-5)


@needs_tools
def test_tensor_core_kernels_of_the_validation_compute_what_their_names_say(benchmark):
    import torch

    run = Kernels(benchmark.TENSOR_SOURCE)
    torch.manual_seed(0)

    def some(*shape):
        return torch.randn(shape).bfloat16()

    a, b, d = some(128, 128), some(256, 128), torch.zeros(128, 256, dtype=torch.bfloat16)
    for name, bytes_a_row in (("plain", 128), ("padded", 144), ("swizzled", 128)):
        d.zero_()
        run(f"bgemm_{name}", (2, 1), 128, 128, 256, 128, a, b, d, shared=256 * bytes_a_row)
        torch.testing.assert_close(d.float(), a.float() @ b.float().T, rtol=1e-2, atol=1e-2)

    q, k, v, o = some(2, 128, 128), some(2, 128, 128), some(2, 128, 128), some(2, 128, 128)
    expected = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    for name in ("attention_plain", "attention_swizzled"):
        o.zero_()
        run(name, (1, 2), 128, q, k, v, o, 128, 128, shared=32768)
        torch.testing.assert_close(o.float(), expected, rtol=2e-2, atol=1e-2)
