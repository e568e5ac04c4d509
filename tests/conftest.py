"""Settings of all tests: as the command line does, threads that wait without spinning; Triton's interpreter where there
is no GPU, chosen before anything loads Triton."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
