"""Grade the answers of `kvllm eval accuracy` again, for example with a newer math-verify, and rewrite its results."""

from __future__ import annotations

import json
from pathlib import Path

from kvllm.errors import UsageError
from kvllm.measure.eval.accuracy import RUN, write_results
from kvllm.measure.eval.samples import read_samples, regrade


def run(log: Path) -> None:
    """log: samples.jsonl of a run; results.* in its folder are rewritten."""
    found = read_samples(log)
    for sample in found:
        if sample.grader is not None and not sample.grader.startswith("math-verify"):
            raise UsageError(f"{log}: graded by {sample.grader!r}, not by math-verify; run the task again instead.")
    before = {s.key: s.correct for s in found}
    samples = regrade(log)
    changed = sum(before[s.key] != s.correct for s in samples)
    about = log.parent / RUN
    print(write_results(log.parent, samples, json.loads(about.read_text()) if about.exists() else {}))
    print(f"\n{len(samples)} answers graded, {changed} of them differently than before")
