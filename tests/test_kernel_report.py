import json
import os
import re
import subprocess
import sys

import pytest
import torch
from checkout_tools import ROOT, tool

from dbkernels.ops.backend.register import registered

TOOLS = ROOT / "tools"
KEYS = {"kernel", "arch", "D", "registers", "stack_bytes", "local_bytes", "shared_bytes"}


@pytest.fixture
def told(monkeypatch, capsys):
    """Runs the report on rows that are there already; its status, and what it prints."""

    def run(*options, rows=(), library=()):
        report = tool("kernel_report")
        monkeypatch.setattr(report, "report", lambda options: rows)
        monkeypatch.setattr(report, "library_rows", lambda: library)
        monkeypatch.setattr(sys, "argv", ["kernel_report.py", *options])
        with pytest.raises(SystemExit) as exit:
            report.main()
        return exit.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def compiled():
    """Two backwards, at widths that fit the registers and at one that does not."""
    kernels, widths = ("gated_adaln_norm_bwd", "adaln_norm_bwd"), (768, 1024, 1152, 16384)
    words = ["--json", "--kernel", *kernels, "--arch", "90", "--D", *map(str, widths)]
    command = [sys.executable, str(TOOLS / "kernel_report.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["kernel"], row["arch"], row["D"], row["stream"]) for row in rows] == [
        (kernel, 90, D, stream)
        for kernel in kernels for D in widths for stream in ("bfloat16", "float32")
    ]  # fmt: skip
    return [row for row in rows if row["D"] < 16384], done


def test_compiles_a_kernel_where_there_is_no_gpu(compiled):
    for row in compiled[0]:
        assert row.keys() >= KEYS
        assert 16 <= row["registers"] <= 255
        assert row["stack_bytes"] == row["local_bytes"] == 0
        # rows of bfloat16, and those of a float32 stream
        assert row["widest_load_bytes"] == {"bfloat16": 8, "float32": 16}[row["stream"]]
        assert row["row_access_bytes"] == row["least_access_bytes"] == 8
        assert row["floor_us"]["H100-SXM5-80GB"] == round(row["hbm_bytes"] / 3.35e6, 2)


def test_the_backwards_of_dit_xl_fill_an_h100_in_one_wave(compiled):
    limits = {"gated_adaln_norm_bwd": (128, 4), "adaln_norm_bwd": (96, 5)}
    for row in (row for row in compiled[0] if row["D"] == 1152):
        registers, programs = limits[row["kernel"]]
        assert row["registers"] <= registers
        assert row["programs_per_processor"] >= programs
        assert row["wave_efficiency"].keys() == {"8", "32", "64", "128", "256"}
        assert min(row["wave_efficiency"].values()) >= 0.9


def test_a_row_that_is_too_wide_for_the_registers_is_found_out(compiled):
    done = compiled[1]
    assert done.returncode == 1
    where = "gated_adaln_norm_bwd of a bfloat16 stream at D = 16384 on sm_90"
    assert f"{where} spills registers: " in done.stderr
    assert all(" at D = 16384 " in line for line in done.stderr.splitlines())


ROW = {"kernel": "gelu_fwd", "arch": 90, "stream": "bfloat16", "D": 768, "stack_bytes": 0}
ROW |= {"local_bytes": 0, "row_access_bytes": 16, "least_access_bytes": 16}


SPILLS = "spills registers: {} bytes of stack and {} of local memory"
NARROW = "rows in {} bytes at a time, where 16 are possible"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, ""),
        ({"row_access_bytes": None}, ""),  # no row that 16 bytes divide
        ({"row_access_bytes": 8, "least_access_bytes": 8}, ""),  # in pieces of half the width
        ({"stack_bytes": 8}, SPILLS.format(8, 0)),
        ({"local_bytes": 4}, SPILLS.format(0, 4)),
        ({"row_access_bytes": 8}, NARROW.format(8)),
        ({"row_access_bytes": 0}, NARROW.format(0)),
    ],
)
def test_a_fault_ends_the_report_with_1_and_a_sentence(told, changes, fault):
    code, out, err = told(rows=[ROW, ROW | changes])
    assert code == bool(fault) == err.count("\n") and "gelu_fwd" in out and fault in err
    assert not fault or err.startswith("gelu_fwd of a bfloat16 stream at D = 768 on sm_90 ")


