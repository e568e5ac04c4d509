"""Settings of all tests: as the command line does, threads that wait without spinning."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
