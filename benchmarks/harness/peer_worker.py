"""The authors' package under measurement: runs in its own environment and imports nothing of ours.

It is driven by `harness.peer` through its standard input, a line a request: "step" takes one training step of
`llamascopium.trainer.Trainer.fit` and answers with its seconds, "parity FILE" writes loss and gradients.

The package (2.0.0b34, MIT licence) is used as it is installed. What follows replaces some of its functions at run time.
Without the first group, "train", a crosscoder with the paper's loss does not train at all:

- `CrosscoderSpecs.loss` is the base class's, which knows losses of shape (batch,) and (batch, context) only: the
  "tanh-quad" penalty is a scalar ("Cannot infer tensor specs for tensor with 0 dimensions"), and the second axis of a
  crosscoder's reconstruction loss, (batch, heads), would be taken for positions in a text.
- With that mended the loss is one number a head, and `backward` needs a scalar: the mean over heads is taken, which
  is the paper's loss.
- `Crosscoder.compute_training_metrics` looks for a batch axis in L0 that the metric before has summed away.

The trainer asks its first batch for a "mask" and then refuses masks for crosscoders (of shape (batch,) in the loss, of
shape (batch, heads) in the metrics), so the first batch has one and the others don't; this needs no patch. Neither does
fp32: its `amp_dtype=torch.float32` makes torch switch autocast off.

The other groups change how the same numbers are computed, to see the package at its best:

- "products": the encoder is one product over all snapshots instead of one a snapshot and a sum; h is broadcast to the
  snapshots instead of copied; the decoder is one batched product without `vmap`; decoder norms and the stacked input
  are computed once a step instead of three times and twice.
- "optimizer": torch's fused Adam; the gradient's norm, which nothing uses with clipping off, isn't computed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, TextIO

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

logging.disable(logging.WARNING)


def patch_train() -> None:
    from llamascopium.models import crosscoder

    names = {0: (), 1: ("heads",), 2: ("batch", "heads")}
    crosscoder.CrosscoderSpecs.loss = staticmethod(lambda tensor: names[tensor.ndim])
    compute_loss = crosscoder.Crosscoder.compute_loss
    compute_metrics = crosscoder.Crosscoder.compute_training_metrics

    def scalar_loss(self: Any, *arguments: Any, **options: Any) -> Any:
        found = compute_loss(self, *arguments, **options)
        if not isinstance(found, dict):
            return found.mean()
        return {**found, "loss": found["loss"].mean()}

    def metrics(self: Any, *, l0: Tensor, **context: Any) -> Any:
        return compute_metrics(self, l0=l0[None], **context)

    crosscoder.Crosscoder.compute_loss = scalar_loss
    crosscoder.Crosscoder.compute_training_metrics = metrics


def patch_products() -> None:
    from llamascopium.models.crosscoder import Crosscoder

    compute_norm, stack = Crosscoder.decoder_norm, Crosscoder.prepare_input

    def prepare_input(self: Any, batch: dict[str, Tensor], **options: Any) -> Any:
        # The first thing a step does: nothing of the step before may be left.
        self._norm = None
        self._prepared = stack(self, batch, **options)
        return self._prepared

    def decoder_norm(self: Any, keepdim: bool = False) -> Any:
        if keepdim:
            return compute_norm(self, keepdim=True)
        if getattr(self, "_norm", None) is None or not torch.is_grad_enabled():
            norm = compute_norm(self)
            if not torch.is_grad_enabled():
                return norm
            self._norm = norm
        return self._norm

    def encode(self: Any, x: Tensor, return_hidden_pre: bool = False, **options: Any) -> Any:
        hidden = torch.matmul(x.flatten(-2), self.W_E.flatten(0, 1)) + self.b_E.sum(dim=0)
        hidden = hidden.unsqueeze(-2)
        norm = self.decoder_norm()
        acts = self.activation_function(hidden * norm) / norm
        return (acts, hidden.expand_as(acts)) if return_hidden_pre else acts

    def decode(self: Any, feature_acts: Tensor, **options: Any) -> Tensor:
        return torch.baddbmm(self.b_D[:, None], feature_acts.transpose(0, 1), self.W_D).transpose(0, 1)

    Crosscoder.prepare_input = prepare_input
    Crosscoder.prepare_label = lambda self, batch, **options: self._prepared[0]
    Crosscoder.decoder_norm = decoder_norm
    Crosscoder.encode = encode
    Crosscoder.decode = decode


def patch_optimizer() -> None:
    from llamascopium import trainer

    trainer.Adam = lambda params, lr, betas, foreach: torch.optim.Adam(params, lr=lr, betas=betas, fused=True)
    trainer.clip_grad_norm = lambda parameters, max_norm: torch.zeros(())


PATCHES = {"train": patch_train, "products": patch_products, "optimizer": patch_optimizer}


class Stream:
    """The batches as the trainer wants them; opened once to look at the first batch, then to train."""

    def __init__(self, batches: list[Tensor], hook_points: list[str], answers: TextIO) -> None:
        self.batches = [
            {name: x[:, k].contiguous() for k, name in enumerate(hook_points)}
            | {"tokens": torch.zeros(len(x), dtype=torch.long)}
            for x in batches
        ]
        self.opened = 0
        self.answers = answers

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.opened += 1
        return self.look() if self.opened == 1 else self.train()

    def look(self) -> Iterator[dict[str, Tensor]]:
        first = self.batches[0]
        yield {**first, "mask": torch.ones_like(first["tokens"], dtype=torch.bool)}

    def train(self) -> Iterator[dict[str, Tensor]]:
        """One batch a request; the time until the trainer comes for the next batch is that of the whole step."""
        for number, _ in enumerate(sys.stdin):
            batch = dict(self.batches[number % len(self.batches)])
            start = time.perf_counter()
            yield batch
            print(time.perf_counter() - start, file=self.answers, flush=True)


def make_crosscoder(request: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[Any, list[str]]:
    """The package's crosscoder with our weights, and the names of its snapshots."""
    from llamascopium.models.crosscoder import Crosscoder, CrosscoderConfig

    K, D, F = tensors["W_E"].shape
    hook_points = [f"snapshot.{k}" for k in range(K)]
    sae = Crosscoder(
        CrosscoderConfig(
            hook_points=hook_points,
            d_model=D,
            expansion_factor=F / D,
            act_fn="jumprelu",
            jumprelu_threshold_window=request["window"],
            dtype=dtype,
        )
    )
    # The batches are scaled already: a mean norm of sqrt(D) makes the package's own factor 1.
    sae.set_dataset_average_activation_norm({name: math.sqrt(D) for name in hook_points})
    with torch.no_grad():
        for name in ("W_E", "b_E", "W_D", "b_D"):
            getattr(sae, name).copy_(tensors[name])
        sae.activation_function.log_jumprelu_threshold.copy_(tensors["log_threshold"])
    return sae, hook_points


