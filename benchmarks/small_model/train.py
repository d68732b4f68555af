"""Train a small Qwen3 that executes programs step by step (`kvllm.measure.eval.programs`): minutes on one H100.

    python benchmarks/small_model/train.py OUT --minutes 6

Programs are generated during training, so none repeats. The schedules of the learning rate and of the program length
(short ones first) follow elapsed time. OUT is a model folder for transformers, vLLM and `kvllm eval tracking`; it is
written every minute.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from math import cos, pi
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import Qwen3Config, Qwen3ForCausalLM

from kvllm.measure.eval.programs import (
    ANSWER,
    ANSWER_LINE,
    END,
    PAD,
    PROMPT_LINE,
    VOCABULARY,
    Programs,
    programs,
    save_tokenizer,
)

NUM_ASKED = 4
WARMUP = 0.03  # share of the training time
# (share of the training time, share of the lines that programs have from then on)
STAGES = ((0.0, 0.2), (0.25, 0.5), (0.45, 1.0))
NUM_HELD_OUT = 64


def make_model(hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, mlp: int) -> Any:
    config = Qwen3Config(
        vocab_size=len(VOCABULARY), hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=END, pad_token_id=PAD, dtype="bfloat16", attn_implementation="sdpa",
    )  # fmt: skip
    return Qwen3ForCausalLM(config).float()


class Schedule:
    """The state of the schedules: elapsed share of the time, stage and learning rate."""

    def __init__(self, minutes: float, lr: float) -> None:
        self.seconds, self.lr, self.begin = 60 * minutes, lr, time.perf_counter()

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.begin

    @property
    def share(self) -> float:
        return min(1.0, self.elapsed / self.seconds)

    @property
    def stage(self) -> int:
        return sum(self.share >= start for start, _ in STAGES) - 1

    @property
    def rate(self) -> float:
        return self.lr * min(self.share / WARMUP, 0.02 + 0.98 * (1 + cos(pi * self.share)) / 2)


def batches(seed: int, tokens: int, lengths: Sequence[int], schedule: Schedule) -> Iterator[tuple[int, Tensor, int]]:
    """Endless iterator of (lines, ids [batch, length], prompt tokens), generated in advance by two threads."""
    made: queue.Queue[tuple[int, Tensor, int]] = queue.Queue(maxsize=8)

    def draw(worker: int) -> None:
        rng = np.random.default_rng((seed, worker))
        while True:
            lines = lengths[schedule.stage]
            drawn = programs(max(1, tokens // ((PROMPT_LINE + ANSWER_LINE) * lines)), lines, NUM_ASKED, rng)
            made.put((lines, whole(drawn), drawn.prompts.shape[1]))

    for worker in range(2):
        threading.Thread(target=draw, args=(worker,), daemon=True).start()
    while True:
        lines, ids, prompt = made.get()
        if lines == lengths[schedule.stage]:
            yield lines, ids, prompt


def whole(drawn: Programs) -> Tensor:
    return torch.from_numpy(np.concatenate([drawn.prompts, drawn.answers], axis=1))


def logits_of_answers(model: Any, ids: Tensor, prompt: int) -> Tensor:
    """Logits that predict each token of the answer, [batch, answer tokens, vocabulary] in float32."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    return model.lm_head(hidden[:, prompt - 1 :]).float()


@torch.no_grad()
def teacher_forced(model: Any, drawn: Programs) -> dict[str, float]:
    """Accuracy with teacher forcing: shares of correct line parts, requested values and whole answers."""
    prompt, device = drawn.prompts.shape[1], model.device
    parts = whole(drawn).to(device).split(16)
    with torch.compiler.set_stance("force_eager"):
        hits = torch.cat([logits_of_answers(model, ids, prompt).argmax(-1) == ids[:, prompt:] for ids in parts])
    start = int((drawn.answers[0] == ANSWER).argmax())
    lines = hits[:, :start].unflatten(1, (-1, ANSWER_LINE)).float()
    return {
        "copies": lines[..., :5].amin(-1).mean().item(),
        "lookups": lines[..., 5].mean().item(),
        "results": lines[..., 7].mean().item(),
        "asked": hits[:, start + 2 : -1 : 2].float().mean().item(),
        "answers": hits.all(-1).float().mean().item(),
    }


