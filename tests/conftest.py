"""What several tests share."""

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real test data beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real test data is not beside this checkout")
    return SHARED_DATA
