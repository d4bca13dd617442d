"""Classification and question answering: a backbone and one linear layer, for Ministral and Ministral 3 alike.

    task                      reads                                layer                  loss
    sequence classification   the last token that is no padding    score: E -> labels     by `problem_type`, see below
    token classification      every token, after dropout           score: E -> labels     cross-entropy of each token
    question answering        every token                          qa_outputs: E -> 2     cross-entropy of both ends

A sequence is classified by its last token, because only that token has seen all others. To fine-tune a text model into
a classifier, load it as one (a warning names the layer that is new) and train all weights:

    model = Ministral3ForSequenceClassification.from_pretrained(
        "models/ministral3", dtype=torch.float32, num_labels=2, id2label={0: "prose", 1: "verse"})
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-4)
    for ids, labels in batches:          # (B, S) padded with config.pad_token_id, (B,)
        model(ids, attention_mask=ids != model.config.pad_token_id, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained("verse")       # loads in Transformers too

`models/ministral3` is a vision model; a model with a head loads its text part. `python -m examples.verse` is this
program in full, with data and the accuracy on test data. Names, parameters and losses are those of Transformers'
classes of the same names. In the shapes, N is `config.num_labels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checks
from ministral import KVCache, MinistralConfig, MinistralModel
from ministral3 import Ministral3Config, Ministral3Model
from outputs import ModelOutput, at_least_float32, exportable
from pretrained import Linear, PreTrainedModel, init_weights

REGRESSION, SINGLE_LABEL, MULTI_LABEL = checks.PROBLEM_TYPES


class ModelWithHead(PreTrainedModel):
    """A backbone under `base_model_prefix` and a linear layer named `new_layer`."""

    config_class = MinistralConfig
    model_class: ClassVar[type[MinistralModel]] = MinistralModel
    new_layer = "score"
    score: nn.Linear

    def __init__(self, config: MinistralConfig, outputs: int, bias: bool) -> None:
        super().__init__(config)
        config.complete_labels()  # num_labels, id2label or label2id may have been set since
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

        The logits of a row are those of its last token that is not `pad_token_id`; `attention_mask` has no influence on
        that. With `inputs_embeds` or without a `pad_token_id`, they are those of the last token.

        Raises:
            ValueError: several texts and no `pad_token_id`; impossible labels; as `MinistralModel.forward`.
        """
        pad = self.config.pad_token_id
        text = inputs_embeds if input_ids is None else input_ids
        if pad is None and text is not None and len(text) > 1:
            cure = "set it, or give one text at a time"
            raise ValueError(f"{len(text)} texts without config.pad_token_id: {cure}")
        out = self.base_model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
            return_dict=True, **kwargs,
        )  # fmt: skip
        # All tokens, though one is read: a product of fewer rows is rounded differently.
        logits = self.score(out.last_hidden_state)  # (B, S, N)
        B, S, _ = logits.shape
        last = torch.full((B,), S - 1, device=logits.device)
        if input_ids is not None and pad is not None:
            indices = torch.arange(S, device=logits.device)
            last = (indices * (input_ids != pad)).argmax(-1)  # (B,), 0 if a row is all padding
        if input_ids is None:
            checks.warn_of_last_padding(attention_mask)
        logits = logits[torch.arange(B, device=logits.device), last]  # (B, N)
        loss = None if labels is None else sequence_classification_loss(logits, labels, self.config)
        return SequenceClassifierOutputWithPast(
            loss, logits, out.past_key_values, out.hidden_states, out.attentions
        )


