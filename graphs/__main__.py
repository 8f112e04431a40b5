"""``python -m graphs``: the command line, with errors of this project printed as one message."""

from __future__ import annotations

import sys

from graphs.errors import GraphsError
from passes.errors import PassesError


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exit status 2 for an error that this project raises on purpose."""
    try:
        from graphs.cli import app

        app(arguments)
    except (GraphsError, PassesError) as error:
        print(f"graphs: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
