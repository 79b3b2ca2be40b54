"""The argument parser of the subcommands that take a folder: their text as written, and no abbreviated options."""

from __future__ import annotations

import argparse


def parser_of(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose help shows description and examples line by line."""
    return argparse.ArgumentParser(
        f"structlora {command}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
