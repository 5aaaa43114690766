"""A mesh, checked and complete, before any model is loaded: nodes, their roles, templates and edges."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from agentmesh.agents.base import Agent
from agentmesh.config.load import LoadedMesh
from agentmesh.config.mesh import (
    AgentBase,
    CustomAgentSpec,
    LlmAgentSpec,
    ModelSpec,
    Order,
    PythonAgentSpec,
    Reads,
    RemoteModelSpec,
    RetrieverAgentSpec,
    RunSpec,
)
from agentmesh.config.presets import PRESETS, CommunicatorSpec, Share, choices
from agentmesh.config.topology import Deliver
from agentmesh.errors import ConfigError, InputError, TemplateError, TopologyError, did_you_mean, listing
from agentmesh.prompt import RoleTemplate
from agentmesh.prompt.templates import SCOPE_NAMES
from agentmesh.topology import Topology

PRESET_NAMES = tuple(PRESETS)


@dataclass(frozen=True)
class Member:
    """One node's agent: its specification, or an object of the user's, and the role dealt to it."""

    node: str
    role: str
    spec: AgentBase | None = None
    agent: Agent | None = None

    @property
    def is_judge(self) -> bool:
        """Whether its role or name says so."""
        return "judge" in f"{self.role} {self.node}".lower()

    @property
    def reads_exactly(self) -> bool:
        """Whether it reads exact KV only: as its entry says, else if it is a judge (docs/method.md, 6.2)."""
        said = self.spec.reads if isinstance(self.spec, LlmAgentSpec) else None
        return said is Reads.EXACT or (said is None and self.is_judge)

    @property
    def remote(self) -> RemoteModelSpec | None:
        """The remote model that its entry names, instead of the mesh's."""
        return self.spec.model if isinstance(self.spec, LlmAgentSpec | CustomAgentSpec) else None


@dataclass(frozen=True)
class Blueprint:
    """Everything a run needs but the model.

    Args:
        name: the mesh's name.
        topology: its graph.
        members: node → agent.
        inputs: names of the inputs that agents read.
        defaults: texts of inputs that a run does not give.
        model: which model writes for agents that name none of their own.
        communicator: how KV is reused.
        run: retries, time limits, seed.
        folder: where relative paths in the mesh begin.
    """

    name: str
    topology: Topology
    members: Mapping[str, Member]
    inputs: tuple[str, ...]
    defaults: Mapping[str, str] = field(default_factory=dict)
    model: ModelSpec | RemoteModelSpec = field(default_factory=ModelSpec)
    communicator: CommunicatorSpec = field(default_factory=CommunicatorSpec)
    run: RunSpec = field(default_factory=RunSpec)
    folder: Path = Path()

    @property
    def main_input(self) -> str:
        """The input that a bare question goes to: ``question``, or the first one where there is none of that name."""
        return "question" if "question" in self.inputs else self.inputs[0]

    @property
    def realigners(self) -> Path | None:
        """The file with what the mesh's realigners have learned before, if it names one."""
        named = self.communicator.realigners
        return None if named is None else self.folder / Path(named).expanduser()

    def local_model(self) -> ModelSpec:
        """The model, for what only a model of this machine can do.

        Raises:
            InputError: it is a remote one.
        """
        if isinstance(self.model, RemoteModelSpec):
            raise InputError(
                f"mesh {self.name}: its model {self.model.name} is at {self.model.remote} and takes text only, but "
                "this needs a model of this machine, whose KV can be moved and measured; name one under `model:`"
            )
        return self.model

    def remote_of(self, node: str) -> RemoteModelSpec | None:
        """The remote model that writes for a node; ``None`` where a model of this machine does."""
        return self.members[node].remote or (self.model if isinstance(self.model, RemoteModelSpec) else None)

    @property
    def digests(self) -> dict[str, str]:
        """Agent → digest of its role and texts, for everybody whose prompts a mesh file describes."""
        found = {}
        for node, member in self.members.items():
            if isinstance(member.spec, LlmAgentSpec):
                text = f"{member.role}\0{member.spec.system}\0{member.spec.prompt}"
                found[node] = hashlib.sha256(text.encode()).hexdigest()
        return found

    def all_inputs(self, given: Mapping[str, str]) -> dict[str, str]:
        """A run's inputs, completed with the defaults.

        Raises:
            InputError: one is missing, unknown, empty or not text.
        """
        for name in given:
            if name not in self.inputs:
                hint = did_you_mean(name, self.inputs)
                raise InputError(f"no input {name!r}; this mesh reads {listing(self.inputs)}.{hint}")
        found = {**self.defaults, **given}
        for name in self.inputs:
            text = found.get(name)
            if text is None:
                raise InputError(f"input {name!r} is missing; give it with -i {name}=… (or @FILE to read a file)")
            if not text.strip():
                raise InputError(f"input {name!r} is empty; give it some text")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise InputError(f"input {name!r} holds bytes that are not UTF-8; save it as UTF-8")
        return found


