"""The tokenizer under Transformers' names: equal to its two tokenizers for the same vocabulary."""

import json
import pickle
import shutil
import warnings
from queue import Empty
from threading import Thread

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, strategies as st
from tokenizers.processors import TemplateProcessing
from transformers.tokenization_mistral_common import MistralCommonBackend as TheirBackend

import images
from model_types import BUNDLED
from processor import MistralCommonBackend
from tokenizer import SPECIAL_TOKENS, BatchEncoding, TextIteratorStreamer, TextStreamer, Tokenizer

TOKENS = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The bundled vocabulary as a tokenizer.json that adds "<s>"."""
    path = tmp_path_factory.mktemp("tokenizer")
    backend = Tokenizer.from_dir(BUNDLED).backend
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module", params=["mistral-common", "tokenizers"])
def both(request, directory):
    """Our tokenizer and Transformers' for the same file, each with Transformers' defaults."""
    if request.param == "mistral-common":
        return MistralCommonBackend.from_pretrained(BUNDLED), TheirBackend.from_pretrained(str(BUNDLED))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), padding_side="left", split_special_tokens=True, **TOKENS
    )
    return MistralCommonBackend.from_pretrained(directory), theirs


def is_fast(tokenizer):
    return isinstance(tokenizer, transformers.PreTrainedTokenizerFast)


def result(function, *arguments, **settings):
    """What a function returns, or "refused"; without its warnings. An array of lists, which Transformers makes of
    unequal rows, counts as refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            value = function(*arguments, **settings)
        except ValueError:
            return "refused"
    ids = value
    if hasattr(value, "keys"):
        ids = value["input_ids"]
    if isinstance(ids, np.ndarray) and ids.dtype == object:
        return "refused"
    return value


def assert_same(ours, theirs):
    """The same keys, kinds, types and values."""
    if isinstance(theirs, str):
        assert ours == theirs
        return
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert type(ours[name]) is type(value), name
        if isinstance(value, (torch.Tensor, np.ndarray)):
            assert ours[name].dtype == value.dtype or value.size == 0 or not len(value[0])
            assert ours[name].tolist() == value.tolist()
        else:
            assert ours[name] == value


words = st.lists(st.sampled_from(["the", " cat", "é日", "  ", "\n", "</s>", "[INST]", "<pad>", "x"]), max_size=6)
texts = words.map("".join)
layouts = st.fixed_dictionaries(
    {},
    optional=dict(
        padding=st.sampled_from([True, False, "longest", "max_length", "do_not_pad"]),
        truncation=st.sampled_from([True, False, None, "longest_first", "do_not_truncate"]),
        max_length=st.sampled_from([None, 1, 3, 6, 40]),
        pad_to_multiple_of=st.sampled_from([None, 1, 4]),
        padding_side=st.sampled_from([None, "left", "right"]),
        return_tensors=st.sampled_from([None, "pt", "np"]),
        return_attention_mask=st.sampled_from([None, True, False]),
    ),
)


def differ_on_purpose(settings):
    """Arguments that Transformers ignores or refuses and we do not."""
    length = settings.get("max_length")
    multiple = settings.get("pad_to_multiple_of")
    pads = settings.get("padding", False) not in (False, "do_not_pad")
    nothing_to_pad_to = settings.get("padding") == "max_length" and length is None
    unequal = pads and multiple is not None and length is not None and length % multiple != 0
    return nothing_to_pad_to or unequal


def pads_nothing(text, settings):
    """Whether a text without ids is padded to a length. Transformers returns no ids then."""
    return text == "" and not settings["add_special_tokens"] and settings.get("padding") == "max_length"


@given(texts | st.lists(texts, min_size=1, max_size=3), layouts, st.booleans(), st.sampled_from(["left", "right"]))
def test_calls_equal_transformers(both, text, settings, add_special_tokens, side):
    ours, theirs = both
    loses_rows = isinstance(text, list) and "" in text and not add_special_tokens  # Transformers, in tensors
    settings["add_special_tokens"] = add_special_tokens
    if differ_on_purpose(settings) or loses_rows or pads_nothing(text, settings):
        return
    ours.truncation_side = theirs.truncation_side = side
    expected = result(theirs, text, **settings)
    if not isinstance(expected, str):
        expected.pop("token_type_ids", None)  # which these models do not take
    assert_same(result(ours, text, **settings), expected)


