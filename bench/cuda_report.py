"""What the compiler made of each CUDA kernel: ``python -m bench.cuda_report`` (or ``make cuda-report``).

Compiles csrc/cuda/**/*.cu into cubins below build/cuda-report, unless they are newer than the sources, and writes
docs/cuda_report.md: registers, spills, shared memory and launch bounds as ptxas and the PTX say, and from the machine
code the tensor-core instructions, the loads by width and accesses of local memory. Exit code 1 if a kernel spills
registers, or if ptxas remarks that its wgmma products wait for each other or that setmaxnreg has no effect.
Needs nvcc; the machine code needs nvdisasm, from the CUDA toolkit or the extra lcore[cuda-report].
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc"
PAGE = ROOT / "docs" / "cuda_report.md"
ARCHITECTURES = {"generic": ("sm_80", "sm_90a"), "sm90": ("sm_90a",)}  # of the folders in csrc/cuda
TENSOR = ("HMMA", "IMMA", "DMMA", "HGMMA", "QGMMA", "IGMMA")
LOADS = ("LDG", "LDGSTS", "UBLKCP", "UTMALDG")
COLUMNS = (
    "kernel", "chip", "registers", "spilled bytes", "static shared", "max threads", "tensor instructions",
    "global loads", "local loads/stores",
)  # fmt: skip


@dataclass
class Kernel:
    symbol: str
    chip: str
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    threads: str = ""  # of __launch_bounds__
    code: Counter[str] = field(default_factory=Counter)  # instructions by name; empty without a disassembler
    remark: str = ""  # of ptxas, on products that wait for each other or registers that do not move


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, beside nvcc, or in a wheel from PyPI."""
    found = shutil.which(name)
    if found is not None:
        return found
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    folders += [Path(path) / "nvidia" for path in sys.path]
    for folder in folders:
        candidates = [folder / name, *folder.glob(f"*/bin/{name}")]
        for path in candidates:
            if path.is_file():
                path.chmod(path.stat().st_mode | 0o100)  # wheels do not always keep the bit
                return str(path)
    return None


