"""Fixtures shared by all tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmesh.config.mesh import Dtype, ModelSpec
from agentmesh.engine.loading import LoadedModel, load

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The embedded model in float32, fetched into the cache folder by the first run."""
    return load(ModelSpec(name="smollm2-135m"))


@pytest.fixture(scope="session")
def smollm2_bf16() -> LoadedModel:
    """The embedded model in bfloat16."""
    return load(ModelSpec(name="smollm2-135m", dtype=Dtype.BFLOAT16))


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A headless browser with a new profile; skips the test where there is none."""
    from browsing import start

    driver = start(tmp_path / "profile")
    yield driver
    driver.quit()