@torch.no_grad()
def greedy(model: Any, drawn: Programs) -> float:
    """Share of correct answers in free generation."""
    prompts, right = (torch.from_numpy(ids).to(model.device) for ids in (drawn.prompts, drawn.answers))
    with torch.compiler.set_stance("force_eager"):
        out = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=right.shape[1], do_sample=False
        )
    made = pad(out[:, prompts.shape[1] :], (0, right.shape[1]), value=PAD)[:, : right.shape[1]]
    last = 2 * drawn.asked.shape[1] + 1
    return (made[:, -last:] == right[:, -last:]).all(-1).float().mean().item()


def save(model: Any, out: Path) -> None:
    """Save in bfloat16, replacing one file at a time, so that a complete folder stays complete."""
    new = out.with_suffix(".new")
    rounded = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.save_pretrained(new)
    save_tokenizer(new)
    out.mkdir(parents=True, exist_ok=True)
    for file in new.iterdir():
        file.replace(out / file.name)
    new.rmdir()


def main(
    out: Path,
    minutes: float = 6.0,
    lines: Annotated[int, typer.Option(help="Lines per program; 13 tokens each.")] = 160,
    hidden: int = 384,
    layers: int = 6,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 64,
    mlp: int = 640,
    tokens: Annotated[int, typer.Option(help="Tokens per training step.")] = 65536,
    lr: float = 2e-3,
    seed: int = 0,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    compiled: Annotated[bool, typer.Option("--compile/--no-compile")] = torch.cuda.is_available(),
    report: Annotated[float, typer.Option(help="Seconds between reports.")] = 20.0,
) -> None:
    torch.manual_seed(seed)
    model = make_model(hidden, layers, heads, kv_heads, head_dim, mlp).to(device)
    print(f"{num_parameters(model) / 1e6:.2f}M parameters, {device}", flush=True)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=device == "cuda")
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    if compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=False)

    lengths = [max(NUM_ASKED + 1, round(lines * share)) for _, share in STAGES]
    rng = np.random.default_rng(seed + 1)
    held_out = {n: programs(NUM_HELD_OUT, n, NUM_ASKED, rng) for n in set(lengths)}
    log: list[dict[str, float]] = []

    def note(lines: int, more: dict[str, float]) -> None:
        with autocast:
            shares = teacher_forced(model, held_out[lines])
        log.append({"seconds": round(schedule.elapsed), "step": step, "tokens": seen, "lines": lines, **more, **shares})
        print(json.dumps({k: round(v, 4) for k, v in log[-1].items()}), flush=True)

    schedule = Schedule(minutes, lr)
    step, seen, reported, saved = 0, 0, 0.0, 0.0
    for num_lines, ids, prompt in batches(seed, tokens, lengths, schedule):
        if schedule.share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate
        ids = ids.to(device, non_blocking=True)
        with autocast:
            logits = logits_of_answers(model, ids, prompt)
        loss = cross_entropy(logits.flatten(0, 1), ids[:, prompt:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + ids.numel()
        if schedule.elapsed - reported >= report:
            reported = schedule.elapsed
            note(num_lines, {"loss": loss.item()})
        if schedule.elapsed - saved >= 60:
            saved = schedule.elapsed
            save(model, out)
    save(model, out)
    note(lines, {})
    (out / "training.json").write_text(json.dumps({"parameters": num_parameters(model), "log": log}, indent=1) + "\n")
    with autocast:
        print(json.dumps({"greedy": greedy(model, held_out[lines])}), flush=True)


def num_parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    typer.run(main)
