"""The stand-in CUDA runtime: launchers compiled by nvcc, their calls and launches seen and served.

The first half runs the API with an engine of a few lines of NumPy, so that streams, graphs, memory
and refusals are tested for themselves; the second half runs the same launchers on the emulator.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qlora_kernels.emulator import runtime, toolchain
from qlora_kernels.emulator.devices import DEVICES, get_device, occupancy
from qlora_kernels.emulator.runtime import EmulatedRuntime, RuntimeFailure

MISSING = toolchain.available()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

SOURCE = Path(__file__).parent / "kernels" / "launchers.cu"


@pytest.fixture(scope="module")
def library() -> Path:
    return toolchain.compile_library(SOURCE, ["sm_80"])


def by_name(request):
    """An engine that knows the kernel ``scale`` and what ``gain`` reads; the rest it only sees."""
    if request.kernel.startswith("_Z5scale"):
        x, y = (int.from_bytes(a, "little") for a in request.arguments[:2])
        (a,), (n,) = (
            struct.unpack("<f", request.arguments[2]),
            struct.unpack("<i", request.arguments[3]),
        )
        source = np.ctypeslib.as_array((ctypes.c_float * n).from_address(x))
        np.ctypeslib.as_array((ctypes.c_float * n).from_address(y))[:] = a * source
    return SimpleNamespace(counts=None, reports=[])


def scale(rt, x, y, a, n, stream=None, name="launch_scale"):
    function = getattr(rt.lib, name)
    function.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_float, ctypes.c_int, ctypes.c_void_p]
    return function(rt.pointer(x), rt.pointer(y), a, n, stream)


def arrays(count, n=300):
    first = np.arange(n, dtype=np.float32)
    return [first, *(np.zeros(n, np.float32) for _ in range(count - 1))]


def host(array):
    return array.ctypes.data_as(ctypes.c_void_p)


@pytest.fixture
def rt(library):
    with EmulatedRuntime("a100", library, engine=by_name, strict=False) as active:
        yield active


# -- launches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["launch_scale", "launch_ex"])
def test_a_launch_is_seen_with_its_kernel_grid_block_and_arguments(rt, name):
    x, y = arrays(2)
    assert scale(rt, x, y, 2.5, 300, rt.stream(), name) == 0
    np.testing.assert_array_equal(y, x * np.float32(2.5))
    (launch,) = rt.launches
    threads = 128 if name == "launch_scale" else 64
    assert launch.kernel == "_Z5scalePKfPffi"
    assert launch.name == "scale(float const*, float*, float, int)"
    assert launch.grid == (-(-300 // threads), 1, 1) and launch.block == (threads, 1, 1)
    assert launch.argument(0) == x.ctypes.data and launch.argument(1) == y.ctypes.data
    assert launch.argument(2, "<f4") == 2.5 and launch.argument(3, "<i4") == 300
    assert launch.resources.registers > 0
    assert launch.blocks_per_sm == occupancy("a100", threads, launch.resources.registers).blocks


def test_arguments_are_sized_from_the_ptx_structures_by_value_among_them(rt):
    x, y = arrays(2)
    assert rt.lib.launch_affine(rt.pointer(x), rt.pointer(y), ctypes.c_short(20)) == 0
    (launch,) = rt.launches
    assert [len(a) for a in launch.arguments] == [8, 8, 16, 2, 1]
    assert struct.unpack("<ffq", launch.arguments[2]) == (2.0, 0.5, 7)
    assert launch.argument(3, "<i2") == 20 and launch.arguments[4] == b"\1"
    assert launch.block == (8, 4, 1)


def test_parameters_of_reads_every_kind():
    ptx = """
    .visible .entry k(
        .param .u64 k_param_0, // a comment, with a comma
        .param .align 16 .b8 k_param_1[24],
        .param .f16x2 k_param_2,
        .param .u8 k_param_3,
        .param .u64 .ptr .global .align 16 k_param_4
    )
    .maxntid 128
    { ret; }
    .visible .entry k2() { ret; }
    .entry bare { ret; }
    """
    assert runtime.parameters_of(ptx, "k") == [8, 24, 4, 1, 8]
    assert runtime.parameters_of(ptx, "k2") == runtime.parameters_of(ptx, "bare") == []
    with pytest.raises(KeyError):
        runtime.parameters_of(ptx, "k3")


REFUSED = [  # launcher, arguments, code, words
    ("launch_reverse", (1, 256, 60000, -1), 1, "49152 allowed without cudaFuncSetAttribute"),
    ("launch_reverse", (1, 256, 60001, 60000), 1, "60000 allowed by cudaFuncSetAttribute"),
    ("launch_reverse", (1, 256, 0, 200000), 1, "allows 166912 a block"),
    ("launch_reverse", (1, 2000, 0, -1), 9, "2000 threads; at most 1024"),
    ("launch_reverse", (0, 32, 0, -1), 9, "empty grid"),
    ("launch_bounded", (256,), 701, "compiled for at most 128"),
]


@pytest.mark.parametrize(("launcher", "arguments", "code", "words"), REFUSED)
def test_what_the_device_would_refuse_is_refused_with_cudas_code(
    rt, launcher, arguments, code, words
):
    (y,) = arrays(1)
    assert getattr(rt.lib, launcher)(rt.pointer(y), *arguments) == code
    assert not rt.launches
    (error,) = rt.errors
    assert error.code == code and words in str(error)


def test_shared_memory_up_to_the_opt_in_is_launched(rt):
    (y,) = arrays(1)
    assert rt.lib.launch_reverse(rt.pointer(y), 1, 256, 166912, 166912) == 0
    assert rt.launches[0].shared == 166912 and rt.launches[0].blocks_per_sm == 1


def test_a_last_error_is_peeked_at_read_and_gone(rt):
    (y,) = arrays(1)
    assert rt.lib.last_error_twice(rt.pointer(y)) == 90900


def test_cooperative_grids_are_bounded_by_what_is_resident(rt):
    x, y, z = arrays(3)
    pointers = [rt.pointer(a) for a in (x, y, z)]
    assert rt.lib.launch_cooperative(*pointers, 300, 9) == 0
    assert rt.launches[0].cooperative
    most = rt.launches[0].blocks_per_sm * rt.device.sms
    assert rt.lib.launch_cooperative(*pointers, 300, most) == 0
    assert rt.lib.launch_cooperative(*pointers, 300, most + 1) == 720
    assert f"on each of {rt.device.sms} multiprocessors" in str(rt.errors[0])


def test_registers_decide_what_fits(library):
    with EmulatedRuntime("a100", library, engine=by_name, strict=False) as rt:
        module = runtime._Module(library, rt.device)
        heavy = toolchain.Resources(registers=255)
        rt._modules[library.resolve()] = module
        module.resources["_Z5scalePKfPffi"] = heavy
        x, y = arrays(2)
        assert scale(rt, x, y, 1.0, 300) == 0  # 128 threads of 255 registers fit once
        assert rt.launches[0].blocks_per_sm == 2


# -- memory --------------------------------------------------------------------------------------


def test_allocate_copy_launch_copy_free(rt):
    x, out = arrays(2)
    assert rt.lib.round_trip(host(x), host(out), 300) == 0
    np.testing.assert_array_equal(out, 2 * x)
    assert [c for c in rt.calls if c.startswith("cudaM")] == [
        "cudaMalloc", "cudaMalloc", "cudaMemset", "cudaMemcpy", "cudaMemcpy",
    ]  # fmt: skip
    assert not [b for b in rt.buffers if b.kind == "device"]


def test_a_copy_past_the_end_of_an_allocation_is_refused(rt):
    (x,) = arrays(1)
    assert rt.lib.copy_too_much(host(x), 10) == 1
    assert "runs 4 bytes past the end of device allocation 0 (40 bytes)" in str(rt.errors[0])


def test_more_memory_than_the_device_has_is_refused(rt):
    assert rt._dispatch(b"cudaMalloc", [0, 10**15]) == 2
    assert "do not fit" in str(rt.errors[0])


def test_tensors_are_known_by_their_bounds_and_must_be_contiguous(rt):
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(6, 7, dtype=torch.bfloat16)
    pointer = rt.pointer(tensor, "weights")
    (buffer,) = rt.buffers
    assert (buffer.address, buffer.size, buffer.name) == (pointer.value, 84, "weights")
    with pytest.raises(ValueError, match=r"shape \(7, 6\) is not contiguous"):
        rt.pointer(tensor.T)
    with pytest.raises(ValueError, match="not contiguous"):
        rt.pointer(np.zeros((4, 4))[:, ::2])
    with pytest.raises(TypeError, match="list"):
        rt.pointer([1, 2])
    rt.forget(tensor)
    assert not rt.buffers


def test_device_memory_knows_which_of_its_bytes_were_written(rt):
    x = np.arange(16, dtype=np.uint8)
    to = ctypes.c_void_p()
    rt._dispatch(b"cudaMalloc", [ctypes.addressof(to), 16])
    (buffer,) = rt.buffers
    assert not buffer.initialized.any()
    rt._dispatch(b"cudaMemcpy", [to.value + 4, x.ctypes.data, 6, 1])
    assert buffer.initialized.nonzero()[0].tolist() == list(range(4, 10))
    rt._dispatch(b"cudaMemset", [to.value + 12, 0, 2])
    assert buffer.initialized.nonzero()[0].tolist() == [*range(4, 10), 12, 13]
    other = ctypes.c_void_p()
    rt._dispatch(b"cudaMalloc", [ctypes.addressof(other), 16])
    rt._dispatch(b"cudaMemcpy", [other.value, to.value, 16, 3])  # what is copied stays unknown
    assert rt._find(other.value).initialized.tolist() == buffer.initialized.tolist()


def test_symbols_are_written_read_and_handed_to_the_kernel(library):
    seen = {}

    def engine(request):
        for name, address in request.symbols.items():
            seen[name] = ctypes.string_at(address, 4 if name == "device_gain" else 16)
        return SimpleNamespace(counts=None, reports=[])

    with EmulatedRuntime("a100", library, engine=engine) as rt:
        (y,) = arrays(1)
        assert rt.lib.launch_gain(rt.pointer(y), 10) == 0
    assert struct.unpack("<f", seen["device_gain"]) == (2.0,)
    assert struct.unpack("<4f", seen["constant_gain"]) == (1.0, 10.0, 100.0, 1000.0)


# -- streams, events, graphs ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_an_event_orders_two_streams_whatever_the_seed(library, seed):
    x, y, z = arrays(3)
    with EmulatedRuntime("a100", library, engine=by_name, order="deferred", seed=seed) as rt:
        assert rt.lib.two_streams(*(rt.pointer(a) for a in (x, y, z)), 300, 1) == 0
    np.testing.assert_array_equal(z, 6 * x)


def test_without_the_event_some_order_shows_the_race(library):
    outcomes = set()
    for seed in range(12):
        x, y, z = arrays(3)
        with EmulatedRuntime("a100", library, engine=by_name, order="deferred", seed=seed) as rt:
            assert rt.lib.two_streams(*(rt.pointer(a) for a in (x, y, z)), 300, 0) == 0
        outcomes.add(bool((z == 6 * x).all()))
    assert outcomes == {True, False}


def test_a_deferred_launch_runs_when_it_is_waited_for(library):
    x, y = arrays(2)
    with EmulatedRuntime("a100", library, engine=by_name, order="deferred") as rt:
        stream = rt.stream()
        assert scale(rt, x, y, 2.0, 300, stream) == 0
        assert not y.any() and not rt.launches
        assert rt._dispatch(b"cudaStreamQuery", [stream.value]) == 600
        rt._dispatch(b"cudaStreamSynchronize", [stream.value])
        assert rt._dispatch(b"cudaStreamQuery", [stream.value]) == 0
        np.testing.assert_array_equal(y, 2 * x)


@pytest.mark.parametrize("seed", range(4))
def test_the_default_stream_waits_for_blocking_streams_and_they_for_it(library, seed):
    x, y, z = arrays(3)
    with EmulatedRuntime("a100", library, engine=by_name, order="deferred", seed=seed) as rt:
        stream = rt.stream()
        scale(rt, x, y, 2.0, 300, stream)
        scale(rt, y, z, 3.0, 300)  # default stream
        scale(rt, z, x, 1.0, 300, stream)
    np.testing.assert_array_equal(z, 6 * np.arange(300, dtype=np.float32))
    np.testing.assert_array_equal(x, z)


@pytest.mark.parametrize("order", ["eager", "deferred"])
def test_a_graph_is_captured_once_and_replayed(library, order):
    x, y, z = arrays(3)
    with EmulatedRuntime("a100", library, engine=by_name, order=order) as rt:
        assert rt.lib.capture_and_replay(*(rt.pointer(a) for a in (x, y, z)), 300, 3, 0) == 0
        np.testing.assert_array_equal(z, 10 * x)
    assert len(rt.launches) == 6  # two kernels, three times; none while capturing


def test_a_launcher_that_allocates_cannot_be_captured(rt):
    x, y, z = arrays(3)
    assert rt.lib.capture_and_replay(*(rt.pointer(a) for a in (x, y, z)), 300, 1, 1) == 900
    assert "must neither allocate nor synchronise" in str(rt.errors[0])


def test_a_stream_joins_a_capture_by_an_event_and_must_come_back(rt):
    def new(kind):
        out = ctypes.c_void_p()
        assert rt._dispatch(kind, [ctypes.addressof(out), 0]) == 0
        return out.value

    def call(name, *words):
        return rt._dispatch(name, list(words))

    x, y = arrays(2)
    for joined_back in (True, False):
        origin, side = new(b"cudaStreamCreate"), new(b"cudaStreamCreate")
        fork, join = new(b"cudaEventCreate"), new(b"cudaEventCreate")
        graph = ctypes.c_void_p()
        assert call(b"cudaStreamBeginCapture", origin, 0) == 0
        assert call(b"cudaEventRecord", fork, origin) == 0
        assert call(b"cudaStreamWaitEvent", side, fork, 0) == 0
        assert scale(rt, x, y, 2.0, 300, side) == 0
        if joined_back:
            assert call(b"cudaEventRecord", join, side) == 0
            assert call(b"cudaStreamWaitEvent", origin, join, 0) == 0
        ended = call(b"cudaStreamEndCapture", origin, ctypes.addressof(graph))
        assert ended == (0 if joined_back else 904)
        assert not y.any()
        if joined_back:
            assert call(b"cudaGraphLaunch", graph.value, origin) == 0
            np.testing.assert_array_equal(y, 2 * x)
            y[:] = 0


def test_handles_that_are_none_are_refused(rt):
    for name in (b"cudaStreamSynchronize", b"cudaEventSynchronize", b"cudaEventDestroy"):
        assert rt._dispatch(name, [0xDEAD]) == 400
    assert rt._dispatch(b"cudaGraphLaunch", [0xDEAD, 0]) == 400


# -- devices -------------------------------------------------------------------------------------


class Facts(ctypes.Structure):
    _fields_ = [
        *[(n, ctypes.c_int) for n in (
            "major minor sms shared_optin shared_sm regs_sm threads_sm l2 count warp "
            "attribute_major "
            "attribute_sms attribute_optin registers static_shared dynamic_limit max_threads blocks"
        ).split()],
        ("memory", ctypes.c_ulonglong),
        ("name", ctypes.c_char * 64),
    ]  # fmt: skip


@pytest.mark.parametrize("key", ["a100-80", "rtx4090", "h100", "b200"])
def test_a_launcher_reads_the_devices_figures_from_the_table(library, key):
    device = get_device(key)
    facts = Facts()
    with EmulatedRuntime(key, library, engine=by_name) as rt:
        assert rt.lib.device_facts(ctypes.byref(facts)) == 0
    sm = device.sm
    assert (facts.major, facts.minor) == device.capability
    assert facts.name.decode() == device.name and facts.memory == device.memory
    assert (facts.sms, facts.attribute_sms) == (device.sms, device.sms)
    assert (facts.shared_optin, facts.attribute_optin) == (sm.shared_optin, sm.shared_optin)
    assert (facts.shared_sm, facts.regs_sm, facts.threads_sm) == (
        sm.shared,
        sm.registers,
        sm.threads,
    )
    assert (facts.l2, facts.count, facts.warp) == (device.l2_bytes, 1, 32)
    assert facts.registers > 0 and facts.static_shared == 0 and facts.dynamic_limit == 49152
    assert facts.max_threads == 1024 or facts.max_threads == 128
    assert facts.blocks == min(sm.threads // 256, sm.shared // (16384 + 1024))


def test_several_devices_can_be_had_and_no_more(library):
    with EmulatedRuntime("a100", library, engine=by_name, devices=2, strict=False) as rt:
        assert rt.lib.set_device(1) == 0 and rt.current == 1
        assert rt.lib.set_device(2) == 101


def test_a_stream_belongs_to_the_device_that_it_was_made_on(library):
    x, y = arrays(2)
    with EmulatedRuntime("a100", library, engine=by_name, devices=2, strict=False) as rt:
        stream = rt.stream()
        assert rt.lib.set_device(1) == 0
        assert scale(rt, x, y, 2.0, 300, stream) == 400
        assert "the stream is device 0's, the current device is 1" in str(rt.errors[0])
        assert scale(rt, x, y, 2.0, 300, rt.stream()) == 0
        assert rt.lib.set_device(0) == 0
        assert scale(rt, x, y, 2.0, 300, stream) == 0
    np.testing.assert_array_equal(y, 2 * x)


def test_structures_are_laid_out_as_the_real_headers_have_them(tmp_path):
    """Offsets of every field that the runtime fills, from the compiler."""
    lines = []
    for struct_, cls in (
        ("cudaDeviceProp", runtime._DeviceProp),
        ("cudaFuncAttributes", runtime._FuncAttributes),
    ):
        for name, _ in cls._fields_:
            if name not in ("textures", "reserved"):
                lines.append(f'printf("{struct_}.{name} %zu\\n", offsetof({struct_}, {name}));')
        lines.append(f'printf("{struct_}.size %zu\\n", sizeof({struct_}));')
    lines += [
        'printf("cudaLaunchAttribute.size %zu\\n", sizeof(cudaLaunchAttribute));',
        'printf("cudaLaunchAttribute.val %zu\\n", offsetof(cudaLaunchAttribute, val));',
        'printf("cudaPointerAttributes.size %zu\\n", sizeof(cudaPointerAttributes));',
        'printf("cudaMemLocation.size %zu\\n", sizeof(cudaMemLocation));',
    ]
    source = tmp_path / "layout.cpp"
    source.write_text(
        "#include <cstddef>\n#include <cstdio>\n#include <cuda_runtime_api.h>\nint main() {\n"
        + "\n".join(lines) + "\n}\n"
    )  # fmt: skip
    include = toolchain.find_tool("nvcc").resolve().parent.parent / "include"
    subprocess.run(["g++", f"-I{include}", str(source), "-o", str(tmp_path / "layout")], check=True)
    out = subprocess.run(
        [str(tmp_path / "layout")], capture_output=True, text=True, check=True
    ).stdout
    real = dict(line.rsplit(" ", 1) for line in out.splitlines())
    for struct_, cls in (
        ("cudaDeviceProp", runtime._DeviceProp),
        ("cudaFuncAttributes", runtime._FuncAttributes),
    ):
        for name, _ in cls._fields_:
            if name not in ("textures", "reserved"):
                assert getattr(cls, name).offset == int(real[f"{struct_}.{name}"]), name
        assert ctypes.sizeof(cls) == int(real[f"{struct_}.size"])
    assert real["cudaLaunchAttribute.size"] == "72" and real["cudaLaunchAttribute.val"] == "8"
    assert real["cudaPointerAttributes.size"] == "88" and real["cudaMemLocation.size"] == "8"


# -- the library and the context -----------------------------------------------------------------


def test_outside_the_context_there_is_no_gpu(library):
    with EmulatedRuntime("a100", library, engine=by_name) as rt:
        lib = rt.lib
    assert lib.set_device(0) == 100


def test_a_library_with_its_own_runtime_is_refused(tmp_path):
    built = toolchain.compile_object(SOURCE, ["sm_80"])
    static = toolchain.link_library([built], tmp_path / "static.so", cudart="static")
    with (
        pytest.raises(toolchain.ToolchainError, match="-cudart shared"),
        EmulatedRuntime("a100", static, engine=by_name),
    ):
        pass
    with (
        pytest.raises(toolchain.ToolchainError, match="no such library"),
        EmulatedRuntime("a100", tmp_path / "absent.so", engine=by_name),
    ):
        pass
    # and the failed contexts are left
    with EmulatedRuntime("a100", engine=by_name):
        pass


def test_a_call_that_the_stand_in_lacks_is_named():
    source = """
    #include <cuda_runtime.h>
    __global__ void k() {}
    extern "C" int bus(char* text) { k<<<1, 1>>>(); return cudaDeviceGetPCIBusId(text, 16, 0); }
    """
    library = toolchain.compile_library(source, ["sm_80"])
    with (
        pytest.raises(toolchain.ToolchainError, match="calls cudaDeviceGetPCIBusId, which"),
        EmulatedRuntime("a100", library, engine=by_name),
    ):
        pass


def test_a_device_that_no_embedded_ptx_fits_is_refused(library):
    x, y = arrays(2)
    with EmulatedRuntime("t4", library, engine=by_name, strict=False) as rt:
        assert scale(rt, x, y, 1.0, 300) == 209
    assert "it has sm_80; compile with -gencode arch=compute_75" in str(rt.errors[0])


def test_leaving_the_context_raises_what_the_launcher_ignored(library):
    (y,) = arrays(1)
    with (
        pytest.raises(RuntimeFailure, match="compiled for at most 128"),
        EmulatedRuntime("a100", library, engine=by_name) as rt,
    ):
        rt.lib.launch_bounded(rt.pointer(y), 256)


def test_a_kernel_that_fails_is_a_launch_failure_with_its_cause(library):
    x, y = arrays(2)

    def engine(request):
        raise IndexError("seven is out of bounds")

    with EmulatedRuntime("a100", library, engine=engine, strict=False) as rt:
        assert scale(rt, x, y, 1.0, 300) == 719
    (error,) = rt.errors
    assert "seven is out of bounds" in str(error) and isinstance(error.__cause__, IndexError)


def test_only_one_runtime_at_a_time_and_only_known_orders():
    with EmulatedRuntime("a100"), pytest.raises(RuntimeError, match="active"):
        EmulatedRuntime("a100").__enter__()
    with pytest.raises(ValueError, match="'eager' or 'deferred'"):
        EmulatedRuntime("a100", order="random")
    with pytest.raises(ValueError, match="did you mean h100"):
        EmulatedRuntime("h1000")


def test_a_process_with_a_real_runtime_is_told_so():
    found = sorted(
        (toolchain.find_tool("nvcc").resolve().parent.parent).glob("lib*/libcudart.so.13*")
    )
    if not found:
        pytest.skip("no real libcudart.so.13 beside this nvcc")
    script = f"""
        import ctypes
        ctypes.CDLL({str(found[0])!r})
        from qlora_kernels.emulator.runtime import EmulatedRuntime
        try:
            EmulatedRuntime("a100").__enter__()
        except Exception as error:
            print(type(error).__name__, error)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    ).stdout  # fmt: skip
    assert "ToolchainError" in out and "real CUDA runtime" in out


