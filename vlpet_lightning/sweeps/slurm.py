"""SLURM launcher: submits the points of a sweep as one job array."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vlpet_lightning.sweeps.folder import PREEMPTED, SweepFolder, write_whole
from vlpet_lightning.sweeps.plan import SweepError

JOB = "job.json"
QUEUE = ("--noheader", "--array", "--format=%K %t")  # one line per array task: index and state
PENDING = "PD"
SCRIPT = """\
#!/bin/bash
# The points of the sweep {name} that had not ended when this script was written; each is a task of the array.
# On USR1, before the time limit, a run writes a checkpoint, exits with status {preempted}, and is requeued.
#SBATCH --job-name={name}
#SBATCH --array={array}
#SBATCH --output={folder}/slurm-%A_%a.txt
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
#SBATCH --requeue
{lines}
point={folder}/$(printf %04d "$SLURM_ARRAY_TASK_ID")
# since SLURM 22.05 srun does not inherit it from sbatch
if [ -n "${{SLURM_CPUS_PER_TASK:-}}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi
run() {{ # script, file for its exit status
  rm -f "$point/$2"
  status=0
  srun --kill-on-bad-exit=0 bash "$point/$1" >> "$point/log.txt" 2>&1 || status=$?
  if [ "$status" -eq {preempted} ]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
  else
    echo "$status" > "$point/$2"
  fi
  [ "$status" -eq 0 ] || exit "$status"
}}
{steps}
"""
TRAIN = "run command.sh ended"
TEST = 'if [ "$(cat "$point/ended" 2> /dev/null)" != 0 ]; then run command.sh ended; fi\nrun test.sh tested'  # resumes


def script(folder: SweepFolder, numbers: Sequence[int], *, at_once: int, lines: str) -> str:
    """Return the batch script of a job array.

    Args:
        folder: Folder of the sweep.
        numbers: Points to run.
        at_once: Maximum number of concurrent points.
        lines: Additional header lines, such as ``#SBATCH --gpus=1``.
    """
    return SCRIPT.format(
        name=shlex.quote(folder.sweep.name),
        array=f"{_ranges(numbers)}%{at_once}",
        folder=shlex.quote(str(folder.path)),
        lines=lines.rstrip(),
        preempted=PREEMPTED,
        steps=TRAIN if folder.test is None else TEST,
    )


def submit(folder: SweepFolder, numbers: Sequence[int], *, at_once: int, lines: str) -> str:
    """Submit points with sbatch and return a message for the user.

    Raises:
        SweepError: If sbatch is not available or fails.
    """
    path = folder.path / "sweep.sbatch"
    write_whole(path, script(folder, numbers, at_once=at_once, lines=lines))
    found = _call("sbatch", "--parsable", str(path))
    id = found.split(";")[0].strip()
    write_whole(folder.path / JOB, json.dumps({"id": id, "points": list(numbers)}) + "\n")
    return f"submitted: {len(numbers)} points as job {id}; run the same command again to see their progress"


def job_at_work(folder: SweepFolder) -> tuple[str, set[int]] | None:
    """Return the last submitted job and its running points, or None if none is pending or running.

    Raises:
        SweepError: If SLURM cannot be queried.
    """
    file = folder.path / JOB
    if not file.is_file():
        return None
    id = json.loads(file.read_text())["id"]
    if shutil.which("squeue") is None:
        raise SweepError(
            f"this sweep was submitted to SLURM as job {id}, and there is no squeue here to ask whether it is over: "
            f"run this where it was submitted, or remove {file} if the job is over"
        )
    try:
        tasks = [line.split() for line in _call("squeue", *QUEUE, "--jobs", id).splitlines() if line.strip()]
    except SweepError as error:
        if "Invalid job id" in str(error):  # squeue's error for a job that ended long ago
            return None
        raise
    return (id, {int(number) for number, state in tasks if state != PENDING}) if tasks else None


def _call(program: str, *words: str) -> str:
    if shutil.which(program) is None:
        raise SweepError(f"{program} is not there: --launcher slurm needs SLURM's commands; use --launcher local")
    ended = subprocess.run([program, *words], capture_output=True, text=True, check=False)
    if ended.returncode:
        reason = " ".join((ended.stderr or ended.stdout).split())
        raise SweepError(f"{program} refused ({reason}): give the lines that your cluster needs with --sbatch FILE")
    return ended.stdout


def _ranges(numbers: Sequence[int]) -> str:
    """Format numbers as SLURM array ranges.

    >>> _ranges([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    text = ""
    for number in numbers:
        if re.search(rf"(^|[,-]){number - 1}$", text) and number:
            text = re.sub(r"-\d+$", "", text) if re.search(r"-\d+$", text) else text
            text += f"-{number}"
        else:
            text += f",{number}" if text else str(number)
    return text


def head_lines(path: Path | None) -> str:
    """Read a file with ``#SBATCH`` lines.

    Raises:
        FileNotFoundError: If the file does not exist.
    """
    if path is None:
        return ""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} with #SBATCH lines: see --sbatch")
    return path.read_text()
