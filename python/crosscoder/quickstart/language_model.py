"""The quickstart's language model: a small GPT-NeoX (Pythia's architecture) with snapshots of its training.

It is to show in about a thousand small steps what a large model shows in its first billions of tokens: unigram
statistics, then bigrams, then induction. Induction takes two blocks that find each other (a head of the first
attends to the previous token; a head of the second looks for the present token in what the first has written),
and from text alone that takes far longer. In trials it formed, with every seed tried, by these together:

- a share of the sequences are a window of real text said again and again. The windows differ in length: from
  windows of one length a model learns to copy from that distance, which is not induction (it is gone at others);
- most of these come early and in short sequences, where there is less to attend to wrongly;
- the first block's heads begin with a preference for near tokens; otherwise a head for the previous token forms
  in the last block, where induction cannot use it, or in none;
- half of each head's dimensions are without rotary position, free to compare content, and the wavelengths of the
  others are short; the MLP follows the attention instead of standing beside it; the rates of the blocks are lower
  than those of the embeddings.

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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosscoder import files
from crosscoder.activations.content import files_digest, tokenizer_files
from crosscoder.activations.snapshots import quiet_transformers
from crosscoder.activations.tokens import TokenSet
from crosscoder.errors import ConfigError, DataError, NonFiniteError
from crosscoder.progress import Progress
from crosscoder.quickstart.tokenizer import load_tokenizer

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
    parallel_residual: bool = False
    """Attention and MLP of a block side by side, as in Pythia, instead of one after the other."""
    rotary_fraction: float = 0.5
    """Share of each head's dimensions that carry the rotary position."""
    rotary_base: float = 20.0
    """Base of the rotary wavelengths: the longest is 2 pi times this, in tokens."""
    recency_bias: float = 1.5
    """Standard deviation of the initial biases of queries, and the same of keys, in the first block's rotary
    dimensions: its heads begin by attending to near tokens."""
    steps: int = 1_200
    """Steps of training."""
    batch_size: int = 16
    """Sequences B in a batch; a sequence is a row of the TokenSet."""
    learning_rate: float = 1.5e-3
    """Peak rate of AdamW in the blocks."""
    embedding_learning_rate: float = 5e-3
    """Peak rate in the embedding, the final norm and the unembedding."""
    warmup_steps: int = 20
    """Steps of linear increase to the peaks; a cosine leads down from them."""
    final_learning_rate: float = 0.1
    """Rates at the end, as a share of the peaks."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    clip: float = 1.0
    """Largest norm of the gradient; a larger one is scaled down to it."""
    short_context: int = 32
    """Tokens of a sequence in the first steps; must divide the context. Rows are cut, so a batch has as many tokens."""
    short_steps: int = 600
    """Steps with short sequences."""
    repeat_fraction: float = 0.5
    """Share of the sequences that are a repeated window of text, in the steps with short sequences."""
    late_repeat_fraction: float = 0.2
    """That share in the later steps."""
    shortest_repeat: float = 0.125
    """Shortest repeated window, as a share of a sequence; lengths are drawn log-uniformly from there to a half."""
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
                raise ConfigError(f"{name} of the language model is {getattr(self, name)}; it must be 1 or more")
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            raise ConfigError(
                f"the language model's d_model ({self.d_model}) must be an even multiple of its n_heads "
                f"({self.n_heads})"
            )
        for name in ("learning_rate", "embedding_learning_rate", "clip", "rotary_base"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} of the language model is {getattr(self, name)}; it must be over 0")
        shares = ("rotary_fraction", "final_learning_rate", "beta1", "beta2", "repeat_fraction")
        for name in (*shares, "late_repeat_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} of the language model is {getattr(self, name)}; it must be 0 to 1")
        if not 0 <= self.warmup_steps < self.steps:
            raise ConfigError(f"the language model's warmup_steps ({self.warmup_steps}) must be under its {self.steps}")
        if not 1 <= self.shortest_repeat * self.short_context <= self.short_context / 2:
            raise ConfigError(
                f"shortest_repeat of the language model is {self.shortest_repeat}; it must be from "
                f"1 / short_context (1 / {self.short_context}) to 0.5"
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


def next_token_loss(model: Any, ids_BC: Tensor) -> Tensor:
    """Mean cross-entropy of each token given those before it in its row, in nats; a scalar with gradient.

    The same as `model(ids, labels=ids).loss` of a causal language model of `transformers`, faster on a CPU.
    """
    hidden = model.base_model(input_ids=ids_BC, use_cache=False).last_hidden_state
    weight = model.get_output_embeddings().weight
    cross_entropy: Any = _LinearCrossEntropy.apply
    loss: Tensor = cross_entropy(hidden[:, :-1].flatten(0, 1), weight, ids_BC[:, 1:].flatten())
    return loss


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(rows)


def training_batch(tokens: TokenSet, config: LanguageModelConfig, step: int) -> Tensor:
    """Token ids of step `step`, int64: a pure function of the tokens, the seed and the step.

    `(B, C)`, or in the first `short_steps` steps `(B * C / short_context, short_context)`. Each epoch takes every row
    once, in an order of its own. The first sequences of the batch, as many as the share of repeats says, are replaced
    by a window of their own tokens, repeated to their end; its length and its place are random.
    """
    B, S, C = config.batch_size, tokens.n_sequences, tokens.context
    short = step < config.short_steps
    length = config.short_context if short else C
    places = range(step * B, (step + 1) * B)
    rows = tokens.ids[[_order(config.seed, place // S, S)[place % S] for place in places]]
    sequences = rows.reshape(-1, length).astype(np.int64)
    share = config.repeat_fraction if short else config.late_repeat_fraction
    generator = np.random.default_rng([config.seed, 1, step])
    for sequence in sequences[: round(share * len(sequences))]:
        ratio = 0.5 / config.shortest_repeat
        window = round(length * config.shortest_repeat * ratio ** generator.random())
        start = generator.integers(0, length - window + 1)
        sequence[:] = np.resize(sequence[start : start + window].copy(), length)
    return torch.from_numpy(sequences)


def _schedule(config: LanguageModelConfig, step: int) -> float:
    """The learning rates of a step as a share of their peaks."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return config.final_learning_rate + (1 - config.final_learning_rate) * cosine


