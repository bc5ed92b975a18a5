"""The runs of a benchmark: kept as they end, and side by side, by the machinery of `vitquant sweep`.

What is kept does not know the code that computed it: a table is measured in an empty directory. A benchmark imports its
own `main` by name when it is run, since workers are given its functions by the name of their module.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from inspect import getfile
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from vitquant.errors import CheckpointError, VitquantError
from vitquant.schema import Plain, TableOf
from vitquant.workers.jobs import Results, run_jobs
from vitquant.workers.opening import opened

Job = TypeVar("Job")
Found = dict[str, Any]  # plain JSON values


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what `runs_of` reads."""
    parser.add_argument("--results", type=Path, help="a directory that keeps every run; what it holds is not run again")
    parser.add_argument("--workers", default="0", help="runs side by side, in so many processes, or ray")


def key_of(job: object) -> str:
    """A name for the file of a run: what its job says, and the benchmark."""
    return sha256(f"{Path(getfile(type(job))).stem} {job!r}".encode()).hexdigest()[:24]


def runs_of(
    measure: Callable[[Job], Found],
    jobs: Sequence[Job],
    given: argparse.Namespace,
    kept: Callable[[Job], None] = lambda job: None,
) -> Mapping[Job, Found]:
    """What was measured, by job; each result is shown on stderr as it is there.

    Arguments:
        measure: a function of a module, since processes are given its name; it returns plain JSON values.
        jobs: frozen dataclasses; everything that the result depends on is in their `repr`.
        given: with the options of `add_options`.
        kept: called with each job whose result is kept.

    Raises:
        VitquantError: of a job that refuses its input, when the others have ended and are kept.
    """
    if given.results is not None:
        given.results.mkdir(parents=True, exist_ok=True)
    by_key = {key_of(job): job for job in jobs}
    results = Results(given.results, TableOf(Plain()), CheckpointError)
    console = Console(stderr=True)
    with opened(given.workers) as workers, console.status("") as status:

        def show(what: str, done: int, total: int) -> None:
            status.update(f"{what}: {done} of {total}")

        def ended(key: str, result: Found) -> None:
            console.print(f"{by_key[key]}: {result}", markup=False)
            kept(by_key[key])

        found = run_jobs(measure, by_key, results, workers, show, ended)
    measured: dict[Job, Found] = {}
    for key, result in found.items():
        if isinstance(result, VitquantError):
            result.add_note(f"in {by_key[key]}")
            raise result
        measured[by_key[key]] = result
    return measured
