"""Mesh and topology files: what they mean, and what is said, with line and column, when they mean nothing."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmesh import library
from agentmesh.config.load import dump, load_mesh, load_topology, mesh_from_dict, schema
from agentmesh.config.mesh import CustomAgentSpec, LlmAgentSpec, MeshSpec, TopologyUse
from agentmesh.config.yaml import MAX_BYTES, parse, read
from agentmesh.errors import ConfigError, NotFoundError, UsageError

MESHES = sorted(library.shipped("configs").glob("*.yaml"))
TOPOLOGIES = sorted(library.shipped("topologies").glob("*.yaml"))

MESH = """\
version: 1
model: smollm2-135m
topology: {use: chain, agents: 2}
agents:
  agent:
    role: [Solver, Checker]
    prompt: |
      {{ question }}
      {{ inbox }}
communicator: dense
"""

GRAPH = """\
params: {n: 2}
nodes:
  a: {count: $n}
  b: {}
edges:
  - {from: a, to: b}
output: b
"""


@pytest.fixture
def mesh(tmp_path: Path) -> Path:
    path = tmp_path / "mesh.yaml"
    path.write_text(MESH)
    return path


def changed(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new, 1)


# --- YAML ---------------------------------------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)
)
BAD_YAML = {
    "empty": (b"", ":1:1: found an empty file; expected a mapping"),
    "comment only": (b"# nothing\n", "found an empty file"),
    "list at the top": (b"- a\n- b\n", ":1:1: found a list; expected a mapping"),
    "scalar at the top": (b"\nhello\n", ":2:1: found one value; expected a mapping"),
    "duplicate key": (b"a: 1\nb: 2\na: 3\n", ":3:1: found 'a' again; expected each key once (first on line 1)"),
    "tab": (b"a:\n\tb: 1\n", ":2:1: not valid YAML: found character '\\t'"),
    "undefined alias": (b"a: 1\nb: *x\n", ":2:4: found the alias *x; expected '&x' before it"),
    "alias inside itself": (b"a: &a\n  - *a\n", ":2:5: the alias *a stands inside the value it names"),
    "two documents": (b"a: 1\n---\nb: 2\n", ":2:1: found a second document"),
    "latin-1": (b"a: 1\nb: caf\xe9\n", ":2:7: found the byte 0xe9, which is no UTF-8; save the file as UTF-8"),
    "utf-16": ("a: 1\n".encode("utf-16"), ":1:1: found the byte 0xff"),
    "NUL": (b"a: 1\nb: x\x00y\n", ":2:5: found the character '\\x00'"),
    "escaped NUL": (b'a: "x\\0y"\n', ":1:4: found an escape for NUL"),
    "half a character": (b'a: "\\ud800"\n', ":1:4: found an escape for NUL or for half a character"),
    "escape beyond Unicode": (b'a: 1\nb: "\\UFFFFFFFF"\n', "not valid YAML near here"),
    "alias bomb": (BOMB.encode(), "the aliases unfold to more than"),
    "deep flow": (b"a: " + b"[" * 100_000, "found more than 64 levels"),
    "deep block": ("\n".join(" " * i + "a:" for i in range(200)).encode(), ":65:65: found more than 64 levels"),
    "unclosed quote": (b"a: 1\nb: 'x\n", ":3:1: not valid YAML: found unexpected end of stream"),
    "unclosed bracket": (b"a: [1, 2\nb: 3\n", ":2:2: not valid YAML: expected ',' or ']'"),
    "bracket open to the end": (b"a: 1\nb: [1, 2\n", ":3:1: not valid YAML: expected ',' or ']'"),
    "colon in text": (b"a: b: c\n", ":1:5: not valid YAML: mapping values are not allowed here"),
    "bad start": (b"a: @x\n", ":1:4: not valid YAML: found character '@'"),
    "bad indentation": (b"a: 1\n b: 2\n", ":2:3: not valid YAML"),
    "number as key": (b"a: {1: x}\n", ":1:5: found the key 1; expected text: put it in quotes"),
    "template as value": (b"a: {{ question }}\n", ":1:5: found a mapping or list as a key"),
    "merge key": (b"a: &a {x: 1}\nb: {<<: *a}\n", ":2:5: found the merge key <<"),
    "tag": (b"a: !!python/object:os.system x\n", ":1:4: found the tag !!python/object:os.system"),
    "endless number": (b"a: " + b"9" * 10_000, ":1:4: found a number of 10000 digits"),
    "too large": (b"#" * (MAX_BYTES + 1), f"larger than {MAX_BYTES} bytes"),
}


@pytest.mark.parametrize(("data", "fragment"), BAD_YAML.values(), ids=BAD_YAML)
def test_yaml_that_cannot_be_read_says_where_and_why(data: bytes, fragment: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(data)

    with pytest.raises(ConfigError) as caught:
        read(path)

    assert str(caught.value).startswith(str(path))
    assert fragment in str(caught.value)


def test_a_missing_file_a_folder_and_a_pipe_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        read(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="found a folder"):
        read(tmp_path)
    with pytest.raises(ConfigError, match="found a device or pipe"):
        read(Path("/dev/null"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("NO", "NO"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("0o17", 15),
        ("0x1F", 31),
        ("017", 17),
        ("-3", -3),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("~", None),
        ("True", True),
        ("'1'", "1"),
        ("!!str 1", "1"),
        ("|\n  two\n  lines\n", "two\nlines\n"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    found = parse(f"a: {text}", "x").root.value["a"]

    assert (type(found), found) == (type(value), value)


def test_every_key_and_value_has_a_position() -> None:
    document = parse("a: 1\nb:\n  - x\n  - {c: é, d: 2}\ne:\nf: &f [1]\ng: *f\n", "x")

    assert document.locate(("b",)) == (3, 3)
    assert document.locate(("b",), at_key=True) == (2, 1)
    assert document.locate(("b", 1, "d")) == (4, 15)
    assert document.locate(("b", 1, "d"), at_key=True) == (4, 12)
    assert document.locate(("e",)) == (5, 1)
    assert document.locate(("g", 0)) == (6, 8)
    assert document.locate(("b", 1, "nowhere", "below")) == (4, 5)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=":-[]{}&*!|>'\"%@#,? \n\tab0<é\u2028", max_size=24))
def test_any_text_is_read_or_refused_with_a_position(text: str) -> None:
    found = ""
    try:
        parse(text, "x")
    except ConfigError as error:
        found = str(error)

    assert not found or re.match(r"x:\d+:\d+: ", found)


# --- meshes and topologies ----------------------------------------------------------------------------------------

BAD_MESH = {
    "unknown key": ("communicator:", "comunicator:", ":10:1: comunicator: unknown key; expected one of: about, agents"),
    "close key": ("communicator:", "comunicator:", "Did you mean 'communicator'?"),
    "unknown agent key": ("prompt: |", "promt: |", ":7:5: agents.agent.promt: unknown key; expected one of: generate"),
    "missing agent key": ("prompt: |", "promt: |", ":5:3: agents.agent: missing key 'prompt'"),
    "missing top key": ("version: 1\n", "", ":1:1: missing key 'version'"),
    "wrong version": ("version: 1", "version: 2", ":1:10: version: found 2; expected 1"),
    "model of a wrong type": ("smollm2-135m", "[a]", ":2:8: model: found a list; expected a name, or a mapping with"),
    "text for a number": (
        "dense",
        "dense\nrun: {retry: many}",
        ":11:14: run.retry: found 'many'; expected a whole number",
    ),
    "quoted number": ("dense", "dense\nrun: {seed: '1'}", ":11:13: run.seed: found '1'; expected a whole number"),
    "boolean for a number": ("dense", "dense\nrun: {seed: true}", "run.seed: found true; expected a whole number"),
    "number for text": (
        "version: 1",
        "version: 1\nname: 5",
        ':2:7: name: found 5; expected text. Put it in quotes: "5"',
    ),
    "nothing for text": ("version: 1", "version: 1\nname:", ":2:1: name: found nothing; expected text"),
    "bound": (
        "    role",
        "    generate: {top_p: 2}\n    role",
        "agents.agent.generate.top_p: found 2; expected at most 1",
    ),
    "not a number": ("    role", "    generate: {temperature: .nan}\n    role", ":6:29: agents.agent.generate.temp"),
    "enum": ("    role", "    memory: conversaton\n    role", ":6:13: agents.agent.memory: found 'conversaton'"),
    "close enum": ("    role", "    memory: conversaton\n    role", "Did you mean 'conversation'?"),
    "kind": (
        "    role",
        "    kind: lmm\n    role",
        ":6:11: agents.agent.kind: found 'lmm'; expected one of: llm, python",
    ),
    "union": ("[Solver, Checker]", "3", ":6:11: agents.agent.role: found 3; expected text or a list"),
    "inside a union": ("Checker", "3", ":6:20: agents.agent.role.1: found 3; expected text"),
    "literal in a union": (
        "dense",
        "dense\nrun: {concurrency: atuo}",
        "expected a whole number or 'auto'. Did you mean",
    ),
    "size": ("dense", "{budget: lots}", ":10:24: communicator.budget: expected a size such as 512MiB or 2GB"),
    "endless size": ("dense", f"{{budget: '{'9' * 400}'}}", "communicator.budget: expected a size"),
    "duration": ("    role", "    timeout: 3 weeks\n    role", ":6:14: agents.agent.timeout: expected a duration"),
    "agent is nothing": ("  agent:\n", "  other:\n  agent:\n", ":5:3: agents.other: found nothing; expected a mapping"),
    "input name": ("dense", "dense\ninputs: [a b]", ":11:10: inputs.0: found 'a b'; expected a variable name"),
    "unknown parameter": (
        "agents: 2}",
        "agnts: 2}",
        ":3:24: topology.agnts: unknown parameter; the topology has: agents",
    ),
    "parameter's type": ("agents: 2}", "agents: x}", ":3:32: topology.agents: found 'x'; expected a whole number"),
    "parameter is a list": ("agents: 2}", "agents: [2]}", ":3:32: topology.agents: found a list; expected"),
    "topology without a name": ("use: chain, ", "", ":3:1: topology: missing key 'use'"),
}


@pytest.mark.parametrize(("old", "new", "fragment"), BAD_MESH.values(), ids=BAD_MESH)
def test_a_bad_mesh_says_where_what_was_found_and_what_was_expected(
    old: str, new: str, fragment: str, tmp_path: Path
) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(changed(MESH, old, new))

    with pytest.raises(ConfigError) as caught:
        load_mesh(path)

    assert str(caught.value).startswith(f"{path}:")
    assert fragment in str(caught.value)


BAD_GRAPH = {
    "no edges' end": ("{from: a, to: b}", "{from: a}", ":6:5: edges.0: missing key 'to'"),
    "python name of a key": ("{from: a", "{source: a", ":6:6: edges.0.source: unknown key; expected one of: branching"),
    "pattern": ("to: b}", "to: b, pattern: ringg}", ":6:31: edges.0.pattern: found 'ringg'; expected 'chain'"),
    "reference": ("$n", "n", ":3:14: nodes.a.count: found 'n'; expected a whole number or $name of a parameter"),
    "negative": ("$n", "-1", ":3:14: nodes.a.count: found -1; expected at least 0"),
    "boolean": ("$n", "true", "nodes.a.count: found true; expected a whole number or $name of a parameter"),
    "group name": ("  b: {}", "  9b: {}", ":4:3: nodes.9b: found the key '9b'; expected a name of letters"),
    "condition": ("to: b}", "to: b, if: {pyton: x}}", ":6:27: edges.0.if.pyton: unknown key; expected one of: python"),
    "condition's type": (
        "to: b}",
        "to: b, if: 3}",
        "edges.0.if: found 3; expected text or a mapping with the keys: python",
    ),
    "parameter": ("{n: 2}", "{n: [2]}", ":1:13: params.n: found a list; expected"),
}


@pytest.mark.parametrize(("old", "new", "fragment"), BAD_GRAPH.values(), ids=BAD_GRAPH)
def test_a_bad_topology_says_the_same(old: str, new: str, fragment: str, tmp_path: Path) -> None:
    path = tmp_path / "graph.yaml"
    path.write_text(changed(GRAPH, old, new))

    with pytest.raises(ConfigError) as caught:
        load_topology(str(path))

    assert fragment in str(caught.value)


def test_all_mistakes_come_at_once_in_file_order_the_first_five_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    agents = "".join(f"  a{i}: {{prompt: {i}}}\n" for i in range(60))
    path.write_text(f"version: 1\ntopology: chain\nagents:\n{agents}modle: x\n")

    with pytest.raises(ConfigError) as caught:
        load_mesh(path)

    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{path}:4:16: agents.a0.prompt: found 0; expected text")
    assert lines[1:3] == ["  " + "  a0: {prompt: 0}", "  " + " " * 15 + "^"]
    assert len([line for line in lines if line.endswith("^")]) == 5
    assert lines[-1] == "… and 11 more"


def test_no_control_character_of_a_file_reaches_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(changed(MESH, "communicator:", '"\\e[2J": 1\ncommunicator:'))
    with pytest.raises(ConfigError) as caught:
        load_mesh(path)
    assert "\x1b" not in str(caught.value)

    path.write_text(changed(MESH, "dense", "\x1b[2J"))
    with pytest.raises(ConfigError, match=r":10:15: found the character '\\x1b'") as caught:
        load_mesh(path)
    assert "\x1b" not in str(caught.value)


def test_a_key_named_like_a_union_branch_stays_in_the_path(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text("version: 1\ntopology: chain\nagents:\n  llm: {prompt: x, llm: 3}\n  custom: {python: 4}\n")

    with pytest.raises(ConfigError) as caught:
        load_mesh(path)

    assert ":4:20: agents.llm.llm: unknown key" in str(caught.value)
    assert ":5:20: agents.custom.python: found 4; expected text" in str(caught.value)


def test_an_inline_topology_is_told_from_a_used_one(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(changed(MESH, "{use: chain, agents: 2}", "{nodes: {agent: {}}, outputs: agent}"))

    with pytest.raises(ConfigError, match=r":3:32: topology\.outputs: unknown key.*Did you mean 'output'"):
        load_mesh(path)


def test_a_topology_path_is_relative_to_the_mesh_and_its_mistakes_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "graph.yaml").write_text(changed(GRAPH, "output: b", "output: b b"))
    path = tmp_path / "mesh.yaml"
    path.write_text(changed(MESH, "{use: chain, agents: 2}", "graph.yaml"))

    with pytest.raises(ConfigError, match=r"graph.yaml:7:9: output: found 'b b'"):
        load_mesh(path)

    (tmp_path / "graph.yaml").write_text(GRAPH)
    loaded = load_mesh(path)
    assert (loaded.topology_name, loaded.topology.output, loaded.path) == ("graph", "b", path)


def test_an_unknown_mesh_or_topology_lists_the_known_ones(mesh: Path) -> None:
    mesh.write_text(changed(MESH, "chain", "chian"))

    with pytest.raises(NotFoundError, match="Did you mean 'chain'"):
        load_mesh(mesh)
    with pytest.raises(NotFoundError, match="Did you mean 'demo'"):
        load_mesh("demoo")


def test_a_mesh_from_python_names_the_key_path() -> None:
    with pytest.raises(ConfigError) as caught:
        mesh_from_dict({"version": 1, "topology": "chain", "agents": {"a": {"promt": "x"}}})

    assert "agents.a.promt: unknown key" in str(caught.value)
    assert mesh_from_dict(parse(MESH, "x").root.value).position(("agents", "agent")) == "agents.agent"


def test_vote_patterns_are_compiled_when_the_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    for pattern, words in (("(a", "expected a regular expression, found"), ("a", "with one group, found 0")):
        path.write_text(changed(MESH, "  agent:\n", f"  v: {{kind: vote, extract: {pattern!r}}}\n  agent:\n"))
        with pytest.raises(ConfigError, match=rf":5:28: agents.v.extract: .*{words}"):
            load_mesh(path)


# --- overrides ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("agents.agent.generate.max_tokens=32", ("agents", "agent", "generate", "max_tokens"), 32),
        ("topology.agents=3", ("topology", "agents"), 3),
        ("agents.agent.role.0=X", ("agents", "agent", "role"), ("X", "Checker")),
        ("communicator.min_tokens=7", ("communicator", "min_tokens"), 7),
        ("communicator.preset=prefix", ("communicator", "preset"), "prefix"),
        ("communicator=prefix", ("communicator", "preset"), "prefix"),
        ("model.dtype=float16", ("model", "dtype"), "float16"),
        ("topology=single", ("topology", "use"), "single"),
        ("agents.agent.generate={max_tokens: 4, stop: [a]}", ("agents", "agent", "generate", "stop"), ("a",)),
        ("agents.agent.system='5'", ("agents", "agent", "system"), "5"),
        ("agents.agent.prompt={{ question }}: go", ("agents", "agent", "prompt"), "{{ question }}: go"),
        ("name=a: b", ("name",), "a: b"),
        ("name=a=b", ("name",), "a=b"),
    ],
)
def test_set_changes_one_value(override: str, path: tuple[str, ...], value: Any, mesh: Path) -> None:
    found: Any = load_mesh(mesh, overrides=[override]).spec
    for part in path:
        found = found[part] if isinstance(found, dict) else getattr(found, part)

    assert found == value


def test_set_reaches_a_node_whose_name_has_a_dot_and_leaves_aliased_values_alone(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    entries = "  agent: &a {prompt: x, generate: {max_tokens: 5}}\n  agent.2: *a\n"
    path.write_text(f"version: 1\ntopology: chain\nagents:\n{entries}")

    agents = load_mesh(path, overrides=["agents.agent.2.generate.max_tokens=9"]).spec.agents

    assert isinstance(agents["agent"], LlmAgentSpec)
    assert isinstance(agents["agent.2"], LlmAgentSpec)
    assert (agents["agent"].generate.max_tokens, agents["agent.2"].generate.max_tokens) == (5, 9)


BAD_SETS = {
    "no value": ("agents", "--set agents: expected path=value, such as"),
    "empty part": ("agents..x=1", "expected path=value"),
    "unknown key": ("agents.agent.promt=x", "--set agents.agent.promt=x: agents.agent.promt: unknown key"),
    "wrong type": ("run.seed=x", "--set run.seed=x: run.seed: found 'x'; expected a whole number"),
    "unknown agent": (
        "agents.agnt.generate.max_tokens=3",
        "agents.agnt: missing key 'prompt'; add it here (the file has no agents.agnt. Did you mean 'agent'?)",
    ),
    "parameter": ("topology.agnts=1", "--set topology.agnts=1: topology.agnts: unknown parameter"),
    "below text": ("agents.agent.prompt.x=1", "agents.agent.prompt is '{{ question }}"),
    "no such place": ("agents.agent.role.2=X", "found '2'; expected a position in agents.agent.role, which has 2"),
    "no place": ("agents.agent.role.first=X", "found 'first'; expected a position"),
    "flow": ("agents.agent.generate={max_tokens: 3", "--set agents.agent.generate:1:15: not valid YAML"),
    "endless number": ("run.seed=" + "9" * 5000, "found a number of 5000 digits"),
    "bytes": ("name=\udce9", "found bytes that are no UTF-8"),
}


@pytest.mark.parametrize(("override", "fragment"), BAD_SETS.values(), ids=BAD_SETS)
def test_a_bad_set_is_shown_as_typed(override: str, fragment: str, mesh: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_mesh(mesh, overrides=[override])

    assert str(caught.value).startswith("--set ")
    assert fragment in str(caught.value)


def test_positions_tell_the_file_from_what_was_set(mesh: Path) -> None:
    loaded = load_mesh(mesh, overrides=["agents.agent.role.0=X", "agents.other.prompt=x"])

    assert loaded.position(("agents", "agent", "prompt")) == f"{mesh}:7:13: agents.agent.prompt"
    assert loaded.position(("agents", "agent"), at_key=True) == f"{mesh}:5:3: agents.agent"
    assert loaded.position(("agents", "agent", "role", 0)) == "--set agents.agent.role.0=X: agents.agent.role.0"
    assert loaded.position(("agents", "other")) == "--set agents.other.prompt=x: agents.other"
    assert loaded.position(("agents", "agent", "role", 1)) == f"{mesh}:6:20: agents.agent.role.1"


# --- the shelves, the schema, writing -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", MESHES, ids=lambda path: path.stem)
def test_every_shipped_mesh_loads_fits_the_schema_and_survives_writing(path: Path) -> None:
    loaded = load_mesh(path)
    written = dump(loaded.spec)

    jsonschema.validate(read(path).root.value, schema())
    assert MeshSpec.model_validate(parse(written, "x").root.value) == loaded.spec
    jsonschema.validate(parse(written, "x").root.value, schema())


@pytest.mark.parametrize("path", TOPOLOGIES, ids=lambda path: path.stem)
def test_every_shipped_topology_loads_fits_the_schema_and_survives_writing(path: Path, tmp_path: Path) -> None:
    spec, name = load_topology(path.stem)
    (tmp_path / "again.yaml").write_text(dump(spec))

    jsonschema.validate(read(path).root.value, schema("topology"))
    assert name == path.stem
    assert load_topology(str(tmp_path / "again.yaml"))[0] == spec


def test_the_schema_is_a_schema_with_words_for_editors() -> None:
    for kind in ("mesh", "topology"):
        found = schema(kind)
        jsonschema.Draft202012Validator.check_schema(found)
        assert found["title"] == f"agentmesh {kind} file"
        assert found["description"]
        assert found["additionalProperties"] is False
    edge = schema("topology")["$defs"]["EdgeSpec"]["properties"]
    assert {"from", "to", "if"} <= edge.keys()
    assert "source" not in edge


def test_the_schema_knows_the_shorthands_and_refuses_what_the_models_refuse() -> None:
    plain = parse(MESH, "x").root.value
    good = [
        {"topology": "chain", "model": "x", "communicator": "dense"},
        {"communicator": {"budget": "1GiB"}, "run": {"timeout": "500ms"}},
        {"topology": {"nodes": {"agent": {}}, "output": "agent"}},
        {"agents": {"agent": {"python": "a.b:C", "options": {"x": [1]}}}},
    ]
    bad = [
        {"modle": "x"},
        {"topology": {"use": "chain", "agents": [1]}},
        {"agents": {"agent": {"promt": "x"}}},
        {"communicator": {"budget": "lots"}},
        {"model": 3},
    ]
    for change in good:
        jsonschema.validate(plain | change, schema())
        mesh_from_dict(plain | change)
    for change in bad:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(plain | change, schema())
        with pytest.raises(UsageError):
            mesh_from_dict(plain | change)


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30) | st.sampled_from(
    [
        "yes",
        "null",
        "1e3",
        "0o7",
        " a\nb",
        "a\n\n",
        "a\nb \n",
        "a\n b",
        "x\r\ny",
        "---\na",
        "- a\n#b",
        "{{ x }}\n",
        "\n",
    ]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | texts,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(texts.filter(lambda key: key != "<<"), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    prompt=texts, roles=st.lists(texts, max_size=3), options=st.dictionaries(st.just("x"), values), n=st.floats(0, 9)
)
def test_what_is_written_reads_back_equal(prompt: str, roles: list[str], options: dict[str, Any], n: float) -> None:
    agents = {
        "a": LlmAgentSpec(prompt=prompt, role=tuple(roles), timeout=n),
        "b.1": CustomAgentSpec(python="m:f", options=options, system=prompt),
    }
    spec = MeshSpec(
        version=1, topology=TopologyUse.model_validate({"use": "chain", "agents": 2, "p": n}), agents=agents
    )

    written = dump(spec)
    again = MeshSpec.model_validate(parse(written, "x").root.value)

    assert again == spec
    assert dump(again) == written


def test_reading_files_needs_no_torch() -> None:
    code = "import agentmesh.config.load, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
