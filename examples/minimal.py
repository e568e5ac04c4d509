"""The whole idea on one page: a crosscoder in dense torch, trained on data whose features and births are known.

    python examples/minimal.py

Nothing here comes from the package; the package computes the same, fast, at any size (docs/method.md, sections 1 to 3).
Letters: B tokens, K snapshots (checkpoints), D width of an activation, F features of the crosscoder, T true features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

K, D, F, T = 4, 32, 64, 32
STEPS, BATCH = 1500, 256
LAMBDA, TANH_SCALE, FREQUENCY_SCALE, WINDOW = 0.1, 4.0, 0.01, 0.02


class Gate(torch.autograd.Function):
    """f = h where h n > theta, else 0. The threshold learns by a straight-through estimate within a narrow window."""

    @staticmethod
    def forward(ctx, h_BF, n_FK, log_theta_F):  # type: ignore[no-untyped-def]
        open_BFK = h_BF[:, :, None] * n_FK > log_theta_F.exp()[:, None]
        ctx.save_for_backward(h_BF, n_FK, log_theta_F, open_BFK)
        return h_BF[:, :, None] * open_BFK

    @staticmethod
    def backward(ctx, df_BFK):  # type: ignore[no-untyped-def]
        h_BF, n_FK, log_theta_F, open_BFK = ctx.saved_tensors
        theta_F1 = log_theta_F.exp()[:, None]
        near_BFK = ((h_BF[:, :, None] * n_FK - theta_F1).abs() < WINDOW / 2) & (h_BF[:, :, None] > 0)
        dlog_theta_F = (near_BFK * df_BFK * (-(theta_F1**2) / (WINDOW * n_FK.clamp_min(1e-12)))).sum(dim=(0, 2))
        return (df_BFK * open_BFK).sum(dim=2), None, dlog_theta_F


class Crosscoder(nn.Module):
    """One encoder that sums over the snapshots, a decoder for each."""

    def __init__(self) -> None:
        super().__init__()
        directions_FD = nn.functional.normalize(torch.randn(F, D), dim=1)
        start_FKD = 0.3 * directions_FD[:, None].repeat(1, K, 1)  # the same direction at every snapshot
        self.W_enc, self.W_dec = nn.Parameter(start_FKD.clone()), nn.Parameter(start_FKD)
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(F)), nn.Parameter(torch.zeros(K, D))
        self.log_theta = nn.Parameter(torch.full((F,), 0.1).log())

    def norms(self) -> Tensor:
        """(F, K): how strongly each feature exists at each snapshot."""
        return self.W_dec.norm(dim=2)

    def loss(self, x_BKD: Tensor, sparsity: float) -> tuple[Tensor, Tensor]:
        """The loss, and the share of the variance that is explained."""
        h_BF = torch.einsum("bkd,fkd->bf", x_BKD, self.W_enc) + self.b_enc
        f_BFK = Gate.apply(h_BF, self.norms().detach(), self.log_theta)  # type: ignore[no-untyped-call]
        residual_BKD = torch.einsum("bfk,fkd->bkd", f_BFK, self.W_dec) + self.b_dec - x_BKD
        p_F = (TANH_SCALE * f_BFK * self.norms()).tanh().mean(dim=(0, 2))  # smooth firing frequency
        penalty = (p_F * (1 + p_F / FREQUENCY_SCALE)).sum()
        reconstruction = residual_BKD.square().sum(dim=2).mean()
        explained = 1 - residual_BKD.square().sum() / (x_BKD - x_BKD.mean(dim=0)).square().sum()
        return reconstruction + sparsity * penalty, explained.detach()


class Planted:
    """T true features; the one with number t is born at snapshot `birth[t]` and is not there before."""

    def __init__(self) -> None:
        self.directions_TD = nn.functional.normalize(torch.randn(T, D), dim=1)
        self.birth_T = torch.arange(T) % K
        self.there_TK = (torch.arange(K) >= self.birth_T[:, None]).float()

    def sample(self, n_tokens: int) -> Tensor:
        """Activations (B, K, D): each token has about two features, of the same strength at every snapshot."""
        strength_BT = (torch.rand(n_tokens, T) < 2 / T) * (1 + torch.rand(n_tokens, T))
        return torch.einsum("bt,tk,td->bkd", strength_BT, self.there_TK, self.directions_TD)


def main(steps: int = STEPS) -> tuple[float, int, int]:
    """Train, print what was found. Returns (explained variance, true features found, births that are right)."""
    torch.manual_seed(0)
    truth, model = Planted(), Crosscoder()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        ramp = min(1.0, step / (0.1 * steps))  # the penalty comes in slowly
        loss, explained = model.loss(truth.sample(BATCH), LAMBDA * ramp)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (steps // 5) == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():8.4f}  explained variance {explained.item():.4f}")
    norms_FK = model.norms().detach()
    last_FD = nn.functional.normalize(model.W_dec.detach()[:, -1], dim=1)
    cosine_T, feature_T = (truth.directions_TD @ last_FD.T).max(dim=1)  # who learned which true feature?
    relative_TK = norms_FK[feature_T] / norms_FK[feature_T].amax(dim=1, keepdim=True)
    birth_T = (relative_TK > 0.3).int().argmax(dim=1)  # the first snapshot where the decoder norm is there
    found_T = cosine_T > 0.9
    right = int((found_T & (birth_T == truth.birth_T)).sum())
    print("\ntrue feature  cosine  decoder norm by snapshot (of its maximum)   born  truly")
    for t in range(0, T, 3):
        norms = "  ".join(f"{value:.2f}" for value in relative_TK[t].tolist())
        print(f"{t:12d}  {cosine_T[t]:6.3f}  {norms:<40}  {int(birth_T[t]):5d}  {int(truth.birth_T[t]):5d}")
    print(f"\n{int(found_T.sum())} of {T} true features found, {right} of them with the right birth")
    return explained.item(), int(found_T.sum()), right


if __name__ == "__main__":
    main()
