import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dbkernels.ops.backend.register import registered

TOOLS = Path(__file__).parents[1] / "tools"
KEYS = {"kernel", "arch", "D", "registers", "stack_bytes", "local_bytes", "shared_bytes"}


@pytest.fixture(scope="module")
def tool():
    """Import one of the report's files, which stand beside each other and are no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield importlib.import_module


@pytest.fixture(scope="module")
def row(tool):
    return tool("kernel_report").Row(
        kernel="gelu_fwd",
        arch=90,
        dtype="bfloat16",
        stream="bfloat16",
        D=768,
        num_warps=4,
        registers=40,
        stack_bytes=0,
        local_bytes=0,
        shared_bytes=0,
        programs_per_processor=12,
        wave_efficiency={8: 0.97},
        widest_load_bytes=16,
        widest_store_bytes=16,
        row_access_bytes=16,
        least_access_bytes=16,
        hbm_bytes=10**9,
        floor_us={"H100": 298.5},
    )


def run(*arguments):
    command = [sys.executable, str(TOOLS / "kernel_report.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=TOOLS.parent)


def test_compiles_a_kernel_where_there_is_no_gpu():
    done = run("--json", "--kernel", "adaln_norm_bwd", "--arch", "90", "--D", "768", "1024")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["kernel"], row["arch"], row["D"], row["stream"]) for row in rows] == [
        ("adaln_norm_bwd", 90, D, stream) for D in (768, 1024) for stream in ("bfloat16", "float32")
    ]
    for row in rows:
        assert row.keys() >= KEYS
        assert 16 <= row["registers"] <= 255
        assert row["stack_bytes"] == row["local_bytes"] == 0
        # rows of bfloat16, and those of a float32 stream
        assert row["widest_load_bytes"] == {"bfloat16": 8, "float32": 16}[row["stream"]]
        assert row["row_access_bytes"] == row["least_access_bytes"] == 8
        assert row["floor_us"]["H100-SXM5-80GB"] == round(row["hbm_bytes"] / 3.35e6, 2)


@pytest.mark.parametrize(
    ("kernel", "registers", "programs"),
    [("gated_adaln_norm_bwd", 128, 4), ("adaln_norm_bwd", 96, 5)],
)
def test_the_backwards_of_dit_xl_fill_an_h100_in_one_wave(kernel, registers, programs):
    done = run("--json", "--kernel", kernel, "--arch", "90", "--D", "1152")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["stream"] for row in rows] == ["bfloat16", "float32"]
    for row in rows:
        assert row["registers"] <= registers
        assert row["programs_per_processor"] >= programs
        assert row["wave_efficiency"].keys() == {"8", "32", "64", "128", "256"}
        assert min(row["wave_efficiency"].values()) >= 0.9


def test_a_row_that_is_too_wide_for_the_registers_is_found_out():
    done = run("--json", "--kernel", "gated_adaln_norm_bwd", "--arch", "90", "--D", "16384")
    assert done.returncode == 1
    where = "gated_adaln_norm_bwd of a bfloat16 stream at D = 16384 on sm_90"
    assert f"{where} spills registers: " in done.stderr


def test_a_sound_kernel_has_no_fault(row):
    assert list(row.faults()) == []
    # no row that 16 bytes divide
    assert list(replace(row, row_access_bytes=None).faults()) == []
    # a kernel of rows, which holds them in pieces of half the width
    assert list(replace(row, row_access_bytes=8, least_access_bytes=8).faults()) == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"stack_bytes": 8}, "spills registers: 8 bytes of stack and 0 of local memory"),
        ({"local_bytes": 4}, "spills registers: 0 bytes of stack and 4 of local memory"),
        ({"row_access_bytes": 8}, "rows in 8 bytes at a time, where 16 are possible"),
        ({"row_access_bytes": 0}, "rows in 0 bytes at a time"),
    ],
)
def test_a_fault_ends_the_report_with_1_and_a_sentence(
    tool, row, fault, message, monkeypatch, capsys
):
    report = tool("kernel_report")
    monkeypatch.setattr(report, "report", lambda options: [row, replace(row, **fault)])
    monkeypatch.setattr(report, "library_rows", lambda: [])
    monkeypatch.setattr(sys, "argv", ["kernel_report.py"])
    with pytest.raises(SystemExit) as exit:
        report.main()
    out, err = capsys.readouterr()
    assert exit.value.code == 1
    assert "gelu_fwd" in out
    assert err.startswith("gelu_fwd of a bfloat16 stream at D = 768 on sm_90 ") and message in err
    assert err.count("\n") == 1


USAGE = """
Fatbin elf code:
================
arch = sm_75
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0