@given(texts, layouts, st.booleans(), st.sampled_from(["left", "right"]))
def test_encode_equals_transformers(both, text, settings, add_special_tokens, side):
    """The `input_ids` of a call."""
    ours, theirs = both
    settings.pop("return_attention_mask", None)
    settings["add_special_tokens"] = add_special_tokens
    if differ_on_purpose(settings) or pads_nothing(text, settings):
        return
    ours.truncation_side = theirs.truncation_side = side
    expected = result(theirs.encode, text, **settings)
    found = result(ours.encode, text, **settings)
    if isinstance(expected, str):
        assert found == expected
    else:
        assert_same({"ids": found}, {"ids": expected})


def test_encode_has_two_names_for_the_first_token():
    ids = OURS.encode("the cat")
    assert OURS.encode("the cat", False) == OURS.encode("the cat", add_special_tokens=False) == ids[1:]
    assert OURS.encode("the cat", bos=False, return_tensors="pt").tolist() == [ids[1:]]
    assert OURS.encode("</s>", split_special_tokens=False, return_tensors="pt").tolist() == [[1, 2]]


@pytest.mark.parametrize(
    "settings",
    [dict(max_length=3), dict(max_length=3, truncation=True, padding=True), dict(max_length=40, truncation=True)],
)
def test_long_texts_are_cut_as_in_transformers(both, settings):
    ours, theirs = both
    ours.truncation_side = theirs.truncation_side = "right"
    assert_same(ours("the cat sat on the mat", **settings), theirs("the cat sat on the mat", **settings))


def test_an_empty_text_is_padded():
    assert OURS("", padding="max_length", max_length=3, add_special_tokens=False)["input_ids"] == [11, 11, 11]


def test_an_empty_row_has_ids_as_numbers():
    assert OURS("", add_special_tokens=False, return_tensors="pt").input_ids.dtype == torch.int64


@given(texts)
def test_special_tokens_are_read_only_on_request(directory, text):
    ours = Tokenizer.from_pretrained(directory)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), **TOKENS)
    assert ours(text, split_special_tokens=False)["input_ids"] == theirs(text)["input_ids"]
    assert ours(text)["input_ids"] == theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text)
    assert not set(ours(text)["input_ids"][1:]) & set(ours.all_special_ids)


@given(st.lists(st.lists(st.integers(0, 2303), min_size=1, max_size=5), min_size=1, max_size=3), st.data())
def test_padding_of_encodings_equals_transformers(both, rows, data):
    ours, theirs = both
    settings = data.draw(layouts)
    settings.pop("truncation", None)
    if settings.get("return_attention_mask") is False:  # a mask that is there is not padded in Transformers
        del settings["return_attention_mask"]
    if differ_on_purpose(settings):
        return
    form = data.draw(st.sampled_from(["columns", "examples", "tensors", "one row"]))
    encoded = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows], "labels": [0] * len(rows)}
    if form == "examples":
        encoded = [{name: column[place] for name, column in encoded.items()} for place in range(len(rows))]
    elif form == "tensors":
        encoded = [{"input_ids": torch.tensor(row)} for row in rows]
    elif form == "one row":
        encoded = {"input_ids": rows[0]}
    copies = [pickle.loads(pickle.dumps(encoded)) for _ in range(2)]
    expected = result(theirs.pad, copies[0], **settings)
    if form != "one row" or not settings.get("return_tensors"):
        assert_same(result(ours.pad, copies[1], **settings), expected)
    assert repr(copies[1]) == repr(encoded)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_decoding_equals_transformers(both, kind):
    ours, theirs = both
    rows = [[1, 3, *ours.encode("Où est-il ?", bos=False), 4]]
    rows.append([2, 11, *range(1000, 1000 + len(rows[0]) - 2)])
    for skip in ({}, {"skip_special_tokens": True}, {"skip_special_tokens": False}):
        assert ours.batch_decode(kind(rows), **skip) == theirs.batch_decode(kind(rows), **skip)
        assert ours.decode(kind(rows), **skip) == theirs.decode(rows, **skip)
        assert ours.decode(kind(rows[0]), **skip) == theirs.decode(kind(rows[0]), **skip)
    assert ours.decode(rows[0][3], clean_up_tokenization_spaces=False) == theirs.decode(rows[0][3])
    assert ours.decode(torch.tensor(3)) == "[INST]" == ours.decode(np.int64(3)) and ours.decode(iter([3])) == "[INST]"
    assert ours.batch_decode([]) == theirs.batch_decode([]) == []
    assert Tokenizer.from_dir(BUNDLED).decode(rows[0]) == "Où est-il ?"  # this project's own default