def draft(loaded: LoadedMesh, graph: Topology | None = None, objects: Mapping[str, Agent] | None = None) -> Blueprint:
    """Check a mesh as a whole: graph, agents, roles, templates, preset.

    Args:
        loaded: the mesh.
        graph: a topology built in Python, instead of the one the mesh names.
        objects: group or node → an agent that takes the place of what the mesh says.

    Raises:
        ConfigError: a mistake, with its position.
        TopologyError: the graph cannot be scheduled.
    """
    spec, topology = loaded.spec, graph or _topology(loaded)
    if spec.communicator.preset not in PRESET_NAMES:
        raise ConfigError(
            f"{loaded.position(('communicator',))}: no preset named {spec.communicator.preset!r}; there are "
            f"{listing(PRESET_NAMES)}.{did_you_mean(spec.communicator.preset, PRESET_NAMES)}"
        )
    try:
        choice = choices(spec.communicator)
    except ValueError as error:
        raise ConfigError(f"{loaded.position(('communicator',))}: {error}") from error
    if spec.communicator.strict and choice.share is not Share.SLOTS:
        raise ConfigError(
            f"{loaded.position(('communicator',))}: `strict` fails where what an earlier agent has read or written is "
            f"computed, but preset {spec.communicator.preset!r} shares none of it; use one that does, such as `linear`"
        )
    kept_apart = [edge for edge in topology.edges if edge.deliver is Deliver.KV]
    if kept_apart and choice.share is not Share.SLOTS:
        edge = kept_apart[0]
        raise ConfigError(
            f"{loaded.position(('communicator',))}: edge {edge.source} → {edge.target} says `deliver: kv`, but preset "
            f"{spec.communicator.preset!r} shares no messages as KV; use `deliver: auto`"
        )
    reserved = sorted(set(spec.inputs) & set(SCOPE_NAMES))
    if reserved:
        raise ConfigError(f"{loaded.position(('inputs',))}: {listing(reserved)} has a meaning of its own in templates")
    for name in spec.defaults:
        if name not in spec.inputs:
            raise ConfigError(
                f"{loaded.position(('defaults', name))}: no input {name!r}; this mesh reads {listing(spec.inputs)}."
                f"{did_you_mean(name, spec.inputs)}"
            )
    members = _with_objects(_members(loaded, topology), topology, objects or {})
    model = _model(spec.model, members.values())
    _check_kv_edges(loaded, topology, members, model)
    _check_templates(loaded, spec.inputs)
    _check_input_names(loaded)
    folder = Path() if loaded.document is None else Path(loaded.document.name).parent
    name = spec.name or (loaded.topology_name if loaded.document is None else Path(loaded.document.name).stem)
    blueprint = Blueprint(
        name, topology, members, spec.inputs, spec.defaults, model, spec.communicator, spec.run, folder
    )
    return replace(blueprint, members=_shared_first(blueprint))


def _model(model: ModelSpec | RemoteModelSpec, members: Iterable[Member]) -> ModelSpec | RemoteModelSpec:
    """The mesh's model; the first agent's where all that write name their own, so that none is loaded for nothing."""
    writing = [member for member in members if isinstance(member.spec, LlmAgentSpec | CustomAgentSpec | None)]
    own = [member.remote for member in writing if member.remote is not None]
    return own[0] if own and len(own) == len(writing) else model


def _shared_first(blueprint: Blueprint) -> dict[str, Member]:
    """Members with their own text behind the shared text, where several read it at one endpoint."""
    written = {node: m.spec for node, m in blueprint.members.items() if isinstance(m.spec, LlmAgentSpec)}
    remotes = {node: remote for node in written if (remote := blueprint.remote_of(node)) is not None}
    ordered = {node: remote for node, remote in remotes.items() if remote.order is Order.SHARED_FIRST}
    readers = Counter((remote.remote, remote.name) for remote in ordered.values())
    found = dict(blueprint.members)
    for node, remote in ordered.items():
        spec = written[node]
        if spec.system and readers[remote.remote, remote.name] > 1:
            moved = {"system": "", "prompt": f"{spec.prompt.strip()}\n\n{spec.system.strip()}"}
            found[node] = replace(found[node], spec=spec.model_copy(update=moved))
    return found


