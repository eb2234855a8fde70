"""A dictionary that writes its features at two sites, for tests of code that must support several."""

from types import SimpleNamespace

import torch

from hf_transcoders import TranscoderConfig, TranscoderModel
from tests.circuits.interventions.setups import random_dictionary


class TwoSiteConfig(TranscoderConfig):
    second_site: str | None = None

    @property
    def output_sites(self):
        return (self.output_site, self.second_site)


class TwoSiteTranscoder(TranscoderModel):
    """One encoder and two decoders: that of the class itself, and that of a dictionary with the same encoder."""

    def at(self, site):
        return self if site == self.config.output_site else self.second

    def forward(self, inputs, output_features=False):
        features = self.encode(inputs)
        reconstruction = {}
        for dictionary in (self.first, self.second):
            reconstruction[dictionary.config.output_site] = dictionary(inputs).reconstruction
        return SimpleNamespace(reconstruction=reconstruction, features=features if output_features else None)


def two_site_transcoder(model, input_site, *output_sites, **changes):
    """A random dictionary at two sites, with `first` and `second`: dictionaries that write its features at one each."""
    first, second = (
        random_dictionary(model, input_site, site, seed=seed, **changes) for seed, site in enumerate(output_sites)
    )
    encoder = {name: value for name, value in first.state_dict().items() if name in ENCODER}
    second.load_state_dict(encoder, strict=False)
    assert torch.equal(first.W_enc, second.W_enc) and not torch.equal(first.W_dec, second.W_dec)
    config = TwoSiteConfig(**{**first.config.to_dict(), "second_site": str(output_sites[1])})
    both = TwoSiteTranscoder(config).eval()
    both.load_state_dict(first.state_dict())
    both.first, both.second = first, second
    return both


ENCODER = ("W_enc", "b_enc", "b_pre", "threshold", "input_scale", "input_mean", "log_threshold")