Fatbin elf code:
================
arch = sm_90

Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function _ZN9dbkernels12_GLOBAL__N_110mul_kernelINS_8BFloat16EfEEvPKT_PT0_l:
  REG:12 STACK:8 SHARED:1040 LOCAL:4 CONSTANT[0]:376 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function add_kernel:
  REG:10 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:376 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_a_library_s_kernels_are_read_with_their_architecture(tool):
    library = tool("kernel_library")
    assert list(library.read_usage(USAGE)) == [
        library.LibraryRow("mul_kernel<BFloat16, float>", 90, 12, 8, 4, 1040),
        library.LibraryRow("add_kernel", 90, 10, 0, 0, 0),
    ]


def test_a_symbol_is_left_as_it_is_where_nothing_reads_it(tool, monkeypatch):
    library = tool("kernel_library")
    library.short_name.cache_clear()
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    assert library.short_name("_Z3addv") == "_Z3addv"
    library.short_name.cache_clear()


@pytest.mark.parametrize(("cuda", "reason"), [(0, None), (13, "stale")])
def test_a_library_without_cuda_or_that_does_not_serve_has_no_rows(tool, monkeypatch, cuda, reason):
    library = tool("kernel_library")
    backend = library.library
    manifest = backend.Manifest("0" * 64, cuda, (90,))
    monkeypatch.setattr(backend, "library", lambda: backend.Library(reason, manifest=manifest))
    assert library.library_rows() == []


def test_a_library_that_spills_ends_the_report_with_1(tool, monkeypatch, capsys):
    report, library = tool("kernel_report"), tool("kernel_library")
    monkeypatch.setattr(report, "library_rows", lambda: list(library.read_usage(USAGE)))
    monkeypatch.setattr(sys, "argv", ["kernel_report.py", "--kernel", "library"])
    with pytest.raises(SystemExit) as exit:
        report.main()
    out, err = capsys.readouterr()
    assert exit.value.code == 1
    message = "on sm_90 spills registers: 8 bytes of stack and 4 of local memory to a thread\n"
    assert err == f"mul_kernel<BFloat16, float> {message}"
    assert "add_kernel" in out and "sm_90" in out


def test_the_library_s_rows_are_json_lines_too(tool, monkeypatch, capsys):
    report, library = tool("kernel_report"), tool("kernel_library")
    monkeypatch.setattr(report, "library_rows", lambda: list(library.read_usage(USAGE))[1:])
    monkeypatch.setattr(sys, "argv", ["kernel_report.py", "--kernel", "library", "--json"])
    with pytest.raises(SystemExit) as exit:
        report.main()
    assert exit.value.code == 0
    row = json.loads(capsys.readouterr().out)
    assert row.keys() == KEYS - {"D"} and row["kernel"] == "add_kernel"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": ("gelu",)}, "kernel must be one of adaln_norm_fwd, .*, got gelu"),
        ({"D": (0,)}, "D must be 1 to 16384, got 0"),
        ({"D": (768, 100)}, "a multiple of 64 for qk_norm_rotary_fwd, got 100"),
        ({"kernel": ()}, "give at least one kernel"),
    ],
)
def test_refuses_options_in_a_sentence(tool, options, message):
    with pytest.raises(ValueError, match=message):
        tool("kernel_report").Options(**options)


