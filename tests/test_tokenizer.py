"""Text <-> ids: equal to mistral-common on its own vocabularies and on the bundled one, and the inverse of itself."""

import copy
import json
import random
from pathlib import Path

import mistral_common
import numpy as np
import pytest
import transformers
from hypothesis import given, strategies as st
from mistral_common.exceptions import TokenizerException
from mistral_common.protocol.instruct.normalize import InstructRequestNormalizerV13
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.image import ImageEncoding
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV7
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from tokenizers import decoders

from generate import BUNDLED
from tokenizer import TextStream, Tokenizer, from_tekken
from training import corpus
from training.vocabulary import PATTERN, learn

PUBLISHED = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"

texts = st.one_of(
    st.text(),
    st.text(alphabet=st.sampled_from("aAbB zZ09 \n\t\r.,'!/-_éßǅ日本語テ😀\u0301\u200d\x00")),
    st.lists(
        st.sampled_from(["</s>", "[INST]", "<s>", " the", "don't", "  ", "\n\n", "def f(x):\n    return x", "eBay"])
    ).map("".join),
)


@pytest.fixture(scope="module", params=["bundled", "published"])
def both(request):
    """Our tokenizer and mistral-common's for the same tekken.json."""
    path = BUNDLED / "tekken.json" if request.param == "bundled" else PUBLISHED
    return Tokenizer(from_tekken(json.loads(path.read_text()))), Tekkenizer.from_file(path)


@given(text=texts)
def test_ids_equal_mistral_common(both, text):
    ours, theirs = both
    ids = ours.encode(text)
    assert ids == theirs.encode(text, bos=True, eos=False)
    assert ours.encode(text, bos=False) == ids[1:]
    assert ours.decode(ids) == text
    assert b"".join(map(ours.id_to_bytes, ids)) == text.encode()


TEXT_PART = texts.map(lambda text: {"type": "text", "text": text})
IMAGE_PART = st.just({"type": "image_url", "image_url": {"url": "a picture"}})
CONTENTS = {
    "system": st.one_of(texts, st.lists(TEXT_PART, max_size=3)),
    "user": st.one_of(texts, st.lists(st.one_of(TEXT_PART, IMAGE_PART), min_size=1, max_size=4)),
    "assistant": st.one_of(texts, st.lists(TEXT_PART, min_size=1, max_size=3)),
}
conversations = st.lists(
    st.sampled_from(["system", "user", "assistant"]).flatmap(
        lambda role: CONTENTS[role].map(lambda content: {"role": role, "content": content})
    ),
    max_size=6,
)


@given(messages=conversations, last=CONTENTS["user"])
def test_conversations_equal_mistral_common(both, messages, last):
    """Any order of roles, texts and pictures, id for id. (Without tools and thinking, versions 7 to 13 are one; the
    vocabularies at hand lack the special tokens of the later ones. Checks of the order of roles are left aside.)"""
    ours, theirs = both
    messages = [*messages, {"role": "user", "content": last}]
    request = ChatCompletionRequest(messages=copy.deepcopy(messages))
    request = InstructRequestNormalizerV13.normalizer().from_chat_completion_request(request)
    try:
        expected = InstructTokenizerV7(theirs, FixedImage()).encode_instruct(request)
    except TokenizerException as error:  # an assistant message without words
        assert "Invalid assistant message" in str(error)
        with pytest.raises(ValueError, match="an assistant message is empty"):
            ours.encode_chat(messages, lambda _: FixedImage.tokens)
        return
    assert ours.encode_chat(messages, lambda _: FixedImage.tokens) == expected.tokens


class FixedImage:
    """mistral-common's image encoder, without images."""

    tokens = (10, 10, 12, 10, 10, 13)

    def __call__(self, content):
        return ImageEncoding(tokens=list(self.tokens), image=np.zeros((3, 1, 1)))


