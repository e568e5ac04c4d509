"""The quickstart's language model: a small GPT-NeoX (Pythia's architecture) with snapshots of its training.

Shapes: B sequences in a batch, C context, D width, V vocabulary, N = B * (C - 1) predicted tokens.
"""

from __future__ import annotations

import hashlib
import io
import math
import shutil
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from crosscoder import files
from crosscoder.activations.tokens import TokenSet
from crosscoder.errors import ConfigError, DataError, NonFiniteError
from crosscoder.progress import Progress
from crosscoder.quickstart.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import GPTNeoXForCausalLM

_RECORD = "training.json"
_CHECKPOINT = "checkpoint.bin"
_LAST_POWER = 512
_LOSS_ROWS = 512


@dataclass(frozen=True)
class LanguageModelConfig:
    """Architecture and recipe. Everything goes by step, never by time, so that a recipe means one model."""

    d_model: int = 128
    """Width D of the residual stream."""
    n_layers: int = 2
    """Blocks. Induction needs at least two."""
    n_heads: int = 4
    """Attention heads of a block."""
    d_mlp: int = 512
    """Hidden width of a block's MLP."""
    rotary_fraction: float = 1.0
    """Share of each head's dimensions that carry the rotary position."""
    steps: int = 1_000
    """Steps of training."""
    batch_size: int = 16
    """Sequences B in a batch; a sequence is a row of the TokenSet."""
    learning_rate: float = 5e-3
    """Peak rate of AdamW."""
    warmup_steps: int = 50
    """Steps of linear increase to the peak; a cosine leads down from it."""
    final_learning_rate: float = 0.1
    """Rate at the end, as a share of the peak."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    clip: float = 1.0
    """Largest norm of the gradient; a larger one is scaled down to it."""
    repeat_fraction: float = 0.3
    """Share of a batch's sequences that are a real window of C/2 tokens twice, an augmentation."""
    snapshots: int = 14
    """Snapshots kept: steps 0, 1, 2, 4, ... up to 512, then evenly spaced to the end."""
    checkpoint_every: int = 100
    """Steps between checkpoints, from which a killed training goes on."""
    seed: int = 0
    """Of the initial weights, the order of sequences and the repeated windows."""

    def __post_init__(self) -> None:
        whole = ("d_model", "n_layers", "n_heads", "d_mlp", "steps", "batch_size", "checkpoint_every")
        for name in whole:
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} of the language model is {getattr(self, name)}; it must be 1 or more"
                )
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            raise ConfigError(
                f"the language model's d_model ({self.d_model}) must be an even multiple of its n_heads "
                f"({self.n_heads})"
            )
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} of the language model is {getattr(self, name)}; it must be over 0")
        for name in ("rotary_fraction", "final_learning_rate", "beta1", "beta2", "repeat_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} of the language model is {getattr(self, name)}; it must be 0 to 1")
        if not 0 <= self.warmup_steps < self.steps:
            raise ConfigError(
                f"the language model's warmup_steps ({self.warmup_steps}) must be under its {self.steps}"
            )
        snapshot_steps(self.steps, self.snapshots)

    def revisions(self) -> list[str]:
        """Names of the snapshots in the order of training: `step0`, `step1`, `step2`, `step4`, ..."""
        return [f"step{step}" for step in snapshot_steps(self.steps, self.snapshots)]


