"""Text <-> ids: equal to mistral-common on its own vocabularies and on the bundled one; decoding inverts encoding."""

import inspect
import json
import random
import warnings
from pathlib import Path

import mistral_common
import pytest
import transformers
from hypothesis import given, strategies as st
from mistral_common.integrations.chat_templates.chat_templates import generate_chat_template
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from PIL import Image
from tokenizers import AddedToken, Regex, decoders, pre_tokenizers

from chat import encode_messages
from model_types import BUNDLED, BUNDLED_2410, load_model
from tokenizer import SPLIT, VERSIONS, TextStream, Tokenizer, bpe, from_tekken, read_chat_template
from training import corpus
from training.vocabulary import SPECIALS, as_v3, learn
from vision import Mistral3Config, PixtralVisionConfig

PUBLISHED = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
OLDER = PUBLISHED.with_name("tekken_240718.json")

texts = st.one_of(
    st.text(),
    st.text(alphabet=st.sampled_from("aAbB zZ09 \n\t\r.,'!/-_éßǅ日本語テ😀\u0301\u200d\x00\ufeff")),
    st.text(st.characters(categories=("Cs", "Cc", "Cf", "Zs", "Ll"))),  # halves of surrogate pairs, control characters
    st.builds(lambda blanks, text: " " * blanks + text, st.integers(0, 300), st.text(max_size=3)),
    st.lists(
        st.sampled_from(["</s>", "[INST]", "<s>", " the", "don't", "  ", "\n\n", "def f(x):\n    return x", "eBay"])
    ).map("".join),
)


FILES = [directory / "tekken.json" for directory in (BUNDLED, BUNDLED_2410)] + [OLDER, PUBLISHED]


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.parent.name + " " + path.stem)
def both(request):
    """Our tokenizer and mistral-common's for the same tekken.json."""
    return Tokenizer(from_tekken(json.loads(request.param.read_text()))), Tekkenizer.from_file(request.param)


@pytest.fixture(scope="module")
def published():
    return Tokenizer(from_tekken(json.loads(PUBLISHED.read_text())))


@given(text=texts)
def test_ids_equal_mistral_common(both, text):
    ours, theirs = both
    ids = ours.encode(text)
    assert ids == theirs.encode(text, bos=True, eos=False)
    assert ours.encode(text, bos=False) == ids[1:]
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert ours.decode(ids) == text
    assert b"".join(map(ours.id_to_bytes, ids)) == text.encode()


@given(st.lists(st.integers(0, 2303), max_size=30))
def test_decoding_any_ids_never_fails_and_streams_the_same(ids):
    """Also ids in the middle of characters. The stream returns whole characters; together they are the decoded text."""
    tokenizer = Tokenizer.from_dir(BUNDLED)
    stream, pieces = TextStream(tokenizer), []
    for i in ids:
        pieces.append(stream.push(i))
    pieces.append(stream.close())
    assert "".join(pieces) == tokenizer.decode(ids)


def test_a_stream_never_cuts_a_character():
    tokenizer = Tokenizer.from_dir(BUNDLED)
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in tokenizer.encode("é日😀", bos=False)]
    assert pieces == ["", "é", "", "", "日", "", "", "", "😀"] and stream.close() == ""
    assert stream.push(tokenizer.encode("日", bos=False)[0]) == "" and stream.close() == "\ufffd"


def test_special_tokens_are_mistrals(both):
    ours, theirs = both
    assert ours.vocab_size == theirs.n_words
    for name, i in list(ours.special_tokens.items())[:20]:
        assert theirs.id_to_piece(i) == name and theirs.get_special_token(name) == i
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 11)
    assert ours.special_tokens["[INST]"] == 3 and ours.special_tokens["[IMG]"] == 10
    assert ours.decode([1, 3, 4, 2]) == "" and ours.decode([1, 2], skip_special_tokens=False) == "<s></s>"


