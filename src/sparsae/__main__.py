"""The program: `sparsae`, and the same commands as `python -m sparsae`."""

import sys


def main() -> int:
    """As `sparsae.cli.main`; a Ctrl-C while that is imported ends it without a traceback, too."""
    try:
        from sparsae.cli import main as command
    except KeyboardInterrupt:
        print("sparsae: interrupted", file=sys.stderr)
        return 130
    return command()


if __name__ == "__main__":
    sys.exit(main())
