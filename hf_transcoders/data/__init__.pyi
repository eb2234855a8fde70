from .activation_stream import ActivationStream as ActivationStream
from .activation_stream import ShardedStream as ShardedStream
from .harvest import ActivationHarvester as ActivationHarvester
from .offline_text import docstring_texts as docstring_texts
from .packing import bos_token_ids as bos_token_ids
from .packing import pack_tokens as pack_tokens
from .text import load_texts as load_texts
