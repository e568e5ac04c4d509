"""A tokenizer for which some of our words are one token and some are not."""

from __future__ import annotations

from typing import Any

import pytest

TEXT = """
The friends have seen the teacher near the desk. The teachers near the desk are here and the doctor is there.
The fathers that the chief knows were glad. The farmer was near the river; the farmers do know the house. The soldier
does not see the soldiers. John and Mary went to the store, and John gave a drink to Mary. The citizens of the city and
the president of the nation have met. The leader has what the leaders like. Paul is with David, Henry with Frank.
"""


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from crosscoder.activations.text import Document
    from crosscoder.quickstart.tokenizer import train_tokenizer

    return train_tokenizer([Document("text", TEXT * 20)], tmp_path_factory.mktemp("tokenizer") / "t", vocabulary=440)