def test_known_ids(published):
    """Worked examples on the published vocabulary; the last two are text of Transformers' Pixtral processor test."""
    for text, ids in (
        ("Hello, world!", [22177, 1044, 4304, 1033]),
        ("My favourite condiment is ", [6720, 52062, 3328, 2858, 1395, 1032]),
        ("a1234b", [1097, 1049, 1050, 1051, 1052, 1098]),
        ("日本語テスト", [10008, 15199, 7282, 13854]),
        ("Ünïcödé naïve 😀", [39453, 1110, 105678, 29487, 1337, 98355, 119685, 1152, 1128]),
        ("'The'", [1039, 1784, 1039]),
        ("x[/INST]y</s>", [1120, 1091, 1047, 3174, 3074, 1093, 1121, 1885, 1115, 1062]),
        ("  leading", [1032, 8924]),
        ("don't I'll", [21797, 2405, 1362, 7534]),
        ("foo_bar();//\n", [20182, 50442, 8637, 15308]),
        ("USER: ", [21510, 1058, 1032]),
        (
            "\nWhat's the content of the image? ASSISTANT:",
            [1010, 7493, 1681, 1278, 4701, 1307, 1278, 3937, 1063, 1349, 4290, 16002, 41150, 1058],
        ),
    ):
        assert published.encode(text, bos=False) == ids


@pytest.mark.parametrize(
    "sizes, question, asked",
    [
        ([(876, 1300)], "content of the image", [4701, 1307, 1278, 3937]),
        ([(876, 1300), (480, 640)], "difference between these two images", [6592, 2396, 2576, 2295, 8061]),
    ],
)
def test_known_ids_around_images(published, sizes, question, asked):
    """Those of Transformers' processor test for Mistral3, here within [INST] and [/INST]."""
    config = Mistral3Config(PixtralVisionConfig(patch_size=6, image_size=30), spatial_merge_size=2)
    images = [{"type": "image", "image": Image.new("RGB", (width, height))} for height, width in sizes]
    begin, end = ({"type": "text", "text": text} for text in ("USER: ", f"\nWhat's the {question}? ASSISTANT:"))
    ids, pixels, _ = encode_messages([{"role": "user", "content": [begin, *images, end]}], published, config)
    seen = [10, 10, 10, 12, 10, 10, 10, 13] * len(sizes)
    rest = [1010, 7493, 1681, 1278, *asked, 1063, 1349, 4290, 16002, 41150, 1058]
    assert ids[0].tolist() == [1, 3, 21510, 1058, 1032, *seen, *rest, 4]
    assert pixels.shape == (len(sizes), 3, 24, 36)


def test_tokenizer_json_gives_the_same_ids(tmp_path):
    """The same vocabulary from `tokenizer.json`, written by the tokenizers library, here and in Transformers."""
    tokenizer = Tokenizer.from_dir(BUNDLED)
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer.from_dir(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    text = corpus.load()["validation"][0][:5000]
    ids = tokenizer.encode(text, bos=False)
    assert again.encode(text, bos=False) == ids == theirs.encode(text, add_special_tokens=False)
    assert again.special_tokens == tokenizer.special_tokens
    assert again.encode("</s>", bos=False) == tokenizer.encode("</s>", bos=False) != [2]


def test_tokenizer_json_files_that_are_refused(tmp_path):
    """Those that truncate or pad prompts silently, and those that are not byte-level BPE."""
    tokenizer, text = Tokenizer.from_dir(BUNDLED), "To be, or not to be, that is the question"
    ids = tokenizer.encode(text)
    tokenizer.backend.enable_truncation(5)
    tokenizer.backend.enable_padding(length=50)
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_dir(tmp_path).encode(text) == ids
    tokenizer.backend.decoder = decoders.Metaspace()
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"decoder is Metaspace; allowed: ByteLevel.*transformers\.AutoTokenizer"):
        Tokenizer.from_dir(tmp_path)


def test_added_tokens_that_are_not_special():
    backend = from_tekken(json.loads((BUNDLED / "tekken.json").read_text()))
    backend.add_tokens(["日本"])
    tokenizer = Tokenizer(backend)
    assert tokenizer.decode(tokenizer.encode("x日本y")) == "x日本y"


def test_an_id_that_only_the_model_has_is_shown_as_unknown():
    stream = TextStream(Tokenizer.from_dir(BUNDLED))
    assert stream.push(2304) + stream.close() == "\ufffd"


