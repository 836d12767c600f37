"""The report on compiled kernels: what it reads out of the tools' words."""

import shutil

import pytest

from bench import cuda_report
from bench.cuda_report import complaints, markdown, read_code, read_launch_bounds, read_ptxas, shortened

LOG = """
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient \
register resources for the wgmma pipeline in the function '_Z1cv'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1av' for 'sm_90a'
ptxas info    : Function properties for _Z1av
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 3 barriers, 1024 bytes smem, 440 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90a'
ptxas info    : Function properties for helper
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Function properties for _Z1bv
    24 bytes stack frame, 20 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers
ptxas info    : Compiling entry function '_Z1cv' for 'sm_90a'
ptxas info    : Function properties for _Z1cv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers
"""
PTX = """
.visible .entry _Z1av(
	.param .align 64 .b8 _Z1av_param_0[512]
)
.maxntid 384, 1, 1
.minnctapersm 1
{
}
.visible .entry _Z1bv(.param .u64 x)
.maxntid 16, 8
{
.visible .entry _Z1cv()
{
"""
LISTING = """
	.section	.text._Z1av,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0050*/              @UP0 UTMALDG.2D [UR4], [UR6] ;
	.section	.text._Z1bv,"ax",@progbits
        /*0000*/                   STL [R1], R4 ;
        /*0010*/                   LDL.64 R4, [R1] ;
"""


def kernels():
    found = read_ptxas(LOG, "sm_90a")
    bounds, code = read_launch_bounds(PTX), read_code(LISTING)
    for kernel in found:
        kernel.threads = bounds.get(kernel.symbol, "")
        kernel.code = code.get(kernel.symbol, kernel.code)
    return {kernel.symbol: kernel for kernel in found}


def test_ptxas():
    a, b = kernels()["_Z1av"], kernels()["_Z1bv"]
    assert (a.registers, a.spilled, a.shared) == (168, 0, 1024)
    assert (b.registers, b.spilled, b.shared) == (255, 32, 0)  # the function that it calls is not counted in


def test_launch_bounds():
    assert [kernels()[f"_Z1{x}v"].threads for x in "abc"] == ["384, 1 a multiprocessor", "128", ""]


def test_machine_code():
    assert kernels()["_Z1av"].code == {"LDC": 1, "LDG.128": 1, "LDG.16": 1, "HGMMA": 2, "UTMALDG": 1}
    assert kernels()["_Z1bv"].code == {"STL": 1, "LDL": 1}


def test_the_table():
    lines = markdown(list(kernels().values()), "nvcc 13.0").splitlines()
    assert lines[-3].split(" | ")[1:] == [
        *("sm_90a", "168", "0", "1024", "384, 1 a multiprocessor", "2 HGMMA"),
        *("1 LDG.128, 1 LDG.16, 1 UTMALDG", "0/0 |"),
    ]
    assert lines[-2].endswith("| 1/1 |") and lines[-1].endswith("| ? | ? | ? |")


def test_complaints():
    spills, serial = complaints(list(reversed(kernels().values())))
    assert spills.endswith("on sm_90a spills 32 bytes")
    assert serial.startswith("c() on sm_90a: C7510") or "C7510: Potential Performance Loss" in serial


def test_short_names():
    long = (
        "void lcore::cuda::generic::(anonymous namespace)::f_kernel<lcore::cuda::T<(lcore::DType)3>, float>(lcore::P)"
    )
    assert shortened(long) == "f_kernel<T<3>, float>"


def test_without_nvcc(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert cuda_report.main([]) == 2
    assert "nvcc is not on PATH" in capsys.readouterr().err


@pytest.mark.slow
def test_the_report_is_up_to_date(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    out = tmp_path / "report.md"
    assert cuda_report.main(["--out", str(out), "--build", str(tmp_path)]) == 0
    names = [[line.split(" | ")[0] for line in path.read_text().splitlines()] for path in (out, cuda_report.PAGE)]
    assert names[0] == names[1], "run make cuda-report"