def test_every_device_can_be_described():
    for device in DEVICES.values():
        p = runtime.device_properties(device)
        assert (p.major, p.minor) == device.capability
        assert runtime.device_attribute(device, 16) == device.sms
    assert runtime.device_attribute(get_device("h100"), 9999) is None


# -- on the emulator -----------------------------------------------------------------------------


def test_launchers_of_every_kind_compute_what_they_say(library):
    with EmulatedRuntime("a100", library) as rt:
        x, y, z, partial = rt.empty(300), rt.empty(300), rt.empty(300), rt.empty(9 * 32)
        x[:] = np.arange(300)
        px, py, pz = rt.pointer(x, "x"), rt.pointer(y, "y"), rt.pointer(z, "z")
        assert scale(rt, x, y, 2.5, 300, rt.stream()) == 0
        np.testing.assert_array_equal(y, x * np.float32(2.5))
        assert scale(rt, x, y, 3.0, 300, None, "launch_ex") == 0
        np.testing.assert_array_equal(y, x * 3)
        y[:] = -1
        assert rt.lib.launch_affine(px, py, ctypes.c_short(5)) == 0
        np.testing.assert_array_equal(y[:5], (2 * x[:5] + 0.5) * 2)
        assert (y[5:] == -1).all()
        y[:] = x
        assert rt.lib.launch_gain(py, 10) == 0
        np.testing.assert_array_equal(y[:10], x[:10] * 20)  # 2 × 10, both copied to symbols
        y[:] = x
        assert rt.lib.launch_reverse(py, 2, 128, 512, -1) == 0
        np.testing.assert_array_equal(y[:128], x[:128][::-1])
        np.testing.assert_array_equal(y[128:256], x[128:256][::-1])
        assert rt.lib.launch_cooperative(px, rt.pointer(partial), pz, 300, 9) == 0
        assert z[0] == x.sum()
        assert rt.lib.two_streams(px, py, pz, 300, 1) == 0
        np.testing.assert_array_equal(z, 6 * x)
        assert rt.lib.capture_and_replay(px, py, pz, 300, 2, 0) == 0
        np.testing.assert_array_equal(z, 10 * x)
        out = np.zeros(300, np.float32)
        assert rt.lib.round_trip(host(x), host(out), 300) == 0
        np.testing.assert_array_equal(out, 2 * x)


