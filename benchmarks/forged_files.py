"""Files of someone who knows every format: mutated structure by structure, with digests that are right.

    PYTHONPATH=src:tests/helpers python benchmarks/forged_files.py --mutations 3000 [--kind config ...]

For each kind of file: how many mutations were refused by one line of ours, how many were accepted, and how many ended
in anything else (0), ran code (0), or took more than 20 s (0); seconds; and the process's peak memory, which is limited
to 12 GB of address space. A table at the end, and a line for each failure with the seed that repeats it.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

from mutations import KINDS, Attack, attack

LIMIT = 12 * 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=3000)
    parser.add_argument("--kind", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    print(
        f"{'kind':14}{'mutations':>10}{'refused':>9}{'accepted':>9}{'failures':>9}{'longest':>9}{'seconds':>9}{'MB':>7}"
    )
    for kind in options.kind:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            found: Attack = attack(kind, options.mutations, options.seed, Path(folder))
            seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
        row = f"{kind:14}{options.mutations:10}{found.refused:9}{found.accepted:9}{len(found.failures):9}"
        print(f"{row}{found.longest:8.1f}s{seconds:8.0f}s{peak:7}", flush=True)
        for failure in found.failures[:20]:
            print(f"    {failure}", flush=True)


if __name__ == "__main__":
    main()
