"""The run on a GPU: ``python -m bench.gpu [PART ...]`` (or ``make gpu PARTS="..."``).

Tests, the same under compute-sanitizer, then lcore beside torch's attention (flash, cuDNN, flex), mamba_ssm,
causal_conv1d and fla where they are installed, in one process a part. Writes one file, by default
bench/results/DATE-gpu-NAME.json, after each part; a part that is done at this commit is not run again. What has no CUDA
kernel yet becomes a row that says so. Times are medians of CUDA events, calls taking turns; "of_peak" is of the large
copy or product in the part `ceilings`, which therefore comes first. Exit status 1 if a part failed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from bench.gpu.checks import ROOT
from bench.gpu.device import Cpu, Cuda, Device
from bench.gpu.run import LIMIT, PARTS, Results, here, run_parts
from lcore.machine import describe


def default_path(device: Device) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", str(device.facts()["gpu"]).lower()).strip("-")
    return ROOT / "bench" / "results" / f"{describe()['date']}-gpu-{slug}.json"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all, which are {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: small sizes, to try the parts")
    parser.add_argument("--again", action="store_true", help="also what is done")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds a part")
    parser.add_argument("--child", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--peaks", type=json.loads, default={}, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]}; there are {', '.join(PARTS)}")
    device: Device = Cpu() if args.device == "cpu" else Cuda()
    if args.child:
        args.out.write_text(json.dumps(here(args.child, device, args.peaks, args.limit)))
        return 0
    results = Results(args.out or default_path(device), device)
    return 0 if run_parts(args.parts or PARTS, results, device, again=args.again, limit=args.limit) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except RuntimeError as error:
        sys.exit(str(error))
