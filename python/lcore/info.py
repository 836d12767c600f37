"""What is in this build, and which kernel a call would run."""

from __future__ import annotations

from typing import Any

import torch

from lcore._ext import build_facts
from lcore.errors import KERNEL_DEVICES

_UNPROVEN = "compiled, not yet run on a GPU"


def build_info() -> dict[str, Any]:
    """Version, torch, instruction sets, CUDA architectures, threads, and for each op where it runs.

    Returns:
        {"version", "torch", "cpu_isa": chosen, "cpu_isas_built": [..], "cuda_archs": [..], "threads",
         "ops": {op: {"cpu": how, "cuda": how}}}.
    Raises:
        RuntimeError: the environment variable LCORE_CPU_ISA names an instruction set that this machine or build lacks.
    """
    facts = build_facts()
    archs = [arch for arch in facts["cuda_archs"].split(",") if arch]
    ops = {}
    for op, devices in KERNEL_DEVICES.items():
        cuda = "no kernel" if "cuda" not in devices else (_UNPROVEN if archs else "not in this build")
        ops[op] = {"cpu": facts["cpu_isa"], "cuda": cuda}
    return {
        "version": facts["version"],
        "torch": torch.__version__,
        "cpu_isa": facts["cpu_isa"],
        "cpu_isas_built": facts["cpu_isas_built"].split(","),
        "cuda_archs": archs,
        "threads": torch.get_num_threads(),
        "ops": ops,
    }


def explain(op: str, *tensors: torch.Tensor) -> dict[str, str]:
    """Tells which kernel would run for a call and why the others refuse.

    Args:
        op: the op's name, such as "attention".
        tensors: the call's tensors; the first decides the device.
    Returns:
        {kernel: "runs" or the reason why not}, for the CPU kernel of each built instruction set and for CUDA.
    Raises:
        ValueError: unknown op, or no tensor.
    """
    if op not in KERNEL_DEVICES:
        raise ValueError(f"lcore.explain: op must be one of {', '.join(KERNEL_DEVICES)}, got {op}")
    if not tensors:
        raise ValueError("lcore.explain: tensors must be the call's tensors, got none")
    info = build_info()
    device = tensors[0].device.type
    reasons = {}
    for isa in info["cpu_isas_built"]:
        if device != "cpu":
            reasons[f"cpu/{isa}"] = f"the tensors are on {device}"
        else:
            chosen = info["cpu_isa"]
            reasons[f"cpu/{isa}"] = (
                "runs" if isa == chosen else f"{chosen} was chosen at load (LCORE_CPU_ISA overrides)"
            )
    if "cuda" not in KERNEL_DEVICES[op]:
        reasons["cuda"] = "this op has no CUDA kernel"
    elif not info["cuda_archs"]:
        reasons["cuda"] = "this build has no CUDA kernels (LCORE_CUDA=on builds them)"
    else:
        reasons["cuda"] = "runs" if device == "cuda" else f"the tensors are on {device}"
    return reasons