def fit(request: dict[str, Any], tensors: dict[str, Tensor], batches: list[Tensor], answers: TextIO) -> None:
    """Its own training loop, a step a request."""
    from llamascopium.trainer import Trainer, TrainerConfig

    sae, hook_points = make_crosscoder(request, tensors, torch.float32)
    n_steps = 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        config = TrainerConfig(
            sparsity_loss_type="tanh-quad",
            l1_coefficient=request["sparsity"],
            l1_coefficient_warmup_steps=1,
            lr=request["lr"],
            lr_warm_up_steps=1,
            jumprelu_lr_factor=0.1,
            total_training_tokens=n_steps * len(batches[0]),
            amp_dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[request["dtype"]],
            skip_metrics_calculation=not request["metrics"],
            n_checkpoints=0,
            exp_result_path=folder,
        )
        stream = Stream(batches, hook_points, answers)
        print("ready", file=answers, flush=True)
        Trainer(config).fit(sae, stream)


def parity(request: dict[str, Any], tensors: dict[str, Tensor], batches: list[Tensor]) -> None:
    """Loss and gradients of the first batch in float64, to the file that the request names."""
    tensors = {name: value.double() for name, value in tensors.items()}
    sae, hook_points = make_crosscoder(request, tensors, torch.float64)
    batch = {name: batches[0][:, k].double() for k, name in enumerate(hook_points)}
    batch["tokens"] = torch.zeros(len(batches[0]), dtype=torch.long)
    found = sae.compute_loss(
        sae.normalize_activations(batch),
        sparsity_loss_type="tanh-quad",
        l1_coefficient=request["sparsity"],
        return_aux_data=True,
    )
    found["loss"].backward()
    gradients = {name: getattr(sae, name).grad for name in ("W_E", "b_E", "W_D", "b_D")}
    gradients["log_threshold"] = sae.activation_function.log_jumprelu_threshold.grad
    save_file({**gradients, "loss": found["loss"].detach()}, request["parity"])


def main() -> None:
    request = json.loads(sys.argv[1])
    # What the package prints must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(request["threads"])
    for name in request["patches"]:
        PATCHES[name]()
    tensors = load_file(request["tensors"])
    batches = [tensors.pop(name) for name in sorted(tensors) if name.startswith("x.")]
    if request.get("parity"):
        parity(request, tensors, batches)
    else:
        fit(request, tensors, batches, answers)


if __name__ == "__main__":
    main()
