"""The texts to tune on, from JSONL: traces, conversations, or prompts with or without answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvllm.errors import UsageError
from kvllm.measure.eval.report import Progress
from kvllm.measure.eval.traces import Trace
from kvllm.measure.inspect.run import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMS = (
    '{"messages": [...]} as in the OpenAI API, {"prompt": "...", "answer": "..."}, either without the answer, or what '
    "`kvllm eval traces` writes"
)


def read_texts(
    path: Path, model: PreTrainedModel, tokenizer: Any, max_tokens: int, temperature: float, limit: int | None
) -> list[Trace]:
    """The texts of a file. Where an answer is missing, the model writes one, of at most `max_tokens` tokens.

    Raises UsageError, naming the line, for one in none of the FORMS.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][:limit]
    texts, progress = [], Progress("texts read")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            text = one_text(row, f"{number}", tokenizer) if isinstance(row, dict) else None
        except json.JSONDecodeError:
            text = None
        if text is None:
            raise UsageError(f"{path}, line {number}: expected JSON of the form {FORMS}.")
        if isinstance(text, Trace):
            texts.append(text)
        else:
            answer = write_answer(model, text, max_tokens, temperature, seed=number)
            texts.append(Trace(f"{number}", [*text, *answer], len(text)))
        progress(number, len(lines))
    if not texts:
        raise UsageError(f"{path}: holds no texts; each line is {FORMS}.")
    return texts


def one_text(row: Mapping[str, Any], name: str, tokenizer: Any) -> Trace | list[int] | None:
    """The text of one line; the prompt's token ids alone where it has no answer; None where it is something else."""
    if {"token_ids", "num_prompt_tokens"} <= row.keys():
        return Trace(str(row.get("id", name)), list(row["token_ids"]), int(row["num_prompt_tokens"]))
    answer: str | None = None
    if isinstance(messages := row.get("messages"), list) and messages:
        *asked, last = messages
        if last.get("role") == "assistant":
            # A reasoning parser splits the thoughts off; they were in the cache too.
            answer = (last.get("reasoning_content") or "") + (last.get("content") or "")
        else:
            asked = messages
        if tokenizer.chat_template is None:
            raise UsageError(f"line {name}: the model has no chat template for messages; give prompts instead.")
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    elif isinstance(row.get("prompt"), str):
        prompt, answer = prompt_ids(tokenizer, row["prompt"]), row.get("answer")
    else:
        return None
    if not answer:
        return list(prompt)
    return Trace(name, [*prompt, *tokenizer(answer, add_special_tokens=False)["input_ids"]], len(prompt))


def write_answer(
    model: PreTrainedModel, prompt: Sequence[int], max_tokens: int, temperature: float, seed: int
) -> list[int]:
    """What the model answers, sampled with transformers; temperature 0: greedy."""
    import torch

    torch.manual_seed(seed)
    ids = torch.tensor([list(prompt)], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    made: Any = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, **sampling)  # type: ignore[operator]
    return made[0, len(prompt) :].tolist()
