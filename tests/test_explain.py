"""lcore.build_info and lcore.explain say what is here and what would run."""

import pytest
import torch

import lcore
from lcore.errors import KERNEL_DEVICES

OPS = ("attention", "hadamard", "key_mass", "merge_states", "page_scores", "rope")


def test_build_info_names_version_isa_and_ops():
    info = lcore.build_info()
    assert info["version"] == lcore.__version__
    assert info["torch"] == torch.__version__
    assert info["cpu_isa"] in info["cpu_isas_built"]
    assert "baseline" in info["cpu_isas_built"]
    assert info["threads"] == torch.get_num_threads()
    assert isinstance(info["cuda_archs"], list)
    for op in OPS:
        assert info["ops"][op]["cpu"] == info["cpu_isa"]
        assert info["ops"][op]["cuda"]


@pytest.mark.parametrize("op", OPS)
def test_one_kernel_runs_and_every_other_says_why_not(op):
    info = lcore.build_info()
    told = lcore.explain(op, torch.zeros(1, 1, 1, 1))
    assert set(told) == {*(f"cpu/{isa}" for isa in info["cpu_isas_built"]), "cuda"}
    assert [kernel for kernel, reason in told.items() if reason == "runs"] == [f"cpu/{info['cpu_isa']}"]
    for isa in info["cpu_isas_built"]:
        if isa != info["cpu_isa"]:
            assert told[f"cpu/{isa}"] == f"{info['cpu_isa']} was chosen at load (LCORE_CPU_ISA overrides)"
    assert told["cuda"]


def test_tensors_elsewhere_are_told_from_kernels_that_are_missing():
    told = lcore.explain("attention", torch.zeros(1, 1, 1, 1, device="meta"))
    for isa in lcore.build_info()["cpu_isas_built"]:
        assert told[f"cpu/{isa}"] == "the tensors are on meta"
    missing = next(op for op, devices in KERNEL_DEVICES.items() if "cuda" not in devices)
    assert lcore.explain(missing, torch.zeros(1))["cuda"] == "this op has no CUDA kernel"


def test_every_public_op_can_be_explained_and_exists_in_torch():
    for op in lcore.build_info()["ops"]:
        assert lcore.explain(op, torch.zeros(1))
        assert hasattr(torch.ops.lcore, op)


def test_errors():
    with pytest.raises(ValueError, match=r"lcore\.explain: op must be one of .*attention.*, got softmax"):
        lcore.explain("softmax", torch.zeros(1))
    with pytest.raises(ValueError, match=r"lcore\.explain: tensors must be the call's tensors, got none"):
        lcore.explain("attention")
