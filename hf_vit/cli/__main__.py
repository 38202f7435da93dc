"""The command line as `python -m hf_vit.cli`, and the function that `hf-vit` calls."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C during imports ends it as Ctrl-C later does."""
    try:
        from .main import app

        app()
    except KeyboardInterrupt:
        print("Stopped by SIGINT.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
