"""Write programs and their executions as traces for `kvllm eval fidelity` and `calibrate`.

python benchmarks/small_model/traces.py programs.jsonl --count 16 --seed 78
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import typer

from kvllm.measure.eval.programs import programs
from kvllm.measure.eval.traces import Trace, write_traces


def main(out: Path, count: int = 16, lines: int = 160, asked: int = 4, seed: int = 78) -> None:
    drawn = programs(count, lines, asked, np.random.default_rng(seed))
    pairs = zip(drawn.prompts.tolist(), drawn.answers.tolist(), strict=True)
    write_traces(out, [Trace(f"{seed}/{i}", prompt + answer, len(prompt)) for i, (prompt, answer) in enumerate(pairs)])


if __name__ == "__main__":
    typer.run(main)
