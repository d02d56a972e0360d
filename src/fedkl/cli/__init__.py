"""The command line, the only part of FedKL that prints. Torch is loaded by commands, on use."""

from fedkl.cli.app import main

__all__ = ["main"]