def test_tokens_equal_transformers(both):
    ours, theirs = both
    assert len(ours) == len(theirs) == ours.vocab_size == 2304
    for name in ("bos_token", "eos_token", "pad_token"):
        assert getattr(ours, name) == getattr(theirs, name)
        assert getattr(ours, name + "_id") == getattr(theirs, name + "_id")
    assert ours.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == theirs.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ours.convert_ids_to_tokens(list(range(20))) == theirs.convert_ids_to_tokens(list(range(20)))
    assert ours.convert_tokens_to_ids("no such token") == theirs.convert_tokens_to_ids("no such token") == 0
    assert ours.all_special_ids[:20] == list(range(20)) and ours.convert_ids_to_tokens(2) == "</s>"
    assert ours.convert_ids_to_tokens([1, 500], skip_special_tokens=True) == ours.convert_ids_to_tokens([500])
    assert ours.unk_token == theirs.unk_token and ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template is theirs.chat_template is None and ours.is_fast
    assert ours.convert_tokens_to_ids([]) == theirs.convert_tokens_to_ids([]) == []
    assert ours.convert_tokens_to_ids("a\ud800") == 0 and ours.vocab == ours.get_vocab()
    if is_fast(theirs):  # those of mistral-common are text, and not one for each id
        for settings in ({}, dict(add_special_tokens=True)):
            assert ours.tokenize("the é cat", **settings) == theirs.tokenize("the é cat", **settings)
        assert ours.vocab == theirs.vocab and ours.get_vocab() == theirs.get_vocab()
        assert ours.convert_tokens_to_ids(ours.tokenize("the é cat")) == ours.encode("the é cat", bos=False)


def test_the_pad_token_can_be_chosen(both):
    ours, theirs = both
    try:
        for tokenizer in both:
            tokenizer.pad_token = tokenizer.eos_token
        assert_same(ours(["a", "b c d"], padding=True), theirs(["a", "b c d"], padding=True))
        assert ours.pad_token_id == 2 and ours.pad_token == "</s>"
        with pytest.raises(ValueError, match="pad_token='nothing' is not in the vocabulary"):
            ours.pad_token = "nothing"
        ours.pad_token_id = None
        assert ours.pad_token is None
        with pytest.raises(ValueError, match=r"no padding token; set tokenizer\.pad_token = tokenizer\.eos_token"):
            ours(["a", "b c"], padding=True)
    finally:
        for tokenizer in both:
            tokenizer.pad_token = "<pad>"


def test_other_special_tokens_can_be_chosen():
    ours = MistralCommonBackend.from_pretrained(BUNDLED)
    assert ours.add_special_tokens({"pad_token": "</s>", "bos_token": "[INST]"}) == 0 == ours.add_tokens([])
    assert ours.pad_token_id == 2 and ours("a")["input_ids"][0] == 3
    ours.eos_token = "<unk>"
    assert ours.eos_token_id == 0 and ours.name_or_path == str(BUNDLED)
    ours.chat_template = None
    ours.add_bos_token = True
    ours.add_eos_token = False
    ours.special_tokens["<SPECIAL_20>"] = 20
    for wrong in ({"pad_token": "[PAD]"}, {"bos_token": "</s>", "additional_special_tokens": ["<x>"]}):
        with pytest.raises(ValueError, match=r"tokens cannot be added; use one of the .* such as <SPECIAL_20>"):
            ours.add_special_tokens(wrong)
    assert ours.bos_token == "[INST]" and not (ours.add_eos_token or not ours.add_bos_token)


@pytest.mark.parametrize("limit", [1e30, int(1e30), None])
def test_a_very_large_limit_is_none(limit):
    ours = MistralCommonBackend.from_pretrained(BUNDLED, model_max_length=limit)
    assert ours("the cat", truncation=True) == OURS("the cat")
    with pytest.raises(ValueError, match="padding='max_length' needs a max_length"):
        ours("a", padding="max_length")