def _check_kv_edges(
    loaded: LoadedMesh, topology: Topology, members: Mapping[str, Member], model: ModelSpec | RemoteModelSpec
) -> None:
    """Edges that must share KV need models of this machine at both ends."""
    remote = isinstance(model, RemoteModelSpec)
    for edge in topology.edges:
        for node in (edge.source, edge.target):
            if edge.deliver is Deliver.KV and (remote or members[node].remote is not None):
                raise ConfigError(
                    f"{loaded.position(('agents',))}: edge {edge.source} → {edge.target} says `deliver: kv`, but the "
                    f"model of {node} is remote and takes and gives text only; use `deliver: auto`"
                )


def _topology(loaded: LoadedMesh) -> Topology:
    try:
        return Topology.from_spec(loaded.topology, loaded.params, loaded.topology_name)
    except TopologyError as error:
        raise TopologyError(f"{loaded.position(('topology',))}: {error}") from error


def _members(loaded: LoadedMesh, topology: Topology) -> dict[str, Member]:
    """Every node's agent; a node's own entry goes before its group's."""
    agents, groups = loaded.spec.agents, topology.groups
    nodes = [node.name for node in topology.nodes]
    for name in agents:
        if name not in groups and name not in nodes:
            known = [*groups, *(node for node in nodes if node not in groups)]
            raise ConfigError(
                f"{loaded.position(('agents', name), at_key=True)}: no group or node of that name; "
                f"{loaded.topology_name} has {listing(known)}.{did_you_mean(name, known)}"
            )
    members = {}
    for node in topology.nodes:
        key = node.name if node.name in agents else node.group
        if key not in agents:
            raise ConfigError(
                f"{loaded.position(('agents',))}: no agent for {node.name}; add an entry "
                f"{node.group!r} (for the whole group) or {node.name!r}"
            )
        size = 1 if key == node.name and key != node.group else len(groups[node.group])
        role = deal(agents[key].role, node.index if size > 1 else 0, size, loaded.position(("agents", key, "role")))
        members[node.name] = Member(node.name, role or node.name, spec=agents[key])
    return members


def _with_objects(members: Mapping[str, Member], topology: Topology, objects: Mapping[str, Agent]) -> dict[str, Member]:
    """Members, some of whose agents are objects; a node's own goes before its group's."""
    found = dict(members)
    for node in topology.nodes:
        agent = objects.get(node.name, objects.get(node.group))
        if agent is not None:
            found[node.name] = Member(node.name, members[node.name].role, agent=agent)
    return found


def deal(roles: str | Sequence[str], index: int, size: int, place: str) -> str:
    """The role of a group's member number ``index``: roles are dealt out in order, and again from the beginning.

    Raises:
        ConfigError: more roles than members.
    """
    if isinstance(roles, str):
        return roles
    if len(roles) > size:
        raise ConfigError(f"{place}: {len(roles)} roles for {size} member(s); remove some, or raise the group's count")
    return roles[index % len(roles)] if roles else ""


def _check_templates(loaded: LoadedMesh, inputs: Sequence[str]) -> None:
    for key, spec in loaded.spec.agents.items():
        if isinstance(spec, LlmAgentSpec | CustomAgentSpec):
            try:
                RoleTemplate(spec.system, spec.prompt).check(inputs)
            except TemplateError as error:
                raise ConfigError(f"{loaded.position(('agents', key, 'prompt'))}: {error}") from error
            if isinstance(spec, LlmAgentSpec) and not spec.prompt.strip():
                raise ConfigError(
                    f"{loaded.position(('agents', key, 'prompt'))}: the prompt is empty; write a template"
                )


def _check_input_names(loaded: LoadedMesh) -> None:
    """Inputs that agents take by name must be the mesh's."""
    inputs = loaded.spec.inputs
    for key, spec in loaded.spec.agents.items():
        named: dict[str, str | None] = {}
        if isinstance(spec, RetrieverAgentSpec):
            named = {"passages": spec.passages, "query": spec.query}
        elif isinstance(spec, PythonAgentSpec):
            named = {"tests": spec.tests}
        for entry, name in named.items():
            if name is not None and name not in inputs:
                raise ConfigError(
                    f"{loaded.position(('agents', key, entry))}: no input {name!r}; this mesh reads {listing(inputs)}."
                    f"{did_you_mean(name, inputs)} Add it under `inputs:`"
                )


def slot_warnings(blueprint: Blueprint) -> list[str]:
    """Advice about templates whose slots share a line with fixed text, which costs tokens at the border."""
    found = []
    for member in blueprint.members.values():
        if isinstance(member.spec, LlmAgentSpec):
            lines = [line.strip() for line in member.spec.prompt.splitlines()]
            mixed = [line for line in lines if "{{" in line and not (line.startswith("{{") and line.endswith("}}"))]
            inputs = [line for line in mixed if any(name in line for name in (*blueprint.inputs, "{{ message }}"))]
            if inputs and f"{member.spec.prompt}" not in found:
                found.append(f"{member.node}: put the slot on a line of its own: {inputs[0]!r}")
    return found
