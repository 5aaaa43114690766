"""The mesh file: model, topology, agents, communicator, run."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from agentmesh.config.base import (
    ENDPOINT,
    PYTHON_REF,
    VARIABLE,
    Bytes,
    Choice,
    Frozen,
    Integer,
    Number,
    Seconds,
    Shorthand,
)
from agentmesh.config.presets import MIB, CommunicatorSpec
from agentmesh.config.topology import Parameter, TopologySpec


class Dtype(Choice):
    """Number format of weights and KV."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Decode(Choice):
    """Which weights decode messages on a CPU.

    ``packed`` reads copies in the order in which MKL multiplies sixteen rows, while five to sixteen sequences decode at
    once: the same numbers and as many bytes again, faster. ``auto`` packs float32 weights of up to 1 GiB where that is
    faster, as measured when the model is loaded; ``same`` keeps no copies.

    The others read less memory, and messages are approximate. ``int4`` has four bits a weight in groups of 32 where
    that keeps them (models quantised to four bits, such as the embedded one) and eight where not, while at most eight
    sequences decode; ``int8`` one scale an output, while at most four do; ``bfloat16`` half the bytes, for any number.
    Prompts are prefilled with the model's own weights.
    """

    AUTO = "auto"
    SAME = "same"
    PACKED = "packed"
    INT8 = "int8"
    INT4 = "int4"
    BFLOAT16 = "bfloat16"

    @property
    def approximates(self) -> bool:
        """Whether messages are approximate."""
        return self in (Decode.INT8, Decode.INT4, Decode.BFLOAT16)


class Memory(Choice):
    """What an agent remembers of its own earlier rounds."""

    NONE = "none"
    CONVERSATION = "conversation"


class Reads(Choice):
    """Whether an agent may read realigned KV (``auto``) or only exact KV.

    Agents whose role or name says "judge" read exactly unless their entry says otherwise: approximate KV changes a
    judge's choice without a trace in its accuracy.
    """

    AUTO = "auto"
    EXACT = "exact"


class ModelSpec(Frozen):
    """Which model: a known name, a Hub repo id, a local folder, a ``.gguf`` file or ``random:<family>``.

    On a CUDA device forwards of few rows are replayed from CUDA graphs, unless ``graphs`` is false.
    """

    name: Annotated[str, Field(min_length=1)] = "smollm2-135m"
    revision: str | None = None
    dtype: Dtype = Dtype.FLOAT32
    device: str = "auto"
    decode: Decode = Decode.AUTO
    graphs: bool = True


class Order(Choice):
    """How a prompt is ordered that goes to an endpoint, whose cache knows common beginnings only.

    ``shared-first`` puts an agent's system text behind its prompt, so that texts which several agents of an endpoint
    read come first; an agent that has an endpoint for itself keeps its order. ``as-written`` sends what the mesh says.
    """

    SHARED_FIRST = "shared-first"
    AS_WRITTEN = "as-written"


class RemoteModelSpec(Frozen):
    """A model behind an OpenAI-compatible endpoint, such as vLLM, llama.cpp or Ollama: text in, text out.

    Args:
        remote: the endpoint's address, such as ``http://127.0.0.1:8000/v1``.
        name: the model's name there.
        api_key_env: the environment variable that holds the key; the key itself never stands in a file.
        timeout: seconds without a byte of an answer after which a call fails.
        retry: how often a call is sent again that was refused for now or broke off before its first token.
        concurrency: how many runs it serves well at once.
        body: more fields of each request, such as vLLM's ``cache_salt``.
        order: of the texts in its prompts.
    """

    remote: Annotated[str, Field(pattern=ENDPOINT)]
    name: Annotated[str, Field(min_length=1)]
    api_key_env: Annotated[str, Field(pattern=VARIABLE)] | None = None
    timeout: Seconds = 120.0
    retry: Annotated[Integer, Field(ge=0)] = 4
    concurrency: Annotated[Integer, Field(ge=1)] = 8
    body: dict[str, Any] = Field(default_factory=dict)
    order: Order = Order.SHARED_FIRST

    @field_validator("body")
    @classmethod
    def _none_of_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        ours = sorted(set(value) & {"model", "messages", "stream", "stream_options"})
        if ours:
            raise ValueError(f"{', '.join(ours)} cannot be set here: agentmesh fills them itself")
        return value


def _model_tag(value: Any) -> str:
    remote = isinstance(value, RemoteModelSpec) or (isinstance(value, dict) and "remote" in value)
    return "remote" if remote else "local"


ModelChoice = Annotated[
    Annotated[ModelSpec, Tag("local")] | Annotated[RemoteModelSpec, Tag("remote")],
    Discriminator(_model_tag),
    Shorthand("name"),
]


class GenerateSpec(Frozen):
    """How an agent's message is decoded. A stop string ends the message after the token that completes it."""

    max_tokens: Annotated[Integer, Field(ge=1)] = 256
    temperature: Annotated[Number, Field(ge=0)] = 0.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[Integer, Field(ge=1)] | None = None
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()


