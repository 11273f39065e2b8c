"""One variable scales the counts of fuzz cases, kills and containers."""

import os

SCALE = float(os.environ.get("BULKHEAD_TEST_SCALE", "1"))


def scaled(count: int) -> int:
    """`count` times BULKHEAD_TEST_SCALE, at least 1."""
    return max(1, int(count * SCALE))
