"""Make docs/page-*.png: a real run of the demo mesh in a real server, as the live page shows it.

    python tests/page_pictures.py

Takes some minutes: the embedded model learns the mesh's links in a few runs first. Needs chromium and chromedriver.
"""

from __future__ import annotations

import json
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import browsing
from PIL import Image
from serving import command

ROOT = Path(__file__).parent.parent
WARM_UP = 7
QUESTION = (
    "A farmer packs eggs into boxes for the market. Each box holds 6 eggs, and each crate holds 4 boxes. On Monday he "
    "fills 5 crates and 3 single boxes, on Tuesday twice as many crates but no single boxes. Three boxes fall from the "
    "cart and every egg in them breaks. How many whole eggs does the farmer bring to the market on both days together?"
)


def start(address: str, question: str) -> str:
    """Begin a run of the demo mesh; its name."""
    body = json.dumps({"inputs": {"question": question}}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/api/meshes/demo/runs", body, headers)  # noqa: S310  # our own server
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310  # the same
        return str(json.load(response)["run"])


def finish(address: str, run: str) -> None:
    """Wait until a run has ended."""
    while True:
        with urllib.request.urlopen(f"{address}/api/runs/{run}", timeout=60) as response:  # noqa: S310  # the same
            if json.load(response)["status"] != "running":
                return
        time.sleep(0.2)


def save(browser: Any, name: str, width: int, scheme: str, below: str) -> None:
    """A picture from the page's top to the end of an element."""
    browsing.resize(browser, width, scheme)
    script = "return document.querySelector(arguments[0]).getBoundingClientRect().bottom + scrollY"
    browser.execute_script("scrollTo(0, 0); document.activeElement.blur()")
    time.sleep(0.5)
    browsing.resize(browser, width, scheme, int(browser.execute_script(script, below)) + 24)
    time.sleep(0.5)
    path = ROOT / "docs" / f"{name}.png"
    browser.save_screenshot(str(path))
    Image.open(path).quantize(256).save(path, optimize=True)
    print(path, f"{path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    mesh = (ROOT / "configs" / "demo.yaml", "--set", "communicator.preset=linear")
    with command(*mesh) as (address, _process), tempfile.TemporaryDirectory() as profile:
        for number in range(WARM_UP):
            finish(address, start(address, f"{QUESTION} This is market day {number + 1}."))
        browser = browsing.start(Path(profile))
        try:
            take(browser, address)
        finally:
            browser.quit()


def take(browser: Any, address: str) -> None:
    """All pictures of one run."""
    browsing.look_at(browser, address, 1280, "dark")
    run = start(address, QUESTION)
    browser.get(f"{address}/#run={run}")
    browsing.wait_for(browser, lambda page: "agent.2 is writing" in page.find_element("id", "now").text, 120)
    time.sleep(1)
    save(browser, "page-dark", 1280, "dark", "#timeline")
    finish(address, run)
    browsing.wait_for(browser, lambda page: page.find_element("id", "answer").is_displayed())
    save(browser, "page-light", 1280, "light", "#firsts")
    save(browser, "page-narrow", 420, "light", "#prompts")


if __name__ == "__main__":
    main()
