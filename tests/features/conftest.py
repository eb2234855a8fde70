from tests.evaluation.conftest import base, blocks


__all__ = ["base", "blocks"]