def _small_init(config: LanguageModelConfig) -> float:
    """Standard deviation of Pythia's initial weights ("small init", Nguyen and Salazar 2019)."""
    return math.sqrt(2 / (5 * config.d_model))


def _new_model(config: LanguageModelConfig, vocabulary: int, context: int) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    new_config: Any = GPTNeoXConfig
    architecture = new_config(
        vocab_size=vocabulary,
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        intermediate_size=config.d_mlp,
        max_position_embeddings=context,
        use_parallel_residual=config.parallel_residual,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": config.rotary_base,
            "partial_rotary_factor": config.rotary_fraction,
        },
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model: Any = GPTNeoXForCausalLM(architecture)
        with torch.no_grad():
            for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
                embedding.weight.normal_(std=_small_init(config))
            _start_queries_and_keys(config, model)
    return model


def _start_queries_and_keys(config: LanguageModelConfig, model: Any) -> None:
    """Larger initial queries and keys than transformers', and the first block's preference for near tokens.

    Where the biases of query and key are equal, the rotation makes their product fall with the distance.
    """
    head = config.d_model // config.n_heads
    rotary = int(head * config.rotary_fraction)  # the first dimensions of a head
    projections = [block.attention.query_key_value for block in model.base_model.layers]
    for projection in projections:
        weight = projection.weight.view(config.n_heads, 3, head, config.d_model)  # query, key, value of a head
        weight[:, :2].normal_(std=_small_init(config))
    bias = projections[0].bias.view(config.n_heads, 3, head)[..., :rotary]
    bias[:, 0].normal_(std=config.recency_bias)
    bias[:, 1] = bias[:, 0]


def _save_snapshot(model: Any, tokenizer_folder: Path, folder: Path) -> None:
    quiet_transformers()
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
    state: dict[str, Any] = torch.load(io.BytesIO(data[32:]), map_location="cpu", weights_only=True)
    return state


