"""A row of the GPU run: lcore beside its peers on the same tensors, or why there is no figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bench.gpu.device import Call, Device
from bench.machine import Row

Peer = Callable[[], Call]  # makes the call; what it raises is written down


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def attempt(make: Peer) -> Call | str:
    """The peer's call, which works, or why not: its package is missing, or it refuses the shape."""
    try:
        call = make()
        call()
    except Exception as error:
        return first_line(error)
    return call


def measured(
    row: Row, device: Device, ours: Callable[[], Call], peers: Mapping[str, Peer], *, cold: bool = False
) -> Row:
    """The row with "status", "seconds", "peers" (seconds by name), "errors" of peers, and "speedup" over the fastest.

    status: "ok"; "no kernel" where lcore raises NotImplementedError; "wrong" where a check raises AssertionError;
    "failed" where anything else goes wrong. ours makes lcore's call and has checked its result. Peers are timed in any
    case.
    """
    row = {**row, "status": "ok", "seconds": None, "peers": {}, "errors": {}, "speedup": None}
    calls: dict[str, Call] = {}
    try:
        calls["lcore"] = ours()
        calls["lcore"]()
    except NotImplementedError as error:
        row.update(status="no kernel", reason=first_line(error))
    except AssertionError as error:
        row.update(status="wrong", reason=first_line(error))
    except Exception as error:
        row.update(status="failed", reason=first_line(error))
    if row["status"] != "ok":
        calls.pop("lcore", None)
    for name, make in peers.items():
        found = attempt(make)
        if isinstance(found, str):
            row["errors"][name] = found
        else:
            calls[name] = found
    times = device.seconds(calls, cold=cold) if calls else {}
    row["seconds"] = times.pop("lcore", None)
    row["peers"] = times
    if row["seconds"] and times:
        row["speedup"] = min(times.values()) / row["seconds"]
    return row


def rate(row: Row, column: str, amount: float, peak: float | None = None) -> Row:
    """The row with `amount` a second in `column`, lcore's and the fastest peer's, and "of_peak" if there is a peak."""
    best = min(row["peers"].values(), default=None)
    ours = amount / row["seconds"] if row["seconds"] else None
    return {
        **row, column: ours, f"peer_{column}": amount / best if best else None,
        "of_peak": ours / peak if ours and peak else None,
    }  # fmt: skip
