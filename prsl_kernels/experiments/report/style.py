"""How arms look, in the figures and beside their names in every table: colour, marker and dash all differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prsl_kernels.experiments.report.tables import TaskTables


@dataclass(frozen=True)
class ArmStyle:
    """Colour, Matplotlib marker, and on-off lengths of the line in points (empty: solid)."""

    color: str
    marker: str
    dashes: tuple[float, ...] = ()

    @property
    def linestyle(self) -> str | tuple[int, tuple[float, ...]]:
        return (0, self.dashes) if self.dashes else "-"

    @property
    def glyph(self) -> str:
        """The marker as an SVG path around (15, 6), about 8 units wide."""
        return _GLYPHS[self.marker]


_GLYPHS = {
    "o": "M11.2 6a3.8 3.8 0 1 0 7.6 0a3.8 3.8 0 1 0 -7.6 0Z",
    "s": "M11.5 2.5h7v7h-7Z",
    "^": "M15 1.6L19.2 9.4H10.8Z",
    "v": "M15 10.4L19.2 2.6H10.8Z",
    "<": "M10.6 6L18.4 1.8V10.2Z",
    ">": "M19.4 6L11.6 1.8V10.2Z",
    "D": "M15 1.4L19.6 6L15 10.6L10.4 6Z",
    "P": "M13.5 2h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5v-3h2.5Z",
    "X": "M11 3.6L12.6 2L15 4.4L17.4 2L19 3.6L16.6 6L19 8.4L17.4 10L15 7.6L12.6 10L11 8.4L13.4 6Z",
    "p": "M15 1.8L19 4.9L17.5 9.6H12.5L11 4.9Z",
}


# Okabe and Ito's colours, which people with any colour vision tell apart, the light ones darkened for thin lines.
_BASELINE = ArmStyle("#16181d", "o")
_PRINTED = ArmStyle("#7a7f87", "X", (1.0, 1.6))
_OTHERS = (
    ArmStyle("#0072b2", "s", (5.0, 1.8)),
    ArmStyle("#d55e00", "^"),
    ArmStyle("#00855f", "D", (5.0, 1.6, 1.2, 1.6)),
    ArmStyle("#a8457f", "v", (2.6, 1.4)),
    ArmStyle("#8a6d00", "P", (7.0, 2.0)),
    ArmStyle("#3b8ec2", "<", (1.2, 1.2, 4.0, 1.2)),
    ArmStyle("#7a3b9c", ">", (3.5, 1.2)),
    ArmStyle("#a63a3a", "p"),
)


def arm_styles(tasks: Sequence[TaskTables]) -> dict[str, ArmStyle]:
    """One style per arm, the same in all tasks; styles recur only beyond ten arms."""
    styles: dict[str, ArmStyle] = {}
    others = 0
    for arm in dict.fromkeys(arm for task in tasks for arm in task.arms):
        run = next(task.runs[arm][0] for task in tasks if arm in task.runs)
        if any(arm == task.baseline for task in tasks):
            styles[arm] = _BASELINE
        elif run.as_printed and _PRINTED not in styles.values():
            styles[arm] = _PRINTED
        else:
            styles[arm] = _OTHERS[others % len(_OTHERS)]
            others += 1
    return styles
