"""Model directories: round trips with Transformers in both directions, shards, ties, and broken files."""

import errno
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, strategies as st
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint.__main__ import main as checkpoint_main
from explorer.__main__ import main as explorer_main
from ministral import MinistralConfig, MinistralForCausalLM, MinistralModel
from ministral3 import Ministral3ForCausalLM, Ministral3Model
from model_types import BUNDLED, load_model
from reference.__main__ import main as reference_main
from reference.golden import HERE as GOLDEN
from tests.cases import draw_case, draw_config, pair
from tests.kills import killed
from tests.published import quantize
from tests.test_parity import assert_same
from tokenizer import Tokenizer, bpe

rngs = st.randoms(use_true_random=False)
transformers.utils.logging.disable_progress_bar()


def assert_same_weights(ours, theirs):
    """Equal names and bits. (Not the logits: weights mapped to a file begin at any multiple of 8 bytes, allocated ones
    at multiples of 64, and for single rows the kernels differ by it, in Transformers too.)"""
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and tensor.equal(theirs[name]), name


@torch.no_grad()
@given(rngs)
def test_a_directory_saved_here_loads_in_transformers(tmp_path_factory, rng):
    case, path = draw_case(rng), tmp_path_factory.mktemp("ours")
    total = sum(p.numel() * p.element_size() for p in case.ours.parameters())
    case.ours.save_pretrained(path, max_shard_size=rng.choice([10**9, total // 3 + 1]))
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, attn_implementation=case.ours.config.attn_implementation
    )
    assert not any(info.values()), info
    assert_same_weights(case.ours, theirs)
    again = load_model(path, attn_implementation=case.ours.config.attn_implementation)
    assert type(again) is type(case.ours) and again.config == case.ours.config and not again.training
    assert_same_weights(case.ours, again)
    assert_same(again(case.ids, case.mask).logits, theirs(case.ids, case.mask).logits, case.padding_mask)


@torch.no_grad()
@given(rngs)
def test_a_directory_of_transformers_loads_here(tmp_path_factory, rng):
    case, path = draw_case(rng), tmp_path_factory.mktemp("theirs")
    case.theirs.save_pretrained(path, max_shard_size=rng.choice(["5GB", "8KB"]))
    attn = case.ours.config.attn_implementation
    again = load_model(path, attn_implementation=attn)
    assert_same_weights(again, case.theirs)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == case.ours.config.tie_word_embeddings
    cast = load_model(path, dtype=torch.float64, attn_implementation=attn)
    expected = case.ours.double()(case.ids).logits
    assert_same(cast(case.ids).logits, expected)


@torch.no_grad()
def test_a_backbone_and_a_model_with_a_head_read_each_others_files(tmp_path):
    for seed in range(4):
        case = draw_case(random.Random(seed))
        path, base_path = tmp_path / f"{seed}", tmp_path / f"{seed}-base"
        case.ours.save_pretrained(path)
        base_class = Ministral3Model if isinstance(case.ours, Ministral3ForCausalLM) else MinistralModel
        base = base_class.from_pretrained(path, attn_implementation=case.ours.config.attn_implementation)
        assert_same_weights(base, case.ours.model)
        base.save_pretrained(base_path)
        theirs = transformers.AutoModel.from_pretrained(base_path)
        assert set(theirs.state_dict()) == set(base.state_dict())
        if case.ours.config.tie_word_embeddings:
            assert_same(load_model(base_path).lm_head.weight, case.ours.lm_head.weight)
        else:
            with pytest.warns(UserWarning, match=r"has no lm_head\.weight, so it is tied to model\.embed_tokens"):
                tied = load_model(base_path)
            assert tied.lm_head.weight is tied.model.embed_tokens.weight and tied.config.tie_word_embeddings


def test_state_dict_keys_are_transformers():
    for seed in range(20):
        ours, theirs = pair(draw_config(random.Random(seed)), torch.float32, seed)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict(), strict=True)
        ours.load_state_dict(theirs.state_dict(), strict=True)


@pytest.fixture
def saved(tmp_path):
    """A small untied model, its directory, and the files' content."""
    torch.manual_seed(0)
    config = MinistralConfig(hidden_size=8, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2,
                             intermediate_size=8, vocab_size=9)  # fmt: skip
    model = MinistralForCausalLM(config)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def rewrite(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_the_head_that_is_stored_is_used(saved):
    """If config.json says tied and the file has another head, the head of the file is used, with a warning."""
    model, path = saved
    config = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="lm_head.weight is stored with values of its own"):
        again = load_model(path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight) and not again.config.tie_word_embeddings
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    again = load_model(path)  # stored twice with equal values: tied
    assert again.lm_head.weight is again.model.embed_tokens.weight
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].to(torch.float8_e4m3fn)}))
    with pytest.raises(ValueError, match=r"lm_head\.weight is F8_E4M3"), pytest.warns():
        load_model(path)
    rewrite(path, lambda tensors: tensors.pop("lm_head.weight"))
    assert load_model(path).lm_head.weight.equal(model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.norm.weight"), "1 tensors missing: model.norm.weight"),
        (lambda t: t.update({"model.norm.bias": torch.ones(8)}), "1 tensors unexpected: model.norm.bias"),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), r"norm.weight is \[7\], config.json asks for \[8\]"),
        (lambda t: [t.pop(k) for k in list(t) if "mlp" in k], "6 tensors missing: .*mlp"),
    ],
)
def test_wrong_tensors_are_named(saved, change, message):
    _, path = saved
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        load_model(path)