def test_launches_carry_counts_from_which_a_time_is_modelled(library):
    with EmulatedRuntime("a100", library, checks=("counts",)) as rt:
        x, y = rt.empty(1024), rt.empty(1024)
        scale(rt, x, y, 2.0, 1024)
        (launch,) = rt.launches
        assert launch.counts.total["blocks"] == 8
        moved = {r["name"]: r for r in launch.counts.regions}
        names = [rt._find(a.ctypes.data).name for a in (x, y)]
        assert moved[names[0]]["sectors_read"] == moved[names[0]]["distinct_read"] == 128
        assert moved[names[1]]["sectors_written"] == 128 and moved[names[1]]["sectors_read"] == 0
        (modelled,) = rt.modelled()
        assert modelled.bottleneck == "latency" and 0 < modelled.kernel < modelled.time < 1e-5
        assert rt.modelled("rtx4090")[0].device.key == "rtx4090"


def test_findings_reach_the_caller_with_the_tensors_name(library):
    with (
        pytest.raises(RuntimeFailure, match=r"out of bounds: read of 4 bytes at x\[300\]"),
        EmulatedRuntime("a100", library) as rt,
    ):
        x, y = arrays(2)
        rt.pointer(x, "x"), rt.pointer(y, "y")
        function = rt.lib.launch_scale
        function.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_float, ctypes.c_int, ctypes.c_void_p]
        function(x.ctypes.data, y.ctypes.data, 1.0, 301, None)


