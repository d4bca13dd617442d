"""The methods of a model that training code calls: gradient checkpointing, the embeddings and their size, counts of
parameters, and what peft and Transformers' Trainer read. Names are those of Transformers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

import checks
from outputs import at_least_float32


class TrainableModel(nn.Module):
    """A model with embeddings, and a configuration in `config`."""

    input_embeddings: ClassVar[str] = "embed_tokens"  # the layer of the backbone that reads the input
    config: Any
    base_model: Any

    def __init__(self) -> None:
        super().__init__()
        self._gradient_checkpointing = False
        self._require_grads_hook: Any = None

    # Gradient checkpointing.

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training stores only the input of each layer and computes the rest again in the backward pass.

        This takes less memory and one more forward pass. The results have the bits of `use_cache=False`. It is off
        until it is set. Source: https://arxiv.org/abs/1604.06174.
        """
        return self._gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        for module in self.modules():
            if isinstance(module, TrainableModel):
                module._gradient_checkpointing = on

    @property
    def is_gradient_checkpointing(self) -> bool:
        """The same, under another name of Transformers'."""
        return self._gradient_checkpointing

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:  # fmt: skip
        """Set `gradient_checkpointing`. Every layer is computed again, in the way of `use_reentrant=False`.

        Raises:
            ValueError: other settings of Transformers.
        """
        checks.check_recomputation(gradient_checkpointing_kwargs, every_n_layers, offload)
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Unset `gradient_checkpointing`."""
        self.gradient_checkpointing = False

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:  # fmt: skip
        """`gradient_checkpointing_enable` under the name that newer versions of Transformers' Trainer call."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def activation_checkpointing_disable(self) -> None:
        """`gradient_checkpointing_disable`, likewise."""
        self.gradient_checkpointing_disable()

    @property
    def recomputes(self) -> bool:
        """Whether this forward pass uses gradient checkpointing. Without gradients there is no backward pass."""
        return self._gradient_checkpointing and self.training and torch.is_grad_enabled()

    def run_layer(self, layer: nn.Module, *inputs: Any) -> Any:
        """Call a layer, and with gradient checkpointing call it again in the backward pass."""
        if self.recomputes:
            return recompute_in_backward(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    # Parts and their sizes.

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Change the attention of all parts: "sdpa", "eager" or "blockwise".

        Raises:
            ValueError: another value.
        """
        parts = [part for part in self.modules() if isinstance(part, TrainableModel)]
        for part in parts:
            replace(part.config, attn_implementation=attn_implementation)  # raises for another value
        for part in parts:
            part.config.attn_implementation = attn_implementation

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of values in the parameters. A tensor that two layers share counts once.

        Args:
            only_trainable: count only parameters that get gradients.
            exclude_embeddings: leave out the weights of embedding layers.
        """
        left_out = set()
        if exclude_embeddings:
            left_out = {id(part.weight) for part in self.modules() if isinstance(part, nn.Embedding)}
        counted = [p for p in self.parameters() if id(p) not in left_out]
        return sum(p.numel() for p in counted if p.requires_grad or not only_trainable)

    def _embeddings_owner(self) -> nn.Module:
        """The module that has the input embeddings: the backbone, or its language model."""
        backbone: Any = self.base_model
        return getattr(backbone, "language_model", backbone)

    def get_input_embeddings(self) -> nn.Module:
        """The layer that turns ids (pixels in a vision tower) into vectors."""
        return getattr(self._embeddings_owner(), self.input_embeddings)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace that layer. A tied head keeps the old weights until `tie_weights`."""
        setattr(self._embeddings_owner(), self.input_embeddings, value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The language model head, None if the model has none."""
        return getattr(self, "lm_head", None)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model head.

        Raises:
            ValueError: the model has none.
        """
        if not self.can_generate():
            raise ValueError(f"{type(self).__name__} has no language model head that could be replaced")
        self.lm_head = new_embeddings

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:  # fmt: skip
        """Change the number of rows V of the embeddings and of the head, and `vocab_size` in the configuration.

        The first rows stay as they are. New rows are drawn by PyTorch's global generator in the order of Transformers,
        so that they are equal for an equal seed.

        Args:
            new_num_tokens: V; None: as many rows as now.
            pad_to_multiple_of: round V up to a multiple of this.
            mean_resizing: draw new rows around the mean of the others, see `draw_rows`; False: from Normal(0,
                initializer_range), as new models are drawn.

        Returns:
            The embeddings: with neither number, unchanged.

        Raises:
            ValueError: a V that is no whole number above 0, or that leaves no row for a token that the configuration
                names, such as `pad_token_id`.
        """
        embeddings: Any = self.get_input_embeddings()
        if not isinstance(embeddings, nn.Embedding):
            raise ValueError(f"{type(self).__name__} has no token embeddings that could be resized")
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embeddings
        V = checks.resized_count(new_num_tokens, pad_to_multiple_of, embeddings.num_embeddings)
        config = copy.deepcopy(self.config)
        config.get_text_config().vocab_size = V
        replace(config)  # raises if a token has no row
        text_config = self.config.get_text_config()
        head: Any = self.get_output_embeddings()
        for layer, fresh in ((embeddings, nn.Embedding), (head, nn.Linear)):
            # A tied head is resized with the embeddings.
            if layer is not None and len(layer.weight) != V:
                resize_rows(layer, V, fresh, text_config.initializer_range, mean_resizing)
        embeddings.num_embeddings = V
        if head is not None:
            head.out_features = V
        text_config.vocab_size = V
        return embeddings

    # What training and generation in other libraries (peft, Transformers' Trainer) read.

    _keys_to_ignore_on_save = None  # the Trainer asks for it when it loads the best model

    def can_generate(self) -> bool:
        """Whether the model has a language model head."""
        return hasattr(self, "lm_head")

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether `forward` takes `num_items_in_batch`, see `causal_lm_loss`. Transformers' Trainer reads this."""
        return self.can_generate()

    @property
    def loss_type(self) -> str | None:
        """The name of the loss in Transformers, whose Trainer counts tokens by it: the first one is no target."""
        if self.can_generate():
            return "ForCausalLM"
        return None

    def enable_input_require_grads(self) -> None:
        """Let the embeddings' results require gradients even if their weights do not."""

        def require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
            output.requires_grad_(True)

        self.disable_input_require_grads()
        self._require_grads_hook = self.get_input_embeddings().register_forward_hook(require_grad)

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`, if it was called."""
        if self._require_grads_hook is not None:
            self._require_grads_hook.remove()
        self._require_grads_hook = None

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The arguments of the forward pass that reads `input_ids` (B, T): those that the cache does not have yet."""
        past = 0
        if past_key_values is not None:
            past = past_key_values.get_seq_length()
        return {"input_ids": input_ids[:, past:], "past_key_values": past_key_values, **kwargs}


# ---------------------------------------------------------------------------------------------------- resizing


@torch.no_grad()
def resize_rows(layer: Any, count: int, fresh: type[nn.Module], std: float, mean_resizing: bool) -> None:
    """Change the number of rows of a layer's weight (rows, E) in place, see `TrainableModel.resize_token_embeddings`.
    `fresh` is PyTorch's class of the layer, which draws numbers on construction."""
    old = layer.weight.data
    rows, E = old.shape
    if fresh is nn.Linear:
        new = nn.Linear(E, count, bias=False, device=old.device, dtype=old.dtype).weight.data
    else:
        new = nn.Embedding(count, E, device=old.device, dtype=old.dtype).weight.data
    if count > rows and not old.is_meta:
        if mean_resizing:
            new[rows:] = draw_rows(old, count - rows)
        else:
            new.normal_(0.0, std)
    new[:rows] = old[:count]
    layer.weight.data = new
    layer.weight.grad = None


def draw_rows(old: Tensor, count: int) -> Tensor:
    """New rows (count, E) near the mean of the old ones (rows, E), so that the probabilities of the old tokens hardly
    change: from a normal distribution with 1e-9 of their covariance. Where that has no full rank, the mean itself.
    Source: https://nlp.stanford.edu/~johnhew/vocab-expansion.html.
    """
    old = old.to(at_least_float32(old.dtype))
    mean = old.mean(dim=0)
    covariance = 1e-9 * ((old - mean).T @ (old - mean) / len(old))
    _, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        return mean.expand(count, -1)
    return torch.distributions.MultivariateNormal(mean, covariance).sample((count,))
