"""Sharing dictionaries: the model card."""

from .model_card import TranscoderCard, make_card, render_card
