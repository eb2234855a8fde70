"""Sharing dictionaries: the model card."""

from .model_card import TranscoderCard, card_of_folder, make_card, render_card
