"""`hf-transcoders study replacement`."""

from ..arguments import dictionary_arguments, measuring_arguments, model_arguments, output_arguments, text_arguments
from ..common import finish, load_base_model, load_dictionaries, make_evaluator
from ..values import output_folder


def add_arguments(parser):
    parser.description = (
        "Measures how much worse a model predicts text when transcoders replace its MLPs: cross-entropy, KL divergence and "
        "top-1 agreement for each layer alone and for all layers at once, next to zero- and mean-ablation."
    )
    dictionary_arguments(parser)
    model_arguments(parser)
    text_arguments(parser, max_tokens=20_000)
    measuring_arguments(parser, "study", loss_tokens=5_000)
    output_arguments(parser, "report.html, results.json and PNG files", default="runs/replacement")


def run(args):
    from ...lm.devices import input_device
    from ...studies.replacement.replacement_report import save_replacement
    from ...studies.replacement.study import replacement_study

    folder = output_folder(args.output)
    dictionaries = load_dictionaries(args)
    base_model, tokenizer = load_base_model(args, dictionaries)
    evaluator = make_evaluator(args, base_model, tokenizer)
    study = replacement_study(evaluator, dictionaries.to(input_device(base_model)), transcoders_name=args.transcoders)
    finish(args, study, save_replacement(study, folder))
