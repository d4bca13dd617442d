"""Scripts for Transformers run here when their import is changed, and give the same results.

Each script is that of a published page or docstring in its calls. It runs twice, with the same files and the same seed:
as it stands, and with `auto` in the place of `transformers`.
"""

import pytest
import torch
import transformers

from tests.conftest import newer_transformers
from tests.test_auto import IMAGES, directories  # noqa: F401  # a fixture

# The page of Ministral. (The generated text is short here.)
CONVERSATION = """
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(
    PATH, torch_dtype=torch.float32, attn_implementation="sdpa", device_map="auto"
)
tokenizer = AutoTokenizer.from_pretrained(PATH)
messages = [
    {"role": "user", "content": "Which spice do you like?"},
    {"role": "assistant", "content": "Pepper, on everything."},
    {"role": "user", "content": "Have you a recipe with it?"},
]
model_inputs = tokenizer.apply_chat_template(messages, return_tensors="pt").to(model.device)
generated_ids = model.generate(**model_inputs, max_new_tokens=20, do_sample=True)
result = generated_ids, tokenizer.batch_decode(generated_ids)[0]
"""
# The same with the ids alone, as older versions return them.
CONVERSATION_IDS = CONVERSATION.replace(
    'return_tensors="pt")', 'return_tensors="pt", return_dict=False)'
).replace("**model_inputs", "model_inputs")
# The docstrings of the causal language models.
PROMPT = """
from transformers import AutoTokenizer, CLASS

model = CLASS.from_pretrained(PATH)
tokenizer = AutoTokenizer.from_pretrained(PATH)
inputs = tokenizer("Hey, are you awake?", return_tensors="pt")
generate_ids = model.generate(inputs.input_ids, max_length=30)
text = tokenizer.batch_decode(generate_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0]
result = generate_ids, text
"""
# The page of Mistral 7B.
BATCH = """
from transformers import AutoModelForCausalLM, AutoTokenizer

device = "cpu"
model = AutoModelForCausalLM.from_pretrained(PATH)
tokenizer = AutoTokenizer.from_pretrained(PATH)
model_inputs = tokenizer(["My spice is", "To be or not"], return_tensors="pt", padding=True).to(device)
model.to(device)
generated_ids = model.generate(**model_inputs, max_new_tokens=10, do_sample=True, num_return_sequences=2)
result = generated_ids, tokenizer.batch_decode(generated_ids)
"""
# What people write around `generate`: a streamer, stop texts, scores, and a GenerationConfig.
SETTINGS = """
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextStreamer, set_seed

model = AutoModelForCausalLM.from_pretrained(PATH, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(PATH)
inputs = tokenizer("Now is the winter", return_tensors="pt")
set_seed(3)
streamer = TextStreamer(tokenizer, skip_prompt=True)
streamed = model.generate(**inputs, streamer=streamer, max_new_tokens=9, do_sample=True, top_p=0.9)
config = GenerationConfig(max_new_tokens=12, do_sample=True, temperature=0.7, top_k=20)
configured = model.generate(**inputs, generation_config=config)
scored = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, output_scores=True)
best = [int(score.argmax()) for score in scored.scores]
result = streamed, configured, scored.sequences, scored[0], best, len(scored.scores)
"""
# The calls of `forward` in the documentation: results by name and number, as a tuple, as the configuration says.
# (`config.return_dict = False` is an error in Transformers 5.24; tests/test_pretrained.py has it.)
FORWARD = """
from transformers import AutoTokenizer, CLASS

model = CLASS.from_pretrained(PATH, attn_implementation="eager")
tokenizer = AutoTokenizer.from_pretrained(PATH)
inputs = tokenizer("Now is the winter", return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs, labels=inputs["input_ids"])
    plain = model(**inputs, labels=inputs["input_ids"], return_dict=False, use_cache=False)
    model.config.output_hidden_states = True
    model.config.output_attentions = True
    more = model(**inputs)
    loss, logits = outputs.to_tuple()[:2]
result = (
    outputs.loss, outputs["logits"], outputs[0], outputs[:2], loss, logits, plain,
    len(outputs), len(more.hidden_states), more.attentions, more.hidden_states,
)
"""
TEXT_SCRIPTS = [
    ("ministral", CONVERSATION),
    ("ministral3", CONVERSATION),
    ("ministral", CONVERSATION_IDS),
    ("ministral", PROMPT.replace("CLASS", "MinistralForCausalLM")),
    ("ministral3", PROMPT.replace("CLASS", "Ministral3ForCausalLM")),
    ("mistral", PROMPT.replace("CLASS", "MistralForCausalLM")),
    ("mistral", BATCH),
    ("ministral3", BATCH),
    ("ministral", SETTINGS),
    ("ministral3", SETTINGS),
    ("ministral", FORWARD.replace("CLASS", "MinistralForCausalLM")),
    ("ministral3", FORWARD.replace("CLASS", "Ministral3ForCausalLM")),
]


