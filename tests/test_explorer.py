"""The explorer's page: how it is put together, and what a reader sees in Chromium.

test_explorer_port.py tests its model, test_explorer_state.py the views of the cache, positions, mistakes and images."""

import base64
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from explorer import screenshots
from explorer.__main__ import LIMIT, assemble, main
from generate import Sampling, filter_logits, generate, load_model
from ministral3 import YarnRotaryEmbedding
from tests.explorer_page import (
    FIREFOX,
    HAS_SELENIUM,
    MINUS,
    MODELS,
    TIMES,
    Firefox,
    Page,
    needs_browser,
    open_browser,
    percent,
    slow_in_browser,
)
from tokenizer import Tokenizer

VIEWS = ["tokens", "sampling", "attention", "layers", "cache", "positions", "mistakes", "image", "sizes"]  # the tabs
PERCENT = "\N{NO-BREAK SPACE}%"
PWNED = "window.pwned = true"
PROMPT = f"""</script><script>{PWNED}</script><img src=x onerror="{PWNED}"> {{{{weights}}}} <!-- \ud800"""


# --------------------------------------------------------------------------------------------------------- assembly


def test_the_page_is_one_file_without_requests():
    page = assemble(MODELS["ministral3"])
    assert len(page.encode()) < 14_000_000
    text = re.sub(r'<script id="(weights|data)".*?</script>', "", page, flags=re.DOTALL)
    assert len(text) < 300_000
    assert not re.search(r"""\b(src|href)=["'](?!#)|url\(|@import|\bimport\s*\(|importScripts""", text)
    assert set(re.findall(r"https?://[\w./]*", text)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xhtml"}
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
    assert not re.search(r"\{\{\w+\}\}", text)


def test_nothing_in_a_script_element_ends_it():
    page = assemble(MODELS["ministral"], PROMPT)
    assert page.count("<script") == page.count("</script>") == 9
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page, re.DOTALL)[1])
    assert data["examples"][0]["text"] == PROMPT
    assert data["sources"].keys() >= {"ministral.py", "ministral3.py", "vision.py"}


