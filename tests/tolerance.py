"""How close a kernel must be to the float64 oracle: as close as the same formula in its own precision, times two."""

from __future__ import annotations

import torch
from torch import Tensor

SLACK_ULP = 4  # both sides round once more on the way out
FLOAT64_SLACK_ULP = 512  # the oracle itself is float64: what two orders of a sum may differ by


def assert_same_specials(got: Tensor, want: Tensor, what: str = "") -> None:
    """NaN, inf and -inf stand at the same places."""
    for name, test in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        if not torch.equal(test(got), test(want)):
            where = (test(got) != test(want)).nonzero()[0].tolist()
            values = f"got {got[tuple(where)]}, want {want[tuple(where)]}"
            raise AssertionError(f"{what}: {name} differs at {where}: {values}")


def assert_close(
    got: Tensor, want: Tensor, working: Tensor, what: str = "", *, slack_ulp: float | None = None, floor: float = 0.0
) -> None:
    """err(got) <= 2 * err(working) + slack_ulp * ulp(value), in the largest and in the mean error.

    want: the oracle in float64. working: the same formula in the precision that the kernel works in. floor: the size of
    the terms where the value is a small difference of large terms.
    """
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    assert_same_specials(got, want, what)
    finite = want.isfinite()
    exact = want[finite].double()
    if exact.numel() == 0:
        return
    ours = (got[finite].double() - exact).abs()
    theirs = (working[finite].double() - exact).abs().nan_to_num(0.0)
    if slack_ulp is None:
        slack_ulp = FLOAT64_SLACK_ULP if got.dtype == torch.float64 else SLACK_ULP
    ulp = torch.finfo(got.dtype).eps * exact.abs().clamp(min=floor)
    for kind, error, bound in (
        ("largest", ours.max(), 2 * theirs.max() + slack_ulp * ulp.max()),
        ("mean", ours.mean(), 2 * theirs.mean() + slack_ulp * ulp.mean()),
    ):
        # Below the smallest normal number there are no relative errors.
        limit = bound + torch.finfo(got.dtype).tiny
        assert error <= limit, f"{what}: {kind} error {error:.3g} > {limit:.3g} (values to {exact.abs().max():.3g})"


def assert_same_bits(got: Tensor, want: Tensor, what: str = "") -> None:
    """Equal to the bit, NaN and the sign of zero included."""
    assert got.dtype == want.dtype and got.shape == want.shape, f"{what}: {got.dtype} {tuple(got.shape)}"
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    same = got.contiguous().view(width) == want.contiguous().view(width)
    assert bool(same.all()), f"{what}: {int((~same).sum())} of {same.numel()} values differ in bits"
