"""A language model up to the block where activations are taken, and several of them side by side.

**Layer i is the 0-based block i; its residual stream is what leaves it** ("layer 6" of the paper is the seventh block,
`blocks.6.hook_resid_post`). In transformers' terms that is `hidden_states[i + 1]`, except for the last block: there
`hidden_states` has the final norm applied, which is not part of the residual stream.

Nothing here trusts an architecture's names: `branches` measures which modules give what is added to the residual
stream, and `proof` compares a truncated model with the whole one.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from crosscoder.errors import ConfigError, DataError

Site = Literal["residual", "mlp", "attention"]
SITES: dict[str, str] = {
    "residual": "residual stream after the block",
    "mlp": "what the MLP adds to the residual stream",
    "attention": "what attention adds to the residual stream",
}
ROUNDINGS = 16
"""Rounding errors of the model's dtype, relative to what is summed, that a sum which holds may be off by."""
_ATTENTION = re.compile("attn|attention")


class _Reached(Exception):
    """The activations are there; the rest of the model need not run."""


def decoder_layers(model: Any) -> nn.ModuleList:
    """The blocks of a causal language model: its outermost list of as many modules as it has layers.

    Raises `DataError` where there is no such list, or more than one.
    """
    base = base_model(model)
    for name in ("layers", "h"):
        layers = getattr(base, name, None)
        if isinstance(layers, nn.ModuleList):
            return layers
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [
        (name.count("."), m) for name, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth
    ]
    outermost = [m for nesting, m in found if nesting == min(n for n, _ in found)]
    if len(outermost) != 1:
        raise DataError(
            f"cannot find the blocks of {type(model).__name__}: they should be one list of {depth} modules, and it has "
            f"{len(outermost)} such lists"
        )
    return outermost[0]


def base_model(model: Any) -> Any:
    """The model without its unembedding."""
    return getattr(model, model.base_model_prefix, model)


def truncate(model: Any, layer: int) -> Any:
    """The base model without the blocks after `layer` and without the unembedding; in place.

    Where a model counts its blocks itself, empty ones stand in the places of those left out: they are never run.
    """
    layers = decoder_layers(model)
    if len(layers) == getattr(model.config.get_text_config(), "num_hidden_layers", None):
        for number in range(layer + 1, len(layers)):
            layers[number] = nn.Identity()
    else:
        del layers[layer + 1 :]
    return base_model(model)