def test_control_tokens_added_as_ordinary_ones_are_control_tokens(tmp_path):
    """Otherwise they would be recognised in the text of users."""
    Tokenizer.from_dir(BUNDLED).backend.save(str(tmp_path / "tokenizer.json"))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.special_tokens == Tokenizer.from_dir(BUNDLED).special_tokens
    text = "x</s>[INST]"
    assert tokenizer.encode(text) == Tokenizer.from_dir(BUNDLED).encode(text)


def test_ids_beyond_the_vocabulary():
    tokenizer = Tokenizer.from_dir(BUNDLED)
    tokenizer.backend.add_special_tokens(["[EXTRA]"])
    again = Tokenizer(tokenizer.backend)
    assert again.vocab_size == 2305 and again.special_tokens["[EXTRA]"] == 2304
    with pytest.raises(ValueError, match="id -1 is not in the vocabulary"):
        tokenizer.decode([-1])


def test_tekken_is_preferred(tmp_path):
    (tmp_path / "tekken.json").write_text((BUNDLED / "tekken.json").read_text())
    (tmp_path / "tokenizer.json").write_text("{}")
    assert Tokenizer.from_dir(tmp_path).vocab_size == 2304


@pytest.mark.parametrize("directory, form", [(BUNDLED, dict), (BUNDLED_2410, as_v3)], ids=["V13", "V3"])
def test_the_bundled_vocabularies_have_the_form_that_training_learns(directory, form):
    """All but the words, which depend on what the model was trained on."""
    bundled = json.loads((directory / "tekken.json").read_text())
    learned = form(learn(corpus.load()["train"][:1], 320))
    assert bundled.get("special_tokens") == learned.get("special_tokens")
    assert bundled["vocab"][:256] == learned["vocab"][:256]
    sizes = {"num_vocab_tokens": len(bundled["vocab"]), "default_vocab_size": len(bundled["vocab"]) + SPECIALS}
    assert bundled["config"] == learned["config"] | sizes
    assert Tokenizer.from_dir(directory).vocab_size == load_model(directory).config.get_text_config().vocab_size


def test_the_pattern_is_mistrals():
    assert json.loads(PUBLISHED.read_text())["config"]["pattern"] == SPLIT


GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def by_expressions(*expressions):
    return pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(e), "isolated") for e in expressions), BYTE_LEVEL])


@pytest.mark.parametrize(
    "before, repaired",
    [
        (by_expressions(GPT4), by_expressions(SPLIT)),
        (by_expressions("x{3}", GPT4), by_expressions("x{3}", SPLIT)),
        (pre_tokenizers.Sequence([by_expressions(GPT4)]), pre_tokenizers.Sequence([by_expressions(SPLIT)])),
    ],
)
def test_the_wrong_split_expression_is_repaired(tmp_path, published, before, repaired):
    """In tokenizer.json files converted by older libraries, in every place. The warning is given once."""
    right = published.encode("'The' eBay 12345")
    backend = type(published.backend).from_str(published.backend.to_str())
    backend.pre_tokenizer = before
    assert Tokenizer(backend).encode("'The'", bos=False) == [1039, 1084, 1268, 1039]
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.warns(UserWarning, match=r"tokenizer.json splits text by GPT-4's expression; Tekken's is used$"):
        tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.encode("'The' eBay 12345") == right
    assert tokenizer.backend.pre_tokenizer.__getstate__() == repaired.__getstate__()
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Tokenizer.from_dir(tmp_path).encode("'The' eBay 12345") == right