def copy_of(directory, tmp_path):
    """A copy of a model whose weights are a link."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in directory.glob("*.json"):
        shutil.copy(path, copy)
    (copy / "model.safetensors").symlink_to(directory / "model.safetensors")
    return copy


@pytest.mark.parametrize("case", ["too large", "no weights", "no tokenizer", "no directory", "another model"])
def test_refusals(tmp_path, capsys, case):
    model, output = copy_of(MODELS["ministral"], tmp_path), tmp_path / "page.html"
    output.write_text("old")
    weights = model / "model.safetensors"
    expected = "does not exist"
    if case == "too large":
        weights.unlink()
        with weights.open("wb") as file:
            file.truncate(LIMIT + 1)
        expected = "has 64.0 MB; the explorer takes up to 64.0 MB, because"
    elif case == "no weights":
        weights.unlink()
    elif case == "no tokenizer":
        (model / "tekken.json").unlink()
    elif case == "no directory":
        model = tmp_path / "nothing"
    else:
        (model / "config.json").write_text('{"model_type": "llama"}')
        expected = "model_type is 'llama'; supported: ministral, ministral3, mistral3"
    assert main(["--model", str(model), "-o", str(output)]) == 2
    assert expected in capsys.readouterr().err
    assert output.read_text() == "old" and not list(tmp_path.glob(".*"))  # no half-written file


def test_a_page_that_cannot_be_written_whole_is_not_written(tmp_path, monkeypatch, capsys):
    def fail(path, *_, **__):
        path.write_bytes(b"half")
        raise OSError("disk full")

    output = tmp_path / "page.html"
    monkeypatch.setattr(Path, "write_text", fail)
    assert main(["--model", str(MODELS["ministral"]), "-o", str(output)]) == 2
    assert "disk full" in capsys.readouterr().err and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    yield from open_browser(tmp_path_factory.mktemp("explorer"))


def logits_at(page, position):
    """The logits (V,) after the token at a position."""
    script = """const { shape: [, , V], data } = explorer.run.trace.logits;
        return [...data.subarray(arguments[0] * V, (arguments[0] + 1) * V)];"""
    return torch.tensor(page(script, position))


@needs_browser
@pytest.mark.parametrize("name", MODELS)
def test_first_token_and_views(page, name):
    """The text is the one of Python; every view shows it, without an error."""
    page.open(name, is_new=True)
    assert page.views() == VIEWS
    prompt = page.ids()
    page.write(*page.prompt(), temperature=0)
    page.press("next")
    assert re.search(r"the first came after [\d.]+ s", page.text("status"))
    page.press("write")
    model = load_model(MODELS[name], torch.float32)
    ids = page.ids()
    assert ids[: len(prompt)] == prompt and len(ids) > len(prompt) + 8
    expected = generate(model, torch.tensor([prompt]), max_new_tokens=len(ids) - len(prompt), do_sample=False)
    assert ids == expected[0].tolist()
    for view in page.views():
        page.open_view(view)
        page.wait()
        assert len(page.text("view")) > 100, view
    assert page.errors() == []


@pytest.mark.slow
@pytest.mark.skipif(not (FIREFOX and HAS_SELENIUM), reason="needs firefox, and selenium, which waits")
def test_the_page_in_firefox(tmp_path):
    """The first text, and every view, with an answer about an image."""
    (tmp_path / "page.html").write_text(assemble(MODELS["ministral3"]), encoding="utf-8")
    (tmp_path / "profile").mkdir()
    page = Page({}, Firefox(tmp_path / "profile"))
    try:
        page.driver.get((tmp_path / "page.html").as_uri())
        page.wait("globalThis.explorer?.run && !explorer.busy && explorer.pending === 0")
        prompt = page.ids()
        page("""window.failures = [];
            const note = ({ message, effectiveDirective }) => failures.push(message ?? effectiveDirective);
            for (const kind of ["error", "securitypolicyviolation"]) addEventListener(kind, note);""")
        page.write(*page.prompt(), temperature=0)
        page.press("write")
        ids = page.ids()
        model = load_model(MODELS["ministral3"], torch.float32)
        expected = generate(model, torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
        assert ids == expected[0].tolist()
        for view in page.views():
            page.open_view(view)
            page.wait()
            assert len(page.text("view")) > 100, view
        page.open_view("image")
        page.press_in_view("Ask")
        page.wait("document.querySelector('.state-tokens') !== null && !explorer.busy")
        answer = "A red circle at the top left and a blue square at the bottom right."
        assert page.content(".state-answer .state-big") == answer
        assert page("return window.failures") == []
    finally:
        page.driver.quit()


@slow_in_browser
def test_why_a_cell_is_hidden(page):
    page.open("ministral")
    page.open_view("attention")

    def why(query, key, layer):
        page(f"select({{query: {query}, key: {key}, layer: {layer}, head: 0}})")
        return page.text("readout")

    assert "in the future of position 5" in why(5, 6, 0)
    assert "outside the window. Position 3 is 64 positions back, and this layer sees the last 64" in why(67, 3, 1)
    assert "Visible" in why(67, 3, 0) and "Visible" in why(67, 4, 1)  # a full layer, and the last key of a window
    probabilities = page("""const { shape: [, H, S], data } = explorer.run.trace["layers.0.attention.probabilities"];
        return [...data.subarray(67 * S, 68 * S)];""")
    assert percent(probabilities[3]) in why(67, 3, 0)
    assert sum(probabilities) == pytest.approx(1, abs=1e-5)


@slow_in_browser
def test_the_last_layer_of_the_lens_is_the_model(page):
    page.open("ministral")
    page.open_view("layers")
    page("select({query: 12})")
    page.wait("document.querySelector('#view h3').innerText.includes('position 12')")
    best = int(logits_at(page, 12).argmax())
    token = Tokenizer.from_dir(MODELS["ministral"]).decode([best]).replace(" ", "·").replace("\n", "↵")
    share = percent(logits_at(page, 12).softmax(-1).max().item())
    stages = page("return [...document.querySelectorAll('.guesses')].map((stage) => stage.innerText)")
    assert len(stages) == 9 and stages[-1].split("\n")[:3] == ["after layer 7", token, share]
    assert f"first guess is “{token}”" in page.text("view")


def when_a_token_appears(page, action):
    """Run a script once, between two frames, when the model has begun to write."""
    page(f"""const act = () => {{ {action} }};
        const frame = () => {{
            const {{ live }} = explorer;
            if (live === null || live.tokens.length === live.prompt) requestAnimationFrame(frame);
            else act();
        }};
        requestAnimationFrame(frame);""")


@slow_in_browser
def test_the_page_stays_responsive(page):
    """The worker computes, not the page; the page draws, and obeys, between two tokens. No number depends on time."""
    page.open("ministral3", is_new=True)
    page.write("O Romeo, Romeo! wherefore art thou Romeo?")
    page("""globalThis.calls = 0;
        const { forward } = Model.prototype;
        Model.prototype.forward = function (...given) { calls += 1; return forward.apply(this, given); };""")
    when_a_token_appears(page, "document.getElementById('stop').click()")
    page.press("write")
    assert page.text("status").endswith("Stopped.")
    assert page("return explorer.run.steps.length") < 40
    assert page("return calls") == 0


@slow_in_browser
def test_an_answer_is_written_to_its_end(page):
    """A question needs 43 tokens. An answer that is cut at the bound says so."""
    page.open("ministral3", is_new=True)
    assert page.text("write") == "Write 40 tokens"
    page("""const list = document.getElementById("example");
        list.value = "2";
        list.dispatchEvent(new Event("change"));""")
    page.wait("!explorer.busy && explorer.run.source.mode === 'chat'")
    assert page.text("write") == "Write the answer (up to 100 tokens)"
    page.write(*page.prompt(), temperature=0)
    page.press("write")
    assert re.search(r"^Wrote 43 tokens, .* The model has ended its text\.$", page.text("status"))
    page.write("x", "chat", temperature=5, top_k=0, top_p=1)  # the end is one token of 1,000
    page.press("write")
    assert page.text("status").startswith("Wrote 100 tokens; ")
    assert page.text("status").endswith(" The answer is not finished; press again.")
    page("""const { postMessage } = Worker.prototype;
        Worker.prototype.postMessage = function (data) {
            Worker.prototype.postMessage = postMessage;
            this.postMessage({ ...data, message: { ...data.message, generate: 5 } });
        };
        explorer.run.help.answer({ text: "What is 247 + 385?", mode: "chat", images: [] })""")
    page.wait()
    end = "Answered with 5 tokens. The answer is not finished; “Write the answer” goes on."
    assert page.text("status") == end


@slow_in_browser
def test_the_progress_of_a_long_text(page):
    page.open("ministral3", is_new=True)
    page("""globalThis.said = [];
        const status = document.getElementById("status");
        const stop = document.getElementById("stop");
        const note = () => said.push([status.textContent, stop.hidden]);
        new MutationObserver(note).observe(status, { childList: true });""")
    page.write("be " * 60)
    page.press("read")
    layers = [[f"Reading all for the views: {layer} of 7 layers ...", True] for layer in range(1, 8)]
    assert page("return said.splice(0)")[1:-1] == layers
    page.write("To " * 70)
    page.press("next")
    read = len(page.ids()) - 1
    tokens = [[f"Reading: {done} of {read} tokens ...", False] for done in range(0, read - 1, 64)]
    words = page("return said")
    assert words[: len(tokens) + 2] == [["Writing ...", False], *tokens, ["Writing ...", False]]


@slow_in_browser
def test_a_map_asks_for_the_theme_once(page):
    """Not for each cell: the maps of a text of 480 tokens have 13 million."""
    page.open("ministral3")
    asked = page("""const { matchMedia } = globalThis;
        let asked = 0;
        globalThis.matchMedia = (query) => { asked += 1; return matchMedia(query); };
        const canvas = document.createElement("canvas");
        explorer.run.help.heat(canvas, { rows: 9, columns: 9, value: () => 0.5, cells: true });
        globalThis.matchMedia = matchMedia;
        return asked""")
    assert 1 <= asked <= 2


@slow_in_browser
def test_few_digits_do_not_hide_a_setting(page):
    page.open("ministral3")
    found = page("return arguments[0].map((share) => exactPercent(share))", [0.0001, 0.9, 0.9995, 0])
    assert found == [f"0.01{PERCENT}", f"90{PERCENT}", f"99.95{PERCENT}", f"0{PERCENT}"]


@slow_in_browser
def test_the_query_scale_is_said_where_it_acts(page):
    page.open("ministral3", is_new=True)
    page.open_view("attention")
    assert "query scale" not in page.content()
    page.write("be " * 257)
    page.press("read")
    config = load_model(MODELS["ministral3"], torch.float32).config.get_text_config()
    scale = YarnRotaryEmbedding(config)(torch.zeros(1), torch.tensor([[256]]))[2]
    page("select({ query: 256 })")
    assert f"the query scale of its position 256, {scale.item():.4f}. " in page.content()
    page("select({ query: 255 })")
    assert "query scale" not in page.content()


@slow_in_browser
def test_what_is_chosen_while_the_model_writes(page):
    """A second press does nothing. Another example or a question ends the text, and is read."""
    page.open("ministral3", is_new=True)
    when_a_token_appears(page, "document.getElementById('write').click()")
    page.press("write")
    assert page.text("status").startswith("Wrote 40 tokens; ") and page.errors() == []
    choose = """const list = document.getElementById("example");
        list.value = "2";
        list.dispatchEvent(new Event("change"));"""
    when_a_token_appears(page, choose)
    page.press("write")
    assert page.text("status").startswith("Read ") and "385" in page.prompt()[0]
    assert page("return explorer.run.source.text") == page.prompt()[0]
    page.open_view("image")
    when_a_token_appears(page, "document.querySelector('#view button.primary').click()")
    page.press("write")
    assert page.text("status").startswith("Answered with ") and page.errors() == []


@slow_in_browser
def test_one_thing_is_not_written_as_many(page):
    page.open("ministral3", is_new=True)
    page.open_view("tokens")
    page.write("x")
    page.press("read")
    assert page.contents(".fact")[:2] == ["2 tokens", "1 byte of text (UTF-8)"]
    page.write("")
    page.press("read")
    assert page.contents(".fact")[0] == "1 token" and len(page.contents(".fact")) == 3  # no mean of no tokens


@slow_in_browser
def test_the_bytes_of_the_cache_can_be_computed(page):
    """The card gives the bytes of a token, and says that a sliding layer keeps no more than its window."""
    page.open("ministral", is_new=True)
    page.open_view("sizes")
    card = page.contents(".state-card")[1]
    assert "1.0 kB for a token in all layers. A sliding layer keeps 64 tokens at most. " in card
    page.open("ministral3", is_new=True)
    page.open_view("sizes")
    assert "1.8 kB for a token in all layers. At 4,096 " in page.contents(".state-card")[1]


@slow_in_browser
def test_sampling_shows_what_filter_logits_does(page):
    page.open("ministral3", is_new=True)
    settings = {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.05}
    page.write(*page.prompt(), **settings)
    page.open_view("sampling")
    page("select({query: 19})")
    page.wait("document.querySelectorAll('#view tbody tr').length > 5")
    logits = logits_at(page, 18)
    stages = [logits.softmax(-1)]
    for names in (["temperature"], ["temperature", "top_k"], ["temperature", "top_k", "top_p"], settings):
        filtered = filter_logits(logits, Sampling(**{name: settings[name] for name in names}))
        stages.append(filtered.softmax(-1))
    before, after = stages[0], stages[-1]
    tokenizer = Tokenizer.from_dir(MODELS["ministral3"])
    rows = page("""return [...document.querySelectorAll("#view tbody tr")]
        .map((row) => [...row.children].map((cell) => cell.innerText))""")
    for place, id in enumerate(before.argsort(descending=True)[:14].tolist()):
        _, token, *shares, fate = rows[place]
        assert token.replace("·", " ").replace("↵", "\n") == tokenizer.decode([id])
        assert shares == [percent(stage[id].item()) for stage in stages]
        assert fate.startswith("kept" if after[id] > 0 else "cut by ")
    assert any(row[-1].startswith("cut") for row in rows)
    most = stages[3].max().item()
    words = ["The softmax of the logits.", "Divides the logits by 1.5. Likely tokens lose to the others.",
             "Keeps the 20 most likely.", f"Keeps the most likely, until they reach 80{PERCENT} together.",
             f"Cuts what is below 0.05{TIMES}{percent(most)} (the first) = {most * 5:.3g}{PERCENT}."]  # fmt: skip
    left = [f"{int((stage > 0).sum()):,} tokens stay." for stage in stages]
    assert page.contents(".funnel span") == [line for pair in zip(words, left) for line in pair]
    assert len(page.contents(".fill")) == sum(text != percent(0) for row in rows for text in row[2:-1])


@slow_in_browser
def test_sampling_shows_the_choice_of_the_token_that_has_just_appeared(page):
    page.open("ministral3", is_new=True)
    page.open_view("sampling")
    drawn = "return [...document.querySelectorAll('#view tr.chosen th')].map((token) => token.textContent)"
    last = "return explorer.run.help.tokenLabel(explorer.run.tokens.length - 1)"
    assert page.content("#view h3") == "The next token (position 20), not drawn yet"
    for position in (20, 21):
        page.press("next")
        token = page(last)
        assert page.content("#view h3") == f"How {token} (position {position}) was drawn"
        assert page(drawn) == [token] and f"{token}” was drawn" in page.content()
    page.press_in_view("Choice after →")
    page.wait()
    assert page.content("#view h3") == "The next token (position 22), not drawn yet" and page(drawn) == []
    for heading in ("How ", "How ", "How likely ·not (position 19) was in the prompt"):
        page.press_in_view("← Choice before")
        page.wait()
        assert page.content("#view h3").startswith(heading)
    page("select({ query: 0 })")
    assert "every text begins with it" in page.content()


@slow_in_browser
def test_numbers_that_are_not_supported(page):
    page.open("ministral3", is_new=True)
    page.open_view("sampling")
    enter = """const input = document.getElementById(arguments[0]);
        input.value = arguments[1];
        input.dispatchEvent(new Event("input", { bubbles: true }))"""
    cases = {
        "temperature": ("-1", f"temperature: {MINUS}1; supported: from 0 to 5"),
        "top_k": ("2.5", "top-k: 2.5; supported: whole numbers from 0 on"),
        "top_p": ("", "top-p: no number; supported: from 0 to 1"),
        "seed": ("-3", f"seed: {MINUS}3; supported: whole numbers from 0 to 4,294,967,295"),
    }
    for field, (value, words) in cases.items():
        before = page(f"return document.getElementById('{field}').value")
        page(enter, field, value)
        assert page.text("complaint") == f"{words}. Until you change it, {before} counts."
        page.click("next")
        assert page.text("status") == "Nothing was written: a setting is not supported."
        assert page(f"return document.getElementById('{field}').ariaInvalid") == "true"
        page(enter, field, before)
        assert page.text("complaint") == ""
    page(enter, "temperature", "0.85")  # between the steps of the arrows
    assert page.text("complaint") == ""
    page.click("next")
    page.wait()
    assert len(page.ids()) == 21 and page("return explorer.run.steps[0].settings.temperature") == 0.85


@slow_in_browser
def test_the_list_of_examples_and_the_legend_follow_the_text(page):
    page.open("ministral", is_new=True)
    shown = "return document.getElementById('example').selectedOptions[0].textContent"
    assert page(shown) == "A hidden key" and "Underlined" not in page.text("legend")
    text, _ = page.prompt()
    enter = """const prompt = document.getElementById("prompt");
        prompt.value = arguments[0];
        prompt.dispatchEvent(new Event("input"))"""
    page(enter, "What is the key?")
    assert page(shown) == "Your own text"
    page(enter, text)
    assert page(shown) == "A hidden key"
    page("document.querySelector('input[name=mode][value=text]').click()")
    assert page(shown) == "Your own text"
    page.write("What is the key?", "chat", temperature=0)
    page.press("write")
    assert page.text("status").startswith("Wrote 11 tokens, </s> included; ")
    assert page.text("legend").endswith("Underlined: written by the model.")
    page.open_view("mistakes")
    page("document.querySelector('input[value=no_cache]').click()")
    page.wait("document.querySelector('.state-text') !== null")
    assert "The text is the same. To write 11 tokens, </s> included, the model " in page.content(".state-lead")
    assert "Both write the same 11 tokens, </s> included. " in page.content()


@slow_in_browser
def test_the_way_to_the_python_lines_and_back(page):
    page.open("ministral")
    page.open_view("attention")
    focused = "return document.activeElement.id"
    page.press_in_view("Show the Python lines (in “Sizes and code”)")
    assert page("return explorer.view") == "sizes" and page(focused) == "back"
    assert page.text("back") == "← Back to “Attention”"
    page.click("back")
    assert page("return explorer.view") == "attention" and page(focused) == "tab-attention"
    page("explorer.run.help.showCode('logits')")
    page("const tab = document.getElementById('tab-tokens'); tab.focus(); tab.click()")
    assert page("return document.getElementById('back').hidden") and page(focused) == "tab-tokens"


@slow_in_browser
@pytest.mark.parametrize("name", MODELS)
def test_attention_opens_on_a_cell_that_shows_something(page, name):
    page.open(name, is_new=True)
    page.open_view("attention")
    share = """const { layer, head, query, key } = explorer.run.selected;
        const { shape: [, , S], data } = explorer.run.trace[`layers.${layer}.attention.probabilities`];
        return data[(head * S + query) * S + key]"""
    assert page(share) > 0.7
    page("select({ query: 9 })")  # with the key that it looks at most
    assert "the highest score of this query" in page.text("readout")
    legend = "W: a window of 64 tokens. full: all earlier tokens."
    assert (legend in page.content(".heads")) == (name == "ministral")


@slow_in_browser
def test_one_style_of_numbers(page):
    page.open("ministral")
    found = page("const { number } = explorer.run.help; return arguments[0].map((x) => number(x))",
                 [0, 10873, 0.5, -7.1114, 0.00012345, -1234567, 999.99])  # fmt: skip
    found = [text.replace("\N{NO-BREAK SPACE}", " ").replace(MINUS, "-") for text in found]
    assert found == ["0", "10,870", "0.5000", "-7.111", "1.234 · 10⁻⁴", "-1.235 · 10⁶", "1,000"]
    shares = [0, 0.0004, 0.25, 1]
    found = page("return arguments[0].map(explorer.run.help.percent)", shares)
    assert found == [percent(share) for share in shares]


@slow_in_browser
def test_nothing_is_cut_off_or_hidden(page):
    """Tokens in the cards of Layers; tabs and settings at the tour's second stop on a phone; hidden cells in dark."""
    page.open("ministral3", is_first_visit=True)
    page.open_view("layers")
    assert page("""return [...document.querySelectorAll(".guesses .label")].every((label) => {
        label.textContent = "·GENTLEMAN"; // as long as tokens of the bundled models are
        return label.scrollWidth <= label.clientWidth;
    })""")
    screenshots.resize(page.driver, 360, 640)
    page.wait("innerWidth === 360")
    page.click("tour-next")
    box = """const box = document.getElementById(arguments[0]).getBoundingClientRect();
        return [box.top, box.bottom, box.left, box.right]"""
    page.wait("document.querySelector('#view h3') !== null")
    for setting in ("temperature", "seed"):
        assert page(box, setting)[0] > 0 and page(box, setting)[1] < page(box, "tour")[0]
    for view in VIEWS:
        assert page(box, f"tab-{view}")[2] >= 0 and page(box, f"tab-{view}")[3] <= 360
    page.resize(1280)
    page.click("tour-skip")
    page.open_view("attention")
    page("document.documentElement.dataset.theme = 'dark'; select({})")
    colour = """const { backgroundColor } = getComputedStyle(document.querySelector(arguments[0]));
        return backgroundColor.match(/\\d+/g).map(Number)"""
    future, nothing = page(colour, ".swatch.future"), page(colour, ".swatch")
    assert sum(abs(a - b) for a, b in zip(future, nothing)) >= 60
    page("delete document.documentElement.dataset.theme; select({})")