def test_collators_of_transformers_take_it():
    ours, theirs = MistralCommonBackend.from_pretrained(BUNDLED), TheirBackend.from_pretrained(str(BUNDLED))
    for make in (
        lambda tokenizer: transformers.DataCollatorWithPadding(tokenizer, pad_to_multiple_of=4),
        lambda tokenizer: transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    ):
        batches = [make(side)([side("the cat"), side("a")]) for side in (ours, theirs)]
        assert_same(*batches)


# ------------------------------------------------------------------------------------------------- conversations


def message(role, content):
    return {"role": role, "content": content}


TOOL = {"type": "function", "function": {"name": "add", "description": "Adds", "parameters": {"type": "object"}}}
openings = st.lists(st.builds(message, st.just("system"), texts.filter(str.strip)), max_size=1)
exchanges = st.lists(st.tuples(texts, texts.filter(str.strip)), max_size=2)


@st.composite
def conversations(draw, continued):
    messages = draw(openings)
    for question, answer in draw(exchanges):
        messages += [message("user", question), message("assistant", answer)]
    messages.append(message("user", draw(texts)))
    if continued:
        messages.append(message("assistant", draw(texts.filter(str.strip))))
    return messages


@given(st.data(), st.booleans(), st.booleans(), st.booleans(), layouts)
def test_conversations_equal_transformers(data, continued, batched, return_dict, settings):
    ours, theirs = OURS, THEIRS
    settings = {name: settings[name] for name in settings.keys() & {"padding", "max_length", "return_tensors"}}
    settings["truncation"] = data.draw(st.booleans())
    if differ_on_purpose(settings):
        return
    conversation = data.draw(conversations(continued))
    if batched:
        conversation = [conversation, data.draw(conversations(continued))]
    settings["tools"] = data.draw(st.sampled_from([None, [TOOL]]))
    settings |= dict(return_dict=return_dict, continue_final_message=continued)
    expected = result(theirs.apply_chat_template, conversation, **settings)
    found = result(ours.apply_chat_template, conversation, **settings)
    if return_dict or isinstance(expected, str):
        assert_same(found, expected)
    else:
        assert_same({"ids": found}, {"ids": expected})


OURS, THEIRS = MistralCommonBackend.from_pretrained(BUNDLED), TheirBackend.from_pretrained(str(BUNDLED))
HI = [message("user", "Hi [INST]")]


def test_the_text_of_a_conversation():
    for conversation in (HI, [HI, HI]):
        text = OURS.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        assert text == THEIRS.apply_chat_template(conversation, tokenize=False)
    picture = [message("user", [{"type": "image", "image": "nowhere.png"}, {"type": "text", "text": "?"}])]
    assert OURS.apply_chat_template(picture, tokenize=False) == "<s>[INST][IMG]?[/INST]"
    del picture[0]["content"][0]["image"]
    assert OURS.apply_chat_template(picture, tokenize=False) == "<s>[INST][IMG]?[/INST]"
    with pytest.raises(ValueError, match="a part of type image has no source"):
        OURS.apply_chat_template(picture)


def read_plain(source):
    """An image of `source` by `source` patches of 2 pixels."""
    return torch.full((3, 2 * source, 2 * source), 0.5), ([10] * source + [12]) * (source - 1) + [10] * source + [13]


def pictures(*sources):
    return message("user", [{"type": "text", "text": "a"}, *({"type": "image", "image": i} for i in sources)])


@pytest.fixture
def seeing():
    tokenizer = MistralCommonBackend.from_pretrained(BUNDLED)
    tokenizer.image_reader = read_plain
    return tokenizer


def test_images_in_conversations(seeing):
    """Sizes only where they differ: scripts pass image_sizes beside what is returned here, as the model's card does."""
    same = seeing.apply_chat_template([pictures(2, 2)], return_tensors="pt")
    assert set(same) == {"input_ids", "attention_mask", "pixel_values"} and same.pixel_values.shape == (2, 3, 4, 4)
    assert same.input_ids.tolist() == [seeing.encode_chat([pictures(2, 2)], None, lambda source: read_plain(source)[1])]
    several = seeing.apply_chat_template([[pictures(1)], HI, [pictures(2, 1)]], padding=True, return_tensors="pt")
    assert several.image_sizes.tolist() == [[2, 2], [4, 4], [2, 2]] and several.pixel_values.shape == (3, 3, 4, 4)
    assert several.input_ids.shape[0] == 3
    arrays = seeing.apply_chat_template([pictures(1, 2)], return_tensors="np")
    assert isinstance(arrays.pixel_values, np.ndarray) and arrays.image_sizes.tolist() == [[2, 2], [4, 4]]
    lists = seeing.apply_chat_template([pictures(1, 2)])
    assert [image.shape for image in lists.pixel_values] == [(3, 2, 2), (3, 4, 4)]
    assert lists.image_sizes == [(2, 2), (4, 4)] and isinstance(lists.input_ids[0], int)


