"""Independent jobs, one after another or side by side, whose results are kept, so that none runs twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from vitquant.errors import VitquantError
from vitquant.files import write_file
from vitquant.parsing import parse_json, read_file
from vitquant.progress import Progress, silent
from vitquant.schema import Schema, check
from vitquant.workers.worker import Worker, Workers

_LONGEST = 2**24  # bytes of a result

Job = TypeVar("Job")


@dataclass(frozen=True)
class Results:
    """The results of jobs, each a file of JSON.

    Arguments:
        folder: holds the files; None keeps nothing.
        schema: of a result.
        error: raised for a file that cannot be read.
    """

    folder: Path | None
    schema: Schema
    error: type[VitquantError]

    def read(self, key: str) -> dict[str, Any] | None:
        """The result that is kept under a key; None if there is none.

        Raises:
            VitquantError: `error`; the file is damaged.
        """
        if self.folder is None or not self._file(key).exists():
            return None
        file = self._file(key)
        try:
            return check(parse_json(read_file(file, _LONGEST, self.error), self.error), self.schema, self.error)
        except self.error as error:
            raise self.error(f"{file}: {error}; remove it, and the run is repeated") from None

    def keep(self, key: str, result: Mapping[str, Any]) -> None:
        """Keep a result, written atomically."""
        if self.folder is not None:
            write_file(self._file(key), json.dumps(result, indent=1, allow_nan=False).encode(), force=True)

    def _file(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.json"


def run_jobs(
    compute: Callable[[Job], dict[str, Any]],
    jobs: Mapping[str, Job],
    results: Results,
    workers: Workers | None = None,
    progress: Progress = silent,
    kept: Callable[[str, dict[str, Any]], None] = lambda key, result: None,
) -> dict[str, dict[str, Any] | VitquantError]:
    """The results of jobs by their keys, in the order of the jobs; a job that refuses its input has its error instead.

    Arguments:
        compute: gives plain JSON values for a job; with workers it and the jobs can be pickled.
        jobs: by keys that are names of files.
        results: those that are there are not computed again; others are kept as soon as they are there. Errors are not
            kept.
        workers: compute as many jobs side by side as they are; None computes one after another here.
        progress: called with the number of jobs that are done, and of all.
        kept: called with the key and the result of each job whose result is kept, so that what it needed until then can
            be removed.
    """
    found: dict[str, dict[str, Any] | VitquantError] = {}
    for key in jobs:
        if (known := results.read(key)) is not None:
            found[key] = known
            kept(key, known)
    left = {key: job for key, job in jobs.items() if key not in found}
    outcomes = _here(compute, left) if workers is None else _side_by_side(compute, left, workers)
    progress("runs", len(found), len(jobs))
    for key, outcome in outcomes:
        found[key] = outcome
        if not isinstance(outcome, VitquantError):
            results.keep(key, outcome)
            kept(key, outcome)
        progress("runs", len(found), len(jobs))
    return {key: found[key] for key in jobs}


Outcomes = Iterator[tuple[str, dict[str, Any] | VitquantError]]


def _here(compute: Callable[[Job], dict[str, Any]], jobs: Mapping[str, Job]) -> Outcomes:
    for key, job in jobs.items():
        yield key, _attempt(lambda job=job: compute(job))


def _side_by_side(compute: Callable[[Job], dict[str, Any]], jobs: Mapping[str, Job], workers: Workers) -> Outcomes:
    left, running = iter(jobs.items()), dict[Worker, str]()
    idle = [workers.start(partial(_itself, compute)) for _ in range(min(workers.count, len(jobs)))]
    while True:
        while idle and (following := next(left, None)) is not None:
            key, job = following
            running[idle[-1]] = key
            idle.pop().ask(job)
        if not running:
            return
        worker = workers.first(list(running))
        yield running.pop(worker), _attempt(worker.answer)
        idle.append(worker)


def _itself(compute: Callable[[Job], dict[str, Any]]) -> Callable[[Job], dict[str, Any]]:
    return compute


def _attempt(compute: Callable[[], dict[str, Any]]) -> dict[str, Any] | VitquantError:
    try:
        return compute()
    except VitquantError as error:
        return error
