"""LoRA: the example's arithmetic and files against peft's, merging adapters into model directories, and refusals."""

import json
import random
import re
import shutil
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

import command
from checkpoint import Checkpoint, convert, merge
from checkpoint.__main__ import main
from examples import lora
from ministral3 import Ministral3ForCausalLM
from model_types import BUNDLED, load_model
from tests.cases import VOCAB, draw_config, pair
from tests.published import hub_names, quantize
from tests.test_checkpoint import assert_same_weights
from tests.test_formats import draw_model
from tokenizer import Tokenizer
from training import corpus
from training.bits import bits_per_byte

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft reads old names
    pytest.mark.filterwarnings("ignore:.*was trained on"),
]
rngs = st.randoms(use_true_random=False)
IDS = torch.randint(1, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def randomize(model, rng):
    """Random numbers in all adapters and in all modules that are trained whole."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def draw_lora(rng, kind, layers, tied, dtype):
    """A configuration of peft's. (For an embedding of 16 bits, see the test after the next one.)"""
    modules = rng.sample(PROJECTIONS, rng.randint(1, 4))
    settings = dict(r=rng.randint(1, 5), lora_alpha=rng.choice([1, 3, 8, 16.5]), use_rslora=rng.random() < 0.5)
    if rng.random() < 0.3:
        settings["rank_pattern"] = {modules[0]: 6}
    if rng.random() < 0.3:
        settings["alpha_pattern"] = {rf"layers\.0\..*\.{modules[-1]}": 7}
    if not tied:
        others = ["lm_head"]
        if dtype == torch.float32:
            others.append("embed_tokens")
        modules += rng.sample(others, rng.randint(0, 1))
    if kind == "layers":
        settings["layers_to_transform"] = rng.choice([layers - 1, [0]])
        modules = [name for name in modules if name in PROJECTIONS]
    elif kind == "exclude":
        settings["exclude_modules"] = [f"layers.{layers - 1}.self_attn.{name}" for name in PROJECTIONS[:4]]
        modules.append("gate_proj")
    elif kind == "save":
        settings["modules_to_save"] = ["norm"]
    settings["target_modules"] = list(dict.fromkeys(modules))
    if kind == "regex":
        settings["target_modules"] = rf".*\.(?:{'|'.join(modules)})"
    return peft.LoraConfig(**settings)


def write_adapter(base, directory, config, rng):
    """Write an adapter of peft's for the model in `base`; returns the model with it merged by peft."""
    kind = transformers.AutoModelForCausalLM
    if "vision_config" in json.loads((base / "config.json").read_text()):
        kind = transformers.AutoModelForImageTextToText
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(kind.from_pretrained(base), config)
        randomize(model, rng)
        model.save_pretrained(directory)
        return model.merge_and_unload()


# ------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("selection", ["list", "layers", "exclude", "regex", "save"])
@settings(max_examples=min(10, settings().max_examples // 2))
@given(rngs, st.sampled_from(["ministral", "ministral3", "mistral3"]))
def test_merged_weights_equal_those_of_peft(tmp_path_factory, selection, rng, kind):
    """Bit for bit, in three number types, from files in every layout, and in Transformers too."""
    path = tmp_path_factory.mktemp("merge")
    model = draw_model(rng, kind)
    model.save_pretrained(path / "base")
    text = model.config.get_text_config()
    config = draw_lora(rng, selection, text.num_hidden_layers, model.config.tie_word_embeddings, model.dtype)
    expected = write_adapter(path / "base", path / "adapter", config, rng)

    layout = rng.choice(["hf", "mistral", "hub"])
    if layout == "hub" and kind == "mistral3":
        hub_names(path / "base")
    if layout == "mistral":
        convert(path / "base", path / "consolidated", format="mistral")
        shutil.rmtree(path / "base")
        (path / "consolidated").rename(path / "base")
    merge(path / "adapter", path / "base", path / "out", max_shard_size=rng.choice(["5GB", "9KB"]))

    assert_same_weights(load_model(path / "out"), expected)
    again, info = type(expected).from_pretrained(path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert_same_weights(again, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_embedding_of_16_bits_is_rounded_once(tmp_path, dtype):
    """peft rounds its product before the sum, but not the product of a linear layer."""
    model = draw_model(random.Random(5), "ministral", dtype)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"])
    theirs = write_adapter(tmp_path / "base", tmp_path / "adapter", config, random.Random(5)).model.embed_tokens.weight
    merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    ours = load_model(tmp_path / "out").model.embed_tokens.weight
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    A, B = (factors[f"base_model.model.model.embed_tokens.lora_embedding_{part}"].double() for part in "AB")
    exact = model.model.embed_tokens.weight.double() + (B @ A).T * 4
    our_error, their_error = ((weight.double() - exact).abs() for weight in (ours, theirs))
    assert not ours.equal(theirs) and (our_error <= their_error).all()


@pytest.mark.parametrize("trained_on", ["text", "vision"])
def test_an_adapter_of_a_text_model_fits_the_vision_model_and_the_reverse(tmp_path, trained_on):
    rng = random.Random(3)
    vision = draw_model(rng, "mistral3", torch.float32)
    vision.save_pretrained(tmp_path / "vision")
    text = transformers.Ministral3ForCausalLM.from_pretrained
    language = load_model(tmp_path / "vision").model.language_model
    Ministral3ForCausalLM.from_pretrained(tmp_path / "vision").save_pretrained(tmp_path / "text")
    assert text(tmp_path / "text").model.norm.weight.equal(language.norm.weight)
    other = {"text": "vision", "vision": "text"}[trained_on]
    modules = r"model\.layers\..*\.(q_proj|down_proj)"
    if trained_on == "vision":
        modules = modules.replace("model", r"model\.language_model", 1)
    config = peft.LoraConfig(r=2, target_modules=modules)
    expected = write_adapter(tmp_path / trained_on, tmp_path / "adapter", config, rng)
    merge(tmp_path / "adapter", tmp_path / other, tmp_path / "out")
    merged = load_model(tmp_path / "out").get_submodule("model" if other == "text" else "model.language_model")
    expected = expected.get_submodule("model" if trained_on == "text" else "model.language_model")
    assert_same_weights(merged, expected)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if ".0.mlp.down_proj." not in name}, file)
    with pytest.raises(ValueError, match=r"lacks factors of \S*layers\.0\.mlp\.down_proj, which target_modules"):
        merge(tmp_path / "adapter", tmp_path / other, tmp_path / "again")


def test_the_types_of_numbers(tmp_path):
    """Factors of 16 bits, a type that is asked for, and float64: one rounding, of the sum."""
    model = draw_model(random.Random(1), "ministral", torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"])
    expected = write_adapter(tmp_path / "base", tmp_path / "adapter", config, random.Random(1))
    name = "model.layers.0.self_attn.q_proj"
    W = load_file(tmp_path / "base" / "model.safetensors")[f"{name}.weight"]
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    factors = load_file(file)
    for dtype in (torch.float32, torch.float16, torch.float64):
        save_file({key: tensor.to(dtype) for key, tensor in factors.items()}, file)
        A, B = (load_file(file)[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        exact = torch.promote_types(dtype, torch.float32)
        total = W.to(exact) + B.to(exact) @ A.to(exact) * (5 / 3)
        for target in (None, torch.float64, torch.float16):
            out = tmp_path / f"{dtype}-{target}"
            merge(tmp_path / "adapter", tmp_path / "base", out, target)
            merged = load_file(out / "model.safetensors")
            assert merged[f"{name}.weight"].equal(total.to(target or torch.bfloat16)), (dtype, target)
            assert {tensor.dtype for tensor in merged.values()} == {target or torch.bfloat16}
    merged = load_model(tmp_path / "torch.float32-None").get_parameter(f"{name}.weight")
    assert merged.equal(expected.get_parameter(f"{name}.weight"))


def test_fp8_weights_are_multiplied_by_their_scales(tmp_path, capsys):
    draw_model(random.Random(4), "ministral3", torch.bfloat16).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["up_proj"])
    write_adapter(tmp_path / "base", tmp_path / "adapter", config, random.Random(4))
    quantize(tmp_path / "base")
    assert "FP8 weights, whose type cannot hold merged ones; give a dtype" in refused(capsys, tmp_path)
    merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", torch.bfloat16)
    merged = load_model(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    name = "model.layers.1.mlp.up_proj"
    W = Checkpoint(tmp_path / "base").read(f"{name}.weight", torch.float32)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    A, B = (factors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    assert merged.get_parameter(f"{name}.weight").equal((W + B @ A * 4).bfloat16())


# ---------------------------------------------------------------------------------------------------------- example


@pytest.mark.parametrize("family", ["ministral", "ministral3"])
def test_the_example_computes_what_peft_computes(tmp_path, family):
    """peft reads the example's files: equal logits, gradients and merged weights, bit for bit."""
    config = draw_config(random.Random(0), family=family, attn_implementation="sdpa")
    ours, theirs = pair(config, torch.float32, 0)
    lora.add_adapters(ours, r=3, alpha=7)
    randomize(ours, random.Random(0))
    lora.save_adapters(ours, tmp_path)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)
    assert ours(IDS).logits.equal(adapted(IDS).logits)
    losses = [model(IDS, labels=IDS).loss for model in (ours, adapted)]
    for loss in losses:
        loss.backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    for name, gradient in gradients.items():
        theirs_name = "base_model.model." + name.replace(".weight", ".default.weight")
        assert gradient.equal(adapted.get_parameter(theirs_name).grad), name
    trained = sum(p.requires_grad for p in adapted.parameters())
    assert len(gradients) == trained == sum(p.requires_grad for p in ours.parameters())
    lora.merge_adapters(ours)
    assert_same_weights(ours, adapted.merge_and_unload())


def test_training_starts_at_the_base_model():
    ours, theirs = pair(draw_config(random.Random(1), family="ministral3"), torch.float32, 1)
    lora.add_adapters(ours)
    assert ours(IDS).logits.equal(theirs(IDS).logits)
    ours(IDS, labels=IDS).loss.backward()
    factors = {name: p.grad for name, p in ours.named_parameters() if "lora_" in name}
    assert all((grad != 0).any() == ("lora_B" in name) for name, grad in factors.items())


@pytest.fixture
def short(monkeypatch):
    """A short corpus."""
    texts = corpus.load()
    short = {"train": [work[:60_000] for work in texts["train"][:2]], "test": [texts["test"][0][:24_000]]}
    monkeypatch.setattr(corpus, "load", lambda: short)
    return short


@pytest.mark.slow
def test_the_example_learns_and_its_adapter_merges(short, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lora", "--save", str(tmp_path / "adapter")])
    assert lora.main(steps=12) == 0
    words = capsys.readouterr().out.replace(";", "").split()
    before, after = (float(words[words.index(word) + 1]) for word in ("before:", "after:"))
    assert after < before - 0.05
    merge(tmp_path / "adapter", BUNDLED, tmp_path / "out", torch.float32)
    held_out = [lora.spelling_of_1623(short["test"][0][20_000:])]
    merged = load_model(tmp_path / "out")
    score = bits_per_byte(merged, Tokenizer.from_dir(tmp_path / "out"), held_out, 1024)
    assert score == pytest.approx(after, abs=6e-4)


def test_the_spelling():
    assert lora.spelling_of_1623("Up, up! I have judged, Julia: give every VOTE; a virtue, love us.") == (
        "Vp, vp! I haue iudged, Iulia: giue euery VOTE; a virtue, loue vs."
    )


@pytest.mark.slow
def test_the_figure_of_modern_spelling():
    texts = [play[20_000:50_000] for play in corpus.load()["test"]]
    model = load_model(BUNDLED, torch.float32)
    measured = bits_per_byte(model, Tokenizer.from_dir(BUNDLED), texts, 1024)
    assert f"needs {measured:.3f} bits per byte" in lora.__doc__.replace("\n", " ")


# --------------------------------------------------------------------------------------------- what is refused


@pytest.fixture
def directories(tmp_path):
    """An adapter, and its base in tmp_path."""
    draw_model(random.Random(0), "ministral3", torch.float16).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    write_adapter(tmp_path / "base", tmp_path / "adapter", config, random.Random(0))
    return tmp_path


def refused(capsys, path, *arguments):
    """The one line with which the command refuses to merge. Nothing is left."""
    before = sorted(path.iterdir())
    code = main(["merge", str(path / "adapter"), str(path / "base"), str(path / "out"), *arguments])
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if not line.startswith("note: ")]
    assert code == 2 and len(errors) == 1 and errors[0].startswith("error: "), lines
    assert sorted(path.iterdir()) == before
    return errors[0]


Q = "base_model.model.model.layers.0.self_attn.q_proj"


TENSORS = {
    r"lora_A\.weight is there without the other factor": lambda t: t.pop(f"{Q}.lora_B.weight"),
    r"lora_B\.weight is there without the other factor": lambda t: t.pop(f"{Q}.lora_A.weight"),
    "lacks factors of model.layers.0.self_attn.q_proj, which target_modules": lambda t: [
        t.pop(f"{Q}.lora_{part}.weight") for part in "AB"
    ],
    r"factors .* of model\.layers\.0\.self_attn\.q_proj; adapter_config\.json says rank 2": lambda t: t.update(
        {f"{Q}.lora_A.weight": torch.ones(3, t[f"{Q}.lora_A.weight"].shape[1])}
    ),
    r"lora_A\.weight is for \[\d+, 999\], model\.layers": lambda t: t.update(
        {f"{Q}.lora_A.weight": torch.ones(2, 999)}
    ),
    r"lora_A\.weight holds NaN or infinity": lambda t: t[f"{Q}.lora_A.weight"].fill_(float("nan")),
    r"is I32; allowed: BF16": lambda t: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"].int()}),
    r"the merged weight does not fit into torch\.float16": lambda t: t[f"{Q}.lora_B.weight"].fill_(1e38),
    "holds model.norm.weight; allowed: names that begin with": lambda t: t.update({"model.norm.weight": torch.ones(1)}),
    r"lora_magnitude_vector\S* belongs to no tensor": lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(8)}),
    r"layers\.9\.\S* belongs to no tensor of .*base": lambda t: [
        t.update({f"{Q.replace('.0.', '.9.')}.lora_{part}.weight": t[f"{Q}.lora_{part}.weight"]}) for part in "AB"
    ],
    r"lora_A\.default\.weight belongs to no tensor": lambda t: [
        t.update({f"{Q}.lora_{part}.default.weight": t.pop(f"{Q}.lora_{part}.weight")}) for part in "AB"
    ],
    r"target_modules in adapter_config\.json does not name its module": lambda t: [
        t.update({f"{Q}.lora_{part}.weight".replace("q_proj", "k_proj"): torch.ones(2, 2)}) for part in "AB"
    ],
    "are the same tensor": lambda t: t.update(
        {f"{Q}.weight": torch.ones(2, 2), f"{Q}.base_layer.weight": torch.ones(2, 2)}
    ),
    "holds no tensors": lambda t: t.clear(),
    r"model\.norm\.weight is there, but modules_to_save in adapter_config\.json does not name": lambda t: t.update(
        {"base_model.model.model.norm.weight": torch.ones(32)}
    ),
}


@pytest.mark.parametrize("message", TENSORS)
def test_tensors_that_do_not_fit(directories, capsys, message):
    file = directories / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    TENSORS[message](tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)
    assert re.search(message, refused(capsys, directories))


SETTINGS = {
    "peft_type='IA3', which is not supported; supported: 'LORA'": dict(peft_type="IA3"),
    "r=0; allowed: a whole number above 0": dict(r=0),
    "r='8'; allowed": dict(r="8"),
    "lora_alpha=None; allowed: a number": dict(lora_alpha=None),
    "allowed: a number of float64": dict(lora_alpha=10**400),
    "alpha_pattern={'q_proj': 1000": dict(alpha_pattern={"q_proj": 10**400}),
    "bias='all'; allowed: 'none'": dict(bias="all"),
    "use_rslora='yes'; allowed: true or false": dict(use_rslora="yes"),
    "init_lora_weights='pissa'; allowed": dict(init_lora_weights="pissa"),
    "init_lora_weights='loftq'; allowed": dict(init_lora_weights="loftq"),
    "use_dora=True, which is not supported; merge it with PEFT": dict(use_dora=True),
    "fan_in_fan_out=True, which is not supported": dict(fan_in_fan_out=True),
    "lora_bias=True, which is not supported": dict(lora_bias=True),
    "of_the_future=1, which is not supported": dict(of_the_future=1),
    "rank_pattern=[1]; allowed: an object": dict(rank_pattern=[1]),
    "rank_pattern=[]; allowed: an object": dict(rank_pattern=[]),
    "alpha_pattern=''; allowed: an object": dict(alpha_pattern=""),
    "layers_pattern=['(']; allowed: names or regular": dict(layers_pattern=["("], layers_to_transform=[0]),
    "layers_pattern='(?P<number>a)'; allowed: names": dict(layers_pattern="(?P<number>a)", layers_to_transform=[0]),
    "rank_pattern={'q_proj': 0}; allowed: an object": dict(rank_pattern={"q_proj": 0}),
    "alpha_pattern={'(': 1}; allowed: names or regular": dict(alpha_pattern={"(": 1}),
    "target_modules='('; allowed: a regular expression": dict(target_modules="("),
    "target_modules='a{99999999999999999999}'; allowed": dict(target_modules="a{99999999999999999999}"),
    "target_modules=3; allowed: a text": dict(target_modules=3),
    "layers_to_transform='0'; allowed: whole numbers": dict(layers_to_transform="0"),
    "says rank 3": dict(rank_pattern={"q_proj": 3}),
    "lacks factors of model.layers.0.self_attn.o_proj": dict(target_modules=["q_proj", "v_proj", "o_proj"]),
    "lacks the weights of lm_head, which modules_to_save": dict(modules_to_save=["lm_head"]),
    "lacks the weights of score": dict(modules_to_save=["score"]),
}


@pytest.mark.parametrize("message", SETTINGS)
def test_configurations_that_are_refused(directories, capsys, message):
    file = directories / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | SETTINGS[message]))
    assert message in refused(capsys, directories)


def test_a_weight_that_was_saved_is_missing(tmp_path, capsys):
    """Of several that one name means."""
    draw_model(random.Random(2), "ministral3", torch.float32).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    write_adapter(tmp_path / "base", tmp_path / "adapter", config, random.Random(2))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.0.input_layernorm.weight"]
    save_file(tensors, file)
    assert "lacks the weights of model.layers.0.input_layernorm, which modules_to_save" in refused(capsys, tmp_path)


@pytest.mark.parametrize("pattern", ["(layers|h)", ["h", "lay(er)s"], ""])
def test_patterns_of_layers(tmp_path, pattern):
    """Groups in them are not the number of the layer."""
    draw_model(random.Random(2), "ministral3", torch.float32).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=pattern)
    expected = write_adapter(tmp_path / "base", tmp_path / "adapter", config, random.Random(2))
    merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    assert_same_weights(load_model(tmp_path / "out"), expected)


def test_a_pattern_of_layers_without_a_number(directories, capsys):
    file = directories / "adapter" / "adapter_config.json"
    changes = dict(layers_pattern="layers|h", layers_to_transform=[0])
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert "target_modules in adapter_config.json does not name its module" in refused(capsys, directories)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_a_base_of_other_numbers_is_refused(directories, capsys, dtype):
    """Also where a type is asked for, as by `load_model`."""
    file = directories / "base" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, file)
    for arguments in ([], ["--dtype", "float32"]):
        message = refused(capsys, directories, *arguments)
        assert re.search(rf"{re.escape(name)} is (I8|BOOL|F8_E4M3).*; allowed: one", message)
    with pytest.raises(ValueError, match=r"q_proj\.weight is (I8|BOOL|F8_E4M3)"):
        load_model(directories / "base", torch.float32)