def test_encodings_move(seeing):
    encoding = seeing.apply_chat_template([pictures(2, 1)], return_tensors="pt")
    assert encoding.to("cpu", torch.bfloat16) is encoding and encoding.to("cpu") is encoding
    kinds = {name: value.dtype for name, value in encoding.items()}
    integers = dict.fromkeys(["input_ids", "attention_mask", "image_sizes"], torch.int64)
    assert kinds == integers | {"pixel_values": torch.bfloat16}
    assert encoding.to(torch.float64).pixel_values.dtype == torch.float64
    assert encoding.to(device="meta").input_ids.is_meta and encoding["input_ids"].is_meta
    assert pickle.loads(pickle.dumps(BatchEncoding(a=1))).a == 1
    copied = encoding.copy()
    assert type(copied) is BatchEncoding and copied is not encoding and copied.input_ids is encoding.input_ids
    assert encoding.data is encoding
    with pytest.raises(AttributeError, match="the encoding has no 'labels'; it has a"):
        BatchEncoding(a=1).labels  # noqa: B018


# ------------------------------------------------------------------------------------------------------- refusals


def add(a: int, b: int) -> int:
    return a + b


ANSWERED = [*HI, message("assistant", "Hello")]


@pytest.mark.parametrize(
    "call, reason",
    [
        (lambda t: t("a", "b"), "text_pair and return_token_type_ids are not supported"),
        (lambda t: t("a", return_token_type_ids=True), "text_pair and return_token_type_ids are not supported"),
        (lambda t: t(3), "text is 3; allowed: a text, or a list of at least one"),
        (lambda t: t([]), r"text is \[\]; allowed"),
        (lambda t: t(["a", 3]), r"text\[1\] is 3; allowed: text"),
        (lambda t: t([[1, 2]]), r"text\[0\] is \[1, 2\]; allowed: text"),
        (lambda t: t("a", padding="all"), "padding='all' is not supported; supported: False, 'do_not_pad', True"),
        (lambda t: t("a", padding=1), "padding=1 is not supported"),
        (lambda t: t("a", padding="max_length"), "padding='max_length' needs a max_length"),
        (lambda t: t("a", truncation="only_first"), "truncation='only_first' is not supported"),
        (lambda t: t("a", max_length=0), "max_length=0 is impossible; allowed: a whole number above 0"),
        (lambda t: t("a", padding=True, pad_to_multiple_of=1.5), r"pad_to_multiple_of=1\.5 is impossible"),
        (lambda t: t("a", padding_side="top"), "padding_side='top' is not supported; supported: 'left', 'right'"),
        (lambda t: t("a", return_tensors="tf"), "return_tensors='tf' is not supported; supported: None, 'pt', 'np'"),
        (lambda t: t(["a", "b c"], return_tensors="pt"), r"rows of input_ids have lengths \[2, 3\].*give padding=True"),
        (lambda t: t.pad([{"ids": [1]}]), "allowed: an encoding with input_ids, or a list of such"),
        (lambda t: t.pad(3), "the encoded inputs are 3; allowed"),
        (lambda t: t.pad([t("a"), {"input_ids": [1]}]), r"encodings have keys .* allowed: the same in all"),
        (lambda t: t.pad({"input_ids": [[1]], "text": ["a"]}, return_tensors="pt"), "text is .* no tensor; leave it"),
        (lambda t: t.pad([{"input_ids": [1.5]}], return_tensors="pt"), r"input_ids is \[1\.5\]; allowed: whole"),
        (lambda t: t.pad({"input_ids": [[1]], "attention_mask": [[1, 1]]}), r"lengths \[2\], those of input_ids \[1\]"),
        (lambda t: t.pad({"input_ids": [[1], [2]], "attention_mask": [[1]]}), r"lengths \[1\], those of .* \[1, 1\]"),
        (lambda t: t.pad({"input_ids": [[1]], "attention_mask": None}), "attention_mask is None; allowed: a list"),
        (lambda t: t.pad({"input_ids": [1], "attention_mask": 3}), "a row of attention_mask is 3; allowed: a list"),
        (lambda t: t.pad({"input_ids": torch.tensor(3)}), "input_ids is 3; allowed: a list"),
        (lambda t: t.pad({"input_ids": [[1], 2]}), "a row of input_ids is 2; allowed: a list"),
        (lambda t: t.convert_ids_to_tokens([[1]]), r"an id is \[1\]; allowed"),
        (lambda t: t.convert_ids_to_tokens([[1]], True), r"an id is \[1\]; allowed"),
        (lambda t: t.decode([[1], 2]), "a row of ids is 2; allowed: a list"),
        (lambda t: setattr(t, "pad_token", "a\ud800"), "pad_token='a.ud800' is not in the vocabulary"),
        (lambda t: setattr(t, "chat_template", "{{ 1 }}"), "templates are not run; version selects Mistral's layout"),
        (lambda t: setattr(t, "add_eos_token", True), "add_eos_token=True is not supported; append tokenizer.eos"),
        (lambda t: setattr(t, "add_bos_token", False), "add_bos_token=False is not supported; give add_special_tokens"),
        (lambda t: t.add_tokens(["<new>"]), "'<new>'.: tokens cannot be added; use one of the unused special tokens"),
        (lambda t: t.add_special_tokens("<new>"), "special_tokens_dict is '<new>'; allowed: an object"),
        (lambda t: t.encode("a", "b"), "bos='b' is not supported; supported: True and False, and no text_pair"),
        (lambda t: t.encode("a", bos=False, add_special_tokens=True), "bos=False and add_special_tokens=True differ"),
        (lambda t: t.encode(["a"], return_tensors="pt"), r"text is \['a'\]; allowed: text"),
        (lambda t: t.save_pretrained("x", push_to_hub=True), "push_to_hub=True is not supported; docs/transformers"),
        (lambda t: t.encode(3), "text is 3; allowed: text"),
        (lambda t: t.encode(["a"]), r"text is \['a'\]; allowed: text"),
        (lambda t: t.decode("a"), "an id is 'a'; allowed: a whole number from 0 to 2303"),
        (lambda t: t.decode([1.5]), r"an id is 1\.5; allowed: a whole number"),
        (lambda t: t.decode(None), "an id is None; allowed"),
        (lambda t: t.decode([1], clean_up_tokenization_spaces=True), "clean_up_tokenization_spaces=True is not supp"),
        (lambda t: t.batch_decode(3), "sequences are 3; allowed: rows of ids"),
        (lambda t: t.convert_ids_to_tokens([2304]), "id 2304 is not in the vocabulary"),
        (lambda t: t.convert_tokens_to_ids([3]), r"text\[0\] is 3; allowed: text"),
        (lambda t: t.apply_chat_template([]), r"the messages are \[\]; allowed: a list"),
        (lambda t: t.apply_chat_template(ANSWERED), "the last message must be the user's"),
        (lambda t: t.apply_chat_template(HI, continue_final_message=True), "needs a last message of role assistant"),
        (lambda t: t.apply_chat_template(3, continue_final_message=True), "found None"),
        (
            lambda t: t.apply_chat_template(ANSWERED, add_generation_prompt=True, continue_final_message=True),
            "add_generation_prompt and continue_final_message are both on",
        ),
        (lambda t: t.apply_chat_template(HI, tools=[add]), "a tool is a Python function .*supported: .*JSON schema"),
        (lambda t: t.apply_chat_template([pictures(1)]), r"reads no images; load it with auto\.AutoTokenizer"),
        (lambda t: Tokenizer(t.backend).save_pretrained("x"), "was not read from files; write it with tokenizer.back"),
        (lambda t: type(t).from_pretrained(BUNDLED, padding_side="up"), "padding_side='up' is not supported"),
        (lambda t: type(t).from_pretrained(BUNDLED, model_max_length="9"), "model_max_length='9' is impossible"),
        (lambda t: images.batch_images([3]), r"an image is a int; allowed: a tensor \(3, height, width\)"),
        (lambda t: images.batch_images([torch.zeros(3, 3)]), "an image is a Tensor; allowed"),
        (lambda t: images.preprocess(np.zeros((3, 3, 3)), None), "an image is a ndarray; allowed: one of Pillow's"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(call, reason):
    with pytest.raises(ValueError, match=reason) as raised:
        call(Tokenizer.from_dir(BUNDLED))
    assert "\n" not in str(raised.value)


CALLS = {
    "call": lambda t, **settings: t("a", **settings),
    "encode": lambda t, **settings: t.encode("a", **settings),
    "pad": lambda t, **settings: t.pad({"input_ids": [1]}, **settings),
    "decode": lambda t, **settings: t.decode([1], **settings),
    "batch_decode": lambda t, **settings: t.batch_decode([[1]], **settings),
    "tokenize": lambda t, **settings: t.tokenize("a", **settings),
    "apply_chat_template": lambda t, **settings: t.apply_chat_template(HI, **settings),
    "text": lambda t, **settings: t.apply_chat_template(HI, tokenize=False, **settings),
}
ARGUMENTS = [dict(return_offsets_mapping=True), dict(return_special_tokens_mask=True), dict(return_length=True),
             dict(stride=2), dict(is_split_into_words=True), dict(chat_template="{{ 1 }}"), dict(documents=[{}]),
             dict(enable_thinking=True), dict(return_assistant_tokens_mask=True),
             dict(spaces_between_special_tokens=True), dict(add_special_token=False)]  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_other_arguments_of_transformers_are_named(call):
    """Those that ask for nothing change nothing, but a name that Transformers does not have either is refused."""
    for arguments in ARGUMENTS:
        name = next(iter(arguments))
        with pytest.raises(ValueError, match=f"^{name}=.* is n.*; docs/transformers.md lists") as raised:
            CALLS[call](OURS, **arguments)
        assert "\n" not in str(raised.value)
    harmless = dict(verbose=True, stride=0, documents=None, return_offsets_mapping=False)
    assert CALLS[call](OURS, **harmless) == CALLS[call](OURS)


def test_images_are_not_lost(seeing):
    with pytest.raises(ValueError, match="return_dict=False would lose the images"):
        seeing.apply_chat_template([pictures(1)], return_dict=False)
    with pytest.raises(ValueError, match="truncation would cut a text with images"):
        seeing.apply_chat_template([pictures(1)], truncation=True, max_length=4)
    assert len(seeing.apply_chat_template([pictures(1)], truncation=True, max_length=40)["input_ids"]) == 6
    tokenizer = Tokenizer.from_dir(BUNDLED)
    del tokenizer.special_tokens["[IMG]"]
    with pytest.raises(ValueError, match=r"without the special token \[IMG\]"):
        tokenizer.apply_chat_template([pictures(1)], tokenize=False)


@pytest.mark.parametrize(
    "settings, reason",
    [
        (dict(padding=True, max_length=3), "max_length=3 has no effect here"),
        (dict(truncation=False, max_length=3), "max_length=3 has no effect here"),
        (dict(pad_to_multiple_of=8), "pad_to_multiple_of has no effect without padding=True"),
    ],
)
def test_arguments_without_effect_are_named(settings, reason):
    with pytest.warns(UserWarning, match=reason):
        OURS("a b c", **settings)


# ---------------------------------------------------------------------------------------------------------- files


def test_from_pretrained_and_save_pretrained(tmp_path, directory):
    ours = Tokenizer.from_pretrained(directory, padding_side="right", truncation_side="left", model_max_length=3)
    assert (ours.padding_side, ours.truncation_side, ours.model_max_length) == ("right", "left", 3)
    text = "the cat sat"
    assert ours(text, truncation=True)["input_ids"] == [1, *ours.encode(text)[-2:]]
    assert ours("a", padding="max_length")["attention_mask"] == [1, 1, 0]
    (directory / "chat_template.jinja").write_text("[INST]")
    try:
        saved = ours.save_pretrained(tmp_path / "new" / "copy")
    finally:
        (directory / "chat_template.jinja").unlink()
    assert saved == tuple(str(tmp_path / "new" / "copy" / name) for name in ("tokenizer.json", "chat_template.jinja"))
    assert transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "new" / "copy")(text) is not None
    again = Tokenizer.from_pretrained(str(tmp_path / "new" / "copy"), version="v3")
    assert again.encode(text) == ours.encode(text) and again.version == "v3"
    assert again.save_pretrained(tmp_path / "new" / "copy") == saved  # in place: the files stay whole
    assert json.loads((tmp_path / "new" / "copy" / "tokenizer.json").read_text())
    with pytest.raises(FileNotFoundError, match="no model directory"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")
    other = Tokenizer.from_pretrained(directory, use_fast=True, trust_remote_code=True, pad_token="</s>")
    assert other(text) == again(text) and other.pad_token_id == other.eos_token_id
    with pytest.raises(ValueError, match=r"padding_sied: no argument of Tokenizer\.from_pretrained"):
        Tokenizer.from_pretrained(directory, padding_sied="left")


def test_saving_removes_the_other_tokenizer(tmp_path, directory, monkeypatch):
    """All or nothing: tekken.json would be preferred to the tokenizer.json that is saved."""
    target = tmp_path / "target"
    Tokenizer.from_dir(BUNDLED).save_pretrained(save_directory=target)
    (target / "model.safetensors").touch()
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    assert "tekken.json" in before
    ours = Tokenizer.from_pretrained(pretrained_model_name_or_path=directory)

    def full(source, path):
        path.write_bytes(b"{")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(shutil, "copyfile", full)
        ours.save_pretrained(target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    ours.save_pretrained(target)
    assert sorted(path.name for path in target.iterdir()) == ["model.safetensors", "tokenizer.json"]
    saved = Tokenizer.from_dir(target)
    shutil.rmtree(target)
    with pytest.raises(FileNotFoundError, match="does not hold the tokenizer any more"):
        saved.save_pretrained(tmp_path / "other")


def test_the_arguments_of_the_hub_are_passed_on(tmp_path):
    with pytest.raises(FileNotFoundError, match="could not be fetched"):
        Tokenizer.from_pretrained("owner/name", revision="main", cache_dir=tmp_path, local_files_only=True)


# ------------------------------------------------------------------------------------------------------ streaming


@given(texts, st.booleans(), st.booleans())
def test_the_streamer_prints_what_transformers_prints(text, skip_prompt, skip_special_tokens):
    answer = [*OURS.encode(text), 2]
    printed = []
    for cls, tokenizer in ((TextStreamer, OURS), (transformers.TextStreamer, THEIRS)):
        kept = []

        class Kept(cls):
            def on_finalized_text(self, text, stream_end=False, kept=kept):
                kept.append(text + "\n" * stream_end)

        streamer = Kept(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=skip_special_tokens)
        for _ in range(2):
            streamer.put(torch.tensor([[1, 3, *OURS.encode("é", bos=False), 4]]))
            for i in answer:
                streamer.put(torch.tensor([i]))
            streamer.end()
        printed.append("".join(kept))
    assert printed[0] == printed[1]


def test_the_streamer_prints_at_once(capsys):
    streamer = TextStreamer(OURS, skip_prompt=True)
    streamer.put(torch.tensor([1, 2]))
    streamer.put(500)
    assert capsys.readouterr().out == OURS.decode(500)
    streamer.end()
    assert capsys.readouterr().out == "\n"
    with pytest.raises(ValueError, match="TextStreamer got 2 rows; allowed: one"):
        streamer.put(torch.zeros(2, 3, dtype=torch.long))


def test_texts_of_another_thread_equal_transformers():
    """Joined: Transformers waits for the end of some words."""
    answer = [*OURS.encode("the cat é日 </s>", bos=False), 2]
    received = []
    for cls, tokenizer in ((TextIteratorStreamer, OURS), (transformers.TextIteratorStreamer, THEIRS)):
        streamer = cls(tokenizer, True, 5.0, skip_special_tokens=True)

        def generate(streamer=streamer):
            streamer.put(torch.tensor([[1, 3, 4]]))
            for i in answer:
                streamer.put(torch.tensor([i]))
            streamer.end()

        thread = Thread(target=generate)
        thread.start()
        received.append("".join(streamer))
        thread.join()
    assert received[0] == received[1] == "the cat é日 </s>"
    with pytest.raises(Empty):
        next(TextIteratorStreamer(OURS, timeout=0.01))
