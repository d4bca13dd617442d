"""Renew the screenshots of explorer/README.md: each view, light and dark, of the bundled models.

    python -m explorer.screenshots

needs Chromium, its driver, and the packages selenium and pillow (requirements-notebooks.txt).
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from checkpoint import replace_file
from cli import exit_code, format_bytes
from explorer.__main__ import ROOT, assemble

FOLDER = Path(__file__).resolve().parent / "images"
SIZE = 1180, 900  # CSS pixels of the window
COLOURS = 64  # of a PNG file
MOST = 1300  # pixels of its height
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# What is shown: file, model, element, and scripts that bring the page there. IDLE is waited for after each.
WRITE = "document.getElementById('write').click();"
IDLE = "return explorer.run !== null && !explorer.busy && explorer.pending === 0"
CHOOSE = "document.querySelector('#view input').click();"
ASK = "document.querySelector('#view button.primary').click();"
OPEN = "document.getElementById('tab-{}').click();"
SHOTS = (
    ("page", "ministral3", "body", (WRITE,)),
    ("tokens", "ministral3", "#views", (OPEN.format("tokens"),)),
    ("sampling", "ministral3", "#views", (OPEN.format("sampling"), "select({ query: 21 });")),
    ("layers", "ministral3", "#views", (OPEN.format("layers"), "select({ query: 18 });")),
    ("positions", "ministral3", "#views", (OPEN.format("positions"),)),
    ("mistakes", "ministral3", "#views", (OPEN.format("mistakes"), CHOOSE)),
    ("image", "ministral3", "#views", (OPEN.format("image"), ASK)),
    ("sizes", "ministral3", "#views", ("explorer.run.help.showCode('layers.2.attention.scores');",)),
    # The answer finds the key by a head of a full layer, more than a window back.
    ("attention", "ministral", "#views", (WRITE, "select({ layer: 4, head: 3, query: 95, key: 9 });")),
    ("cache", "ministral", "#views", (OPEN.format("cache"), "select({ layer: 1 });")),
)


def start_browser(width: int, height: int) -> Any:
    """Selenium's driver of a Chromium without a window. Raises FileNotFoundError if there is none."""
    from selenium import webdriver

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        raise FileNotFoundError("chromium and chromedriver are needed; on Debian: apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    chrome.set_script_timeout(60)
    resize(chrome, width, height)
    return chrome


def resize(chrome: Any, width: int, height: int) -> None:
    """Give the page a size in CSS pixels."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def set_scheme(chrome: Any, scheme: str) -> None:
    """Let the browser prefer "light" or "dark" colours."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def wait(chrome: Any, condition: str = IDLE) -> None:
    """Wait until a script returns true."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(chrome, 60, poll_frequency=0.05).until(lambda _: chrome.execute_script(condition))


def shoot(chrome: Any, element: str) -> bytes:
    """A PNG of an element with few colours."""
    from PIL import Image

    width, height = SIZE
    page_height = chrome.execute_script("return document.documentElement.scrollHeight")
    resize(chrome, width, max(height, page_height))
    chrome.execute_async_script("setTimeout(arguments[0], 400)")  # views are drawn again after a change of the size
    wait(chrome)
    content = chrome.find_element("css selector", element).screenshot_as_png
    resize(chrome, width, height)
    result = io.BytesIO()
    image = Image.open(io.BytesIO(content)).convert("RGB")
    image = image.crop((0, 0, image.width, min(image.height, MOST)))
    image = image.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
    image.save(result, "PNG", optimize=True)
    return result.getvalue()


def write(content: bytes, path: Path) -> None:
    """Write a file."""
    path.write_bytes(content)


def run() -> int:
    """Make all screenshots."""
    total = 0
    FOLDER.mkdir(exist_ok=True)
    chrome = start_browser(*SIZE)
    try:
        with tempfile.TemporaryDirectory() as directory:
            shown = ""
            for name, model, element, scripts in SHOTS:
                page = Path(directory) / f"{model}.html"
                if not page.exists():
                    page.write_text(assemble(ROOT / "models" / model), encoding="utf-8")
                if shown != model:
                    chrome.get(page.as_uri())
                    chrome.execute_script("localStorage.setItem('explorer-tour', 'seen')")
                    chrome.refresh()
                    wait(chrome)
                    shown = model
                for script in scripts:
                    chrome.execute_script(script)
                    chrome.execute_async_script("setTimeout(arguments[0], 200)")  # until the worker has been asked
                    wait(chrome)
                for scheme in ("light", "dark"):
                    set_scheme(chrome, scheme)
                    content = shoot(chrome, element)
                    replace_file(FOLDER / f"{name}_{scheme}.png", partial(write, content))
                    total += len(content)
                    print(f"{name}_{scheme}.png: {format_bytes(len(content))}", flush=True)
    finally:
        chrome.quit()
    print(f"{2 * len(SHOTS)} files, {format_bytes(total)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(run))
