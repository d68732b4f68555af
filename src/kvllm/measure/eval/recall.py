"""Needle in the reasoning: a fact is stated once in the generated text and asked for later.

    kvllm eval recall --model DIR --methods kara --ratios 0.3 --distances 256,512,1024 --json out.json

The text consists of prompt, filler with the needle, and question. Everything after the prompt counts as generated, so
it is compressed as during decoding. The answer is then generated greedily. Random eviction cannot keep a number that is
attended to only later, so this shows losses that mean KL hides.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer

from kvllm.cli.generate import encode
from kvllm.errors import UsageError
from kvllm.measure.environment import environment
from kvllm.measure.eval.cache_formats import AUTO, cache_formats
from kvllm.measure.eval.forks import fork_all
from kvllm.measure.eval.plots import plot_grids
from kvllm.measure.eval.problems import Problem, load_problems
from kvllm.measure.eval.report import Outputs, Progress, interval, markdown
from kvllm.measure.eval.stats import Estimate, wilson
from kvllm.measure.eval.sweep import FULL, Case
from kvllm.methods import resolved
from kvllm.reference import Request, block_size_of, feed, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TASK_VERSION = 1
COLOURS = ("blue", "red", "green", "black", "white", "golden", "silver", "purple")
PROMPT = "Work through these problems one after the other, and note every fact that you come across."
PLACES = ("vault", "cellar", "tower", "library", "harbour", "garden", "station", "museum")


@dataclass(frozen=True)
class Needle:
    """A fact that cannot be derived again once it is evicted."""

    place: str
    code: str

    @property
    def statement(self) -> str:
        return f" The access code of the {self.place} is {self.code}."

    @property
    def question(self) -> str:
        return f"\n\nThe access code of the {self.place}, as stated above, is"


@dataclass(frozen=True)
class Item:
    """One text with a needle.

    distance: tokens of filler, including the needle, between prompt and question
    depth:    relative position of the needle in the filler: 0 at the start, 1 right before the question
    """

    distance: int
    depth: float
    sample: int
    needle: Needle
    token_ids: list[int]
    num_prompt_tokens: int


@dataclass(frozen=True)
class Answer:
    distance: int
    depth: float
    sample: int
    expected: str
    text: str

    @property
    def correct(self) -> bool:
        """Whether the first number of the answer is the code."""
        found = re.search(r"\d+", self.text)
        return found is not None and found[0] == self.expected


def make_items(
    tokenizer: Any,
    distances: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int = 0,
    data: Path | None = None,
) -> list[Item]:
    """Texts for every distance and depth; sample i has the same filler and needle in all of them.

    data: file of problems that make up the filler; None: GSM8K
    """
    problems = load_problems("gsm8k", data)
    rng = random.Random(seed)
    drawn = []
    for _ in range(samples):
        needle = Needle(f"{rng.choice(COLOURS)} {rng.choice(PLACES)}", str(rng.randrange(10000, 100000)))
        drawn.append((needle, filler_ids(tokenizer, problems, max(distances), rng)))
    prompt = encode(tokenizer, PROMPT, None)
    items = []
    for distance in distances:
        for depth in depths:
            for sample, (needle, filler) in enumerate(drawn):
                stated = tokenizer.encode(needle.statement, add_special_tokens=False)
                asked = tokenizer.encode(needle.question, add_special_tokens=False)
                room = distance - len(stated)
                if room < 0:
                    raise UsageError(
                        f"--distances {distance}: the needle alone takes {len(stated)} tokens; use a larger distance."
                    )
                before = round(depth * room)
                text = [*prompt, *filler[:before], *stated, *filler[before:room], *asked]
                items.append(Item(distance, depth, sample, needle, text, len(prompt)))
    return items


def filler_ids(tokenizer: Any, problems: Sequence[Problem], count: int, rng: random.Random) -> list[int]:
    """Token ids of filler: problems and answers one after another, as a model might restate them."""
    ids: list[int] = []
    while len(ids) < count:
        problem = rng.choice(problems)
        ids += tokenizer.encode(f"{problem.problem} The answer is {problem.answer}.\n\n", add_special_tokens=False)
    return ids[:count]


def measure(
    model: PreTrainedModel,
    tokenizer: Any,
    items: Sequence[Item],
    cases: Sequence[Case],
    block_size: int = 16,
    max_tokens: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[Answer]]:
    """Answers to every item by case label; those of the full cache under FULL."""
    answers: dict[str, list[Answer]] = {label: [] for label in (FULL, *(case.label for case in cases))}
    progress(0, len(items))
    for done, item in enumerate(items, start=1):
        for label, answer in zip(
            answers, answer_item(model, tokenizer, item, cases, block_size, max_tokens), strict=True
        ):
            answers[label].append(answer)
        progress(done, len(items))
    return answers


def answer_item(
    model: PreTrainedModel,
    tokenizer: Any,
    item: Item,
    cases: Sequence[Case],
    block_size: int = 16,
    max_tokens: int = 8,
    packed: bool = False,
) -> list[Answer]:
    """The full cache's answer to one item, then each case's.

    If a case compresses nothing before the question, its answer is that of the whole cache in its precision.
    packed: as in `Request`
    """

    def ask(request: Request) -> Answer:
        text = tokenizer.decode(continue_greedily(request, item.token_ids, max_tokens))
        return Answer(item.distance, item.depth, item.sample, item.needle.code, text)

    found: dict[int, Answer] = {}
    whole: dict[str, Answer] = {}
    for cache in dict.fromkeys([AUTO, *(case.cache for case in cases)]):
        chosen = [i for i, case in enumerate(cases) if case.cache == cache]
        configs, formats = [cases[i].config for i in chosen], cache_formats(cache, model.config)
        base, _, forks = fork_all(model, item.token_ids, item.num_prompt_tokens, configs, block_size, packed, formats)
        # Forks first: the full request moves on.
        found |= {chosen[j]: ask(request) for j, request in forks.items()}
        if cache == AUTO or len(forks) < len(chosen):
            whole[cache] = ask(base)
    return [whole[AUTO], *(found[i] if i in found else whole[case.cache] for i, case in enumerate(cases))]


def continue_greedily(request: Request, token_ids: Sequence[int], max_tokens: int) -> list[int]:
    """Greedy continuation of the text; the request may already hold a part of it."""
    if request.num_computed_tokens < len(token_ids) - 1:
        feed(request, token_ids)
    tokens = [token_ids[-1]]
    for _ in range(max_tokens):
        tokens.append(int(request.step(tokens[-1:])[-1].argmax()))
    return tokens[1:]


def accuracy(answers: Sequence[Answer]) -> Estimate:
    return wilson(sum(a.correct for a in answers), len(answers))


def grid(answers: Sequence[Answer]) -> dict[tuple[int, float], float]:
    """Share of correct answers by distance and depth."""
    cells: dict[tuple[int, float], list[bool]] = {}
    for a in answers:
        cells.setdefault((a.distance, a.depth), []).append(a.correct)
    return {place: sum(correct) / len(correct) for place, correct in cells.items()}


def table(answers: Mapping[str, Sequence[Answer]]) -> str:
    """Markdown: recall over all items, then by distance."""
    distances = sorted({a.distance for a in next(iter(answers.values()))})
    rows = [
        [
            label,
            interval(accuracy(given), 1, scale=100),
            *[f"{100 * accuracy([a for a in given if a.distance == d]).value:.0f}" for d in distances],
        ]
        for label, given in answers.items()
    ]
    return markdown(["method", "recalled %", *[f"distance {d}" for d in distances]], rows)


def report(answers: Mapping[str, Sequence[Answer]], cases: Sequence[Case], **about: Any) -> dict[str, Any]:
    """The content of the JSON file, including all answers, so that they can be graded again."""
    configs = {case.label: resolved(case.config) for case in cases}
    return {
        "task": "recall",
        "task_version": TASK_VERSION,
        **environment(),
        **about,
        "results": [
            {
                "name": label,
                "config": configs.get(label),
                "accuracy": asdict(accuracy(given)),
                "grid": [{"distance": d, "depth": x, "accuracy": share} for (d, x), share in grid(given).items()],
                "answers": [asdict(a) for a in given],
            }
            for label, given in answers.items()
        ],
    }


def run(
    folder: str,
    cases: Sequence[Case],
    distances: Sequence[int],
    depths: Sequence[float],
    samples: int,
    block_size: int,
    device: str,
    dtype: str,
    outputs: Outputs,
    data: Path | None = None,
) -> None:
    """Measure, print the table and write the files in `outputs`; folder: of the model."""
    model = load_model(folder, getattr(torch, dtype), device)
    block_size = block_size_of(model, block_size)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    items = make_items(tokenizer, distances, depths, samples, data=data)
    start = time.perf_counter()
    answers = measure(model, tokenizer, items, cases, block_size, progress=Progress("texts"))
    seconds = time.perf_counter() - start
    about = {
        "model": Path(folder).name,
        "samples": samples,
        "block_size": block_size,
        "dtype": dtype,
        "seconds": seconds,
    }
    grids = {f"{label}: {accuracy(given).value:.0%}": grid(given) for label, given in answers.items()}
    outputs.write(table(answers), report(answers, cases, **about), lambda path: plot_grids(grids, path))
    print(f"\n{len(items)} texts, {len(cases)} configurations, {dtype} on {device}, {seconds:.0f} s")
