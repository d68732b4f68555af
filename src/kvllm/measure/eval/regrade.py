"""Grade the answers of `kvllm eval accuracy` again, such as with a newer math-verify, and write its results anew.

python -m kvllm.measure.eval.regrade DIR/samples.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from kvllm.measure.eval.accuracy import RUN, write_results
from kvllm.measure.eval.samples import read_samples, regrade


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="kvllm eval grade", description="Grade the log of `kvllm eval accuracy` again."
    )
    parser.add_argument("log", type=Path, help="samples.jsonl of a run; results.* beside it are written anew")
    options = parser.parse_args(arguments)
    before = {s.key: s.correct for s in read_samples(options.log)}
    samples = regrade(options.log)
    changed = sum(before[s.key] != s.correct for s in samples)
    run = options.log.parent / RUN
    about = json.loads(run.read_text()) if run.exists() else {}
    print(write_results(options.log.parent, samples, about))
    print(f"\n{len(samples)} answers graded, {changed} of them differently than before")


if __name__ == "__main__":
    main()
