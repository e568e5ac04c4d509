"""The crosscoder: one encoder over K snapshots, a decoder for each.

Letters: B tokens, K snapshots, D width of one activation, F features. Source: docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from crosscoder import native_model, weights
from crosscoder.code import SparseCode
from crosscoder.config import CrosscoderConfig
from crosscoder.errors import ConfigError, DataError
from crosscoder.kernels import choose_backend
from crosscoder.kernels.decode.reference import decode as reference_decode
from crosscoder.kernels.encode import reference as encode_reference
from crosscoder.kernels.encode.rows import EncoderRows
from crosscoder.kernels.threshold.reference import sample_tokens, threshold_gradient
from crosscoder.penalty import LossTerms, Penalty

BATCH_THRESHOLD_DECAY = 0.99


class Crosscoder(nn.Module, PyTorchModelHubMixin):
    """A crosscoder with parameters `W_enc`, `W_dec` (F, K, D), `b_enc` (F,), `b_dec` (K, D), `log_threshold` (F,).

    It reads activations scaled so that their mean norm is sqrt(D) at every snapshot; `fold_scales` gives the
    equal model for raw activations. While it is trained, the encoder may read them mixed over the snapshots
    (`set_snapshot_mix`): `W_enc` is then in those coordinates, until `fold_scales` or saving takes them out.
    Floating dtypes: float32, float64, bfloat16 or float16 (`log_threshold` never drops under float32: in 16 bits it
    would stop learning).
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

    def __init__(self, config: CrosscoderConfig, seed: int | None = 0) -> None:
        """Random decoder directions, the same at every snapshot; W_enc = W_dec; biases 0 (docs/method.md, section 4).

        The decoder norm is sqrt(2 D / (K F)); `crosscoder.train.initialization.search_decoder_norm` finds a better
        one from data. With `seed` None W_enc and W_dec have no memory (they are on the "meta" device), for
        `load_state_dict(..., assign=True)`.
        """
        super().__init__()
        self.config = config
        shape = (config.n_features, config.n_snapshots, config.d_model)
        self.W_dec = nn.Parameter(torch.empty(shape, device="meta") if seed is None else _directions(shape, seed))
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())
        self.b_enc = nn.Parameter(torch.zeros(shape[0]))
        self.b_dec = nn.Parameter(torch.zeros(shape[1:]))
        theta = torch.full(shape[:1], config.threshold_init)
        self.log_threshold = nn.Parameter(theta.log(), requires_grad=not config.selects_by_rank)
        self.register_buffer("snapshot_scale", torch.ones(shape[1]))
        self.register_buffer("snapshot_mix", torch.eye(shape[1]))
        """(K, K), symmetric: the encoder reads sum_l mix[k, l] x_l at snapshot k. The identity once trained."""
        self.register_buffer("batch_threshold", torch.zeros(()))
        self.derived_rows: dict[str, EncoderRows] = {}
        """What the CPU kernels keep in step with the weights, by the type of the products; made when first needed."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Crosscoder:
        log_threshold, mix_KK = self.log_threshold.detach(), self.snapshot_mix
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.snapshot_mix.dtype in (torch.bfloat16, torch.float16):
            self.snapshot_mix = mix_KK.to(self.snapshot_mix.device, torch.float32)
        if self.log_threshold.dtype in (torch.bfloat16, torch.float16):
            self.log_threshold.data = log_threshold.to(self.log_threshold.device, torch.float32)
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
        self.weights_changed()

    # ------------------------------------------------------------------------------------------- reading

    @property
    def threshold(self) -> Tensor:
        """theta (F,), at least 0."""
        return self.log_threshold.exp()

    def decoder_norms(self) -> Tensor:
        """n (F, K): a feature's strength at each snapshot, in units of scaled activations; at least float32."""
        dtype = torch.promote_types(self.W_dec.dtype, torch.float32)
        norms_FK: Tensor = torch.linalg.vector_norm(self.W_dec, dim=2, dtype=dtype) * self.snapshot_scale
        return norms_FK

    def check_input(self, x_BKD: Tensor) -> Tensor:
        """`x_BKD` in the weights' dtype or float32, on their device. Raises `DataError` if it is not (B, K, D)."""
        expected = (self.config.n_snapshots, self.config.d_model)
        if x_BKD.ndim != 3 or x_BKD.shape[1:] != expected:
            raise DataError(
                f"expected activations of shape (tokens, {expected[0]} snapshots, width {expected[1]}), "
                f"got {tuple(x_BKD.shape)}; is the crosscoder of other snapshots or another model?"
            )
        if not x_BKD.is_floating_point():
            raise DataError(f"activations must be floating point, not {x_BKD.dtype}")
        return x_BKD.to(self.W_enc.device, torch.promote_types(self.W_enc.dtype, torch.float32))

    def encoder_input(self, x_BKD: Tensor) -> Tensor:
        """What the encoder reads for activations (B, K, D): themselves, unless they are mixed over the snapshots."""
        return mixed(self.snapshot_mix, x_BKD) if self.is_mixed else x_BKD

    def preactivations(self, x_BKD: Tensor) -> Tensor:
        """h (B, F), densely."""
        x_BKD = self.encoder_input(self.check_input(x_BKD))
        return encode_reference.preactivations(x_BKD, self.W_enc.to(x_BKD.dtype), self.b_enc.to(x_BKD.dtype))

    def ranked_gates(self, h_BF: Tensor, norms_FK: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gates (B, F) of TopK or BatchTopK, and for BatchTopK in training the smallest score kept, ()."""
        top_k = cast(int, self.config.top_k)
        if self.config.gate == "topk":
            return encode_reference.topk_gates(h_BF, norms_FK, top_k), None
        if self.training:
            return encode_reference.batchtopk_gates(h_BF, norms_FK, top_k)
        return encode_reference.threshold_gates(h_BF, norms_FK, self.batch_threshold), None

    @torch.no_grad()
    def encode(self, x_BKD: Tensor, *, backend: str = "auto", candidates: str = "exact") -> SparseCode:
        """The sparse code of B tokens.

        `backend`: "reference" (dense torch), "native" (C++, on a CPU), "triton" (on a GPU), or the fastest that fits
        ("auto"). `candidates` "int8" (native only) is faster and may miss a pair in ten thousand.

        Raises `DataError` on a wrong shape, `ConfigError` for a backend that does not fit.
        """
        x_BKD = self.check_input(x_BKD)
        match choose_backend(backend, self.W_enc):
            case "native":
                return native_model.encode(self, x_BKD, "int8" if candidates == "int8" else None)
            case "triton":
                from crosscoder import triton_model

                return triton_model.encode(self, x_BKD)
        h_BF, norms_FK = self.preactivations(x_BKD), self.decoder_norms()
        if self.config.selects_by_rank:
            open_BF, _ = self.ranked_gates(h_BF, norms_FK)
            return encode_reference.ranked_code(h_BF, open_BF, self.config.n_snapshots)
        return encode_reference.jumprelu_code(h_BF, norms_FK, self.threshold, shared=self.config.gate == "shared")

    @torch.no_grad()
    def decode(self, code: SparseCode, *, backend: str = "auto") -> Tensor:
        """The reconstruction (B, K, D) of a sparse code. Raises `DataError` if the code is of another crosscoder."""
        if (code.n_snapshots, code.n_features) != (self.config.n_snapshots, self.config.n_features):
            raise DataError(
                f"a code of {code.n_snapshots} snapshots and {code.n_features} features does not fit a crosscoder "
                f"of {self.config.n_snapshots} and {self.config.n_features}"
            )
        match choose_backend(backend, self.W_enc):
            case "native":
                return native_model.decode(self, code)
            case "triton":
                from crosscoder import triton_model

                return triton_model.decode(self, code)
        return reference_decode(code, self.W_dec.to(code.values.dtype), self.b_dec.to(code.values.dtype))

    def forward(self, x_BKD: Tensor) -> Tensor:
        """The reconstruction (B, K, D) of activations (B, K, D); differentiable, densely."""
        x_BKD = self.check_input(x_BKD)
        f_BKF, _, _ = self._activations(x_BKD, generator=None)
        return self._reconstruct(f_BKF)

    # ------------------------------------------------------------------------------------------- training

    def loss(
        self,
        x_BKD: Tensor,
        *,
        sparsity_coefficient: float = 0.3,
        preactivation_coefficient: float = 0.0,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> LossTerms:
        """The loss of a batch: `model.loss(x).total.backward()` gives every parameter its gradient.

        With `backend` "reference" it is the dense definition, differentiated by autograd: what every faster step is
        compared with. "native" computes loss and gradients at once from the sparse code; only `total` has a
        gradient then, and only in the parameters. "auto" is "native" on a CPU in float32 or bfloat16. `generator`
        draws the tokens of threshold_mode "sampled". Raises `ConfigError` for a folded crosscoder.
        """
        self.require_trainable(preactivation_coefficient)
        x_BKD = self.check_input(x_BKD)
        if choose_backend(backend, self.W_enc) == "native":
            return native_model.loss(self, x_BKD, sparsity_coefficient, preactivation_coefficient, generator)
        penalty = Penalty.of(self.config)
        f_BKF, h_BF, norms_FK = self._activations(x_BKD, generator)
        terms = max(1, x_BKD.shape[0] * x_BKD.shape[1])
        reconstruction = (self._reconstruct(f_BKF) - x_BKD).square().sum() / terms
        p_F = penalty.activity(f_BKF * norms_FK.T).sum(dim=(0, 1)) / terms
        sparsity = sparsity_coefficient * penalty.total(p_F)
        preactivation = reconstruction.new_zeros(())
        if preactivation_coefficient:
            gap_BF = (self.threshold - h_BF).relu()
            preactivation = preactivation_coefficient * (gap_BF @ norms_FK).sum() / terms
        return LossTerms(reconstruction + sparsity + preactivation, reconstruction, sparsity, preactivation)

    def require_trainable(self, preactivation_coefficient: float = 0.0) -> None:
        """Raises `ConfigError` where the loss is not defined: a folded crosscoder, l_pre without thresholds."""
        if not bool((self.snapshot_scale == 1).all()):
            raise ConfigError("this crosscoder is folded for raw activations; train model.unfold_scales() instead")
        if preactivation_coefficient and self.config.selects_by_rank:
            raise ConfigError(f'preactivation_coefficient needs a threshold; gate "{self.config.gate}" has none')

    def weights_changed(self) -> None:
        """Call this after writing weights past torch's version counters (`.data`, fused optimisers without backward).

        Everything else is noticed: what the CPU kernels derive from the weights is made anew at the next use.
        """
        for rows in self.derived_rows.values():
            rows.forget()

    def update_batch_threshold(self, smallest: Tensor) -> None:
        """BatchTopK's running mean of the smallest score kept, its threshold at inference."""
        start = self.batch_threshold == 0
        mean = BATCH_THRESHOLD_DECAY * self.batch_threshold + (1 - BATCH_THRESHOLD_DECAY) * smallest
        self.batch_threshold.copy_(torch.where(start, smallest, mean))

    def _activations(self, x_BKD: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        h_BF = self.preactivations(x_BKD)
        norms_FK = self.decoder_norms()
        gates_BKF = self._dense_gates(h_BF.detach(), norms_FK.detach())
        f_BKF = _Gated.apply(h_BF, norms_FK.detach(), self.log_threshold, gates_BKF, self, generator)  # type: ignore[no-untyped-call]
        return cast(Tensor, f_BKF), h_BF, norms_FK

    def _dense_gates(self, h_BF: Tensor, norms_FK: Tensor) -> Tensor:
        """(B, K, F) bool."""
        if not self.config.selects_by_rank:
            shared = self.config.gate == "shared"
            return encode_reference.jumprelu_gates(h_BF, norms_FK, self.threshold.detach(), shared=shared)
        open_BF, smallest = self.ranked_gates(h_BF, norms_FK)
        if smallest is not None:
            self.update_batch_threshold(smallest)
        return encode_reference.for_all_snapshots(open_BF, self.config.n_snapshots)

    def _reconstruct(self, f_BKF: Tensor) -> Tensor:
        dtype = f_BKF.dtype
        return torch.einsum("bkf,fkd->bkd", f_BKF, self.W_dec.to(dtype)) + self.b_dec.to(dtype)

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
    def fold_scales(self, scale_K: Tensor) -> Crosscoder:
        """The equal crosscoder for raw activations x, where this one reads x * `scale_K` (K,).

        Features, gates, decoder norms and (unscaled) reconstructions are the same. The gates compare h n_fk with one
        threshold a feature, so the norms' unit stays that of the scaled activations: it is kept as `snapshot_scale`.
        """
        scale_K = torch.as_tensor(scale_K).to(self.W_dec)
        if scale_K.shape != (self.config.n_snapshots,) or not bool((scale_K > 0).all()):
            raise DataError(f"scales must be {self.config.n_snapshots} positive numbers, got {scale_K.tolist()}")
        folded = Crosscoder(self.config, seed=None)
        state = {name: tensor.clone() for name, tensor in self.unmixed_state().items()}
        identity_KK = torch.eye(self.config.n_snapshots).to(self.snapshot_mix)
        folded.load_state_dict({**state, "snapshot_mix": identity_KK}, assign=True)
        folded.W_enc.mul_(scale_K[:, None])
        folded.W_dec.div_(scale_K[:, None])
        folded.b_dec.div_(scale_K[:, None])
        folded.snapshot_scale.mul_(scale_K)
        return folded.train(self.training)

    def unfold_scales(self) -> Crosscoder:
        """The equal crosscoder for scaled activations: the inverse of `fold_scales`."""
        unfolded = self.fold_scales(1 / self.snapshot_scale)
        unfolded.snapshot_scale.fill_(1)  # s * (1 / s) may be one rounding away from 1
        return unfolded

    # ------------------------------------------------------------------------------------------- files

    def unmixed_state(self) -> dict[str, Tensor]:
        """The state dict of the equal crosscoder whose encoder reads activations as they are."""
        state: dict[str, Tensor] = self.state_dict()
        if self.is_mixed:
            dtype = torch.promote_types(self.W_enc.dtype, torch.float32)
            parts = [mixed(self.snapshot_mix.T, rows.to(dtype)) for rows in torch.split(self.W_enc.detach(), 4096)]
            state["W_enc"] = torch.cat(parts).to(self.W_enc.dtype)
        del state["snapshot_mix"]
        return state

    def _save_pretrained(self, save_directory: Any) -> None:
        weights.save(self.config, self.unmixed_state(), save_directory)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, map_location: str = "cpu", **hub_options: Any
    ) -> Crosscoder:
        """A saved crosscoder, from a folder or from the hub (`revision`, `cache_dir`, `local_files_only`, ...).

        On the CPU the weights stay mapped from the file until something writes to them.

        Raises `DataError` naming the file if anything is missing, truncated, damaged, foreign or newer.
        """
        config, tensors = weights.load(weights.locate(str(pretrained_model_name_or_path), **hub_options))
        model = cls(config, seed=None)
        model.load_state_dict(tensors, assign=True)
        return model.to(map_location)


def mixed(mix_KK: Tensor, x_BKD: Tensor) -> Tensor:
    """sum_l mix[k, l] x[b, l, d] (B, K, D), in the dtype of `x_BKD`."""
    return mix_KK.to(x_BKD) @ x_BKD


def _directions(shape: tuple[int, int, int], seed: int) -> Tensor:
    """(F, K, D): random directions, the same at every snapshot, of norm sqrt(2 D / (K F))."""
    n_features, n_snapshots, width = shape
    directions_FD = torch.rand(n_features, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    directions_FD /= torch.linalg.vector_norm(directions_FD, dim=1, keepdim=True)
    norm = math.sqrt(2 * width / (n_snapshots * n_features))
    return (norm * directions_FD)[:, None, :].repeat(1, n_snapshots, 1)


class _Gated(torch.autograd.Function):
    """f = h where a gate is open, 0 elsewhere, with the straight-through gradient for the thresholds."""

    @staticmethod
    def forward(
        ctx: Any,
        h_BF: Tensor,
        norms_FK: Tensor,
        log_threshold_F: Tensor,
        gates_BKF: Tensor,
        model: Crosscoder,
        generator: torch.Generator | None,
    ) -> Tensor:
        ctx.save_for_backward(h_BF, norms_FK, log_threshold_F, gates_BKF)
        ctx.model, ctx.generator = model, generator
        return torch.where(gates_BKF, h_BF[:, None, :], 0.0)

    @staticmethod
    def backward(ctx: Any, df_BKF: Tensor) -> Any:
        h_BF, norms_FK, log_threshold_F, gates_BKF = ctx.saved_tensors
        config: CrosscoderConfig = ctx.model.config
        ctx.model.weights_changed()  # they are about to
        dh_BF = torch.where(gates_BKF, df_BKF, 0.0).sum(dim=1)
        if config.selects_by_rank:
            return dh_BF, None, None, None, None, None
        tokens: Tensor | slice = slice(None)
        factor = 1.0
        if config.threshold_mode == "sampled":
            tokens, factor = sample_tokens(len(h_BF), config.threshold_sample, ctx.generator)
        dlog_threshold_F = factor * threshold_gradient(
            h_BF[tokens],
            norms_FK,
            log_threshold_F.exp(),
            df_BKF[tokens],
            config.threshold_window,
            shared=config.gate == "shared",
        )
        return dh_BF, None, dlog_threshold_F, None, None, None