def branches(model: Any, layer: int, ids_SC: Tensor, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Names of the modules of block `layer` whose outputs are what attention and the MLP add to the residual stream.

    Found by measuring: of all pairs of a module of attention (by its name) and another one, that for which
    pre + attention + mlp = post holds on the tokens `ids_SC`, up to rounding. So a norm behind a branch (OLMo 2,
    Gemma 2) is taken where there is one, and a block that scales what it adds (Granite) or adds inside of a branch
    (BLOOM) is refused. Keys "attention", "mlp". Raises `DataError` with the reason where no pair adds up.

    `known`: a module that was found on other weights. It stays, and may add next to nothing here.
    """
    block = decoder_layers(model)[layer]
    outputs: dict[str, list[Tensor]] = {}
    pre_SCD, post_SCD = block_ends(model, layer, ids_SC, outputs)
    added_SCD = post_SCD.double() - pre_SCD.double()
    # What runs twice in a block (Phi's dropout) is of neither branch alone.
    parts = {name: x[0].double() for name, x in outputs.items() if len(x) == 1 and x[0].shape == pre_SCD.shape}
    known = known or {}
    attention = [name for name in parts if _ATTENTION.search(name)]
    others = [name for name in parts if name not in attention]
    attention = [name for name in attention if name == known.get("attention", name)]
    others = [name for name in others if name == known.get("mlp", name)]
    kind, remedy = type(block).__name__, "use --site residual"
    if not attention or not others:
        raise DataError(f"{kind} has no separate {'MLP' if attention else 'attention'} module; {remedy}")
    errors = {(a, m): float((added_SCD - parts[a] - parts[m]).norm()) for a in attention for m in others}
    a, m = min(errors, key=lambda pair: errors[pair])
    rounding = ROUNDINGS * torch.finfo(post_SCD.dtype).eps
    noise = rounding * float(pre_SCD.double().norm() + parts[a].norm() + parts[m].norm())
    if not errors[a, m] <= noise:
        share = errors[a, m] / max(float(added_SCD.norm()), 1e-300)
        raise DataError(
            f"the outputs of attention ({a}) and MLP ({m}) in {kind} do not add up to what the block adds to the "
            f"residual stream, but are off by {share:.0%} of it: the block scales or normalises these outputs, adds "
            f"something inside of them, or has a third branch; {remedy}"
        )
    if not known and min(float(parts[a].norm()), float(parts[m].norm())) <= noise:
        raise DataError(f"{a} or {m} of {kind} adds next to nothing, so it is not sure which is which; {remedy}")
    return {"attention": a, "mlp": m}


def block_ends(
    model: Any, layer: int, ids_SC: Tensor, outputs: dict[str, list[Tensor]] | None = None
) -> tuple[Tensor, Tensor]:
    """What enters block `layer` and leaves it, (S, C, D) each; into `outputs` what its modules give, call by call."""
    block = decoder_layers(model)[layer]
    ends: list[Tensor] = []

    def entering(module: Any, inputs: Any, more: Any) -> None:
        ends.append((inputs[0] if inputs else more["hidden_states"]).clone())

    def part(name: str) -> Callable[[Any, Any, Any], None]:
        def catch(module: Any, inputs: Any, output: Any) -> None:
            found = _first(output)
            if outputs is not None and isinstance(found, Tensor):
                outputs.setdefault(name, []).append(found.clone())  # a block may change it in place

        return catch

    handles = [block.register_forward_pre_hook(entering, with_kwargs=True)]
    handles += [child.register_forward_hook(part(name)) for name, child in block.named_children()]
    try:
        with torch.no_grad():
            post_SCD = _caught(model, block, lambda: _forward(model, ids_SC))
    finally:
        for handle in handles:
            handle.remove()
    return ends[-1], post_SCD


def activations(model: Any, layer: int, ids_SC: Tensor, site: str = "residual", module: str = "") -> Tensor:
    """Activations (S, C, D) of block `layer` at `site`, before any final norm. `model` may be truncated.

    `module` is the name of the branch that `branches` found; found here if not given. Rows need no mask: attention is
    causal, and padding comes after the text.
    """
    place = _place(model, layer, site, module or _branch(model, layer, ids_SC, site))
    with torch.no_grad():
        return _caught(model, place, lambda: _forward(model, ids_SC))


def _branch(model: Any, layer: int, ids_SC: Tensor, site: str) -> str:
    return "" if site == "residual" else branches(model, layer, ids_SC)[site]


def _place(model: Any, layer: int, site: str, module: str) -> nn.Module:
    block = decoder_layers(model)[layer]
    return block if site == "residual" else block.get_submodule(module)


def _forward(model: Any, ids_SC: Tensor) -> None:
    model(input_ids=ids_SC, use_cache=False)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output


def _caught(model: Any, module: nn.Module, forward: Callable[[], None]) -> Tensor:
    """What `module` gives in `forward`, which is left there: nothing after it can change the tensor."""
    caught: list[Tensor] = []

    def catch(module: Any, inputs: Any, output: Any) -> None:
        caught.append(_first(output))
        raise _Reached

    handle = module.register_forward_hook(catch)
    try:
        forward()
    except _Reached:
        pass
    finally:
        handle.remove()
    return caught[0]


class Trunks:
    """K models of one architecture up to one block, run on the same tokens in one batched forward (`torch.func`)."""

    def __init__(self, models: Sequence[Any], layer: int, site: str = "residual", module: str = "") -> None:
        """Takes truncated models, and the branch's `module` as `activations` does.

        Raises `DataError` if the models' shapes differ, `ConfigError` if they cannot run side by side, and what
        `branches` raises.
        """
        self.layer = layer
        self.site = site
        self.models = list(models)
        few = torch.arange(1, 9, device=next(self.models[0].parameters()).device)[None]
        self.module = module or _branch(self.models[0], layer, few, site)
        if len(self.models) > 1:
            shapes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in self.models]
            if any(shape != shapes[0] for shape in shapes[1:]):
                raise DataError("the weights of these snapshots have different shapes: they cannot be run side by side")
            self._stacked = torch.func.stack_module_state(self.models)
            self._skeleton = copy.deepcopy(self.models[0]).to("meta")
            self._prove_together(few)
            self.models = []

    def _prove_together(self, ids_SC: Tensor) -> None:
        """Raises `ConfigError` where a batched forward is not what each model gives alone."""
        remedy = "; run them one by one: --together 1"
        alone_KSCD = torch.stack([activations(m, self.layer, ids_SC, self.site, self.module) for m in self.models])
        try:
            beside_KSCD = self._beside(ids_SC)
        except Exception as error:  # torch.func has no rule for an operation, or the model branches on values
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"these snapshots cannot be run side by side ({reason}){remedy}") from error
        noise = 4 * ROUNDINGS * torch.finfo(alone_KSCD.dtype).eps * float(alone_KSCD.double().norm())
        if bool(torch.isfinite(alone_KSCD).all()) and not float((beside_KSCD - alone_KSCD).double().norm()) <= noise:
            raise ConfigError(f"run side by side these snapshots give other activations than one by one{remedy}")

    def __call__(self, ids_SC: Tensor) -> Tensor:
        """Activations (K, S, C, D)."""
        if self.models:
            return activations(self.models[0], self.layer, ids_SC, self.site, self.module)[None]
        return self._beside(ids_SC)

    def _beside(self, ids_SC: Tensor) -> Tensor:
        skeleton = self._skeleton
        module = _place(skeleton, self.layer, self.site, self.module)

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