def run(script, library, path):
    """The variable `result` of a script with another import."""
    names = {"torch": torch, "PATH": str(path), "IMAGE": IMAGES[0]}
    torch.manual_seed(0)
    exec(script.replace("from transformers import", f"from {library} import"), names)
    return names["result"]


def assert_equal(ours, theirs):
    """Equal values, bit for bit. (Transformers' cache is another object.)"""
    if torch.is_tensor(theirs):
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, (tuple, list)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            assert_equal(a, b)
    elif not isinstance(theirs, transformers.Cache):
        assert ours == theirs


@newer_transformers
@pytest.mark.filterwarnings("ignore:.*torch_dtype. is deprecated")
@pytest.mark.parametrize("number", range(len(TEXT_SCRIPTS)))
def test_scripts_of_text_models(directories, number, capsys):  # noqa: F811
    name, script = TEXT_SCRIPTS[number]
    theirs = run(script, "transformers", directories[name])
    printed = capsys.readouterr().out
    assert_equal(run(script, "auto", directories[name]), theirs)
    assert capsys.readouterr().out == printed


# The card of Ministral 3.
CARD = """
from transformers import MistralCommonBackend, Mistral3ForConditionalGeneration

tokenizer = MistralCommonBackend.from_pretrained(PATH)
model = Mistral3ForConditionalGeneration.from_pretrained(PATH, device_map="auto")
messages = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Which way should I go?"},
            {"type": "image_url", "image_url": {"url": URL}},
        ],
    },
]
tokenized = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
tokenized["input_ids"] = tokenized["input_ids"].to(device=model.device)
tokenized["pixel_values"] = tokenized["pixel_values"].to(dtype=model.dtype, device=model.device)
image_sizes = [tokenized["pixel_values"].shape[-2:]]
output = model.generate(**tokenized, image_sizes=image_sizes, max_new_tokens=12)[0]
text = tokenizer.decode(output[len(tokenized["input_ids"][0]):])
result = dict(tokenized, image_sizes=image_sizes), output[None], text
"""
# The page of Ministral 3, which hands the whole encoding to `generate`.
PAGE = """
from transformers import AutoTokenizer, Mistral3ForConditionalGeneration

tokenizer = AutoTokenizer.from_pretrained(PATH)
model = Mistral3ForConditionalGeneration.from_pretrained(PATH, torch_dtype=torch.float32)
messages = [{"role": "user", "content": [
    {"type": "text", "text": "Which way should I go?"}, {"type": "image_url", "image_url": {"url": URL}},
]}]
tokenized = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
output = model.generate(tokenized, max_new_tokens=12)[0]
result = dict(tokenized), output[None], tokenizer.decode(output[len(tokenized["input_ids"][0]):])
"""
# The docstring of `Mistral3ForConditionalGeneration.forward`.
PROCESSOR = """
from transformers import AutoProcessor, Mistral3ForConditionalGeneration

model = Mistral3ForConditionalGeneration.from_pretrained(PATH)
processor = AutoProcessor.from_pretrained(PATH)
inputs = processor(images=IMAGE, text="<s>[INST][IMG]What is it?[/INST]", return_tensors="pt")
generate_ids = model.generate(**inputs, max_new_tokens=12)
text = processor.batch_decode(generate_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0]
result = dict(inputs), generate_ids, text
"""
# The page of Mistral 3: one conversation, text alone, and a batch with different numbers of images.
CONVERSATIONS = """
from transformers import AutoProcessor, AutoModelForImageTextToText

processor = AutoProcessor.from_pretrained(PATH)
model = AutoModelForImageTextToText.from_pretrained(PATH, device_map="auto")
messages = MESSAGES
inputs = processor.apply_chat_template(
    messages, padding=True, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device)
generate_ids = model.generate(**inputs, max_new_tokens=12)
text = processor.batch_decode(generate_ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
result = dict(inputs), generate_ids, text
"""
IMAGE_PART = '{"type": "image", "url": URL}'
QUESTION = '{"role": "user", "content": [%s, {"type": "text", "text": "What is it?"}]}'
ONE = QUESTION % IMAGE_PART
TWO = QUESTION % f"{IMAGE_PART}, {IMAGE_PART}"
SYSTEM = '{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}'
IMAGE_SCRIPTS = [
    CARD,
    PAGE,
    PROCESSOR,
    CONVERSATIONS.replace("MESSAGES", f"[{ONE}]"),
    CONVERSATIONS.replace("MESSAGES", f"[{SYSTEM}]"),
    CONVERSATIONS.replace("MESSAGES", f"[[{ONE}], [{TWO}]]"),
]