def sequence_classification_loss(logits: Tensor, labels: Tensor, config: MinistralConfig) -> Tensor:
    """The loss of `config.problem_type`, a mean over the batch. If that is None, the labels decide, and it is set, so
    that it is saved with the model.

    problem_type                  decided by                 labels                             loss
    regression                    N = 1                      (B,) or (B, 1); (B, N) if N > 1    squared error
    single_label_classification   whole numbers              (B,) or (B, 1), 0 to N - 1, -100   cross-entropy
    multi_label_classification    floating-point numbers     (B, N), each from 0 to 1           binary cross-entropy

    A text whose single label is -100 does not count.

    Raises:
        ValueError: labels of another shape, type or range.
    """
    B, N = logits.shape
    checks.expect_tensor("labels", labels)
    labels = labels.to(logits.device)
    kind = config.problem_type
    if kind is None:
        kind = MULTI_LABEL
        if checks.is_whole(labels):
            kind = SINGLE_LABEL
        if N == 1:
            kind = REGRESSION
    if kind == SINGLE_LABEL or (kind == REGRESSION and N == 1):
        checks.expect(f"labels for {kind}", labels, (B,), (B, 1))
    else:
        checks.expect(f"labels for {kind}", labels, (B, N))

    if kind == SINGLE_LABEL:
        checks.expect_classes(labels, N)
        loss = F.cross_entropy(logits, labels.flatten().long())
    elif kind == REGRESSION:
        if checks.is_whole(labels):
            labels = labels.to(logits.dtype)
        checks.expect_numbers(labels, kind)
        loss = F.mse_loss(logits, labels.reshape(B, N))
    else:
        checks.expect_fractions(labels, kind)
        loss = F.binary_cross_entropy_with_logits(logits, labels.reshape(B, N))
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
        out = self.base_model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
            return_dict=True, **kwargs,
        )  # fmt: skip
        logits = self.score(self.dropout(out.last_hidden_state))  # (B, S, N)
        loss = None
        if labels is not None:
            B, S, N = logits.shape
            checks.expect("labels", labels, (B, S))
            checks.expect_classes(labels, N)
            rows = logits.flatten(0, 1).to(at_least_float32(logits.dtype))
            loss = F.cross_entropy(rows, labels.flatten().long().to(rows.device))
        return TokenClassifierOutput(loss, logits, out.hidden_states, out.attentions)


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
            start_positions, end_positions: (B,) or (B, 1), indices of the answer's first and last token. An index
                beyond the text (the answer was cut off) is ignored, and one below 0 counts as 0. The loss is the mean
                of both. It is NaN if all first or all last tokens are beyond the text, as in Transformers.

        Raises:
            ValueError: one without the other, no whole numbers, or labels; as `MinistralModel.forward`.
        """
        if kwargs.get("labels") is not None:
            raise ValueError("labels is not supported; a span is given as start_positions and end_positions")
        if (start_positions is None) != (end_positions is None):
            raise ValueError("give both start_positions and end_positions, or neither")
        out = self.base_model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds,
            return_dict=True, **kwargs,
        )  # fmt: skip
        logits = self.qa_outputs(out.last_hidden_state)  # (B, S, 2)
        start_logits, end_logits = (column.contiguous() for column in logits.unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            start_loss = position_loss("start_positions", start_logits, start_positions)
            end_loss = position_loss("end_positions", end_logits, end_positions)
            loss = (start_loss + end_loss) / 2
        return QuestionAnsweringModelOutput(loss, start_logits, end_logits, out.hidden_states, out.attentions)


def position_loss(name: str, logits: Tensor, positions: Tensor) -> Tensor:
    """Mean cross-entropy of the right index among S: logits (B, S), positions (B,) or (B, 1)."""
    B, S = logits.shape
    checks.expect(name, positions, (B,), (B, 1))
    if not checks.is_whole(positions):
        raise ValueError(f"{name} of {positions.dtype}; allowed: whole numbers")
    targets = positions.flatten().long().clamp(0, S).to(logits.device)
    return F.cross_entropy(logits, targets, ignore_index=S)


# ------------------------------------------------------------------------------------------------------ results


@exportable
@dataclass
class SequenceClassifierOutputWithPast(ModelOutput):
    """`logits` (B, N), one row per text; `loss` a scalar when labels were given."""

    loss: Tensor | None
    logits: Tensor
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@exportable
@dataclass
class TokenClassifierOutput(ModelOutput):
    """`logits` (B, S, N), one row per token; `loss` a scalar when labels were given."""

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@exportable
@dataclass
class QuestionAnsweringModelOutput(ModelOutput):
    """`start_logits` and `end_logits` (B, S): how likely each token is the first and the last one of the answer."""

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
    """Ministral that marks the answer in a text. Transformers calls its backbone `transformer`."""

    base_model_prefix = "transformer"


class Ministral3ForSequenceClassification(GenericForSequenceClassification):
    """Ministral 3 that labels a text."""

    config_class, model_class = Ministral3Config, Ministral3Model


class Ministral3ForTokenClassification(GenericForTokenClassification):
    """Ministral 3 that labels each token."""

    config_class, model_class = Ministral3Config, Ministral3Model


class Ministral3ForQuestionAnswering(GenericForQuestionAnswering):
    """Ministral 3 that marks the answer in a text."""

    config_class, model_class = Ministral3Config, Ministral3Model
