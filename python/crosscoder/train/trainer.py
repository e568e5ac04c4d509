"""The trainer: one object, one `step` a batch, a checkpoint from which it goes on bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosscoder.backends.base import StepSettings, StepStatistics
from crosscoder.config import TrainConfig
from crosscoder.errors import ConfigError, DataError, NonFiniteError
from crosscoder.gate import Gate
from crosscoder.inputs import Array, as_tensor, scale_of
from crosscoder.metrics import batch_explained_variance
from crosscoder.model import NEVER_16_BITS, Crosscoder
from crosscoder.progress import warn
from crosscoder.train import checkpoint
from crosscoder.train.checkpoint import TrainerState
from crosscoder.train.engines import make_engine
from crosscoder.train.joining import LAST_JOINING, N_BATCHES, JoiningSample, join_features
from crosscoder.train.recent_tokens import RecentTokens
from crosscoder.train.revival import LAST_SHARE_OF_STEPS, FiringRate, revive
from crosscoder.train.schedules import lr_factor, sparsity_coefficient
from crosscoder.train.seeds import Purpose, step_seed
from crosscoder.train.whitening import whiten


class Trainer:
    """Trains `model` with Adam as `config` says. Same model, batches and config on one machine: the same bits.

    ```
    trainer = Trainer(model, TrainConfig(n_steps=1000, batch_size=512, lr=2e-3))
    for x in loader:                    # (B, K, D), scaled
        metrics = trainer.step(x)
    ```
    """

    def __init__(self, model: Crosscoder, config: TrainConfig, *, scale_K: Array | Tensor | None = None) -> None:
        """`scale_K` (K,): what raw activations are multiplied by to give the batches, for the crosscoder in a
        checkpoint. The batches of an `ActivationLoader` or `LiveSource` bring it along."""
        _refuse_inference_mode()
        _require_kinds(model, config)
        model.require_trainable(config.preactivation_coefficient)
        _require_dtype(model, config)
        _require_all_free(model)
        model.backend(config.backend, config.candidates)  # refused before anything is changed
        self.model = model
        self.config = config
        self.step_number = 0
        """Steps done."""
        self.last_checkpoint: Path | None = None
        """Where `save` or `resume` last succeeded."""
        self.snapshot_names = [f"snapshot {k}" for k in range(model.config.n_snapshots)]
        """How errors name the snapshots."""
        if config.state == "low-memory":
            for matrix in (model.W_enc, model.W_dec):
                matrix.data = matrix.data.to(torch.bfloat16)
            for name in ("b_enc", "b_dec", *NEVER_16_BITS):
                small = getattr(model, name)
                small.data = small.data.float()
        self.engine = make_engine(model, config)
        self.state = self.engine.state
        """Adam's moments."""
        device = model.W_enc.device
        self.firing = FiringRate(model.config.n_features, device)
        self.silent_tokens_F = torch.zeros(model.config.n_features, dtype=torch.int64, device=device)
        """(F,): tokens seen since each feature last fired."""
        self.n_revived = 0
        self.n_joined = 0
        self.joining_sample = JoiningSample(device)
        """Activations of the batches just before features are joined."""
        self.recent_tokens = RecentTokens(model.weights()) if Gate.of(model.config).whole_batch else None
        """BatchTopK: what its threshold at inference is calibrated on."""
        self.scale_K: Tensor | None = None
        """(K,) float64: the batches' scale, as far as it is known."""
        self._note_scale(scale_K)
        self._told_scale = False
        self._recent: list[tuple[int, Tensor]] = []
        """The last steps and their batches, where the host only learns later that a loss was not finite."""
        self._uncounted: tuple[StepStatistics, int] | None = None
        """The last step's figures and its tokens, where they are not yet in the counts above."""

    def step(self, x_BKD: Tensor | Array, *, measured: bool = True) -> dict[str, Tensor | float]:
        """Train on one batch (B, K, D). Returns its metrics (scalars, or one value a snapshot) before the update.

        Without `measured` it returns none of them, which saves time: on a GPU the host then runs ahead of the device.

        Raises `DataError` for a wrong shape, a batch of another scale than before or when training is over,
        `NonFiniteError` (weights untouched) for a NaN or an infinity in the batch or the loss (on a GPU a step or two
        later, since nothing waits for the device), `ConfigError` under `torch.inference_mode`.
        """
        _refuse_inference_mode()
        self._note_scale(scale_of(x_BKD))
        x_BKD = as_tensor(x_BKD).detach()
        if x_BKD.ndim and not len(x_BKD):
            raise DataError("a batch without tokens cannot be trained on")
        if self.step_number >= self.config.n_steps:
            raise DataError(f"training is over: all {self.config.n_steps} steps are done")
        self.model.train()
        if self.step_number == 0 and self.config.whitening == "snapshots" and not self.model.is_mixed:
            whiten(self.model, x_BKD)
        self._count()
        factor = lr_factor(self.config, self.step_number)
        lr = self.config.lr * factor
        result = self.engine.step(
            x_BKD,
            StepSettings(
                number=self.step_number,
                lr=lr,
                threshold_lr=lr * self.config.threshold_lr_factor,
                sparsity_coefficient=sparsity_coefficient(self.config, self.step_number),
                preactivation_coefficient=self.config.preactivation_coefficient,
                seed=self._seed(Purpose.STEP),
            ),
        )
        self._check_finite(x_BKD, result)
        self._uncounted = result, len(x_BKD)
        self.step_number += 1
        if self.recent_tokens is not None:
            self.recent_tokens.add(x_BKD)
        if not self.engine.asynchronous:
            self._count()
        self._repair(x_BKD, result)
        if self.recent_tokens is not None and self.step_number == self.config.n_steps:
            self._count()
            self.model.batch_threshold.copy_(self._inference_threshold(self.recent_tokens))
        return self._metrics(x_BKD, result, factor) if measured else {}

    def _note_scale(self, scale_K: Array | Tensor | None) -> None:
        """What batches are multiplied by. Raises `DataError` if it is no scale, or another than that of the others."""
        if scale_K is None:
            return
        given_K = torch.as_tensor(scale_K).to("cpu", torch.float64)
        if self.scale_K is None:
            n = self.model.config.n_snapshots
            if given_K.shape != (n,) or not bool((torch.isfinite(given_K) & (given_K > 0)).all()):
                raise DataError(f"scale_K must be {n} positive numbers, not {given_K.tolist()}")
            self.scale_K = given_K.clone()
            self.model.trained_on_scaled = not bool((given_K == 1).all())
        elif not torch.equal(given_K, self.scale_K):
            raise DataError(
                f"this batch was multiplied by {given_K.tolist()}, those before by {self.scale_K.tolist()}; "
                "give the loader the scale of the first one (ActivationLoader(..., scale=...))"
            )

    def _count(self) -> None:
        """Count what fired in the last step. Its figures are final once the engine has settled, which may wait."""
        if self._uncounted is None:
            return
        self.engine.settle()
        (result, n_tokens), self._uncounted = self._uncounted, None
        if result.smallest_score is not None:
            self.model.update_batch_threshold(result.smallest_score)
        self.firing.update(result.fired_F, n_tokens)
        self.silent_tokens_F = torch.where(result.fired_F > 0, 0, self.silent_tokens_F + n_tokens)

    def _check_finite(self, x_BKD: Tensor, result: StepStatistics) -> None:
        """Raises `NonFiniteError` for this step, or for one just before where the host does not wait for the device."""
        if not self.engine.asynchronous:
            if not bool(torch.isfinite(result.loss.total)):
                raise NonFiniteError(self._explain_non_finite(self.step_number, x_BKD, result.residual_BKD))
            return
        self._recent = [*self._recent[-2:], (self.step_number, x_BKD)]
        self._raise_pending(wait=False)

    def _raise_pending(self, *, wait: bool) -> None:
        bad = self.engine.pending_error(wait=wait)
        if bad is None:
            return
        self.engine.clear_error()
        self._uncounted = None
        self.step_number = bad  # nothing was updated since
        for number, x_BKD in self._recent:
            if number == bad:
                raise NonFiniteError(self._explain_non_finite(bad, x_BKD))
        raise NonFiniteError(f"step {bad}: the loss is NaN or infinite; the weights are those from before that step")

    def _repair(self, x_BKD: Tensor, result: StepStatistics) -> None:
        """Every `revival_every` steps: join what is one feature in two, then restart what is dead. Join once more near
        the end, for what came apart since."""
        config = self.config
        if config.revival == "none":
            return
        last_joining = round(LAST_JOINING * config.n_steps)
        steps_left = -self.step_number % config.revival_every
        reviving = self.step_number + steps_left <= LAST_SHARE_OF_STEPS * config.n_steps
        if not reviving:
            steps_left = last_joining - self.step_number
        if config.joining_cosine is not None and 0 <= steps_left < N_BATCHES:
            self._count()
            self._raise_pending(wait=True)
            self.joining_sample.add(self.model.encode(x_BKD))
            if steps_left == 0:
                self._join(config.joining_cosine)
        if reviving and steps_left == 0:
            self._count()
            self.n_revived += revive(
                self.model,
                self.state,
                result.residual_BKD,
                self.firing.rates(),
                config.revival_rate,
                self.step_number,
                torch.Generator().manual_seed(self._seed(Purpose.REVIVAL)),
            )

    def _inference_threshold(self, recent: RecentTokens) -> Tensor:
        """BatchTopK's, for the weights as they are now."""
        return self.model.calibrated_batch_threshold(recent.tokens(), backend=self.config.backend)

    def _join(self, cosine: float) -> None:
        given_up = join_features(self.model, self.joining_sample.take(self.model.config.n_features), cosine)
        if len(given_up):
            others_F = torch.ones(self.model.config.n_features, dtype=torch.bool, device=given_up.device)
            others_F[given_up] = False
            self.state.restart_rows(given_up, others_F, self.step_number)  # their momentum would bring them back
            self.firing.average_F[given_up] = 0
            self.silent_tokens_F[given_up] = self.config.dead_after_tokens
            self.n_joined += len(given_up)

    def _metrics(self, x_BKD: Tensor, result: StepStatistics, factor: float) -> dict[str, Tensor | float]:
        self._count()
        n_tokens = max(1, len(x_BKD))
        explained_K, ratio_K = batch_explained_variance(self.model.weights().input(x_BKD), result.residual_BKD)
        metrics: dict[str, Tensor | float] = {
            "loss": result.loss.total,
            "reconstruction": result.loss.reconstruction,
            "sparsity": result.loss.sparsity,
            "preactivation": result.loss.preactivation,
            "explained_variance": explained_K,
            "explained_variance_mean_of_ratios": ratio_K,
            "l0": result.open_K / n_tokens,
            "l0_union": result.fired_F.sum() / n_tokens,
            "dead": (self.silent_tokens_F >= self.config.dead_after_tokens).sum(),
            "revived": float(self.n_revived),
            "joined": float(self.n_joined),
            "lr": self.config.lr * factor,
        }
        for name in ("gradient_norm", "candidate_recall"):
            value = getattr(result, name)
            if value is not None:
                metrics[name] = value
        return metrics

    def _seed(self, purpose: Purpose) -> int:
        """Random numbers depend on nothing but seed, step and purpose, so that a resumed run repeats them."""
        return step_seed(self.config.seed, self.step_number, purpose)

    def _explain_non_finite(self, step: int, x_BKD: Tensor, residual_BKD: Tensor | None = None) -> str:
        """`residual_BKD` None: made again, by the weights that the step had and that nothing has changed since."""
        good = f"the last good checkpoint is {self.last_checkpoint}" if self.last_checkpoint else "no checkpoint yet"
        bad_input = [k for k in range(x_BKD.shape[1]) if not bool(torch.isfinite(x_BKD[:, k]).all())]
        if bad_input:
            names = ", ".join(self.snapshot_names[k] for k in bad_input)
            return (
                f"step {step}: NaN or infinity in the activations of {names}; "
                f"the weights are untouched and {good}; collect these activations again"
            )
        if residual_BKD is None:
            x_BKD = self.model.check_input(x_BKD)
            residual_BKD = self.model.decode(self.model.encode(x_BKD)) - x_BKD
        bad_output = [k for k in range(x_BKD.shape[1]) if not math.isfinite(residual_BKD[:, k].square().sum())]
        names = ", ".join(self.snapshot_names[k] for k in bad_output) or "the penalty"
        return f"step {step}: the loss is not finite ({names}); {good}; lower the learning rate"

    def _tensors(self) -> dict[str, Tensor]:
        """What a state holds beside the model and the joining sample; of the same shapes at every step."""
        tensors = {"firing_average": self.firing.average_F, "silent_tokens": self.silent_tokens_F}
        if self.recent_tokens is not None:
            # The crosscoder in a state has a calibrated threshold, and the running one goes on from here.
            tensors |= {"running_threshold": self.model.batch_threshold, **dict(self.recent_tokens.tensors())}
        return {**tensors, **dict(self.engine.tensors())}

    def state_dict(self) -> TrainerState:
        """Everything that the next step depends on. Raises `NonFiniteError` if the loss of a step was not finite.

        As torch's: the tensors are the trainer's own and change with its next step; clone them to keep them.
        """
        self._count()
        self.engine.settle()
        self._raise_pending(wait=True)
        numbers = {"step": self.step_number, "firing_steps": self.firing.n_steps}
        model = self.model.state_dict()
        if self.recent_tokens is not None:
            model["batch_threshold"] = self._inference_threshold(self.recent_tokens)
        return TrainerState(
            model=model,
            scale_K=self.scale_K,
            tensors={**self._tensors(), **dict(self.joining_sample.tensors())},
            numbers={**numbers, "revived": self.n_revived, "joined": self.n_joined},
        )

    def load_state_dict(self, state: TrainerState) -> None:
        """Go on from a `state_dict` of the same configurations, bit for bit.

        Raises `ConfigError` where it is of other sizes or options; nothing is changed then.
        """
        model, tensors, numbers = state["model"], state["tensors"], state["numbers"]
        own, given = {**dict(self.model.named_parameters()), **self._tensors()}, {**model, **tensors}
        wrong = [name for name, tensor in own.items() if name not in given or given[name].shape != tensor.shape]
        if wrong:
            raise ConfigError(
                f"the state is of a trainer of other options: {', '.join(wrong)} missing or of other shape"
            )
        self.engine.settle()
        self._uncounted = None
        self.model.load_state_dict(model)
        for name, tensor in self._tensors().items():
            tensor.copy_(tensors[name])
        self.joining_sample.load(tensors)
        self.scale_K = self.scale_K if state["scale_K"] is None else state["scale_K"]
        self.step_number, self.firing.n_steps = numbers["step"], numbers["firing_steps"]
        self.n_revived, self.n_joined = numbers["revived"], numbers["joined"]
        self._recent = []

    def save(self, folder: Path | str, extra: dict[str, Any] | None = None) -> None:
        """Write everything that the next step depends on into `folder`, atomically.

        `extra` (JSON) comes back from `resume`: the loader's state, say. `Crosscoder.from_pretrained(folder)` is the
        crosscoder as training would export it now, for raw activations; where the batches' scale is not known
        (`scale_K`), for activations as `step` got them, and a warning says so. Raises `StorageError`.
        """
        if self.scale_K is None and not self._told_scale:
            self._told_scale = True
            warn(
                "the scale of the activations is not known, so the crosscoder in this checkpoint reads them as they "
                "were given to Trainer.step; if that is not how they are, make Trainer(..., scale_K=what they were "
                "multiplied by). A loader's batches bring their scale along, copies of them do not"
            )
        checkpoint.save(Path(folder), self.model.config, self.config, self.state_dict(), extra or {})
        self.last_checkpoint = Path(folder)

    def resume(self, folder: Path | str) -> dict[str, Any]:
        """Go on from a checkpoint, bit for bit. Returns what `save` got as `extra`.

        Raises `DataError` for a missing or damaged checkpoint, `ConfigError` for one of another configuration.
        """
        state, extra = checkpoint.load(Path(folder), self.model.config, self.config)
        self.load_state_dict(state)
        self.last_checkpoint = Path(folder)
        return extra


