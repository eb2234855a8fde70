"""Publishing: the model card, pushing to the Hub, code for those without this package, a Hub on this machine to try."""

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