@needs_browser
@pytest.mark.filterwarnings("default:config.json")  # a note of the command
def test_nothing_of_a_model_or_a_prompt_is_executed(page, tmp_path):
    evil = f'<img src=x onerror="{PWNED}">'
    model = copy_of(MODELS["ministral3"], tmp_path).rename(tmp_path / f"<img src=x onerror={PWNED}>")
    tekken = json.loads((model / "tekken.json").read_text())
    tekken["special_tokens"][20]["token_str"] = evil
    script = f"</script><script>{PWNED}</script>"
    for rank in range(256, len(tekken["vocab"])):  # every token but single bytes
        text = f"{evil}{script}{rank}"
        encoded = base64.b64encode(text.encode()).decode()
        tekken["vocab"][rank] = {"rank": rank, "token_bytes": encoded, "token_str": text}
    (model / "tekken.json").write_text(json.dumps(tekken))
    weights = load_file(model / "model.safetensors")
    single_bytes = len(tekken["special_tokens"]) + 256
    weights["model.language_model.embed_tokens.weight"][:single_bytes] = 0  # so that it writes other tokens
    (model / "model.safetensors").unlink()  # a link
    save_file(weights, model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": [script], "__proto__": {"hidden_size": 1}, evil: evil}
    (model / "config.json").write_text(json.dumps(config))
    output = tmp_path / "evil.html"
    assert main(["--model", str(model), "--prompt", PROMPT, "-o", str(output)]) == 0
    page.pages["evil"] = output.as_uri()
    page.open("evil")
    page("""globalThis.violations = 0;
        document.addEventListener("securitypolicyviolation", () => { violations += 1; });""")
    page.press("write")
    for view in page.views():
        page.open_view(view)
        page.wait()
        assert page("return document.querySelectorAll('img, iframe, object, embed, main script').length") == 0, view
    assert page("return document.getElementById('prompt').value.startsWith(arguments[0])", PROMPT[:-1])
    assert page("return window.pwned ?? null") is None and page("return violations") == 0
    assert page.text("title") == model.name
    strip = page("return [...document.querySelectorAll('.token')].map((token) => token.textContent).join('')")
    assert "</script><script>window.pwned" in strip.replace("·", " ")  # the prompt
    assert f"{evil}{script}" in strip.replace("·", " ")  # written tokens
    page("""explorer.run.ask({ kind: "name", ids: [20] }).then(({ tokens: [token] }) => {
        globalThis.named = explorer.run.help.labelOf(token); })""")
    page.wait("globalThis.named !== undefined")
    assert page("return named") == evil  # a special token


@slow_in_browser
def test_the_policy_forbids_requests_and_scripts(page):
    page.open("ministral3")
    page(f"""
        globalThis.blocked = [];
        document.addEventListener("securitypolicyviolation", (event) => blocked.push(event.effectiveDirective));
        fetch("http://127.0.0.1:9/").catch(() => 0);
        new Image().src = "http://127.0.0.1:9/";
        const script = document.createElement("script");
        script.textContent = "{PWNED}";
        document.body.append(script);
        document.body.append(Object.assign(document.createElement("iframe"), {{ src: "http://127.0.0.1:9/" }}));""")
    page.wait("blocked.length >= 4")
    assert page("return blocked.sort()") == ["connect-src", "frame-src", "img-src", "script-src-elem"]
    assert page("return window.pwned ?? null") is None
    page.errors()  # they say the same


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), pytest.param(360, "dark", marks=pytest.mark.slow)])
def test_axe_finds_nothing(page, width, scheme):
    axe = pytest.importorskip("axe_core_python", reason="needs axe-core-python")
    script = (Path(axe.__path__[0]) / "axe.min.js").read_text(encoding="utf-8")
    page.resize(width)
    screenshots.set_scheme(page.driver, scheme)
    page.open("ministral3", is_first_visit=True)
    page.wait("!document.getElementById('tour').hidden")
    rules = "undefined"
    if scheme == "dark":
        rules = "['color-contrast', 'scrollable-region-focusable']"  # others depend on neither colours nor width
    found = {"tour": page.violations(script, rules=rules)}
    page.click("tour-skip")
    for view in page.views():
        page.open_view(view)
        found[view] = page.violations(script, rules=rules)
    page.resize(1280)
    screenshots.set_scheme(page.driver, "light")
    assert {view: violations for view, violations in found.items() if violations} == {}


