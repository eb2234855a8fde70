"""What dictionaries written by other libraries compute, by those libraries."""

from pathlib import Path

import torch
from safetensors.torch import load_file


FIXTURES = Path(__file__).parent / "fixtures"


@torch.no_grad()
def assert_same_function(model, name, tolerance=1e-5):
    """Compares a converted dictionary with what its own library recorded beside the fixture."""
    expected = load_file(FIXTURES / f"{name}.safetensors")
    model = model.eval()
    inputs = expected["inputs"]
    torch.testing.assert_close(model.encode(inputs), expected["features"], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        model(inputs).reconstruction, expected["reconstruction"], atol=tolerance, rtol=tolerance
    )
    # Else the comparison says little.
    assert (expected["features"] != 0).float().mean() > 0.05