class AnswerSpec(Frozen):
    """What one run asks of its answer, within what the output node's own settings allow."""

    max_tokens: Annotated[Integer, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()

    def within(self, own: GenerateSpec) -> GenerateSpec:
        """The node's settings with what is asked for: never more tokens, and stop strings are added."""
        asked = self.model_dump(exclude_none=True)
        most = min(own.max_tokens, self.max_tokens or own.max_tokens)
        return own.model_copy(update={**asked, "max_tokens": most, "stop": (*own.stop, *self.stop)})


class TopologyUse(Frozen):
    """A topology file by name or path, with values for its parameters."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, Parameter]

    use: Annotated[str, Field(min_length=1)]


class AgentBase(Frozen):
    """What every agent kind has."""

    role: str | tuple[str, ...] = ""
    timeout: Seconds | None = None
    retry: Annotated[Integer, Field(ge=0)] | None = None


class LlmAgentSpec(AgentBase):
    """An agent that writes its message with the mesh's model, or with a remote ``model`` of its own."""

    kind: Literal["llm"] = "llm"
    system: str = ""
    prompt: str
    memory: Memory = Memory.NONE
    reads: Reads | None = None
    generate: GenerateSpec = GenerateSpec()
    model: RemoteModelSpec | None = None


class PythonAgentSpec(AgentBase):
    """Runs the last code block it receives in the sandbox; its message is what the code printed.

    ``tests`` names an input whose code runs after the block.
    """

    kind: Literal["python"]
    tests: Annotated[str, Field(pattern=VARIABLE)] | None = None
    time_limit: Seconds = 10.0
    memory_limit: Bytes = 1024 * MIB


class VoteAgentSpec(AgentBase):
    """Answers with the most frequent answer of its inbox; ``extract`` is a regular expression with one group."""

    kind: Literal["vote"]
    extract: str | None = None

    @field_validator("extract")
    @classmethod
    def _one_group(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"expected a regular expression, found {value!r}: {error}") from error
        if groups != 1:
            raise ValueError(f"expected a regular expression with one group, found {groups} in {value!r}")
        return value


class RetrieverAgentSpec(AgentBase):
    """Finds the passages that fit the query best (BM25).

    They come from ``documents``, a folder or a JSONL file, or from the input that ``passages`` names, whose text is
    JSONL as well: then every run brings its own. ``query`` names the input to search for.
    """

    kind: Literal["retriever"]
    documents: str | None = None
    passages: Annotated[str, Field(pattern=VARIABLE)] | None = None
    top_k: Annotated[Integer, Field(ge=1)] = 4
    query: Annotated[str, Field(pattern=VARIABLE)] = "question"

    @model_validator(mode="after")
    def _one_source(self) -> RetrieverAgentSpec:
        if (self.documents is None) is (self.passages is None):
            raise ValueError("expected `documents` (a folder or JSONL file) or `passages` (the name of an input)")
        return self


class CustomAgentSpec(AgentBase):
    """A role of the user's own: ``python: package.module:Name``, a class or a decorated function."""

    python: Annotated[str, Field(pattern=PYTHON_REF)]
    options: dict[str, Any] = Field(default_factory=dict)
    system: str = ""
    prompt: str = ""
    generate: GenerateSpec = GenerateSpec()
    model: RemoteModelSpec | None = None


def _agent_tag(value: Any) -> str:
    if isinstance(value, CustomAgentSpec):
        return "custom"
    if isinstance(value, AgentBase):
        return str(value.kind)  # type: ignore[attr-defined]  # every other kind has the field
    if isinstance(value, dict) and "python" in value and "kind" not in value:
        return "custom"
    return str(value.get("kind", "llm")) if isinstance(value, dict) else "llm"


AgentSpec = Annotated[
    Annotated[LlmAgentSpec, Tag("llm")]
    | Annotated[PythonAgentSpec, Tag("python")]
    | Annotated[VoteAgentSpec, Tag("vote")]
    | Annotated[RetrieverAgentSpec, Tag("retriever")]
    | Annotated[CustomAgentSpec, Tag("custom")],
    Discriminator(_agent_tag),
]


class RunSpec(Frozen):
    """How a mesh runs. ``retry`` and ``timeout`` hold for each node that does not say otherwise.

    ``timeout`` covers everything that an attempt takes: waiting for the engine, and a check of the call (``audit``).

    ``deterministic``: what is shared, and so every token, depends on seed, inputs and the runs' order alone. A run
    then has its visits one after the other and uses what was learned eight runs before it and earlier (at most eight
    may overlap), gates that depend on measured time are off, and a run fails where how full memory is would decide what
    it shares, as do later runs that would see what it has taught. (A run that fails otherwise or is cancelled teaches
    what it has read until then.)

    ``concurrency``: runs at once; ``auto`` takes what cores, free memory (of the model's device) and budget serve well.
    """

    concurrency: Annotated[Integer, Field(ge=1)] | Literal["auto"] = "auto"
    seed: Integer = 0
    retry: Annotated[Integer, Field(ge=0)] = 0
    timeout: Seconds | None = None
    deterministic: bool = False


def _topology_tag(value: Any) -> str:
    if isinstance(value, dict):
        return "inline" if "use" not in value and value.keys() & {"nodes", "edges", "output"} else "use"
    return "inline" if isinstance(value, TopologySpec) else "use"


TopologyChoice = Annotated[
    Annotated[TopologyUse, Tag("use")] | Annotated[TopologySpec, Tag("inline")],
    Discriminator(_topology_tag),
    Shorthand("use"),
]


class MeshSpec(Frozen):
    """A whole mesh file. ``defaults`` are texts of inputs for runs that give none, such as a handbook for all."""

    version: Literal[1]
    name: str = ""
    about: str = ""
    model: ModelChoice = ModelSpec()
    topology: TopologyChoice
    inputs: tuple[Annotated[str, Field(pattern=VARIABLE)], ...] = ("question",)
    defaults: dict[str, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)
    agents: dict[str, AgentSpec] = Field(min_length=1)
    communicator: Annotated[CommunicatorSpec, Shorthand("preset")] = CommunicatorSpec()
    run: RunSpec = RunSpec()
