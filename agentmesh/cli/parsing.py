"""What the texts of options mean: lists of names, numbers and shares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from agentmesh.config.load import LoadedMesh, load_mesh
from agentmesh.config.mesh import Decode, Dtype, ModelSpec
from agentmesh.config.presets import PRESETS
from agentmesh.errors import InputError, did_you_mean, listing

DEFAULT_BUDGET = "4GiB"


def parts(text: str) -> list[str]:
    """The parts of an option between its commas, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def counts(option: str, text: str, example: str) -> list[int]:
    """Numbers from 1 on, each once.

    Raises:
        InputError: something else.
    """
    found = parts(text)
    if not found or not all(part.isdecimal() and int(part) for part in found):
        raise InputError(f"{option} {text!r}: expected numbers from 1 on, separated by commas, such as {example}")
    return list(dict.fromkeys(int(part) for part in found))


def shares(text: str) -> list[float]:
    """Shares of a whole, each once.

    Raises:
        InputError: something else.
    """
    try:
        found = [float(part) for part in parts(text)]
    except ValueError:
        found = []
    if not found or not all(0 <= share < 1 for share in found):
        raise InputError(
            f"--placed {text!r}: expected shares from 0 to below 1, separated by commas, such as 0,0.5,0.9"
        )
    return list(dict.fromkeys(found))


def preset_names(text: str, layouts: Sequence[str] = ()) -> list[str]:
    """Preset names of an option, each with a layout behind an ``@`` where there are some.

    Raises:
        InputError: a name that is no preset, a layout that is none, or no name at all.
    """
    names = parts(text)
    for name in names:
        preset, _, layout = name.partition("@")
        if preset not in PRESETS:
            hint = did_you_mean(preset, PRESETS)
            raise InputError(f"--presets: no preset named {preset!r}; there are {listing(PRESETS)}.{hint}")
        if "@" in name and layout not in layouts:
            expected = f"expected {preset}@{listing(layouts)}" if layouts else "layouts are for `bench ttft`"
            raise InputError(f"--presets: {name!r} asks for the layout {layout!r}; {expected}")
    if not names:
        raise InputError(f"--presets is empty; name some of {listing(PRESETS)}")
    return names


def model_spec(model: str, dtype: Dtype, decode: Decode = Decode.AUTO) -> ModelSpec:
    """A model from its options.

    Raises:
        InputError: its name is empty.
    """
    try:
        return ModelSpec(name=model, dtype=dtype, decode=decode)
    except ValidationError as error:
        raise InputError("--model is empty; give a model's name, such as smollm2-135m") from error


def budgeted(config: str, sets: Sequence[str], libraries: Sequence[Path], budget: str | None) -> LoadedMesh:
    """A mesh whose presets keep what ``--budget`` says, else what ``--set`` or its file says, else the default."""

    def loaded(*more: str) -> LoadedMesh:
        return load_mesh(config, overrides=[*sets, *more], libraries=libraries)

    if budget is not None:
        return loaded(f"communicator.budget={budget}")
    own = loaded()
    return (
        own if "budget" in own.spec.communicator.model_fields_set else loaded(f"communicator.budget={DEFAULT_BUDGET}")
    )
