"""Read the texts to tune on from JSONL: traces, conversations, or prompts with or without answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvllm.errors import UsageError, within
from kvllm.measure.eval.report import Progress
from kvllm.measure.eval.traces import Trace, trace_of
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
    """The texts of a file. The model generates missing answers, of at most `max_tokens` tokens.

    Raises UsageError, naming the line, for a line in none of FORMS.
    """
    try:
        written = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as e:
        raise UsageError(f"{path}: no text in UTF-8 ({e.reason}); each line is {FORMS}.") from e
    lines = [(number, line) for number, line in enumerate(written, start=1) if line.strip()][:limit]
    texts, progress = [], Progress("texts read")
    progress(0, len(lines))
    for done, (number, line) in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        with within(f"{path}, line {number}"):
            text = one_text(row, f"{number}", tokenizer) if isinstance(row, dict) else None
            if text is None:
                raise UsageError(f"expected JSON of the form {FORMS}.")
        if not isinstance(text, Trace):
            answer = write_answer(model, text, max_tokens, temperature, seed=number)
            text = Trace(f"{number}", [*text, *answer], len(text))
        texts.append(text)
        progress(done, len(lines))
    if not texts:
        raise UsageError(f"{path}: holds no texts; each line is {FORMS}.")
    if len({text.id for text in texts}) < len(texts):
        # Results are stored by id.
        texts = [replace(text, id=f"{number}:{text.id}") for (number, _), text in zip(lines, texts, strict=True)]
    return texts


def one_text(row: Mapping[str, Any], name: str, tokenizer: Any) -> Trace | list[int] | None:
    """The text of one line; only the prompt's token ids if it has no answer; None if the form is unknown."""
    if {"token_ids", "num_prompt_tokens"} <= row.keys():
        try:
            return trace_of({"id": name, **row})
        except TypeError as e:
            raise UsageError(f"{e}; give traces as `kvllm eval traces` writes them.") from e
    answer: str | None = None
    if isinstance(messages := row.get("messages"), list) and messages:
        asked, answer = conversation(messages)
        if tokenizer.chat_template is None:
            raise UsageError("the model has no chat template for messages; give prompts instead.")
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    elif isinstance(row.get("prompt"), str):
        prompt, answer = prompt_ids(tokenizer, row["prompt"]), row.get("answer")
    else:
        return None
    if answer is not None and not isinstance(answer, str):
        raise UsageError(f"answer={answer!r:.60}: must be a string, or left out.")
    if not answer:
        return list(prompt)
    return Trace(name, [*prompt, *tokenizer(answer, add_special_tokens=False)["input_ids"]], len(prompt))


def conversation(messages: Sequence[Any]) -> tuple[list[dict[str, Any]], str | None]:
    """The messages of the prompt, and the answer if the last message is the assistant's."""
    read = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UsageError(f'messages: {message!r:.60}; must be {{"role": "user", "content": "..."}}.')
        read.append({**message, "content": plain(message.get("content"))})
    *asked, last = read
    if last["role"] != "assistant":
        return read, None
    if not asked:
        raise UsageError("messages: the assistant's alone; put what it answers before it.")
    # Reasoning parsers return thoughts separately; these were in the cache too.
    return asked, plain(last.get("reasoning_content")) + last["content"]


def plain(content: Any) -> str:
    """The text of a message's content: a string, a list of text parts, or nothing."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    raise UsageError(f'content: {content!r:.60}; must be a string, or a list of {{"type": "text", "text": "..."}}.')


def write_answer(
    model: PreTrainedModel, prompt: Sequence[int], max_tokens: int, temperature: float, seed: int
) -> list[int]:
    """The model's answer, generated with transformers; temperature 0: greedy."""
    import torch

    torch.manual_seed(seed)
    ids = torch.tensor([list(prompt)], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    made: Any = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, **sampling)  # type: ignore[operator]
    return made[0, len(prompt) :].tolist()