def test_device_memory_that_was_never_written_is_found_when_it_is_read(library):
    with EmulatedRuntime("a100", library, strict=False) as rt:
        to = ctypes.c_void_p()
        rt._dispatch(b"cudaMalloc", [ctypes.addressof(to), 1024])
        y = rt.empty(256)
        function = rt.lib.launch_scale
        function.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_float, ctypes.c_int, ctypes.c_void_p]
        function(to, rt.pointer(y), 1.0, 256, None)
        assert "uninitialised global memory read" in str(rt.errors[0])
        count = len(rt.errors)
        rt._dispatch(b"cudaMemset", [to.value, 0, 1024])
        function(to, rt.pointer(y), 1.0, 256, None)
        assert len(rt.errors) == count


def test_views_of_one_tensor_are_one_buffer(library):
    with EmulatedRuntime("a100", library) as rt:
        whole = rt.empty(600)
        whole[:300] = np.arange(300)
        first, second = whole[:300], whole[300:]
        assert scale(rt, first, second, 2.0, 300) == 0
        np.testing.assert_array_equal(second, 2 * first)
        rt.pointer(whole)
        assert len([b for b in rt.buffers if b.kind == "tensor"]) == 1
        assert scale(rt, first, second, 3.0, 300) == 0
        np.testing.assert_array_equal(second, 3 * first)


