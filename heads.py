"""Classification and question answering: a backbone and one linear layer, for Ministral and Ministral 3 alike.

    task                      reads                                layer                  loss
    sequence classification   the last token that is no padding    score: E -> labels     by `problem_type`, see below
    token classification      every token, after dropout           score: E -> labels     cross-entropy of each token
    question answering        every token                          qa_outputs: E -> 2     cross-entropy of both ends

Only the last token has seen the whole text, so that is where a decoder is asked about all of it. To fine-tune a text
model into a classifier, load it as one (a warning names the layer that is new) and train all weights:

    model = Ministral3ForSequenceClassification.from_pretrained(
        "models/shakespeare", dtype=torch.float32, num_labels=2, id2label={0: "prose", 1: "verse"})
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-4)
    for ids, labels in batches:          # (B, S) padded with config.pad_token_id, (B,)
        model(ids, attention_mask=ids != model.config.pad_token_id, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained("verse")       # loads in Transformers too

`python -m examples.verse` is this program in full, with data and held-out accuracy. Names, parameters and losses are
those of Transformers' classes of the same names. In the shapes, N is `config.num_labels`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checks import PROBLEM_TYPES, expect, expect_classes, expect_tensor, is_whole, may_read
from ministral import KVCache, MinistralConfig, MinistralModel
from ministral3 import Ministral3Config, Ministral3Model
from pretrained import Linear, PreTrainedModel, at_least_float32, exportable, init_weights

REGRESSION, SINGLE_LABEL, MULTI_LABEL = PROBLEM_TYPES


class ModelWithHead(PreTrainedModel):
    """A backbone under `base_model_prefix` and a linear layer named `new_layer`."""

    config_class = MinistralConfig
    model_class: ClassVar[type[MinistralModel]] = MinistralModel
    new_layer = "score"
    score: nn.Linear

    def __init__(self, config: MinistralConfig, outputs: int, bias: bool) -> None:
        super().__init__(config)
        config.complete_labels()  # one of the three fields may have been set
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, self.model_class(config))
        setattr(self, self.new_layer, Linear(config.hidden_size, outputs, bias))
        init_weights(getattr(self, self.new_layer), config.initializer_range)


class GenericForSequenceClassification(ModelWithHead):
    """One set of labels for a whole text."""

    def __init__(self, config: MinistralConfig) -> None:
        super().__init__(config, config.num_labels, bias=False)

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:  # fmt: skip
        """The arguments of `MinistralModel.forward`, and:

        Args:
            labels: see `sequence_classification_loss`.

        The token that is read is the last one of each row that is not `pad_token_id`, whatever `attention_mask` says.
        In `inputs_embeds` no padding can be seen: there, and without a `pad_token_id`, it is the last of all.

        Raises:
            ValueError: several texts and no `pad_token_id`; impossible labels; as `MinistralModel.forward`.
        """
        pad, text = self.config.pad_token_id, input_ids if input_ids is not None else inputs_embeds
        if pad is None and text is not None and len(text) > 1:
            raise ValueError(f"{len(text)} texts without config.pad_token_id: set it, or give one text at a time")
        outputs = self.base_model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **kwargs
        )
        # All tokens, though one is read: a product of fewer rows is rounded differently.
        logits = self.score(outputs.last_hidden_state)  # (B, S, N)
        B, S, _ = logits.shape
        last = torch.full((B,), S - 1, device=logits.device)
        if pad is not None and input_ids is not None:
            places = torch.arange(S, device=logits.device)
            last = (places * (input_ids != pad)).argmax(-1)  # (B,), 0 for a row of nothing but padding
        elif attention_mask is not None and input_ids is None and ends_in_padding(attention_mask):
            warnings.warn("inputs_embeds that end in padding: it is read as text; put padding first", stacklevel=4)
        logits = logits[torch.arange(B, device=logits.device), last]  # (B, N)
        loss = None if labels is None else sequence_classification_loss(logits, labels, self.config)
        return SequenceClassifierOutputWithPast(
            loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions
        )


def ends_in_padding(attention_mask: Tensor) -> bool:
    """Whether a row does (unknown, and so no, while torch.compile traces)."""
    return not torch.compiler.is_compiling() and not bool(attention_mask[:, -1].all())


def sequence_classification_loss(logits: Tensor, labels: Tensor, config: MinistralConfig) -> Tensor:
    """The loss of `config.problem_type`, a mean over the batch. When that is None, the labels decide, and it is set,
    so that it is saved with the model.

    problem_type                  decided by                 labels                             loss
    regression                    N = 1                      (B,) or (B, 1); (B, N) if N > 1    squared error
    single_label_classification   whole numbers              (B,) or (B, 1), 0 to N - 1, -100   cross-entropy
    multi_label_classification    floating-point numbers     (B, N), each from 0 to 1           binary cross-entropy

    A text whose single label is -100 does not count.

    Raises:
        ValueError: labels of another shape, type or range.
    """
    B, N = logits.shape
    expect_tensor("labels", labels)
    labels, kind = labels.to(logits.device), config.problem_type
    if kind is None:
        kind = REGRESSION if N == 1 else SINGLE_LABEL if is_whole(labels) else MULTI_LABEL
    one_each = kind == SINGLE_LABEL or (kind == REGRESSION and N == 1)
    expect(f"labels for {kind}", labels, *(((B,), (B, 1)) if one_each else ((B, N),)))
    if kind == SINGLE_LABEL:
        expect_classes(labels, N)
        loss = F.cross_entropy(logits, labels.flatten().long())
    else:
        if kind == REGRESSION and is_whole(labels):
            labels = labels.to(logits.dtype)
        if not labels.is_floating_point():
            raise ValueError(f"labels of {labels.dtype} for {kind}; allowed: floating-point numbers")
        if kind == MULTI_LABEL and may_read(labels) and not ((labels >= 0) & (labels <= 1)).all():
            raise ValueError(f"labels from {labels.min()} to {labels.max()} for {kind}; allowed: 0 to 1")
        loss_of = F.mse_loss if kind == REGRESSION else F.binary_cross_entropy_with_logits
        loss = loss_of(logits, labels.reshape(B, N))
    config.problem_type = kind
    return loss


class GenericForTokenClassification(ModelWithHead):
    """Labels for each token."""

    def __init__(self, config: MinistralConfig) -> None:
        super().__init__(config, config.num_labels, bias=True)
        self.dropout = nn.Dropout(0.1 if config.classifier_dropout is None else config.classifier_dropout)

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:  # fmt: skip
        """The arguments of `MinistralModel.forward`, and:

        Args:
            labels: (B, S) classes 0 to N - 1, -100 where a token does not count. The loss is the mean of the others.

        Raises:
            ValueError: impossible labels; as `MinistralModel.forward`.
        """
        outputs = self.base_model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **kwargs
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))  # (B, S, N)
        loss = None
        if labels is not None:
            expect("labels", labels, tuple(logits.shape[:2]))
            expect_classes(labels, logits.shape[2])
            rows = logits.flatten(0, 1).to(at_least_float32(logits.dtype))
            loss = F.cross_entropy(rows, labels.flatten().long().to(rows.device))
        return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class GenericForQuestionAnswering(ModelWithHead):
    """The span of the text that answers a question: its first and its last token."""

    new_layer = "qa_outputs"
    qa_outputs: nn.Linear

    def __init__(self, config: MinistralConfig) -> None:
        super().__init__(config, 2, bias=True)

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None, start_positions: Tensor | None = None,
        end_positions: Tensor | None = None, **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:  # fmt: skip
        """The arguments of `MinistralModel.forward`, and:

        Args:
            start_positions, end_positions: (B,) or (B, 1), places of the answer's first and last token. One beyond
                the text (the answer was cut off) is ignored; one below 0 counts as 0. The loss is the mean of both.

        Raises:
            ValueError: one without the other, or no whole numbers; as `MinistralModel.forward`.
        """
        if (start_positions is None) != (end_positions is None):
            raise ValueError("give both start_positions and end_positions, or neither")
        outputs = self.base_model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **kwargs)
        logits = self.qa_outputs(outputs.last_hidden_state)  # (B, S, 2)
        start_logits, end_logits = (column.contiguous() for column in logits.unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            start_loss = position_loss("start_positions", start_logits, start_positions)
            loss = (start_loss + position_loss("end_positions", end_logits, end_positions)) / 2
        return QuestionAnsweringModelOutput(loss, start_logits, end_logits, outputs.hidden_states, outputs.attentions)


def position_loss(name: str, logits: Tensor, positions: Tensor) -> Tensor:
    """Mean cross-entropy of the right place among S: logits (B, S), positions (B,) or (B, 1)."""
    B, S = logits.shape
    expect(name, positions, (B,), (B, 1))
    if not is_whole(positions):
        raise ValueError(f"{name} of {positions.dtype}; allowed: whole numbers")
    return F.cross_entropy(logits, positions.flatten().long().clamp(0, S).to(logits.device), ignore_index=S)


# ------------------------------------------------------------------------------------------------------ results


@exportable
@dataclass
class SequenceClassifierOutputWithPast:
    """`logits` (B, N), one row per text; `loss` a scalar when labels were given."""

    loss: Tensor | None
    logits: Tensor
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@exportable
@dataclass
class TokenClassifierOutput:
    """`logits` (B, S, N), one row per token; `loss` a scalar when labels were given."""

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@exportable
@dataclass
class QuestionAnsweringModelOutput:
    """`start_logits` and `end_logits` (B, S): how likely each token is the answer's first and its last one."""

    loss: Tensor | None
    start_logits: Tensor
    end_logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


# ------------------------------------------------------------------------------------------------------- models


class MinistralForSequenceClassification(GenericForSequenceClassification):
    """Ministral that labels a text."""


class MinistralForTokenClassification(GenericForTokenClassification):
    """Ministral that labels each token."""


class MinistralForQuestionAnswering(GenericForQuestionAnswering):
    """Ministral that finds an answer. Transformers calls its backbone `transformer`."""

    base_model_prefix = "transformer"


class Ministral3ForSequenceClassification(GenericForSequenceClassification):
    """Ministral 3 that labels a text."""

    config_class, model_class = Ministral3Config, Ministral3Model


class Ministral3ForTokenClassification(GenericForTokenClassification):
    """Ministral 3 that labels each token."""

    config_class, model_class = Ministral3Config, Ministral3Model


class Ministral3ForQuestionAnswering(GenericForQuestionAnswering):
    """Ministral 3 that finds an answer."""

    config_class, model_class = Ministral3Config, Ministral3Model
