"""Dictionaries to compare trained ones with: principal and independent components, random directions, and neurons."""

import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from tqdm.auto import tqdm

from ..data.activation_moments import ActivationMoments
from ..data.harvest import ActivationHarvester
from ..errors import TranscoderError
from ..lm.wrappers import takes_model
from ..models.direction_dictionary import direction_dictionary, directions_config
from ..models.modeling_transcoder import TranscoderModel
from ..models.transcoder_set import TranscoderSet
from ..text import logging
from ..version import versions
from .grid import dictionary_config


logger = logging.get_logger(__name__)

# Share of the largest variance below which a direction has none: activations after a LayerNorm have no mean, for example.
_NO_VARIANCE = 1e-10


@dataclass
class _Measured:
    """What was measured at a site: moments of all tokens, and activations of some `(tokens, width)`."""

    moments: ActivationMoments
    sample: torch.Tensor


@dataclass
class _Settings:
    num_features: int | None
    ica_iterations: int
    seed: int


@dataclass
class _Directions:
    """Rows of a dictionary before its configuration is made; `both_signs` doubles them."""

    writes: torch.Tensor
    reads: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    both_signs: bool = True


def _principal(measured: _Measured, settings: _Settings, site: str) -> _Directions:
    """Principal components, by descending variance."""
    _, rows = _principal_axes(measured.moments, site)
    return _Directions(rows, mean=measured.moments.mean)


