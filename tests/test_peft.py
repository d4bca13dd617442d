"""Training by other libraries: peft's adapters and Transformers' Trainer take our models as they take Transformers'."""

import inspect
import random
import re
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from generate import generate
from ministral import KVCache
from model_types import load_model
from tests.cases import VOCAB, draw_config, pair

# peft reads names of Transformers' models that Transformers has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
FAMILIES = ("ministral", "ministral3")
# Names of peft's task types and of the classes they are for.
TASKS = {"CAUSAL_LM": "CausalLM", "SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification"}
GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(1, VOCAB, (8, 6), generator=GENERATOR)


def draw_pair(family, task, seed=0, **fixed):
    """Our model and Transformers', with the same weights, in float32."""
    config = draw_config(random.Random(seed), family=family, pad_token_id=0, num_hidden_layers=2,
                         layer_types=None, attn_implementation="sdpa", classifier_dropout=0.0, **fixed)  # fmt: skip
    return pair(config, torch.float32, seed, task=task)


# ------------------------------------------------------------------------------------------------------------ peft


def labels_of(task_type):
    if task_type == "SEQ_CLS":
        return IDS[:, 0] % 2
    if task_type == "TOKEN_CLS":
        return IDS % 2
    return IDS


def train_adapter(model, task_type):
    """The model with a LoRA adapter after three steps, and the losses."""
    torch.manual_seed(0)  # draws the adapter
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=task_type)).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = adapted(IDS, labels=labels_of(task_type)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return adapted.eval(), losses


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("task_type", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_trains_as_on_transformers_models(family, task_type, checkpointing):
    ours, theirs = draw_pair(family, TASKS[task_type])
    if checkpointing:
        ours.gradient_checkpointing_enable()
    _, losses = train_adapter(ours, task_type)
    assert losses == train_adapter(theirs, task_type)[1]
    assert len(set(losses)) == 3


@torch.no_grad()
@pytest.mark.parametrize("task_type", TASKS)
def test_a_merged_adapter_computes_the_same(task_type):
    ours, _ = draw_pair("ministral3", TASKS[task_type])
    before = ours(IDS).logits
    with torch.enable_grad():
        adapted, _ = train_adapter(ours, task_type)
    expected = adapted(IDS).logits
    assert (expected - before).abs().max() > 1e-2
    merged = adapted.merge_and_unload()
    assert type(merged) is type(ours)
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)  # measured: 4e-6


def test_an_adapter_generates():
    """The fast path must not leave the adapter out."""
    ours, _ = draw_pair("ministral3", "CausalLM")
    settings = dict(max_new_tokens=8, eos_token_id=())
    before = generate(ours, IDS, **settings)
    adapted, _ = train_adapter(ours, "CAUSAL_LM")
    texts = [generate(adapted, IDS, fast=fast, **settings) for fast in ("auto", False)]
    merged = generate(adapted.merge_and_unload(), IDS, **settings)
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], merged) and not torch.equal(merged, before)


def test_the_adapter_names_its_base(tmp_path):
    ours, _ = draw_pair("ministral3", "CausalLM")
    ours.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert adapted.active_peft_config.base_model_name_or_path == str(tmp_path) == model.name_or_path
    assert ours.name_or_path == ""


