"""Publishing: pushing to the Hub, code for those without this package, and a Hub on this machine to try it on."""

from .local_server import local_hub
from .upload import push, push_folder
