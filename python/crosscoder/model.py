"""The crosscoder: one encoder over K snapshots, a decoder for each.

Letters: B tokens, K snapshots, D width of one activation, F features. Source: docs/method.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from crosscoder import backends, definition, devices, weights
from crosscoder.backends.base import Backend
from crosscoder.code import SparseCode
from crosscoder.config import CrosscoderConfig
from crosscoder.errors import ConfigError, DataError
from crosscoder.files import explained_write_errors
from crosscoder.gate import Gate
from crosscoder.inputs import Array, outside_inference_mode, require_finite
from crosscoder.parameters import Weights, Writes, mixed
from crosscoder.penalty import LossSettings, LossTerms
from crosscoder.precision import full_precision
from crosscoder.progress import warn

NEVER_16_BITS = ("log_threshold", "snapshot_scale", "snapshot_mix", "batch_threshold")
"""Small tensors that stay in float32 at least, whatever the weights are converted to."""

_ROWS_BYTES = 1 << 28
"""Float32 weights that are worked on at a time where a crosscoder is copied."""


class Crosscoder(nn.Module, PyTorchModelHubMixin):
    """A crosscoder with parameters `W_enc`, `W_dec` (F, K, D), `b_enc` (F,), `b_dec` (K, D), `log_threshold` (F,).

    It reads activations scaled so that their mean norm is sqrt(D) at every snapshot; `fold_scales` gives the
    equal model for raw activations. While it is trained, the encoder may read them mixed over the snapshots
    (`set_snapshot_mix`): `W_enc` is then in those coordinates, until `fold_scales` or saving takes them out.
    Floating dtypes: float32, float64, bfloat16 or float16. Thresholds, scales and the mix never drop under float32: in
    16 bits a threshold would stop learning, and a scale would shift a whole snapshot.
    """

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_enc: nn.Parameter
    b_dec: nn.Parameter
    log_threshold: nn.Parameter
    snapshot_scale: Tensor
    snapshot_mix: Tensor
    is_mixed: bool = False
    """Whether `snapshot_mix` is anything but the identity."""
    batch_threshold: Tensor
    trained_on_scaled: bool = False
    """Has a trainer given it activations that were multiplied by something? Not stored."""

    def __init__(
        self,
        config: CrosscoderConfig,
        seed: int | None = 0,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Random decoder directions, the same at every snapshot; W_enc = W_dec; biases 0 (docs/method.md, section 4).

        The decoder norm is sqrt(2 D / (K F)); `crosscoder.train.initialization.search_decoder_norm` finds a better
        one from data. `dtype`: of W_enc and W_dec. With `seed` None W_enc and W_dec have no memory (they are on the
        "meta" device), for `load_state_dict(..., assign=True)`.
        """
        super().__init__()
        self.config = config
        shape = (config.n_features, config.n_snapshots, config.d_model)
        with outside_inference_mode():  # writes to the weights must be counted
            self.W_dec = nn.Parameter(
                torch.empty(shape, device="meta")
                if seed is None
                else _directions(shape, seed, torch.device(device), dtype)
            )
            self.W_enc = nn.Parameter(self.W_dec.detach().clone())
            small: dict[str, Any] = {"device": device, "dtype": torch.float32}  # whatever torch's default dtype is
            self.b_enc = nn.Parameter(torch.zeros(shape[0], **small))
            self.b_dec = nn.Parameter(torch.zeros(shape[1:], **small))
            theta = torch.full(shape[:1], config.threshold_init, **small)
            self.log_threshold = nn.Parameter(theta.log(), requires_grad=Gate.of(config).learned)
            self.register_buffer("snapshot_scale", torch.ones(shape[1], **small))
            self.register_buffer("snapshot_mix", torch.eye(shape[1], **small))
            """(K, K), symmetric: the encoder reads sum_l mix[k, l] x_l at snapshot k. The identity once trained."""
            self.register_buffer("batch_threshold", torch.zeros((), **small))
        self._writes = Writes()
        self._backends: dict[str, Backend] = {}
        """Those that have computed with this crosscoder, by name."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Crosscoder:
        small = {name: getattr(self, name).detach() for name in NEVER_16_BITS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in small.items():
            now = getattr(self, name)
            if now.dtype in (torch.bfloat16, torch.float16):
                now.data = before.to(now.device, torch.float32)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Finished crosscoders are stored without the mix, which is the identity then.
        state_dict.setdefault(f"{prefix}snapshot_mix", torch.eye(self.config.n_snapshots))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._note_mix()

    def _note_mix(self) -> None:
        self.is_mixed = not torch.equal(
            self.snapshot_mix.cpu(), torch.eye(self.config.n_snapshots).to(self.snapshot_mix.dtype)
        )

    # ------------------------------------------------------------------------------------------- computing

    def weights(self) -> Weights:
        """The parameters and what they mean, as the backends take them: the tensors themselves, no copies."""
        return Weights(
            config=self.config,
            W_enc=self.W_enc,
            W_dec=self.W_dec,
            b_enc=self.b_enc,
            b_dec=self.b_dec,
            log_threshold=self.log_threshold,
            snapshot_scale=self.snapshot_scale,
            snapshot_mix=self.snapshot_mix if self.is_mixed else None,
            batch_threshold=self.batch_threshold,
            training=self.training,
            writes=self._writes,
        )

    def backend(self, name: str = "auto", candidates: str = "exact") -> Backend:
        """What computes with this crosscoder, and keeps what it derives from the weights.

        Raises `ConfigError` for an unknown backend or candidates, or where they do not fit.
        """
        chosen = backends.choose(name, self.weights(), candidates)
        if chosen not in self._backends:
            self._backends[chosen] = backends.make(chosen)
        return self._backends[chosen]

    @property
    def threshold(self) -> Tensor:
        """theta (F,), at least 0."""
        return self.log_threshold.exp()

    def decoder_norms(self) -> Tensor:
        """n (F, K): a feature's strength at each snapshot, in units of scaled activations; at least float32."""
        return self.weights().norms()

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """How everything here is computed: outside of inference mode, on the weights' device, in full precision."""
        device = self.W_enc.device
        with outside_inference_mode(), devices.current(device), full_precision(device):
            yield

    def check_input(self, x_BKD: Tensor | Array) -> Tensor:
        """`x_BKD` (a numpy array as well) in the weights' dtype or float32, on their device.

        Raises `DataError` if it is not (B, K, D), and on a CPU `NonFiniteError` where it has a NaN or an infinity.
        """
        x_BKD = self.weights().input(x_BKD)
        if x_BKD.device.type == "cpu":
            require_finite(x_BKD)
        return x_BKD

    def encoder_input(self, x_BKD: Tensor) -> Tensor:
        """What the encoder reads for activations (B, K, D): themselves, unless they are mixed over the snapshots."""
        return self.weights().encoder_input(x_BKD)

    def preactivations(self, x_BKD: Tensor | Array) -> Tensor:
        """h (B, F), densely."""
        with full_precision(self.W_enc.device):
            return definition.preactivations(self.weights(), self.check_input(x_BKD))

    @torch.no_grad()
    def encode(self, x_BKD: Tensor | Array, *, backend: str = "auto", candidates: str = "exact") -> SparseCode:
        """The sparse code of B tokens.

        `backend`: "reference" (dense torch), "native" (C++, on a CPU), "triton" (on a GPU), one of your own
        (`crosscoder.registry`), or the fastest that fits ("auto"). `candidates` "int8" (native only) is faster and may
        miss a pair in ten thousand.

        Raises `DataError` on a wrong shape, `NonFiniteError` that names the first token with a NaN or an infinity (it
        has no code), `ConfigError` for a backend or candidates that do not fit.
        """
        with self._computing():
            chosen, found = self.backend(backend, candidates), self.weights()
            x_BKD = found.input(x_BKD)
            require_finite(x_BKD)  # on a GPU as well: encoding waits for the number of pairs anyway
            return chosen.encode(found, x_BKD, candidates)

    @torch.no_grad()
    def decode(self, code: SparseCode, *, backend: str = "auto") -> Tensor:
        """The reconstruction (B, K, D) of a sparse code, whose parts may be numpy arrays.

        Raises `DataError` if it is no sparse code or that of another crosscoder, `ConfigError` for a backend that does
        not fit.
        """
        if not isinstance(code, SparseCode):
            raise DataError(f"decode takes a SparseCode, as encode gives it, not {type(code).__name__}")
        if (code.n_snapshots, code.n_features) != (self.config.n_snapshots, self.config.n_features):
            raise DataError(
                f"a code of {code.n_snapshots} snapshots and {code.n_features} features does not fit a crosscoder "
                f"of {self.config.n_snapshots} and {self.config.n_features}"
            )
        dtype = torch.promote_types(self.W_dec.dtype, torch.float32)
        with self._computing():
            return self.backend(backend).decode(self.weights(), code.checked(self.W_dec.device, dtype))

    def forward(self, x_BKD: Tensor | Array) -> Tensor:
        """The reconstruction (B, K, D) of activations (B, K, D); differentiable, densely: the definition's.

        A NaN or an infinity raises `NonFiniteError` on a CPU. On a GPU, where nothing waits for the device, the token's
        reconstruction is NaN at every snapshot.
        """
        with self._computing():
            return definition.reconstruction(self.weights(), self.check_input(x_BKD))

    # ------------------------------------------------------------------------------------------- training

    def loss(
        self,
        x_BKD: Tensor | Array,
        *,
        sparsity_coefficient: float = 0.3,
        preactivation_coefficient: float = 0.0,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> LossTerms:
        """The loss of a batch: `model.loss(x).total.backward()` gives every parameter its gradient.

        With `backend` "reference" it is the dense definition, differentiated by autograd: what every faster step is
        compared with. "native" and "triton" compute loss and gradients at once from the sparse code; only `total` has
        a gradient then, and only in the parameters. "auto": as in `encode`. `generator` draws the tokens of
        threshold_mode "sampled".

        Raises `DataError` on a wrong shape, `NonFiniteError` for a NaN or an infinity (on a GPU, where nothing waits
        for the device, the loss is NaN), `ConfigError` for a folded crosscoder, a coefficient that is not 0 or more,
        activations that ask for a gradient which the backend does not give, or a backend that does not fit.
        """
        self.require_trainable(preactivation_coefficient)
        for name, value in (("sparsity", sparsity_coefficient), ("preactivation", preactivation_coefficient)):
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}_coefficient must be 0 or more, not {value}")
        settings = LossSettings(sparsity_coefficient, preactivation_coefficient, generator)
        with self._computing():
            chosen, found, x_BKD = self.backend(backend), self.weights(), self.check_input(x_BKD)
            if x_BKD.requires_grad and torch.is_grad_enabled() and chosen.name != "reference":
                raise ConfigError(
                    f'backend "{chosen.name}" gives no gradient in the activations, and these ask for one; give it '
                    'x.detach(), or use backend="reference"'
                )
            return chosen.loss(found, x_BKD, settings)

    def require_trainable(self, preactivation_coefficient: float = 0.0) -> None:
        """Raises `ConfigError` where the loss is not defined (a folded crosscoder, l_pre without thresholds), or can
        have no gradient (weights made under `torch.inference_mode`)."""
        if self.W_enc.is_inference():
            raise ConfigError(
                "the weights of this crosscoder were made under torch.inference_mode and cannot be trained; "
                "move or convert it outside of it"
            )
        if not bool((self.snapshot_scale == 1).all()):
            raise ConfigError("this crosscoder is folded for raw activations; train model.unfold_scales() instead")
        if preactivation_coefficient and not Gate.of(self.config).learned:
            raise ConfigError(f'preactivation_coefficient needs a threshold; gate "{self.config.gate}" has none')

    def weights_changed(self) -> None:
        """Call this after writing weights in place through `.data`; every other write is noticed (`Weights.state`)."""
        self._writes.count += 1

    def update_batch_threshold(self, smallest: Tensor) -> None:
        """BatchTopK's running mean of the smallest score kept: its threshold at inference until one is calibrated."""
        self.weights().update_batch_threshold(smallest)

    @torch.no_grad()
    def calibrated_batch_threshold(self, x_BKD: Tensor | Array, *, backend: str = "auto") -> Tensor:
        """(): the threshold at which BatchTopK lets `top_k` features a token through on `x_BKD`, with these weights.

        It is the smallest of the B x `top_k` largest scores; 0 where fewer are positive. To use it:
        `model.batch_threshold.copy_(...)`. `Trainer` does so when training ends, and in its checkpoints; a training
        loop of your own should, on some thousand of its last tokens. Raises `ConfigError` for another gate, and as
        `encode`.
        """
        gate = Gate.of(self.config)
        if not gate.whole_batch:
            raise ConfigError(f'gate "{self.config.gate}" has no threshold for all features; only "batchtopk" has')
        found = dataclasses.replace(self.weights(), training=True)
        with self._computing():
            code = self.backend(backend).encode(found, self.check_input(x_BKD))
        if code.n_pairs < gate.top_k * code.n_tokens or not code.n_tokens:
            return self.batch_threshold.new_zeros(())
        scores_N = code.values * gate.scale(found.norms())[code.features.long()]
        return scores_N.amin().to(self.batch_threshold.dtype)

    # ------------------------------------------------------------------------------------------- coordinates

    @torch.no_grad()
    def set_snapshot_mix(self, mix_KK: Tensor) -> None:
        """Let the encoder read activations mixed by `mix_KK` (symmetric, invertible), without changing what it
        computes: `W_enc` is rewritten."""
        dtype = torch.promote_types(self.W_enc.dtype, torch.float32)
        old_KK, new_KK = self.snapshot_mix.double(), mix_KK.to(self.snapshot_mix.device, torch.float64)
        change_KK = torch.linalg.solve(new_KK, old_KK).to(dtype)
        for rows in torch.split(self.W_enc.detach(), 4096):
            rows.copy_(mixed(change_KK, rows.to(dtype)))
        self.snapshot_mix.copy_(new_KK)
        self._note_mix()

    @torch.no_grad()
    def fold_scales(self, scale_K: Tensor, *, device: torch.device | str | None = None) -> Crosscoder:
        """The equal crosscoder for raw activations x, where this one reads x * `scale_K` (K,).

        Features, gates, decoder norms and (unscaled) reconstructions are the same. The gates compare h n_fk with one
        threshold a feature, so the norms' unit stays that of the scaled activations: it is kept as `snapshot_scale`.

        `device`: where the new one lies, by default where this one does. It is made a few rows at a time, so that
        beside the new one nothing large is made.
        """
        dtype = torch.promote_types(self.W_dec.dtype, torch.float32)
        scale_K = torch.as_tensor(scale_K).to(self.W_dec.device, dtype)
        if scale_K.shape != (self.config.n_snapshots,) or not bool((scale_K > 0).all()):
            raise DataError(f"scales must be {self.config.n_snapshots} positive numbers, got {scale_K.tolist()}")
        folded = Crosscoder(self.config, seed=None)
        where = self.W_dec.device if device is None else torch.device(device)
        large = ("W_enc", "W_dec")
        state = {name: tensor.clone() for name, tensor in self.state_dict().items() if name not in large}
        state["snapshot_mix"] = torch.eye(self.config.n_snapshots).to(self.snapshot_mix)
        state["b_dec"].div_(scale_K[:, None])
        state["snapshot_scale"].mul_(scale_K)
        state = {name: tensor.to(where) for name, tensor in state.items()}
        state |= {name: torch.empty_like(getattr(self, name), device=where) for name in large}
        for rows in self._few_rows():
            state["W_enc"][rows] = self._unmixed_rows(rows).mul_(scale_K[:, None]).to(where)
            state["W_dec"][rows] = self.W_dec[rows].clone().div_(scale_K[:, None]).to(where)
        folded.load_state_dict(state, assign=True)
        return folded.train(self.training)

    def unfold_scales(self) -> Crosscoder:
        """The equal crosscoder for scaled activations: the inverse of `fold_scales`."""
        unfolded = self.fold_scales(1 / self.snapshot_scale)
        unfolded.snapshot_scale.fill_(1)  # s * (1 / s) may be one rounding away from 1
        return unfolded

    # ------------------------------------------------------------------------------------------- files

    def unmixed_state(self) -> dict[str, Tensor]:
        """The state dict of the equal crosscoder whose encoder reads activations as they are. Where that is another
        `W_enc` than this one's, it lies on the CPU."""
        state: dict[str, Tensor] = self.state_dict()
        if self.is_mixed:
            state["W_enc"] = torch.empty_like(self.W_enc, device="cpu")
            for rows in self._few_rows():
                state["W_enc"][rows] = self._unmixed_rows(rows).to("cpu")
        del state["snapshot_mix"]
        return state

    def _few_rows(self) -> Iterator[slice]:
        """All features, as many at a time as have `_ROWS_BYTES` of float32 weights."""
        together = max(1, _ROWS_BYTES // (4 * self.config.n_snapshots * self.config.d_model))
        return (slice(first, first + together) for first in range(0, self.config.n_features, together))

    def _unmixed_rows(self, rows: slice) -> Tensor:
        """A copy of rows of `W_enc`, for activations as they are."""
        some_nKD = self.W_enc.detach()[rows]
        if not self.is_mixed:
            return some_nKD.clone()
        dtype = torch.promote_types(self.W_enc.dtype, torch.float32)
        return mixed(self.snapshot_mix.T, some_nKD.to(dtype)).to(self.W_enc.dtype)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write the crosscoder into a folder. `options`: the hub's (`huggingface_hub.PyTorchModelHubMixin`).

        Raises `StorageError` if that fails.
        """
        with explained_write_errors(Path(save_directory)):
            url: str | None = super().save_pretrained(save_directory, **options)
        return url

    def _save_pretrained(self, save_directory: Any) -> None:
        if self.trained_on_scaled:
            warn(
                "this crosscoder was trained on scaled activations and is saved as one that reads such; for raw "
                "activations save model.fold_scales(loader.scale_K)"
            )
        weights.save(self.config, self.unmixed_state(), save_directory)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        map_location: str | torch.device = "cpu",
        **hub_options: Any,
    ) -> Crosscoder:
        """A saved crosscoder in evaluation mode, from a folder or from the hub.

        `subfolder`: where it lies in that folder or repository. The hub's options are `weights.HUB_OPTIONS`. On the CPU
        the weights stay mapped from the file until something writes to them.

        A checkpoint of training becomes what training would export there: a crosscoder for raw activations, as far as
        their scales are known (`Trainer.save`).

        Raises `DataError` naming the file if anything is missing, truncated, damaged, foreign or newer, `ConfigError`
        for an option that there is not, or that has no effect.
        """
        folder = weights.locate(str(pretrained_model_name_or_path), subfolder, **hub_options)
        with outside_inference_mode():
            config, tensors = weights.load(folder)
            scale_K = tensors.pop(weights.ACTIVATION_SCALE, None)
            model = cls(config, seed=None)
            model.load_state_dict(tensors, assign=True)
            if scale_K is not None or model.is_mixed:
                model = model.fold_scales(torch.ones(config.n_snapshots) if scale_K is None else scale_K)
            return model.to(map_location).eval()


def _directions(shape: tuple[int, int, int], seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(F, K, D): random directions, the same at every snapshot, of norm sqrt(2 D / (K F)); drawn on the CPU, so that
    they are the same on every device."""
    n_features, n_snapshots, width = shape
    generator = torch.Generator().manual_seed(seed)
    directions_FD = torch.rand(n_features, width, generator=generator, dtype=torch.float32) * 2 - 1
    directions_FD /= torch.linalg.vector_norm(directions_FD, dim=1, keepdim=True)
    norm = math.sqrt(2 * width / (n_snapshots * n_features))
    directions_FD *= norm
    return directions_FD.to(device, dtype)[:, None, :].repeat(1, n_snapshots, 1)
