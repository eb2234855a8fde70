"""Mean and covariance of activations, in one pass and in memory that does not grow with the text."""

import torch


class ActivationMoments:
    """
    Number of tokens, mean and covariance of activations that arrive in parts, in float64 on the CPU.

    Parts are centered before they are squared (Chan, Golub and LeVeque, 1983), so that a mean that is large compared with
    the deviation, as in residual streams, costs no digits.

    Args:
        width (`int`): Width of the activations.
    """

    def __init__(self, width: int):
        self.tokens = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self._scatter = torch.zeros(width, width, dtype=torch.float64)

    def update(self, values: torch.Tensor) -> None:
        """Adds activations `(tokens, width)`."""
        if not len(values):
            return
        values = values.cpu().double()
        mean = values.mean(0)
        centered = values - mean
        total = self.tokens + len(values)
        shift = mean - self.mean
        self._scatter += centered.T @ centered + shift.outer(shift) * (self.tokens * len(values) / total)
        self.mean += shift * (len(values) / total)
        self.tokens = total

    @property
    def covariance(self) -> torch.Tensor:
        """Covariance `(width, width)`: the mean over tokens of products of deviations from the mean."""
        return self._scatter / max(self.tokens, 1)
