"""Publishing: the model card, pushing to the Hub, code for those without this package, a Hub on this machine to try."""

from .local_server import local_hub
from .model_card import TranscoderCard, card_of_folder, make_card, render_card
from .upload import push, push_folder
