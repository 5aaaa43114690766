"""``agentmesh doctor``: what this machine and installation can do, in one screen."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import psutil
import typer

from agentmesh.cli.options import Format, FormatOption
from agentmesh.config.mesh import ModelSpec
from agentmesh.record import environment
from agentmesh.sandbox import containment


def doctor(
    model: Annotated[str, typer.Option(help="Load this model and say what KV reuse it supports.")] = "",
    format: FormatOption = Format.TEXT,
) -> None:
    """Show versions, threads, memory, the model cache, the sandbox, and what a model supports."""
    report = _report(model)
    if format is Format.JSON:
        typer.echo(json.dumps(report, indent=2))
        return
    for section, facts in report.items():
        typer.echo(section)
        for name, value in facts.items():
            typer.echo(f"  {name:<24} {value}")


def _report(model: str) -> dict[str, dict[str, Any]]:
    import torch  # noqa: PLC0415  # keeps `agentmesh --help` free of torch

    from agentmesh.engine import embedded  # noqa: PLC0415  # the same

    memory, facts = psutil.virtual_memory(), environment()
    gib = 2**30
    report: dict[str, dict[str, Any]] = {
        "versions": {"python": facts["python"], **facts["versions"]},
        "machine": {
            "cores": f"{psutil.cpu_count(logical=False)} ({os.cpu_count()} logical)",
            "torch threads": torch.get_num_threads(),
            "memory": f"{memory.available / gib:.1f} GiB free of {memory.total / gib:.1f}",
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "no device",
        },
        "models": {name: f"{embedded.state(name)} ({embedded.folder(name)})" for name in embedded.EMBEDDED},
        "sandbox": {
            measure.name: f"{'yes' if measure.active else 'NO'}: {measure.detail}" for measure in containment()
        },
    }
    if model:
        report[f"model {model}"] = _support(model)
    return report


def _support(model: str) -> dict[str, Any]:
    from agentmesh.engine.loading import load  # noqa: PLC0415  # keeps `agentmesh --help` free of torch
    from agentmesh.engine.probe import probe  # noqa: PLC0415  # the same

    loaded = load(ModelSpec(name=model))
    support = probe(loaded.model, loaded.step)
    layers = {label: support.layers.count(label) for label in dict.fromkeys(support.layers)}
    return {
        "source": loaded.source,
        "context": f"{loaded.max_context:,} tokens",
        "KV reuse": support.level.value + (f" (no more, because {support.reason})" if support.reason else ""),
        "decoding": support.decoding(loaded.unrecorded),
        "layers": ", ".join(f"{count} {label}" for label, count in layers.items()),
        "chat template": "yes" if loaded.tokenizer.chat_template else "no (plain paragraphs)",
        "fingerprint": loaded.fingerprint[:16],
    }