@newer_transformers
@pytest.mark.parametrize("number", range(len(IMAGE_SCRIPTS)))
def test_scripts_of_vision_models(directories, number, tmp_path):  # noqa: F811
    """Transformers' model continues the same input. (Its processors need torchvision; tests/test_auto.py compares the
    inputs.)"""
    IMAGES[0].save(tmp_path / "image.png")
    script = IMAGE_SCRIPTS[number].replace("URL", repr((tmp_path / "image.png").as_uri()))
    inputs, generated, text = run(script, "auto", directories["mistral3"])
    path = directories["mistral3"]
    theirs = transformers.Mistral3ForConditionalGeneration.from_pretrained(path).eval()
    if "image_sizes" not in inputs and "pixel_values" in inputs:
        inputs["image_sizes"] = [inputs["pixel_values"].shape[-2:]] * len(inputs["pixel_values"])
    expected = theirs.generate(**inputs, max_new_tokens=12)
    assert torch.equal(generated, expected)
    assert text and ("pixel_values" in inputs or "Be brief" in script)


# The docstrings of the configurations.
CONFIGURATIONS = """
from transformers import (
    Ministral3Config, Ministral3ForCausalLM, MinistralConfig, MinistralModel, Mistral3Config,
    Mistral3ForConditionalGeneration, MistralConfig, MistralModel, PixtralVisionConfig, PixtralVisionModel,
)

small = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, head_dim=8)
tower = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
ministral = MinistralModel(MinistralConfig(**small)).config
mistral = MistralModel(MistralConfig(**small)).config
vision_config = PixtralVisionConfig(**tower)
pixtral = PixtralVisionModel(vision_config).config
text_config = Ministral3Config(**small)
text_model = Ministral3ForCausalLM(text_config)
models = []
for text in (text_config, MistralConfig(**small)):
    configuration = Mistral3Config(vision_config=vision_config, text_config=text, tie_word_embeddings=True)
    models.append(Mistral3ForConditionalGeneration(configuration))
configurations = [ministral, mistral, pixtral, text_model.config, *[model.config for model in models]]
parts = [config.text_config for config in configurations[-2:]]
parts += [config.vision_config for config in configurations[-2:]]
counts = [model.num_parameters() for model in [text_model, *models]]
result = [config.to_dict() for config in [*configurations, *parts]], counts
"""


@newer_transformers
def test_scripts_of_configurations():
    """Every field that is written here has the value that it has there. (`tie_word_embeddings` of a whole model is true
    there by default, and here as in the text part.)"""
    (ours, counts), (theirs, their_counts) = (run(CONFIGURATIONS, name, "") for name in ("auto", "transformers"))
    assert counts == their_counts
    for a, b in zip(ours, theirs, strict=True):
        for name, value in a.items():
            if not isinstance(value, dict):
                assert b[name] == value, name
