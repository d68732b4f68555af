"""Traces: texts that a model generated, as token ids, which `kvllm eval fidelity` replays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from kvllm.cli.offline import start_llm
from kvllm.errors import UsageError
from kvllm.measure.eval.chains import make_chains
from kvllm.measure.eval.engines import Question
from kvllm.measure.eval.problems import Asked, load_problems, spread

if TYPE_CHECKING:
    from vllm import LLM


@dataclass(frozen=True)
class Trace:
    """A prompt and the model's answer, as token ids."""

    id: str
    token_ids: list[int]
    num_prompt_tokens: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_prompt_tokens < len(self.token_ids):
            raise UsageError(
                f"trace {self.id}: has {len(self.token_ids)} tokens, but a prompt of {self.num_prompt_tokens}."
            )


def write_traces(path: Path, traces: Sequence[Trace]) -> None:
    path.write_text("".join(json.dumps(asdict(trace)) + "\n" for trace in traces))


def read_traces(path: Path, option: str = "--traces") -> list[Trace]:
    """The traces in a file. Raises UsageError, naming option and line, for an invalid one."""
    traces = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            traces.append(trace_of(json.loads(line)))
        except (json.JSONDecodeError, TypeError, KeyError) as e:
            raise UsageError(
                f"{option} {path}: not a file of `kvllm eval traces` (line {number}: {e}); give a file that it wrote."
            ) from e
    if not traces:
        raise UsageError(f"{option} {path}: the file is empty; give one that `kvllm eval traces` wrote.")
    return traces


def trace_of(row: Any) -> Trace:
    """Parse one line. Raises TypeError or KeyError for anything that `write_traces` does not write."""
    ids, num_prompt_tokens = row["token_ids"], row["num_prompt_tokens"]
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise TypeError("token_ids is not a list of integers")
    if type(num_prompt_tokens) is not int:
        raise TypeError("num_prompt_tokens is not an integer")
    return Trace(str(row["id"]), ids, num_prompt_tokens)


def make_traces(
    llm: LLM,
    task: str,
    problems: Sequence[Asked],
    max_tokens: int,
    min_tokens: int,
    temperature: float,
    seed: int | None,
) -> list[Trace]:
    """Answer the problems with stock vLLM; answers shorter than `min_tokens` are dropped."""
    from vllm import SamplingParams

    tokenizer = llm.get_tokenizer()
    prompts = [Question(p.prompt, None, None, p.examples).token_ids(tokenizer) for p in problems]
    seeds = [None if seed is None else seed + i for i in range(len(prompts))]
    sampling = [SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=s) for s in seeds]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    return [
        Trace(f"{task}:{problem.id}", prompt + answer, len(prompt))
        for problem, prompt, answer in zip(problems, prompts, answers, strict=True)
        if len(answer) >= min_tokens
    ]


def prompts_of(task: str, data: Path | None, num_prompts: int | None, chain_length: int | None) -> Sequence[Asked]:
    """The task's problems, or disjoint chains of them, evenly spaced.

    num_prompts: None: all; chain_length: None: no chains
    """
    problems = load_problems(task, data)
    if chain_length is None:
        return spread(problems, num_prompts)
    return spread(make_chains(problems, None, len(problems) // chain_length, chain_length, "example"), num_prompts)


def run(
    arguments: Sequence[str],
    out: Path,
    task: str,
    data: Path | None,
    num_problems: int | None,
    chain_length: int | None,
    num_kept: int | None,
    max_tokens: int,
    min_tokens: int,
    temperature: float,
    seed: int | None,
) -> None:
    """Generate traces and write those to keep to `out`; arguments: MODEL and any of vLLM's engine flags.

    chain_length: problems per prompt, for answers of thousands of tokens; None: one
    """
    if min_tokens > max_tokens:
        raise UsageError(f"--min-tokens {min_tokens}: no answer is longer than --max-tokens {max_tokens}; use fewer.")
    problems = prompts_of(task, data, num_problems, chain_length)
    llm = start_llm(arguments, None, Console(stderr=True))
    made = make_traces(llm, task, problems, max_tokens, min_tokens, temperature, seed)
    if not made:
        raise UsageError(
            f"none of the {len(problems)} answers has --min-tokens {min_tokens}; use more --problems, a model that "
            "writes longer answers, or fewer --min-tokens."
        )
    kept = spread(made, num_kept)
    write_traces(out, kept)
    mean = sum(len(trace.token_ids) - trace.num_prompt_tokens for trace in kept) / len(kept)
    print(f"{len(made)} of {len(problems)} answers have {min_tokens} tokens or more.")
    print(f"{out}: {len(kept)} traces, {mean:.0f} generated tokens on average")
