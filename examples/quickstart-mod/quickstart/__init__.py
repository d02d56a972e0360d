"""A Flower app like any other, locked by a mod."""