def run(*command: object) -> str:
    """Its output, both streams; RuntimeError when it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(str(part) for part in command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def read_ptxas(log: str, chip: str) -> list[Kernel]:
    """The kernels of a log of ptxas -v."""
    kernels: dict[str, Kernel] = {}
    symbol = ""
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            symbol = found[1]
            kernels.setdefault(symbol, Kernel(symbol, chip))
        elif found := re.search(r"\((C7508|C7510)\) (.*) in (?:the )?function '(\w+)'", line):
            kernels.setdefault(found[3], Kernel(found[3], chip)).remark = f"{found[1]}: {found[2]}"
        elif found := re.search(r"Function properties for (\w+)", line):
            symbol = found[1]  # of a kernel, or of a function that it calls
        elif symbol in kernels:
            if found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
                kernels[symbol].spilled = int(found[1]) + int(found[2])
            elif found := re.search(r"Used (\d+) registers", line):
                kernels[symbol].registers = int(found[1])
                shared = re.search(r"(\d+) bytes smem", line)
                kernels[symbol].shared = int(shared[1]) if shared else 0
    return list(kernels.values())


def read_launch_bounds(ptx: str) -> dict[str, str]:
    """By symbol: "256", or "256, 2 blocks" where a block count is asked for."""
    bounds = {}
    for symbol, rest in re.findall(r"\.entry (\w+)\((.*?)\{", ptx, re.DOTALL):
        most = re.search(r"\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?", rest)
        if most:
            threads = 1
            for part in most.groups():
                threads *= int(part or 1)
            blocks = re.search(r"\.minnctapersm (\d+)", rest)
            bounds[symbol] = f"{threads}, {blocks[1]} a multiprocessor" if blocks else str(threads)
    return bounds


def read_code(listing: str) -> dict[str, Counter[str]]:
    """Instructions by kernel, with the width of loads: "LDG.128"."""
    code: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in listing.splitlines():
        if found := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            current = code.setdefault(found[1], Counter())
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)(\.\S*)?", line):
            name, kinds = found[1], (found[2] or "").rstrip(";").split(".")
            width = next((kind for kind in ("128", "64", "U16", "S16", "U8", "S8") if kind in kinds), "32")
            current[f"{name}.{width.lstrip('US')}" if name in ("LDG", "LDGSTS") else name] += 1
    return code


def compile_one(source: Path, chip: str, folder: Path, disassembler: str | None) -> list[Kernel]:
    newest = max(path.stat().st_mtime for path in SOURCES.rglob("*") if path.suffix in (".h", ".cuh"))
    stem = folder / f"{'-'.join(source.relative_to(SOURCES / 'cuda').with_suffix('').parts)}-{chip}"
    cubin, ptx, log = (stem.with_name(stem.name + suffix) for suffix in (".cubin", ".ptx", ".log"))
    if not log.exists() or log.stat().st_mtime < max(newest, source.stat().st_mtime):
        machine = ["-gencode", f"arch={chip.replace('sm', 'compute')},code={chip}"]
        common = ["nvcc", "-std=c++20", f"-I{SOURCES}", f"-I{SOURCES / 'cuda'}", source]
        ptx_machine = [f"-arch={chip.replace('sm', 'compute')}"]
        run(*common, *ptx_machine, "-ptx", "-o", ptx)
        log.write_text(run("nvcc", *machine, "-Xptxas", "-v", "-cubin", ptx, "-o", cubin))
    kernels = read_ptxas(log.read_text(), chip)
    bounds = read_launch_bounds(ptx.read_text())
    code = read_code(run(disassembler, "-c", cubin)) if disassembler else {}
    for kernel in kernels:
        kernel.threads = bounds.get(kernel.symbol, "")
        kernel.code = code.get(kernel.symbol, Counter())
    return kernels


def demangled(symbols: list[str]) -> dict[str, str]:
    """Short names: without namespaces, the result and the parameters."""
    filt = shutil.which("c++filt")
    if filt is None or not symbols:
        return {symbol: symbol for symbol in symbols}
    names = run(filt, *symbols).splitlines()
    return {symbol: shortened(name) for symbol, name in zip(symbols, names, strict=True)}


def shortened(name: str) -> str:
    name = name.replace("(anonymous namespace)::", "")
    name = re.sub(r"\((?:[\w:]+)\)(\d+)", r"\1", name)  # (lcore::DType)3
    name = re.sub(r"^void ", "", name)
    depth = 0
    for i, letter in enumerate(name):  # the first parenthesis outside <>: the parameters
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:i]
            break
    return re.sub(r"\b(?:[a-z_]\w*::)+", "", name)


def row(kernel: Kernel, name: str) -> list[str]:
    def counts(names: Iterable[str]) -> str:
        return ", ".join(f"{kernel.code[n]} {n}" for n in names if kernel.code[n])

    loads = sorted((n for n in kernel.code if n.split(".")[0] in LOADS), key=lambda n: (n.split(".")[0], -width(n)))
    local = f"{kernel.code['LDL']}/{kernel.code['STL']}" if kernel.code else "?"
    return [
        f"`{name}`", kernel.chip, str(kernel.registers), str(kernel.spilled), str(kernel.shared), kernel.threads,
        counts(TENSOR) if kernel.code else "?", counts(loads) if kernel.code else "?", local,
    ]  # fmt: skip


def width(name: str) -> int:
    return int(name.partition(".")[2] or 0)


def markdown(kernels: list[Kernel], version: str) -> str:
    names = demangled([kernel.symbol for kernel in kernels])
    lines = sorted(row(kernel, names[kernel.symbol]) for kernel in kernels)
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in [list(COLUMNS), ["---"] * len(COLUMNS), *lines])
    return (
        "# What the compiler made of the CUDA kernels\n\n"
        f"Written by `make cuda-report`: do not edit. {version}. Loads are counted by bits a thread; `?`: no "
        f"disassembler was found. Nothing here has met a GPU.\n\n{table}\n"
    )


def complaints(kernels: list[Kernel]) -> list[str]:
    names = demangled([kernel.symbol for kernel in kernels])
    lines = []
    for kernel in kernels:
        where = f"{names[kernel.symbol]} on {kernel.chip}"
        if kernel.spilled:
            lines.append(f"{where} spills {kernel.spilled} bytes")
        if kernel.remark:
            lines.append(f"{where}: {kernel.remark}")
    return lines


def report(folder: Path, jobs: int) -> tuple[list[Kernel], str]:
    """All kernels of csrc/cuda, and the compiler's version."""
    folder.mkdir(parents=True, exist_ok=True)
    disassembler = tool("nvdisasm")
    if disassembler is None:
        print("cuda-report: no nvdisasm, so no machine code; pip install nvidia-cuda-nvdisasm", file=sys.stderr)
    work = [
        (source, chip)
        for family, chips in ARCHITECTURES.items()
        for source in sorted((SOURCES / "cuda" / family).rglob("*.cu"))
        for chip in chips
    ]
    with ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(lambda item: compile_one(item[0], item[1], folder, disassembler), work))
    release = re.search(r"release ([\d.]+)", run("nvcc", "--version"))
    return [kernel for kernels in found for kernel in kernels], f"nvcc {release[1] if release else '?'}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "cuda-report")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    if shutil.which("nvcc") is None:
        print("cuda-report: nvcc is not on PATH; install the CUDA toolkit 12.8 or later", file=sys.stderr)
        return 2
    kernels, version = report(args.build, args.jobs)
    args.out.write_text(markdown(kernels, version))
    wrong = complaints(kernels)
    for line in wrong:
        print(f"cuda-report: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
