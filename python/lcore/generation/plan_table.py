"""A plan for a terminal."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table

from lcore.generation.planner import Plan


def plan_table(plan: Plan) -> Group:
    """The plan for a terminal."""
    rows = "" if plan.batch == 1 else f" in each of {plan.batch} rows"
    items = (
        f"{plan.context:,} tokens{rows}, {_size(plan.free)} free\n"
        f"weights {_size(plan.weights)} ({plan.dtype}), workspace {_size(plan.workspace)} "
        f"({plan.chunk:,} tokens at a time)"
        + (f", recurrent states {_size(plan.states)}" if plan.states else "")
        + ("" if plan.disk is None else f", pages on disk, {_size(plan.disk)} free")
    )
    table = Table(box=SIMPLE)
    table.add_column("kv_format", no_wrap=True)
    for name in ("pages", "tails, tables", "with all", "left", "longest"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in plan.formats:
        sizes = (row.pages, row.tails_and_tables, row.needed, row.left)
        table.add_row(row.kv_format, *map(_size, sizes), f"{row.longest:,}", style=None if row.fits else "red")
    return Group(items, table)


def _size(count: int) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count} B"