def test_the_published_conversations():
    """Known ids of the 3B model, and pictures in every form of part."""
    tokenizer = Tokenizer(from_tekken(json.loads(PUBLISHED.read_text())))
    system, user = {"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "What is 2+2?"}
    ids = [1, 17, 31106, 27457, 1046, 18, 3, 7493, 1395, 1032, 1050, 1043, 1050, 1063, 4]
    assert tokenizer.encode_chat([system, user]) == ids
    for part in (
        {"type": "image", "image": "a"}, {"type": "image_url", "image_url": "a"},
        {"type": "image_url", "image_url": {"url": "a"}},
    ):  # fmt: skip
        content = [{"type": "text", "text": "What?"}, part]
        found = tokenizer.encode_chat([{"role": "user", "content": content}], lambda source: {"a": [10, 13]}[source])
        assert found == [1, 3, 10, 13, 7493, 1063, 4]


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "the last message must be the user's"),
        ([{"role": "assistant", "content": "a"}], "the last message must be the user's"),
        ([{"role": "tool", "content": "a"}, {"role": "user", "content": "a"}], "role 'tool' is impossible; allowed: "),
        ([{"role": "user", "content": [{"type": "audio"}]}], "allowed: type text, image or image_url"),
        ([{"role": "user", "content": ["a"]}], "allowed: type text, image or image_url"),
        ([{"role": "user", "content": [{"type": "image", "image": "a"}]}], "a picture can only be in a user's message"),
    ],
)
def test_impossible_conversations(messages, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_dir(BUNDLED).encode_chat(messages)


@given(st.lists(st.integers(0, 2047), max_size=30))
def test_decoding_any_ids_never_fails_and_streams_the_same(ids):
    """Also ids in the middle of characters: the stream gives whole characters, all together the decoded text."""
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


def test_known_ids():
    """Worked examples on the published vocabulary."""
    tokenizer = Tokenizer(from_tekken(json.loads(PUBLISHED.read_text())))
    for text, ids in (
        ("Hello, world!", [22177, 1044, 4304, 1033]),
        ("My favourite condiment is ", [6720, 52062, 3328, 2858, 1395, 1032]),
        ("a1234b", [1097, 1049, 1050, 1051, 1052, 1098]),
        ("日本語テスト", [10008, 15199, 7282, 13854]),
        ("Ünïcödé naïve 😀", [39453, 1110, 105678, 29487, 1337, 98355, 119685, 1152, 1128]),
        ("'The'", [1039, 1784, 1039]),
        ("x[/INST]y</s>", [1120, 1091, 1047, 3174, 3074, 1093, 1121, 1885, 1115, 1062]),
    ):
        assert tokenizer.encode(text, bos=False) == ids


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


def test_what_a_tokenizer_json_may_not_do(tmp_path):
    """Truncate or pad prompts silently; or be no byte-level BPE, whose pieces are not bytes."""
    tokenizer, text = Tokenizer.from_dir(BUNDLED), "To be, or not to be, that is the question"
    ids = tokenizer.encode(text)
    tokenizer.backend.enable_truncation(5)
    tokenizer.backend.enable_padding(length=50)
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_dir(tmp_path).encode(text) == ids
    tokenizer.backend.decoder = decoders.Metaspace()
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="decoder is Metaspace; allowed: ByteLevel"):
        Tokenizer.from_dir(tmp_path)


def test_added_tokens_that_are_not_special():
    backend = from_tekken(json.loads((BUNDLED / "tekken.json").read_text()))
    backend.add_tokens(["日本"])
    tokenizer = Tokenizer(backend)
    assert tokenizer.decode(tokenizer.encode("x日本y")) == "x日本y"


def test_an_id_that_only_the_model_has_is_shown_as_unknown():
    stream = TextStream(Tokenizer.from_dir(BUNDLED))
    assert stream.push(2048) + stream.close() == "\ufffd"


def test_tekken_is_preferred(tmp_path):
    (tmp_path / "tekken.json").write_text((BUNDLED / "tekken.json").read_text())
    (tmp_path / "tokenizer.json").write_text("{}")
    assert Tokenizer.from_dir(tmp_path).vocab_size == 2048


def test_the_bundled_vocabulary_is_what_training_learns():
    assert json.loads((BUNDLED / "tekken.json").read_text()) == learn(corpus.load()["train"], 2048)


def test_the_pattern_is_mistrals():
    assert json.loads(PUBLISHED.read_text())["config"]["pattern"] == PATTERN


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("config"),
        lambda t: t.pop("vocab"),
        lambda t: t["vocab"].pop(),
        lambda t: t["config"].pop("pattern"),
        lambda t: t["config"].update(pattern="(("),
        lambda t: t["vocab"][3].update(token_bytes="?"),
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
    with pytest.raises(ValueError, match="id 2048 is not in the vocabulary; allowed: 0 to 2047"):
        Tokenizer.from_dir(BUNDLED).decode([2048])


def test_random_bytes_round_trip():
    rng, tokenizer = random.Random(0), Tokenizer.from_dir(BUNDLED)
    for _ in range(50):
        text = bytes(rng.randrange(256) for _ in range(40)).decode("utf-8", errors="replace")
        assert tokenizer.decode(tokenizer.encode(text)) == text
