"""The names of `auto.py`: the published examples up to `generate`, the processor and the choice of classes, compared
with Transformers."""

import json
import random
import sys
from itertools import product

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, strategies as st
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers.tokenization_mistral_common import MistralCommonBackend as TheirBackend

import auto
from images import preprocess, transformers_size
from model_types import BUNDLED, BUNDLED_2410
from processor import MistralCommonBackend, Processor
from tokenizer import Tokenizer

try:
    from transformers.models.pixtral import image_processing_pil_pixtral as their_images
except ImportError:  # versions that process images with torchvision only
    their_images = None
needs_their_images = pytest.mark.skipif(their_images is None, reason="this Transformers has no Pillow image processor")

TEXT = dict(vocab_size=2304, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8)  # fmt: skip
TOWER = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=6,
             image_size=30)  # fmt: skip
# Mistral's layout of a conversation, as far as these tests need it.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}[IMG]{% endif %}{% endfor %}"
    "{% endif %}[/INST]{% elif m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]{% else %}"
    "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
CONFIGS = {
    "ministral": lambda: auto.MinistralConfig(**TEXT, layer_types=["full_attention", "sliding_attention"]),
    "mistral": lambda: auto.MistralConfig(**TEXT, sliding_window=4),
    "ministral3": lambda: auto.Ministral3Config(**TEXT),
    "mistral3": lambda: auto.Mistral3Config(auto.PixtralVisionConfig(**TOWER), auto.Ministral3Config(**TEXT)),
    "pixtral": lambda: auto.PixtralVisionConfig(**TOWER),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Model directories of every model type, with a tokenizer.json: model type -> path."""
    backend = Tokenizer.from_dir(BUNDLED).backend
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    paths = {}
    for name, make in CONFIGS.items():
        paths[name] = tmp_path_factory.mktemp(name)
        others = {"mistral3": auto.AutoModelForImageTextToText, "pixtral": auto.AutoModel}
        cls = others.get(name, auto.AutoModelForCausalLM)
        new_model(cls, make()).save_pretrained(paths[name])
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
            padding_side="left", chat_template=TEMPLATE,
        )  # fmt: skip
        theirs.save_pretrained(paths[name])
    return paths


def new_model(auto_class, config):
    torch.manual_seed(0)
    return auto_class.from_config(config)


def picture(width, height):
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


IMAGES = [picture(40, 24), picture(10, 10), picture(24, 40)]


# ----------------------------------------------------------------------------------------- the published examples


FAVOURITE = [
    {"role": "user", "content": "What is your favourite condiment?"},
    {"role": "assistant", "content": "Well, I'm quite partial to a good squeeze of fresh lemon juice."},
    {"role": "user", "content": "Do you have mayonnaise recipes?"},
]


@pytest.mark.parametrize("name", ["ministral", "ministral3"])
def test_the_example_of_a_conversation(directories, name):
    """Of Ministral's page. The same directory gives the same ids, and the same logits."""
    results = []
    for library in (auto, transformers):
        model = library.AutoModelForCausalLM.from_pretrained(directories[name], attn_implementation="sdpa")
        tokenizer = library.AutoTokenizer.from_pretrained(directories[name])
        inputs = tokenizer.apply_chat_template(FAVOURITE, return_tensors="pt").to(model.device)
        assert tokenizer.batch_decode(inputs["input_ids"])[0].startswith("<s>[INST]What is your")
        results.append((inputs, model(**inputs).logits))
    (ours, our_logits), (theirs, their_logits) = results
    assert ours["input_ids"].equal(theirs["input_ids"]) and our_logits.equal(their_logits)
    assert ours["attention_mask"].equal(theirs["attention_mask"])


def test_the_example_of_a_prompt(directories):
    """Of `MinistralForCausalLM.forward`."""
    results = []
    for library in (auto, transformers):
        library.MinistralForCausalLM.from_pretrained(directories["ministral"])
        tokenizer = library.AutoTokenizer.from_pretrained(directories["ministral"])
        inputs = tokenizer("Hey, are you conscious? Can you talk to me?", return_tensors="pt")
        texts = tokenizer.batch_decode(inputs.input_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        results.append((inputs.input_ids.tolist(), texts))
    assert results[0] == results[1]


def test_the_example_of_an_image_on_the_card(directories):
    """Its script passes image_sizes beside what the tokenizer returns."""
    model = auto.Mistral3ForConditionalGeneration.from_pretrained(directories["mistral3"])
    tokenizer = auto.AutoTokenizer.from_pretrained(directories["mistral3"])
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image", "image": IMAGES[0]}]
    messages = [{"role": "user", "content": parts}]
    tokenized = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    tokenized["input_ids"] = tokenized["input_ids"].to(device="cpu")
    tokenized["pixel_values"] = tokenized["pixel_values"].to(dtype=torch.float32, device="cpu")
    image_sizes = [tokenized["pixel_values"].shape[-2:]]
    logits = model(**tokenized, image_sizes=image_sizes).logits
    assert logits.shape == (1, len(tokenized["input_ids"][0]), 2304)
    assert "[IMG]" in tokenizer.decode(tokenized["input_ids"][0])


def test_the_examples_of_configurations():
    for library in (auto, transformers):
        vision = library.PixtralVisionConfig(**TOWER)
        for text in (library.Ministral3Config(**TEXT), library.MistralConfig(**TEXT)):
            config = library.Mistral3Config(vision_config=vision, text_config=text)
            if library is auto:  # as the example has it, which Transformers 5.24 refuses
                assert auto.Mistral3Config(vision, text) == config
            config = library.Mistral3ForConditionalGeneration(config).config
            assert config.text_config.model_type == text.model_type and config.vision_config.patch_size == 6
            assert type(config.text_config) is type(text) and config.image_token_id == 10
        assert library.MinistralModel(library.MinistralConfig(**TEXT)).config.layer_types == ["sliding_attention"] * 2
        assert library.Ministral3ForCausalLM(library.Ministral3Config(**TEXT)).config.rms_norm_eps == 1e-5
    ours, theirs = auto.Mistral3Config(auto.PixtralVisionConfig(), auto.MistralConfig()), transformers.MistralConfig()
    for name, value in ours.text_config.to_dict().items():
        if name not in ("rope_parameters", "tie_word_embeddings"):  # the whole model's, and an equal one
            assert getattr(theirs, name) == value, name


@pytest.mark.parametrize("name", CONFIGS)
def test_new_models_have_the_type_that_is_asked_for(name):
    arguments = dict(torch_dtype="bfloat16", attn_implementation="eager")
    model = auto.AutoModel.from_config(CONFIGS[name](), **arguments)
    assert model.dtype == torch.bfloat16
    assert model.config.get_text_config().attn_implementation == "eager"
    assert auto.AutoModel.from_config(CONFIGS[name]()).dtype == torch.float32
    with pytest.raises(ValueError, match="dtype='float99' is not supported"):
        auto.AutoModel.from_config(CONFIGS[name](), dtype="float99")


def test_a_mistral_is_one_in_transformers(tmp_path):
    """Same defaults, same logits, and a config.json of its model type."""
    config = CONFIGS["mistral"]()
    ours = new_model(auto.AutoModelForCausalLM, config).eval()
    assert type(ours) is auto.MistralForCausalLM and isinstance(ours.model, auto.MistralModel)
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["MistralForCausalLM"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs) is transformers.MistralForCausalLM
    ids = torch.arange(1, 12)[None]
    assert ours(ids).logits.equal(theirs(ids).logits)
    assert auto.AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits.equal(ours(ids).logits)
    with pytest.raises(ValueError, match="sliding_attention for every layer; MinistralConfig mixes them"):
        auto.MistralConfig(**TEXT, layer_types=["full_attention", "sliding_attention"])


# ------------------------------------------------------------------------------------------------------ processor


def their_processor_class():
    """Transformers' `PixtralProcessor`, which needs torchvision only to be imported; skips the test without it."""
    if their_images is None:
        pytest.skip("this Transformers has no Pillow image processor")
    name = "transformers.models.pixtral.image_processing_pixtral"
    sys.modules.setdefault(name, their_images)
    try:
        from transformers.models.pixtral.processing_pixtral import PixtralProcessor
    finally:
        if sys.modules[name] is their_images:
            del sys.modules[name]
    return PixtralProcessor


@pytest.fixture(scope="module")
def processors(directories):
    """Our processor and Transformers' of the same directory."""
    processor_class = their_processor_class()
    path = directories["mistral3"]
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    reader = their_images.PixtralImageProcessorPil(patch_size=TOWER["patch_size"], size={"longest_edge": 30})
    theirs = processor_class(reader, tokenizer, patch_size=6, spatial_merge_size=2, chat_template=TEMPLATE)
    return auto.AutoProcessor.from_pretrained(path), theirs


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and ours[name].equal(value), name


pieces = st.lists(st.sampled_from(["[IMG]", "[INST]", "[/INST]", "</s>", "What is", " this", "é", "\n"]), max_size=6)


@needs_their_images
@given(st.lists(pieces.map("".join), min_size=1, max_size=3), st.sampled_from(["left", "right"]), st.data())
def test_prompts_equal_transformers(processors, prompts, side, data):
    """Texts are read with their special tokens. The two rules for the size of an image agree for these images."""
    ours, theirs = processors
    sources = [[data.draw(st.sampled_from(IMAGES)) for _ in range(prompt.count("[IMG]"))] for prompt in prompts]
    ours.tokenizer.padding_side = theirs.tokenizer.padding_side = side
    flat = [source for row in sources for source in row]
    settings = dict(text=prompts, padding=True, return_tensors="pt")
    expected = theirs(images=flat or None, **settings)
    assert_same(ours(images=flat or None, **settings), expected)
    if flat:
        assert_same(ours(images=sources, **settings), expected)
    for prompt in prompts:
        if "[IMG]" not in prompt:
            assert_same(ours(text=prompt), theirs(text=prompt))


@needs_their_images
def test_the_example_of_a_prompt_with_an_image(processors):
    """Of `Mistral3ForConditionalGeneration.forward`. Its "<s>" is not written twice, as Transformers does."""
    ours, theirs = processors
    ours.tokenizer.padding_side = theirs.tokenizer.padding_side = "left"
    prompt = "<s>[INST][IMG]What is the image?[/INST]"
    inputs = ours(images=IMAGES[0], text=prompt, return_tensors="pt")
    assert_same(inputs, theirs(images=IMAGES[0], text=prompt, return_tensors="pt", add_special_tokens=False))
    assert inputs.input_ids[0, :2].tolist() == [1, 3] and inputs.input_ids[0, 2:6].tolist() == [10, 10, 10, 12]
    assert ours.batch_decode(inputs.input_ids, skip_special_tokens=True)[0] == "What is the image?"
    assert ours.decode(inputs.input_ids[0]) == theirs.decode(inputs.input_ids[0])


def conversation(text, *sources):
    images = [{"type": "image", "image": source} for source in sources]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


@needs_their_images
def test_the_examples_of_conversations_with_images(processors, tmp_path):
    """Of Mistral 3's page: one, text only, a batch, and a batch with different numbers of images."""
    ours, theirs = processors
    ours.tokenizer.padding_side = theirs.tokenizer.padding_side = "left"
    IMAGES[0].save(tmp_path / "photo.png")
    by_path = [{"role": "user", "content": [{"type": "image", "path": str(tmp_path / "photo.png")},
                                            {"type": "text", "text": "What?"}]}]  # fmt: skip
    one, other = conversation("Describe this image.", IMAGES[0]), conversation("These?", IMAGES[1], IMAGES[2])
    settings = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    assert_same(ours.apply_chat_template(one, **settings), theirs.apply_chat_template(one, **settings))
    assert_same(ours.apply_chat_template(by_path, **settings), theirs.apply_chat_template(by_path, **settings))
    for second, padding in product((one, other), ({"processor_kwargs": {"padding": True}}, {"padding": True})):
        batch = [one, second]
        expected = theirs.apply_chat_template(batch, **settings, processor_kwargs={"padding": True})
        assert_same(ours.apply_chat_template(batch, **settings, **padding), expected)
    assert ours.apply_chat_template([one, other]) == theirs.apply_chat_template([one, other])

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert_same(ours(text=text), theirs(text=text, add_special_tokens=False))
    assert ours(text=text).input_ids.tolist() == [ours.tokenizer.encode_chat(messages)]
    ids = ours.apply_chat_template(messages, tokenize=True)
    assert ids.tolist() == ours.apply_chat_template(messages, tokenize=True, return_tensors=None)
    assert ids.equal(theirs.apply_chat_template(messages, tokenize=True))


def test_the_processor_reads_images_as_the_rest_of_the_project(directories):
    """By mistral-common's rule for sizes, which Transformers' differs from in some cases."""
    processor = Processor.from_pretrained(directories["mistral3"], padding_side="right")
    assert processor.tokenizer.padding_side == "right"
    config = auto.AutoConfig.from_pretrained(directories["mistral3"])
    odd = next(i for i in (picture(w, 35) for w in range(40, 200)) if different(i, config))
    assert processor(images=[odd], text="[IMG]").pixel_values[0].equal(preprocess(odd, config))
    lists = processor(images=IMAGES[:2], text=["[IMG]", "[IMG]a"], return_tensors=None)
    assert lists.image_sizes == [(24, 36), (12, 12)] and [len(row) for row in lists.input_ids] == [9, 4]
    padded = processor.pad({"input_ids": lists.input_ids})
    assert padded.input_ids[1] == [*lists.input_ids[1], *[11] * 5]


PLACEHOLDER = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]


@needs_their_images
def test_the_text_of_a_conversation_gets_its_images_afterwards(processors):
    """The recipe in two steps equals the one step."""
    ours, theirs = processors
    text = ours.apply_chat_template(PLACEHOLDER, add_generation_prompt=True)
    assert text == theirs.apply_chat_template(PLACEHOLDER, add_generation_prompt=True) == "<s>[INST][IMG]What?[/INST]"
    inputs = ours(text=text, images=IMAGES[0], videos=None)
    settings = dict(tokenize=True, return_dict=True, processor_kwargs={"return_tensors": "pt"})
    assert_same(inputs, ours.apply_chat_template(conversation("What?", IMAGES[0]), **settings))


def different(image, config):
    return preprocess(image, config).shape != preprocess(image, config, transformers_size).shape


@pytest.mark.parametrize(
    "call, reason",
    [
        (lambda p: p(images=IMAGES[0]), "text is missing"),
        (lambda p: p(text=3), "text is 3; allowed"),
        (lambda p: p(text="[IMG]"), r"the texts have \[1\] \[IMG\] and \[0\] images; allowed: equal numbers"),
        (lambda p: p(images=IMAGES, text=["[IMG]", "[IMG]"]), r"\[1, 1\] \[IMG\] and \[1, 2\] images"),
        (lambda p: p(images=[[IMAGES[0]], []], text=["", "[IMG]"]), r"\[0, 1\] \[IMG\] and \[1, 0\] images"),
        (lambda p: p(images=3, text="[IMG]"), "an image is given as int; supported: a path, an address"),
        (lambda p: p(images=np.zeros((2, 2, 3)), text="[IMG]"), "an image is given as ndarray; supported"),
        (lambda p: p(images=IMAGES[0], text="[IMG]", truncation=True, max_length=3), "would cut a text with images"),
        (lambda p: p(images=IMAGES[0], text="[IMG]", return_tensors="tf"), "return_tensors='tf' is not supported"),
        (lambda p: p.apply_chat_template(conversation("?", 3), tokenize=True), "an image is given as int"),
        (lambda p: p(text="a", return_offsets_mapping=True), "return_offsets_mapping=True is not supported; docs"),
        (lambda p: p(text="a", video=3), "video=3 is no argument here; docs"),
        (lambda p: p.apply_chat_template(FAVOURITE, documents=[1]), r"documents=\[1\] is not supported; docs"),
        (lambda p: p.apply_chat_template(FAVOURITE, tokenize=True, documents=[1]), r"documents=\[1\] is not supported"),
        (lambda p: p.apply_chat_template(PLACEHOLDER, tokenize=True), "a part of type image has no source"),
        (lambda p: p.decode([1], stride=1), "stride=1 is not supported; docs"),
        (lambda p: Processor(Tokenizer.from_dir(BUNDLED_2410)), "a processor needs a tokenizer that reads images"),
        (lambda p: auto.AutoProcessor.from_pretrained(BUNDLED_2410), "use AutoTokenizer for a text model"),
    ],
)  # fmt: skip
def test_wrong_input_of_the_processor_is_refused(directories, call, reason):
    with pytest.raises(ValueError, match=reason) as raised:
        call(Processor.from_pretrained(directories["mistral3"]))
    assert "\n" not in str(raised.value)


def test_a_tokenizer_beside_another_model_reads_no_images(directories, tmp_path):
    for path in (BUNDLED_2410, directories["ministral"]):
        assert auto.AutoTokenizer.from_pretrained(path).image_reader is None
    named = dict(pretrained_model_name_or_path=directories["mistral3"])
    saved = auto.AutoProcessor.from_pretrained(**named).save_pretrained(save_directory=tmp_path)
    assert auto.AutoTokenizer.from_pretrained(tmp_path).image_reader is None and len(saved) >= 2  # no config.json
    (tmp_path / "adapter_config.json").write_text("{}")
    assert isinstance(auto.AutoTokenizer.from_pretrained(tmp_path), MistralCommonBackend)


# ----------------------------------------------------------------------------------------------------- Auto classes


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cls", auto.AUTO_MODELS, ids=lambda cls: cls.__name__)
def test_classes_are_transformers_choice(directories, cls, name):
    """By configuration and by directory. Where Transformers has no class, the message names an Auto class that has."""
    config = CONFIGS[name]()
    theirs = getattr(transformers, cls.__name__)
    their_config = transformers.AutoConfig.from_pretrained(directories[name])
    if name not in cls.classes:
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            theirs.from_config(their_config)
        with pytest.raises(ValueError, match=f"{cls.__name__} has no class for model_type '{name}'; it has") as raised:
            cls.from_pretrained(directories[name])
        with pytest.raises(ValueError, match=f"{cls.__name__} has no class for model_type"):
            cls.from_config(config)
        suggested = str(raised.value).partition("; use ")[2]
        named = [other for other in auto.AUTO_MODELS if other.__name__ in suggested.split(" or ")]
        assert named and all(name in other.classes for other in named)
        return
    expected = type(theirs.from_config(their_config)).__name__
    if name == "mistral":
        expected = expected.replace("Mistral", "Ministral")
    assert type(cls.from_config(config)).__name__ == expected
    if name != "pixtral":
        assert type(cls.from_pretrained(directories[name], dtype=torch.bfloat16)).__name__ == expected


@pytest.mark.filterwarnings("ignore:.*initialised, to be trained")
def test_heads_are_loaded(directories):
    model = auto.AutoModelForTokenClassification.from_pretrained(directories["ministral"], num_labels=5)
    assert type(model) is auto.MinistralForTokenClassification and model.score.out_features == 5


def test_configurations_are_read_and_written(directories, tmp_path):
    for name, path in directories.items():
        config = auto.AutoConfig.from_pretrained(path)
        assert type(config).from_pretrained(path) == config
        config.save_pretrained(tmp_path / name)
        assert type(config).from_pretrained(tmp_path / name) == config
        assert transformers.AutoConfig.from_pretrained(tmp_path / name).model_type == config.model_type
        theirs = transformers.AutoConfig.from_pretrained(path)
        assert config.get_text_config().num_hidden_layers == theirs.get_text_config().num_hidden_layers
        assert isinstance(config, auto.CONFIGS[name])
    assert auto.AutoConfig.from_pretrained(directories["ministral"], sliding_window=7).sliding_window == 7
    text_part = auto.Ministral3Config.from_pretrained(directories["mistral3"], num_labels=3)
    assert text_part.hidden_size == TEXT["hidden_size"] and text_part.num_labels == 3
    with pytest.raises(ValueError, match="sliding: no argument here and no field of MinistralConfig"):
        auto.AutoConfig.from_pretrained(directories["ministral"], sliding=7)
    for cls in (auto.AutoConfig, auto.AutoModel, auto.AutoTokenizer, auto.AutoProcessor):
        with pytest.raises(ValueError, match="revision='main' is impossible for the directory"):
            cls.from_pretrained(directories["mistral3"], revision="main")


def test_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for cls in (auto.AutoConfig, *auto.AUTO_MODELS):
        with pytest.raises(ValueError, match=f"{cls.__name__} has no class for model_type 'bert'; it has [^;]*$"):
            cls.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config is a dict; allowed: a configuration of this project"):
        auto.AutoModel.from_config({})


def test_every_name_is_one_of_transformers():
    """Of the same class there, where that can be asked without torchvision."""
    for name in set(auto.__all__) - set(dir(transformers)):
        assert hasattr(auto, name) and name == "MistralCommonBackend", name
    assert issubclass(auto.AutoTokenizer, Tokenizer) and auto.MistralCommonBackend is MistralCommonBackend
    assert TheirBackend.__name__ == MistralCommonBackend.__name__


def test_names_of_transformers_that_are_not_here():
    with pytest.raises(ImportError, match=r"auto has no Trainer; import it from transformers: its Trainer, data"):
        from auto import Trainer  # noqa: F401
    with pytest.raises(ImportError, match="auto has no BitsAndBytesConfig; quantised weights are not supported"):
        from auto import BitsAndBytesConfig  # noqa: F401
    assert not hasattr(auto, "_private")


def test_processors_and_criteria_of_a_script(directories):
    """Classes as scripts write them."""

    class Only(auto.LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.where(torch.arange(scores.shape[1]) == 7, scores, -torch.inf)

    class AfterTwo(auto.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids.shape[1] >= 5

    model = auto.AutoModelForCausalLM.from_pretrained(directories["ministral"])
    processors, criteria = auto.LogitsProcessorList([Only()]), auto.StoppingCriteriaList([AfterTwo()])
    tokens = model.generate(torch.tensor([[1, 2, 3]]), logits_processor=processors, stopping_criteria=criteria)
    assert tokens.tolist() == [[1, 2, 3, 7, 7]]


def test_set_seed_seeds_all_generators():
    draws = []
    for library in (auto, transformers):
        library.set_seed(5)
        draws.append((torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()))
    assert draws[0] == draws[1]
