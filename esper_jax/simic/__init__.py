"""Simic, the gym where a controller is trained. Nothing here yet; planned: growing a network as an environment."""
