"""Model cards of dictionaries and sets."""

from .card import TranscoderCard, is_generated, is_unedited, own_card
from .make import card_of_folder, make_card, render_card


__all__ = [
    "TranscoderCard",
    "card_of_folder",
    "is_generated",
    "is_unedited",
    "make_card",
    "own_card",
    "render_card",
]
