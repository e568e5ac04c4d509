"""Proof, on the first tokens of a collection, that what is collected is the whole model's own.

No list of architectures can be complete: some scale by their depth, norm what a branch adds, or add inside of it. So
before anything is written one snapshot is run as a whole, and what a collection would take from it is compared.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from crosscoder.activations.snapshots import SnapshotSet
from crosscoder.activations.trunk import ROUNDINGS, activations, base_model, block_ends, branches, decoder_layers
from crosscoder.errors import ConfigError, DataError, NonFiniteError


def prove(
    snapshots: SnapshotSet, k: int, ids_SC: Tensor, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> SnapshotSet:
    """`snapshots`, with the way to load them and the site's module that give what the whole snapshot k has.

    Proven on the tokens `ids_SC`: the truncated model's residual stream is `hidden_states[layer + 1]` of the whole
    one, no token changes what is before it, and (for the other sites) pre + attention + mlp = post. The model runs in
    `dtype`, the sum in float32.
    Raises `ConfigError` with the reason where one of these does not hold, `NonFiniteError` where snapshot k gives NaN;
    what loading raises passes through.
    """
    ids_SC = ids_SC.to(device)
    tolerance = 4 * ROUNDINGS * torch.finfo(dtype).eps
    x_SCD = _of_the_whole(snapshots, k, ids_SC, dtype, device, tolerance)
    name = f"{snapshots.model} {snapshots.revisions[k]}"
    found, off = None, ""
    for whole in (False, True):
        way = dataclasses.replace(snapshots, whole=whole, module="", proven=True)
        try:
            trunk = way.load_trunk(k, dtype).to(device)
            distance = _distance(activations(trunk, snapshots.layer, ids_SC), x_SCD)
        except Exception as error:  # whatever a configuration of fewer layers leads to: then the whole one is taken
            if whole:
                raise ConfigError(f"{name} cannot be run up to layer {snapshots.layer}: {_line(error)}") from error
            continue
        if distance <= tolerance:
            found = way
            break
        off = f"{distance:.2g}"
    if found is None:
        raise ConfigError(
            f"{name} cut after layer {snapshots.layer} does not give the whole model's residual stream (relative error "
            f"{off}); this architecture cannot be collected"
        )
    if snapshots.site == "residual":
        return found
    if dtype != torch.float32:
        trunk = found.load_trunk(k, torch.float32).to(device)
    try:
        return dataclasses.replace(found, module=branches(trunk, snapshots.layer, ids_SC)[snapshots.site])
    except DataError as error:
        raise ConfigError(f"--site {snapshots.site} of {name} cannot be collected: {error}") from error


def _of_the_whole(
    snapshots: SnapshotSet, k: int, ids_SC: Tensor, dtype: torch.dtype, device: str, tolerance: float
) -> Tensor:
    """The residual stream (S, C, D) after the layer in the whole model. Raises `ConfigError`."""
    model, layer = snapshots.load(k, dtype).to(device), snapshots.layer
    refused = f"{snapshots.model} {snapshots.revisions[k]} cannot be collected"
    outputs: dict[str, tuple[Any, Any]] = {}

    def remember(name: str) -> Any:
        return lambda module, inputs, output: outputs.__setitem__(name, (inputs, output))

    blocks = set(decoder_layers(model).modules())
    handles = [
        module.register_forward_hook(remember(name))
        for name, module in base_model(model).named_modules()
        if name and module not in blocks
    ]
    try:
        with torch.no_grad():
            states = model(input_ids=ids_SC, use_cache=False, output_hidden_states=True).hidden_states
        pre_SCD, x_SCD = block_ends(model, layer, ids_SC)
        changed_SC = ids_SC.clone()
        changed_SC[:, -1] = torch.where(ids_SC[:, -1] == 1, 2, 1)
        other_SCD = activations(model, layer, changed_SC)
    except Exception as error:
        raise ConfigError(f"{refused}: it cannot be run on tokens alone ({_line(error)})") from error
    finally:
        for handle in handles:
            handle.remove()
    if not bool(torch.isfinite(x_SCD).all()):
        raise NonFiniteError(f"NaN or infinity in the activations of snapshot {snapshots.revisions[k]}")
    depth = len(decoder_layers(model))
    if states is None or len(states) != depth + 1:
        raise ConfigError(f"{refused}: it gives {len(states or ())} hidden_states for {depth} blocks")
    if _distance(pre_SCD, states[layer]) > tolerance:
        raise ConfigError(f"{refused}: hidden_states[{layer}] is not what enters block {layer}")
    if layer + 1 < depth and _distance(x_SCD, states[layer + 1]) > tolerance:
        raise ConfigError(f"{refused}: hidden_states[{layer + 1}] is not what leaves block {layer}")
    if layer + 1 == depth and not _is_before_the_last_norm(outputs, x_SCD, states[-1], tolerance):
        raise ConfigError(
            f"{refused}: between what leaves its last block and its last hidden state is more than a norm"
        )
    if _distance(other_SCD[:, :-1], x_SCD[:, :-1]) > tolerance:
        raise ConfigError(f"{refused}: a token changes the activations before it (attention that is not causal)")
    return x_SCD


def _is_before_the_last_norm(
    outputs: dict[str, tuple[Any, Any]], x_SCD: Tensor, last_SCD: Tensor, tolerance: float
) -> bool:
    """Whether `last_SCD` is `x_SCD` itself, or what one module makes of it."""
    if _distance(x_SCD, last_SCD) <= tolerance:
        return True
    return any(
        isinstance(output, Tensor)
        and bool(inputs)
        and isinstance(inputs[0], Tensor)
        and _distance(output, last_SCD) <= tolerance
        and _distance(inputs[0], x_SCD) <= tolerance
        for inputs, output in outputs.values()
    )


def _distance(x: Tensor, y: Tensor) -> float:
    """|x - y| / |y|; infinite where the shapes differ or the result is not a number."""
    if x.shape != y.shape:
        return float("inf")
    distance = float((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-30))
    return distance if distance == distance else float("inf")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
