"""A server on this machine that answers as the Hub does: for tests, and for trying out a push without an account.

It speaks the part of the Hub's HTTP protocol that pushing and loading model repos needs: accounts and tokens, private
repos, branches and pull requests, commits of small files inline and of large ones by LFS, file trees, downloads with
ETag and Range. It is no place to publish: it listens on this machine only and trusts whoever reaches it.
"""

from .client import local_hub
from .server import LocalHub
from .traffic import TOKEN, USER, Account, Fault, Request


__all__ = [
    "Account",
    "Fault",
    "LocalHub",
    "Request",
    "TOKEN",
    "USER",
    "local_hub",
]