def test_a_refused_option_reaches_the_command_line_without_a_traceback():
    done = run("--kernel", "gelu")
    assert done.returncode == 2 and not done.stdout
    assert "kernel must be one of" in done.stderr and "Traceback" not in done.stderr


def test_every_kernel_of_the_ops_is_reported(tool):
    cases, compiler = tool("kernel_cases"), tool("kernel_compile")
    ops = TOOLS.parent / "dbkernels" / "ops"
    written = {
        (path.stem, name)
        for path in ops.rglob("*.py")
        for name in re.findall(r"^@triton.jit.*\ndef (\w+_kernel)\($", path.read_text(), re.M)
    }
    kernels = [compiler.record(case, cases.Shapes(384), 90)[0].fn for case in cases.ENTRIES]
    assert written == {(fn.__module__.split(".")[-1], fn.__name__) for fn in kernels}
    by_direction = {name for name in registered() if name.endswith(("_fwd", "_bwd"))}
    assert by_direction <= cases.CASES.keys()


@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32], ids=str)
def test_bytes_of_adaln_norm_are_each_tensor_once(tool, stream):
    cases, compiler = tool("kernel_cases"), tool("kernel_compile")
    D, tokens, of_stream = 384, cases.B * cases.T, stream.itemsize
    shapes = cases.Shapes(D, stream=stream)

    case = cases.CASES["adaln_norm_fwd"]
    _, launch = compiler.record(case, shapes, 90)
    statistics, modulation = tokens * 2 * 4, 2 * cases.B * D * 2
    moved = tokens * D * (2 + of_stream) + statistics + modulation
    assert compiler.bytes_moved(case, launch) == moved
    rows = ["x_ptr", "y_ptr"] if of_stream == 2 else ["y_ptr"]
    assert list(compiler.row_arguments(launch)) == rows

    case = cases.CASES["adaln_norm_bwd"]
    _, launch = compiler.record(case, shapes, 90)
    sums = 2 * launch.arguments["dscale_ptr"].numel() * 4
    assert sums > 2 * cases.B * D * 4  # more than one program shares a sample
    moved = tokens * D * (2 * 2 + 3 * of_stream) + statistics + modulation + sums
    assert compiler.bytes_moved(case, launch) == moved


def test_partial_sums_are_read_once_and_their_totals_written(tool):
    cases, compiler = tool("kernel_cases"), tool("kernel_compile")
    case, shapes = cases.CASES["gated_adaln_norm_sum"], cases.Shapes(384)
    _, launch = compiler.record(case, shapes, 90)
    parts, totals = launch.arguments["parts_ptr"].numel() * 4, 3 * cases.B * 384 * 2
    assert parts == 3 * launch.arguments["segments"] * 384 * 4
    assert compiler.bytes_moved(case, launch) == parts + totals


def test_a_wave_that_is_not_full_leaves_processors_idle(tool):
    waves = tool("kernel_report")
    assert waves._load(132, 90, 4) == 1
    assert waves._load(133, 90, 4) == 2
    assert waves._load(4 * 132, 90, 4) == 4
    # a second wave takes as long as the first
    assert waves._load(4 * 132 + 1, 90, 4) == 8


def test_bytes_of_queries_and_keys_leave_out_the_values(tool):
    cases, compiler = tool("kernel_cases"), tool("kernel_compile")
    case = cases.CASES["qk_norm_rotary_fwd"]
    _, launch = compiler.record(case, cases.Shapes(384), 90)
    read_and_written = 2 * cases.B * cases.T * 2 * 384 * 2
    weights, table = 2 * 64 * 2, cases.T * 64 * 4
    assert compiler.bytes_moved(case, launch) == read_and_written + weights + table


def test_the_width_of_an_access_is_traced_to_its_argument(tool):
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
