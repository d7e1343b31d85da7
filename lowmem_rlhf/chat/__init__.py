"""Answers of a trained policy: to one prompt or in a conversation, and beside them those of the reference."""

from lowmem_rlhf.chat.opening import conversation, open_policy

__all__ = ["conversation", "open_policy"]
