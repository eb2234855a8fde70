"""Publish dictionaries and graphs on the Hub: model cards, uploads and remote code."""

from .cards import TranscoderCard, card_of_folder, make_card, render_card
from .upload import push, push_folder


__all__ = [
    "TranscoderCard",
    "card_of_folder",
    "make_card",
    "push",
    "push_folder",
    "render_card",
]
