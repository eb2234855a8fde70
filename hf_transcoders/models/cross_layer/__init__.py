"""Cross-layer transcoders: dictionaries of several layers whose features write at their own and at later layers."""
