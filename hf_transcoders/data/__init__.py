"""From text to what a transcoder is trained on."""

from .offline_text import docstring_texts
from .packing import pack_tokens
from .text import load_texts
