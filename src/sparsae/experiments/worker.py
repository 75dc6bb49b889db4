"""A worker process: takes jobs as lines of JSON, runs them, and answers each with a line.

`python -m sparsae.experiments.worker THREADS`. When its input ends, because whoever started it is gone, it saves the
run in progress and ends.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path

from sparsae.config import Config
from sparsae.errors import InputError
from sparsae.experiments.jobs import run_job
from sparsae.registry import import_files


def main() -> None:
    """Serve until the input ends or a job was stopped."""
    import torch

    import_files()  # whoever started this process could
    torch.set_num_threads(int(sys.argv[1]))
    # Answers alone may go to the output that is read; whatever libraries print goes beside it.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    while (line := lines.get()) is not None:
        answer = _serve(line)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if "finished" in answer and not answer["finished"]:
            return


def _read(lines: queue.SimpleQueue[str | None]) -> None:
    for line in sys.stdin:
        lines.put(line)
    lines.put(None)
    os.kill(os.getpid(), signal.SIGTERM)


def _serve(line: str) -> dict[str, object]:
    asked = json.loads(line)
    try:
        finished = run_job(Path(asked["directory"]), Config.model_validate_json(json.dumps(asked["config"])))
        return {"finished": finished}
    except (InputError, OSError) as error:
        return {"error": " ".join(str(error).split())}


if __name__ == "__main__":
    main()