def test_a_kernel_is_compiled_for_what_the_device_can_run():
    """The newest PTX that fits: sm_90's on an H100, sm_80's on an RTX 4090."""
    source = """
    #include <cuda_runtime.h>
    __global__ void which(int* y) {
    #if __CUDA_ARCH__ >= 900
      *y = 90;
    #else
      *y = 80;
    #endif
    }
    extern "C" int launch(int* y) { which<<<1, 1>>>(y); return cudaGetLastError(); }
    """
    flags = ["-gencode", "arch=compute_90,code=compute_90"]
    library = toolchain.compile_library(source, ["sm_80"], flags)
    for device, expected in (("h100", 90), ("rtx4090", 80), ("a100", 80), ("b200", 90)):
        with EmulatedRuntime(device, library) as rt:
            y = np.zeros(1, np.int32)
            assert rt.lib.launch(rt.pointer(y)) == 0
            assert y[0] == expected


def test_one_kernel_of_many_keeps_its_lines() -> None:
    """What is parsed for a launch is that kernel's code, at the lines that the whole has it."""
    text = """.version 9.0
.target sm_80
.global .b32 counter;
.visible .entry first(.param .u64 p)
{
{ .reg .b32 %r<2>; }
ret;
}
.weak .entry second()
.maxntid 32, 1, 1
{
ret;
}
.func helper() { ret; }
"""
    found = runtime.only_kernel(text, "second")
    assert found.splitlines()[8:] == text.splitlines()[8:]
    assert found.splitlines()[:3] == text.splitlines()[:3]
    assert "first" not in found and found.count("\n") == text.count("\n")
    assert "second" not in runtime.only_kernel(text, "first")


