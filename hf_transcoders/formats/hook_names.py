"""Sites of TransformerLens hook names, and what its conventions do to the activations there."""

import re

from ..errors import TranscoderError
from ..text.printable import printable
from .conventions import read_centered, read_through_norm, write_through_norm
from .dictionary import ForeignDictionary, Given


# A hook's name after `blocks.<layer>.` -> the point of a site with the same value in an unprocessed model.
_POINTS = {
    "hook_resid_pre": "resid_pre",
    "hook_attn_out": "attn.branch",
    "hook_resid_mid": "resid_mid",
    "hook_mlp_in": "resid_mid",
    "hook_mlp_out": "mlp.branch",
    "hook_resid_post": "resid_post",
    "mlp.hook_in": "mlp.in",
    "mlp.hook_out": "mlp.out",
    "ln1.hook_normalized": "attn.in",
    "ln2.hook_normalized": "mlp.in",
}
# What a hook gives: the value of its site; that value before the norm's gain and bias; the same where these were folded
# away; the value of the site, but minus its mean over dimensions where weights were centered.
PLAIN, NORMALIZED, GAINED, STREAM = "plain", "normalized", "gained", "stream"

# Names of models in TransformerLens that are not ids on the Hub.
_MODELS = {
    "gpt2-small": "openai-community/gpt2",
    "gpt2": "openai-community/gpt2",
    **{f"gpt2-{size}": f"openai-community/gpt2-{size}" for size in ("medium", "large", "xl")},
    "gpt-j-6B": "EleutherAI/gpt-j-6B",
    "tiny-stories-1M": "roneneldan/TinyStories-1M",
    "gelu-1l": "NeelNanda/GELU_1L512W_C4_Code",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
}
_OWNERS = (("pythia-", "EleutherAI"), ("gemma-", "google"), ("Qwen", "Qwen"), ("Llama-", "meta-llama"))


def base_model_id(name: str | None) -> str | None:
    """The Hub id of a model that another library calls `name`; `None` where that is not known."""
    if not name:
        return None
    if name in _MODELS or "/" in name:
        return _MODELS.get(name, name)
    return next((f"{owner}/{name}" for start, owner in _OWNERS if name.startswith(start)), None)