def _require_kinds(model: object, config: object) -> None:
    if not isinstance(model, Crosscoder) or not isinstance(config, TrainConfig):
        kinds = f"{type(model).__name__} and {type(config).__name__}"
        raise ConfigError(f"a trainer takes a Crosscoder and a TrainConfig, in this order, not {kinds}")


def _refuse_inference_mode() -> None:
    if torch.is_inference_mode_enabled():
        raise ConfigError(
            "training under torch.inference_mode would leave weights that nothing can change afterwards; "
            "train outside of it (torch.no_grad is fine)"
        )


def _require_all_free(model: Crosscoder) -> None:
    """Raises `ConfigError` for a parameter that is to stay as it is: a step trains them all."""
    fixed = [
        name
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and (name != "log_threshold" or Gate.of(model.config).learned)
    ]
    if fixed:
        raise ConfigError(
            f"{', '.join(fixed)} asks for no gradient, and Trainer trains every parameter; call "
            "model.requires_grad_(True), or train the others with model.loss and an optimiser of your own"
        )


def _require_dtype(model: Crosscoder, config: TrainConfig) -> None:
    """Raises `ConfigError` for 16-bit weights where steps would be rounded away, and for parameters of two dtypes."""
    dtype = model.W_enc.dtype
    if config.state == "fp32" and dtype in (torch.bfloat16, torch.float16):
        raise ConfigError(
            f"the weights are {dtype}, in which most of a step is lost to rounding; train model.float(), or use "
            'TrainConfig(state="low-memory"): bfloat16 weights with stochastic rounding'
        )
    for name in ("b_enc", "b_dec", "log_threshold"):
        other = getattr(model, name).dtype
        if config.state == "fp32" and other != dtype:
            raise ConfigError(f"{name} is {other}, and W_enc {dtype}; bring the whole crosscoder to one: model.to(...)")