# -- CUDA 12 -------------------------------------------------------------------------------------

# A library as nvcc 12 makes one, its registration by hand: there is one nvcc here, and it is 13's.
CUDA_12 = r"""
#if defined(CUDA_12_HEADERS)
#include <cuda_runtime_api.h>
using Properties = cudaDeviceProp;
#else
#include <cstddef>
using cudaError_t = int;
using cudaStream_t = void*;
struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct Properties {  // cudaDeviceProp of CUDA 12.8, as much of it as is looked at
  char name[256], uuid[16], luid[8];
  unsigned mask;
  size_t memory, shared;
  int registers, warp;
  size_t pitch;
  int threads, dim[3], grid[3], clockRate;
  size_t constant;
  int major, minor;
  size_t textureAlignment, texturePitchAlignment;
  int deviceOverlap, multiProcessorCount, rest[159];
};
#define cudaGetDeviceProperties cudaGetDeviceProperties_v2
extern "C" {
cudaError_t cudaGetDeviceProperties_v2(Properties*, int);
cudaError_t cudaRuntimeGetVersion(int*);
cudaError_t cudaMallocManaged(void**, size_t, unsigned);
cudaError_t cudaMemPrefetchAsync(const void*, size_t, int, cudaStream_t);
cudaError_t cudaFree(void*);
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t);
cudaError_t cudaDeviceSynchronize();
}
static_assert(sizeof(Properties) == 1032);
#endif

extern "C" {
void** __cudaRegisterFatBinary(void*);
void __cudaRegisterFatBinaryEnd(void**);
void __cudaUnregisterFatBinary(void**);
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*,
                            void*, int*);
extern const char fatbin_12[];
}
asm(".section .nv_fatbin, \"a\"; .align 8; .globl fatbin_12; fatbin_12: .incbin \"FATBIN\";"
    ".previous");
static struct { int magic, version; const void* data; void* file; } wrapper
    __attribute__((section(".nvFatBinSegment"), used)) = {0x466243b1, 1, fatbin_12, nullptr};
static void stub() {}
static void** module;
__attribute__((constructor)) static void enter() {
  module = __cudaRegisterFatBinary(&wrapper);
  __cudaRegisterFunction(module, (const char*)stub, (char*)"twice", "twice", -1, nullptr, nullptr,
                         nullptr, nullptr, nullptr);
  __cudaRegisterFatBinaryEnd(module);
}
__attribute__((destructor)) static void leave() { __cudaUnregisterFatBinary(module); }

extern "C" int run_12(float* x, int n, int* out) {
  Properties p[2] = {};  // whatever is written beyond the first shows
  int error = cudaGetDeviceProperties(&p[0], 0);
  out[0] = p[0].multiProcessorCount, out[1] = p[0].major, out[2] = p[0].clockRate;
  for (size_t k = 0; k < sizeof p[1]; k++) out[3] |= reinterpret_cast<char*>(&p[1])[k];
  error |= cudaRuntimeGetVersion(&out[4]);
  void* managed = nullptr;
  error |= cudaMallocManaged(&managed, 4096, 1);
  error |= cudaMemPrefetchAsync(managed, 4096, 0, nullptr);
  error |= cudaFree(managed);
  void* args[] = {&x, &n};
  dim3 grid, block;
  grid.x = (n + 127) / 128, block.x = 128;
  error |= cudaLaunchKernel((const void*)stub, grid, block, args, 0, nullptr);
  return error | cudaDeviceSynchronize();
}
"""


