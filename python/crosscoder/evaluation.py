"""A crosscoder on the tokens of a store, in one pass."""

from __future__ import annotations

import torch

from crosscoder.activations.loader import ActivationLoader
from crosscoder.activations.norms import EDGES, median_norms
from crosscoder.activations.store import ActivationStore
from crosscoder.metrics import Evaluation, Evaluator
from crosscoder.model import Crosscoder
from crosscoder.progress import Progress


def evaluate(folded: Crosscoder, store: ActivationStore, batch_size: int, title: str = "evaluation") -> Evaluation:
    """All metrics of `folded`, a crosscoder for raw activations, on every token of `store`; on its device.

    They are in units of scaled activations, so that every snapshot counts alike. Raises `DataError` if the store is
    of other snapshots or incomplete.
    """
    model, scale_K = folded.unfold_scales().eval(), folded.snapshot_scale.cpu()
    device = model.W_dec.device
    loader = ActivationLoader(
        store, batch_size, shuffle=False, scale=scale_K.double().numpy(), drop_last=False, device=device
    )
    mean_KD = (torch.from_numpy(store.means()).float() * scale_K[:, None]).to(device)
    median_K = (torch.from_numpy(median_norms(store)).float() * scale_K).to(device)
    evaluator = Evaluator(mean_KD, model.config.n_features, median_K, EDGES)
    with Progress(title, store.n_tokens, "tokens") as progress:
        for x_BKD in loader:
            code = model.encode(x_BKD)
            evaluator.add(x_BKD, model.decode(code), code)
            progress.advance(len(x_BKD))
    return evaluator.result()
