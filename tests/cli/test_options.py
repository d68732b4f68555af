from __future__ import annotations

import pytest
import typer
from typer.core import TyperOption

from kvllm.cli.options import set_panels
from kvllm.measure.bench import cli as bench
from kvllm.measure.eval import cli as evaluation


def test_panels_group_the_options_of_all_commands_in_order():
    app = typer.Typer()

    @app.command()
    def measure(model: str, json_file: str = "", ratio: float = 0.3, seed: int = 0) -> None: ...

    set_panels(app, {"Output": ["json_file"], "For experts": ["seed"]})
    panels = {p.name: getattr(p, "rich_help_panel", None) for p in typer.main.get_command(app).params}
    shown = [name for name in panels if name in ("model", "ratio", "json_file", "seed")]
    assert shown == ["model", "ratio", "json_file", "seed"]
    assert [panels[name] for name in shown] == [None, None, "Output", "For experts"]


@pytest.mark.parametrize("app, everyday", [(bench.app, "concurrency"), (evaluation.app, "traces")])
def test_everyday_options_of_measurements_are_apart_from_the_experts(app, everyday):
    commands = typer.main.get_group(app).commands.values()
    options = [p for command in commands for p in command.params if isinstance(p, TyperOption)]
    panels = {p.name: p.rich_help_panel for p in options}
    assert panels[everyday] is None
    assert {"Output", "For experts"} < set(panels.values())
    assert panels["json_file"] == "Output" and panels["seed"] == "For experts"
