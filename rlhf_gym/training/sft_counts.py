"""What preparing examples cut and dropped, in words."""

from rlhf_gym.training.sft_data import SFTData


def losses_line(data: SFTData, limit: str = "max_tokens") -> str | None:
    """One line about the examples that were cut or dropped, and the fix; None if none was.

    Args:
        data: The examples.
        limit: Name of the option that sets `data.max_tokens`.
    """
    if not data.cut and not data.dropped:
        return None
    total = len(data.train) + len(data.held_out) + data.dropped
    parts = []
    if data.dropped:
        parts.append(
            f"{data.dropped} of {total} examples are dropped, because their prompt leaves no room "
            "for a response"
        )
    if data.cut:
        parts.append(f"{data.cut} of {total} responses lose their end and their EOS")
    return f"{limit} is {data.max_tokens}: {'; '.join(parts)}; raise it to keep them"
