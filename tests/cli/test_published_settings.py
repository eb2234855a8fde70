"""Configurations in `examples/cli_configs` that train what a paper describes."""

from pathlib import Path

from hf_transcoders.cli.train import parse, shared_options


CONFIGS = Path(__file__).parents[2] / "examples" / "cli_configs"


def test_the_sparse_autoencoder_of_2023():
    options = parse(["--config", str(CONFIGS / "sae_2023.yaml")], prog="train").options
    assert options.input_site == "layers.8.resid_post" and options.output_site is None
    found = {name: value for name, value in shared_options(options).items() if value}
    assert found == {
        "num_features": 1152, "activation": "relu", "l1_coefficient": 8.6e-4, "tied": True, "normalization": "none",
        "loss_reduction": "mean",
    }  # fmt: skip