def cuda_12_headers() -> Path | None:
    """``include`` of a CUDA 12 toolkit: ``CUDA12_HOME`` names the toolkit."""
    home = os.environ.get("CUDA12_HOME")
    return Path(home) / "include" if home else None


@pytest.mark.parametrize("headers", ["declared", "of CUDA 12"])
def test_a_library_of_cuda_12(headers: str, tmp_path: Path) -> None:
    options = []
    if headers != "declared":
        folder = cuda_12_headers()
        if folder is None:
            pytest.skip("CUDA12_HOME does not name a CUDA 12 toolkit")
        options = [f"-I{folder}", "-DCUDA_12_HEADERS"]
    (tmp_path / "k.cu").write_text(
        """extern "C" __global__ void twice(float* x, int n) {
          int i = blockIdx.x * blockDim.x + threadIdx.x;
          if (i < n) x[i] *= 2;
        }"""
    )
    fatbin, source, library = (tmp_path / n for n in ("k.fatbin", "host.cc", "lib12.so"))
    nvcc = str(toolchain.find_tool("nvcc"))
    code = "-gencode=arch=compute_80,code=[sm_80,compute_80]"
    subprocess.run([nvcc, "-fatbin", code, tmp_path / "k.cu", "-o", fatbin], check=True)
    source.write_text(CUDA_12.replace("FATBIN", str(fatbin)))
    stub = runtime._stub_path(12)
    subprocess.run(
        ["g++", "-std=c++17", "-fPIC", "-shared", *options, source, stub, "-o", library], check=True
    )
    with EmulatedRuntime("a100", library) as rt:
        x = np.arange(300, dtype=np.float32)
        out = (ctypes.c_int * 5)()
        assert rt.lib.run_12(rt.pointer(x, "x"), 300, out) == 0
    assert (x == 2 * np.arange(300)).all() and rt.launches[0].grid == (3, 1, 1)
    a100 = get_device("a100")
    assert list(out) == [a100.sms, 8, int(a100.clock / 1000), 0, 12080]


@pytest.mark.parametrize("major", runtime.MAJORS)
def test_each_stand_in_has_the_runtimes_soname_and_version_node(major: int) -> None:
    data = runtime._stub_path(major).read_bytes()
    assert set(re.findall(rb"\0libcudart\.so\.(\d+)\0", data)) == {str(major).encode()}


def test_a_library_of_another_cuda_is_named(tmp_path: Path) -> None:
    (tmp_path / "lib11.so").write_bytes(b"\x7fELF\0libcudart.so.11\0")
    with EmulatedRuntime("a100") as rt, pytest.raises(toolchain.ToolchainError, match="so.11"):
        rt.load(tmp_path / "lib11.so")
