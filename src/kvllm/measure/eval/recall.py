"""A needle in the reasoning: a fact stated once in the generated part and asked for later.

    python -m kvllm.measure.eval.recall --model DIR --methods kara --ratios 0.3 --distances 256,512,1024 --json out.json

The text is prompt, filler with the needle in it, question; all of it but the prompt counts as generated, so windows are
compressed as they would be during decoding. The answer is then generated greedily. A method that evicts at random
cannot keep a number whose tokens are looked at only later, so this shows what mean KL hides.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer

from kvllm.errors import UsageError
from kvllm.measure.eval.environment import environment
from kvllm.measure.eval.forks import fork_all
from kvllm.measure.eval.problems import load_problems
from kvllm.measure.eval.report import Progress, interval, markdown
from kvllm.measure.eval.stats import Estimate, wilson
from kvllm.measure.eval.sweep import Case, parse_cases
from kvllm.methods import resolved
from kvllm.options import parse_numbers
from kvllm.reference import Request, feed, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TASK_VERSION = 1
FULL = "full cache"
COLOURS = ("blue", "red", "green", "black", "white", "golden", "silver", "purple")
PROMPT = "Work through these problems one after the other, and note every fact that you come across."
PLACES = ("vault", "cellar", "tower", "library", "harbour", "garden", "station", "museum")


@dataclass(frozen=True)
class Needle:
    """A fact that no reasoning can find again once it is forgotten."""

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
    """One text to remember in.

    distance: tokens of filler, needle included, between the prompt and the question
    depth:    where in them the needle stands: 0 at the start, 1 right before the question
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
    tokenizer: Any, distances: Sequence[int], depths: Sequence[float], samples: int, seed: int = 0
) -> list[Item]:
    """Texts of every distance and depth; sample i has the same filler and needle at all of them."""
    rng = random.Random(seed)
    drawn = []
    for _ in range(samples):
        needle = Needle(f"{rng.choice(COLOURS)} {rng.choice(PLACES)}", str(rng.randrange(10000, 100000)))
        drawn.append((needle, filler_ids(tokenizer, max(distances), rng)))
    prompt = prompt_ids(tokenizer)
    items = []
    for distance in distances:
        for depth in depths:
            for sample, (needle, filler) in enumerate(drawn):
                stated = tokenizer.encode(needle.statement, add_special_tokens=False)
                asked = tokenizer.encode(needle.question, add_special_tokens=False)
                room = distance - len(stated)
                if room < 0:
                    raise UsageError(f"distance {distance}: the needle alone takes {len(stated)} tokens.")
                before = round(depth * room)
                text = [*prompt, *filler[:before], *stated, *filler[before:room], *asked]
                items.append(Item(distance, depth, sample, needle, text, len(prompt)))
    return items


def prompt_ids(tokenizer: Any) -> list[int]:
    """What the reasoning answers to, in the model's chat template if it has one."""
    if getattr(tokenizer, "chat_template", None) is None:
        return list(tokenizer.encode(PROMPT))
    messages = [{"role": "user", "content": PROMPT}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def filler_ids(tokenizer: Any, count: int, rng: random.Random) -> list[int]:
    """Problems and answers in a row, as a model might restate them: tokens of ordinary mathematical text."""
    problems = load_problems("gsm8k")
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
    """Answers to every item, by the case's label, and with the full cache under FULL.

    A case that compresses nothing before the question has the full cache's answer.
    """
    answers: dict[str, list[Answer]] = {label: [] for label in (FULL, *(case.label for case in cases))}
    for done, item in enumerate(items, start=1):
        configs = [case.config for case in cases]
        full, _, forks = fork_all(model, item.token_ids, item.num_prompt_tokens, configs, block_size)

        def ask(request: Request, item: Item = item) -> Answer:
            text = tokenizer.decode(continue_greedily(request, item.token_ids, max_tokens))
            return Answer(item.distance, item.depth, item.sample, item.needle.code, text)

        # Forks first: the full request moves on.
        compressed = {i: ask(request) for i, request in forks.items()}
        answers[FULL].append(ask(full))
        for i, case in enumerate(cases):
            answers[case.label].append(compressed.get(i, answers[FULL][-1]))
        progress(done, len(items))
    return answers


def continue_greedily(request: Request, token_ids: Sequence[int], max_tokens: int) -> list[int]:
    """The most likely tokens after the text, of which the request may already hold a part."""
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
    """Markdown: all items together, then by distance."""
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
    """What is written as JSON: every answer too, so that it can be graded again."""
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="kvllm eval recall",
        description="State a fact in the reasoning and ask for it later; full, random and recent are always in.",
    )
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--methods", help="comma-separated, each at every ratio")
    parser.add_argument("--ratios", help="comma-separated retention ratios (default: 0.3)")
    parser.add_argument("--configs", nargs="*", default=[], help="shipped sweeps (methods, kara), files, or JSON")
    parser.add_argument("--common", type=json.loads, default={}, help="JSON: options that all configurations share")
    parser.add_argument("--distances", default="512,1024", help="tokens between the prompt and the question")
    parser.add_argument("--depths", default="0.1,0.3,0.5,0.7,0.9", help="place of the needle in them, 0 to 1")
    parser.add_argument("--samples", type=int, default=8, help="needles and fillers for each distance and depth")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, ...; auto: float32 on the CPU, else bfloat16"
    )
    parser.add_argument("--json", type=Path, help="write all figures and answers here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--plot", type=Path, help="draw a heat map a method here (.svg, .png)")
    options = parser.parse_args(arguments)

    cases = parse_cases(options.configs, options.methods, options.ratios, options.common)
    dtype = options.dtype if options.dtype != "auto" else ("float32" if options.device == "cpu" else "bfloat16")
    model = load_model(options.model, getattr(torch, dtype), options.device)
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    distances = parse_numbers("--distances", options.distances, int, "512,1024")
    depths = parse_numbers("--depths", options.depths, float, "0.1,0.5,0.9")
    items = make_items(tokenizer, distances, depths, options.samples)
    start = time.perf_counter()
    answers = measure(model, tokenizer, items, cases, options.block_size, progress=Progress("texts"))
    seconds = time.perf_counter() - start
    if options.json:
        about = {
            "model": Path(options.model).name,
            "samples": options.samples,
            "block_size": options.block_size,
            "dtype": dtype,
            "seconds": seconds,
        }
        options.json.write_text(json.dumps(report(answers, cases, **about), indent=1) + "\n")
    print(table(answers))
    print(f"\n{len(items)} texts, {len(cases)} configurations, {dtype} on {options.device}, {seconds:.0f} s")
    if options.markdown:
        options.markdown.write_text(table(answers) + "\n")
    if options.plot:
        from kvllm.measure.eval.plots import plot_recall

        plot_recall(answers, options.plot)


if __name__ == "__main__":
    main()
