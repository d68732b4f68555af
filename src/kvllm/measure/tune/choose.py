"""Choose settings: the smallest loss for a wanted saving, or the largest saving for an accepted loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvllm.compression.footprint import head_dim_of
from kvllm.config import PRESET_KEY, PRESETS, KvConfig
from kvllm.errors import UsageError
from kvllm.measure.eval.fidelity import measure_trace
from kvllm.measure.eval.frontier import ratios
from kvllm.measure.eval.held_bytes import full_bytes, held_bytes
from kvllm.measure.eval.stats import Estimate, bootstrap_ratio
from kvllm.measure.eval.sweep import Case
from kvllm.measure.eval.traces import Trace
from kvllm.support import PLAIN_BITS, packed_problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOWS = (256, 128)
SIZES = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5)
FEWEST_TO_SPLIT = 4  # minimum number of texts to split into halves, one to choose by and one to report on


@dataclass
class Candidate:
    """One setting and its measurements.

    saving:  size of the full cache / size of this cache, averaged over the generation of the texts
    lost:    sum of KL over each answer's tokens, in nats; 0 before the first compression
    lengths: number of tokens of each answer
    """

    config: KvConfig
    saving: float
    lost: dict[str, float] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)

    def kl(self, texts: Sequence[str]) -> Estimate:
        """Mean KL per answer token."""
        return bootstrap_ratio([self.lost[t] for t in texts], [self.lengths[t] for t in texts])


def candidates(model_config: Any, texts: Sequence[Trace], block_size: int) -> list[Candidate]:
    """Settings of many sizes; 4-bit ones only if the GPU kernels support this model."""
    text = model_config.get_text_config()
    head_dim, lengths = head_dim_of(text), [(t.num_prompt_tokens, answer_len(t)) for t in texts]
    bits = [PLAIN_BITS] if packed_problem(4, "bfloat16", head_dim=head_dim) else [PLAIN_BITS, 4]
    configs = [KvConfig()]
    for window in WINDOWS:
        for each in bits:
            for ratio in ratios(each, SIZES, "auto", window, block_size, head_dim):
                options = {"window_size": window, "survivor_bits": each, "retention_ratio": ratio}
                configs.append(KvConfig.from_dict(options))
    full = full_bytes(model_config)
    return [
        Candidate(config, full / held_bytes(Case("", config), model_config, block_size, lengths).life)
        for config in configs
    ]


def answer_len(text: Trace) -> int:
    return len(text.token_ids) - text.num_prompt_tokens


def measure(
    model: PreTrainedModel,
    texts: Sequence[Trace],
    found: Sequence[Candidate],
    block_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Fill in each candidate's loss on each text."""
    cases = [Case(config_label(each.config), each.config) for each in found]
    progress(0, len(texts))
    for done, text in enumerate(texts, start=1):
        for each, rows in zip(found, measure_trace(model, text, cases, block_size, packed=True), strict=True):
            each.lost[text.id] = 0.0 if rows is None else float(rows.kl.sum())
            each.lengths[text.id] = answer_len(text)
        progress(done, len(texts))


def config_label(config: KvConfig) -> str:
    return " ".join(serve_flags(config)) or "the defaults"


def serve_flags(config: KvConfig) -> list[str]:
    """Flags for `kvllm serve`: a preset if one matches, else the options that differ from the defaults."""
    from kvllm.cli.options import flag

    defaults = KvConfig().to_dict()
    changed = {name: value for name, value in config.to_dict().items() if value != defaults[name]}
    for name, preset in PRESETS.items():
        if changed == {key: value for key, value in preset.items() if value != defaults[key]}:
            return [flag(PRESET_KEY), name]
    return [part for name, value in changed.items() for part in (flag(name), f"{value:.6g}")]


def split(texts: Sequence[Trace]) -> tuple[list[str], list[str]]:
    """Names of the texts to choose by and to report on; if there are few, all of them for both."""
    names = [text.id for text in texts]
    return (names[::2], names[1::2]) if len(names) >= FEWEST_TO_SPLIT else (names, names)


def choose(found: Sequence[Candidate], texts: Sequence[str], saving: float | None, max_kl: float | None) -> Candidate:
    """The best candidate on the given texts. Raises UsageError, which says what is possible, if none qualifies.

    max_kl: limit on the upper end of KL's confidence interval
    """
    if saving is not None:
        enough = [each for each in found if each.saving >= saving]
        if not enough:
            most = max(each.saving for each in found)
            raise UsageError(
                f"--saving {saving:g}: on texts of these lengths at most {most:.2f} is possible, since prompts and the "
                "newest tokens stay whole; use less, or longer answers."
            )
        return min(enough, key=lambda each: (each.kl(texts).value, -each.saving))
    assert max_kl is not None
    good = [each for each in found if each.kl(texts).high <= max_kl]
    if not good:
        least = min(found, key=lambda each: each.kl(texts).high)
        raise UsageError(
            f"--max-kl {max_kl:g}: the least loss is {least.kl(texts)} ({config_label(least.config)}); tolerate more, "
            "or use stock vLLM."
        )
    return max(good, key=lambda each: (each.saving, -each.kl(texts).value))


def pareto(found: Sequence[Candidate], texts: Sequence[str]) -> list[Candidate]:
    """The Pareto-optimal candidates by loss and saving, smallest loss first."""
    kept: list[Candidate] = []
    for each in sorted(found, key=lambda each: (each.kl(texts).value, -each.saving)):
        if not kept or each.saving > kept[-1].saving:
            kept.append(each)
    return kept
