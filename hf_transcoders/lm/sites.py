"""Sites: names for the places of a language model that can be read or written."""

import difflib
import re
from dataclasses import dataclass

from ..errors import TranscoderError
from .order import POINTS


HEAD_POINTS = ("query", "key", "value", "pattern", "z")


@dataclass(frozen=True)
class Site:
    """A place in a base model whose activation can be read or replaced.

    Three text forms exist, and `str(site)` gives them back:

    - `layers.8.mlp.in`: a layer (counted from 0) and one of the points of a transformer block.
    - `layers.8.attn.head.3.z`: a head (counted from 0) and one of `query`, `key` (both after the rotary embedding),
      `value`, `pattern` and `z`, the output of the head. With grouped queries the number of a `key` or `value` is that of
      the key-value head. Such places are inside attention: see [`edit_attention`] and patching.
    - `module:model.layers.8.mlp.down_proj:in`: the input or output of any module, by its name in `named_modules()`.

    The points of a block, in the order in which a sequential block reaches them:

    | point         | value                                                                                |
    |---------------|--------------------------------------------------------------------------------------|
    | `resid_pre`   | residual stream entering the block                                                   |
    | `attn.in`     | input of the attention module, after its norm                                        |
    | `attn.out`    | output of the attention module                                                       |
    | `attn.branch` | what attention adds to the residual stream: `attn.out` after a post-norm, if any     |
    | `resid_mid`   | residual stream between attention and MLP; only patching writes; absent if parallel  |
    | `mlp.in`      | input of the MLP, after its norm                                                     |
    | `mlp.out`     | output of the MLP                                                                    |
    | `mlp.branch`  | what the MLP adds to the residual stream: `mlp.out` after a post-norm, if any        |
    | `resid_post`  | residual stream leaving the block                                                    |

    Args:
        point (`str`):
            One of the points above, one of a head, or `"in"` / `"out"` of a module.
        layer (`int`, *optional*):
            Layer of a block's or head's point.
        module (`str`, *optional*):
            Dotted name of a module, for the last form.
        head (`int`, *optional*):
            Number of a head.

    Example:

    ```python
    >>> site = Site.parse("layers.8.mlp.in")
    >>> site.layer, site.point, str(site)
    (8, 'mlp.in', 'layers.8.mlp.in')
    ```
    """

    point: str
    layer: int | None = None
    module: str | None = None
    head: int | None = None

    def __post_init__(self):
        if self.module is None:
            points = POINTS if self.head is None else HEAD_POINTS
            valid = self.point in points and self.layer is not None and self.layer >= 0
        else:
            valid = self.point in ("in", "out") and self.layer is None and self.module != ""
        if not valid:
            raise TranscoderError(_misspelled(str(self)))

    @classmethod
    def parse(cls, site: "str | Site") -> "Site":
        """Read a site from its text; a [`Site`] comes back as it is.

        Raises:
            [`TranscoderError`]: the text names no site. The message lists the points and suggests the nearest site.
        """
        if isinstance(site, Site):
            return site
        if in_head := re.fullmatch(r"layers\.(\d+)\.attn\.head\.(\d+)\.(.+)", site):
            return cls(point=in_head[3], layer=int(in_head[1]), head=int(in_head[2]))
        if in_block := re.fullmatch(r"layers\.(\d+)\.(.+)", site):
            return cls(point=in_block[2], layer=int(in_block[1]))
        if in_module := re.fullmatch(r"module:(.+):(in|out)", site):
            return cls(point=in_module[2], module=in_module[1])
        raise TranscoderError(_misspelled(site))

    def __str__(self):
        if self.head is not None:
            return f"layers.{self.layer}.attn.head.{self.head}.{self.point}"
        if self.module is None:
            return f"layers.{self.layer}.{self.point}"
        return f"module:{self.module}:{self.point}"


def parse_sites(sites) -> list[Site]:
    """One site or an iterable of sites, as text or as [`Site`], into a list without repeats."""
    if isinstance(sites, (str, Site)):
        sites = [sites]
    parsed = list(dict.fromkeys(Site.parse(site) for site in sites))
    if not parsed:
        raise TranscoderError("No site was given; name at least one, for example 'layers.0.mlp.in'.")
    return parsed


def input_site(dictionary) -> Site:
    """The site that a dictionary reads.

    Args:
        dictionary ([`TranscoderModel`] or any module with a `config` that names its sites): A dictionary.
    """
    return Site.parse(dictionary.config.input_site)


def output_sites(dictionary) -> list[Site]:
    """The sites that a dictionary writes at, that of its own layer first: one, or several for a cross-layer transcoder.

    Args:
        dictionary: Same as in [`input_site`].
    """
    return [Site.parse(site) for site in dictionary.config.output_sites]


def output_site(dictionary) -> Site:
    """The first of the [`output_sites`] of a dictionary: the only one, or that of its own layer."""
    return output_sites(dictionary)[0]


def _misspelled(text):
    layer, head = (re.findall(r"\d+", text) + ["0", "0"])[:2]
    known = [f"layers.{layer}.{point}" for point in POINTS]
    known += [f"layers.{layer}.attn.head.{head}.{point}" for point in HEAD_POINTS]
    nearest = difflib.get_close_matches(text, known, n=1)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    return (
        f"'{text}' is not a site: write 'layers.<number>.<point>' with one of the points {', '.join(POINTS)}, "
        f"'layers.<number>.attn.head.<number>.<point>' with one of {', '.join(HEAD_POINTS)}, or "
        f"'module:<dotted name>:in' or ':out' for any other module.{hint}"
    )
