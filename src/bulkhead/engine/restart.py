"""When a workload that ended is started again. Pure.

The delay doubles from 100 ms to a minute and begins anew after a run of at least ten seconds.
"""

from bulkhead.engine.body import RestartPolicy

FIRST_S = 0.1
LONGEST_S = 60.0
STEADY_S = 10.0


def wanted(policy: RestartPolicy | None, *, exit_code: int, restarts: int, by_hand: bool) -> bool:
    """Whether the policy asks for another start after this end."""
    name = policy.name if policy else "no"
    if by_hand:
        return False
    if name in {"always", "unless-stopped"}:
        return True
    if name == "on-failure" and policy is not None:
        limit = policy.maximum_retry_count
        return exit_code != 0 and (limit == 0 or restarts < limit)
    return False


def wanted_at_boot(
    policy: RestartPolicy | None, *, exit_code: int, restarts: int, by_hand: bool, was_up: bool
) -> bool:
    """Whether an engine that begins (after a reboot, say) starts it.

    "always" starts even what was stopped by hand, "unless-stopped" does not, and "on-failure"
    starts what was up when the machine went down or had failed.
    """
    name = policy.name if policy else "no"
    if name == "always":
        return True
    if name == "unless-stopped":
        return not by_hand
    return (was_up or restarts > 0) and wanted(
        policy, exit_code=exit_code, restarts=restarts, by_hand=by_hand
    )


def next_delay_s(previous_s: float, ran_s: float) -> float:
    """How long to wait before the next start."""
    if previous_s <= 0 or ran_s >= STEADY_S:
        return FIRST_S
    return min(previous_s * 2, LONGEST_S)
