"""A database on disk, for as long as an index is built: it sorts and joins what does not fit into memory."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_CHUNK = 10_000


class Scratch:
    """SQLite without its safeguards: a crash loses what would be made anew anyway."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def fill(self, table: str, columns: str, rows: Iterable[tuple[Any, ...]]) -> int:
        """Makes `table` with the SQL `columns` and inserts rows; returns how many were left out as duplicates."""
        self._connection.execute(f"CREATE TABLE {table} ({columns})")
        given, before = 0, self._connection.total_changes
        rows = iter(rows)
        while chunk := list(itertools.islice(rows, _CHUNK)):
            given += len(chunk)
            places = ", ".join("?" * len(chunk[0]))
            self._connection.executemany(f"INSERT OR IGNORE INTO {table} VALUES ({places})", chunk)
        return given - (self._connection.total_changes - before)

    def remove(self, rows: str) -> int:
        """Deletes `rows`, a table and its SQL condition; returns how many there were."""
        return self._connection.execute(f"DELETE FROM {rows}").rowcount

    def rows(self, query: str) -> Iterator[tuple[Any, ...]]:
        """The result of a query, a row at a time."""
        return iter(self._connection.execute(query))

    def count(self, query: str) -> int:
        """The single number that a query gives."""
        return int(self._connection.execute(query).fetchone()[0])


@contextmanager
def scratch(folder: Path) -> Iterator[Scratch]:
    """A database in a file of `folder`, which is removed at the end. Its texts and queries are this package's own."""
    path = folder / "scratch.sqlite"
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        for setting in ("journal_mode=OFF", "synchronous=OFF", "temp_store=FILE", "cache_size=-16384"):
            connection.execute(f"PRAGMA {setting}")
        connection.execute("BEGIN")
        yield Scratch(connection)
    except sqlite3.OperationalError as error:  # what SQLite makes of a full disk
        raise OSError(str(error)) from error
    finally:
        connection.close()
        path.unlink(missing_ok=True)