def site_of_hook(hook: str | None) -> tuple[str | None, str]:
    """The site of a hook and what is read there; no site where the hook is not known."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook or "")
    point = _POINTS.get(found[2]) if found else None
    if point is None:
        return None, PLAIN
    if found[2].endswith("hook_normalized"):
        kind = NORMALIZED
    else:
        kind = GAINED if found[2] == "mlp.hook_in" else STREAM
    return f"layers.{found[1]}.{point}", kind


def place(
    dictionary: ForeignDictionary,
    given: Given,
    source: str,
    base_model: str | None,
    input_hook: str | None,
    output_hook: str | None,
    is_autoencoder: bool,
    folded: bool | None = None,
) -> ForeignDictionary:
    """
    Fills in base model and sites, and undoes what the language model of another library did to the activations there.

    Args:
        dictionary ([`ForeignDictionary`]): The dictionary as its library computes it.
        given ([`Given`]): What the user says; it counts more than what the files say.
        source (`str`): The file that lacks what is not known, for messages.
        base_model (`str`, *optional*): Name of the language model by the files.
        input_hook (`str`, *optional*), output_hook (`str`, *optional*): Hook names by the files.
        is_autoencoder (`bool`): Whether the dictionary writes where it reads.
        folded (`bool`, *optional*): What the files say of [`Given.folded`].

    Raises:
        [`TranscoderError`]: something is not known; the message names the argument that says it.
    """
    reads = _given_or(given.input_site, site_of_hook(input_hook))
    writes = _given_or(given.output_site, reads if is_autoencoder else site_of_hook(output_hook))
    folded = folded if given.folded is None else given.folded
    return place_at(dictionary, given, source, base_model, reads, writes, folded)


def _given_or(site: str | None, known: tuple[str | None, str]) -> tuple[str | None, str]:
    """A site that the user names, where the value is read as it is, in place of another one."""
    return known if site in (None, known[0]) else (site, PLAIN)


def place_at(dictionary, given, source, base_model, reads, writes, folded=False) -> ForeignDictionary:
    """The work of [`place`]: `reads` and `writes` are pairs of a site and what is there."""
    (input_site, input_kind), (output_site, output_kind) = reads, writes
    if not given.complete:
        dictionary.fields |= {
            "input_site": input_site,
            "output_site": output_site,
            "base_model_name_or_path": given.base_model or base_model_id(base_model),
        }
        return dictionary
    base = given.base_fields
    if base is None and (name := given.base_model or base_model_id(base_model)):
        base = {"base_model_name_or_path": name}
    if base is None:
        called = f" ('{printable(base_model)[:60]}' is not an id on the Hub)" if base_model else ""
        raise _unknown(source, f"which language model it belongs to{called}", "`base_model=` with its Hub id")
    for site, argument, verb in ((input_site, "input_site", "reads"), (output_site, "output_site", "writes")):
        if site is None:
            raise _unknown(source, f"where it {verb}", f'`{argument}=`, such as `{argument}="layers.8.mlp.in"`')
    # What is written centered is read by norms that center it anyway.
    if input_kind in (STREAM, GAINED) and folded is None:
        raise _unknown(
            source,
            "whether its language model had folded norms and centered weights, the default of TransformerLens",
            "`folded=True` or `folded=False`",
        )
    dictionary.fields |= {"input_site": input_site, "output_site": output_site, **base}
    if dictionary.fields.get("normalization", "none") != "none":
        return _place_token_norm(
            dictionary, given, source, (input_site, input_kind), (output_site, output_kind), folded
        )
    if input_kind == NORMALIZED or (input_kind == GAINED and folded):
        dictionary = read_through_norm(dictionary, _norm(given, input_site, source))
    elif input_kind == STREAM and folded and _norm(given, input_site, source).centers:
        dictionary = read_centered(dictionary)
    if output_kind == NORMALIZED or (output_kind == GAINED and folded):
        dictionary = write_through_norm(dictionary, _norm(given, output_site, source))
    return dictionary


def _place_token_norm(dictionary, given, source, reads, writes, folded) -> ForeignDictionary:
    """
    Where each token is normalized by itself, nothing can be folded into the weights. What subtracts the mean over dimensions
    reads centered and plain streams alike.
    """
    for site, kind in (reads, writes):
        before_gain = kind == NORMALIZED or (kind == GAINED and folded)
        centered = kind == STREAM and folded and _norm(given, site, source).centers
        if before_gain or (centered and dictionary.fields["normalization"] != "token_standardize"):
            raise TranscoderError(
                f"{printable(source)} normalizes each token of an activation that its language model had "
                f"{'before the gain of a norm' if before_gain else 'centered'}, which cannot be undone in the weights: name the value that "
                "it shall read by `input_site=` and `output_site=`."
            )
    return dictionary


def _norm(given: Given, site: str, source: str):
    if given.norm_of is None:
        raise _unknown(
            source,
            f"the gain of the norm at {site}, which its language model had left out of the activations or folded away",
            "`base_model=` the loaded model",
        )
    return given.norm_of(site)


def _unknown(source: str, what: str, argument: str) -> TranscoderError:
    return TranscoderError(f"{printable(source)} does not say {what}: give {argument}.")


def hook_of_site(site: str | None) -> str | None:
    """The hook with the value of a site in an unprocessed model; `None` where there is none."""
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", site or "")
    hook = found and next((hook for hook, point in _HOOKS if point == found[2]), None)
    return f"blocks.{found[1]}.{hook}" if hook else None


# What `ln1` and `ln2` give there is not the value of a site, and `hook_mlp_in` is there on demand only.
_HOOKS = [(hook, point) for hook, point in _POINTS.items() if "normalized" not in hook and hook != "hook_mlp_in"]