USAGE = """
arch = sm_75
 Common:
  GLOBAL:0
arch = sm_90
 Function _ZN9dbkernels12_GLOBAL__N_110mul_kernelINS_8BFloat16EfEEvPKT_PT0_l:
  REG:12 STACK:8 SHARED:1040 LOCAL:4 CONSTANT[0]:376 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function add_kernel:
  REG:10 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:376 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def used(kernel, *numbers):
    names = ("registers", "stack_bytes", "shared_bytes", "local_bytes")
    return {"kernel": kernel, "arch": 90, **dict(zip(names, numbers, strict=True))}


SPILLING = used("mul_kernel<BFloat16, float>", 12, 8, 1040, 4)
SOUND = used("add_kernel", 10, 0, 0, 0)


def test_a_library_s_kernels_are_read_with_their_architecture():
    assert list(tool("kernel_compile").read_usage(USAGE)) == [SPILLING, SOUND]


def test_a_symbol_is_left_as_it_is_where_nothing_reads_it(monkeypatch):
    library = tool("kernel_compile")
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    assert library.short_name.__wrapped__("_Z3addv") == "_Z3addv"


@pytest.mark.parametrize(("cuda", "reason"), [(0, None), (13, "stale")])
def test_a_library_without_cuda_or_that_does_not_serve_has_no_rows(monkeypatch, cuda, reason):
    library = tool("kernel_compile")
    backend = library.library
    manifest = backend.Manifest("0" * 64, cuda, (90,))
    monkeypatch.setattr(backend, "library", lambda: backend.Library(reason, manifest=manifest))
    assert library.library_rows() == []


def test_a_library_that_spills_ends_the_report_with_1(told):
    code, out, err = told("--kernel", "library", library=[SPILLING, SOUND])
    message = "on sm_90 spills registers: 8 bytes of stack and 4 of local memory to a thread\n"
    assert (code, err) == (1, f"mul_kernel<BFloat16, float> {message}")
    assert "add_kernel" in out and "sm_90" in out


def test_the_library_s_rows_are_json_lines_too(told):
    code, out, _ = told("--kernel", "library", "--json", library=[SOUND])
    assert (code, json.loads(out)) == (0, SOUND) and SOUND.keys() == KEYS - {"D"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--kernel gelu", "kernel must be one of adaln_norm_fwd, .*, got gelu"),
        ("--D 0", "D must be 1 to 16384, got 0"),
        ("--D 768 100", "a multiple of 64 for qk_norm_rotary_fwd, got 100"),
        ("--kernel", "give at least one kernel"),
    ],
)
def test_refuses_options_in_a_sentence(told, words, message):
    code, out, err = told(*words.split())
    assert (code, out) == (2, "") and "Traceback" not in err
    assert re.search(message, " ".join(re.sub("[│─]", " ", err).split()))


def test_every_kernel_of_the_ops_is_reported():
    cases, compiler = tool("kernel_cases"), tool("kernel_compile")
    ops = ROOT / "dbkernels" / "ops"
    written = {
        (path.stem, name)
        for path in ops.rglob("*.py")
        for name in re.findall(r"^@triton.jit.*\ndef (\w+_kernel)\($", path.read_text(), re.M)
    }
    kernels = [compiler.record(case, cases.Shapes(384), 90)[0].fn for case in cases.ENTRIES]
    assert written == {(fn.__module__.split(".")[-1], fn.__name__) for fn in kernels}
    by_direction = {name for name in registered() if name.endswith(("_fwd", "_bwd"))}
    assert by_direction <= cases.CASES.keys()


@pytest.fixture
def moved():
    """Bytes that a kernel moves at D = 384, what it is given, and its arguments of rows."""

    def launch(name, stream=torch.bfloat16):
        cases, compiler = tool("kernel_cases"), tool("kernel_compile")
        case = cases.CASES[name]
        _, launch = compiler.record(case, cases.Shapes(384, stream=stream), 90)
        rows = list(compiler.row_arguments(launch))
        return compiler.bytes_moved(case, launch), launch.arguments, rows

    return launch


D, TOKENS, SAMPLES = 384, 32 * 256, 32  # of the cases


@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32], ids=str)
def test_bytes_of_adaln_norm_are_each_tensor_once(moved, stream):
    of_stream, both = stream.itemsize, TOKENS * 2 * 4 + 2 * SAMPLES * D * 2  # and the statistics
    found, _, rows = moved("adaln_norm_fwd", stream)
    assert found == TOKENS * D * (2 + of_stream) + both
    assert rows == (["x_ptr", "y_ptr"] if of_stream == 2 else ["y_ptr"])
    found, arguments, _ = moved("adaln_norm_bwd", stream)
    sums = 2 * arguments["dscale_ptr"].numel() * 4
    assert sums > 2 * SAMPLES * D * 4  # more than one program shares a sample
    assert found == TOKENS * D * (2 * 2 + 3 * of_stream) + both + sums


def test_partial_sums_are_read_once_and_their_totals_written(moved):
    found, arguments, _ = moved("gated_adaln_norm_sum")
    parts = arguments["parts_ptr"].numel() * 4
    assert parts == 3 * arguments["segments"] * D * 4
    assert found == parts + 3 * SAMPLES * D * 2


def test_bytes_of_queries_and_keys_leave_out_the_values(moved):
    weights, table = 2 * 64 * 2, 256 * 64 * 4
    assert moved("qk_norm_rotary_fwd")[0] == 2 * TOKENS * 2 * D * 2 + weights + table


# of the processor that has most; a second wave takes as long as the first
@pytest.mark.parametrize(("programs", "load"), [(132, 1), (133, 2), (4 * 132, 4), (4 * 132 + 1, 8)])
def test_a_wave_that_is_not_full_leaves_processors_idle(programs, load):
    assert tool("kernel_report")._load(programs, 90, 4) == load


def test_the_width_of_an_access_is_traced_to_its_argument():
    ptx = """
        ld.param.b64 %rd1, [_kernel_param_0];
        ld.param.b64 %rd2, [_kernel_param_1];
        ld.param.b64 %rd3, [_kernel_param_2];
        ld.param.b64 %rd4, [_kernel_param_3];
        mad.wide.s32 %rd5, %r5, 2, %rd1;
        add.s64 %rd6, %rd5, 2048;
        add.s64 %rd7, %rd2, %rd4;
        @%p2 ld.global.v4.b32 { %r15, %r16, %r17, %r18 }, [ %rd5 + 0 ];
        ld.global.b16 %rs1, [ %rd6 + 0 ];
        @%p2 ld.global.L1::evict_last.v2.b32 { %r15, %r16 }, [ %rd6 + 0 ];
        @%p2 st.global.v2.b64 [ %rd7 + 0 ], { %rd38, %rd39 };
        st.global.b32 [ %rd3 + 0 ], %r1;
    """
    loads, stores = tool("kernel_compile")._widths(ptx, ["x_ptr", "y_ptr", "z_ptr", None])
    assert loads == {"x_ptr": (2, 8, 16)}
    assert stores == {"y_ptr": (16,), "z_ptr": (4,)}


def test_a_triton_that_cannot_be_had_is_named_and_fails_nothing():
    command = ["bash", str(TOOLS / "other_triton.sh"), "0.0.1"]
    env = {**os.environ, "PIP_NO_INDEX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Triton 0.0.1 cannot be had here, so no kernel was compiled")
