"""What a test needs and a machine may lack."""

import os
from typing import NoReturn

import pytest


def absent(reason: str) -> NoReturn:
    """Skip; or fail where everything was promised."""
    if os.environ.get("HPC_MM_REQUIRE_CLUSTER") == "1":
        pytest.fail(f"{reason}, and HPC_MM_REQUIRE_CLUSTER=1")
    pytest.skip(reason)