@pytest.mark.parametrize("cls", [MinistralForCausalLM, None], ids=["from_pretrained", "load_model"])
def test_types_and_devices_as_text(saved, cls):
    """Under both names of each argument. Other text is refused."""
    model, path = saved
    load = load_model if cls is None else cls.from_pretrained
    for value in ("float64", "torch.float64", torch.float64):
        assert load(path, dtype=value).dtype == load(path, torch_dtype=value).dtype == torch.float64
    for value in ("auto", None):
        assert load(path, dtype=value).dtype == load(path, torch_dtype=value).dtype == model.dtype
    for value in ("cpu", "cpu:0", torch.device("cpu"), None):
        assert load(path, device=value).device.type == load(path, device_map=value).device.type == "cpu"
    for arguments, message in (
        (dict(dtype="int8"), "dtype='int8' is not supported; supported: bfloat16, float16, float32, float64, or auto"),
        (dict(dtype="cuda"), r"dtype='cuda' is not supported; .*\(a device is given as device=\)"),
        (dict(dtype=torch.int8), "dtype=torch.int8 is not supported"),
        (dict(dtype=float), "dtype=<class 'float'> is not supported"),
        (dict(dtype="float32", torch_dtype="float64"), "dtype='float32' and torch_dtype='float64' differ"),
        (dict(device="bfloat16"), r"device='bfloat16' is not supported .*\(a type is given as dtype=\)"),
        (dict(device_map="balanced"), "device_map='balanced' is not supported"),
        (dict(device="cpu", device_map="meta"), "device='cpu' and device_map='meta' differ"),
        (dict(device="cuda:99"), "device='cuda:99' is not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            load(path, **arguments)
    for name in (None, "", 3, model):
        with pytest.raises(ValueError, match="a model is named by a directory or a Hub id"):
            load(name)
    for name in (None, "", 3):
        with pytest.raises(ValueError, match="a model is written into a directory, named by text or a Path"):
            model.save_pretrained(name)
    with pytest.raises(ValueError, match="max_shard_size='5 pages' is impossible"):
        model.save_pretrained(path, max_shard_size="5 pages")


@pytest.mark.parametrize(
    "prefix, message",
    [
        ("module.", r"tensors missing: .*; found module\.lm_head.*'module.' is written by torch's DataParallel"),
        ("_orig_mod.", r"found _orig_mod\.lm_head\.weight.*is written by torch.compile: save model._orig_mod"),
        ("base_model.model.", r"found base_model\.model\.lm_head.*is written by PEFT: save model.merge_and_unload"),
        ("net.", r"found net\.lm_head\.weight, net\.model\.embed_tokens\.weight.* and \d+ more$"),
    ],
)
def test_names_that_a_wrapper_has_changed_are_shown(saved, prefix, message):
    _, path = saved
    tensors = load_file(path / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_names_of_the_other_layout_and_of_adapters_are_shown(saved):
    _, path = saved
    tensors = load_file(path / "model.safetensors")
    theirs = {checkpoint.to_mistral(name): tensor for name, tensor in tensors.items()}
    save_file(theirs, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"found layers\.0.*Mistral's names, which belong into consolidated"):
        load_model(path)
    lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 2)}
    save_file(lora, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"found base_model.*lora_A\.weight; they are of a LoRA adapter"):
        load_model(path)
    save_file(tensors | lora, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors unexpected: base_model.*lora_A\.weight; they are of a LoRA"):
        load_model(path)


@pytest.mark.parametrize("config", [False, True])
def test_a_lora_adapter_is_not_a_model(saved, config):
    """Also if the config.json of the base model is in the same directory, as training programs write it."""
    _, path = saved
    (path / "model.safetensors").rename(path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/base"}')
    if not config:
        (path / "config.json").unlink()
    message = r"is a LoRA adapter .* of owner/base, not a whole model; merge it .* merge \S* owner/base OUT"
    for load in (load_model, MinistralForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(path)


def test_types_of_numbers(saved):
    """Several floating-point types load with a dtype, and are refused without; whole numbers are refused."""
    _, path = saved
    rewrite(path, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].bfloat16()}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight is BF16, .* is F32; allowed: one floating-point type"):
        load_model(path)
    assert load_model(path, dtype=torch.bfloat16)(torch.ones(1, 2, dtype=torch.long)).logits.dtype == torch.bfloat16
    rewrite(path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(8, dtype=torch.int8)}))
    with pytest.raises(ValueError, match="is I8"):
        load_model(path, dtype=torch.float32)


def test_frequencies_stored_by_old_versions_are_left_out(saved):
    model, path = saved
    rewrite(path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    assert load_model(path).lm_head.weight.equal(model.lm_head.weight)


def test_broken_files_are_named(saved):
    _, path = saved
    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        weights.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not a safetensors file"):
            load_model(path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor .*found config\.json"):
        load_model(path)
    weights.write_bytes(whole)
    for text, message in (("{", "is not JSON"), ("[1]", "JSON object; found list"), ("\xff", "not JSON|model_type")):
        (path / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=message):
            load_model(path)
    (path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_model(path)


def test_broken_shards_are_named(saved):
    model, path = saved
    model.save_pretrained(path, max_shard_size=1000)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2 and not (path / "model.safetensors").exists()
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    content = (path / shards[1]).read_bytes()
    (path / shards[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[1]} does not exist, though the index names it"):
        load_model(path)
    (path / shards[1]).write_bytes(content[:50])
    with pytest.raises(ValueError, match=f"{shards[1]} is truncated"):
        load_model(path)
    (path / shards[1]).write_bytes(content)
    moved = index["weight_map"] | {"model.norm.weight": shards[0]}
    for weight_map, message in (
        (moved, f"{shards[0]} lacks model.norm.weight"),
        ({"a": "../config.json"}, "weight_map names '../config.json' for 'a'; allowed: a file name"),
        (None, "no weight_map"),
    ):
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            load_model(path)
    model.save_pretrained(path)  # one file again: nothing of the shards stays behind
    assert sorted(os.listdir(path)) == ["config.json", "model.safetensors"]
    assert load_model(path).lm_head.weight.equal(model.lm_head.weight)


def test_a_failed_save_leaves_nothing_half_written(saved, monkeypatch):
    model, path = saved
    before = {name: (path / name).read_bytes() for name in os.listdir(path)}

    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.writer, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(path)
    assert {name: (path / name).read_bytes() for name in os.listdir(path)} == before
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(path / "new")
    assert os.listdir(path / "new") == []  # no config.json without weights


def test_shards_are_replaced_all_or_none(saved, monkeypatch):
    """If a second save fails in the middle, the first one remains."""
    model, path = saved
    model.save_pretrained(path, max_shard_size=600)
    before = {name: (path / name).read_bytes() for name in os.listdir(path)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    written, save = [], checkpoint.writer.save_file

    def fail(tensors, file, metadata):
        written.append(file)
        if len(written) == 2:
            raise OSError("disk full")
        save(tensors, file, metadata)

    monkeypatch.setattr(checkpoint.writer, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(path, max_shard_size=600)
    assert {name: (path / name).read_bytes() for name in os.listdir(path)} == before and len(before) > 3


def test_saving_over_the_files_a_model_is_mapped_to(saved):
    _, path = saved
    model = load_model(path)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.save_pretrained(path)
    again = load_model(path)
    for name, p in again.named_parameters():
        assert p.equal(before[name]) and dict(model.named_parameters())[name].equal(p)


@pytest.mark.parametrize("name", ["no/such", "nowhere", "../nowhere", "/no/such/place"])
def test_no_such_model(name):
    with pytest.raises(FileNotFoundError, match=re.escape(name)):
        load_model(name)


def test_a_file_is_no_model(saved):
    model, path = saved
    with pytest.raises(FileNotFoundError, match=r"is a file; a model is a directory"):
        load_model(path / "config.json")
    with pytest.raises(NotADirectoryError, match="is a file"):
        model.save_pretrained(path / "config.json")


@pytest.mark.parametrize("fp8", [False, True])
def test_loading_peaks_at_the_weights_plus_one_tensor(tmp_path, fp8):
    """Measured in a process of its own: 64 MB of float32 weights, cast to bfloat16 while loading, or 16 MB of FP8."""
    config = MinistralConfig(hidden_size=512, num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=8,
                             intermediate_size=512, vocab_size=1024)  # fmt: skip
    MinistralForCausalLM(config).save_pretrained(tmp_path)
    if fp8:
        quantize(tmp_path)
    program = """
import sys, torch, checkpoint
from model_types import load_model
def anonymous():  # memory of the process itself; the mapped file is the system's, which takes it back at need
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
load_model(sys.argv[2])  # whatever is imported late
peak, read, before = 0, checkpoint.Checkpoint.read, anonymous()
def watched(self, *arguments):
    global peak
    tensor = read(self, *arguments)
    peak = max(peak, anonymous())
    return tensor
checkpoint.Checkpoint.read = watched
model = load_model(sys.argv[1], dtype=torch.bfloat16)
parameters = [p.numel() * p.element_size() for p in model.parameters()]
print(sum(parameters), max(parameters), max(peak, anonymous()) - before)
"""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs Linux's /proc to measure memory")
    tiny = tmp_path / "tiny"
    MinistralForCausalLM(MinistralConfig(hidden_size=8, num_attention_heads=2, num_key_value_heads=1,
                         num_hidden_layers=1, intermediate_size=8, vocab_size=9)).save_pretrained(tiny)  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), str(tiny)], capture_output=True, text=True, check=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # so that what is freed is not counted
    )  # fmt: skip
    size, largest, peak = map(int, run.stdout.split())
    assert size / 2 < peak <= size + largest + 2_000_000


# -------------------------------------------------------------------------------------------------------- conversion


@torch.no_grad()
@pytest.mark.parametrize("case", ["no query scale", "tied, not said", "tied, denied"])
def test_transformers_runs_what_comes_back_from_mistrals_layout(tmp_path, case):
    """Transformers needs llama_4_scaling_beta, and ties weights only if the file says so."""
    rng = random.Random(3)
    config = draw_config(rng, family="ministral3", hidden_act="silu", sliding_window=None,
                         tie_word_embeddings=case != "no query scale")  # fmt: skip
    rope = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=8, mscale=1.0,
                mscale_all_dim=1.0, llama_4_scaling_beta=0.0)  # fmt: skip
    config = replace(config, rope_parameters=rope, rope_theta=None)
    pair(config, torch.float32, 1)[0].save_pretrained(tmp_path / "hf")
    checkpoint.convert(tmp_path / "hf", tmp_path / "mistral", format="mistral")
    params = checkpoint.read_json(tmp_path / "mistral" / "params.json")
    assert "llama_4_scaling" not in params
    if case != "no query scale":
        del params["tied_embeddings"]
        params |= {"tied_embeddings": False} if case == "tied, denied" else {}
    (tmp_path / "mistral" / "params.json").write_text(json.dumps(params))
    checkpoint.convert(tmp_path / "mistral", tmp_path / "back")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.arange(1, 31)[None]
    assert_same(load_model(tmp_path / "back")(ids).logits, theirs(ids).logits, torch.ones_like(ids).bool())
    assert torch.equal(load_model(tmp_path / "back")(ids).logits, load_model(tmp_path / "hf")(ids).logits)


@pytest.mark.parametrize("format", checkpoint.FORMATS)
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight"), r"lacks layers\.0\.feed_forward\.w3\.weight "),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(4)}),
         r"should not have layers\.0\.attention\.wq\.bias "),
        (lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.ones(4)}),
         r"should not have layers\.9\.feed_forward\.w3\.weight "),
        (lambda t: t.update({"language_model.model.norm.weight": torch.ones(4)}), "are the same tensor"),
    ],
)  # fmt: skip
def test_only_whole_models_are_converted(saved, tmp_path, format, edit, message):
    _, path = saved
    rewrite(path, edit)
    with pytest.raises(ValueError, match=message):
        checkpoint.convert(path, tmp_path / "new" / "folder", format=format)
    assert not (tmp_path / "new").exists()