@pytest.mark.parametrize(
    "expression, inst",
    [(GPT4, "[OTHER]"), (GPT4.replace("{1,3}", ""), "[INST]"), (r"\w+|\W+", "[INST]"), (None, "[INST]")],
)
def test_other_split_expressions_are_kept(tmp_path, expression, inst):
    """A model of another family may have GPT-4's expression, as Llama 3 has. Mistral's may have another one, or
    none."""
    tekken = json.loads((BUNDLED / "tekken.json").read_text())
    names = [inst if name == "[INST]" else name for name in bpe.SPECIAL_TOKENS]
    tekken["special_tokens"] = [{"rank": i, "token_str": name} for i, name in enumerate(names)]
    backend = from_tekken(tekken)
    backend.pre_tokenizer = by_expressions(expression) if expression else BYTE_LEVEL
    backend.save(str(tmp_path / "tokenizer.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.backend.pre_tokenizer.__getstate__() == backend.pre_tokenizer.__getstate__()


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model directory with a tekken.json large enough to be cached, and a cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bpe, "CACHED_FROM", 1)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tekken.json").write_bytes((BUNDLED / "tekken.json").read_bytes())
    return tmp_path / "model"


def build_counter(monkeypatch):
    built = []
    monkeypatch.setattr(bpe, "from_tekken", lambda *given: built.append(1) or from_tekken(*given))
    return built


def test_a_vocabulary_is_built_once(model, monkeypatch):
    built, text = build_counter(monkeypatch), "'To be', or not\n to be é😀 </s>"
    first, second = Tokenizer.from_dir(model), Tokenizer.from_dir(model)
    assert len(built) == 1 and first.version == second.version == "v13"
    assert first.encode(text) == second.encode(text) and first.special_tokens == second.special_tokens
    assert [path.name for path in model.iterdir()] == ["tekken.json"]
    (cached,) = (model.parent / "cache" / "ministral").iterdir()
    tekken = json.loads((model / "tekken.json").read_text())
    tekken["config"]["version"] = "v3"  # another file, another entry
    (model / "tekken.json").write_text(json.dumps(tekken))
    assert Tokenizer.from_dir(model).version == "v3" and len(built) == 2
    assert len([*cached.parent.iterdir()]) == 2


def test_another_version_of_the_library_has_its_own_entry(model, monkeypatch):
    built = build_counter(monkeypatch)
    for version in ("0.1", "0.2", "0.1"):
        monkeypatch.setattr(bpe.tokenizers, "__version__", version)
        Tokenizer.from_dir(model)
    assert len(built) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-100],
        lambda content: content.replace(b"(?!", b"(?="),  # still a tokenizer
        lambda content: b"{}\n" + content,
        lambda content: bytes(100) + content,
    ],
)
def test_a_damaged_cache_is_built_again(model, monkeypatch, damage):
    tokenizer = Tokenizer.from_dir(model)
    (cached,) = (model.parent / "cache" / "ministral").iterdir()
    content = cached.read_bytes()
    assert damage(content) != content
    cached.write_bytes(damage(content))
    built = build_counter(monkeypatch)
    assert Tokenizer.from_dir(model).encode("the cat") == tokenizer.encode("the cat")
    assert len(built) == 1 and cached.read_bytes() == content


def test_a_cache_that_cannot_be_written(model, monkeypatch):
    """A file instead of the folder; no home directory; a relative path, which the standard forbids."""
    (model.parent / "cache").write_text("in the way")
    ids = Tokenizer.from_dir(BUNDLED).encode("the cat")
    assert Tokenizer.from_dir(model).encode("the cat") == ids
    monkeypatch.chdir(model)
    for folder in ("relative", "~nobody-of-this-name/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", folder)
        assert Tokenizer.from_dir(model).encode("the cat") == ids
    assert [path.name for path in model.iterdir()] == ["tekken.json"]


def test_small_vocabularies_are_not_cached(model, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(model.parent / "cache"))
    Tokenizer.from_dir(model)
    assert not (model.parent / "cache").exists()
    assert (model / "tekken.json").stat().st_size < bpe.CACHED_FROM < PUBLISHED.stat().st_size


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("config"),
        lambda t: t.pop("vocab"),
        lambda t: t["vocab"].pop(),
        lambda t: t["config"].pop("pattern"),
        lambda t: t["config"].update(pattern="(("),
        lambda t: t["vocab"][3].update(token_bytes="?"),
        lambda t: t.update(special_tokens=[{"rank": i, "token_str": "a"} for i in range(2)]),
        lambda t: t.update(special_tokens=[{"rank": 0, "token_str": "the"}]),
        lambda t: t["config"].update(default_num_special_tokens="20"),
        lambda t: t["vocab"][300].update(token_bytes=t["vocab"][301]["token_bytes"]),
    ],
)
def test_broken_vocabularies_are_refused(tmp_path, change):
    tekken = json.loads((BUNDLED / "tekken.json").read_text())
    change(tekken)
    (tmp_path / "tekken.json").write_text(json.dumps(tekken))
    with pytest.raises(ValueError, match="is not a Tekken vocabulary"):
        Tokenizer.from_dir(tmp_path)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither tekken\.json nor tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        Tokenizer.from_dir(tmp_path)
    with pytest.raises(ValueError, match="id 2304 is not in the vocabulary; allowed: 0 to 2303"):
        Tokenizer.from_dir(BUNDLED).decode([2304])


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
MISTRALS = "{{ bos_token }}{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}"
HI = [{"role": "user", "content": "Hi"}]


