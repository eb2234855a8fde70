"""A local Hub server, for tests and for trying a push without an account.

It implements the part of the Hub's HTTP protocol for pushing and loading model repos: accounts and tokens, private repos,
branches and pull requests, commits of small files inline and of large files by LFS, file trees, and downloads with ETag and
Range. It is not for publishing: it listens on the local machine only and trusts all clients.
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
