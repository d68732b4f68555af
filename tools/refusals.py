"""List every refusal in the source with its remedy, for docs/refusals.md.

    python -m tools.refusals      writes the page; `make reference` does

A refusal is the message of a UsageError or of vLLM's VLLMValidationError, a reason in `kvllm.support`, or a problem
that one of our functions returns. Messages should end with the remedy; REMEDIES supplies it for those that do not.
`tests/tools/test_reference.py` fails for messages with neither.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "kvllm"
PAGE = ROOT / "docs" / "refusals.md"
ERRORS = {"UsageError", "VLLMValidationError"}
# Functions that return the message of a refusal, which another module raises.
RETURNING = {"packed_problem", "why_not_inspected", "no_such", "torchvision_problem", "_wrong_value", "why_missing"}
VERBS = (
    "use|leave|install|unset|give|write|start|send|try|choose|run|set|swap|add|remove|serve|pass|put|did you mean|"
    "expected|must|name|make|create|see"
)
REMEDY = re.compile(rf"(?:^|[;:.,] |, or |\) )((?:{VERBS})\b.*)$", re.IGNORECASE)
SECTIONS = (
    ("Models and settings of vLLM", "At start-up, or by `kvllm plan` and `kvllm doctor` before.",
     ("support.py", "checks.py", "engine/", "kernels/", "groups.py", "layers.py", "compression/")),
    ("Requests", "HTTP 400 from a server, `VLLMValidationError` from `LLM.generate`.",
     ("engine/requests.py", "engine/usage.py")),
    ("Options of compression", "From flags, `additional_config` and Python alike.",
     ("config.py", "options.py", "layout.py", "budgets.py", "methods/")),
    ("Commands", "Exit code 2; `KVLLM_TRACEBACK=1` shows where.", ("cli/", "__main__.py")),
    ("Measuring", "`kvllm bench`, `kvllm eval`, `kvllm inspect` and the reference.", ("measure/", "reference/")),
)  # fmt: skip


@dataclass(frozen=True)
class Refusal:
    """One message in the source; "…" stands for inserted values.

    path: relative to src/kvllm; subject: the setting that a reason in `support.py` is about, else empty
    """

    path: str
    message: str
    subject: str = ""

    @property
    def text(self) -> str:
        return f"{self.subject}=…: {self.message}" if self.subject else self.message


# Messages that only wrap another one, which is listed separately.
CARRIERS = re.compile(
    r"KvLLM does not support (layer )?…( with …)?(: …)?\.|KvLLM does not support survivor_bits=… with …\.|"
    r"request_ratios=…: …|request_methods=…: …: …|the engine refused to start: …|…=…: …|…=…: …\.…|kvllm …: …\.|"
    r"no such …; …s are …\."
)
# Remedies for messages without one, by file and a part of the message ("": any).
STOCK = "Serve this model with stock vLLM. [Compatibility](compatibility.md) lists models that are served."
PIP = "Run the pip command in the message."
BUG = "Please report this with the model and the vLLM release; until then serve the model with stock vLLM."
REMEDIES: dict[tuple[str, str], str] = {
    ("budgets.py", "retention_ratio"): 'Write a table such as {"0-13": 0.4, "14-27": 0.2}: two to four groups of '
    "equal size, each full-attention layer once, ratios between 0 and 1.",
    ("budgets.py", "num_groups"): "Use a number that divides the layers, or one ratio for all of them.",
    (
        "cli/plan.py",
        "leave nothing",
    ): "Plan for more --memory, a smaller --max-num-seqs or --reserve, or a smaller model.",
    ("cli/measuring.py", "kvllm-measure"): PIP,
    ("engine/attention.py", "KV cache itself"): "Serve it without KvLLM.",
    ("engine/cache_groups.py", ""): BUG,
    (
        "engine/requests.py",
        "streaming input sessions cannot",
    ): "Send the request with kv_retention_ratio 1.0, which the operator must allow (`--request-ratios 1.0`).",
    (
        "engine/requests.py",
        "prefix_budget_exhausted",
    ): "Use a shorter prompt or a lower max_tokens; as operator, a larger KV cache.",
    (
        "engine/requests.py",
        "at its peak",
    ): "Use a lower max_tokens, or a lower ratio if the server allows one; the message says which fit.",
    ("engine/rope.py", ""): "Set `--method-options '{\"lookahead\": 0}'`, or use another method.",
    ("engine/runner_v2.py", "block tables"): BUG,
    ("engine/settings.py", "supports the platforms"): "Use an NVIDIA GPU or a CPU.",
    (
        "checks.py",
        "--language-model-only",
    ): "Use another method, or --language-model-only to accept no images.",
    ("measure/bench/cli.py", "replaces all other options"): "Put these options into the JSON of --spec.",
    ("measure/bench/cli.py", "neither a JSON object"): "Pass a JSON object, or the path of a file that holds one.",
    ("measure/bench/kernels.py", "CUDA device"): "Run it on a machine with an NVIDIA GPU.",
    ("measure/bench/profile.py", "profile more steps"): "Raise --profile-steps.",
    ("measure/bench/spec.py", "no folder with"): "Name a folder with a config.json, or one of the shapes listed.",
    ("measure/bench/spec.py", "has no option"): "Use one of the options listed.",
    (
        "measure/bench/spec.py",
        "OPTION=VALUE",
    ): "Write options after METHOD:RATIO: as OPTION=VALUE, separated by commas.",
    ("measure/demo/process.py", ""): "Read the log that is named; `kvllm doctor MODEL` checks the installation.",
    ("measure/demo/run.py", "no model there"): "Run `make demo`, or `python -m tools.fetch_model smollm2-135m FOLDER`.",
    ("measure/eval/cache_formats.py", "power of two"): "Use another cache precision.",
    ("measure/eval/calibrate.py", ""): "Use another method than triattention for this model.",
    (
        "measure/eval/cli.py",
        "--endpoint:",
    ): "Leave out --methods, --configs and vLLM's flags, and set them on the server.",
    ("measure/eval/engines.py", "does not report `usage`"): "Use a server that reports `usage`, such as `kvllm serve`.",
    ("measure/eval/engines.py", "stock vLLM"): "Leave --ratios out for this configuration.",
    ("measure/eval/problems.py", ": has no"): "Give each line of --data a `problem` and an `answer`.",
    ("measure/eval/recall.py", "needle alone"): "Use larger --distances.",
    ("measure/eval/traces.py", "trace …:"): "Write the file again with `kvllm eval traces`.",
    ("measure/extras.py", "not installed"): PIP,
    ("measure/inspect/run.py", "--trace-id"): "Use one of the ids listed.",
    ("measure/inspect/run.py", "nothing is compressed"): "Use a --retention-ratio below 1.",
    ("measure/inspect/run.py", "has no traces"): "Write the file again with `kvllm eval traces`.",
    ("measure/tune/texts.py", ""): "Give a file with one text per line, in one of the forms listed.",
    ("methods/files.py", ""): "Pass a file of the kind that docs/methods.md describes for this option.",
    ("methods/gates.py", ""): "Pass a safetensors file of gates trained for this model.",
    ("methods/triattention.py", ""): "Run `kvllm eval calibrate` and pass the file it writes.",
    ("options.py", "not valid JSON"): "Quote the JSON for your shell: `'{\"name\": 1}'`.",
    (
        "reference/attention.py",
        "",
    ): "The reference cannot compute this model; measure it through the engine (`kvllm eval accuracy`).",
    ("reference/images.py", ""): "Measure prompts with images through the engine.",
    (
        "reference/replay.py",
        "num_prompt_tokens",
    ): "Correct the trace: a prompt is at least one token, and shorter than its text.",
    ("reference/replay.py", "different texts"): "Compare replays of one trace only.",
    ("reference/request.py", "context length"): "Use shorter texts (--max-tokens), or a model with a longer context.",
    ("reference/request.py", "no KV cache of its own"): STOCK,
    ("reference/rope.py", ""): "Set `--method-options '{\"lookahead\": 0}'`, or use another method.",
    ("support.py", "torchvision"): "Install the torchvision that belongs to this torch, from the same index.",
    ("support.py", ""): STOCK,
}


def template(node: ast.AST) -> str | None:
    """The text of a string expression, with "…" for inserted values; None for any other expression."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(template(part) or "…" for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            first, second = template(left), template(right)
            return None if first is None and second is None else (first or "…") + (second or "…")
        case ast.IfExp(body=body):
            return template(body)
    return None


