"""A mesh file as a whole: what does not fit together is refused with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentmesh.blueprint import draft
from agentmesh.config.load import load_mesh
from agentmesh.errors import ConfigError, NotFoundError, UsageError

GOOD = """version: 1
topology: chain
agents:
  agent: {prompt: "{{ question }}"}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mesh.yaml"
    path.write_text(text)
    return path


MISTAKES = {
    "unknown topology": ("topology: chian", NotFoundError, "no topology named 'chian'.*Did you mean 'chain'"),
    "unknown parameter": ("topology: {use: chain, agent: 3}", ConfigError, ":2:24: topology.agent"),
    "cycle": (
        "topology: {nodes: {agent: {count: 2}}, edges: [{from: agent, to: agent, pattern: ring}], output: agent}",
        UsageError,
        r":2:11: topology: .*agent\.1 → agent\.2 → agent\.1",
    ),
    "unknown node": (
        "topology: {nodes: {agent: {}}, edges: [{from: agent, to: agnt}], output: agent}",
        UsageError,
        "'agnt' is no group or node",
    ),
    "agent for nobody": ("topology: single", ConfigError, ":4:3: agents.agent: no group or node of that name"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mesh_that_does_not_fit_together_is_refused(tmp_path: Path, kind: str) -> None:
    line, error, message = MISTAKES[kind]
    path = write(tmp_path, GOOD.replace("topology: chain", line))

    with pytest.raises(error, match=message):
        draft(load_mesh(path))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("{{ questoin }}", "Did you mean 'question'"),
        ("{% if %}", "line 1 of the template"),
        (" ", "the prompt is empty"),
    ],
)
def test_template_mistakes_carry_the_place_of_the_template(tmp_path: Path, changed: str, message: str) -> None:
    path = write(tmp_path, GOOD.replace("{{ question }}", changed))

    with pytest.raises(ConfigError, match=rf":4:19: agents\.agent\.prompt: .*{message}"):
        draft(load_mesh(path))


def test_an_edge_that_insists_on_kv_is_refused_where_messages_are_not_shared(tmp_path: Path) -> None:
    edge = "{from: agent, to: agent, pattern: chain, deliver: kv}"
    line = f"topology: {{nodes: {{agent: {{count: 2}}}}, output: agent, edges: [{edge}]}}"

    with pytest.raises(ConfigError, match=r"agent\.1 → agent\.2 says `deliver: kv`"):
        draft(load_mesh(write(tmp_path, GOOD.replace("topology: chain", line))))
