"""What the page shows of one question."""

from __future__ import annotations

from dataclasses import dataclass

from prsl_kernels.experiments.report.datatable import DataTable


@dataclass(frozen=True)
class Section:
    """One of a sceptic's questions. `answer` is empty where the run holds no rows for it: then nothing is shown."""

    anchor: str
    title: str
    question: str
    answer: str
    note: str = ""  # how to read it
    tables: tuple[DataTable, ...] = ()
    figures: tuple[str, ...] = ()

    @property
    def absent(self) -> bool:
        return not self.answer
