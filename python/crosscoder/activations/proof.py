"""Proof, on the first tokens of a collection, that what is collected is the whole model's own.

No list of architectures can be complete: some scale by their depth, norm what a branch adds, or add inside of it. So
before anything is written two snapshots are run as a whole, and what a collection would take from them is compared.

All of it in float32, whatever the collection runs in: two ways to the same activations then agree to a few units in the
sixth digit, and a difference of one part in ten thousand is found. In bfloat16 it would drown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crosscoder.activations.snapshots import SnapshotSet
from crosscoder.activations.tokens import TokenSet
from crosscoder.activations.trunk import ROUNDINGS, activations, base_model, block_ends, branches, decoder_layers
from crosscoder.errors import ConfigError, DataError, NonFiniteError
from crosscoder.progress import warn

SEQUENCES, TOKENS = 4, 128
"""So many sequences, and of each so many tokens, are run to prove what is collected."""
TOLERANCE = 4 * ROUNDINGS * torch.finfo(torch.float32).eps
"""Relative distance (of Euclidean norms) up to which activations are the same."""


def proven(snapshots: SnapshotSet, tokens: TokenSet, device: str = "cpu") -> SnapshotSet:
    """`snapshots`, proven on the first tokens (`prove`); as they are if this process has done it already.

    On the last snapshot that can be had, where what the parts of a block add is largest, then on the first one. Where
    the whole model in float32 does not fit on the device, it is run on the CPU, with a warning.
    Raises `ConfigError` with the reason where the architecture cannot be collected, the last error where no snapshot
    can be had.
    """
    if snapshots.proven:
        return snapshots
    ids_SC = torch.from_numpy(tokens.ids[:SEQUENCES, :TOKENS]).long()
    latest, found = _proven_on_one(snapshots, range(snapshots.n_snapshots - 1, -1, -1), ids_SC, device)
    return _proven_on_one(found, range(latest + 1), ids_SC, device)[1] if latest > 0 else found


def _proven_on_one(
    snapshots: SnapshotSet, numbers: Sequence[int], ids_SC: Tensor, device: str
) -> tuple[int, SnapshotSet]:
    """The first of some snapshots that can be had, and what `prove` gives for it."""
    for k in numbers:
        try:
            try:
                return k, prove(snapshots, k, ids_SC, device)
            except torch.OutOfMemoryError:
                if device == "cpu":
                    raise
                warn(f"{snapshots.model} in float32 does not fit on {device}; its first tokens are run on the CPU")
                return k, prove(snapshots, k, ids_SC, "cpu")
        except (DataError, NonFiniteError) as error:
            last = error
    raise last


def prove(snapshots: SnapshotSet, k: int, ids_SC: Tensor, device: str = "cpu") -> SnapshotSet:
    """`snapshots`, with the way to load them and the site's module that give what the whole snapshot k has.

    Proven on the tokens `ids_SC`: the truncated model's residual stream is `hidden_states[layer + 1]` of the whole
    one, no token changes what is before it, and (for the other sites) pre + attention + mlp = post. A module that
    another snapshot has shown is not looked for again, but must add up here too.
    Raises `ConfigError` with the reason where one of these does not hold, `NonFiniteError` where snapshot k gives NaN;
    what loading raises passes through.
    """
    ids_SC = ids_SC.to(device)
    x_SCD = _of_the_whole(snapshots, k, ids_SC, device)
    name = f"{snapshots.model} {snapshots.revisions[k]}"
    off = ""
    for whole in (True,) if snapshots.whole else (False, True):
        found = dataclasses.replace(snapshots, whole=whole, proven=True)
        try:
            trunk = found.load_trunk(k, torch.float32).to(device)
            distance = _distance(activations(trunk, snapshots.layer, ids_SC), x_SCD)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a configuration of fewer layers leads to: then the whole one is taken
            if whole:
                raise ConfigError(f"{name} cannot be run up to layer {snapshots.layer}: {_line(error)}") from error
            continue
        if distance <= TOLERANCE:
            break
        off = f"{distance:.2g}"
    else:
        raise ConfigError(
            f"{name} cut after layer {snapshots.layer} does not give the whole model's residual stream (relative error "
            f"{off}); this architecture cannot be collected"
        )
    if snapshots.site == "residual":
        return found
    try:
        parts = branches(trunk, snapshots.layer, ids_SC, {snapshots.site: snapshots.module} if snapshots.module else {})
    except DataError as error:
        raise ConfigError(f"--site {snapshots.site} of {name} cannot be collected: {error}") from error
    return dataclasses.replace(found, module=parts[snapshots.site])


def _of_the_whole(snapshots: SnapshotSet, k: int, ids_SC: Tensor, device: str) -> Tensor:
    """The residual stream (S, C, D) after the layer in the whole model. Raises `ConfigError`."""
    model, layer = snapshots.load(k, torch.float32).to(device), snapshots.layer
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
        half = ids_SC.shape[1] // 2
        changed_SC = ids_SC.clone()
        changed_SC[:, half:] = torch.where(ids_SC[:, half:] == 1, 2, 1)
        other_SCD = activations(model, layer, changed_SC)
    except torch.OutOfMemoryError:
        raise
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
    if _distance(pre_SCD, states[layer]) > TOLERANCE:
        raise ConfigError(f"{refused}: hidden_states[{layer}] is not what enters block {layer}")
    if layer + 1 < depth and _distance(x_SCD, states[layer + 1]) > TOLERANCE:
        raise ConfigError(f"{refused}: hidden_states[{layer + 1}] is not what leaves block {layer}")
    if layer + 1 == depth and not _is_before_the_last_norm(outputs, x_SCD, states[-1]):
        raise ConfigError(
            f"{refused}: between what leaves its last block and its last hidden state is more than a norm"
        )
    if _distance(other_SCD[:, :half], x_SCD[:, :half]) > TOLERANCE:
        raise ConfigError(f"{refused}: a token changes the activations before it (attention that is not causal)")
    return x_SCD


def _is_before_the_last_norm(outputs: dict[str, tuple[Any, Any]], x_SCD: Tensor, last_SCD: Tensor) -> bool:
    """Whether `last_SCD` is `x_SCD` itself, or what one module makes of it."""
    if _distance(x_SCD, last_SCD) <= TOLERANCE:
        return True
    return any(
        isinstance(output, Tensor)
        and bool(inputs)
        and isinstance(inputs[0], Tensor)
        and _distance(output, last_SCD) <= TOLERANCE
        and _distance(inputs[0], x_SCD) <= TOLERANCE
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
