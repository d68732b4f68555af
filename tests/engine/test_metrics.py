"""A scheduler's report reaches Prometheus exactly once, whichever API servers receive it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from kvllm.compression.stopwatch import Stopwatch
from kvllm.engine.metrics import COUNTERS, GAUGES, KvStatLogger, Report, add_report, take_report
from kvllm.engine.stats import add_seconds, take_seconds

CONFIG: Any = SimpleNamespace(model_config=SimpleNamespace(served_model_name="m"))


def values(**given: float) -> dict[str, float]:
    return dict.fromkeys((*COUNTERS, *GAUGES), 0.0) | given


def stats_with(report: dict[str, float], **others: Any) -> SchedulerStats:
    stats = SchedulerStats(ec_connector_stats=others or None)
    add_report(stats, report)
    return stats


def sample(name: str, engine: int, registry: CollectorRegistry = REGISTRY) -> float | None:
    return registry.get_sample_value(name, {"model_name": "m", "engine": str(engine)})


def test_a_report_has_what_was_added_since_the_last_one() -> None:
    report = Report()
    first = report.next(values(windows_compressed=3, kv_tokens_logical=50))
    second = report.next(values(windows_compressed=5, kv_tokens_logical=40))
    assert (first["windows_compressed"], first["kv_tokens_logical"]) == (3, 50)
    assert (second["windows_compressed"], second["kv_tokens_logical"]) == (2, 40)
    assert "kv_tokens_kept" not in second, "a counter that stands still is not sent"


def test_a_report_reaches_the_front_end_intact_and_is_removed_there() -> None:
    stats = stats_with({"windows_compressed": 2, "compression_seconds": 0.5}, encoder={"hits": 1})
    sent = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    received = MsgpackDecoder(EngineCoreOutputs).decode(sent).scheduler_stats
    assert take_report(received) == {"windows_compressed": 2, "compression_seconds": 0.5}
    assert received.ec_connector_stats == {"encoder": {"hits": 1}}
    assert take_report(received) is None
    alone = stats_with({})
    assert take_report(alone) == {} and alone.ec_connector_stats is None


def test_engines_have_labels_and_a_new_logger_replaces_the_old() -> None:
    for _ in range(2):
        logger = KvStatLogger(CONFIG, [0, 1])
        assert sample("kvllm:windows_compressed_total", 0) == 0
        logger.record(stats_with({"windows_compressed": 4, "kv_tokens_physical": 7}), None, engine_idx=1)
        logger.record(stats_with({"windows_compressed": 1, "kv_tokens_physical": 6}), None, engine_idx=1)
        logger.record(SchedulerStats(), None)
        logger.record(None, None)
    assert sample("kvllm:windows_compressed_total", 1) == 5 and sample("kvllm:windows_compressed_total", 0) == 0
    assert sample("kvllm:kv_tokens_physical", 1) == 6


API_SERVER = """
from kvllm.engine.metrics import KvStatLogger
from tests.engine.test_metrics import CONFIG, stats_with
KvStatLogger(CONFIG, [0]).record(stats_with({{"windows_compressed": {windows}, "query_bank_rows_used": {rows}}}), None)
"""


def test_two_api_servers_add_up(tmp_path: Path) -> None:
    """Counters are summed over both; gauges come from the newest report."""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for windows, rows in ((3, 9), (4, 2)):
        script = API_SERVER.format(windows=windows, rows=rows)
        subprocess.run([sys.executable, "-c", script], env=environment, check=True, cwd=Path(__file__).parents[2])
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    text = generate_latest(registry).decode()
    assert 'kvllm:windows_compressed_total{engine="0",model_name="m"} 7.0' in text
    assert 'kvllm:query_bank_rows_used{engine="0",model_name="m"} 2.0' in text


@pytest.mark.parametrize("runner_of", [
    lambda state: SimpleNamespace(kv_compressor=SimpleNamespace(state=state)),
    lambda state: SimpleNamespace(model_state=SimpleNamespace(compression=state)),
], ids=["V1", "V2"])  # fmt: skip
def test_compression_time_is_sent_with_the_output_of_a_step(runner_of: Any) -> None:
    watch = Stopwatch("cpu")
    worker = SimpleNamespace(model_runner=runner_of(SimpleNamespace(stopwatch=watch)))
    with watch.running():
        pass
    inner = ModelRunnerOutput([], {})
    add_seconds(worker, EMPTY_MODEL_RUNNER_OUTPUT)
    add_seconds(worker, SimpleNamespace(model_runner_output=inner))  # still to be copied to the host
    assert take_seconds(inner) > 0 and take_seconds(EMPTY_MODEL_RUNNER_OUTPUT) == 0
    later = ModelRunnerOutput([], {})
    add_seconds(worker, later)
    assert take_seconds(later) == 0


def test_documents_and_dashboard_name_every_metric_and_no_other() -> None:
    known = {f"kvllm:{name}_total" for name in COUNTERS} | {f"kvllm:{name}" for name in GAUGES}
    docs = Path(__file__).parents[2] / "docs"
    assert set(re.findall(r"`(kvllm:\w+)`", (docs / "operating.md").read_text())) == known
    shown = set(re.findall(r"kvllm:\w+", (docs / "grafana.json").read_text()))
    assert shown <= known and known - shown == {"kvllm:effective_retention"}  # the dashboard divides sums instead


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool, which comes with Prometheus")
def test_the_queries_of_the_dashboard_are_valid(tmp_path: Path) -> None:
    dashboard = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(queries) > 15
    values = {"$model": "m", "$engine": ".*", "$__rate_interval": "30s"}
    for name, value in values.items():
        queries = [query.replace(name, value) for query in queries]
    rules = [{"record": f"query:{i}", "expr": query} for i, query in enumerate(queries)]
    file = tmp_path / "rules.json"  # JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    checked = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True)
    assert checked.returncode == 0 and f"{len(queries)} rules found" in checked.stdout, checked.stderr
