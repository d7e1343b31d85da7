"""The fixtures of whole runs."""

from card_fixtures import card_device, on_the_card, tiny_model  # noqa: F401