def with_template(directory, place, template):
    """Write the bundled tokenizer.json and a chat template, in one of the places that it may have."""
    from_tekken(json.loads((BUNDLED / "tekken.json").read_text())).save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if place == "chat_template.jinja":
        (directory / place).write_text(template)
    elif place == "chat_template.json":
        (directory / place).write_text(json.dumps({"chat_template": template}))
    elif place == "named":
        other = {"name": "tool_use", "template": "other"}
        config["chat_template"] = [other, {"name": "default", "template": template}]
    else:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


PLACES = ["chat_template.jinja", "chat_template.json", "tokenizer_config.json", "named"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("template", [CHATML, "### {{ messages[0].content }}"], ids=["chatml", "alpaca"])
def test_another_chat_layout_is_refused(tmp_path, place, template):
    """In every place of the template. Plain text works, and with a given version Mistral's layout is used."""
    tokenizer = Tokenizer.from_dir(with_template(tmp_path, place, template))
    file = "tokenizer_config.json" if place == "named" else place
    with pytest.raises(ValueError) as raised:
        tokenizer.encode_chat(HI)
    message = str(raised.value)
    assert message.startswith(f"the chat template in {tmp_path / file} has no [INST]") and "\n" not in message
    assert "supported: Mistral's. Plain text works (--raw" in message
    assert ("but <|im_start|>" in message) == (template is CHATML)
    assert tokenizer.decode(tokenizer.encode("Hi")) == "Hi"
    assert Tokenizer.from_dir(tmp_path, "v7").encode_chat(HI)[:2] == [1, 3]


@pytest.mark.parametrize("place", PLACES)
def test_the_template_is_the_one_that_transformers_reads(tmp_path, place):
    name, text = read_chat_template(with_template(tmp_path, place, MISTRALS))
    assert text == MISTRALS and (tmp_path / name).is_file()
    if place != "chat_template.json":  # which is for processors
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
        assert theirs.get_chat_template() == text
    assert Tokenizer.from_dir(tmp_path).encode_chat(HI)[:2] == [1, 3]
    (tmp_path / "chat_template.jinja").write_text("first")
    assert read_chat_template(tmp_path) == ("chat_template.jinja", "first")


def official_template(version, system=None):
    """Mistral's own chat template of a version. Older versions of mistral-common take fewer arguments."""
    arguments = (False, TokenizerVersion(version), True, False, version == "v13", system, False, True, None, None, None)
    return generate_chat_template(*arguments[: len(inspect.signature(generate_chat_template).parameters)])


def test_mistrals_own_templates_are_known(tmp_path):
    for version in VERSIONS:
        template = official_template(version)
        directory = with_template(tmp_path, "chat_template.jinja", template)
        assert Tokenizer.from_dir(directory).other_layout == ""


def test_another_chat_layout_is_recognised_by_its_tokens(tmp_path):
    """If there is no template. A template with [INST] has precedence; an empty one does not count."""
    backend = from_tekken(json.loads((BUNDLED / "tekken.json").read_text()))
    for special in (True, False):
        backend.add_tokens([AddedToken("<|im_start|>", special=special, normalized=False)])
        backend.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ValueError, match=r"the tokenizer of .* has the token <\|im_start\|>: this"):
            Tokenizer.from_dir(tmp_path).encode_chat(HI)
    config = tmp_path / "tokenizer_config.json"
    for empty in (None, "", [1], {}):
        config.write_text(json.dumps({"chat_template": empty}))
        assert read_chat_template(tmp_path) is None and Tokenizer.from_dir(tmp_path).other_layout
    config.write_text(json.dumps({"chat_template": MISTRALS}))
    assert Tokenizer.from_dir(tmp_path).other_layout == ""
    config.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer.from_dir(tmp_path)


