"""Shared by every test: a fixed seed, and the number of threads put back."""

from collections.abc import Iterator

import pytest
import torch

from lcore.info import build_info


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """The GPU, for tests marked gpu."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    if not build_info()["cuda_archs"]:
        pytest.skip("lcore was built without CUDA kernels: LCORE_CUDA=on builds them")
    return torch.device("cuda")


@pytest.fixture
def threads() -> Iterator[None]:
    """For tests that call torch.set_num_threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads: None) -> None:
    """For many small tensors: waking a second thread costs more than it brings."""
    torch.set_num_threads(1)
