"""``python -m graphs``: the command line, with errors of this project printed as one message."""

from __future__ import annotations

import sys

from graphs.errors import GraphsError


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exit status 2 for an error that this project raises on purpose."""
    try:
        from graphs.cli import app

        app(arguments)
    except Exception as error:
        if not _on_purpose(error):
            raise
        print(f"graphs: error: {error}", file=sys.stderr)
        sys.exit(2)


def _on_purpose(error: Exception) -> bool:
    """Whether this project raised ``error`` to tell something; `passes` is imported for that only here, as it brings torch."""
    if isinstance(error, GraphsError):
        return True
    from passes.errors import PassesError

    return isinstance(error, PassesError)


if __name__ == "__main__":
    main()