@pytest.mark.parametrize("modules, saved", [(["embed_tokens"], None), (["lm_head"], None), (["q_proj"], ["lm_head"])])
def test_tied_tensors_are_not_changed(tmp_path, capsys, modules, saved):
    """Whether a factor changes them, or they were trained whole."""
    model = draw_model(random.Random(2), "ministral3", torch.float32)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=modules, modules_to_save=saved)
    write_adapter(tmp_path / "base", tmp_path / "adapter", config, random.Random(2))
    assert "embedding and head of the base are one tensor (tied)" in refused(capsys, tmp_path)


def test_files_that_are_missing(directories, capsys):
    (directories / "adapter" / "adapter_model.safetensors").rename(directories / "adapter" / "adapter_model.bin")
    assert "a pickle (adapter_model.bin) is not read" in refused(capsys, directories)
    for content in (b"no", b""):
        (directories / "adapter" / "adapter_model.safetensors").write_bytes(content)
        assert "is truncated or not a safetensors file" in refused(capsys, directories)
    (directories / "adapter" / "adapter_config.json").write_text("{")
    assert "is not JSON" in refused(capsys, directories)
    (directories / "adapter" / "adapter_config.json").unlink()
    assert "so it is no adapter; give the directories in the order ADAPTER BASE OUT" in refused(capsys, directories)
    (directories / "out").mkdir()
    (directories / "out" / "file").touch()
    assert "holds something already; give a new or empty directory" in refused(capsys, directories)


