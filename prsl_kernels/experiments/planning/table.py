"""A plan as people read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prsl_kernels.experiments.planning.plan import RunPlan


def render(plan: RunPlan) -> str:
    """The plan as a table for people."""
    head = ("stage", "number", "cached", "each", "left", "memory", "disk", "basis")
    body = [
        (
            "/".join(part for part in (row.part, row.task, row.kind) if part),
            str(row.number),
            "?" if row.cached is None else str(row.cached),
            _duration(row.seconds),
            _duration(row.left),
            as_bytes(row.memory),
            as_bytes(row.disk * row.number),
            row.basis,
        )
        for row in plan.rows
    ]
    widths = [max(len(line[column]) for line in (head, *body)) for column in range(len(head))]
    lines = [f"{plan.recipe} in {plan.run}, for {plan.device}", ""]
    for line in (head, *body):
        cells = [
            cell.ljust(width) if column in (0, len(head) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    totals = plan.as_json()["totals"]
    on_gpu = f"{as_bytes(totals['gpu_memory'])} of a GPU, " if totals["gpu_memory"] else ""
    lines.append("")
    if any(row.on_gpu for row in plan.rows):
        lines.append(f"GPU hours: {totals['gpu_hours_left']:.2f} left of {totals['gpu_hours']:.2f}")
    lines += [
        f"CPU hours: {totals['cpu_hours_left']:.2f} left of {totals['cpu_hours']:.2f}",
        f"memory of the largest stage: {on_gpu}{as_bytes(totals['memory'])}{' of the machine' if on_gpu else ''}",
        f"disk: {as_bytes(totals['disk'])}, and up to {as_bytes(totals['disk_meanwhile'])} for each fine-tuning "
        "meanwhile",
        "",
        *(f"- {note}" for note in plan.notes),
    ]
    if plan.missing:
        lines += ["", "Not on this machine, and needed before the run:", *(f"- {what}" for what in plan.missing)]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def as_bytes(count: float) -> str:
    """Three digits and a unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"