def test_inputs_of_the_next_forward_pass():
    ours, _ = draw_pair("ministral3", "CausalLM")
    assert ours.prepare_inputs_for_generation(IDS)["input_ids"] is not None
    cache = KVCache(ours.config)
    ours(IDS[:, :4], past_key_values=cache)
    mask = torch.ones_like(IDS)
    arguments = ours.prepare_inputs_for_generation(IDS, past_key_values=cache, attention_mask=mask)
    assert torch.equal(arguments["input_ids"], IDS[:, 4:]) and arguments["attention_mask"] is mask
    torch.testing.assert_close(ours(**arguments).logits, ours(IDS, mask).logits[:, 4:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_embeddings_may_pass_gradients_on(family):
    ours, _ = draw_pair(family, "CausalLM")
    ours.requires_grad_(False)
    ours.enable_input_require_grads()
    assert ours(IDS, labels=IDS).loss.requires_grad
    ours.disable_input_require_grads()
    assert not ours(IDS, labels=IDS).loss.requires_grad


# --------------------------------------------------------------------------------------------------------- Trainer


def train(model, directory, dataset, accumulation=1, checkpointing=False):
    """The trainer after two steps, and its losses."""
    parameters = inspect.signature(TrainingArguments).parameters
    recompute = "activation_checkpointing" if "activation_checkpointing" in parameters else "gradient_checkpointing"
    arguments = TrainingArguments(
        output_dir=str(directory), per_device_train_batch_size=2, gradient_accumulation_steps=accumulation,
        max_steps=2, logging_steps=1, learning_rate=1e-2, weight_decay=0.1, seed=0, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, **{recompute: checkpointing},
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def texts():
    """Texts with labels, some of which do not count, so that batches have unequal numbers of them."""
    labels = IDS.clone()
    labels[0, 2:] = -100
    labels[3, :4] = -100
    return [{"input_ids": ids, "labels": row} for ids, row in zip(IDS, labels)]


@pytest.mark.parametrize("accumulation, checkpointing", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("family, tied", [("ministral", False), ("ministral3", True)])
def test_the_trainer_ends_in_the_same_weights(family, tied, accumulation, checkpointing, tmp_path):
    """With several batches a step, the Trainer divides their losses by the number of all their tokens."""
    ours, theirs = draw_pair(family, "CausalLM", tie_word_embeddings=tied)
    losses = [train(model, tmp_path, texts(), accumulation, checkpointing)[1] for model in (ours, theirs)]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert ours.is_gradient_checkpointing == checkpointing
    expected = theirs.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())


def test_the_trainer_classifies(tmp_path):
    """With several batches a step, Transformers' classifiers add up the losses; here they are averaged."""
    rows = [{"input_ids": ids, "labels": ids[0] % 2} for ids in IDS]
    ours, theirs = draw_pair("ministral3", "SequenceClassification")
    assert train(ours, tmp_path, rows)[1] == train(theirs, tmp_path, rows)[1]
    ours, theirs = draw_pair("ministral3", "SequenceClassification")
    mean = (sum(ours(row["input_ids"][None], labels=row["labels"][None]).loss for row in rows) / len(rows)).item()
    trainer, losses = train(ours, tmp_path, rows, accumulation=4)  # all texts in each step
    assert losses[0] == pytest.approx(mean, rel=1e-6)
    assert trainer.predict(rows).predictions.shape == (8, 2)


def test_the_trainer_saves(tmp_path):
    """It calls `save_pretrained` of Transformers' and peft's classes only; docs/transformers.md has a way for ours."""
    page = (Path(__file__).parent.parent / "docs" / "transformers.md").read_text(encoding="utf-8")
    names = {}
    exec(re.search(r"```python\n(from transformers import Trainer\n.*?)```", page, re.DOTALL)[1], names)

    ours, _ = draw_pair("ministral3", "CausalLM", tie_word_embeddings=True)
    trainer = names["SavingTrainer"](model=ours, args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    trainer.save_model(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(again(IDS).logits, ours(IDS).logits)

    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, eval_steps=1, eval_strategy="steps", load_best_model_at_end=True,
        learning_rate=1e-2, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = names["SavingTrainer"](model=ours, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    best = load_model(trainer.state.best_model_checkpoint)
    assert torch.equal(best(IDS).logits, ours.eval()(IDS).logits)

    ours, _ = draw_pair("ministral3", "CausalLM", tie_word_embeddings=False)
    trainer = Trainer(model=ours, args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    trainer.save_model(tmp_path / "weights")
    (tmp_path / "weights" / "config.json").write_bytes((tmp_path / "saved" / "config.json").read_bytes())
    again = load_model(tmp_path / "weights", tie_word_embeddings=False)
    assert torch.equal(again(IDS).logits, ours(IDS).logits)


def test_the_loss_of_a_part_of_a_batch():
    ours, theirs = draw_pair("ministral", "CausalLM")
    count = torch.tensor(7)
    for items in (7, count):
        expected = theirs(IDS, labels=IDS, num_items_in_batch=items).loss
        assert torch.equal(ours(IDS, labels=IDS, num_items_in_batch=items).loss, expected)
    assert not torch.equal(expected, ours(IDS, labels=IDS).loss)