def snapshot_steps(steps: int, count: int) -> list[int]:
    """The `count` steps to keep: 0, the powers of two up to 512 (and under `steps`), then evenly to `steps`.

    Raises `ConfigError` where `count` leaves no place for the last step or there are fewer steps than that.
    """
    powers = [0, *(1 << i for i in range(_LAST_POWER.bit_length()) if 1 << i < steps)]
    rest = count - len(powers)
    if rest < 1 or rest > steps - powers[-1]:
        raise ConfigError(
            f"{count} snapshots do not fit a training of {steps} steps; "
            f"choose from {len(powers) + 1} to {len(powers) + steps - powers[-1]}"
        )
    return powers + [int(step) for step in np.linspace(powers[-1], steps, rest + 1).round()[1:]]


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `x @ W^T` without (N, V) logits: some rows at a time, in one small buffer.

    The gradients are computed with the loss. On a CPU a good part of a step otherwise goes into fresh memory
    pages for the logits and their gradient.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
        N = len(x_ND)
        grad_x, grad_weight = torch.empty_like(x_ND), torch.zeros_like(weight_VD)
        buffer = x_ND.new_empty(min(N, _LOSS_ROWS), len(weight_VD))
        total = x_ND.new_zeros(())
        for start in range(0, N, _LOSS_ROWS):
            x = x_ND[start : start + _LOSS_ROWS]
            target = target_N[start : start + _LOSS_ROWS, None]
            logits = torch.mm(x, weight_VD.t(), out=buffer[: len(x)])
            norm = logits.logsumexp(dim=1, keepdim=True)
            total += (norm - logits.gather(1, target)).sum()
            error = logits.sub_(norm).exp_().scatter_add_(1, target, -torch.ones_like(norm))
            torch.mm(error, weight_VD, out=grad_x[start : start + _LOSS_ROWS])
            grad_weight.addmm_(error.t(), x)
        ctx.save_for_backward(grad_x.div_(N), grad_weight.div_(N))
        return total / N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grads[0], grad_weight * grads[0], None


def next_token_loss(model: GPTNeoXForCausalLM, ids_BC: Tensor) -> Tensor:
    """Mean cross-entropy of each token given those before it in its row, in nats; a scalar with gradient.

    The same as `model(ids, labels=ids).loss`, faster on a CPU.
    """
    language_model: Any = model
    hidden = language_model.base_model(input_ids=ids_BC, use_cache=False).last_hidden_state
    weight = language_model.get_output_embeddings().weight
    cross_entropy: Any = _LinearCrossEntropy.apply
    loss: Tensor = cross_entropy(hidden[:, :-1].flatten(0, 1), weight, ids_BC[:, 1:].flatten())
    return loss


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(rows)