def called(node: ast.Call) -> str:
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


def constants(tree: ast.Module) -> dict[str, str]:
    """Module-level string constants by name."""
    return {
        node.targets[0].id: text
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and (text := template(node.value))
    }  # fmt: skip


def of_file(path: Path) -> Iterator[Refusal]:
    """The refusals of one file."""
    tree, name = ast.parse(path.read_text()), path.relative_to(SOURCE).as_posix()
    known = constants(tree)

    def words(node: ast.AST) -> str | None:
        return known.get(node.id) if isinstance(node, ast.Name) else template(node)

    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and called(node) in ERRORS and node.args:
            if (message := template(node.args[0])) and message.strip("… :."):
                yield Refusal(name, message)
        elif isinstance(node, ast.FunctionDef) and node.name in RETURNING:
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return) and inner.value and (message := template(inner.value)):
                    yield Refusal(name, message)
        elif name == "support.py" and isinstance(node, ast.Call) and called(node) == "reason" and len(node.args) == 3:
            if (message := words(node.args[2])) and (subject := words(node.args[0])):
                yield Refusal(name, message, subject)
        elif name == "support.py" and isinstance(node, ast.Tuple) and len(node.elts) in (3, 4):
            # (wrong, what, value, why), and (what, value, why) in `model_reasons`
            what, why = words(node.elts[-3]), words(node.elts[-1])
            if what and why and " " in why and re.fullmatch(r"\w+", what):
                yield Refusal(name, why, what)


