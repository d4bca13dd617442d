"""Tests with published weights, which the user gives. Without them the tests are skipped.

    pytest tests/test_weights.py --weights-8b-2410 mistralai/Ministral-8B-Instruct-2410
    pytest tests/test_weights.py --weights mistralai/Ministral-3-3B-Instruct-2512-BF16
"""

import json

import mistral_common.tokens.tokenizers.tekken as tekken
import pytest
import torch
import transformers

import checkpoint
from command import choose_device
from generate import generate
from model_types import load_model
from tests.test_parity import assert_same
from tokenizer import Tokenizer

pytestmark = pytest.mark.weights


def given(request, option):
    """The directory given with an option."""
    if (name := request.config.getoption(option)) is None:
        pytest.skip(f"needs published weights: {option} DIR_OR_HUB_ID")
    return checkpoint.find(name)


@pytest.fixture(scope="module")
def old(request):
    """Ministral-8B-Instruct-2410 in bfloat16 on the best device, and its tokenizer."""
    directory = given(request, "--weights-8b-2410")
    return load_model(directory, torch.bfloat16, choose_device("auto")), Tokenizer.from_dir(directory)


# The figures are those of Transformers' own integration tests of this model (tests/models/ministral).
MEAN = [-1.5029, -7.2815, 4.5190, 0.5930, -5.2526, 3.0765, -0.6314, 1.8068]
FIRST = [
    -3.9446, -3.9466, 0.6383, -3.9466, -3.9468, -3.9448, -3.9462, -3.9455, -3.9451, -0.8244, -3.9472, -3.9458, -3.9460,
    -3.9406, -3.9462, -3.9462, -3.9458, -3.9462, -3.9463, -3.9461, -3.9448, -3.9451, -3.9462, -3.9458, -3.9455, -3.9452,
    -3.9458, -3.9469, -3.9460, -3.9464,
]  # fmt: skip


@torch.no_grad()
def test_known_logits(old):
    model, _ = old
    logits = model(torch.tensor([[1, 306, 4658, 278, 6593, 310, 2834, 338]], device=model.device)).logits.float().cpu()
    torch.testing.assert_close(logits.mean(-1)[0], torch.tensor(MEAN), atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(logits[0, 0, :30], torch.tensor(FIRST), atol=1e-2, rtol=1e-2)


def test_known_continuation(old):
    model, tokenizer = old
    ids = torch.tensor([tokenizer.encode("My favourite condiment is ")])
    text = tokenizer.decode(generate(model, ids, max_new_tokens=20)[0].tolist())
    assert text == "My favourite condiment is 100% natural, 100% organic, 100% free of"


def test_known_continuation_of_a_long_text(old):
    model, _ = old
    ids = generate(model, torch.tensor([[1] + [306, 338] * 2048]), max_new_tokens=4)
    assert ids[0, -2:].tolist() == [36850, 4112]


@torch.no_grad()
def test_the_model_equals_transformers(request):
    """Logits of a short text, from the same files, in bfloat16 on the CPU: 0 bits of difference."""
    directory = given(request, "--weights")
    vision = "vision_config" in checkpoint.read_config(directory)
    auto = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    ids = torch.tensor([Tokenizer.from_dir(directory).encode("The quick brown fox jumps over the lazy dog.")])
    logits = load_model(directory, torch.bfloat16)(ids).logits
    assert_same(logits, auto.from_pretrained(directory, dtype=torch.bfloat16)(ids).logits)


def test_the_tokenizer_equals_mistral_common(request):
    directory = given(request, "--weights")
    ours, theirs = Tokenizer.from_dir(directory), tekken.Tekkenizer.from_file(directory / "tekken.json")
    for text in ("'The' eBay don't  \n\n 1234 日本語 😀 </s>", json.dumps({"a": [1, None]}), "x[/INST]y[THINK]"):
        assert ours.encode(text) == theirs.encode(text, bos=True, eos=False)
    assert ours.vocab_size == theirs.n_words and f"v{ours.version[1:]}" == theirs.version.value
