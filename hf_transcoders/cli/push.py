"""`hf-transcoders push`: publish trained dictionaries on the Hub."""

from pathlib import Path

from ..errors import TranscoderError
from .arguments import output_arguments
from .terminal import Parser, echo, print_json


def parse(argv, prog):
    parser = Parser(
        prog=prog,
        description="Publishes a dictionary or set on the Hub with its model card. Only files that changed are sent, so an "
        "interrupted push can be repeated. A README.md in the folder that you wrote yourself is pushed in place of the card.",
        epilog="example:\n  hf-transcoders push runs/l8 me/smollm2-l8-transcoder --private",
    )
    parser.add_argument("folder", help="folder of a dictionary or set, written by training or `save_pretrained`")
    parser.add_argument("repo_id", help="`user/name` on the Hub; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make the repo private if it is created")
    parser.add_argument("--branch", help="branch to push to; created if it does not exist")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--subfolder", metavar="FOLDER", default="", help="folder in the repo to push to")
    parser.add_argument(
        "--remote-code",
        action="store_true",
        help="add the code of the model, for AutoModel.from_pretrained(..., trust_remote_code=True) without this package",
    )
    parser.add_argument("--message", default="Upload transcoder", help="commit message")
    parser.add_argument("--license", help="license of the weights, as an identifier of the Hub such as apache-2.0")
    parser.add_argument("--token", help="access token; by default, that of `hf auth login` or HF_TOKEN")
    output_arguments(parser)
    return parser.parse_args(argv)


def run(args):
    from ..hub.cards.card import own_card
    from ..hub.cards.make import card_of_folder
    from ..hub.push_files import run_records
    from ..hub.upload import push_folder
    from ..tracking.run import recorded_run

    if not Path(args.folder).is_dir():
        raise TranscoderError(f"There is no folder {args.folder}: give the folder that training wrote.")
    by_hand = own_card(args.folder)
    commit = push_folder(
        args.folder,
        args.repo_id,
        card=lambda repo_id: by_hand or card_of_folder(args.folder, repo_id=repo_id, license=args.license),
        records=run_records(recorded_run(args.folder)),
        commit_message=args.message,
        private=args.private or None,
        token=args.token,
        revision=args.branch,
        create_pr=args.create_pr,
        subfolder=args.subfolder,
        remote_code=args.remote_code,
    )
    if args.json:
        print_json({"commit": commit.oid, "commit_url": commit.commit_url, "pull_request": commit.pr_url})
    else:
        echo(commit.pr_url or commit.commit_url)