def test_random_bytes_round_trip():
    rng, tokenizer = random.Random(0), Tokenizer.from_dir(BUNDLED)
    for _ in range(50):
        text = bytes(rng.randrange(256) for _ in range(40)).decode("utf-8", errors="replace")
        assert tokenizer.decode(tokenizer.encode(text)) == text


# ------------------------------------------------------------------------------------------------- hostile files


def edited(tmp_path, file, edit):
    """A directory with the bundled tekken.json or tokenizer.json, changed by a function."""
    content = json.loads((BUNDLED / file).read_text())
    edit(content)
    (tmp_path / file).write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t["config"].update(default_num_special_tokens=10**9), "default_num_special_tokens=10{9}; allowed"),
        (lambda t: t["config"].update(default_vocab_size=64.0), r"default_vocab_size=64\.0; allowed: a whole number"),
        (lambda t: t["special_tokens"][5].update(token_str=5), "a special token is named 5; allowed: text"),
        (lambda t: t["special_tokens"][5].update(token_str="\ud800x"), r"named '\\ud800x'; allowed: text"),
        (lambda t: t["special_tokens"][5].update(token_str="a\nb"), r"named 'a\\nb'; allowed: text"),
        (lambda t: t["config"].update(pattern="("), "the tokenizers library refuses it: Oniguruma error"),
        (lambda t: t["config"].update(pattern=5), "is not a Tekken vocabulary"),
        (lambda t: t.update(vocab=5), "is not a Tekken vocabulary"),
        (lambda t: t["config"].pop("pattern"), "is not a Tekken vocabulary: KeyError: 'pattern'"),
    ],
)
def test_a_damaged_tekken_is_refused_in_one_line(tmp_path, edit, message):
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_dir(edited(tmp_path, "tekken.json", edit))
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_a_panic_of_the_library_is_an_error(tmp_path):
    def backtrack(tekken):
        tekken["config"]["pattern"] = "(a+)+$"

    tokenizer = Tokenizer.from_dir(edited(tmp_path, "tekken.json", backtrack))
    with pytest.raises(ValueError, match="the tokenizers library refuses it: Onig: Regex search error"):
        tokenizer.encode("a" * 40 + "b")

    def charsmap(content):
        content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}

    (tmp_path / "tekken.json").unlink()
    with pytest.raises(ValueError, match="is not a tokenizer: the tokenizers library refuses it: Precompiled"):
        Tokenizer.from_dir(edited(tmp_path, "tokenizer.json", charsmap))


def test_an_expression_that_keeps_names_whole_makes_no_special_tokens(tmp_path):
    """The vocabulary has the names of special tokens as entries, and a piece that is an entry is looked up whole."""

    def whole(tekken):
        tekken["config"]["pattern"] = ".+"

    tokenizer = Tokenizer.from_dir(edited(tmp_path, "tekken.json", whole))
    for name in tokenizer.special_tokens:
        ids = tokenizer.encode(name, bos=False)
        assert tokenizer.decode(ids) == name
        assert not set(ids) & set(tokenizer.special_tokens.values())


def test_control_tokens_of_any_name_are_special(tmp_path):
    """Added tokens from id 0 on are control tokens, also if the file says that they are not special. Tokens that were
    added at the end, for a word of a user, stay what they are."""

    def ordinary(content):
        for token in content["added_tokens"]:
            token["special"] = False
            name = token["content"]
            if name.startswith("<SPECIAL_"):
                token["content"] = name.replace("<SPECIAL_", "[AUDIO_").replace(">", "]")
                content["model"]["vocab"][token["content"]] = content["model"]["vocab"].pop(name)
        word = {"id": 2304, "content": "<word>", "single_word": False, "lstrip": False, "rstrip": False}
        content["added_tokens"].append(word | {"normalized": False, "special": False})

    tokenizer = Tokenizer.from_dir(edited(tmp_path, "tokenizer.json", ordinary))
    added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    names = [token["content"] for token in added[:-1]]
    assert sum(name.startswith("[AUDIO_") for name in names) > 8
    ids = tokenizer.encode(" ".join(names), bos=False)
    assert not set(ids) & {token["id"] for token in added[:-1]}
    assert tokenizer.encode("<word>", bos=False) == [2304]
