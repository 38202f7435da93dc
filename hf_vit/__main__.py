"""The command line as `python -m hf_vit`."""

from .cli.__main__ import main

if __name__ == "__main__":
    main()