def test_an_adapter_that_cannot_be_read(directories, capsys, monkeypatch):
    """The permission is missing; the file is not damaged."""

    usual = Path.open

    def refuse(path, *arguments, **settings):
        if path.name == "adapter_model.safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return usual(path, *arguments, **settings)

    monkeypatch.setattr(Path, "open", refuse)
    assert "Permission denied" in refused(capsys, directories)


def test_an_adapter_is_recognised_everywhere(directories, capsys):
    """`info` describes it, everything else names the command that merges it."""
    adapter = str(directories / "adapter")
    cure = f"merge it into its base: python -m checkpoint merge {adapter} {directories / 'base'} OUT"
    with pytest.raises(ValueError, match="is a LoRA adapter"):
        load_model(adapter)
    for arguments in (["convert", adapter, str(directories / "new")], ["merge", adapter, adapter, "new"]):
        assert main(arguments) == 2
        line = capsys.readouterr().err
        assert cure in line and line.count("\n") == 1
    assert command.main(["--model", adapter, "text"]) == 2
    assert cure in capsys.readouterr().err
    assert main(["info", adapter]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"adapter     LoRA of {directories / 'base'}", "rank        2 (lora_alpha 8)"
    ]  # fmt: skip


def test_the_command_merges_and_names_another_base(directories):
    (directories / "base").rename(directories / "other")
    (directories / "other" / "tekken.json").write_text("{}")
    paths = [str(directories / name) for name in ("adapter", "other", "out")]
    with pytest.warns(UserWarning, match=r"was trained on .*base, and is merged into .*other"):
        merge(*paths[:2], directories / "first")
    assert main(["merge", *paths, "--dtype", "bf16"]) == 0
    files = sorted(path.name for path in (directories / "out").iterdir())
    assert files == ["config.json", "model.safetensors", "tekken.json"]
    assert load_model(directories / "out").dtype == torch.bfloat16


def test_an_adapter_on_the_hub(directories, monkeypatch):
    """Its two files are fetched, and of the base everything."""
    asked = []

    def download(name, allow_patterns, **options):
        asked.append((name, allow_patterns))
        return directories / name.partition("/")[2]

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    merge("owner/adapter", "owner/base", directories / "out")
    assert asked[0] == ("owner/adapter", ["config.json", "params.json", "adapter_config.json",
                                          "adapter_model.safetensors"])  # fmt: skip
    assert asked[1][0] == "owner/base" and "model.safetensors" in asked[1][1]
    assert load_model(directories / "out")
