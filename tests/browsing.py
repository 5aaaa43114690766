"""A headless Chromium, and how tests look at pages with it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
OPTIONS = (
    "--headless --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --hide-scrollbars"
)


def start(profile: Path) -> Any:
    """A browser with a new profile; the test that asks for it is skipped where there is none."""
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip("needs chromium and chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="the browser test needs selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*OPTIONS.split(), f"--user-data-dir={profile}"):
        options.add_argument(option)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))


def resize(browser: Any, width: int, scheme: str, height: int = 900) -> None:
    """Give the page a size in pixels and ``light`` or ``dark``."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def look_at(browser: Any, address: str, width: int, scheme: str) -> None:
    """Open a page."""
    resize(browser, width, scheme)
    browser.get(address)


def colour(element: Any) -> str:
    """An element's background."""
    return str(element.value_of_css_property("background-color"))


def wait_for(browser: Any, shown: Callable[[Any], Any], seconds: int = 30) -> Any:
    """Wait until something is there, and give it back; elements that were replaced meanwhile are looked for again."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds, 0.1, [StaleElementReferenceException]).until(shown)
