"""`hf-transcoders push`: publishes what training has written."""

from pathlib import Path

from ..errors import TranscoderError
from .terminal import HelpFormatter, Parser, echo, print_json


def parse(argv, prog):
    parser = Parser(
        prog=prog,
        description="Publishes a dictionary or set on the Hub, with its card. Only what changed is sent; a push that broke "
        "off is repeated by pushing again. A README.md in the folder that you wrote yourself goes in place of the card.",
        epilog="example:\n  hf-transcoders push runs/l8 me/smollm2-l8-transcoder --private",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", help="what training or `save_pretrained` has written")
    parser.add_argument("repo_id", help="`user/name` on the Hub; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make the repo private, if it is made")
    parser.add_argument("--revision", help="branch to push to; made if it does not exist")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--subfolder", default="", help="where in the repo to put everything")
    parser.add_argument(
        "--remote-code",
        action="store_true",
        help="add the model's code, for AutoModel.from_pretrained(..., trust_remote_code=True) without this package",
    )
    parser.add_argument("--message", default="Upload transcoder", help="of the commit")
    parser.add_argument("--license", help="licence of the weights, by its identifier on the Hub, such as apache-2.0")
    parser.add_argument("--token", help="access token; left out, that of `hf auth login` or HF_TOKEN")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def run(args):
    from ..hub.cards.card import own_card
    from ..hub.cards.make import card_of_folder
    from ..hub.push_files import run_records
    from ..hub.upload import push_folder
    from ..tracking.run import recorded_run

    if not Path(args.folder).is_dir():
        raise TranscoderError(f"There is no folder {args.folder}: give the one that training wrote.")
    by_hand = own_card(args.folder)
    commit = push_folder(
        args.folder,
        args.repo_id,
        card=lambda repo_id: by_hand or card_of_folder(args.folder, repo_id=repo_id, license=args.license),
        records=run_records(recorded_run(args.folder)),
        commit_message=args.message,
        private=args.private or None,
        token=args.token,
        revision=args.revision,
        create_pr=args.create_pr,
        subfolder=args.subfolder,
        remote_code=args.remote_code,
    )
    if args.json:
        print_json({"commit": commit.oid, "commit_url": commit.commit_url, "pull_request": commit.pr_url})
    else:
        echo(commit.pr_url or commit.commit_url)
