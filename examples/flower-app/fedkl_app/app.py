"""Both sides of the federation. Everything about it is in pyproject.toml."""

from fedkl.flower import client_app, server_app

client = client_app()
server = server_app()
