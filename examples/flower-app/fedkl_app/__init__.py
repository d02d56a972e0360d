"""A complete FedKL federation on Flower."""