def test_impossible_ways_of_writing_are_refused(saved, tmp_path):
    model, path = saved
    with pytest.raises(ValueError, match="format='gguf' is not supported; supported: hf, mistral"):
        checkpoint.convert(path, tmp_path / "new", format="gguf")
    with pytest.raises(ValueError, match="max_shard_size=0 is impossible"):
        model.save_pretrained(tmp_path / "new", max_shard_size=0)
    with pytest.raises(FileNotFoundError, match=r"no/such/file cannot be written: .* is no directory"):
        checkpoint.write_json(tmp_path / "no/such/file", [])
    assert not (tmp_path / "new").exists()


def test_a_folder_made_for_a_failed_conversion_is_removed(saved, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.writer, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.convert(saved[1], tmp_path / "new" / "folder" / "model")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("before", ["shards", "one file"])
@pytest.mark.parametrize("renamed", [0, 1, 3, "all but config.json"])
def test_a_save_that_is_interrupted_while_renaming_is_no_mixture(saved, monkeypatch, before, renamed):
    """An old model and a new one of the same shape: without its config.json the directory is refused."""
    model, path = saved
    half = sum(p.nbytes for p in model.parameters()) // 3

    def save(value, size):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(value)
        model.save_pretrained(path, max_shard_size=size)

    save(1.0, half if before == "shards" else 10**9)
    done, really = [], os.replace

    def rename(source, target):
        if source.parent == path:  # not the temporary files of `write_tensors`
            if len(done) == renamed or target.name == "config.json":
                raise OSError("interrupted")
            done.append(target)
        really(source, target)

    monkeypatch.setattr(os, "replace", rename)
    with pytest.raises(OSError, match="interrupted"):
        save(2.0, half)
    with pytest.raises(FileNotFoundError):
        load_model(path)
    assert not list(path.glob(".*"))


def killed_saves(path, model, size):
    """The directory as it is left by a save that is killed before each of its steps."""
    for step in itertools.count(1):
        copy = path / f"killed_{step}"
        shutil.copytree(path, copy, ignore=shutil.ignore_patterns("killed_*"))
        was_killed, _ = killed(lambda copy=copy: model.save_pretrained(copy, max_shard_size=size), step)
        if not was_killed:
            return
        yield copy


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("size", ["5GB", pytest.param("1KB", marks=pytest.mark.slow)])
def test_a_save_that_is_killed_is_the_old_model_the_new_one_or_can_be_finished(saved, size):
    model, path = saved
    model.save_pretrained(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2.0)

    def values(directory):
        return {value for p in load_model(directory).parameters() for value in p.flatten().tolist()}

    kinds = []
    for copy in killed_saves(path, model, size):
        try:
            found = values(copy)
            assert found in ({2.0}, values(path))
            kinds.append("new" if found == {2.0} else "old")
        except FileNotFoundError as error:
            assert "rename each .NAME.NUMBER.tmp to NAME" in str(error)
            for leftover in sorted(copy.glob(".*.tmp"), key=lambda found: "config" in found.name):
                leftover.rename(copy / leftover.name[1:].rsplit(".", 2)[0])
            assert values(copy) == {2.0}
            kinds.append("finished")
        model.save_pretrained(copy)
        assert not list(copy.glob(".*"))  # the next save removes what was left
    if size == "5GB":  # the same files and configuration: the weights are replaced in one step
        assert set(kinds) == {"old", "new"}
    else:
        assert set(kinds) == {"old", "finished", "new"}


def test_two_writers_do_not_mix(saved, monkeypatch):
    """The second writer is refused while the first one writes. (The lock is that of another process, too.)"""
    model, path = saved
    save = checkpoint.writer.save_file

    def meanwhile(*arguments, **keywords):
        monkeypatch.setattr(checkpoint.writer, "save_file", save)
        errors = []

        def second():
            with pytest.raises(BlockingIOError, match="is being written by another process"):
                model.save_pretrained(path)
            errors.append(1)

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert errors
        save(*arguments, **keywords)

    monkeypatch.setattr(checkpoint.writer, "save_file", meanwhile)
    model.save_pretrained(path)
    model.save_pretrained(path)


def test_info_names_the_leftovers_of_a_save(saved, capsys):
    _, path = saved
    (path / ".model.safetensors.12-345.tmp").write_bytes(b"12345")
    (path / ".safetensors.12-345.tmp").mkdir()
    (path / ".safetensors.12-345.tmp" / ".tmpAbCdEf").write_bytes(b"678")
    assert checkpoint_main(["info", str(path)]) == 0
    names = ".model.safetensors.12-345.tmp, .safetensors.12-345.tmp"
    assert f"8 B of a save that was interrupted ({names})" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="processes are not looked for there")