def refusals() -> list[Refusal]:
    """All distinct refusals, in source order."""
    found = dict.fromkeys(each for path in sorted(SOURCE.rglob("*.py")) for each in of_file(path))
    return [each for each in found if each.subject or not CARRIERS.fullmatch(each.message)]


def remedy(refusal: Refusal) -> str | None:
    """The remedy: the end of the message, or an entry of REMEDIES; None if there is neither."""
    given = [key for key in REMEDIES if key[0] == refusal.path and key[1] in refusal.text]
    match = REMEDY.search(refusal.message)
    if any(part for _, part in given) or (given and not match):
        return REMEDIES[max(given, key=lambda key: len(key[1]))]
    return match[1][:1].upper() + match[1][1:] if match else None


def section_of(refusal: Refusal) -> str:
    fitting = [(len(prefix), title) for title, _, prefixes in SECTIONS for prefix in prefixes
               if refusal.path.startswith(prefix)]  # fmt: skip
    return max(fitting)[1]


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def page() -> str:
    """docs/refusals.md."""
    lines = [
        "<!-- Written by `make reference` from the source. -->",
        "# Every refusal and its remedy",
        "",
        "KvLLM refuses configurations that it is not known to serve correctly, with a one-line message. This page",
        "lists all of these messages; `…` stands for inserted values. Search it for a few words of your message.",
        "For other problems see [Troubleshooting](troubleshooting.md).",
    ]
    found = refusals()
    for title, about, _ in SECTIONS:
        lines += ["", f"## {title}", "", about, "", "| message | what to do |", "| --- | --- |"]
        for refusal in found:
            if section_of(refusal) == title:
                what = remedy(refusal) or ""
                message = refusal.text
                head = message[: len(message) - len(what)].rstrip(" ;:,")
                if message.lower().endswith(what.lower()) and sum(map(str.isalpha, head)) > 12:
                    message = head
                lines.append(f"| {cell(message)} | {cell(what)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
