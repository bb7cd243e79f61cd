"""Oona, the message bus. Nothing here yet; planned: lifecycle events over files, memory and Redis streams."""