def training_batch(tokens: TokenSet, config: LanguageModelConfig, step: int) -> Tensor:
    """Token ids `(B, C)` int64 of step `step`: a pure function of the tokens, the seed and the step.

    Each epoch takes every row once, in an order of its own. The first `round(repeat_fraction * B)` rows are
    replaced by a window of C/2 tokens of theirs, twice (where C is odd, its first token follows once more).
    """
    B, S, C = config.batch_size, tokens.n_sequences, tokens.context
    places = range(step * B, (step + 1) * B)
    rows = tokens.ids[[_order(config.seed, place // S, S)[place % S] for place in places]].astype(np.int64)
    generator = np.random.default_rng([config.seed, 1, step])
    for row in rows[: round(config.repeat_fraction * B)]:
        start = int(generator.integers(0, C - C // 2 + 1))
        row[:] = np.resize(row[start : start + C // 2].copy(), C)
    return torch.from_numpy(rows)


def _learning_rate(config: LanguageModelConfig, step: int) -> float:
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return config.learning_rate * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)


def _new_model(config: LanguageModelConfig, vocabulary: int, context: int) -> GPTNeoXForCausalLM:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    new_config: Any = GPTNeoXConfig
    architecture = new_config(
        vocab_size=vocabulary,
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        intermediate_size=config.d_mlp,
        max_position_embeddings=context,
        rotary_pct=config.rotary_fraction,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return GPTNeoXForCausalLM(architecture)


def _save_snapshot(model: GPTNeoXForCausalLM, tokenizer_folder: Path, folder: Path) -> None:
    with files.new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        for file in tokenizer_folder.iterdir():
            if file.is_file():
                shutil.copyfile(file, temporary / file.name)


def _save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    files.write_bytes(path, hashlib.sha256(data).digest() + data)


def _load_checkpoint(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        raise DataError(f"{path} is damaged (its checksum differs); delete it to train from step 0 again")
    state: dict[str, Any] = torch.load(io.BytesIO(data[32:]), weights_only=True)
    return state


def _check_record(out: Path, record: dict[str, Any]) -> None:
    """Refuse to go on with what another configuration, text or tokenizer began in `out`."""
    path = out / _RECORD
    if not path.exists():
        files.write_json(path, record)
        return
    found = files.read_json(path)
    if found == record:
        return
    remedy = f"delete {out} or choose another folder"
    if not isinstance(found, dict) or not isinstance(found.get("config"), dict):
        raise DataError(f"{path} is damaged; {remedy}")
    before, now = {**found, **found["config"]}, {**record, **record["config"]}
    changed = [name for name in now if name != "config" and before.get(name) != now[name]]
    raise ConfigError(f"{out} was begun with other settings ({', '.join(changed)}); {remedy}")


def train_language_model(
    config: LanguageModelConfig, tokens: TokenSet, tokenizer_folder: Path, out: Path
) -> list[str]:
    """Train the language model on `tokens`, in float32, and save its snapshots into `out`.

    Each snapshot `out/step<N>`, the model after N steps, is what `AutoModelForCausalLM.from_pretrained` and
    `AutoTokenizer.from_pretrained` read. Returns their names in the order of training.

    May be killed at any time: the same call goes on from the last checkpoint, keeps the snapshots that are
    there, and the bits are those of an uninterrupted training (on one machine with one number of threads;
    another number sums in another order). Where all snapshots are there it returns at once.

    Raises `ConfigError` where `out` was begun with other settings, text or tokenizer, or the tokens do not
    fit the tokenizer; `DataError` where a checkpoint is damaged; `NonFiniteError` where the loss or its
    gradient becomes so; `StorageError` where writing fails.
    """
    vocabulary = len(load_tokenizer(tokenizer_folder))
    if int(tokens.ids.max()) >= vocabulary:
        raise ConfigError(
            f"the tokens go up to id {int(tokens.ids.max())}, the tokenizer in {tokenizer_folder} has "
            f"{vocabulary}; make the tokens with this tokenizer"
        )
    revisions = config.revisions()
    tokenizer_hash = hashlib.sha256((tokenizer_folder / "tokenizer.json").read_bytes()).hexdigest()
    files.make_folder(out)
    _check_record(out, {"config": asdict(config), "tokens": tokens.fingerprint, "tokenizer": tokenizer_hash})
    checkpoint = out / _CHECKPOINT
    if not all((out / revision).is_dir() for revision in revisions):
        _train(config, tokens, vocabulary, tokenizer_folder, out)
    checkpoint.unlink(missing_ok=True)
    return revisions


def _train(
    config: LanguageModelConfig, tokens: TokenSet, vocabulary: int, tokenizer_folder: Path, out: Path
) -> None:
    model = _new_model(config, vocabulary, tokens.context)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    checkpoint = out / _CHECKPOINT
    step = 0
    if checkpoint.exists():
        state = _load_checkpoint(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = int(state["step"])
    model.train()
    wanted = set(snapshot_steps(config.steps, config.snapshots))
    saved_step = step
    with Progress("language model", config.steps, "steps", done=step) as progress:
        while True:
            if step in wanted and not (out / f"step{step}").is_dir():
                _save_snapshot(model, tokenizer_folder, out / f"step{step}")
            if step == config.steps:
                return
            if step > saved_step and step % config.checkpoint_every == 0:
                _save_checkpoint(
                    checkpoint,
                    {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()},
                )
                saved_step = step
            loss = next_token_loss(model, training_batch(tokens, config, step))
            torch.autograd.backward(loss)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
                raise NonFiniteError(
                    f"the language model's loss or gradient is not finite at step {step} (the last good "
                    f"checkpoint is of step {saved_step}); start again elsewhere with a learning rate "
                    f"under {config.learning_rate}"
                )
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(config, step)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            progress.advance(1, {"loss": f"{loss.item():.3f}"})