def test_only_temporary_files_of_ended_writers_are_removed(tmp_path):
    here, thread = os.getpid(), threading.get_ident()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stay = [f".x.{here}-{thread}.tmp", ".x.1-1.tmp", f".y.{ended.pid}-1.tmp", ".x.mine.tmp", f".x.{10**30}-1.tmp"]
    go = [f".x.{here}-1.tmp", f".x.{ended.pid}-1.tmp"]
    for name in stay + go:
        (tmp_path / name).write_bytes(b"")
    other = threading.Thread(target=checkpoint.replace_file, args=(tmp_path / "x", Path.touch))
    other.start()
    other.join()
    assert sorted(os.listdir(tmp_path)) == sorted([*stay, "x"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path}/x cannot be written: No space left on device"):
        checkpoint.replace_file(tmp_path / "x", lambda _: Path("/dev/full").write_bytes(b"1"))
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_directory_is_one_line(saved, tmp_path, monkeypatch, capsys):
    """The disk is one that the tests, run as root, cannot write to either."""
    model, path = saved
    golden = str(GOLDEN / "ministral" / "one_text.safetensors")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)

    def read_only(path, *_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "mkdir", read_only)
    before = sorted(os.listdir(path))
    with pytest.raises(PermissionError, match=r"model\.safetensors cannot be written: .* is read-only"):
        model.save_pretrained(path)
    for main, arguments, named in (
        (checkpoint_main, ["convert", str(path), str(path / "new")], "new"),
        (reference_main, ["record", "--prompt", "a", "-o", str(path / "x")], "x"),
        (reference_main, ["diff", golden, golden, "--plot", str(path / "x.png")], "x.png"),
        (explorer_main, ["-o", str(path / "x.html")], "x.html"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and f"{path / named} cannot be written: " in error
    monkeypatch.setenv("XDG_CACHE_HOME", str(path / "cache"))
    monkeypatch.setattr(bpe, "CACHED_FROM", 0)
    assert Tokenizer.from_dir(BUNDLED).decode(Tokenizer.from_dir(BUNDLED).encode("To be", bos=False)) == "To be"
    assert sorted(os.listdir(path)) == before


def test_info_check_names_tensors_that_are_not_finite(saved, capsys):
    model, path = saved
    assert checkpoint_main(["info", "--check", str(path)]) == 0
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    model.save_pretrained(path)
    capsys.readouterr()
    assert checkpoint_main(["info", "--check", str(path)]) == 2
    assert capsys.readouterr().err.endswith("1 tensors have NaN or infinite numbers: model.norm.weight\n")


def test_what_is_refused_is_not_converted(saved, tmp_path):
    """Mistral's layout takes whole numbers only, and the shapes are those of the configuration."""
    _, path = saved
    config = json.loads((path / "config.json").read_text())
    for change, message in (
        ({"max_position_embeddings": 64.0}, "max_position_embeddings=64.0"),
        ({"tie_word_embeddings": -1}, "tie_word_embeddings=-1 is impossible"),
        ({"intermediate_size": config["intermediate_size"] + 1}, "the configuration asks for"),
    ):
        (path / "config.json").write_text(json.dumps(config | change))
        for format in ("hf", "mistral"):
            with pytest.raises(ValueError, match=re.escape(message)):
                checkpoint.convert(path, tmp_path / "new", format=format)
            assert not (tmp_path / "new").exists()


def test_a_directory_that_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "no", tmp_path / "no" / "deeper"):
        with pytest.raises(FileNotFoundError, match=f"{path}/config.json does not exist; a model is a directory"):
            checkpoint.read_config(path)
