"""A worker process: takes jobs as lines of JSON and runs them, telling by lines which has begun and which has ended.

`python -m sparsae.experiments.worker THREADS`. A line asks for one job, or for several that train together. The last
answer to it says whether all are finished, or what is wrong. When its input ends, because whoever started it is gone,
it saves the runs in progress and ends.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sparsae.errors import InputError
from sparsae.experiments.execution import Executor, InOrder
from sparsae.experiments.jobs import Job
from sparsae.experiments.stacked import Stacked
from sparsae.kernels.processor import set_up_processor
from sparsae.registry import import_files
from sparsae.train.stopping import StopRequest


def main() -> None:
    """Serve until the input ends or a job was stopped."""
    import_files()  # whoever started this process could
    logging.getLogger("sparsae.nn.summary").setLevel(logging.ERROR)  # hints for those who hold a model
    set_up_processor(int(sys.argv[1]))
    # Answers alone may go to the output that is read; whatever libraries print goes beside it.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()

    def tell(answer: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):  # nobody listens any more; the end of the input tells it, too
            answers.write(json.dumps(answer).encode() + b"\n")

    while (line := lines.get()) is not None:
        last = _serve(json.loads(line), tell)
        tell(last)
        if "finished" in last and not last["finished"]:
            return


def _read(lines: queue.SimpleQueue[str | None]) -> None:
    for line in sys.stdin:
        lines.put(line)
    lines.put(None)
    os.kill(os.getpid(), signal.SIGTERM)


def _serve(asked: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    # Whoever stops all processes of a group at once, and those who started them pass it on, stops each of them twice.
    jobs, stop = [Job.from_dict(each) for each in asked["jobs"]], StopRequest(is_patient=True)
    executor: Executor = InOrder(stop) if asked["stack"] is None else Stacked(asked["stack"], stop)

    def begun(job: Job) -> None:
        tell({"begun": job.name})

    def ended(job: Job) -> None:
        tell({"ended": job.name})

    try:
        with stop.listening():
            return {"finished": executor.run(jobs, Path(asked["out"]), begun, ended)}
    except InputError as error:
        return {"error": " ".join(str(error).split())}  # which names the job
    except OSError as error:
        return {"error": f"{jobs[0].name}: {' '.join(str(error).split())}"}


if __name__ == "__main__":
    main()