def _independent(measured: _Measured, settings: _Settings, site: str) -> _Directions:
    """Independent components of standardized activations, by FastICA on a sample."""
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    moments = measured.moments
    variances, _ = _principal_axes(moments, site)
    components = int((variances > _NO_VARIANCE * variances[0]).sum())
    # The components do not depend on it, because the data is whitened; its singular values are closer to each other.
    deviation = moments.covariance.diagonal().sqrt().clamp(min=1e-12)
    standardized = ((measured.sample.double() - moments.mean) / deviation).float().numpy()
    ica = FastICA(components, whiten="unit-variance", max_iter=settings.ica_iterations, random_state=settings.seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ica.fit(standardized)
    if any(issubclass(each.category, ConvergenceWarning) for each in caught):
        logger.warning(
            f"The independent components of '{site}' had not settled after {settings.ica_iterations} iterations: raise "
            "`ica_iterations`."
        )
    writes = torch.from_numpy(ica.mixing_).double().T * deviation
    # In units of the site: a component then writes as much as it is active.
    norms = writes.norm(dim=-1, keepdim=True)
    reads = torch.from_numpy(ica.components_).double() / deviation * norms
    return _Directions(writes / norms, reads, moments.mean + torch.from_numpy(ica.mean_).double() * deviation)


def _random(measured: _Measured, settings: _Settings, site: str) -> _Directions:
    """Directions with equal density in all of the space, of unit norm, each with one sign."""
    width = len(measured.moments.mean)
    rows = torch.randn(settings.num_features or width, width, generator=_generator(settings, site, "random"))
    return _Directions(torch.nn.functional.normalize(rows.double(), dim=-1), both_signs=False)


def _rotation(measured: _Measured, settings: _Settings, site: str) -> _Directions:
    """An orthonormal basis that is drawn with equal density from all of them."""
    width = len(measured.moments.mean)
    rows = torch.randn(width, width, generator=_generator(settings, site, "rotation"), dtype=torch.float64)
    q, r = torch.linalg.qr(rows)
    # The signs that make the decomposition unique; without them, not all bases would be equally likely.
    return _Directions(q * r.diagonal().sign())


def _identity(measured: _Measured, settings: _Settings, site: str) -> _Directions:
    """The coordinates of the site themselves."""
    return _Directions(torch.eye(len(measured.moments.mean), dtype=torch.float64))


@dataclass(frozen=True)
class _Kind:
    make: Callable[[_Measured, _Settings, str], _Directions]
    fitted: bool = False


#: The kinds of baselines by name.
BASELINES = {
    "pca": _Kind(_principal, fitted=True),
    "ica": _Kind(_independent, fitted=True),
    "random": _Kind(_random),
    "rotation": _Kind(_rotation),
    "identity": _Kind(_identity),
}


@takes_model
def fit_baselines(
    base_model,
    dataset: Sequence | Iterable,
    sites: Iterable[str],
    kinds: Sequence[str] = ("pca", "random", "identity"),
    *,
    num_features: int | None = None,
    max_tokens: int = 100_000,
    ica_tokens: int = 20_000,
    ica_iterations: int = 200,
    batch_size: int = 8,
    skip_first: int = 1,
    special_token_ids: Sequence[int] = (),
    seed: int = 0,
    progress: bool = True,
) -> dict[str, TranscoderSet]:
    """
    Makes dictionaries that trained ones are compared with, of the same class, from the activations of a language model.

    | kind         | features                                                                    | reconstruction |
    |--------------|-----------------------------------------------------------------------------|----------------|
    | `"pca"`      | principal components by descending variance, centered, both signs           | exact          |
    | `"ica"`      | independent components (FastICA), centered, both signs                      | exact          |
    | `"random"`   | `num_features` random directions of unit norm, one sign: `relu(v @ x)`      | none           |
    | `"rotation"` | a random orthonormal basis, both signs                                      | exact          |
    | `"identity"` | the coordinates of the site, both signs: at the input of `down_proj` neurons | exact         |

    Features are not negative, so a coordinate is two features, its positive part i and its negative part n + i (see
    [`direction_dictionary`]). The first n features of `"identity"` are `relu(x)`, the default basis of Cunningham et al.
    (2023), whose other baselines these are too. Its non-negative matrix factorization is not among them: its code is the
    solution of an optimization, and no encoder of a dictionary computes it.

    Activations are read once, as in training, and each part is forgotten: memory holds a covariance for each site and, for
    `"ica"`, `ica_tokens` activations. The rows of a dataset with a length are read in random order.

    Args:
        base_model ([`~transformers.PreTrainedModel`]): Language model.
        dataset: Token rows, as for [`ActivationHarvester`].
        sites (`Iterable[str]`): Sites, such as `layers.8.resid_post`. Each gets a dictionary of every kind.
        kinds (`Sequence[str]`, *optional*, defaults to `("pca", "random", "identity")`): Kinds, as in the table.
        num_features (`int`, *optional*): Number of random directions. By default the width of the site.
        max_tokens (`int`, *optional*, defaults to 100,000): Number of tokens that components are computed from.
        ica_tokens (`int`, *optional*, defaults to 20,000): Number of tokens of the sample for independent components.
        ica_iterations (`int`, *optional*, defaults to 200): Largest number of iterations of FastICA.
        batch_size (`int`, *optional*, defaults to 8): Rows per forward pass.
        skip_first, special_token_ids: Same as in [`ActivationHarvester`].
        seed (`int`, *optional*, defaults to 0): Seed of the order of rows, of random directions and of FastICA.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `dict[str, TranscoderSet]`: kind -> dictionaries of all sites.

    Raises:
        [`TranscoderError`]: an unknown kind or site, fewer tokens than the site is wide, or scikit-learn is missing.

    Example:

    ```python
    >>> baselines = fit_baselines(base_model, token_blocks, ["layers.8.resid_post"], ["pca", "identity"])
    >>> baselines["pca"].save_pretrained("runs/baselines/pca")
    ```
    """
    if unknown := [kind for kind in kinds if kind not in BASELINES]:
        raise TranscoderError(f"There is no kind of baseline '{unknown[0]}': choose from {', '.join(BASELINES)}.")
    if not kinds:
        raise TranscoderError(f"No kind of baseline is asked for: choose from {', '.join(BASELINES)}.")
    if "ica" in kinds and find_spec("sklearn") is None:
        raise TranscoderError(
            'Independent components need scikit-learn: install it with `pip install "hf_transcoders[ica]"`.'
        )
    harvester = ActivationHarvester(
        base_model,
        dataset,
        sites,
        rows_per_chunk=batch_size,
        skip_first=skip_first,
        special_token_ids=special_token_ids,
        seed=seed,
    )
    fitted = any(BASELINES[kind].fitted for kind in kinds)
    # Without anything to fit, one chunk tells the widths.
    measured = _measure(harvester, max_tokens if fitted else 1, ica_tokens if "ica" in kinds else 0, progress)
    settings = _Settings(num_features, ica_iterations, seed)
    found = {}
    for kind in dict.fromkeys(kinds):
        dictionaries = []
        for site, its in measured.items():
            directions = BASELINES[kind].make(its, settings, site)
            facts = {"method": kind, **_facts(harvester, its if BASELINES[kind].fitted else None)}
            dictionaries.append(_dictionary(base_model, site, directions, facts))
        found[kind] = TranscoderSet(dictionaries).eval()
    return found


def _measure(harvester, max_tokens: int, sample_tokens: int, progress: bool) -> Mapping[str, _Measured]:
    """Reads activations until there are `max_tokens`, or the text ends."""
    measured: dict[str, _Measured] = {}
    chunks = range(1 << 62) if harvester.num_chunks is None else range(harvester.num_chunks)
    with tqdm(total=max_tokens, desc="Reading activations", unit="tok", disable=not progress) as bar:
        for chunk in harvester.chunks(chunks):
            for site, values in chunk.items():
                if site not in measured:
                    width = values.shape[1]
                    measured[site] = _Measured(ActivationMoments(width), torch.empty(0, width))
                its = measured[site]
                rest = max_tokens - its.moments.tokens
                its.moments.update(values[:rest])
                missing = min(sample_tokens - len(its.sample), rest)
                if missing > 0:
                    its.sample = torch.cat([its.sample, values[:missing].cpu().float()])
            tokens = next(iter(measured.values())).moments.tokens
            bar.update(tokens - bar.n)
            if tokens >= max_tokens:
                break
    if not measured or not next(iter(measured.values())).moments.tokens:
        raise TranscoderError(
            "The data gives no activations: it is empty, or every token is masked; give more text, or check `skip_first` "
            "and the special tokens."
        )
    return measured


def _principal_axes(moments: ActivationMoments, site: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Variances, descending, and the directions `(width, width)` that have them."""
    width = len(moments.mean)
    if moments.tokens <= width:
        raise TranscoderError(
            f"{moments.tokens} tokens do not determine the components of '{site}', which is {width} wide: give more text, or "
            "raise `max_tokens`."
        )
    variances, columns = torch.linalg.eigh(moments.covariance)
    rows = columns.T.flip(0)
    # Signs are arbitrary: the largest coordinate is positive, so that they are the same everywhere.
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return variances.flip(0), rows * largest.sign()


def _dictionary(base_model, site: str, directions: _Directions, facts: dict) -> TranscoderModel:
    count, width = directions.writes.shape
    fields = directions_config(width, count, both_signs=directions.both_signs, centered=directions.mean is not None)
    config = dictionary_config(base_model, site, site, training_summary=facts, **fields)
    return direction_dictionary(config, directions.writes, directions.reads, directions.mean)


def _facts(harvester: ActivationHarvester, measured: _Measured | None) -> dict:
    """Text and settings, for the configuration; what was not measured on text does not depend on it."""
    facts = {"seed": harvester.seed, "versions": versions()}
    if measured is None:
        return facts
    name = getattr(getattr(harvester.dataset, "info", None), "dataset_name", None)
    return {
        "tokens": measured.moments.tokens,
        "dataset": name,
        "skip_first": harvester.skip_first,
        "outlier_factor": harvester.outlier_factor,
        "base_model_dtype": str(harvester.base_model.dtype).removeprefix("torch."),
        **facts,
    }


def _generator(settings: _Settings, site: str, kind: str) -> torch.Generator:
    """A generator for a site, which does not depend on the other sites."""
    return torch.Generator().manual_seed(random.Random(f"{settings.seed} {kind} {site}").getrandbits(32))
