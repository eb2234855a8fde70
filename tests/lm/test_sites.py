import pytest

from hf_transcoders import TranscoderConfig, TranscoderModel
from hf_transcoders.errors import TranscoderError
from hf_transcoders.lm import Site, locate
from hf_transcoders.lm.order import POINTS, STEPS, reading_step
from hf_transcoders.lm.sites import input_site, output_site, output_sites, parse_sites
from tests.models.cross_layer.setups import cross_layer
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("point", POINTS)
def test_points_of_a_block_round_trip(point):
    site = Site.parse(f"layers.12.{point}")
    assert (site.layer, site.point, site.module) == (12, point, None)
    assert str(site) == f"layers.12.{point}"
    assert Site.parse(str(site)) == site
    assert Site.parse(site) is site


@pytest.mark.parametrize("side", ["in", "out"])
def test_module_sites_round_trip(side):
    site = Site.parse(f"module:model.layers.3.mlp.down_proj:{side}")
    assert (site.layer, site.point, site.module) == (None, side, "model.layers.3.mlp.down_proj")
    assert str(site) == f"module:model.layers.3.mlp.down_proj:{side}"


def test_equal_sites_are_one_key():
    assert {Site.parse("layers.8.mlp.in"): 1}[Site(layer=8, point="mlp.in")] == 1
    assert Site.parse("layers.08.mlp.in") == Site.parse("layers.8.mlp.in")
    assert Site.parse("layers.8.mlp.in") != Site.parse("layers.8.mlp.out")


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("layers.8.mlp.inn", "layers.8.mlp.in"),
        ("layer.8.resid_mid", "layers.8.resid_mid"),
        ("layers.8.residpost", "layers.8.resid_post"),
        ("layers.8.attention.branch", "layers.8.attn.branch"),
    ],
)
def test_misspelled_site_names_the_points_and_the_nearest_site(text, nearest):
    with pytest.raises(TranscoderError) as error:
        Site.parse(text)
    assert f"'{text}' is not a site" in str(error.value)
    assert all(point in str(error.value) for point in POINTS)
    assert str(error.value).endswith(f"Did you mean '{nearest}'?")


@pytest.mark.parametrize(
    "text",
    ["", "layers.-1.mlp.in", "layers.x.mlp.in", "module::in", "module:lm_head", "module:lm_head:both"],
)
def test_text_that_is_no_site_is_refused(text):
    with pytest.raises(TranscoderError, match="is not a site"):
        Site.parse(text)


@pytest.mark.parametrize(
    "fields",
    [
        {"point": "mlp.in"},
        {"point": "mlp.in", "layer": -1},
        {"point": "mlp.in", "module": "lm_head"},
        {"point": "in", "layer": 1, "module": "lm_head"},
    ],
)
def test_a_site_cannot_be_built_wrong(fields):
    with pytest.raises(TranscoderError, match="is not a site"):
        Site(**fields)


def test_parse_sites():
    mlp_in = Site.parse("layers.0.mlp.in")
    assert parse_sites("layers.0.mlp.in") == parse_sites(mlp_in) == [mlp_in]
    assert parse_sites(["layers.1.mlp.in", mlp_in, "layers.0.mlp.in"]) == [Site.parse("layers.1.mlp.in"), mlp_in]
    with pytest.raises(TranscoderError, match="No site was given"):
        parse_sites([])


def test_heads_are_sites_that_say_how_they_are_read():
    site = Site.parse("layers.8.attn.head.3.query")
    assert (site.layer, site.head, site.point, str(site)) == (8, 3, "query", "layers.8.attn.head.3.query")
    with pytest.raises(TranscoderError, match="Did you mean 'layers.8.attn.head.3.query'"):
        Site.parse("layers.8.attn.head.3.quary")
    with pytest.raises(TranscoderError, match="edit_attention"):
        locate(tiny_model("gpt2"), "layers.0.attn.head.3.z")


def test_points_stand_in_the_order_in_which_a_block_reads_and_writes():
    reads = [point.reads for point in POINTS.values() if point.reads is not None]
    writes = [point.writes for point in POINTS.values() if point.writes is not None]
    assert reads == sorted(reads) and writes == sorted(writes) and max(writes) + 1 == STEPS
    assert reading_step("mlp.in") == 2 and reading_step("mlp.in", parallel=True) == 1


def test_the_sites_of_a_dictionary_are_read_from_its_configuration():
    dictionary = TranscoderModel(
        TranscoderConfig(d_in=4, num_features=8, k=2, input_site="layers.1.mlp.in", output_site="layers.1.mlp.branch")
    )
    assert input_site(dictionary) == Site("mlp.in", 1)
    assert output_sites(dictionary) == [output_site(dictionary)] == [Site("mlp.branch", 1)]


def test_a_layer_of_a_cross_layer_transcoder_writes_at_its_own_site_first():
    first, last = cross_layer(layers=2).values()
    assert list(map(str, output_sites(first))) == list(first.config.output_sites) and len(output_sites(first)) == 2
    assert output_site(first) == output_sites(first)[0] and output_sites(last) == [output_site(last)]
