"""A page of the explorer in a browser, for test_explorer.py and test_explorer_state.py."""

import importlib.util
import json
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from explorer import screenshots
from explorer.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
MODELS = {name: ROOT / "models" / name for name in ("ministral3", "ministral")}
HAS_BROWSER = any(map(shutil.which, screenshots.BROWSERS)) and shutil.which("chromedriver") is not None
HAS_SELENIUM = importlib.util.find_spec("selenium") is not None
needs_browser = pytest.mark.skipif(
    not (HAS_BROWSER and HAS_SELENIUM), reason="needs chromium, chromedriver and selenium"
)
FIREFOX = shutil.which("firefox-esr") or shutil.which("firefox")
MINUS, TIMES = "\N{MINUS SIGN}", " \N{MULTIPLICATION SIGN} "
PATIENCE = 120  # seconds until a condition that does not come true is an error


def slow_in_browser(test):
    """Mark a test that needs a browser and is slow."""
    return pytest.mark.slow(needs_browser(test))


def percent(share):
    """A share as the page writes it; the blank before the sign does not break a line."""
    if share == 0:
        return "0\N{NO-BREAK SPACE}%"
    if share < 0.0005:
        return "< 0.05\N{NO-BREAK SPACE}%"
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


class Firefox:
    """Firefox without a window: what `Page` needs of selenium's driver. It speaks Firefox's own protocol, Marionette,
    so that geckodriver is not needed. A message is `length:[type, number, command or error, content]` in JSON."""

    def __init__(self, profile):
        (profile / "user.js").write_text('user_pref("marionette.port", 0);')  # any free port
        command = [FIREFOX, "--headless", "--marionette", "--no-remote", "--profile", str(profile)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        written = profile / "MarionetteActivePort"
        end = time.monotonic() + PATIENCE
        while not (written.exists() and written.read_text()) and time.monotonic() < end:
            time.sleep(0.1)
        self.socket = socket.create_connection(("127.0.0.1", int(written.read_text())), timeout=PATIENCE)
        self.answers = self.socket.makefile("rb")
        self.receive()  # a greeting
        self.call("NewSession", capabilities={})

    def receive(self):
        length = b""
        while not length.endswith(b":"):
            length += self.answers.read(1)
        return json.loads(self.answers.read(int(length[:-1])))

    def call(self, command, **parameters):
        message = json.dumps([0, 1, f"WebDriver:{command}", parameters])
        self.socket.sendall(f"{len(message)}:{message}".encode())
        _, _, error, result = self.receive()
        assert error is None, error
        return result

    def get(self, address):
        self.call("Navigate", url=address)

    def execute_script(self, script, *arguments):
        return self.call("ExecuteScript", script=script, args=arguments, sandbox=None)["value"]

    def quit(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(PATIENCE)


class Page:
    """A browser with a page of the explorer in it.

    Attributes:
        driver: selenium's, or a `Firefox`.
        pages: name of a model -> address of its page.
    """

    def __init__(self, pages, driver):
        self.driver = driver
        self.pages = pages

    def open(self, name, is_new=False, is_first_visit=False):
        """Show the page of a model, as an earlier test has left it, or loaded again; it has read a text."""
        if self.driver.current_url == self.pages[name] and not is_new and not is_first_visit:
            return
        self.driver.get(self.pages[name])
        if is_first_visit:
            self("localStorage.clear()")
            self.driver.refresh()
        elif self("return localStorage.getItem('explorer-tour') === null"):
            self("localStorage.setItem('explorer-tour', 'seen')")
            self.driver.refresh()
        self.wait()

    def __call__(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition="explorer.run !== null && !explorer.busy && explorer.pending === 0"):
        """Wait until a condition in JavaScript is true; errors of the page are errors here."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, PATIENCE, poll_frequency=0.05).until(lambda _: self(f"return {condition}"))
        assert self("return document.querySelectorAll('.error').length") == 0, self.text("status") + self.text("view")

    # What the page shows.

    def text(self, element):
        """The text of the element with an id, as a reader sees it."""
        return self("return document.getElementById(arguments[0]).innerText", element)

    def content(self, selector="#view"):
        """The text of the first element that a selector finds, with all blanks and newlines."""
        return self("return document.querySelector(arguments[0]).textContent", selector)

    def contents(self, selector):
        """The texts of all elements that a selector finds."""
        return self("return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)", selector)

    def rows(self):
        """The texts of the cells of the view's tables, row by row."""
        return self("""return [...document.querySelectorAll("#view tbody tr")]
            .map((row) => [...row.cells].map((cell) => cell.textContent))""")

    def views(self):
        return self("return VIEWS.map(({ id }) => id)")

    def ids(self):
        """The tokens of the run."""
        return self("return explorer.run.tokens.map(({ id }) => id)")

    def prompt(self):
        """What the text field holds, and whether it is a text or a question."""
        return self("return [document.getElementById('prompt').value, explorer.run.source.mode]")

    def errors(self):
        """Errors in the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def violations(self, script, root="document", rules="undefined"):
        """What axe-core, whose text is `script`, finds in an element of the page: rules, elements and reasons."""
        if self("return typeof axe === 'undefined'"):
            self(script)
        return self.driver.execute_async_script(f"""
            const reasons = ({{ html, failureSummary }}) => [html.slice(0, 200), failureSummary];
            axe.run({root}, {{ resultTypes: ["violations"], runOnly: {rules} }}).then(({{ violations }}) =>
                arguments[0](violations.map(({{ id, nodes }}) => [id, nodes.map(reasons)])));""")

    # What a reader does.

    def click(self, element):
        """Press the element with an id."""
        self("document.getElementById(arguments[0]).click()", element)

    def press(self, button):
        """Press the button with an id, and wait for the worker."""
        self.click(button)
        self.wait()

    def press_in_view(self, text):
        """Press the button of the view with this text."""
        buttons = "[...document.querySelectorAll('#view button')]"
        self(f"{buttons}.find((button) => button.textContent === arguments[0]).click()", text)

    def open_view(self, view):
        self.click(f"tab-{view}")
        if view in ("sampling", "layers"):  # they ask the worker
            self.wait("document.querySelector('#view table') !== null")

    def set(self, label, value):
        """Change the control of the view with this label."""
        self(
            """const labels = [...document.querySelectorAll("#view label")];
            const label = labels.find((one) => one.textContent.startsWith(arguments[0]));
            const control = document.getElementById(label.htmlFor);
            control.value = arguments[1];
            for (const kind of ["input", "change"]) control.dispatchEvent(new Event(kind));""",
            label, str(value),
        )  # fmt: skip

    def write(self, prompt, mode="text", **settings):
        """Put a text and settings in place."""
        script = """const [text, mode, settings] = arguments;
            document.getElementById("prompt").value = text;
            document.querySelector(`input[name=mode][value=${mode}]`).checked = true;
            for (const name in settings) document.getElementById(name).value = settings[name];"""
        self(script, prompt, mode, settings)

    def keys(self, *keys):
        from selenium.webdriver import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def resize(self, width):
        screenshots.resize(self.driver, width, 900)
        self.wait(f"innerWidth === {width}")


def open_browser(directory, *arguments):
    """The body of a fixture: a Page with the pages of both models, which `python -m explorer` writes to a directory."""
    pages = {}
    for name, model in MODELS.items():
        output = directory / f"{name}.html"
        assert main(["--model", str(model), "-o", str(output), *arguments]) == 0
        pages[name] = output.as_uri()
    page = Page(pages, screenshots.start_browser(1280, 900))
    page.driver.set_script_timeout(PATIENCE)
    yield page
    page.driver.quit()
