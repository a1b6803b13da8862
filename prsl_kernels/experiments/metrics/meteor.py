"""METEOR 1.5 as pycocoevalcap runs it: one Java process that answers line by line, so wrapped that it cannot hang.

The protocol: "SCORE ||| reference ||| ... ||| candidate" is answered by a line of statistics; "EVAL ||| statistics |||
..." by a line with the score of each, and a last one with the score of all together. A line that the process does not
understand is answered by one that begins with "Error", or by its end.
"""

from __future__ import annotations

import contextlib
import queue
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import pycocoevalcap.meteor.meteor as upstream

from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.metrics.java import OPTIONS, find_java

JAR = Path(upstream.__file__).with_name(upstream.METEOR_JAR)
SETTINGS = "-l en -norm"
TIMEOUT = 180.0  # seconds for one answer; starting takes 5 to 8 of them on an idle core

Pair = tuple[str, tuple[str, ...]]  # candidate and references, tokenised


class _Died(Exception):
    """The process ended or broke the protocol; `answers` came before."""

    def __init__(self, answers: list[str], reason: str) -> None:
        super().__init__(reason)
        self.answers = answers


class _TimedOut(_Died):
    """The process did not answer the line after `answers` in time."""


class Meteor:
    """Scores pairs with one lasting Java process, which is started again where it dies. Statistics are cached by pair.

    The process is read and written by threads of its own, so that neither pipe can fill up and stop both sides; its
    standard error goes to a temporary file. It ends with `close`, with this object, and, since its input ends, with
    the Python process, however that is ended. Not safe for use by several threads; several objects are independent.
    """

    def __init__(self, *, timeout: float = TIMEOUT) -> None:
        self._java, self.java_version = find_java()
        self._timeout = timeout
        self._statistics: dict[Pair, str] = {}
        self._server: _Server | None = None

    def start(self) -> None:
        """Starts the process without waiting for it: it reads its paraphrases while others work."""
        if self._server is None:
            self._server = _Server(
                [self._java, *OPTIONS, "-Xmx2G", "-jar", str(JAR), "-", "-", "-stdio", *SETTINGS.split()]
            )

    def close(self) -> None:
        """Ends the process. A later call starts another one."""
        if self._server is not None:
            self._server.kill()
            self._server = None

    def add(self, pairs: Sequence[Pair]) -> None:
        """Obtains the statistics of those pairs that are not known yet.

        Raises:
            UserError: a pair takes longer than the time-out, or the process dies of it twice.
        """
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._statistics]
        lines = [_request(pair) for pair in new]
        done = 0
        deaths_here = 0
        while done < len(new):
            try:
                answers, failure = self._ask(lines[done:], len(new) - done), None
            except _Died as died:
                answers, failure = died.answers, died
            self._statistics.update(zip(new[done : done + len(answers)], answers, strict=True))
            deaths_here = deaths_here + 1 if not answers else 1
            done += len(answers)
            if failure is not None and (isinstance(failure, _TimedOut) or deaths_here > 1):
                raise self._error(failure, _describe(new[done])) from None

    def score(self, pairs: Sequence[Pair]) -> tuple[float, list[float]]:
        """(score of all pairs together, score of each), both in [0, 1], as pycocoevalcap gives them.

        Raises:
            UserError: see `add`.
        """
        self.add(pairs)
        line = " ||| ".join(["EVAL", *(self._statistics[pair] for pair in pairs)])
        for attempt in (1, 2):
            try:
                values = [float(answer) for answer in self._ask([line], len(pairs) + 1)]
                return values[-1], values[:-1]
            except _Died as died:
                if attempt == 2 or isinstance(died, _TimedOut):
                    raise self._error(died, f"the sum of {len(pairs)} captions") from None
        raise AssertionError("unreachable")

    def _ask(self, lines: list[str], count: int) -> list[str]:
        self.start()
        assert self._server is not None
        try:
            return self._server.ask(lines, count, self._timeout)
        except BaseException:  # also Ctrl-C: with answers outstanding, the next question would get the wrong ones
            self.close()
            raise

    def _error(self, failure: _Died, place: str) -> UserError:
        return UserError(
            f"METEOR ({JAR.name} under {self._java}) {failure} at {place}; shorten the text, or leave meteor out of "
            "the metrics"
        )


class _Server:
    """The process with its two pipes."""

    def __init__(self, command: list[str]) -> None:
        self._errors = tempfile.TemporaryFile(prefix="prsl-meteor-")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, bufsize=-1
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input = self._process.stdin
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self._process.stdout, self._answers), daemon=True).start()
        self._finalizer = weakref.finalize(self, _end, self._process, self._input, self._errors)

    def ask(self, lines: list[str], count: int, timeout: float) -> list[str]:
        """Writes all lines and returns the `count` lines that answer them; `timeout` holds for each answer."""
        content = "".join(f"{line}\n" for line in lines).encode()
        threading.Thread(target=_write, args=(self._input, content), daemon=True).start()
        answers: list[str] = []
        while len(answers) < count:
            try:
                answer = self._answers.get(timeout=timeout)
            except queue.Empty:
                raise _TimedOut(answers, f"did not answer within {timeout:g} seconds") from None
            if answer is None:
                raise _Died(answers, f"ended with status {self._process.wait()}: {self._last_words()}")
            if answer.startswith("Error"):
                raise _Died(answers, f"answered {answer!r}")
            answers.append(answer)
        return answers

    def kill(self) -> None:
        self._finalizer()

    def _last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-500:].decode(errors="replace").strip() or "no message"


def _end(process: subprocess.Popen[bytes], stdin: IO[bytes], errors: IO[bytes]) -> None:
    process.kill()
    process.wait()
    with contextlib.suppress(OSError):
        stdin.close()
    errors.close()


def _read(stdout: IO[bytes], answers: queue.SimpleQueue[str | None]) -> None:
    with stdout, contextlib.suppress(OSError, ValueError):
        for line in stdout:
            answers.put(line.decode(errors="replace").strip())
    answers.put(None)


def _write(stdin: IO[bytes], content: bytes) -> None:
    # A broken pipe shows on the reading side, as the end of the answers.
    with contextlib.suppress(OSError, ValueError):
        stdin.write(content)
        stdin.flush()


def _request(pair: Pair) -> str:
    """As pycocoevalcap writes it, except that the separator is taken out of references as well as of candidates."""
    candidate, references = pair
    return " ||| ".join(["SCORE", *map(_without_separator, references), _without_separator(candidate)])


def _without_separator(text: str) -> str:
    return text.replace("|||", "").replace("  ", " ")


def _describe(pair: Pair) -> str:
    candidate, references = pair
    longest = max(len(reference.split()) for reference in references)
    return f"a caption of {len(candidate.split())} words ({candidate[:60]!r}) with references of up to {longest} words"