@slow_in_browser
def test_widths_and_sizes_of_text(page):
    page.open("ministral3")
    smallest = """const isText = ({ nodeType, data }) => nodeType === 3 && data.trim() !== "";
        const hasText = (element) => element.checkVisibility() && [...element.childNodes].some(isText);
        const shown = [...document.querySelectorAll("body *")].filter(hasText);
        return Math.min(...shown.map((element) => parseFloat(getComputedStyle(element).fontSize)));"""
    for width in (360, 700, 1920):
        page.resize(width)
        for view in page.views():
            page.open_view(view)
            assert page("return document.documentElement.scrollWidth") <= width, (view, width)
            assert page(smallest) >= 12, view
    page.resize(1280)


@slow_in_browser
def test_the_keyboard_alone(page):
    """Tab reaches everything; arrows choose tabs, tokens, heads and cells; the focus stays where it was."""
    from selenium.webdriver import ActionChains, Keys

    page.open("ministral3")
    page.open_view("attention")
    page("document.getElementById('prompt').value = 'To be, or not'; document.getElementById('prompt').focus()")
    ActionChains(page.driver).key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
    page.wait("explorer.run.tokens.length === 6 && !explorer.busy")
    active = "const { id, className, textContent } = document.activeElement; return id || className || textContent"
    reached = []
    for _ in range(40):
        page.keys(Keys.TAB)
        reached.append(page(active))
        if reached[-1].startswith("tab-"):
            break
    assert [name for name in reached if name in ("read", "next", "write", "temperature", "seed")] \
        == ["read", "next", "write", "temperature", "seed"]  # fmt: skip
    assert reached[-2].startswith("token")
    assert reached[-1] == "tab-attention"
    page.keys(Keys.ARROW_LEFT)
    assert page(active) == "tab-sampling" and page("return explorer.view") == "sampling"
    page.keys(Keys.ARROW_RIGHT, Keys.TAB)
    assert page(active) == "panel"
    page.keys(Keys.TAB)
    assert page(active) == "large-map"
    before = page("return { ...explorer.run.selected }")
    page.keys(Keys.ARROW_UP, Keys.ARROW_LEFT)
    after = page("return { ...explorer.run.selected }")
    assert (after["query"], after["key"]) == (before["query"] - 1, before["key"] - 1) and page(active) == "large-map"
    for _ in range(10):
        page.keys(Keys.TAB)
        if page("return document.activeElement.dataset.head !== undefined"):
            break
    page.keys(Keys.HOME, Keys.ARROW_DOWN)
    head = page("return document.activeElement.dataset.head")
    assert head == page("const { layer, head } = explorer.run.selected; return `${layer}.${head}`")
    assert head == f"{before['layer'] + 1}.{before['head']}"
    page("document.querySelector('#strip [aria-selected=true]').focus()")
    page.keys(Keys.HOME)
    assert page("return [explorer.run.selected.query, document.activeElement.textContent]") == [0, "<s>"]


@slow_in_browser
def test_the_tour_of_a_first_visit(page):
    from selenium.webdriver import Keys

    page.open("ministral3", is_first_visit=True)
    page.wait("!document.getElementById('tour').hidden")
    assert page.text("tour-count") == "Stop 1 of 6"
    views = []
    for _ in range(6):
        views.append(page("return explorer.view"))
        page.click("tour-next")
    assert views == ["tokens", "sampling", "attention", "layers", "cache", "mistakes"]
    assert page("return document.getElementById('tour').hidden")
    page.driver.refresh()
    page.wait()
    assert page("return document.getElementById('tour').hidden")  # not a second time
    page.click("start-tour")
    assert page("return document.activeElement.id") == "tour"
    page.keys(Keys.ESCAPE)
    assert page("return document.getElementById('tour').hidden")
    assert page("return document.activeElement.id") == "start-tour"