def _check_record(out: Path, record: dict[str, Any], tokenizer_folder: Path) -> None:
    """Refuse to go on with what another configuration, text or tokenizer began in `out`."""
    path = out / _RECORD
    if not path.exists():
        return
    found = files.read_json(path, config=dict)
    before, now = {**found, **found["config"]}, {**record, **record["config"]}
    changed = [name for name in now if name != "config" and before.get(name) != now[name]]
    if changed == ["tokenizer"]:
        names = ", ".join(file.name for file in tokenizer_files(tokenizer_folder))
        raise DataError(
            f"the tokenizer in {tokenizer_folder} ({names}) is not the one that {out} was begun with; restore "
            f"it, or delete {out}"
        )
    if changed:
        raise ConfigError(
            f"{out} was begun with other settings ({', '.join(changed)}); delete {out} or choose another folder"
        )


def train_language_model(
    config: LanguageModelConfig,
    tokens: TokenSet,
    tokenizer_folder: Path,
    out: Path,
    device: torch.device | str = "cpu",
) -> list[str]:
    """Train the language model on `tokens`, in float32 on `device`, and save its snapshots into `out`.

    Each snapshot `out/step<N>`, the model after N steps, is what `AutoModelForCausalLM.from_pretrained` and
    `AutoTokenizer.from_pretrained` read. Returns their names in the order of training.

    May be killed at any time: the same call goes on from the last checkpoint, keeps the snapshots that are
    there, and the bits are those of an uninterrupted training (on one machine with one number of threads;
    another number sums in another order). Where all snapshots are there it returns at once.

    Raises `ConfigError` where `out` was begun with other settings, text or tokenizer, or the tokens do not
    fit the tokenizer; `DataError` where a checkpoint is damaged; `NonFiniteError` where the loss or its
    gradient becomes so; `StorageError` where writing fails.
    """
    record = {
        "config": asdict(config),
        "tokens": tokens.fingerprint,
        "tokenizer": files_digest(tokenizer_files(tokenizer_folder), tokenizer_folder),
    }
    _check_record(out, record, tokenizer_folder)
    vocabulary = len(load_tokenizer(tokenizer_folder))
    if int(tokens.ids.max()) >= vocabulary:
        raise ConfigError(
            f"the tokens go up to id {int(tokens.ids.max())}, the tokenizer in {tokenizer_folder} has "
            f"{vocabulary}; make the tokens with this tokenizer"
        )
    if tokens.context % config.short_context:
        raise ConfigError(
            f"short_context of the language model is {config.short_context}; it must divide the context of the "
            f"tokens, {tokens.context}"
        )
    revisions = config.revisions()
    if not (out / _RECORD).exists():
        files.make_folder(out)
        files.write_json(out / _RECORD, record)
    checkpoint = out / _CHECKPOINT
    if not all((out / revision).is_dir() for revision in revisions):
        _train(config, tokens, vocabulary, tokenizer_folder, out, torch.device(device))
    checkpoint.unlink(missing_ok=True)
    return revisions


def _train(
    config: LanguageModelConfig,
    tokens: TokenSet,
    vocabulary: int,
    tokenizer_folder: Path,
    out: Path,
    device: torch.device,
) -> None:
    model = _new_model(config, vocabulary, tokens.context).to(device)
    blocks = list(model.base_model.layers.parameters())
    inside = {id(parameter) for parameter in blocks}
    peaks = [config.learning_rate, config.embedding_learning_rate]
    optimizer = torch.optim.AdamW(
        [
            {"params": blocks},
            {"params": [parameter for parameter in model.parameters() if id(parameter) not in inside]},
        ],
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
            loss = next_token_loss(model, training_batch(tokens, config, step).to(device))
            torch.autograd.backward(loss)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
                raise NonFiniteError(
                    f"the language model's loss or gradient is not finite at step {step} (the last good "
                    f"checkpoint is of step {saved_step}); start again elsewhere with a learning rate "
                    f"under {config.learning_rate}"
                )
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * _schedule(config, step)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            progress.advance(1, {"loss": f"{loss.item():.3f}"})
