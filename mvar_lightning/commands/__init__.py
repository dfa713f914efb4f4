"""One file a subcommand: `add_parser(subparsers)` describes it, its run function imports what it needs."""
