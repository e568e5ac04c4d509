"""A language model up to the block where activations are taken, and several of them side by side.

**Layer i is the 0-based block i; its residual stream is what leaves it** ("layer 6" of the paper is the seventh block,
`blocks.6.hook_resid_post`). In transformers' terms that is `hidden_states[i + 1]`, except for the last block: there
`hidden_states` has the final norm applied, which is not part of the residual stream.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from crosscoder.errors import DataError

Site = Literal["residual", "mlp", "attention"]
SITES: dict[str, str] = {
    "residual": "residual stream after the block",
    "mlp": "what the MLP adds to the residual stream",
    "attention": "what attention adds to the residual stream",
}
# The last module of each branch of a block. Where a norm follows the branch (OLMo 2), what it gives is what is added.
_BRANCHES = {
    "mlp": ("post_feedforward_layernorm", "mlp"),
    "attention": ("self_attn", "attention", "attn"),
}


def decoder_layers(model: Any) -> nn.ModuleList:
    """The blocks of a causal language model. Raises `DataError` for an unknown architecture."""
    base = getattr(model, model.base_model_prefix, model)
    for name in ("layers", "h"):
        layers = getattr(base, name, None)
        if layers is not None:
            found: nn.ModuleList = layers
            return found
    raise DataError(
        f"do not know where {type(model).__name__} keeps its blocks; use a GPT-NeoX, Llama or GPT-2 like model"
    )


def truncate(model: Any, layer: int) -> Any:
    """The base model without the blocks after `layer` and without the unembedding; in place."""
    layers = decoder_layers(model)
    del layers[layer + 1 :]
    return getattr(model, model.base_model_prefix, model)


def site_module(block: nn.Module, site: str) -> nn.Module:
    """The module whose output is the activation at `site`. Raises `DataError` if the block has none."""
    if site == "residual":
        return block
    names = _BRANCHES[site]
    if site == "attention" and hasattr(block, "post_feedforward_layernorm"):
        names = ("post_attention_layernorm",)
    for name in names:
        if hasattr(block, name):
            module: nn.Module = getattr(block, name)
            return module
    raise DataError(f"do not know where {type(block).__name__} has its {site}; use --site residual")


def activations(model: Any, layer: int, ids_SC: Tensor, site: str = "residual") -> Tensor:
    """Activations (S, C, D) of block `layer` at `site`, before any final norm. `model` may be truncated.

    Rows need no mask: attention is causal, and padding comes after the text.
    """
    with torch.no_grad():
        return _caught(model, site_module(decoder_layers(model)[layer], site), lambda: _forward(model, ids_SC))


def _forward(model: Any, ids_SC: Tensor) -> None:
    model(input_ids=ids_SC, use_cache=False)


def _caught(model: Any, module: nn.Module, forward: Callable[[], None]) -> Tensor:
    caught: list[Tensor] = []

    def catch(module: Any, inputs: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(catch)
    try:
        forward()
    finally:
        handle.remove()
    return caught[0]


class Trunks:
    """K models of one architecture up to one block, run on the same tokens in one batched forward (`torch.func`)."""

    def __init__(self, models: Sequence[Any], layer: int, site: str = "residual") -> None:
        """Takes truncated models. Raises `DataError` if their shapes differ."""
        self.layer = layer
        self.site = site
        self.models = list(models)
        if len(self.models) > 1:
            shapes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in self.models]
            if any(shape != shapes[0] for shape in shapes[1:]):
                raise DataError("these snapshots have different shapes: they cannot be run side by side")
            self._stacked = torch.func.stack_module_state(self.models)
            self._skeleton = copy.deepcopy(self.models[0]).to("meta")
            self.models = []

    def __call__(self, ids_SC: Tensor) -> Tensor:
        """Activations (K, S, C, D)."""
        if self.models:
            return activations(self.models[0], self.layer, ids_SC, self.site)[None]
        skeleton = self._skeleton
        module = site_module(decoder_layers(skeleton)[self.layer], self.site)

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            options = {"input_ids": ids_SC, "use_cache": False}
            return _caught(
                skeleton,
                module,
                lambda: torch.func.functional_call(skeleton, (parameters, buffers), kwargs=options),
            )

        with torch.no_grad(), warnings.catch_warnings():
            # Attention without a batching rule runs model by model inside of the batched forward.
            warnings.filterwarnings("ignore", message=".*performance drop.*")
            result: Tensor = torch.vmap(one)(*self._stacked)
        return result
