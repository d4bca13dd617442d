"""Two processes with half of every matrix each compute the same as one process."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh

from examples import tensor_parallel
from examples.tensor_parallel import end_process, generate_text, main, shard
from fast import text_model
from generate import generate
from ministral import KVCache, MinistralConfig, MinistralForCausalLM
from ministral3 import Ministral3Config, Ministral3ForCausalLM
from vision import Mistral3ForConditionalGeneration
from vision_config import Mistral3Config, PixtralVisionConfig

SIZES = dict(vocab_size=50, hidden_size=20, intermediate_size=24, num_hidden_layers=2, num_attention_heads=8,
             num_key_value_heads=4, head_dim=8, initializer_range=0.3)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=8, mscale=1.0,
            mscale_all_dim=1.0, llama_4_scaling_beta=0.5)  # fmt: skip


def models():
    """Both families: windows; YaRN, query scales above 1, tied embeddings. And a vision model."""
    torch.manual_seed(0)
    mixed = MinistralConfig(**SIZES, sliding_window=5, layer_types=["full_attention", "sliding_attention"])
    yarn = Ministral3Config(**SIZES, rope_parameters=YARN, tie_word_embeddings=True, pad_token_id=None)
    tower = PixtralVisionConfig(16, 24, 1, 2, image_size=16, patch_size=4, initializer_range=0.3)
    vision = Mistral3Config(tower, yarn, tie_word_embeddings=True)
    classes = (MinistralForCausalLM, mixed), (Ministral3ForCausalLM, yarn), (Mistral3ForConditionalGeneration, vision)
    return [cls(config).double().eval() for cls, config in classes]


IDS = torch.arange(1, 31).view(2, 15)


def outputs(model):
    """Logits of whole texts, logits of a step with the cache, generated tokens, and logits of a text with an image."""
    with torch.inference_mode():
        cache = KVCache(model.config.get_text_config())
        whole = model(IDS, past_key_values=cache).logits
        step = model(IDS[:, :1], past_key_values=cache).logits
    results = [whole, step, generate(model, IDS, max_new_tokens=8, eos_token_id=())]
    if isinstance(model, Mistral3ForConditionalGeneration):
        with torch.inference_mode():
            pixels = torch.linspace(-1, 1, 192, dtype=torch.float64).view(1, 3, 8, 8)  # one token after merging
            results.append(model(torch.tensor([[1, model.config.image_token_index, 7]]), pixel_values=pixels).logits)
    return results


def matrices(model):
    """The parameters of the language model and its head, without norms."""
    kept = [*text_model(model).named_parameters(), ("lm_head", model.lm_head.weight)]
    return [p for name, p in kept if "norm" not in name]


def work(rank, directory):
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=2)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,))
    results = []
    for model in models():
        whole = sum(p.numel() for p in matrices(model))
        assert 2 * sum(p.to_local().numel() for p in matrices(shard(model, mesh))) == whole
        results.append(outputs(model))
    torch.save(results, f"{directory}/{rank}")
    dist.destroy_process_group()
    end_process(0)


@pytest.mark.slow
def test_two_processes_compute_the_same_as_one(tmp_path):
    expected = [outputs(model) for model in models()]
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        for theirs, ours in zip(torch.load(tmp_path / str(rank)), expected):
            for a, b in zip(theirs, ours):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * max(float(b.abs().max()), 1))


def test_all_processes_draw_the_same_tokens(monkeypatch, capsys):
    """Each process samples for itself: the seed does not depend on the process."""
    alone = SimpleNamespace(get_world_size=lambda: 1, get_rank=lambda: 0)
    monkeypatch.setattr(tensor_parallel, "dist", alone)
    monkeypatch.setattr(tensor_parallel, "init_device_mesh", lambda *_: None)
    monkeypatch.setattr(tensor_parallel, "shard", lambda model, mesh: model)
    monkeypatch.setattr(tensor_parallel, "run", lambda options: generate_text(options, torch.device("cpu")) or 0)
    texts = []
    for seed in (0, 0, 1):
        assert main(["Enter", "--max-new-tokens", "8", "--seed", str(seed)][: 3 + 2 * seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_sizes_that_cannot_be_split_are_refused(capsys, monkeypatch):
    class Three:
        def size(self):
            return 3

    with pytest.raises(ValueError, match="num_key_value_heads=4 in 3 parts"):
        shard(models()[0], Three())
    monkeypatch.delitem(os.environ, "RANK", raising=False)
    assert main(["text"]) == 2
    assert capsys.readouterr().err == (
        "error: no process group; start it with: torchrun --nproc-per-node 2 -m examples.tensor_parallel ...\n")
